"""Record the golden numbers: `python tests/record_goldens.py [case ...]` runs rsl_rl 5.5.1 in float64 on every case.

Only the reference is run here, never a script, so a golden cannot inherit a script's mistake. Re-record a case only because
the case or the reference has changed.
"""

import importlib.metadata
import json
import pathlib
import platform
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    import cases
    import reference
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for name in sys.argv[1:] or cases.CASES:
        script, env_id, settings = cases.CASES[name]
        _, args, make_env = cases.build(name)
        history, runner = reference.run(args, make_env())
        weights = {
            part: sum(p.abs().sum().item() for p in getattr(runner.alg, part).parameters()) for part in ("actor", "critic")
        }
        versions = {package: importlib.metadata.version(package) for package in ("rsl-rl-lib", "torch", "tensordict")}
        golden = dict(
            case=dict(script=script, env=env_id, args=settings), versions=versions | {"python": platform.python_version()}
        )
        golden |= dict(iterations=history, sum_of_absolute_weights=weights)
        path = ROOT / "tests" / "goldens" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(golden, indent=1) + "\n")
        print(f"{path.name}: {len(history)} iterations, last surrogate {history[-1]['Loss/surrogate']:.6f}")


if __name__ == "__main__":
    main()
