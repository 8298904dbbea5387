"""What goes wrong at the border, in one sentence each: what, where, what to do."""

import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

PACKAGE = Path(__file__).parent


class InputError(ValueError):
    """Something the user gave (a parameter, a space, a checkpoint) that cannot be used; its message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # spaces and arrays are shown on several lines


class UsageError(InputError):
    """Words of a command line, or keys of a config file, that a command does not take."""


class EnvironmentFault(RuntimeError):  # noqa: N818 - what it is, beside EnvironmentError, which Python has
    """An environment raised, hung, or returned something that is not an observation or a reward."""


class ProcessFault(RuntimeError):  # noqa: N818 - as above
    """A process of several died, hangs, or holds other parameters than the rest."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Let a command end with one sentence, where the user can mend what is wrong: status 2 for its words, else 1."""
    try:
        yield
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (InputError, EnvironmentFault, ProcessFault, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except MisconfigurationException as error:  # of Lightning, about the Trainer, in lines of its own
        sys.exit(f"error: {' '.join(str(error).split())}")
    except OSError as error:  # of a file that cannot be read or written
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {(error.strerror or str(error)).lower()}")
    except ValueError as error:  # jsonargparse wraps what a class said that a config names
        said = _cause(error)
        if said is None:
            raise
        sys.exit(f"error: {said}")


@contextmanager
def refused_settings() -> Iterator[None]:
    """Make an :class:`InputError` of what a library raises about its arguments.

    An error that this package raises, or that passes through code of the user, keeps its traceback.
    """
    try:
        yield
    except (InputError, EnvironmentFault, ProcessFault):
        raise
    except (ValueError, TypeError, RuntimeError, ImportError, OSError, MisconfigurationException) as error:
        chain: list[BaseException] = [error]
        while (inner := chain[-1].__cause__) is not None:  # jsonargparse wraps what a class raises
            chain.append(inner)
        files = [Path(frame.filename) for each in chain for frame in traceback.extract_tb(each.__traceback__)]
        libraries = [Path(place) for name, place in sysconfig.get_paths().items() if name.endswith(("lib", "stdlib"))]
        ours = any(isinstance(each, InputError) for each in chain) or files[-1].is_relative_to(PACKAGE)
        absolute = [file for file in files if file.is_absolute()]
        if ours or not all(any(file.is_relative_to(place) for place in [PACKAGE, *libraries]) for file in absolute):
            raise
        raise InputError(" ".join(str(chain[-1]).split()) or type(chain[-1]).__name__) from error


def _cause(error: BaseException) -> InputError | None:
    seen: set[int] = set()  # an error that is raised twice can be its own context
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
        if isinstance(cause, InputError):
            return cause
    return None
