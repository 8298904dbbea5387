"""Parsers whose errors are one sentence: which key or file is wrong, what it must be, and the nearest one that exists."""

import argparse
import collections.abc
import dataclasses
import difflib
import importlib
import inspect
import itertools
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ForwardRef, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse._actions import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from ppo_lightning.errors import InputError, UsageError
from ppo_lightning.help import PARTS, full_help, short_help
from ppo_lightning.shipped import located, near_name

NETWORK = "model.policy.init_args"
OTHER_NAMES = {
    "activation_fn": f"{NETWORK}.activation",
    "anneal_lr": "model.lr_scheduler",
    "batch_size": "model.num_minibatches",
    "ckpt": "checkpoint",
    "ckpt_path": "checkpoint",
    "clip_coef": "model.clip_range",
    "clip_vloss": "model.clip_range_vf",
    "discount": "model.gamma",
    "env_id": "model.env",
    "env_restarts": "model.max_env_restarts",
    "hidden_dims": f"{NETWORK}.hidden_sizes",
    "horizon": "model.num_steps",
    "init_noise_std": f"{NETWORK}.log_std_init",
    "lam": "model.gae_lambda",
    "learning_rate": "model.optimizer.lr",
    "log_info": "model.info_keys",
    "max_steps": "model.total_steps",
    "memory": f"{NETWORK}.rnn",
    "minibatch_chunks": "model.gradient_accumulation_steps",
    "n_envs": "model.num_envs",
    "n_epochs": "model.update_epochs",
    "net_arch": f"{NETWORK}.hidden_sizes",
    "norm_adv": "model.normalize_advantage",
    "num_learning_epochs": "model.update_epochs",
    "num_steps_per_env": "model.num_steps",
    "rnn_size": f"{NETWORK}.rnn_size",
    "total_timesteps": "model.total_steps",
    "use_sde": f"{NETWORK}.distribution",
}
"""Keys of other libraries, and earlier names of our own, whose nearest key here has a different spelling."""

OTHER_VALUES = {
    "CnnPolicy": "ActorCritic",
    "MlpPolicy": "ActorCritic",
    "MultiInputPolicy": "ActorCritic",
    "gaussian": "normal",
    "squashed": "tanh",
}
"""The same for values."""

PLACES = {list, tuple, set, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection}
UNIONS = (Union, types.UnionType)


def import_from_here() -> None:
    """Make modules in the working directory importable, as with ``python -m``: configs and checkpoints may name some."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())


class PlainParser(argparse.ArgumentParser):
    """A parser of a command without config files; options are not abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    @override
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse; an unknown option is reported before what is missing."""
        words = sys.argv[1:] if args is None else list(args)
        for word in itertools.takewhile(lambda word: word != "--", words):
            if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                self.error(f"unrecognized arguments: {word}")
        return super().parse_args(words, namespace)

    @override
    def error(self, message: str) -> NoReturn:
        """Raise the error as one sentence.

        Raises:
            UsageError: always.
        """
        raise UsageError(_sentence(message, _Line(self, self.prog.rpartition(" ")[2])))


class Parser(LightningArgumentParser):
    """LightningCLI's parser; keys are not abbreviated.

    Args:
        help_part: what of a command's help is printed, a key of :data:`ppo_lightning.help.PARTS`; None is one line for each
            option.
    """

    def __init__(self, *args: Any, help_part: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.help_part = help_part

    @override
    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The options of a command, shorter than jsonargparse has them; its own for anything else."""
        if not any(action.dest == "model.env" for action in self._actions):
            return super().format_help(*args, **kwargs)
        if self.help_part is None:
            return short_help(self, self.prog.rpartition(" ")[2])
        if self.help_part == "policy":
            options = _parser_of("ppo_lightning.ActorCritic")._actions
            seen = [action for action in options if action.dest not in ("observation_space", "action_space")]
            return full_help(seen, _kind_of, "model.policy.init_args.")
        return full_help((one for one in self._actions if one.dest.startswith(f"{self.help_part}.")), _kind_of)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error as one sentence; parsers within this one report theirs to jsonargparse.

        Raises:
            UsageError: always, but within another parser.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        parser, words = self, list(getattr(self, "args", None) or [])
        subparsers = getattr(self._subcommands_action, "choices", None) or {}
        command = next((word for word in words if word in subparsers), getattr(self, "subcommand", None))
        if command in subparsers:
            parser = subparsers[command]
            message = message.replace(f"{command}.", "") if "arguments are required" in message else message
        raise UsageError(_sentence(message, _Line(parser, command, words))) from ex


class ConfigFile(ActionConfigFile):
    """A config file, or the text of one, that is read before its keys are looked at."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Add the file's keys.

        Raises:
            InputError: it cannot be read, or holds something else than keys.
        """
        if not values:
            raise InputError("config is empty: give a YAML file, or a name of `ppo-lightning configs`")
        values = located(values)
        if "://" not in values:
            read_config(values)
        super().__call__(parser, cfg, values, option_string)


def part_of_help(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """What ``--help.PART`` among words asks for, and the words with ``--help`` in its place.

    Raises:
        UsageError: there is no such part.
    """
    found = next((word for word in words if word.startswith("--help.")), None)
    if found is None:
        return None, list(words)
    part = found.removeprefix("--help.")
    if part not in PARTS:
        near = difflib.get_close_matches(part, PARTS, 1)
        hint = f"did you mean --help.{near[0]}?" if near else f"there are {', '.join(f'--help.{one}' for one in PARTS)}"
        raise UsageError(f"there is no {found}: {hint}")
    return part, ["--help" if word == found else word for word in words]


def read_config(given: str) -> dict[str, Any]:
    """The mapping that a YAML file, a config that comes with the package, or a text in its place, holds.

    Raises:
        InputError: there is no such file, it cannot be read, or holds something else.
    """
    path, text = Path(located(given)), given
    given = _joined(given) if len(given) <= LONGEST else f"{_joined(given)[:LONGEST]}…"
    try:
        if path.is_dir():
            raise InputError(f"config {given} is a folder: give a YAML file")
        is_file = path.exists()
        if is_file:
            text = path.read_text(encoding="utf-8")
        read = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise InputError(f"config {given} is no text in UTF-8 (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"config {given} cannot be read ({error.strerror}): give a YAML file") from error
    except yaml.YAMLError as error:
        raise InputError(f"config {given} is no plain YAML ({_joined(str(error))}): correct it there") from error
    if isinstance(read, dict) and all(isinstance(key, str) for key in read):
        if text.strip() in (f"{key}:" for key in read):  # jsonargparse takes such a file for a text
            raise InputError(f"config {given} has no value for {next(iter(read))}: give one, or take the key out")
        return read
    if not is_file:
        there = (file.name for file in path.parent.iterdir()) if path.parent.is_dir() else ()
        near = difflib.get_close_matches(path.name, there, 1, cutoff=0.75)
        shipped = near_name(given)
        hint = f"did you mean {path.parent / near[0]}?" if near else f"did you mean {shipped}?" if shipped else ""
        hint = hint or "give the path of a YAML file, or a name of `ppo-lightning configs`"
        raise InputError(f"there is no config file {given}: {hint}")
    what = "nothing" if read is None else "other things" if isinstance(read, dict) else f"a {type(read).__name__}"
    raise InputError(f"config {given} holds {what} instead of keys and values, such as model: {{env: CartPole-v1}}")


@dataclasses.dataclass(frozen=True)
class _Line:
    """A command line that a parser has refused."""

    parser: argparse.ArgumentParser
    """Of the command."""
    command: str | None
    words: Sequence[str] = ()


def _sentence(message: str, line: _Line) -> str:
    """What a parser complains of, in one sentence.

    Args:
        message: of argparse or jsonargparse.
        line: that it refused.
    """
    for pattern, say in SENTENCES.items():
        found = re.match(pattern, message, re.DOTALL)
        if found:
            return say(found, line)
    return _joined(message)


def _unknown_words(found: re.Match[str], line: _Line) -> str:
    unknown = found[1].split()
    option = next((word for word in unknown if word.startswith("-")), None)
    if option is None:
        return f"{line.command} takes no word {unknown[0]!r}: options are written --key value"
    name = option.partition("=")[0]
    last = OTHER_NAMES.get(name.strip("-+"), name.strip("-+"))
    places = {one.dest: one.metavar for one in line.parser._actions if not one.option_strings and one.metavar}
    near = [dest for dest in places if dest.startswith(last)] or difflib.get_close_matches(last, places, 1, cutoff=0.7)
    if near:
        return f"{line.command} has no option {name}: write {places[near[0]]} without an option, as --help shows"
    return f"{line.command} has no option {name}{_did_you_mean(name.strip('-+'), line.parser, '--')}"


def _unknown_command(found: re.Match[str], line: _Line) -> str:
    first = next(iter(line.words), "")
    known = f"give one of {', '.join(COMMANDS)}, such as fit --config cartpole"
    if found.lastindex is None:
        return f"there is no command: {known}"
    if first.startswith("-"):
        return f"{first} stands before the command: write the command first, as in fit {first} …"
    near = difflib.get_close_matches(found[1], COMMANDS, 1)
    return f"there is no command {found[1]!r}: " + (f"did you mean {near[0]}?" if near else known)


def _key_before_command(found: re.Match[str], line: _Line) -> str:
    file = _origin(found[1], line.words)
    advice = "a file before the command holds keys below the command's name: write the command first, then --config"
    return file + advice if file else f"there is no key {found[1]}{_did_you_mean(found[1], line.parser)}"


def _unknown_key(found: re.Match[str], line: _Line) -> str:
    key = ".".join(part for part in found.groups() if part)
    return f"{_origin(key, line.words)}there is no key {key}{_did_you_mean(key, line.parser)}"


def _no_value(found: re.Match[str], line: _Line) -> str:
    return f"{found[1]} needs a value: {found[1]} VALUE"


def _missing(found: re.Match[str], line: _Line) -> str:
    hint = ": give --model.env CartPole-v1, or a file with --config" if "model.env" in found[1] else ""
    return f"{line.command} needs {found[1]}{hint}"


def _no_choice(found: re.Match[str], line: _Line) -> str:
    near = difflib.get_close_matches(found[2].strip("'"), re.findall(r"[\w.]+", found[3]), 1)
    hint = f": did you mean {near[0]}?" if near else ""
    return f"{found[1]} must be one of {found[3]}, got {found[2]}{hint}"


def _no_number(found: re.Match[str], line: _Line) -> str:
    return f"{found[1]} must be {KINDS.get(found[2], found[2])}, got {found[3]}"


def _no_part(found: re.Match[str], line: _Line) -> str:
    named = found[2].partition(" -> ")[0].strip("'")
    return f"{found[1]} takes keys of its own (--{found[1]}.KEY VALUE) or a YAML file of them, got {named!r}"


def _wrong_value(found: re.Match[str], line: _Line) -> str:
    """What is wrong with a key's value: from jsonargparse's nested complaint, which names keys, classes and the value."""
    message = found[0]
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    classes = re.findall(r"class_path='([\w.]+)'|given class_path '([\w.]+)'", message)
    owner = next((one or other for one, other in classes), None)
    key, where = ".".join(keys), _origin(keys[0], line.words)
    unknown = re.search(r"Option '([^']+)' is not accepted", message)
    if unknown:
        known = [] if owner is None else _parameters_of(owner)
        other = OTHER_NAMES.get(unknown[1], "").rpartition(".")[2]
        near = [other] if other in known else difflib.get_close_matches(unknown[1], known, 1)
        hint = (
            f"did you mean {key}.{near[0]}?" if near else f"there are {', '.join(known)}" if known else "leave it out"
        )
        return f"{where}{key} has no key {unknown[1]} ({owner}): {hint}"
    missing = re.search(r"the following arguments are required: (\w+)((?:, \w+)*)", message)
    if missing:
        return f"{where}{key} {owner or ''} needs {missing[1]}{missing[2]}: give --{key}.{missing[1]}"
    failed = re.search(IMPORT_FAILED, message)
    if failed:
        named = _got(message) if failed[2] is None else f"{failed[2]}.{failed[3]}"
        inner = re.search(rf"(\w+)='{re.escape(named)}'", message)
        key = f"{key}.{inner[1]}" if inner and inner[1] != "class_path" else key
        there = {} if failed[2] is None else {name.lower(): name for name in dir(importlib.import_module(failed[2]))}
        near = difflib.get_close_matches((failed[3] or "").lower(), there, 1)
        hint = f"did you mean {failed[2]}.{there[near[0]]}?" if near else "correct the path, or install its package"
        return f"{where}{key}: cannot import {named} ({failed[1]}): {hint}"
    kind, got = _type_of(keys, owner, line.parser), _got(message)
    if kind is None:
        return f"{where}{_joined(message.partition(':')[2])}"
    names = {name.rpartition(".")[2].lower(): name for name in _names(kind)}
    names |= {other.lower(): names[name.lower()] for other, name in OTHER_VALUES.items() if name.lower() in names}
    last = got.rpartition(".")[2].lower()
    near = [names[name] for name in difflib.get_close_matches(last, names, 1) if names[name] != got]
    hint = f": did you mean {near[0]}?" if near else ""
    return f"{where}{key} must be {describe(kind)}, got {got!r}{hint}"


IMPORT_FAILED = (
    r"(No module named '[^']+'|module '([\w.]+)' has no attribute '(\w+)'|cannot import name[^\n]*?)(?:\. Got|\n|$)"
)
SENTENCES: dict[str, Callable[[re.Match[str], _Line], str]] = {
    r"unrecognized arguments: (.*)": _unknown_words,
    r"argument subcommand: invalid choice: '([^']*)'": _unknown_command,
    r'expected "subcommand" to be one of': _unknown_command,
    r"Option '([^']+)' is not accepted before subcommand": _key_before_command,
    r"Subcommand '[\w.]+' does not accept option '([^']+)'": _unknown_key,
    r"Group '([\w.]+)' does not accept option '([^']+)'": _unknown_key,
    r"Option '([^']+)' is not accepted": _unknown_key,
    r"argument (?:\S*/)?(\S+): expected (?:at least )?one argument": _no_value,
    r"the following arguments are required: (.*)": _missing,
    r"argument (?:\S*/)?(\S+): invalid choice: (\S+) \(choose from (.*)\)": _no_choice,
    r"argument (?:\S*/)?(\S+): invalid (\w+) value: (.*)": _no_number,
    r'Parser key "([^"]+)":\s*(?:Unable to load config|Config file loop detected:) ([^\n]*)': _no_part,
    r'Parser key ".*': _wrong_value,
}
"""How messages of argparse and jsonargparse begin, and what makes a sentence of them; the first that fits."""

KINDS = {"int": "a whole number", "float": "a number"}
COMMANDS = ("fit", "validate", "test", "enjoy", "export", "push", "report", "sweep", "configs")
"""Of ``python -m ppo_lightning``."""


def _got(message: str) -> str:
    """The value that jsonargparse quotes."""
    found = re.search(r"NestedArg\(key='[^']*', val=(.*?)\)", message)
    found = found or re.search(r"(?:Got value|Given value): Namespace\(class_path='([^']*)'\)", message)
    found = found or re.search(r"(?:Got value|Given value|Expected a dot import path string): (.*)", message)
    text = re.sub(r"\. Got value: Namespace\(.*", "", found[1] if found else "").strip("'")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


LONGEST = 100
"""Characters of a value or of a text of YAML that a message quotes."""


def _type_of(keys: list[str], owner: str | None, parser: argparse.ArgumentParser) -> Any:
    """Type of a key, of the parser's own or of a class that a key names; None where it is not known."""
    action = next((action for action in parser._actions if action.dest == keys[0]), None)
    if len(keys) > 1 and owner is not None:
        action = next((action for action in _parser_of(owner)._actions if action.dest == keys[-1]), None)
    return getattr(action, "_typehint", None)


def _parser_of(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    parser, made = Parser(exit_on_error=False), getattr(importlib.import_module(module), name)
    add = parser.add_class_arguments if inspect.isclass(made) else parser.add_function_arguments
    add(made, fail_untyped=False)  # pyright: ignore[reportArgumentType]
    return parser


def _parameters_of(class_path: str) -> list[str]:
    """That may be given: neither help nor what the caller gives."""
    given = ("help", "params", "optimizer", "observation_space", "action_space")
    options = (action.dest for action in _parser_of(class_path)._actions)
    return [name for name in options if name not in given and not name.endswith(".help")]


def _kind_of(action: argparse.Action) -> str:
    """The type of an option in words."""
    return describe(getattr(action, "_typehint", None) or action.type or str)


def describe(kind: Any) -> str:
    """A type in words."""
    return " or ".join(dict.fromkeys(_described(kind)))


def _described(kind: Any) -> Iterator[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in UNIONS:
        choices = [choice for one in inner if get_origin(one) is Literal for choice in get_args(one)]
        if choices:
            yield _one_of(choices)
        for one in sorted(inner, key=lambda one: one is type(None)):
            if get_origin(one) is not Literal and not (one is int and (choices or float in inner)):
                yield from _described(one)
    elif origin is Literal:
        yield _one_of(inner)
    elif origin in PLACES or kind in PLACES:
        elements = "" if not inner else describe(inner[0])
        kinds = [plural for one, plural in PLURALS.items() if elements.startswith(one)]
        yield f"a list of {kinds[0]}" if kinds else "a list"
    elif origin is type:
        yield f"the import path of {_a(inner[0].__name__)}"
    elif (origin or kind) in (dict, collections.abc.Mapping):
        yield "a mapping of keys to values"
    elif origin is collections.abc.Callable or kind is Callable:
        made = inner[-1] if inner else None
        yield f"the import path of {_a(made.__name__)}" if inspect.isclass(made) else "the import path of a function"
    elif kind in WORDS:
        yield WORDS[kind]
    elif dataclasses.is_dataclass(kind):
        yield f"a mapping of {', '.join(field.name for field in dataclasses.fields(kind))}"
    elif isinstance(kind, ForwardRef):
        yield _a(kind.__forward_arg__)
    else:
        yield f"the import path of {_a(getattr(kind, '__name__', str(kind)))}"


def _one_of(choices: Sequence[Any]) -> str:
    return f"one of {', '.join(dict.fromkeys(map(str, choices)))}" if len(choices) > 1 else str(choices[0])


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


PLURALS = {"the import path": "import paths", "text": "texts", "a whole number": "whole numbers", "a number": "numbers"}
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    timedelta: "a time such as 00:12:00:00",
    Any: "anything",
}


def _names(kind: Any) -> list[str]:
    """Values that a type is known to take: choices, and classes by their short names."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return list(map(str, inner))
    if origin is collections.abc.Callable:
        return _names(inner[-1])
    if origin in UNIONS or origin in PLACES:
        return [name for one in inner for name in _names(one)]
    if inspect.isclass(kind) and kind not in WORDS and kind.__module__ != "builtins":
        return [sub.__name__ for sub in _subclasses(kind)]
    if origin is type:
        return [_import_path(sub) for sub in _subclasses(inner[0])]
    return []


def _import_path(kind: type) -> str:
    """The shortest path that a class can be imported by, such as torch.nn.ReLU."""
    parts = kind.__module__.split(".")
    packages = (".".join(parts[: end + 1]) for end in range(len(parts)))
    exporting = (one for one in packages if getattr(sys.modules.get(one), kind.__name__, None) is kind)
    return f"{next(exporting, kind.__module__)}.{kind.__name__}"


def _subclasses(kind: type) -> Iterator[type]:
    yield kind
    for sub in type.__subclasses__(kind):
        if not sub.__name__.startswith("_"):
            yield from _subclasses(sub)


def _did_you_mean(key: str, parser: argparse.ArgumentParser, dashes: str = "") -> str:
    """The nearest key of a parser, with what is written before it; a way to see all where none is near."""
    options = [action for action in parser._actions if action.option_strings and not action.dest.endswith(".help")]
    known = [next((word for word in one.option_strings if len(word) > 2), one.dest).lstrip("-") for one in options]
    for action in parser._actions:
        class_path = action.default.get("class_path") if isinstance(action.default, dict) else None
        if class_path is not None and isinstance(parser, Parser):
            known += [f"{action.dest}.{name}" for name in _parameters_of(class_path)]
    last = key.rpartition(".")[2]
    near = [one for one in known if one.rpartition(".")[2] == last]
    other = OTHER_NAMES.get(last, "")
    if other in known or (other.startswith(NETWORK) and "model.policy" in known):
        near = near or [other]
    near = near or difflib.get_close_matches(key, known, 1, cutoff=0.8)
    if not near:
        ends = {one.rpartition(".")[2]: one for one in reversed(known)}
        begun = [one for end, one in ends.items() if len(last) > 2 and end.startswith(last)]
        near = [ends[end] for end in difflib.get_close_matches(last, ends, 1, cutoff=0.7)] or begun
    near = near or difflib.get_close_matches(key, known, 1)
    return f": did you mean {dashes}{near[0]}?" if near else ": --help lists what there is"


def _origin(key: str, words: Iterable[str]) -> str:
    """The last config file of the command line that has the key, where no flag gives it or a part of it; else nothing."""
    words = list(words)
    flags = [word.partition("=")[0].removesuffix("+").removeprefix("--") for word in words if word.startswith("--")]
    if any(flag == key or flag.startswith(f"{key}.") for flag in flags):
        return ""
    given = [words[place + 1] for place, word in enumerate(words[:-1]) if word in ("--config", "-c")]
    given += [word.partition("=")[2] for word in words if word.startswith(("--config=", "-c="))]
    for file in reversed(given):
        node: Any = read_config(file) if "://" not in file else None
        if isinstance(node, dict) and key.partition(".")[0] not in node:
            node = next((node[command] for command in COMMANDS if isinstance(node.get(command), dict)), None)
        for name in key.split("."):
            node = node.get(name, _NOTHING) if isinstance(node, dict) else _NOTHING
        if node is not _NOTHING:
            return f"{file}: " if Path(file).exists() else "--config: "
    return ""


_NOTHING = object()


def _joined(text: str) -> str:
    return " ".join(text.split())
