"""The command line: LightningCLI with defaults that suit PPO. Nothing about PPO itself."""

import copy
import inspect
import json
import os
import random
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from enum import Enum
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import Namespace
from lightning import LightningModule, Trainer, seed_everything
from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from ppo_lightning.arguments import ConfigFile, Parser, import_from_here, part_of_help
from ppo_lightning.callbacks import has_tools, load_tools
from ppo_lightning.compiler import MAX_SAMPLES
from ppo_lightning.errors import InputError, UsageError, exit_on_user_error, refused_settings
from ppo_lightning.parameters import usable_cores
from ppo_lightning.ppo import PPO
from ppo_lightning.runs.checkpoint import (
    CHECKPOINT_KEY,
    CHOICES,
    newest_checkpoint,
    read_checkpoint,
)
from ppo_lightning.runs.hyperparameters import LIGHTNING_KEYS, TRAINING_ONLY, check_names, defaults_of, disallowed_names
from ppo_lightning.runs.loggers import (
    TolerantCSVLogger,
    TolerantLogger,
    TolerantTensorBoardLogger,
    check_logger_config,
    finishing_wandb_run,
    with_folder_logger,
)
from ppo_lightning.runs.trainer import check_trainer_settings, check_writable


class RunWriter(ExperimentWriter):
    """Appends to an existing ``metrics.csv``; Lightning's own writer deletes it."""

    @override
    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.exists():
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)  # a row that was cut off, by a full disk or kill -9
        if file.exists() and file.stat().st_size:
            self.metrics_keys = file.read_text().partition("\n")[0].strip().split(",")


class RunTensorBoardLogger(TolerantTensorBoardLogger):
    """TensorBoard's event file of a run, with its hyperparameters beside its returns."""

    METRICS = ("eval/mean_reward", "rollout/ep_rew_mean")

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: dict[str, Any] | None = None, step: int | None = None) -> None:
        from torch.utils.tensorboard.summary import hparams  # loads TensorBoard

        super().log_hyperparams(params, metrics, step)
        # Lightning writes them to events with a value of each metric only, which would be a first point of its curve.
        plain = self._sanitize_params(_flatten_dict(dict(params)))
        for summary in hparams(plain, dict.fromkeys(self.METRICS, 0.0)):
            self.attempt(partial(self._write, summary))

    def _write(self, summary: Any) -> None:
        self.experiment._get_file_writer().add_summary(summary)


class RunCSVLogger(TolerantCSVLogger):
    """``metrics.csv`` of a run, resumed or not, on disk within 20 rows."""

    ROWS = 20

    @property
    @override
    def experiment(self) -> Any:
        if self._experiment is None and cast(Any, rank_zero_only).rank == 0:
            self._experiment = RunWriter(self.log_dir)
        return super().experiment

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.attempt(lambda: self.experiment.log_metrics(metrics, step))
        if len(self.experiment.metrics) >= self.ROWS:
            self.save()


def _appending_csv_logger(logger: Logger) -> Logger:
    """Replace Lightning's CSVLogger by one that appends when a run resumes; any other logger is unchanged.

    It flushes by count or time; ``flush_logs_every_n_steps`` would count environment steps, which come in thousands.
    """
    if type(logger) is not CSVLogger:
        return logger
    return RunCSVLogger(logger._root_dir, logger._name, logger._version, logger._prefix)


class RunConfig(SaveConfigCallback):
    """Leaves ``config.yaml``, which repeats the run from its start: without ``ckpt_path``, and once training begins."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        whole = config.clone()
        whole.ckpt_path = None
        super().__init__(parser, whole, *args, **kwargs)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: the run may still be refused."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class PPOCLI(LightningCLI):
    """``fit``, ``validate`` and ``test`` for :class:`PPO`, from YAML and flags."""

    @override
    def __init__(self, *classes: Any, args: ArgsType = None, **options: Any) -> None:
        # Words of the process's own command line may be mistyped: one sentence, not a traceback.
        with exit_on_user_error() if args is None else nullcontext():
            self._check_options(options)
            given = sys.argv[1:] if args is None else args
            self._help_part, self._given = part_of_help(given) if isinstance(given, list) else (None, given)
            first = next(iter(self._given), None) if isinstance(self._given, list) else self._given.get("subcommand")
            self._command = first if first in self.subcommands() else None
            if self._command is not None and not isinstance(self._given, list) and self._command not in self._given:
                raise InputError(
                    f"args names the subcommand {self._command} and has no settings under that name: give "
                    f"{{'subcommand': '{self._command}', '{self._command}': {{…}}}}"
                )
            super().__init__(*classes, args=self._given, **options)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for name, value, instead in (
            ("run", False, "make PPO and Trainer in Python instead"),
            ("subclass_mode_model", True, "give your class itself, PPOCLI(MyPPO)"),
        ):
            if options.get(name, not value) is value:
                raise InputError(f"PPOCLI does not support {name}={value}: {instead}")

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "validate", "test")}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose errors are one sentence."""
        load_tools()
        parser = Parser(**kwargs, help_part=self._help_part)
        parser.add_argument(
            "-c",
            "--config",
            action=ConfigFile,
            help="YAML file, or a name of `ppo-lightning configs`; later ones win",
        )
        return parser

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """A subcommand's parser: without arguments, which take half a second, where another subcommand is given first."""
        if self._command not in (None, subcommand):
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--name",
                type=str | None,
                default=None,
                help="name of the run's folder; a number is appended, and null is the task and the seed",
            )
        return parser

    def _used_parsers(self) -> list[LightningArgumentParser]:
        """The parsers of the subcommands that the arguments may name."""
        known = self._subcommand_parsers
        return list(known.values()) if self._command is None else [known[self._command]]

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Trainer and model; PPO makes its own data."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(self._model_class, "model")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with the checkpoint's hyperparameters as defaults, so that files and flags win over them."""
        given, refused, unsaved = self._given, None, list[str]()
        path = checkpoint_seed = None
        try:
            self.config = _parse(parser, given, prints=False)
        except UsageError as error:
            if isinstance(given, list) and {"-h", "--help"} & set(given):
                raise
            refused = error  # the checkpoint may have what is missing, or an optimizer that takes the key
        if refused is not None or self.config[self.config.subcommand].ckpt_path is not None:
            path, named = self._checkpoint_and_keys(refused)
            if path is None and refused is not None and not _prints_config(given):
                raise refused
            if path is not None:
                checkpoint = read_checkpoint(path)
                checkpoint_seed = checkpoint[CHECKPOINT_KEY]["seed"]
                self._set_hyperparameters(path, checkpoint.get("hyper_parameters", {}), named)
                unsaved = sorted(set(checkpoint[CHECKPOINT_KEY]["not_saved"]) - named)
        if path is not None or _prints_config(given):
            self.config = _parse(parser, given)
        config = self.config[self.config.subcommand]
        _refuse_values_in_the_place_of_keys(config)
        if path is not None:
            config.ckpt_path = path
            missing = [name for name in unsaved if self.config.subcommand == "fit" or name not in TRAINING_ONLY]
            if missing and not _prints_config(given):
                raise InputError(
                    f"{path} was made with a value of {missing[0]} which a file of plain data cannot hold: give "
                    f"--model.{missing[0]}"
                )
        check_logger_config(config.trainer.logger)
        if config.seed_everything is True or config.seed_everything is None:
            # Lightning would take 0. Processes started by this one find its seed in their environment.
            drawn = random.SystemRandom().randrange(2**31) if checkpoint_seed is None else checkpoint_seed
            config.seed_everything = int(os.environ.get("PL_GLOBAL_SEED", drawn))

    def _checkpoint_and_keys(self, refused: UsageError | None) -> tuple[str | None, set[str]]:
        """Path of the checkpoint that the arguments name, and the keys of the model that they set.

        A parser of the same options reads them, to which the model's values may be anything: which ones are valid depends on
        the checkpoint (``--model.optimizer.momentum`` where its optimiser is SGD).

        Args:
            refused: what the command line's own parser raised, whose message knows the model's types.
        """
        outline = copy.copy(self)
        names = self._model_keys()
        outline._model_class = _outline_of(names | self._linked_keys())
        outline.setup_parser(True, *outline._setup_parser_kwargs(outline.parser_kwargs))
        try:
            with_defaults, without = (
                _parse(outline.parser, self._given, prints=False, defaults=defaults, _skip_validation=True)
                for defaults in (True, False)
            )
        except UsageError as error:
            raise refused or error from None
        config, explicit = with_defaults[with_defaults.subcommand], without[without.subcommand].get("model", {})
        _refuse_values_in_the_place_of_keys(config)
        named = {name for name in names if name in explicit or config.model[name] is not None}
        path = config.ckpt_path
        if path == "":
            raise InputError("ckpt_path is empty: give a file, last or best, or null for none")
        if path in CHOICES:
            path = newest_checkpoint(config.trainer.default_root_dir or ".", path)
        return None if path is None else str(path), named

    def _model_keys(self) -> set[str]:
        """The parameters of the model's class that can be given."""
        return set(vars(self._used_parsers()[0].get_defaults(skip_validation=True).model))

    def _linked_keys(self) -> set[str]:
        """Those that ``link_arguments`` sets from others."""
        return set(defaults_of(cast(type, self._model_class))) - self._model_keys()

    def _set_hyperparameters(self, path: str, hyperparameters: dict[str, Any], named: set[str]) -> None:
        """Make a checkpoint's hyperparameters the parsers' defaults.

        Args:
            path: of the checkpoint.
            hyperparameters: that it holds.
            named: those that the arguments set, which replace the checkpoint's.

        Raises:
            InputError: this version does not have one of them, or no checkpoint may choose it and it is not named.
        """
        found = {name: value for name, value in hyperparameters.items() if name not in LIGHTNING_KEYS}
        found = {name: value for name, value in found.items() if name not in self._linked_keys()}
        unknown = sorted(found.keys() - self._model_keys())
        if unknown:
            raise InputError(f"{path} sets {unknown[0]}, which this version of PPO has not: use the one that wrote it")
        check_names(found, named)
        foreign = disallowed_names(found)
        for parser in self._used_parsers():
            parser.set_defaults({f"model.{name}": value for name, value in found.items() if name not in foreign})

    @override
    def _parse_ckpt_path(self) -> None:
        """The hyperparameters of the checkpoint are in already, below what was given here."""

    @override
    def _set_seed(self) -> None:
        """Seed the global generators, silently: the run prints its seed when it starts."""
        seed = self._get(self.config, "seed_everything")
        if seed is False:
            return
        if not 0 <= seed < 2**32:
            raise InputError(f"seed_everything must lie between 0 and {2**32 - 1}, got {seed}")
        seed_everything(seed, workers=True, verbose=False)

    @override
    def instantiate_classes(self) -> None:
        """Make the model and the Trainer; what a library refuses about their settings becomes one sentence."""
        with refused_settings():
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer with loggers in one folder per run; those that the user gave log beside them."""
        config = self._get(self.config_init, "trainer")
        given, root = config["logger"], config["default_root_dir"] or "."
        check_trainer_settings(config)
        if self.subcommand == "fit":
            if "://" in str(root):
                raise InputError(
                    f"trainer.default_root_dir {root} is no folder of this machine: train here, and copy the run"
                )
            for key, folder in _folders(config, root):
                check_writable(key, folder)
        if given in (None, True):
            kwargs["logger"] = self._loggers(root)
        elif given is not False and self.subcommand == "fit":
            loggers = [_appending_csv_logger(logger) for logger in (given if isinstance(given, list) else [given])]
            kwargs["logger"] = with_folder_logger(loggers, lambda: cast(list[Logger], self._loggers(root)))
        if self.subcommand != "fit":
            self.save_config_callback = None
        elif self.save_config_callback is SaveConfigCallback:
            self.save_config_callback = RunConfig
        return super().instantiate_trainer(**kwargs)

    def _loggers(self, root: str) -> list[TensorBoardLogger | RunCSVLogger] | bool:
        if self.subcommand != "fit":
            return False
        checkpoint = self._get(self.config_init, "ckpt_path")
        run = Path(checkpoint).resolve().parent.parent if checkpoint and Path(checkpoint).is_file() else None  # no URL
        if run is None or run.parent.name != LOGS:
            name = self._get(self.config, "name")
            run = free_folder(Path(root) / LOGS, self.run_name() if name is None else name)
        place: dict[str, Any] = {"save_dir": run.parent.parent, "name": run.parent.name, "version": run.name}
        return [RunTensorBoardLogger(**place, default_hp_metric=False), RunCSVLogger(*place.values())]

    def run_name(self) -> str:
        """What a run's folder is called, before its number: the task and the seed; an override may choose other words."""
        seed = self._get(self.config, "seed_everything")
        factory = cast(PPO, self.model).env_factory
        named = (factory.env_kwargs.get(key) for key in ("task", "game"))  # of simulators that have several
        task = next((name for name in named if isinstance(name, str)), factory.name.rpartition(":")[2])
        slug = re.sub(r"[^a-z0-9._-]+", "-", task.lower()).strip("-") or "run"
        return slug if seed is False else f"{slug}_s{seed}"

    def before_fit(self) -> None:
        """Set the number of threads by the size of the update."""
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(num_threads_for(cast(PPO, self.model), processes=self.trainer.num_devices))

    def after_fit(self) -> None:
        """Draw the learning curve, and print where the files are."""
        trainer = self.trainer
        folder = trainer.log_dir  # all ranks ask: the answer is broadcast
        if not trainer.is_global_zero or folder is None:
            return
        run = Path(folder)
        places = {
            "logs": run if trainer.loggers else None,
            "checkpoints": run / "checkpoints",
            "plot": draw_learning_curve(run) if trainer.loggers else None,
            "report": run / "report.html" if trainer.loggers else None,
        }
        model = cast(PPO, self.model)
        episodes = model.rollouts.episodes
        mean = episodes.means().get("rollout/ep_rew_mean")
        returns = "" if mean is None else f", mean return {mean:.1f} over {len(episodes.ep_info_buffer)} episodes"
        signalled = (
            model.agreed_stop_signal or model.stop_signal
        )  # the latter alone where it came after the last iteration
        stopped = "" if signalled is None else f", stopped by {signalled.name}: --ckpt_path last resumes"
        print(f"\ntrained {model.num_env_steps:,} environment steps{returns}{stopped}")
        for name, place in places.items():
            if place is not None and place.exists():
                print(f"  {name:<12} {place}")
        for logger in trainer.loggers:
            if isinstance(logger, TolerantLogger) and logger.stopped_by is not None:
                print(f"  incomplete   {type(logger).__name__} stopped logging: {logger.stopped_by}")
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            print(f"  watch        tensorboard --logdir {run.parent}")
        if signalled is not None:
            sys.exit(128 + signalled)


LOGS = "lightning_logs"
"""Folder of runs."""


def free_folder(root: Path, name: str) -> Path:
    """The first of ``name_0``, ``name_1`` … below a folder that does not exist.

    Raises:
        InputError: the name is none.
    """
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise InputError(f"name must be letters, digits, dots and dashes, got {name!r}")
    number = 0
    while (root / f"{name}_{number}").exists():
        number += 1
    return root / f"{name}_{number}"


def draw_learning_curve(run: Path) -> Path | None:
    """The path of ``learning_curve.png``, which ``tools`` draws into a run's folder; None where it draws none."""
    return import_module("ppo_lightning.tools.charts").draw_learning_curve(run) if has_tools() else None


def _folders(config: Any, root: str) -> Iterator[tuple[str, str | Path]]:
    """Folders that a run writes to, and the keys that name them."""
    loggers, callbacks = (one if isinstance(one, list) else [one] for one in (config["logger"], config["callbacks"]))
    yield "trainer.default_root_dir", root
    yield from (("trainer.logger", one.save_dir) for one in loggers if isinstance(one, Logger) and one.save_dir)
    yield from (
        ("trainer.callbacks", one.dirpath) for one in callbacks if isinstance(one, ModelCheckpoint) and one.dirpath
    )


# Defaults of Lightning's callbacks are members of enumerations, for which YAML has no word.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))

CLI_OPTIONS: dict[str, Any] = {
    "trainer_defaults": {"max_epochs": -1, "num_sanity_val_steps": 0, "log_every_n_steps": 1},
    "save_config_kwargs": {"overwrite": True},
    "auto_configure_optimizers": False,
    "parser_kwargs": {"prog": "ppo-lightning", "description": "PPO on PyTorch Lightning's Trainer"},
}
"""Of :class:`PPOCLI`, for all who make one."""


def num_threads_for(model: PPO, processes: int) -> int:
    """Threads that pay: all cores, shared among the processes of this machine, from 10⁷ products per minibatch on.

    A smaller update hardly gains by a second thread, and where another process is busy waits for it: a 64-64 network took
    twenty times as long.
    """
    samples = min(model.num_steps * model.num_envs // model.num_minibatches, MAX_SAMPLES)
    products = samples * sum(parameter.numel() for parameter in model.policy.parameters())
    return max(1, usable_cores() // processes) if products >= 10_000_000 else 1


def main(args: list[str] | None = None) -> PPOCLI:
    """Run the command line; a user error prints one sentence and exits with status 1.

    Returns:
        The command line, with ``model`` and ``trainer``.
    """
    torch.set_float32_matmul_precision("high")
    import_from_here()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # until it is known how much there is to do
    # Lightning 2.6.6 asks torch 2.13's pytree in a way that torch calls deprecated.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
    with exit_on_user_error(), finishing_wandb_run():
        return PPOCLI(PPO, **CLI_OPTIONS, args=args)


def _refuse_values_in_the_place_of_keys(config: Namespace) -> None:
    for name in ("model", "trainer"):
        if not isinstance(config[name], Namespace):
            raise InputError(f"{name} must hold keys with values (such as model.env), got {config[name]!r}")


Given = list[str] | dict[str, Any] | Namespace
"""Words of a command line, or the keys and values that Python gives instead."""


def _is_print_config(word: str) -> bool:
    return word.partition("=")[0] == "--print_config"


def _prints_config(given: Given) -> bool:
    return isinstance(given, list) and any(map(_is_print_config, given))


def _parse(parser: LightningArgumentParser, given: Given, *, prints: bool = True, **how: Any) -> Namespace:
    """Parse the arguments.

    Args:
        parser: of the command line.
        given: words, or keys and values.
        prints: obey ``--print_config``, which prints the values and exits.
        how: further arguments of jsonargparse's parse methods.
    """
    if not isinstance(given, list):
        return parser.parse_object(copy.deepcopy(given), **how)
    silent = [word for word in given if not _is_print_config(word)]
    words, parts = _without_parts_of_env_kwargs(given if prints else silent)
    if parts:
        rest, _ = _without_parts_of_env_kwargs(silent)
        config = parser.parse_args(rest, **how)
        whole = copy.deepcopy(config[config.subcommand].get("model.env_kwargs") or {})
        for keys, value in parts:
            inner = whole
            for key in keys[:-1]:
                inner[key] = inner = inner[key] if isinstance(inner.get(key), dict) else {}
            inner[keys[-1]] = value
        words = [
            *words,
            *(
                f"--model.env_kwargs.{key}={json.dumps(whole[key])}"
                for key in dict.fromkeys(keys[0] for keys, _ in parts)
            ),
        ]
    return parser.parse_args(words, **how)


def _without_parts_of_env_kwargs(words: list[str]) -> tuple[list[str], list[tuple[list[str], Any]]]:
    """Words without flags within an argument of environments (``--model.env_kwargs.task.size 3``), and their keys and values.

    jsonargparse would replace the whole argument by its part.
    """
    kept: list[str] = []
    parts: list[tuple[list[str], Any]] = []
    left = iter(words)
    for word in left:
        key, equals, value = word.partition("=")
        if not re.fullmatch(r"--model\.env_kwargs(\.[^.]+)*", key):
            kept.append(word)
            continue
        path = key.split(".")[2:]
        if len(path) < 2:  # it replaces what came before
            parts = [part for part in parts if path and part[0][0] != path[0]]
            kept.append(word)
            continue
        text = value if equals else next(left, None)
        if text is None:
            raise UsageError(f"{key} needs a value")
        parts.append((path, _plain_value(text)))
    return kept, parts


def _plain_value(text: str) -> Any:
    """What YAML makes of a word, or the word itself where that is no plain data (a date), or nothing."""
    try:
        value = yaml.safe_load(text)
        json.dumps(value)
    except (yaml.YAMLError, TypeError):
        return text
    return value


def _outline_of(names: Iterable[str]) -> type[LightningModule]:
    """A class whose constructor takes anything under the names; lists among it, so that ``+=`` appends."""

    def __init__(self: LightningModule, **values: Any) -> None:  # noqa: N807
        """Take the values."""

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    rest = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=list[Any] | Any)
        for name in sorted(names)
    ]
    setattr(__init__, "__signature__", inspect.Signature([own, *rest]))  # noqa: B010
    return type("Outline", (LightningModule,), {"__init__": __init__})
