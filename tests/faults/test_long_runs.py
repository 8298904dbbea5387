"""What repeats, what counts, and what never ends (F09, F27-F29)."""

import gc
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from probes import Endless

from ppo_lightning import PPO
from ppo_lightning.envs.classic_control import CartPole
from ppo_lightning.evaluation import episodes as evaluation
from ppo_lightning.rollout import dataset as rollout
from ppo_lightning.runs.ranks import Ranks

SMALL = {"num_envs": 2, "num_steps": 16, "total_steps": 128, "num_minibatches": 2}


# --- F09: an environment that never ends -------------------------------------------------------------------------------


def test_an_environment_that_never_ends_trains_with_one_warning_and_can_be_evaluated(fit, monkeypatch):
    monkeypatch.setattr(rollout, "WARN_WITHOUT_EPISODE_END", 40)
    monkeypatch.setattr(evaluation, "MAX_EPISODE_STEPS", 30)
    model = PPO(partial(Endless, 10**9), **{**SMALL, "total_steps": 256})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model)
    told = [str(warning.message) for warning in caught if "no episode" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith("no episode has ended in 40 steps of each environment")
    logged = model.trainer.callback_metrics
    assert logged["train/loss"].isfinite()
    assert "rollout/ep_rew_mean" not in logged
    with pytest.warns(UserWarning, match="has not ended an evaluation episode within 30 steps"):
        assert model.evaluate(3)["eval/mean_reward"] == 30.0


@pytest.mark.parametrize(
    ("env", "advice"),
    [
        ("Taxi-v4", "env_kwargs: max_episode_steps"),
        (partial(Endless, 10**9), "gymnasium.wrappers.TimeLimit among the wrappers, or what Endless takes for it"),
        (partial(CartPole, max_episode_steps=10**9), "env_kwargs: max_episode_steps"),
        (SyncVectorEnv([Endless] * 2), "give the environment a time limit of its own"),
    ],
)
def test_how_to_give_a_time_limit_depends_on_what_the_environment_is(env, advice):
    assert advice in PPO(env).env_factory.time_limit_advice


def test_no_warning_where_episodes_end(fit, monkeypatch):
    monkeypatch.setattr(rollout, "WARN_WITHOUT_EPISODE_END", 16)
    fit(PPO(partial(Endless, 15), **SMALL))


# --- F27: seeds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "FrozenLake-v1", "HalfCheetah-v5"])
def test_the_same_seed_is_the_same_run_and_another_is_not(env, fit):
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = PPO(env, **{**SMALL, "total_steps": 64})
        model.seed = seed
        fit(model)
        last = model.rollouts.collect()
        model.close_environments()
        runs.append({**model.state_dict(), **last.flatten_keys().to_dict()})
    first, same, other = runs
    assert all(torch.equal(first[key], same[key]) for key in first if isinstance(first[key], torch.Tensor))
    assert not torch.equal(first["action_log_prob"], other["action_log_prob"])


def test_four_ranks_of_eight_environments_begin_with_as_many_states():
    seen = []
    for rank in range(4):
        model = PPO("CartPole-v1", num_envs=8, num_steps=1, num_minibatches=1)
        model.seed, model.ranks = 7, Ranks(SimpleNamespace(global_rank=rank, world_size=1))
        seen.append(model.rollouts.collect()["observation"][0].clone())
    assert len(torch.cat(seen).unique(dim=0)) == 32


# --- F28: counters -----------------------------------------------------------------------------------------------------


class Steps(Logger):
    """Keeps the x-axis."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.metrics: dict[str, float] = {}

    name, version = "steps", 0

    def log_hyperparams(self, *args, **kwargs) -> None:
        """There is no use for them."""

    def log_metrics(self, metrics, step=None) -> None:
        self.steps.append(step)
        self.metrics.update(metrics)


class Logs(Callback):
    """Logs something of its own, by Lightning's way."""

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        pl_module.log("mine", 1.0)


@pytest.mark.parametrize("count", [2**24, 2**31, 2**53 - 1])
def test_counters_go_up_by_one_however_high_they_are(count, fit, tmp_path):
    model = PPO("CartPole-v1", num_envs=1, num_steps=1, num_minibatches=1, total_steps=count + 1)
    model.env_steps.fill_(count)
    logger = Steps()
    trainer = fit(model, logger=logger, callbacks=[Logs()], enable_progress_bar=True)
    assert int(model.env_steps) == count + 1
    assert logger.steps[0] == logger.metrics["time/total_timesteps"] == count + 1
    assert {int(step) for step in logger.steps} == {count + 1}
    assert int(trainer.callback_metrics["time/total_timesteps"]) == count + 1
    assert trainer.progress_bar_callback.train_progress_bar.n == count + 1
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert PPO.load_from_checkpoint(tmp_path / "a.ckpt").num_env_steps == count + 1


# --- F29: memory -------------------------------------------------------------------------------------------------------


class Resident(Callback):
    """Notes time (s) and resident memory (MB) every second, and ends the run."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.rows = seconds, [(time.monotonic(), 0.0)]

    def on_train_batch_end(self, trainer, *args) -> None:
        now = time.monotonic()
        if now - self.rows[-1][0] >= 1.0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.rows.append((now, pages * 4096 / 1e6))
        trainer.should_stop |= now - self.rows[0][0] >= self.seconds


@pytest.mark.long
@pytest.mark.timeout(900)
def test_memory_does_not_grow(fit, tmp_path):
    """Less than 1 MB per minute, over ten minutes of which the first is warm-up."""
    gc.set_threshold(700, 10, 10)  # as Python has it, and users with it
    memory = Resident(600)
    model = PPO(
        "CartPole-v1", num_envs=8, num_steps=128, total_steps=10**12, normalize_observation=True, eval_interval=50
    )
    fit(model, callbacks=[memory], logger=CSVLogger(tmp_path), limit_val_batches=1, enable_checkpointing=True)
    seconds, megabytes = np.array(memory.rows[1:]).T
    warm = seconds >= seconds[0] + 60
    slope = 60 * np.polyfit(seconds[warm], megabytes[warm], 1)[0]
    print(f"{slope:.3f} MB per minute over {warm.sum()} samples and {model.num_env_steps:,} environment steps")
    assert slope < 1.0
