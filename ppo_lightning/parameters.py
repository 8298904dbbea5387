"""Parameters that the user gives: their types and limits, and coefficients that change over a run."""

import difflib
import inspect
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, partial, wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from ppo_lightning.errors import InputError

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])

# --- types and limits --------------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """Which values of a parameter are allowed beyond its type; of a list, which elements."""

    rule: str
    """The rest of the sentence "<name> must …"."""
    accepts: Callable[[Any], bool]


COUNT = Limit("be a whole number of 1 or more", lambda value: value >= 1)
INDEX = Limit("be a whole number of 0 or more", lambda value: value >= 0)
ONE_OR_MORE = Limit("be 1 or more", lambda value: value >= 1)
SHARE = Limit("lie between 0 and 1", lambda value: 0 <= value <= 1)
POSITIVE_OR_OFF = Limit("be more than 0 (or null to turn it off)", lambda value: value > 0)
FINITE = Limit("be finite", math.isfinite)
FINITE_NOT_NEGATIVE = Limit("be zero or more and finite", lambda value: 0 <= value < math.inf)
SECONDS = Limit("be more than 0 and at most 1,000,000 (seconds)", lambda value: 0 < value <= 1e6)


def checked(label: str = "{}", /, *, skip: Collection[str] = (), **limits: Limit) -> Callable[[Function], Function]:
    """Decorator for what users call: arguments have the types that the signature states, or an InputError names the first.

    NumPy and torch scalars become plain Python values, which checkpoints can hold, also within lists and dictionaries. A
    float that is a whole number becomes an int where an int is due (``total_steps=1e6``). A bool is no number, a number no
    bool, and a string neither.

    Args:
        label: how messages name a parameter; ``{}`` stands for its own name.
        skip: parameters that the function checks itself.
        limits: by parameter.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @wraps(function)
        def checking(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise InputError(_unbound(function, signature, kwargs, error)) from error
            given = {name: value for name, value in bound.arguments.items() if name not in skip}
            bound.arguments.update(converted(function, given, label, limits))
            return function(*bound.args, **bound.kwargs)

        checking.__dict__["__signature__"] = signature  # inspect.getfullargspec, which Lightning uses, needs it
        return cast(Function, checking)

    return decorate


def _unbound(function: Any, signature: inspect.Signature, kwargs: Mapping[str, Any], error: TypeError) -> str:
    owner, known = function.__qualname__.removesuffix(".__init__"), list(signature.parameters)
    unknown = next((name for name in kwargs if name not in known), None)
    if unknown is None:
        return f"{owner}: {error}"
    if RENAMED.get(unknown) in known:
        return f"{owner} has no parameter {unknown}: it is called {RENAMED[unknown]}"
    near = difflib.get_close_matches(unknown, known, 1)
    return f"{owner} has no parameter {unknown}" + (f": did you mean {near[0]}?" if near else "")


RENAMED = {
    "minibatch_chunks": "gradient_accumulation_steps",
    "log_info": "info_keys",
    "env_restarts": "max_env_restarts",
    "memory": "rnn",
    "memory_size": "rnn_size",
}
"""Parameters by the names that they had before."""


def converted(
    owner: Any, given: Mapping[str, Any], label: str = "{}", limits: Mapping[str, Limit] | None = None
) -> dict[str, Any]:
    """Values as the annotations of a function or class state them.

    Args:
        owner: has the annotations; what has none passes as it is.
        given: values by name.
        label: how messages name one, as of :func:`checked`.
        limits: by name.

    Raises:
        InputError: a value has another type, or is outside its limit.
    """
    hints, limits = _hints(owner), limits or {}
    return {
        name: _checked(label.format(name), value, hints[name], limits.get(name)) if name in hints else value
        for name, value in given.items()
    }


def check_fields(instance: Any, label: str = "{}", **limits: Limit) -> None:
    """The same for the fields of a dataclass, in its ``__post_init__``.

    Raises:
        InputError: a field has another type, or is outside its limit.
    """
    kind = type(instance)
    for name, value in converted(
        kind, {one.name: getattr(instance, one.name) for one in fields(kind)}, label, limits
    ).items():
        object.__setattr__(instance, name, value)


_hints = cache(get_type_hints)

_MISMATCH: Any = object()


def _checked(name: str, value: Any, hint: Any, limit: Limit | None) -> Any:
    found = _converted(name, value, hint)
    if found is _MISMATCH:
        is_built = any(member in BUILT for member in _members(hint))
        is_mapping = any(get_origin(member) in (dict, Mapping) for member in _members(hint))
        says = (
            f"must {limit.rule}"
            if limit and not is_built and not is_mapping
            else f"{'takes' if is_built else 'must be'} {_described(hint)}"
        )
        kind = "" if value is None or is_number(value) else f" ({type(value).__name__})"
        raise InputError(f"{name} {says}, got {shown(value)}{kind}")
    several = list(found.values()) if isinstance(found, dict) else found
    numbers = several if isinstance(several, list | tuple) else [found]
    if limit is not None and not all(limit.accepts(number) for number in numbers if is_number(number)):
        raise InputError(f"{name} must {limit.rule}, got {shown(value)}")
    if type(found) is int and abs(found) >= 2**63:  # counters are int64
        raise InputError(f"{name} must be less than 2⁶³, got {shown(value)}")
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    """Of a union its alternatives; of another annotation itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _converted(name: str, value: Any, hint: Any) -> Any:
    """A value as its annotation states, plain where it can be; _MISMATCH where it has another type."""
    members = _members(hint)
    if len(members) > 1:
        found = (_converted(name, value, member) for member in members)
        return next((one for one in found if one is not _MISMATCH), _MISMATCH)
    value, origin, inner = _scalar(value), get_origin(hint) or hint, get_args(hint)
    if origin in _PLAIN:
        return _PLAIN[origin](value)
    if origin is Literal:
        return str.__str__(value) if isinstance(value, str) and value in inner else _MISMATCH
    if origin in (Sequence, list, tuple):
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            return _MISMATCH
        if origin is tuple and len(value) != len(inner):
            return _MISMATCH
        each = inner if origin is tuple else inner * len(value)
        items = [_converted(name, item, kind) for item, kind in zip(value, each, strict=True)]
        if any(item is _MISMATCH for item in items):
            return _MISMATCH
        return items if isinstance(value, list) and origin is not tuple else tuple(items)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return _MISMATCH
        items = {str.__str__(key): _converted(name, item, inner[1]) for key, item in value.items()}
        return _MISMATCH if any(item is _MISMATCH for item in items.values()) else items
    if origin is Callable:
        return value if callable(value) else _MISMATCH
    if origin is type:
        return value if isinstance(value, type) and issubclass(value, inner[0]) else _MISMATCH
    if origin in BUILT and isinstance(value, Mapping):  # as a checkpoint holds it
        if not _required(origin) <= value.keys() <= _hints(origin).keys():
            return _MISMATCH
        try:
            return origin(**value)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return value if isinstance(value, origin) else _MISMATCH


def _required(kind: type) -> set[str]:
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is parameter.empty}


def _scalar(value: Any) -> Any:
    """A NumPy or torch scalar, or array without dimensions, as a plain Python value; anything else as it is."""
    return value.item() if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0 else value


def _whole(value: Any) -> Any:
    is_whole = is_number(value) and (isinstance(value, Integral) or (math.isfinite(value) and value == int(value)))
    return int(value) if is_whole else _MISMATCH


def _real(value: Any) -> Any:
    if not is_number(value):
        return _MISMATCH
    if type(value) is int and abs(value) < 2**63:
        return value
    try:
        return float(value)
    except OverflowError:
        return _MISMATCH


def plain_values(value: Any) -> Any:
    """Any value, with plain Python values instead of scalars, within dictionaries, lists and tuples too."""
    if type(value) is dict:
        return {plain_values(key): plain_values(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain_values, value))
    return _scalar(value)


_PLAIN: dict[Any, Callable[[Any], Any]] = {
    Any: plain_values,
    NoneType: lambda value: None if value is None else _MISMATCH,
    bool: lambda value: value if isinstance(value, bool) else _MISMATCH,
    int: _whole,
    float: _real,
    str: lambda value: str.__str__(value) if isinstance(value, str) else _MISMATCH,
}

_NAMES = {NoneType: "null", int: "a whole number", float: "a number", str: "a string"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "strings"}


def _described(hint: Any) -> str:
    """What an annotation allows, in words."""
    words = [word for member in _members(hint) for word in _words(member)]
    listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    chooses = bool not in _members(hint) and any(get_origin(member) is Literal for member in _members(hint))
    return f"one of {listed}" if chooses and len(words) > 2 else listed


def _words(hint: Any) -> list[str]:
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        return list(map(str, inner))
    if origin is bool:
        return ["true", "false"]
    if origin is Callable:
        return ["a callable"]
    if origin is type:
        return [f"a subclass of {inner[0].__name__}"]
    if origin is tuple:
        return [f"{len(inner)} {_plural(inner[0])}"]
    if origin in (Sequence, list):
        return [f"a list of {_plural(inner[0])}"]
    if origin in (dict, Mapping):
        values = "" if inner[1] is Any else f" and {_plural(inner[1])} as values"
        return [f"a dictionary with strings as keys{values}"]
    return [BUILT.get(origin) or _NAMES.get(origin) or f"a {origin.__name__}"]


def _plural(hint: Any) -> str:
    if get_origin(hint) is Callable:
        return "callables"
    return _PLURALS.get(hint) or f"{hint.__name__} objects"


def shown(value: Any) -> str:
    """A value for a message: on one line, and not longer than one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}…"


def is_number(value: object) -> bool:
    """Whether a value is a real number; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


LIMITS = {
    **dict.fromkeys(
        (
            "num_envs",
            "num_workers",
            "num_steps",
            "total_steps",
            "update_epochs",
            "num_minibatches",
            "gradient_accumulation_steps",
            "sequence_length",
            "eval_interval",
            "num_eval_episodes",
        ),
        COUNT,
    ),
    **dict.fromkeys(("gamma", "gae_lambda"), SHARE),
    **dict.fromkeys(("clip_range_vf", "max_grad_norm", "target_kl"), POSITIVE_OR_OFF),
    **dict.fromkeys(("clip_range", "ent_coef", "vf_coef"), FINITE_NOT_NEGATIVE),
    "max_env_restarts": INDEX,
    "env_timeout_s": SECONDS,
}
"""Of the hyperparameters of PPO."""


# --- coefficients ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """A linear schedule over the run: ``start`` at its first environment step, ``end`` at ``total_steps``."""

    start: float
    """Value of the first iteration, in the coefficient's own unit."""
    end: float = 0.0
    """Value after the last iteration."""

    def __post_init__(self) -> None:
        """Refuse what is no finite number."""
        check_fields(self, "{} of Linear", start=FINITE, end=FINITE)

    def at(self, progress: float) -> float:
        """Value after the share ``progress`` (0 to 1) of the environment steps."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class PopArt:
    """Normalise value targets while preserving the critic's output (van Hasselt et al. 2016)."""

    beta: float = 1e-4
    """Weight of one environment step in the running moments of value targets, 0 to 1 (dimensionless)."""

    def __post_init__(self) -> None:
        """Refuse a weight that is none."""
        check_fields(self, "popart.{}", beta=Limit("lie between 0 and 1", lambda value: 0 < value <= 1))


BUILT: dict[Any, str] = {Linear: "start and end", PopArt: "PopArt(beta=…), {beta: …}"}
"""Dataclasses that a dictionary of their fields can stand for, and how messages describe them."""


def schedule(name: str, value: float | Linear) -> Linear:
    """A coefficient as a schedule: a number is constant.

    Raises:
        InputError: a value on the way would be negative.
    """
    line = value if isinstance(value, Linear) else Linear(value, value)
    if not (line.start >= 0 and line.end >= 0):
        raise InputError(f"{name} must be zero or more, got {value}")
    return line


def check_samples(num_steps: int, num_envs: int, num_minibatches: int) -> None:
    """Refuse rollouts that have fewer samples than minibatches.

    Raises:
        InputError: they do.
    """
    samples = num_steps * num_envs
    if num_minibatches > samples:
        raise InputError(
            f"num_steps · num_envs = {num_steps} · {num_envs} = {samples} samples cannot be cut into num_minibatches = "
            f"{num_minibatches}: lower num_minibatches or raise num_steps"
        )


ADDRESSABLE = 2**47
"""Bytes of memory that a process can have at most."""


def check_memory(needs: Mapping[str, int], available: int = ADDRESSABLE) -> None:
    """Refuse parameters that need more memory than there is.

    Args:
        needs: bytes, by the parameter that they come from.
        available: bytes.

    Raises:
        InputError: one needs more.
    """
    for name, size in needs.items():
        if size > available:
            raise InputError(
                f"{name} needs {size / 1e9:,.0f} GB of memory, which is more than {available / 1e9:,.0f} GB: lower it"
            )


def usable_cores() -> int:
    """Cores that this process may use (count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_memory() -> int:
    """Bytes of this machine's memory, where the system reports them."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return ADDRESSABLE
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_recompute(recompute_advantages: bool, *, is_recurrent: bool) -> None:
    """Refuse to recompute the advantages of a recurrent policy, whose values depend on a whole episode."""
    if recompute_advantages and is_recurrent:
        raise InputError("recompute_advantages needs a network that is not recurrent: turn it off, or leave out rnn")


def check_sequences(
    given: int | None, num_steps: int, num_envs: int, num_minibatches: int, *, is_recurrent: bool
) -> int | None:
    """Steps of a sequence; None for a policy that is not recurrent.

    Args:
        given: ``sequence_length``; None is whole rollouts.
        num_steps: steps of each environment per rollout.
        num_envs: environments of this process.
        num_minibatches: that the sequences are split into.
        is_recurrent: the policy is.

    Raises:
        InputError: they do not cut the rollout, or into too few.
    """
    if not is_recurrent:
        if given is not None:
            raise InputError(
                f"sequence_length={given} splits rollouts for recurrent policies, and this one is not: leave it out, or give "
                "the policy a recurrent layer (ActorCritic: rnn: lstm)"
            )
        return None
    length = num_steps if given is None else given
    if num_steps % length:
        raise InputError(
            f"sequence_length = {length} does not cut num_steps = {num_steps} into whole sequences: take a divisor"
        )
    sequences = num_steps // length * num_envs
    if sequences < num_minibatches:
        raise InputError(
            f"num_envs · num_steps / sequence_length = {num_envs} · {num_steps} / {length} = {sequences} sequences cannot "
            f"be cut into num_minibatches = {num_minibatches}: lower sequence_length or num_minibatches"
        )
    return length


def plain_factory(factory: T) -> T:
    """A callable that worker processes can be sent: the class and arguments inside those that a ``class_path`` makes.

    jsonargparse gives a partial of its own machinery, which holds generators and cannot be pickled.
    """
    if isinstance(factory, partial) and str(getattr(factory.func, "__module__", "")).startswith("jsonargparse"):
        own = [argument for argument in factory.args if not type(argument).__module__.startswith("jsonargparse")]
        return cast(T, partial(*own, **factory.keywords))
    return factory


# --- what factories return ---------------------------------------------------------------------------------------------


def make_optimizer(factory: Callable[..., Any], parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``factory`` makes for the parameters.

    Raises:
        InputError: it raises, or returns what cannot train them.
    """
    with calling("optimizer", "(parameters)"):
        made = factory(iter(parameters))
    if not isinstance(made, torch.optim.Optimizer):
        raise InputError(f"optimizer returned {shown(made)}: it must return a torch.optim.Optimizer")
    kind, own = type(made).__name__, {id(one) for one in parameters}
    closure = inspect.signature(made.step).parameters.get("closure")
    if isinstance(made, torch.optim.SparseAdam) or (closure is not None and closure.default is closure.empty):
        raise InputError(
            f"optimizer {kind} needs sparse gradients or several losses per step: use another, such as Adam"
        )
    if any(id(one) not in own for group in made.param_groups for one in group["params"]):
        raise InputError(
            f"optimizer returned {kind} over parameters that are not the model's: use the ones it is given"
        )
    _check_rates(f"optimizer {kind} has", made)
    return made


def make_scheduler(
    factory: Callable[..., Any] | None, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The scheduler that ``factory`` makes for the optimizer; None without a factory.

    Raises:
        InputError: it raises, or returns what does not schedule this optimizer by iterations.
    """
    if factory is None:
        return None
    with calling("lr_scheduler", "(optimizer)"):
        made = factory(optimizer)
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise InputError(
            "lr_scheduler ReduceLROnPlateau waits for a metric, schedules here run on iterations: take another"
        )
    if not isinstance(made, torch.optim.lr_scheduler.LRScheduler):
        raise InputError(f"lr_scheduler returned {shown(made)}: it must return a torch.optim.lr_scheduler.LRScheduler")
    if getattr(made, "optimizer", optimizer) is not optimizer:
        raise InputError("lr_scheduler returned a scheduler of another optimizer: use the one it is given")
    return made


def try_schedule(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler | None) -> None:
    """Take the first step of a schedule, of which many say only there that their numbers make no sense.

    Raises:
        InputError: it raises, or gives no learning rate.
    """
    if scheduler is None:
        return
    with calling("lr_scheduler", "(optimizer)"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no gradient step came before
        scheduler.step()
    _check_rates(f"lr_scheduler {type(scheduler).__name__} gives", optimizer)


def _check_rates(source: str, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        rate = _scalar(group.get("lr"))
        if not (is_number(rate) and 0 <= rate < math.inf):
            raise InputError(f"{source} the learning rate {shown(rate)}: it must be zero or more and finite")


def check_length(scheduler: torch.optim.lr_scheduler.LRScheduler, iterations: int) -> None:
    """Refuse a scheduler that raises when it is stepped beyond its own number of steps, before the run's last iteration.

    Raises:
        InputError: it has fewer steps than the run has iterations.
    """
    if isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR) and scheduler.total_steps < iterations:
        raise InputError(
            f"lr_scheduler OneCycleLR ends after {scheduler.total_steps} steps, and the run has {iterations} iterations: give "
            f"it total_steps={iterations}"
        )


def check_callable(name: str, function: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse a function or module that cannot be called with these arguments.

    Args:
        name: of the parameter that it was given as.
        function: that will be called.
        args: names of positional arguments.
        kwargs: by keyword.

    Raises:
        InputError: its signature does not take them.
    """
    called = function.forward if isinstance(function, nn.Module) else function
    if isinstance(function, type) and issubclass(function, nn.Module):
        raise InputError(f"{name} is the class {function.__name__}: give an object, {function.__name__}()")
    try:
        signature = inspect.signature(called)
    except ValueError:  # of a builtin, which has none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        arguments = ", ".join([*args, *(["*", *kwargs] if kwargs else [])])
        raise InputError(
            f"{name} is called with ({arguments}), and {shown(function)} takes {signature}: {error}"
        ) from error


@contextmanager
def calling(name: str, signature: str) -> Iterator[None]:
    """Name a factory of the user, and what it is called with, in what it raises."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of the user's own function
        text = " ".join(str(error).split())
        raise InputError(f"{name}{signature} raised {type(error).__name__}: {text}") from error
