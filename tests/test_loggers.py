"""Every logger gets the same numbers, over environment steps, and what the run was trained with."""

import json
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from probes import ConstantReward
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ppo_lightning import PPO
from ppo_lightning.callbacks import PPOCallback
from ppo_lightning.cli import main

SMALL = [
    "--model.env", "CartPole-v1", "--model.num_envs", "4", "--model.num_steps", "32", "--model.num_eval_episodes", "2",
    "--model.total_steps", "256", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false",
    "--trainer.enable_progress_bar", "false",
]  # fmt: skip
RUN = Path("lightning_logs/version_0")
LOGGERS = "lightning.pytorch.loggers."
NAMES = {"train/approx_kl", "train/explained_variance", "rollout/ep_rew_mean", "time/total_timesteps"}


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)  # which the logger sets
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()  # a run of a test that failed


def wandb() -> list[str]:
    """Flags for a run of its own in this folder: W&B keeps the first one for good, unless it is told another."""
    flags = ["--trainer.logger.offline", "true", "--trainer.logger.save_dir", str(Path.cwd())]
    return [f"--trainer.logger+={LOGGERS}WandbLogger", *flags]


def mlflow() -> list[str]:
    """Flags for a file store in this folder: MLflow keeps stores by their names."""
    return [f"--trainer.logger+={LOGGERS}MLFlowLogger", "--trainer.logger.save_dir", str(Path("mlruns").resolve())]


def fit(*flags: str) -> None:
    main(["fit", *SMALL, *flags])


def fails(*flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        fit(*flags)
    return str(caught.value.code)


def records(file: Path) -> Iterator[Any]:
    """What W&B has written offline: protocol buffers in a log of LevelDB's format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, joined = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too little of the block for another header
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        joined += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(joined)
            joined = b""
            yield record


def wandb_run() -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    """History, configuration and exit code of the only offline run here, once its service has written the end."""
    (file,) = Path().glob("wandb/offline-run-*/run-*.wandb")
    until, found = time.monotonic() + 30, list(records(file))
    while not any(record.HasField("exit") for record in found):
        assert time.monotonic() < until
        time.sleep(0.1)
        found = list(records(file))
    rows = [record.history.item for record in found if record.HasField("history")]
    given = [item for record in found for item in record.config.update]
    (exit_code,) = (record.exit.exit_code for record in found if record.HasField("exit"))
    return [_read(row) for row in rows], _read(given), exit_code


def _read(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def mlflow_client() -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"file:{Path('mlruns').resolve()}")


def mlflow_run() -> Any:
    client = mlflow_client()
    (run,) = client.search_runs([client.get_experiment_by_name("lightning_logs").experiment_id])
    return run


def mlflow_steps(name: str) -> list[int]:
    return [point.step for point in mlflow_client().get_metric_history(mlflow_run().info.run_id, name)]


def board(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def board_hyperparameters(events: EventAccumulator) -> dict[str, Any]:
    data = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in data.session_start_info.hparams.items()}


@pytest.mark.parametrize("way", ["flags", "yaml"])
def test_loggers_that_are_given_log_beside_the_runs_folder(way):
    if way == "flags":
        fit("--seed_everything", "5", *wandb(), *mlflow())
    else:
        loggers = [
            {"class_path": f"{LOGGERS}WandbLogger", "init_args": {"offline": True, "save_dir": str(Path.cwd())}},
            {"class_path": f"{LOGGERS}MLFlowLogger", "init_args": {"save_dir": str(Path("mlruns").resolve())}},
        ]
        Path("run.yaml").write_text(yaml.safe_dump({"seed_everything": 5, "trainer": {"logger": loggers}}))
        fit("--config", "run.yaml")

    table = np.genfromtxt(RUN / "metrics.csv", delimiter=",", names=True, deletechars="")
    kept = {"config.yaml", "hparams.yaml", "metrics.csv", "checkpoints", "learning_curve.png"}
    assert kept <= {path.name for path in RUN.iterdir()}
    assert {path.name for path in (RUN / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert not Path("config.yaml").exists()

    history, config, exit_code = wandb_run()
    events, run = board(RUN), mlflow_run()
    updates = [row for row in history if "train/loss" in row]
    assert [row["trainer/global_step"] for row in updates] == [128, 256]
    assert mlflow_steps("train/loss") == [128, 256]
    for name in NAMES:
        wanted = table[name][~np.isnan(table[name])].tolist()
        assert [row[name] for row in updates] == pytest.approx(wanted)
        assert [point.value for point in events.Scalars(name)] == pytest.approx(wanted)
        assert [point.step for point in events.Scalars(name)] == [128, 256]
        assert run.data.metrics[name] == pytest.approx(wanted[-1])
    evaluations = [row for row in history if "eval/mean_reward" in row]
    assert [row["trainer/global_step"] for row in evaluations] == mlflow_steps("eval/mean_reward") == [128, 256]

    assert (config["seed"], config["gamma"], config["optimizer"]["init_args"]["lr"]) == (5, 0.99, 3e-4)
    params = run.data.params
    assert (params["seed"], params["gamma"], params["optimizer/init_args/lr"]) == ("5", "0.99", "0.0003")
    shown = board_hyperparameters(events)
    assert (shown["seed"], shown["gamma"], shown["optimizer/init_args/lr"]) == (5, 0.99, 3e-4)
    saved = yaml.safe_load((RUN / "hparams.yaml").read_text())
    assert (saved["seed"], saved["gamma"], saved["optimizer"]["init_args"]["lr"]) == (5, 0.99, 3e-4)
    assert (exit_code, run.info.status) == (0, "FINISHED")


def test_the_loggers_of_a_python_run_get_its_hyperparameters_too(fit, tmp_path):
    model = PPO("CartPole-v1", env_kwargs=None, num_envs=4, num_steps=32, total_steps=256, policy=lambda *spaces: Two())
    loggers = [CSVLogger("."), TensorBoardLogger("boards"), WandbLogger(offline=True, save_dir=tmp_path)]
    loggers.append(MLFlowLogger(save_dir=str(tmp_path / "mlruns")))
    fit(model, logger=loggers, enable_checkpointing=True)
    sys.modules["wandb"].finish()
    history, config, exit_code = wandb_run()
    run, shown = mlflow_run(), board_hyperparameters(board(Path("boards/lightning_logs/version_0")))
    saved = yaml.safe_load((RUN / "hparams.yaml").read_text())
    for known in (config, saved):
        assert (known["seed"], known["num_envs"], known["optimizer"]["init_args"]["lr"]) == (0, 4, 3e-4)
        assert known["policy"].endswith("<lambda>")  # what is no plain data is named
    assert (run.data.params["seed"], shown["seed"], shown["num_envs"]) == ("0", 0, 4)
    assert [row["trainer/global_step"] for row in history if "train/loss" in row] == [128, 256]
    assert (exit_code, run.info.status) == (0, "FINISHED")
    assert (RUN / "checkpoints/last.ckpt").exists()  # in the folder of the first


class Two(torch.nn.Module):
    """Logits and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.head(observation)
        return output[:, :2], output[:, 2]


def test_what_is_not_a_number_is_not_logged_and_callbacks_see_it(fit):
    class Odd(PPO):
        def metrics(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {**super().metrics(*args, **kwargs), "train/odd": float("nan")}

    logger = CSVLogger(".")
    trainer = fit(Odd("CartPole-v1", num_envs=2, num_steps=32, total_steps=64), logger=logger)
    assert trainer.callback_metrics["train/odd"].isnan()
    columns = Path(logger.log_dir, "metrics.csv").read_text().partition("\n")[0].split(",")
    assert "train/loss" in columns
    assert "train/odd" not in columns


def test_what_is_logged_is_written_during_the_run(fit, monkeypatch):
    """A run that is killed leaves its rows, though Lightning's CSVLogger would keep them in memory to the end."""
    monkeypatch.setattr("ppo_lightning.runs.loggers.FLUSH_INTERVAL_S", 0.0)
    logger, rows = CSVLogger("."), []

    def read(*_: Any) -> None:
        rows.append(len(Path(logger.log_dir, "metrics.csv").read_text().splitlines()) - 1)

    fit(
        PPO("CartPole-v1", num_envs=2, num_steps=8, total_steps=48),
        logger=logger,
        callbacks=[PPOCallback(on_iteration_end=read)],
    )
    assert rows == [1, 2, 3]


class Breaks(ConstantReward):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps > 40:
            raise RuntimeError("broken")
        return super().step(action)


def test_a_run_that_fails_ends_as_failed_everywhere():
    said = fails("--model.env", "test_loggers.Breaks", *wandb(), *mlflow())
    assert "broken" in said
    history, _, exit_code = wandb_run()
    assert [row["trainer/global_step"] for row in history if "train/loss" in row] == [128]
    assert (exit_code, mlflow_run().info.status) == (1, "FAILED")


def test_two_commands_of_one_process_are_two_wandb_runs():
    for _ in range(2):
        fit("--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0", *wandb())
    assert len(list(Path().glob("wandb/offline-run-*"))) == 2


def test_a_logger_that_has_a_folder_replaces_the_runs_own():
    csv = [
        f"--trainer.logger+={LOGGERS}CSVLogger",
        "--trainer.logger.save_dir",
        "mine",
        "--trainer.logger.name",
        "poles",
    ]
    fit(*wandb(), *csv, "--trainer.max_epochs", "1")
    kept = {path.name for path in Path("mine/poles/version_0").iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "learning_curve.png"} <= kept
    assert not Path("lightning_logs").exists()


def test_a_resumed_run_keeps_the_rows_of_a_csv_logger_that_is_given():
    csv = [
        f"--trainer.logger+={LOGGERS}CSVLogger",
        "--trainer.logger.save_dir",
        "mine",
        "--trainer.logger.version",
        "0",
    ]
    fit(*csv)
    fit(*csv, "--ckpt_path", "last", "--model.total_steps", "384")
    table = np.genfromtxt("mine/lightning_logs/version_0/metrics.csv", delimiter=",", names=True, deletechars="")
    assert sorted(set(table["step"].tolist())) == [128, 256, 384]


def test_a_resumed_run_keeps_its_folder_with_other_loggers():
    fit(*wandb())
    main(["fit", *SMALL, "--ckpt_path", "last", "--model.total_steps", "384", *wandb()])
    assert [path.name for path in Path("lightning_logs").iterdir()] == ["version_0"]
    steps = np.genfromtxt(RUN / "metrics.csv", delimiter=",", names=True, deletechars="")["step"]
    assert sorted(set(steps.tolist())) == [128, 256, 384]


@pytest.mark.parametrize("name", ["Wandb", "MLFlow", "Comet"])
def test_a_logger_whose_package_is_missing_says_how_to_install_it(monkeypatch, name):
    monkeypatch.setattr("ppo_lightning.runs.loggers.find_spec", lambda module: None)
    said = fails(f"--trainer.logger+={LOGGERS}{name}Logger")
    assert said.startswith(f"error: trainer.logger {name}Logger needs ")
    assert f'pip install "ppo-lightning[{name.lower()}]"' in said


def test_mlflows_file_store_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    said = fails(f"--trainer.logger={LOGGERS}MLFlowLogger")
    assert "MLFLOW_ALLOW_FILE_STORE=true" in said
    assert "--trainer.logger.tracking_uri" in said
    assert "\n" not in said


class Experiment:
    """Stands in for comet_ml's, which needs an account: what Lightning's logger calls."""

    project_name = "poles"

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.flushed = 0

    def get_key(self) -> str:
        return "key"

    def log_other(self, *args: Any) -> None:
        self.other = args

    def flush(self) -> None:
        self.flushed += 1

    def __internal_api__log_parameters__(self, parameters: dict[str, Any], **_: Any) -> None:
        self.parameters.update(parameters)

    def __internal_api__log_metrics__(self, metrics: dict[str, float], step: int, **_: Any) -> None:
        self.metrics.append((step, metrics))

    def __internal_api__set_model_graph__(self, **_: Any) -> None:
        self.graph = True


def test_comet_gets_numbers_and_hyperparameters_through_lightning(monkeypatch, fit):
    experiment = Experiment()
    comet = types.ModuleType("comet_ml")
    vars(comet).update(
        ExperimentConfig=lambda **kwargs: types.SimpleNamespace(offline_directory=None),
        start=lambda **kwargs: experiment,
    )
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    monkeypatch.setattr("lightning.pytorch.loggers.comet._COMET_AVAILABLE", True)
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")  # the logger sets it
    logger = lightning.pytorch.loggers.CometLogger(project="poles")
    fit(PPO("CartPole-v1", num_envs=4, num_steps=32, total_steps=256), logger=logger)
    assert [step for step, metrics in experiment.metrics if "train/loss" in metrics] == [128, 256]
    assert (experiment.parameters["seed"], experiment.parameters["gamma"], experiment.flushed) == (0, 0.99, 1)
