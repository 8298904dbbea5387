"""A run that goes on from a checkpoint is the run that was never stopped, tensor by tensor."""

import random
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from lightning import Callback
from outcomes import outcome, same

from ppo_lightning import PPO, ActorCritic
from ppo_lightning.cli import main
from ppo_lightning.envs.classic_control import CartPole
from ppo_lightning.errors import EnvironmentFault, InputError
from ppo_lightning.rollout.collectors import TensorCollector


class SaveAt(Callback):
    def __init__(self, iteration):
        self.iteration = iteration

    def on_train_epoch_end(self, trainer, pl_module):
        if pl_module.policy_version == self.iteration:
            trainer.save_checkpoint("at.ckpt")


def recurrent(*spaces):
    return ActorCritic(*spaces, rnn="lstm", hidden_sizes=(16,))


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
            lambda env: gym.wrappers.DelayObservation(env, 2),
            gym.wrappers.TimeAwareObservation,
            lambda env: gym.wrappers.FrameStackObservation(env, 3),
            lambda env: gym.wrappers.StickyAction(env, 0.3),
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


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one(name, fit):
    options = {**SMALL, **RUNS[name]}
    model = PPO(**options)
    trainer = fit(model, callbacks=[SaveAt(3)], enable_checkpointing=False)
    expected = outcome(model, trainer)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    model = PPO(**options)
    trainer = fit(model, ckpt_path="at.ckpt")
    same(outcome(model, trainer), expected)


def test_fitting_again_resumes_where_the_last_fit_ended(fit):
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


def test_other_environments_restart_and_the_log_says_so(fit, caplog):
    fit(PPO("Pendulum-v1", **SMALL), callbacks=[SaveAt(3)])
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(PPO("Pendulum-v1", env_kwargs={"g": 5.0}, **SMALL), ckpt_path="at.ckpt")
    assert "environments begin new episodes: they were {'env': 'Pendulum-v1'" in caplog.text


# --- several processes --------------------------------------------------------------------------------------------------


def test_two_processes_resume_bit_exactly_and_any_number_can_resume_with_their_weights(tmp_path, monkeypatch):
    from test_ddp import COMMAND, fit_forked
    from test_ddp import fit as fit_by_command

    flags = ["--model.normalize_observation=true", "--model.normalize_reward=true", "--model.eval_interval=2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    expected, _ = fit_forked(whole, *flags)
    fit_forked(stopped, *flags, "--trainer.max_epochs=4")
    shutil.copytree(stopped, tmp_path / "alone")
    found, _ = fit_by_command(stopped, *flags, "--ckpt_path=last")
    for rank in (0, 1):
        for part in ("state_dict", "optimizer"):
            torch.testing.assert_close(found[rank][part], expected[rank][part], rtol=0, atol=0)
    last = torch.load(tmp_path / "alone/lightning_logs/version_0/checkpoints/last.ckpt")
    alone = PPO.load_from_checkpoint(tmp_path / "alone/lightning_logs/version_0/checkpoints/last.ckpt")
    torch.testing.assert_close(dict(alone.state_dict()), dict(last["state_dict"]), rtol=0, atol=0)
    assert len(last["ppo_lightning"]["processes"]) == 2
    monkeypatch.chdir(tmp_path / "alone")
    monkeypatch.delenv("PL_GLOBAL_SEED")
    main([*COMMAND[3:], *flags, "--ckpt_path=last", "--trainer.devices=1", "--trainer.strategy=auto"])


class Draws(gym.Env):
    """Draws from the streams that everything in a process shares."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.seen(), {}

    def step(self, action):
        return self.seen(), random.random(), np.random.random() < 0.1, False, {}  # noqa: NPY002

    def seen(self):
        drawn = random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002
        return np.array(drawn, np.float32)

    def get_state(self):
        return 0

    def set_state(self, state):
        """All of it is in the streams."""


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_streams_that_environments_share_with_their_process_resume_too(vectorization, fit):
    options = {**SMALL, "env": Draws, "vectorization": vectorization}
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    model = PPO(**options)
    trainer = fit(model, callbacks=[SaveAt(3)])
    expected = outcome(model, trainer)
    model = PPO(**options)
    trainer = fit(model, ckpt_path="at.ckpt")
    same(outcome(model, trainer), expected)


# --- environments of one's own -------------------------------------------------------------------------------------------


class Walk(gym.Env):
    """A walk whose noise is its own generator's."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal()
        return self._seen(), {}

    def step(self, action):
        self.place += float(action) - 0.5 + self.np_random.normal()
        return self._seen(), -abs(self.place), abs(self.place) > 3, False, {}

    def _seen(self):
        return np.array([self.place], dtype=np.float32)


class RememberedWalk(Walk):
    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


class WrongWalk(Walk):
    def get_state(self):
        return object()

    def set_state(self, state):
        """Never reached."""


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_may_say_itself_what_its_state_is(fit, vectorization):
    options = {**SMALL, "env": RememberedWalk, "vectorization": vectorization}
    model = PPO(**options)
    expected = outcome(model, fit(model, callbacks=[SaveAt(3)]))
    model = PPO(**options)
    same(outcome(model, fit(model, ckpt_path="at.ckpt")), expected)


def test_a_failure_in_an_evaluation_leaves_the_state_of_training(fit, tmp_path):
    class FailsLater(RememberedWalk):
        fails = False

        def step(self, action):
            if FailsLater.fails:
                raise ValueError("of an evaluation")
            return super().step(action)

    class Evaluates(Callback):
        def on_validation_start(self, *_):
            FailsLater.fails = True

    options = {
        "callbacks": [Evaluates()],
        "enable_checkpointing": True,
        "limit_val_batches": 1,
        "default_root_dir": tmp_path,
    }
    with pytest.raises(EnvironmentFault, match="of an evaluation"):
        fit(PPO(FailsLater, **SMALL, eval_interval=2, num_eval_episodes=1), **options)
    contents = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert contents["ppo_lightning"]["processes"][0]["rollouts"] is not None


def test_one_that_does_not_restarts_and_the_log_says_so(fit, caplog):
    fit(PPO(Walk, **SMALL), callbacks=[SaveAt(3)])
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        model = PPO(Walk, **SMALL)
        fit(model, ckpt_path="at.ckpt")
    assert model.num_env_steps == SMALL["total_steps"]
    assert "environments begin new episodes: Walk has no get_state and set_state" in caplog.text


def test_a_state_that_no_file_can_hold_is_refused(fit):
    with pytest.raises(InputError, match="get_state of WrongWalk returned a object: return numbers"):
        fit(PPO(WrongWalk, **SMALL), callbacks=[SaveAt(1)])


@pytest.mark.parametrize("compiles", [False, True])
def test_environments_that_are_tensors_resume_compiled_or_not(fit, compiles, monkeypatch):
    monkeypatch.setattr(TensorCollector, "MAX_UNROLLED", 2)  # which compiles sooner
    options = {**SMALL, "env": CartPole, "compile": compiles, "num_minibatches": 2}
    model = PPO(**options)
    expected = outcome(model, fit(model, callbacks=[SaveAt(3)]))
    model = PPO(**options)
    same(outcome(model, fit(model, ckpt_path="at.ckpt")), expected)


def test_a_longer_run_resumes_with_its_own_schedule(fit):
    fit(PPO("CartPole-v1", **SMALL), callbacks=[SaveAt(3)])
    model = PPO("CartPole-v1", **{**SMALL, "total_steps": 1152})
    fit(model, ckpt_path="at.ckpt")
    assert model.num_env_steps == 1152
    assert model.learning_rate == pytest.approx(3e-4 * (1 - (1152 - 96) / 1152))
