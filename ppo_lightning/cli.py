"""The command line: LightningCLI with defaults that suit PPO. Nothing about PPO itself."""

import os
import random
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from ppo_lightning.checkpoint import newest_checkpoint, read_checkpoint
from ppo_lightning.errors import EnvironmentFault, InputError
from ppo_lightning.plot import draw_learning_curve
from ppo_lightning.ppo import PPO

DDP_START_METHODS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
DDP_TIMEOUT = timedelta(minutes=3)  # torch's half an hour is a long time to wait for a rank that died


class RunCSVLogger(CSVLogger):
    """``metrics.csv`` that a resumed run goes on with; Lightning's own logger deletes what it finds."""

    @property
    @override
    def experiment(self) -> Any:
        file = Path(self.log_dir) / "metrics.csv"
        if self._experiment is not None or rank_zero_only.rank != 0 or not file.exists():
            return super().experiment
        kept = file.rename(file.with_suffix(".kept"))
        try:
            writer = super().experiment
        finally:
            kept.rename(file)
        writer.metrics_keys = file.read_text().partition("\n")[0].strip().split(",")
        return writer


class PPOCLI(LightningCLI):
    """``fit``, ``validate`` and ``test`` for :class:`PPO`, from YAML and flags."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "validate", "test")}

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with the checkpoint's hyperparameters as defaults, so that files and flags win over them."""
        words = [str(word) for word in (sys.argv[1:] if args is None else cast(list[str], args))]
        path = _flag(words, "ckpt_path")
        if path is not None and words[0] in self._subcommand_parsers:
            if path == "last":
                path = str(newest_checkpoint(_flag(words, "trainer.default_root_dir") or "."))
                words = _replace(words, "ckpt_path", path)
            hyperparameters = dict(read_checkpoint(path).get("hyper_parameters", {}))
            for private in ("_instantiator", "_class_path"):
                hyperparameters.pop(private, None)
            self._subcommand_parsers[words[0]].set_defaults({f"model.{k}": v for k, v in hyperparameters.items()})
        super().parse_arguments(parser, words)
        config = self.config[self.config.subcommand]
        if config.seed_everything is True:
            # Lightning would take 0. Processes started by this one find its seed in their environment.
            config.seed_everything = int(os.environ.get("PL_GLOBAL_SEED", random.SystemRandom().randrange(2**31)))

    @override
    def _parse_ckpt_path(self) -> None:
        """The hyperparameters of the checkpoint are in already, below what was given here."""

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer with gloo or NCCL that gives up on a dead rank in minutes, and loggers in one folder per run."""
        config = self._get(self.config_init, "trainer")
        start_method = DDP_START_METHODS.get(str(config["strategy"]))
        if start_method is not None:
            kwargs["strategy"] = DDPStrategy(
                timeout=DDP_TIMEOUT, broadcast_buffers=False, start_method=cast(Any, start_method)
            )
        if config["logger"] in (None, True):
            kwargs["logger"] = self._loggers(config["default_root_dir"] or ".")
        if self.subcommand != "fit":
            self.save_config_callback = None
        return super().instantiate_trainer(**kwargs)

    def _loggers(self, root: str) -> list[TensorBoardLogger | RunCSVLogger] | bool:
        if self.subcommand != "fit":
            return False
        checkpoint = self._get(self.config_init, "ckpt_path")
        run = Path(checkpoint).resolve().parent.parent if checkpoint else None
        if run is not None and run.name.startswith("version_"):  # a resumed run goes on in its own folder
            place: dict[str, Any] = {"save_dir": run.parent.parent, "name": run.parent.name, "version": run.name}
        else:
            place = {"save_dir": root, "name": "lightning_logs"}
        board = TensorBoardLogger(**place)
        return [board, RunCSVLogger(place["save_dir"], place["name"], board.version)]

    def after_fit(self) -> None:
        """Draw the learning curve and say where everything is."""
        trainer = self.trainer
        if not trainer.is_global_zero or trainer.log_dir is None:
            return
        run = Path(trainer.log_dir)
        places = {"logs": run, "checkpoints": run / "checkpoints", "plot": draw_learning_curve(run)}
        steps = f"{cast(PPO, self.model).num_env_steps:,} environment steps"
        mean = trainer.callback_metrics.get("rollout/ep_rew_mean")
        print(f"\ntrained {steps}" + ("" if mean is None else f", mean return {mean.item():.1f} over 100 episodes"))
        for name, place in places.items():
            if place is not None and place.exists():
                print(f"  {name:<12} {place}")
        print(f"  watch        tensorboard --logdir {run.parent}")


def main(args: list[str] | None = None) -> None:
    """Run the command line; what the user can mend is said in one sentence, with exit status 1."""
    torch.set_float32_matmul_precision("high")
    try:
        PPOCLI(
            PPO,
            trainer_defaults={"max_epochs": -1, "num_sanity_val_steps": 0, "log_every_n_steps": 1},
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            args=args,
        )
    except (InputError, EnvironmentFault, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def _flag(words: list[str], name: str) -> str | None:
    """Value of ``--name value`` or ``--name=value``, the last one given."""
    value = None
    for index, word in enumerate(words):
        if word == f"--{name}" and index + 1 < len(words):
            value = words[index + 1]
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


def _replace(words: list[str], name: str, value: str) -> list[str]:
    """The words with every value of ``--name`` replaced."""
    replaced, skip = [], False
    for word in words:
        if skip:
            replaced.append(value)
            skip = False
        elif word.startswith(f"--{name}="):
            replaced.append(f"--{name}={value}")
        else:
            replaced.append(word)
            skip = word == f"--{name}"
    return replaced


