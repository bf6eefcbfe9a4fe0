"""Every loss, learning rate and weight equals rsl_rl 5.5.1's, run live beside the script: bit for bit in float32."""

import cases
import pytest
import torch

pytest.importorskip("rsl_rl", reason="the reference, rsl-rl-lib==5.5.1, is in the extra `test`")
import reference  # noqa: E402


@pytest.mark.parametrize("name", [name for name, case in cases.CASES.items() if case[0] == "ppo_continuous"])
def test_trajectory_is_bit_equal(name):
    module, args, make_env = cases.build(name)
    expected, runner = reference.run(args, make_env())
    history, agent = cases.run(module, args, make_env())
    assert len(history) == len(expected) == args.max_iterations >= 10
    for iteration, (ours, theirs) in enumerate(zip(history, expected)):
        for tag, value in theirs.items():
            assert ours[tag] == value, f"iteration {iteration}: {tag}"
    for part in ("actor", "critic"):
        theirs = getattr(runner.alg, part).state_dict()
        assert list(agent[part].state_dict()) == list(theirs)
        for key, value in agent[part].state_dict().items():
            assert torch.equal(value, theirs[key]), f"{part} {key}"
    for key, state in runner.alg.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(agent["optimizer"].state_dict()["state"][key][name], torch.as_tensor(value)), (
                f"Adam {key} {name}"
            )


def test_actions_follow_the_reference():
    """The deterministic policy of equal weights gives equal actions."""
    module, args, make_env = cases.build("cartpole-beta")
    _, runner = reference.run(args, make_env())
    _, agent = cases.run(module, args, make_env())
    obs = make_env().get_observations()
    theirs = runner.get_inference_policy()(obs)
    assert torch.equal(module.Policy(agent["actor"]).act(obs), theirs)
