"""A run that goes on from a checkpoint is the run that was never stopped, tensor by tensor."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from lightning import Callback

from ppo_lightning import PPO, ActorCritic


class SaveAt(Callback):
    def __init__(self, iteration):
        self.iteration = iteration

    def on_train_epoch_end(self, trainer, pl_module):
        if pl_module.policy_version == self.iteration:
            trainer.save_checkpoint("at.ckpt")


def recurrent(*spaces):
    return ActorCritic(*spaces, memory="lstm", hidden_sizes=(16,))


SMALL = {"num_envs": 3, "num_steps": 32, "total_steps": 6 * 96, "update_epochs": 2, "num_minibatches": 3}
RUNS = {
    "cartpole": {"env": "CartPole-v1"},
    "pendulum": {"env": "Pendulum-v1", "normalize_observation": True, "normalize_reward": True},
    "half cheetah": {"env": "HalfCheetah-v5", "normalize_observation": True, "normalize_reward": True},
    "ant": {"env": "Ant-v5"},
    "humanoid": {"env": "Humanoid-v5"},
    "hopper of version 4": {"env": "Hopper-v4"},
    "taxi": {"env": "Taxi-v4"},
    "frozen lake": {"env": "FrozenLake-v1"},
    "blackjack": {"env": "Blackjack-v1"},
    "acrobot": {"env": "Acrobot-v1", "env_kwargs": {"max_episode_steps": 40}},
    "mountain car": {"env": "MountainCarContinuous-v0", "env_kwargs": {"max_episode_steps": 50}},
    "memory": {"env": "CartPole-v1", "policy": recurrent, "num_minibatches": 1},
    "wrappers": {
        "env": "Pendulum-v1",
        "wrappers": [
            gym.wrappers.NormalizeObservation,
            gym.wrappers.TimeAwareObservation,
            lambda env: gym.wrappers.FrameStackObservation(env, 3),
            gym.wrappers.NormalizeReward,
        ],
    },
    "workers": {"env": "CartPole-v1", "vectorization": "async"},
    "vectorised": {"env": "CartPole-v1", "vectorization": "vector_entry_point"},
    "tensors": {"env": "ppo_lightning.envs.classic_control.Pendulum"},
    "tanh": {"env": "Pendulum-v1", "policy": lambda *spaces: ActorCritic(*spaces, distribution="tanh")},
    "gSDE": {"env": "Pendulum-v1", "policy": lambda *spaces: ActorCritic(*spaces, distribution="gsde")},
    "popart": {"env": "Pendulum-v1", "popart": {"beta": 0.01}},
    "schedule": {"env": "CartPole-v1", "lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2)},
    "next step": {"env": lambda num_envs: gym.make_vec("CartPole-v1", num_envs, vectorization_mode="sync")},
}


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def outcome(model, trainer):
    """All that training has made: weights, moments, counters, the optimiser, and the rollout that would be next."""
    optimizer = trainer.optimizers[0].state_dict()["state"]
    moments = {f"{index} {name}": value for index, state in optimizer.items() for name, value in state.items()}
    following = model.rollouts.collect()
    model.close_environments()
    rollout = following.exclude("policy_version").flatten_keys(".").to_dict()
    window = torch.tensor(list(model.rollouts.episodes.window))
    return {**model.state_dict(), **moments, **rollout, "window": window, "random": torch.get_rng_state()}


@pytest.mark.parametrize("name", RUNS)
def test_going_on_equals_never_having_stopped(name, fit):
    options = {**SMALL, **RUNS[name]}
    model = PPO(**options)
    trainer = fit(model, callbacks=[SaveAt(3)], enable_checkpointing=False)
    expected = outcome(model, trainer)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    model = PPO(**options)
    trainer = fit(model, ckpt_path="at.ckpt")
    same(outcome(model, trainer), expected)


def test_fitting_again_goes_on_where_the_last_fit_ended(fit):
    torch.manual_seed(0)
    model = PPO("CartPole-v1", **SMALL)
    expected = outcome(model, fit(model))
    torch.manual_seed(0)
    model = PPO("CartPole-v1", **SMALL)
    fit(model, max_epochs=2)
    fit(model, max_epochs=1)
    trainer = fit(model)
    found = outcome(model, trainer)
    found["random"] = expected["random"]
    same(found, expected)


def test_other_environments_begin_anew_and_the_log_says_so(fit, caplog):
    fit(PPO("Pendulum-v1", **SMALL), callbacks=[SaveAt(3)])
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(PPO("Pendulum-v1", env_kwargs={"g": 5.0}, **SMALL), ckpt_path="at.ckpt")
    assert "environments begin anew: they were {'env': 'Pendulum-v1'" in caplog.text
