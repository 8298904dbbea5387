"""A run that is asked to end ends in seconds, with a checkpoint to go on from and no process left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning
import pytest
import torch
from lightning import Callback
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from processes import command

from ppo_lightning import PPO, cli
from ppo_lightning.algorithm.optimizer_step import EagerStep
from ppo_lightning.callbacks import GracefulShutdown

LAST = Path("lightning_logs/version_0/checkpoints/last.ckpt")
RUN = """
import os, sys, time
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from ppo_lightning.cli import main
from ppo_lightning import PPO, PPOLoss
from ppo_lightning.callbacks import checkpoints

where, slow = sys.argv[1], float(sys.argv[2])


def waits(function, condition):
    def waiting(self, *args, **kwargs):
        if condition(self):
            open(f"there.{os.environ.get('LOCAL_RANK', '0')}", "w").close()
            time.sleep(slow)
        return function(self, *args, **kwargs)

    return waiting


later = lambda model: model.policy_version >= 2
if where == "rollout":
    begun = []
    metrics = PPO.metrics
    PPO.metrics = lambda self, *given, **named: (metrics(self, *given, **named), begun.append(1))[0]
    CartPoleEnv.step = waits(CartPoleEnv.step, lambda env: len(begun) >= 2)
elif where == "update":
    PPOLoss.forward = waits(PPOLoss.forward, lambda loss: len(updates) >= 2)
    metrics, updates = PPO.metrics, []
    PPO.metrics = lambda self, *given, **named: (metrics(self, *given, **named), updates.append(1))[0]
elif where == "evaluation":
    PPO.evaluate = waits(PPO.evaluate, later)
else:
    checkpoints.LastCheckpoint._save_checkpoint = waits(
        checkpoints.LastCheckpoint._save_checkpoint, lambda self: True
    )
main(sys.argv[3:])
"""
FLAGS = [
    "fit", "--model.env", "CartPole-v1", "--model.num_envs", "2", "--model.num_steps", "16", "--seed_everything", "1",
    "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false",
    "--model.total_steps", "100000", "--model.eval_interval", "3", "--model.num_minibatches", "2",
    "--name", "version",
]  # fmt: skip


def run(where, slow, *more):
    Path("run.py").write_text(RUN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PL_GLOBAL_SEED", None)
    return subprocess.Popen(
        [sys.executable, "run.py", where, str(slow), *FLAGS, *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment,
    )  # fmt: skip


def end(process, number, ranks=1):
    """Send a signal when all processes are where they should be; output, seconds until the end, processes left."""
    try:
        deadline = time.monotonic() + 60
        while not all(Path(f"there.{rank}").exists() for rank in range(ranks)):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        started = time.monotonic()
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
        seconds = time.monotonic() - started
        deadline, left = time.monotonic() + 2, ["?"]
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            command = ["ps", "-o", "stat=,args=", "-g", str(process.pid)]
            lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
            left = [line for line in lines if not line.startswith("Z")]  # nobody has asked yet how those ended
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return output, seconds, left


PLACES = [("rollout", 0.03), ("rollout", 0.4), ("update", 0.1), ("update", 2.0), ("evaluation", 8.0), ("saving", 1.0)]
"""Where the signal comes, and how long each step, minibatch, evaluation or save takes: some end only by force."""
QUICK = [("rollout", 0.4), ("update", 0.1), ("saving", 1.0)]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("where", "slow"), [pytest.param(*place, marks=[] if place in QUICK else pytest.mark.long) for place in PLACES]
)
def test_sigterm_ends_a_run_with_143_and_a_checkpoint(where, slow, ranks):
    more = ["--trainer.strategy", "ddp", "--trainer.devices", "2"] if ranks == 2 else []
    process = run(where, slow, *more)
    output, seconds, left = end(process, signal.SIGTERM, 1 if where == "saving" else ranks)
    assert process.returncode == 143, output
    assert seconds < 10
    assert not left
    state = torch.load(LAST)
    assert state["state_dict"]["env_steps"] == 32 * ranks * state["state_dict"]["iterations"] > 0


class Stops(Callback):
    """Sends this process a signal after two iterations."""

    def __init__(self, number):
        self.number = number

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.policy_version == 2:
            os.kill(os.getpid(), self.number)


SMALL = {"env": "CartPole-v1", "num_envs": 2, "num_steps": 16, "total_steps": 160, "num_minibatches": 2}


def test_an_interrupted_fit_returns_and_another_resumes_bit_exactly(fit):
    torch.manual_seed(0)
    whole = PPO(**SMALL)
    fit(whole)
    torch.manual_seed(0)
    model, before = PPO(**SMALL), signal.getsignal(signal.SIGINT)
    trainer = fit(model, callbacks=[Stops(signal.SIGINT)])
    assert model.num_env_steps == 96  # the iteration after the signal has ended
    assert model.agreed_stop_signal is signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Stops)]
    trainer.fit(model)
    assert model.num_env_steps == 160
    assert model.agreed_stop_signal is None
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_script_does_not_resume_after_sigterm(fit):
    model = PPO(**SMALL)
    with pytest.raises(SystemExit) as caught:
        fit(model, callbacks=[Stops(signal.SIGTERM)])
    assert caught.value.code == 143
    assert model.rollouts.environments is None


def test_a_second_signal_ends_an_update_at_once_and_takes_it_back(fit, monkeypatch):
    model, taken = PPO(**SMALL), []
    monkeypatch.setattr(GracefulShutdown, "ECHO_S", 0.0)
    apply = EagerStep.apply

    def stopped(self):
        apply(self)
        taken.append({name: value.clone() for name, value in model.state_dict().items()})
        if len(taken) in (18, 19):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(EagerStep, "apply", stopped)
    with pytest.raises(SystemExit) as caught:
        fit(model, enable_checkpointing=True, logger=lightning.pytorch.loggers.CSVLogger("."))
    assert caught.value.code == 143
    state = torch.load(next(Path().rglob("last.ckpt")))
    weight = "policy.network.actor_trunk.layers.0.weight"
    assert state["state_dict"]["iterations"] == 2
    assert torch.equal(state["state_dict"][weight], taken[15][weight])  # eight minibatches make an iteration
    assert not torch.equal(taken[18][weight], taken[15][weight])
    assert {int(one["step"]) for one in state["optimizer_states"][0]["state"].values()} == {16}


def test_slurm_requeues_after_the_iteration_and_the_requeued_run_resumes(fit, monkeypatch, tmp_path):
    torch.manual_seed(0)
    whole = PPO(**SMALL)
    fit(whole)
    for name in ("JOB_ID", "NTASKS", "PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "1" if name in ("JOB_ID", "NTASKS") else "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho $@ > requeued\n")
    (tmp_path / "scontrol").chmod(0o755)
    torch.manual_seed(0)
    fit(PPO(**SMALL), callbacks=[Stops(signal.SIGUSR1)], plugins=[SLURMEnvironment()], max_epochs=4)
    assert Path("requeued").read_text() == "requeue 1\n"
    saved = torch.load("hpc_ckpt_1.ckpt")
    assert saved["state_dict"]["iterations"] == 3
    model = PPO(**SMALL)
    fit(model, plugins=[SLURMEnvironment()])
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)


IMPORTS = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._C":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
"""


@pytest.mark.parametrize("command", ["fit", "report", "sweep"])
def test_ctrl_c_during_imports_ends_with_130_and_no_traceback(command, tmp_path):
    Path("sitecustomize.py").write_text(IMPORTS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "ppo_lightning", command], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (130, "")


class StopsIn(Callback):
    """Sends this process SIGINT in a hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))


def interrupted_before(function, times=1):
    """A function that is called after this process has received SIGINT."""

    def interrupted(*given, **named):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        return function(*given, **named)

    return interrupted


PATCHES = {
    "parsing": (cli.PPOCLI, "parse_arguments"),
    "the connection of signals": (_SignalConnector, "teardown"),
    "the plot": (cli, "draw_learning_curve"),
    "the validation": (PPO, "validation_step"),
}


@pytest.mark.parametrize("where", ["on_fit_end", "teardown", "twice", *PATCHES])
def test_ctrl_c_at_any_time_ends_a_command_with_130_and_no_traceback(where):
    words = [*FLAGS, "--model.total_steps", "64"]
    if where == "the validation":
        words = [word for word in words if word not in ("--name", "version")]
        words[0] = "validate"
    elif where not in PATCHES and where != "twice":
        words += ["--trainer.callbacks+=test_signals.StopsIn", f"--trainer.callbacks.hook={where}"]

    def patch():
        place, name = PATCHES["the plot" if where == "twice" else where]
        setattr(place, name, interrupted_before(getattr(place, name), 2 if where == "twice" else 1))

    ended = command(words, patch if where in PATCHES or where == "twice" else None)
    assert ended.status == 130, ended.output + ended.error
    assert "Traceback" not in ended.output + ended.error
