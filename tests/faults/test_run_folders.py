"""A run's folder is written to by that run alone, and only once every check has passed."""

import multiprocessing
import os
import re
import signal
import time
import warnings
from pathlib import Path

import lightning
import pytest
import torch
from filelock import FileLock
from lightning import Callback
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from ppo_lightning import PPO
from ppo_lightning.callbacks import AdaptiveLearningRate, Stage, Stages
from ppo_lightning.callbacks.run_folder import RunFolder
from ppo_lightning.cli import main
from ppo_lightning.errors import InputError
from ppo_lightning.runs.hyperparameters import disallowed_names
from ppo_lightning.tools.saved_runs import read_run

SMALL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1, "num_eval_episodes": 1}
FLAGS = [word for name, value in SMALL.items() for word in (f"--model.{name}", str(value))]
FLAGS += [
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_model_summary=false",
]
CARTPOLE = ["fit", "--model.env", "CartPole-v1", "--model.total_steps", "64", *FLAGS]
RUN = Path("lightning_logs/version_0")
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def contents():
    """All files and folders, with what they hold."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}


def train(model=None, ckpt_path=None, **kwargs):
    model = PPO("CartPole-v1", total_steps=64, **SMALL) if model is None else model
    trainer = lightning.Trainer(**{**QUIET, **kwargs})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


def steps_in(path):
    return int(torch.load(path)["state_dict"]["env_steps"])


# --- nothing is written before every check has passed -------------------------------------------------------------------

LAST = str(RUN / "checkpoints/last.ckpt")
REFUSED = {
    "other spaces": ["fit", "--model.env", "Pendulum-v1", "--ckpt_path", "last"],
    "another policy": ["fit", "--ckpt_path", "last", "--model.policy.hidden_sizes", "[8]"],
    "another normalisation": ["fit", "--ckpt_path", LAST, "--model.normalize_observation", "true"],
    "a file that does not exist": ["fit", "--ckpt_path", "nowhere.ckpt"],
    "optimiser steps as a budget": ["fit", "--ckpt_path", "last", "--trainer.max_steps", "3"],
    "a precision that rounds": ["fit", "--ckpt_path", "last", "--trainer.precision", "64-true"],
    "fewer iterations than are trained": ["fit", "--ckpt_path=last", "--model.total_steps=256", "--trainer.max_epochs=1"],
    "a part of a rollout": ["fit", "--ckpt_path=last", "--trainer.limit_train_batches=0.5"],
    "no rollout": ["fit", "--ckpt_path=last", "--trainer.limit_train_batches=0"],
    "a part of an evaluation": ["fit", "--ckpt_path=last", "--trainer.limit_val_batches=0.5"],
    "the same batches again": ["fit", "--ckpt_path=last", "--trainer.overfit_batches=0.5"],
    "a callback for networks with a backbone": ["fit", "--ckpt_path=last", "--trainer.callbacks=BackboneFinetuning"],
    "a scheduler that waits for a metric": [
        "fit", "--ckpt_path=last", "--model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"
    ],
    "callbacks that exclude one another": [
        "fit", "--ckpt_path=last", "--trainer.callbacks+=ppo_lightning.callbacks.AdaptiveLearningRate",
        "--model.lr_scheduler=torch.optim.lr_scheduler.ConstantLR",
    ],
    "a fresh run": ["fit", "--model.env", "CartPole-v1", "--trainer.max_steps", "3"],
    "a fresh run without a logger": ["fit", "--model.env=CartPole-v1", "--trainer.max_steps=3", "--trainer.logger=false"],
    "a validation": ["validate", "--model.env", "Pendulum-v1", "--ckpt_path", "best"],
    "a test": ["test", "--model.env", "Pendulum-v1", "--ckpt_path", "last"],
}  # fmt: skip


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cartpole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        main([*CARTPOLE, "--name=version"])
    return folder


@pytest.mark.parametrize("reason", REFUSED)
def test_a_command_that_is_refused_writes_nothing(reason, cartpole, monkeypatch):
    monkeypatch.chdir(cartpole)
    before = contents()
    with pytest.raises(SystemExit) as caught:
        main([*REFUSED[reason], *FLAGS])
    assert str(caught.value.code).startswith("error: ")
    assert contents() == before


def loggers(kind):
    return {
        "none": False,
        "TensorBoard": True,
        "CSV": CSVLogger("."),
        "both": [TensorBoardLogger("."), CSVLogger(".")],
    }[kind]


@pytest.mark.parametrize("logger", ["none", "TensorBoard", "CSV", "both"])
def test_a_fit_in_python_that_is_refused_writes_nothing(logger, cartpole, monkeypatch):
    monkeypatch.chdir(cartpole)
    before = contents()
    pendulum = PPO("Pendulum-v1", total_steps=64, **SMALL)
    scheduled = {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer)}
    model = PPO("CartPole-v1", total_steps=64, **SMALL, **scheduled)
    with pytest.raises(InputError, match="observation space"):
        train(pendulum, ckpt_path=LAST, logger=loggers(logger))
    with pytest.raises(InputError, match="precision"):
        train(logger=loggers(logger), precision="64-true")
    with pytest.raises(InputError, match="both set the learning rate"):
        train(model, logger=loggers(logger), callbacks=[AdaptiveLearningRate()])
    with pytest.raises(InputError, match="in no parameter's name"):
        train(logger=loggers(logger), callbacks=[Stages([Stage(freeze=["nothing"])])])
    trainer = lightning.Trainer(**QUIET, logger=loggers(logger))
    with pytest.raises(InputError, match="observation space"):
        trainer.validate(pendulum, ckpt_path=LAST)
    assert contents() == before


def test_loggers_and_a_profile_are_where_they_would_be(tmp_path):
    trainer = train(logger=TensorBoardLogger("."), callbacks=[LearningRateMonitor()], profiler="simple")
    (logger,) = trainer.loggers
    assert isinstance(logger, TensorBoardLogger)
    assert Path(trainer.profiler.dirpath).resolve() == tmp_path / RUN
    assert {"hparams.yaml", "checkpoints", "summary.json"} <= {path.name for path in RUN.iterdir()}
    assert any(path.name.startswith("events.out.tfevents") for path in RUN.iterdir())


# --- a folder of its own ------------------------------------------------------------------------------------------------


def test_commands_without_a_logger_leave_the_files_of_other_runs():
    main([*CARTPOLE, "--trainer.logger=false"])
    before = contents()
    assert Path("checkpoints/last.ckpt") in before
    main([*CARTPOLE, "--trainer.logger=false", "--model.total_steps=96"])
    main([*CARTPOLE, "--trainer.logger=false", "--model.total_steps=128"])
    after = contents()
    assert {path: after[path] for path in before} == before
    assert [steps_in(f"version_{number}/checkpoints/last.ckpt") for number in (1, 2)] == [96, 128]
    assert Path("version_1/config.yaml").exists()
    main(
        [*CARTPOLE, "--trainer.logger=false", "--ckpt_path=version_1/checkpoints/last.ckpt", "--model.total_steps=160"]
    )
    assert steps_in("version_1/checkpoints/last.ckpt") == 160
    assert {path: contents()[path] for path in before} == before


def test_models_without_a_logger_leave_the_files_of_other_models():
    first, second = (PPO("CartPole-v1", total_steps=steps, **SMALL) for steps in (64, 96))
    train(first, logger=False)
    before = contents()
    train(second, logger=False)
    assert {path: contents()[path] for path in before} == before
    assert steps_in("version_1/checkpoints/last.ckpt") == 96
    second.total_steps = 128
    train(second, logger=False)
    assert steps_in("version_1/checkpoints/last.ckpt") == 128
    first.total_steps = 160
    train(first, logger=False)
    assert steps_in("checkpoints/last.ckpt") == 160
    assert not Path("version_2").exists()


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_version_that_holds_another_run_is_refused(kind):
    train(logger=kind(".", "logs", 0))
    before = contents()
    with pytest.raises(InputError, match=r"logs/version_0 holds another run.*ckpt_path"):
        train(logger=kind(".", "logs", 0))
    assert contents() == before
    if kind is CSVLogger:  # which deletes the metrics that are there
        return
    model = PPO("CartPole-v1", total_steps=96, **SMALL)
    train(model, ckpt_path="logs/version_0/checkpoints/last.ckpt", logger=kind(".", "logs", 0))
    assert steps_in("logs/version_0/checkpoints/last.ckpt") == 96


# --- one run at a time --------------------------------------------------------------------------------------------------


def test_a_run_that_another_process_trains_is_refused():
    main(CARTPOLE)
    with FileLock(RUN / ".lock"):
        before = contents()
        with pytest.raises(SystemExit) as caught:
            main(["fit", "--ckpt_path", "last", "--model.total_steps", "96", *FLAGS])
        assert str(caught.value.code).startswith("error: another process trains in ")
        assert contents() == before
        main(CARTPOLE)  # another run
    main(["fit", "--ckpt_path", LAST, "--model.total_steps", "96", *FLAGS])
    assert steps_in(LAST) == 96
    assert not list(Path().rglob(".lock"))


def test_a_run_holds_its_folder_until_it_ends_or_fails(tmp_path):
    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            lock = FileLock(Path(trainer.log_dir, ".lock"), timeout=0)
            with pytest.raises(TimeoutError):
                lock.acquire()

        def on_train_batch_end(self, *_):
            raise ZeroDivisionError

    model = PPO("CartPole-v1", total_steps=64, **SMALL)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            train(model, callbacks=[Looks()], logger=TensorBoardLogger(".", version=0))
    train(model, logger=TensorBoardLogger(".", version=0))
    assert steps_in(LAST) == 64
    assert not list(tmp_path.rglob(".lock"))


def test_a_file_system_without_locks_costs_a_warning(monkeypatch):
    def fails(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "_acquire", fails)
    with pytest.warns(UserWarning, match="cannot be locked .*No locks available.*no other process"):
        train()
    assert steps_in(LAST) == 64


def test_a_run_that_was_killed_leaves_no_lock():
    command = [*CARTPOLE, "--model.total_steps", "100000000"]
    process = multiprocessing.get_context("fork").Process(target=main, args=(command,))
    process.start()
    try:
        deadline = time.monotonic() + 100
        while not Path(LAST).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
            if process.is_alive() and (RUN / ".lock").exists() and (RUN / "metrics.csv").exists():
                break
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.join()
    assert (RUN / ".lock").exists()
    FileLock(RUN / ".lock", timeout=0).acquire()


# --- last and best, in Python -------------------------------------------------------------------------------------------


def test_last_and_best_mean_the_newest_run_in_a_new_trainer_too():
    for steps, gamma in ((64, 0.9), (96, 0.95)):
        train(PPO("CartPole-v1", total_steps=steps, gamma=gamma, eval_interval=1, **SMALL))
    trainer = train(PPO("CartPole-v1", total_steps=128, **SMALL), ckpt_path="last")
    assert trainer.ckpt_path.endswith("lightning_logs/version_1/checkpoints/last.ckpt")
    assert steps_in("lightning_logs/version_2/checkpoints/last.ckpt") == 128
    model = PPO("CartPole-v1", **SMALL)
    trainer = lightning.Trainer(**QUIET, logger=False)
    trainer.validate(model, ckpt_path="best", verbose=False)
    assert model.num_env_steps > 0
    with pytest.raises(InputError, match=r"there is no last\.ckpt below .*nowhere"):
        train(ckpt_path="last", default_root_dir="nowhere")
    assert not Path("nowhere").exists()


def test_last_is_a_trainers_own_once_it_has_trained():
    trainer = train()
    train(default_root_dir="other")
    trainer.validate(PPO("CartPole-v1", **SMALL), ckpt_path="last", verbose=False)
    assert Path(trainer.ckpt_path).resolve() == Path(LAST).resolve()


@pytest.mark.parametrize("limit", [0, 0.0])
def test_either_zero_switches_evaluations_off(limit, tmp_path):
    assert train(default_root_dir=tmp_path, limit_val_batches=limit).global_step == 2


def test_a_resumed_run_that_fails_before_it_has_trained_leaves_its_checkpoints(tmp_path):
    class Fails(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            raise ZeroDivisionError

    train(default_root_dir=tmp_path)
    (folder,) = Path().rglob("checkpoints")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert before
    with pytest.raises(ZeroDivisionError):
        train(PPO("CartPole-v1", total_steps=256, **SMALL), "last", default_root_dir=tmp_path, callbacks=[Fails()])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


class Printer(Logger):
    """A logger of one's own, whose runs all have one version."""

    name, version = "printer", 0

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_a_run_of_a_logger_of_ones_own_does_not_replace_another():
    train(logger=Printer())
    before = contents()
    with pytest.raises(InputError, match="printer/version_0 holds another run"):
        train(logger=Printer())
    assert contents() == before
    model = PPO("CartPole-v1", total_steps=96, **SMALL)
    train(model, logger=Printer(), ckpt_path=Path("printer/version_0/checkpoints/last.ckpt").resolve())
    assert model.num_env_steps == 96


@pytest.mark.parametrize("logger", [True, False])
def test_a_job_that_slurm_starts_again_continues_its_run_however_often(logger, monkeypatch):
    for name in ("NTASKS", "PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "1" if name == "NTASKS" else "0")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.setattr(SLURMEnvironment, "validate_settings", lambda self, *_, **__: None)

    class Requeues(Callback):
        """What Lightning does at the signal."""

        def on_train_end(self, trainer, pl_module):
            (folder,) = [one for one in trainer.callbacks if isinstance(one, RunFolder)]
            with folder.root_of_jobs(trainer):
                trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))

    for started in (1, 2, 3):
        model = PPO("CartPole-v1", total_steps=320, **SMALL)
        train(model, logger=logger, callbacks=[Requeues()], max_epochs=started, plugins=[SLURMEnvironment()])
        assert model.policy_version == started


def test_a_command_that_resumes_wants_again_what_the_checkpoint_could_not_hold():
    model = PPO(
        "CartPole-v1", total_steps=64, **SMALL, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2)
    )
    train(model)
    last = "lightning_logs/version_0/checkpoints/last.ckpt"
    resumed = ["fit", "--ckpt_path", last, "--model.total_steps", "96", "--trainer.accelerator", "cpu"]
    said = f"{last} was made with a value of optimizer which a file of plain data cannot hold: give --model.optimizer"
    with pytest.raises(SystemExit, match=re.escape(said)):
        main(resumed)
    assert main(["validate", "--ckpt_path", last, "--trainer.accelerator", "cpu"]).model.num_env_steps == 64
    assert main([*resumed, "--model.optimizer", "Adam", "--model.optimizer.lr", "0.01"]).model.num_env_steps == 96


def test_a_row_that_was_cut_off_is_left_out_when_the_run_is_resumed():
    main(CARTPOLE)
    table = RUN / "metrics.csv"
    whole = table.read_text()
    table.write_text(whole[:-7])
    main(["fit", "--ckpt_path", "last", "--model.total_steps", "96", *FLAGS])
    lines = table.read_text().splitlines()
    assert lines[: len(whole.splitlines()) - 1] == whole.splitlines()[:-1]
    assert {len(line.split(",")) for line in lines} == {len(lines[0].split(","))}
    assert read_run(RUN).summary["global_step"] == 96


def test_names_that_are_never_imported_may_be_any():
    options = {"actor_keys": ["pose.x"], "entropy_weights": {"arm.grip": 0.1}}
    policy = {"class_path": "ppo_lightning.ActorCritic", "init_args": options}
    assert disallowed_names({"info_keys": ["reward/forward", "pose.x"], "policy": policy}) == {}
    options["encoders"] = {"pose.x": "os.system"}
    assert disallowed_names({"policy": policy}) == {"policy": ["os.system"]}
    options["actor_keys"] = "os.system"
    assert disallowed_names({"policy": policy}) == {"policy": ["os.system", "os.system"]}
