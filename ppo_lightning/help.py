"""Help of the command line: an overview of the commands, and of a command each option in one line."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

OVERVIEW = """\
usage: ppo-lightning COMMAND ...

PPO on PyTorch Lightning's Trainer.

commands:
  fit        train: by a config, flags, or both
  validate   run the evaluation episodes of a checkpoint
  test       the same on other episodes
  enjoy      watch a policy in a window, or as a video
  export     write a policy as one ONNX or torch.export file
  push       upload a policy to the Hugging Face Hub, or write its files to a folder
  report     draw a page about one run, or compare several
  sweep      search for hyperparameters with Optuna
  configs    list the configs that --config finds by name, with what they reach

examples:
  ppo-lightning fit --config cartpole --seed_everything 1
  ppo-lightning fit --model.env Pendulum-v1 --model.total_steps 200000 --model.normalize_observation true
  ppo-lightning enjoy best

ppo-lightning COMMAND --help lists a command's options; --version prints the version.
"""

HEADINGS = {
    "env": "environment",
    "num_steps": "rollout",
    "policy": "policy and normalisation",
    "gamma": "advantage",
    "update_epochs": "minibatches",
    "loss": "loss",
    "max_grad_norm": "optimizer step",
    "eval_interval": "evaluation",
    "max_env_restarts": "the run",
}
"""First parameter of the model under each heading of the help."""

TRAINER_KEYS = {
    "accelerator": "cpu, gpu or mps",
    "devices": "devices, or processes on CPUs (count)",
    "num_nodes": "machines (count)",
    "strategy": "ddp for several devices",
    "precision": "32-true, bf16-mixed or 16-mixed",
    "max_time": "the run stops after it, such as 00:12:00:00",
    "callbacks": "callbacks by class_path",
    "logger": "loggers by class_path, or false",
    "default_root_dir": "folder below which the run's folder is made",
    "enable_progress_bar": "show the progress bar",
    "limit_val_batches": "0 makes no evaluations",
    "profiler": "simple, advanced or pytorch",
}
"""Of Lightning's Trainer, those that the help of ``fit`` lists."""

LIGHTNINGS = {
    "seed_everything": "seed of all random numbers; true draws one",
    "ckpt_path": "checkpoint: a file, last or best",
    "print_config": "print the configuration, and end",
    **{f"trainer.{name}": text for name, text in TRAINER_KEYS.items()},
}
"""What the help says of Lightning's own options, whose descriptions are longer than a line."""

PARTS = {
    "model": "every parameter of PPO, with unit and meaning",
    "policy": "the options of the default network, ActorCritic",
    "trainer": "every option of Lightning's Trainer",
}
"""What follows ``--help.``, and what it describes."""

SMALLEST_WIDTH, LARGEST_WIDTH = 100, 118


def _width() -> int:
    return min(LARGEST_WIDTH, max(SMALLEST_WIDTH, shutil.get_terminal_size().columns))


def short_help(parser: argparse.ArgumentParser, command: str) -> str:
    """Options of a command of LightningCLI in one line each: the model's in the order of the data path."""
    options = {action.dest: action for action in _options(parser._actions)}
    lines = [
        f"usage: ppo-lightning {command} [--config FILE] [--KEY VALUE] ...",
        "",
        "A later file or flag wins. VALUE is YAML: 3, 1e-4, true, null, [64, 64]. KEY+ VALUE appends to a list.",
        "",
        *[f"  {'--seeds':<38} runs on so many seeds, --jobs at once, and one report of all"] * (command == "fit"),
        *_lines(
            options[name]
            for name in ("config", "seed_everything", "name", "ckpt_path", "print_config")
            if name in options
        ),
    ]
    for name, action in options.items():
        key = name.removeprefix("model.")
        if key != name:
            if key in HEADINGS:
                lines += ["", HEADINGS[key]]
            lines += _lines([action])
    lines += ["", "Lightning's Trainer (some of its options)"]
    lines += _lines(options[f"trainer.{name}"] for name in TRAINER_KEYS if f"trainer.{name}" in options)
    lines += ["", "more"]
    lines += [f"  --help.{part:<31} {text}" for part, text in PARTS.items()]
    return "\n".join(lines) + "\n"


def full_help(options: Iterable[argparse.Action], describe: Callable[[argparse.Action], str], prefix: str = "") -> str:
    """Options with their types and whole descriptions.

    Args:
        options: of a parser.
        describe: gives the type of an option in words.
        prefix: before each name.
    """
    lines: list[str] = []
    for action in _options(options):
        lines.append(f"--{prefix}{action.dest}  ({describe(action)}; default: {_default(action.default)})")
        lines += textwrap.wrap(_plain(action.help), _width() - 4, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def _options(actions: Iterable[argparse.Action]) -> Iterator[argparse.Action]:
    """Those that take a value, or print the configuration."""
    for action in actions:
        is_group = action.default == argparse.SUPPRESS and action.dest != "print_config"
        if action.option_strings and not is_group:
            yield action


def _lines(actions: Iterable[argparse.Action]) -> Iterator[str]:
    """One line for each: its name, what it is, and its default."""
    for action in actions:
        name = f"  --{action.dest:<36}"
        default = "" if action.default == argparse.SUPPRESS else f" [{_default(action.default)}]"
        text = LIGHTNINGS.get(action.dest) or re.split(r"[;:.] ", _plain(action.help), maxsplit=1)[0].rstrip(".")
        yield name + " " + textwrap.shorten(text, _width() - len(name) - len(default) - 1, placeholder="…") + default


def _plain(text: str | None) -> str:
    return " ".join((text or "").replace("``", "").split())


def _default(value: Any) -> str:
    """A default as YAML has it; of a class its name."""
    if value is None or value == argparse.SUPPRESS:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    path = value.get("class_path") if hasattr(value, "get") else None
    if path is not None:
        return path.rpartition(".")[2]
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return str(list(value) if isinstance(value, tuple) else value)
