"""Record the golden numbers: `python tests/record_goldens.py [case ...]` runs rsl_rl 5.5.1 in float64 on every case.

Only the reference is run here, never a script, so a golden cannot inherit a script's mistake. Re-record a case only because
the case or the reference has changed.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    import cases
    import reference
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.chdir(tempfile.mkdtemp())  # where a distillation's teacher is written
    for name in sys.argv[1:] or cases.CASES:
        script, env_id, settings = cases.CASES[name]
        _, args, make_env = cases.build(name)
        if script == "distill_dagger":
            history, runner = reference.run_distillation(args, make_env(), cases.TEACHER)
        else:
            history, runner = reference.run(args, make_env())
        networks = {part: getattr(runner.alg, part) for part in ("actor", "critic", "student") if hasattr(runner.alg, part)}
        weights = {part: sum(p.abs().sum().item() for p in network.parameters()) for part, network in networks.items()}
        versions = {package: importlib.metadata.version(package) for package in ("rsl-rl-lib", "torch", "tensordict")}
        golden = dict(
            case=dict(script=script, env=env_id, args=settings), versions=versions | {"python": platform.python_version()}
        )
        golden |= dict(iterations=history, sum_of_absolute_weights=weights)
        path = ROOT / "tests" / "goldens" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(golden, indent=1) + "\n")
        print(f"{path.name}: {len(history)} iterations, the last one's {next(iter(history[-1].items()))}")


if __name__ == "__main__":
    main()
