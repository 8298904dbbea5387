"""Environments that raise, and worker processes that die, hang or are busy: named in time, and none is left (F01-F04, F32)."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from crashes import FIRST_SEED, Crash, native
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from lightning import Callback

from ppo_lightning import PPO, EnvironmentFault, InputError
from ppo_lightning.cli import main
from ppo_lightning.envs import DoubleBufferedEnvs, EnvFactory, VectorEnvAdapter, workers

SMALL = {"num_envs": 2, "num_steps": 8, "total_steps": 128, "num_minibatches": 2}
FLAGS = [
    "--seed_everything", str(FIRST_SEED), "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.limit_val_batches", "0", "--model.eval_interval", "1",
    *(word for name, value in SMALL.items() for word in (f"--model.{name}", str(value))),
]  # fmt: skip
LAST = Path("lightning_logs/version_0/checkpoints/last.ckpt")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*ERROR:UserWarning"
)  # Gymnasium reports a worker's error as a warning, too


def seeded(model: PPO) -> PPO:
    model.seed = FIRST_SEED
    return model


def fault_of(call, *args) -> tuple[str, float]:
    """What an environment's error says, and how many seconds it took."""
    started = time.monotonic()
    with pytest.raises(EnvironmentFault) as caught:
        call(*args)
    return str(caught.value), time.monotonic() - started


def vector(fault: str, num_envs: int = 2, timeout_s: float = 60.0, **kwargs) -> VectorEnvAdapter:
    maker = EnvFactory(partial(Crash, fault, **kwargs), vectorization="async")
    environments = VectorEnvAdapter(maker, num_envs, timeout_s)
    environments.reset(FIRST_SEED)
    return environments


def step_until_it_fails(environments: VectorEnvAdapter) -> None:
    for _ in range(20):
        environments.step(np.zeros(environments.num_envs, dtype=np.int64))


@pytest.fixture(scope="module", autouse=True)
def _served():
    """The server that workers come from takes seconds to start, once."""
    vector("none").close()


# --- F01: an environment raises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "async", "native"])
@pytest.mark.parametrize("where", ["step", "reset"])
def test_an_environment_that_raises_ends_the_run_with_its_name_and_a_checkpoint(where, kind, monkeypatch, tmp_path):
    monkeypatch.delenv("PL_GLOBAL_SEED")
    fault, marks = {"step": "raise", "reset": "raise in reset"}[where], tmp_path / "marks"
    env = ["--model.env", "crashes.native"] if kind == "native" else ["--model.env", "crashes.Crash"]
    env += ["--model.vectorization", "async"] if kind == "async" else []
    env += ["--model.env_kwargs", f"{{fault: {fault}, at: 20, marks: {marks}}}"]
    with pytest.raises(SystemExit) as caught:
        main(["fit", *env, *FLAGS])
    assert time.time() - float(marks.read_text().split()[-1]) < 5.0
    message = str(caught.value.code)  # so that the exit status is 1
    who = "native" if kind == "native" else "environment 1"
    assert message.startswith(f"error: {who} raised ZeroDivisionError in {where}: the pole is at infinity\n\nTraceback")
    assert "crashes.py" in message
    assert torch.load(LAST)["state_dict"]["env_steps"] == 32  # two iterations were whole
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("kind", "nth"), [("sync", 4), ("async", 7), ("native", 1)])
def test_an_environment_that_cannot_be_made_is_named(kind, nth, tmp_path, fit):
    """One is made to learn its spaces, and one or two more for each vector."""
    if kind == "native":
        with pytest.raises(InputError, match="making native raised ValueError: no licence"):
            PPO(partial(native, fault="init", at=nth, marks=tmp_path / "marks"), **SMALL)
        return
    env = partial(Crash, "init", at=nth, marks=tmp_path / "marks")
    message, seconds = fault_of(fit, PPO(env, vectorization=kind, **SMALL))
    assert message.startswith("environment 1 could not be made: making Crash raised ValueError: no licence")
    assert "raise ValueError" in message
    assert seconds < 5.0
    assert not multiprocessing.active_children()


def test_environments_that_were_made_are_closed_where_a_later_one_cannot_be():
    closed = []

    class Closes(Crash):
        made = 0

        def __init__(self) -> None:
            super().__init__("none")
            type(self).made += 1
            self.number = self.made
            if self.number == 5:
                raise ValueError("no licence")

        def close(self) -> None:
            closed.append(self.number)

    with pytest.raises(EnvironmentFault, match="environment 2 could not be made"):
        PPO(Closes, num_envs=4, num_steps=8).rollouts.collect()
    assert sorted(closed) == [1, 2, 3, 4]


# --- F02: what cannot be pickled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("unpicklable", "environment 1 raised Unpicklable in step: the lock is held"),
        ("exit", "environment 1 raised SystemExit: 3"),
        ("interrupt", "environment 1 raised KeyboardInterrupt"),
        ("_exit", "the worker process of environment [1] died in step: it ended with exit code 3"),
    ],
)
def test_whatever_a_worker_raises_reaches_the_run(fault, says):
    message, seconds = fault_of(step_until_it_fails, vector(fault))
    assert message.startswith(says)
    assert seconds < 5.0
    assert not multiprocessing.active_children()


def test_what_cannot_be_pickled_is_left_out_of_info_and_training_continues():
    environments = vector("info")
    step_until_it_fails(environments)
    environments.close()


def test_a_method_that_raises_what_cannot_be_pickled_does_not_hang():
    environments = vector("none")
    message, seconds = fault_of(environments.env.call, "explode")
    assert re.match(r"environment [01] raised Unpicklable: the lock is held\n\nTraceback", message)
    assert seconds < 5.0
    environments.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("fault", "slow", "says"),
    [
        ("unpicklable", 0.0, "an environment raised in step what its worker process could not send"),
        ("unpicklable", 20.0, "an environment raised in step what its worker process could not send"),
        ("raise", 20.0, "environment 1 raised ZeroDivisionError: the pole is at infinity\n\nTraceback"),
    ],
)
def test_a_vector_of_ones_own_hangs_no_run_either(fault, slow, says):
    make = lambda: AsyncVectorEnv([partial(Crash, fault, slow=slow)] * 2, context="forkserver")  # noqa: E731
    environments = VectorEnvAdapter(EnvFactory(make), 2, 60.0)
    environments.reset(FIRST_SEED)
    message, seconds = fault_of(step_until_it_fails, environments)
    assert message.startswith(says)
    assert seconds < 5.0
    assert not multiprocessing.active_children()


# --- F03: a worker is killed -------------------------------------------------------------------------------------------


class KillBetweenRollouts(Callback):
    """SIGKILLs the worker of one environment while the policy is updated, and notes when."""

    def __init__(self, index: int) -> None:
        self.index, self.at = index, 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 1:
            processes = [
                process for _, envs in pl_module.rollouts.environments.groups for process in envs.env.processes
            ]
            processes[self.index].kill()
            processes[self.index].join()
            self.at = time.time()


@pytest.mark.parametrize("when", ["mid-rollout", "between rollouts"])
@pytest.mark.parametrize("index", [0, 2, 3])
def test_a_worker_that_is_killed_is_named_with_its_signal(when, index, fit, tmp_path):
    marks, killer = tmp_path / "marks", KillBetweenRollouts(index)
    fault, callbacks = ("kill", []) if when == "mid-rollout" else ("none", [killer])
    env = partial(Crash, fault, index=index, at=12, marks=marks)
    model = seeded(PPO(env, vectorization="async", **{**SMALL, "num_envs": 4}))
    message, _ = fault_of(lambda: fit(model, callbacks=callbacks))
    killed = killer.at if callbacks else float(marks.read_text())
    assert message.startswith(f"the worker process of environment [{index}] died in step: killed by signal 9 (SIGKILL)")
    assert time.time() - killed < 5.0
    assert not multiprocessing.active_children()


def test_a_dead_worker_is_noticed_while_another_is_busy():
    message, seconds = fault_of(step_until_it_fails, vector("kill", slow=20.0))
    assert message.startswith("the worker process of environment [1] died in step: killed by signal 9 (SIGKILL)")
    assert seconds < 5.0
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("fault", ["raise", "unpicklable"])
def test_an_error_is_heard_while_another_environment_is_busy(fault):
    message, seconds = fault_of(step_until_it_fails, vector(fault, slow=20.0))
    assert re.match(r"environment 1 raised (ZeroDivisionError|Unpicklable) in step: the (pole|lock) is", message)
    assert seconds < 5.0
    assert not multiprocessing.active_children()


# --- F04: a worker hangs -----------------------------------------------------------------------------------------------


def test_a_worker_that_hangs_is_named_in_time_and_shows_where(tmp_path):
    environments = vector("hang", num_envs=3, timeout_s=1.0, errors=tmp_path / "errors")
    message, seconds = fault_of(step_until_it_fails, environments)
    assert message.startswith("environment [1] did not answer within 1.0 s in step: look at what it waits for")
    assert seconds < 2.0
    assert re.search(r'crashes.py", line \d+ in happen', (tmp_path / "errors").read_text())
    assert not multiprocessing.active_children()


def sleepy() -> gym.Env:
    if multiprocessing.parent_process() is not None:
        time.sleep(60)
    return Crash("none")


def test_an_environment_that_hangs_while_it_is_made_is_named(monkeypatch):
    monkeypatch.setattr(workers, "START_S", 2.0)
    maker = EnvFactory(sleepy, vectorization="async")
    message, seconds = fault_of(VectorEnvAdapter, maker, 1, 60.0)
    assert message.startswith("environment [0] did not answer within 2.0 s in __init__: look at what it waits for")
    assert seconds < 5.0
    assert not multiprocessing.active_children()


# --- interrupts --------------------------------------------------------------------------------------------------------


def double_buffered(fault: str, **kwargs) -> DoubleBufferedEnvs:
    return DoubleBufferedEnvs(vector(fault, **kwargs), vector(fault, **kwargs))


def interrupt(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["step_async", "half sent", "half reset", "step_wait"])
def test_closing_busy_workers_takes_no_longer_than_their_deadline(where, monkeypatch):
    """Every first step takes a minute."""
    monkeypatch.setattr(workers, "CLOSE_S", 0.5)
    both = double_buffered("none", at=1, slow=60.0, index=-1)
    (_, first), (_, second) = both.groups
    action = np.zeros(2, dtype=np.int64)
    second.step_async(action)
    if where.startswith("half"):
        first.env.parent_pipes[1].send = interrupt
        with pytest.raises(KeyboardInterrupt):
            first.step_async(action) if where == "half sent" else first.reset(0)
        del first.env.parent_pipes[1].send
    else:
        first.step_async(action)
    if where == "step_wait":
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            first.step_wait()
        signal.signal(signal.SIGALRM, before)
    started = time.monotonic()
    both.close()
    assert time.monotonic() - started < 1.5
    assert not multiprocessing.active_children()


def test_idle_workers_close_politely_and_at_once(tmp_path):
    class Leaves(Crash):
        def close(self) -> None:
            self.mark()

    environments = VectorEnvAdapter(
        EnvFactory(partial(Leaves, "none", marks=tmp_path / "closed"), vectorization="async"), 2, 60.0
    )
    environments.reset(0)
    before = len((tmp_path / "closed").read_text().split())
    started = time.monotonic()
    environments.close()
    assert time.monotonic() - started < 1.0
    assert len((tmp_path / "closed").read_text().split()) == before + 2
    environments.close()


def test_an_interrupt_from_the_keyboard_leaves_workers_to_the_run():
    environments = vector("none")
    for process in environments.env.processes:
        os.kill(process.pid, signal.SIGINT)
    assert environments.step(np.zeros(2, dtype=np.int64)).reward.tolist() == [1.0, 1.0]
    environments.close()


# --- F32: how workers are started --------------------------------------------------------------------------------------


def test_forked_and_served_workers_give_the_same_rollouts(monkeypatch):
    """Ours come from a fork server; a user may fork, at their own risk."""

    def forked(num_envs: int) -> AsyncVectorEnv:
        return AsyncVectorEnv(
            [partial(Crash, "none")] * num_envs, context="fork", autoreset_mode=AutoresetMode.SAME_STEP
        )

    batches = []
    for env, kind in [(partial(Crash, "none"), "async"), (forked, "sync")]:
        model = seeded(PPO(env, num_envs=2, num_steps=16, vectorization=kind))
        torch.manual_seed(0)
        for parameter in model.policy.parameters():
            parameter.data.normal_()
        model.generator.manual_seed(0)
        batches.append(model.rollouts.collect().clone())
        made = model.rollouts.environments
        contexts = {envs.env.context for _, envs in made.groups}
        assert contexts == {"forkserver" if kind == "async" else "fork"}
        model.close_environments()
    assert (batches[0] == batches[1]).all()
    assert not multiprocessing.active_children()


def test_a_worker_that_stops_answering_a_checkpoint_is_named():
    environments = vector("nothing", timeout_s=1.0)
    os.kill(environments.env.processes[1].pid, signal.SIGSTOP)
    message, seconds = fault_of(environments.state)
    assert "environment [1] did not answer within 1.0 s in run_state" in message
    assert seconds < 3
    assert not any(process.is_alive() for process in environments.env.processes)


def test_a_worker_that_hangs_does_not_outlive_a_run_that_is_killed(tmp_path):
    (tmp_path / "run.py").write_text(
        "import sys, time, gymnasium as gym\n"
        "from ppo_lightning import PPO\n"
        "class Hangs(gym.Wrapper):\n"
        "    def step(self, action):\n"
        "        time.sleep(1000)\n"
        "def make():\n"
        "    return Hangs(gym.make('CartPole-v1'))\n"
        "if __name__ == '__main__':\n"
        "    model = PPO(make, vectorization='async', num_envs=1, num_minibatches=1)\n"
        "    collector = model.rollouts.start()\n"
        "    print(model.rollouts.environments.env.processes[0].pid, flush=True)\n"
        "    model.rollouts.collect()\n"
    )
    run = subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    worker = Path(f"/proc/{int(run.stdout.readline())}/stat")
    time.sleep(0.5)
    run.kill()
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 10
    while worker.exists() and worker.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)
