"""A crashed environment is restarted, where that is allowed: its episode ends as truncated, and the run continues."""

import multiprocessing
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from crashes import FIRST_SEED, Crash, native
from gymnasium.spaces import Discrete
from lightning import Callback
from torch.testing import assert_close

from ppo_lightning import PPO, EnvironmentFault, InputError
from ppo_lightning.envs import EnvFactory, RestartBudget, VectorEnvAdapter

SMALL = {"num_envs": 4, "num_steps": 8, "total_steps": 96, "num_minibatches": 2}


@pytest.fixture(scope="module", autouse=True)
def _served():
    """The server that workers come from takes seconds to start, once."""
    VectorEnvAdapter(EnvFactory("CartPole-v1", vectorization="async"), 1, 60.0).close()


def collected(fault: str, **kwargs):
    """A rollout in which environment 1 crashes in its third step, what was warned of, and the model."""
    model = PPO(partial(Crash, fault), **{**SMALL, "max_env_restarts": 2, **kwargs})
    model.seed = FIRST_SEED
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batch = model.rollouts.collect().clone()
    model.close_environments()
    assert not multiprocessing.active_children()
    return batch, [str(warning.message) for warning in caught], model


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_that_raises_is_recreated_alone(vectorization):
    batch, told, model = collected("raise", vectorization=vectorization)
    healthy, *_ = collected("none", vectorization=vectorization)
    first = "environment 1 raised ZeroDivisionError in step: the pole is at infinity"
    assert [one for one in told if "restarted" in one] == [f"{first}: restarted (1 of 2)"]
    assert model.env_provider.restarts.count == 1
    # Steps 0 and 1 went well; the third has no reward, and ends the episode with what was seen before it.
    assert batch["observation"][:, 1, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch["reward"][:, 1].tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert batch["truncated"][:, 1].nonzero().flatten().tolist() == [2, 7]
    assert not batch["terminated"].any()
    with torch.no_grad():
        assert_close(batch["next_state_value"][2, 1], model.policy.critic(torch.full((1, 2), 2.0))[0])
    others = [0, 2, 3]
    for key in ("observation", "reward", "truncated"):
        assert torch.equal(batch[key][:, others], healthy[key][:, others])


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("kill", "the worker process of environment [1] died in step: killed by signal 9 (SIGKILL)"),
        ("hang", "environment [1] did not answer within 0.5 s in step"),
    ],
)
def test_worker_processes_are_restarted_with_their_half(fault, cause):
    """Environments 0 and 1 share one half; 2 and 3 notice nothing."""
    batch, told, model = collected(fault, vectorization="async", env_timeout_s=0.5 if fault == "hang" else 60.0)
    assert [one.startswith(cause) and one.endswith("restarted (1 of 2)") for one in told] == [True]
    assert batch["observation"][:, :2, 0].T.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]] * 2
    assert batch["reward"][:, :2].T.tolist() == [[1, 1, 0, 1, 1, 1, 1, 1]] * 2
    assert batch["truncated"][:, 0].nonzero().flatten().tolist() == [2, 7]
    assert batch["truncated"][:, 2].nonzero().flatten().tolist() == [4]
    assert model.env_provider.restarts.count == 1


class Kill(Callback):
    """Kills the worker of environment 2 during the second update."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            process = pl_module.rollouts.environments.groups[1][1].env.processes[0]
            process.kill()
            process.join()


@pytest.mark.parametrize("saves", [False, True])
def test_a_worker_that_dies_between_rollouts_is_replaced_too(saves, fit, tmp_path):
    """A checkpoint that is saved meanwhile asks it for its state, in vain."""
    model = PPO(partial(Crash, "none"), vectorization="async", max_env_restarts=1, eval_interval=1, **SMALL)
    where = "run_state" if saves else "step"
    with pytest.warns(
        UserWarning, match=re.escape(f"the worker process of environment [2] died in {where}: killed by")
    ):
        fit(model, callbacks=[Kill()], enable_checkpointing=saves)
    assert model.num_env_steps == 96
    assert model.trainer.callback_metrics["time/env_restarts"] == 1
    assert not multiprocessing.active_children()
    assert len(list(tmp_path.rglob("last.ckpt"))) == saves


def test_a_worker_that_dies_before_a_checkpoint_is_named(fit):
    model = PPO(partial(Crash, "none"), vectorization="async", eval_interval=1, **SMALL)
    with pytest.raises(
        EnvironmentFault, match=re.escape("the worker process of environment [2] died in run_state: killed")
    ):
        fit(model, callbacks=[Kill()], enable_checkpointing=True)
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore:environment .* restarted:UserWarning")
def test_when_restarts_are_used_up_the_run_ends(fit):
    class Always(Crash):
        def step(self, action):
            self.happen()

    model = PPO(partial(Always, "raise"), max_env_restarts=3, **SMALL)
    with pytest.raises(EnvironmentFault, match="raised ZeroDivisionError in step") as caught:
        fit(model)
    assert str(caught.value).endswith("all of max_env_restarts = 3 are used up")
    assert model.env_provider.restarts.count == 3


def test_without_restarts_nothing_is_logged_and_a_crash_ends_the_run(fit):
    model = PPO(partial(Crash, "none"), **SMALL)
    fit(model)
    assert "time/env_restarts" not in model.trainer.callback_metrics
    model = PPO(partial(Crash, "raise"), **SMALL)
    model.seed = FIRST_SEED
    with pytest.raises(EnvironmentFault, match="environment 1 raised ZeroDivisionError in step"):
        fit(model)


def test_a_reset_that_raises_is_tried_once_more_on_a_new_environment():
    environments = VectorEnvAdapter(
        EnvFactory(partial(Crash, "raise in reset"), restarts=True), 2, 60.0, restarts=RestartBudget(limit=1)
    )
    environments.reset(FIRST_SEED)
    for _ in range(4):
        environments.step(np.zeros(2, dtype=np.int64))
    with pytest.warns(UserWarning, match=r"environment 1 raised ZeroDivisionError in reset.*restarted \(1 of 1\)"):
        after = environments.step(np.zeros(2, dtype=np.int64))
    assert after.truncated.tolist() == [True, True]
    assert after.observation[:, 0].tolist() == [0, 0]


class Drawn(Crash):
    """Shows the number that its reset has drawn."""

    def see(self, value=None):
        return np.full(2, self.np_random.random(), np.float32)


def test_a_new_environment_draws_from_the_runs_seed():
    runs = [PPO(partial(Drawn, "raise"), max_env_restarts=1, **SMALL) for _ in range(2)]
    batches = []
    for model in runs:
        model.seed = FIRST_SEED
        for parameter in model.policy.parameters():
            torch.nn.init.zeros_(parameter)
        with pytest.warns(UserWarning, match="restarted"):
            batches.append(model.rollouts.collect()["observation"])
    assert torch.equal(*batches)
    assert not torch.equal(batches[0][3, 1], batches[0][0, 1])  # another episode


def test_masks_of_a_new_environment_are_read():
    class Masked(Crash):
        def __init__(self) -> None:
            super().__init__("raise")
            self.action_space = Discrete(3)

        def action_masks(self):
            return np.array([True, False, self.steps % 2 == 0])

    model = PPO(Masked, max_env_restarts=1, **SMALL)
    model.seed = FIRST_SEED
    with pytest.warns(UserWarning, match="restarted"):
        batch = model.rollouts.collect()
    even = batch["observation"][..., 0] % 2 == 0
    assert torch.equal(batch["action_mask"][..., 2], even)


def test_vectors_of_ones_own_are_refused():
    for env, kwargs in [
        (native, {"env_kwargs": {"fault": "none"}}),
        ("CartPole-v1", {"vectorization": "vector_entry_point"}),
    ]:
        with pytest.raises(InputError, match=r"max_env_restarts=1 restarts single environments, and .* is a vector"):
            PPO(env, max_env_restarts=1, **kwargs)


def test_an_evaluation_survives_a_crash(monkeypatch):
    model = PPO(partial(Crash, "raise", index=0), max_env_restarts=1, num_envs=2)
    model.seed = FIRST_SEED
    monkeypatch.setattr(model, "evaluation_seed", lambda *_: FIRST_SEED)
    with pytest.warns(UserWarning, match="environment 0 raised ZeroDivisionError in step.*restarted \\(1 of 1\\)"):
        assert model.evaluate(2)["eval/mean_ep_length"] == 5.0  # the one that crashed does not count


def test_an_evaluation_does_not_count_the_episodes_of_a_worker_that_died(monkeypatch):
    model = PPO(partial(Crash, "kill", index=0), max_env_restarts=1, num_envs=2, vectorization="async")
    model.seed = FIRST_SEED
    monkeypatch.setattr(model, "evaluation_seed", lambda *_: FIRST_SEED)
    with pytest.warns(UserWarning, match=r"the worker process of environment \[0\] died in step"):
        found = model.evaluate(2)
    model.close_environments()
    assert found["eval/mean_ep_length"] == 5.0


def test_a_restart_in_a_reset_after_a_cut_episode_is_counted():
    environments = VectorEnvAdapter(
        EnvFactory(partial(Crash, "raise in reset"), restarts=True), 2, 60.0, restarts=RestartBudget(limit=1)
    )
    observation = environments.reset(FIRST_SEED)
    for _ in range(3):
        observation = environments.step(np.zeros(2, dtype=np.int64)).observation
    with pytest.warns(UserWarning, match=r"environment 1 raised ZeroDivisionError in reset.*restarted \(1 of 1\)"):
        environments.reset_envs(np.array([False, True]), observation)
