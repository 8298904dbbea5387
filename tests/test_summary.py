"""A run leaves its summary and its report, however it ends."""

import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, ModelSummary
from probes import ActionMustMatch, Faulty

from ppo_lightning import PPO, PPOLoss
from ppo_lightning.callbacks import RunReport, RunSummary
from ppo_lightning.cli import RunCSVLogger, main
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.runs.history import Records

pytestmark = pytest.mark.paints

ROOT = Path(__file__).parent.parent
RUN = Path("runs/version_0")
SMALL = {"num_envs": 4, "num_steps": 16, "num_eval_episodes": 2}


def small(env=ActionMustMatch, **kwargs) -> PPO:
    return PPO(env, **{**SMALL, "total_steps": 512, **kwargs})


@pytest.fixture
def logged(fit):
    """Train with a logger, hence a folder, and evaluations; without pictures unless they are asked for."""

    def run(model: PPO, *callbacks, report: bool = False, **kwargs) -> lightning.Trainer:
        defaults = {
            "logger": RunCSVLogger(".", name="runs", version=0),
            "limit_val_batches": 1.0,
            "enable_checkpointing": True,
            "callbacks": [*callbacks, RunReport(enabled=report)],
        }
        return fit(model, **{**defaults, **kwargs})

    return run


def written() -> dict:
    return json.loads((RUN / "summary.json").read_text())


def test_a_run_leaves_a_summary_that_says_what_the_model_says(logged):
    model = small(total_steps=1024)
    trainer = logged(model)
    summary, file = model.summary(), written()
    assert {name: file[name] for name in summary} == json.loads(json.dumps(summary))
    assert (file["status"], file["seed"], file["hyperparameters"]["gamma"]) == ("finished", model.seed, 0.99)
    assert (file["global_step"], file["total_timesteps"], file["final_iteration"]) == (1024, 1024, 16)
    assert [row["global_step"] for row in file["train_history"]] == list(range(64, 1025, 64))
    assert file["last_train_metrics"] == file["train_history"][-1]
    last = {name: value.item() for name, value in trainer.callback_metrics.items()}
    for name in ("train/value_loss", "rollout/ep_rew_mean", "time/fps"):
        assert file["last_train_metrics"][name] == last[name]
    assert [row["global_step"] for row in file["eval_history"]] == list(range(64, 1025, 64))
    best = max(file["eval_history"], key=lambda row: row["eval/mean_reward"])
    assert file["best_eval_metrics"] == best
    assert not any(name.startswith("eval/") for name in file["train_history"][-1])
    assert file["history"]["timesteps"] == list(range(64, 1025, 64))
    assert file["history"]["episode_rewards"] == [row["rollout/ep_rew_mean"] for row in file["train_history"]]
    assert file["episode_lengths"] == [1] * 100
    for name in ("latest", "best"):
        assert torch.load(file[f"{name}_checkpoint_path"])["state_dict"]["env_steps"] > 0
    assert Path(file["latest_checkpoint_path"]).name == "last.ckpt"


def test_the_seconds_of_a_run_add_up(logged):
    model = small()
    started = time.perf_counter()
    logged(model)
    wall = time.perf_counter() - started
    summary = written()
    split = summary["time_split"]
    assert sum(split.values()) == pytest.approx(summary["elapsed_time_sec"])
    assert min(split.values()) > 0
    assert summary["elapsed_time_sec"] < wall
    assert summary["training_fps"] == pytest.approx(512 / summary["elapsed_time_sec"])


def test_the_summary_of_a_resumed_run_is_whole(logged):
    logged(small())
    first = written()
    again = small(total_steps=1024)
    logged(again, ckpt_path=RUN / "checkpoints/last.ckpt")
    summary = written()
    assert [row["global_step"] for row in summary["train_history"]] == list(range(64, 1025, 64))
    assert summary["train_history"][:8] == first["train_history"]
    assert summary["eval_history"][: len(first["eval_history"])] == first["eval_history"]
    assert summary["elapsed_time_sec"] > first["elapsed_time_sec"]
    assert summary == {**summary, **json.loads(json.dumps(again.summary()))}


def test_the_seconds_of_an_update_of_ones_own_are_counted(logged):
    class Own(PPO):
        def training_step(self, batch, batch_idx):
            update = self.update(batch)
            self.count(batch, epochs=update.epochs)
            self.log_metrics(self.metrics(batch, update, seconds=2.0, learning_rate=0.0))
            self.trainer.should_stop = self.num_env_steps >= self.total_steps

    model = Own(ActionMustMatch, **SMALL, total_steps=256)
    logged(model)
    assert model.summary()["time_split"]["update"] == 8.0
    assert [row["time/update"] for row in model.summary()["train_history"]] == [2.0] * 4


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_checkpoint_that_a_callback_saves_has_the_record_of_its_iteration(logged):
    logs = LambdaCallback(on_train_batch_end=lambda trainer, model, *_: model.log("own", float(model.policy_version)))
    logged(small(), logs, ModelCheckpoint("saved", filename="{epoch}", every_n_train_steps=3, save_top_k=-1))
    model = small()
    every = ModelCheckpoint("saved", every_n_train_steps=3, save_top_k=0)
    logged(model, every, ckpt_path="saved/epoch=2.ckpt", logger=RunCSVLogger(".", name="runs", version=1))
    history = model.summary()["train_history"]
    assert [row["time/iterations"] for row in history] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row.get("own") for row in history] == [1, 2, *[None] * 6]  # a callback logs after that save


def test_a_second_fit_of_a_model_resumes_with_its_history(fit):
    model = small(total_steps=256)
    fit(model)
    model.total_steps = 512
    fit(model)
    assert model.summary()["history"]["timesteps"] == list(range(64, 513, 64))


def test_records_change_nothing_in_training(fit):
    weights = []
    for watched in (True, False):
        torch.manual_seed(0)
        model = small()
        with pytest.MonkeyPatch.context() as patch:
            if not watched:
                patch.setattr(RunSummary, "on_train_batch_end", lambda *_: None)
                patch.setattr(Records, "add_iteration", lambda *_: None)
            fit(model)
        assert bool(model.summary()["train_history"]) == watched
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_a_run_that_fails_leaves_its_summary_and_names_the_checkpoint_that_was_saved(logged):
    model = small(Faulty, env_kwargs={"fault": "raise"}, total_steps=64)
    with pytest.raises(EnvironmentFault):
        logged(model)
    assert written()["status"].startswith("stopped by EnvironmentFault: ")
    assert written()["train_history"] == []

    class Stops(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                raise KeyError("mine")

    with pytest.raises(KeyError):
        logged(small(), Stops(), report=True)
    summary = written()
    assert summary["status"] == "stopped by KeyError: 'mine'"
    assert summary["global_step"] == 192
    assert torch.load(summary["latest_checkpoint_path"])["state_dict"]["env_steps"] == 192
    assert (RUN / "report.html").exists()


def test_an_interrupt_at_once_leaves_a_summary_but_waits_for_no_picture(logged):
    class Stops(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        logged(small(), Stops(), report=True)
    assert written()["status"] == "stopped by KeyboardInterrupt: "
    assert not (RUN / "report.html").exists()


def test_a_picture_that_cannot_be_drawn_is_a_warning(logged, monkeypatch):
    import ppo_lightning.tools.report as module

    monkeypatch.setattr(module, "draw_report", lambda folder: 1 / 0)
    with pytest.warns(UserWarning, match=r"no report was drawn of .* \(ZeroDivisionError"):
        logged(small(total_steps=64), report=True)


def test_a_summary_that_cannot_be_written_is_a_warning(logged):
    (RUN / "summary.json").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"summary.json could not be written"):
        logged(small(total_steps=64))


def test_hyperparameters_without_json_are_written_as_text(logged):
    logged(small(total_steps=64, max_grad_norm=float("inf")))
    assert written()["hyperparameters"]["max_grad_norm"] == "Infinity"
    assert "ActionMustMatch" not in str(written()["hyperparameters"].get("env"))  # a class is no plain data


def test_without_a_logger_nothing_is_written(fit):
    fit(small(total_steps=64))
    assert list(Path(".").iterdir()) == []


def test_the_command_line_leaves_summary_and_report_and_names_it(capsys):
    words = ["--model.env", "CartPole-v1", "--model.num_steps", "32", "--model.total_steps", "512"]
    main(["fit", *words, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"])
    run = Path("lightning_logs/version_0")
    assert "report.html" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["hyperparameters"]["env"] == "CartPole-v1"
    page = (run / "report.html").read_text()
    assert "CartPole-v1 · version_0" in page
    assert "total_steps: 512" in page


def test_the_command_line_names_what_is_there_alone(capsys):
    words = ["--model.env", "CartPole-v1", "--model.num_steps", "32", "--model.total_steps", "256"]
    main(
        [
            "fit",
            *words,
            "--trainer.accelerator",
            "cpu",
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.logger",
            "false",
        ]
    )
    shown = capsys.readouterr().out
    assert "  checkpoints " in shown
    assert not re.search("  (logs|plot|report|watch) ", shown)


def test_the_command_line_can_leave_out_the_page():
    words = ["--model.env", "CartPole-v1", "--model.num_steps", "32", "--model.total_steps", "256"]
    words += ["--trainer.callbacks+=RunReport", "--trainer.callbacks.enabled=false"]
    main(["fit", *words, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"])
    names = {path.name for path in Path("lightning_logs/version_0").iterdir()}
    assert "summary.json" in names
    assert "report.html" not in names


def test_matplotlib_is_imported_where_something_is_drawn_alone():
    for path in (ROOT / "ppo_lightning").rglob("*.py"):
        assert not [
            line for line in path.read_text().splitlines() if line.startswith(("import matplotlib", "from matplotlib"))
        ]


def test_an_iteration_is_recorded_within_a_tenth_of_a_millisecond(fit):
    model = small()
    trainer = fit(model)
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, RunSummary))
    seconds = []
    for _ in range(200):
        started = time.perf_counter()
        callback.on_train_batch_end(trainer, model, None, None, 0)
        seconds.append(time.perf_counter() - started)
    assert np.median(seconds) < 1e-4


@pytest.mark.long
def test_two_processes_leave_one_summary_of_both():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = ["--model.env", "CartPole-v1", "--model.num_envs", "2", "--model.num_steps", "32"]
        words += [
            "--model.total_steps",
            "256",
            "--trainer.accelerator",
            "cpu",
            "--trainer.enable_progress_bar",
            "false",
        ]
        words += ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--name=version"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-m", "ppo_lightning", "fit", *words], check=True, env=environment, capture_output=True
        )
    run = Path("lightning_logs/version_0")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["num_processes"], summary["global_step"], summary["status"]) == (2, 256, "finished")
    assert [row["global_step"] for row in summary["train_history"]] == [128, 256]
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([], ["policy.network.actor_trunk", "policy.network.action_head", "policy.network.critic_trunk",
              "policy.network.value_head", "loss.head", "all"]),
        ([ModelSummary(max_depth=2)], None),
    ],
    ids=["default", "given"],
)  # fmt: skip
def test_a_run_begins_with_the_parts_that_have_parameters(given, names, capsys):
    class Own(PPOLoss):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 1)

        def forward(self, batch, evaluate, coefficients):
            losses = super().forward(batch, evaluate, coefficients)
            return {**losses, "loss": losses["loss"] + self.head(batch["observation"]).square().mean()}

    model = PPO("Pendulum-v1", loss=Own(), num_envs=2, num_steps=8, total_steps=16)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0,
        callbacks=given,
    )  # fmt: skip
    trainer.fit(model)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = [row[0] for row in rows if len(row) > 1 and ("." in row[0] or row[0] == "all")]
    assert found == (names or [])
    if names:
        (total,) = [row[1] for row in rows if row[:1] == ["all"]]
        assert total == f"{sum(one.numel() for one in model.parameters()):,}"
