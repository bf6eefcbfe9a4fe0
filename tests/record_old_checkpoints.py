"""Record what older versions of rsl_rl save, and how their policies act: tests/goldens/old/<version>_<kind>.pt.

    pip install --no-deps --target old/3.3.0 rsl-rl-lib==3.3.0      # and 2.3.3, 3.0.1, 4.0.1
    for v in 2.3.3 3.0.1 3.3.0 4.0.1; do PYTHONPATH=old/$v python tests/record_old_checkpoints.py $v; done

The numbers are the version's own: its classes draw the weights, one step of its Adam moves them, its normalisers have seen
something, and `infos` holds observations and the actions of its inference.
"""

import pathlib
import sys

import torch
from tensordict import TensorDict

VERSION, FOLDER = sys.argv[1], pathlib.Path(__file__).parent / "goldens" / "old"
GROUPS = {"policy": ["policy"], "critic": ["critic"], "actor": ["policy"], "teacher": ["critic"], "student": ["policy"]}
SIZES = dict(actor_hidden_dims=[6, 4], critic_hidden_dims=[5])


def observations(rows=5):
    return TensorDict({"policy": 3.0 * torch.randn(rows, 3), "critic": torch.randn(rows, 4) - 1.0}, batch_size=[rows])


def save(kind, checkpoint, network, act, learn):
    optimizer = torch.optim.Adam(network.parameters() if isinstance(network, torch.nn.Module) else network, lr=3e-4)
    loss = learn(observations())
    loss.backward()
    optimizer.step()
    obs = observations()
    with torch.no_grad():
        infos = {"obs": obs.to_dict(), "actions": act(obs)}
    content = {name: x.state_dict() for name, x in checkpoint.items()}
    content |= {"optimizer_state_dict": optimizer.state_dict(), "iter": 7, "infos": infos}
    FOLDER.mkdir(exist_ok=True)
    torch.save(content, FOLDER / f"{VERSION}_{kind}.pt")


def spread(network, obs):
    """Whatever has parameters gets a gradient."""
    std = [x for name, x in network.named_parameters() if name.endswith("std")]
    return sum((x**2).sum() for x in std)


def record_2():
    from rsl_rl.modules import ActorCritic, EmpiricalNormalization

    network = ActorCritic(3, 4, 2, **SIZES)
    own, privileged = EmpiricalNormalization([3]), EmpiricalNormalization([4])
    for _ in range(3):
        obs = observations()
        own(obs["policy"]), privileged(obs["critic"])
    own.eval(), privileged.eval()
    checkpoint = {"model_state_dict": network, "obs_norm_state_dict": own, "privileged_obs_norm_state_dict": privileged}

    def learn(obs):
        mean = network.act_inference(own(obs["policy"]))
        return (mean**2).sum() + network.evaluate(privileged(obs["critic"])).sum() + spread(network, obs)

    save("mlp", checkpoint, network, lambda obs: network.act_inference(own(obs["policy"])), learn)


def record_3():
    from rsl_rl.modules import ActorCritic, ActorCriticRecurrent, StudentTeacher

    normal = dict(actor_obs_normalization=True, critic_obs_normalization=True)
    kinds = {"mlp": (ActorCritic, {}), "log": (ActorCritic, dict(noise_std_type="log"))}
    kinds["lstm"] = (ActorCriticRecurrent, dict(rnn_type="lstm", rnn_hidden_dim=4, rnn_num_layers=1))
    if VERSION >= "3.1":
        kinds["heteroscedastic"] = (ActorCritic, dict(state_dependent_std=True))
    for kind, (cls, options) in kinds.items():
        network = cls(observations(), GROUPS, 2, **SIZES, **normal, **options)
        network.update_normalization(observations())

        def learn(obs, network=network):
            mean, values = network.act_inference(obs), network.evaluate(obs)
            network.reset(torch.ones(len(obs), dtype=torch.bool))
            return (mean**2).sum() + values.sum() + spread(network, obs)

        save(kind, {"model_state_dict": network}, network, network.act_inference, learn)
    options = dict(student_hidden_dims=[6], teacher_hidden_dims=[5], student_obs_normalization=True)
    network = StudentTeacher(observations(), GROUPS, 2, **options)
    network.update_normalization(observations())
    learn = lambda obs: (network.act_inference(obs) ** 2).sum()
    save("student", {"model_state_dict": network}, network, network.act_inference, learn)


def record_4():
    from rsl_rl.models import MLPModel, RNNModel

    for kind, cls, options in (
        ("mlp", MLPModel, {}),
        ("log", MLPModel, dict(noise_std_type="log")),
        ("gru", RNNModel, dict(rnn_type="gru", rnn_hidden_dim=4, rnn_num_layers=1)),
    ):
        memory = {name: x for name, x in options.items() if name.startswith("rnn")}
        groups = dict(obs_normalization=True, hidden_dims=[6, 4])
        actor = cls(observations(), GROUPS, "actor", 2, stochastic=True, **groups, **options)
        critic = cls(observations(), GROUPS, "critic", 1, obs_normalization=True, hidden_dims=[5], **memory)
        for model in (actor, critic):
            model.update_normalization(observations())

        def learn(obs, actor=actor, critic=critic):
            result = (actor(obs) ** 2).sum() + critic(obs).sum() + spread(actor, obs)
            for model in (actor, critic):
                model.reset(torch.ones(len(obs), dtype=torch.bool))
            return result

        parameters = [*actor.parameters(), *critic.parameters()]
        save(kind, {"actor_state_dict": actor, "critic_state_dict": critic}, parameters, actor, learn)


torch.manual_seed(0)
{"2": record_2, "3": record_3, "4": record_4}[VERSION[0]]()
