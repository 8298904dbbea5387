"""What goes wrong at the border, in one sentence each: what, where, what to do."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException


class InputError(ValueError):
    """Something the user gave (a parameter, a space, a checkpoint) that cannot be used."""


class EnvironmentFault(RuntimeError):  # noqa: N818 - what it is, beside EnvironmentError, which Python has
    """An environment raised, hung, or returned something that is not an observation or a reward."""


class ProcessFault(RuntimeError):  # noqa: N818 - as above
    """A process of several died, hangs, or holds other parameters than the rest."""


@contextmanager
def said_in_one_sentence() -> Iterator[None]:
    """Let a command end with status 1 and one sentence, where the user can mend what is wrong."""
    try:
        yield
    except (InputError, EnvironmentFault, ProcessFault, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except MisconfigurationException as error:  # of Lightning, about the Trainer, in lines of its own
        sys.exit(f"error: {' '.join(str(error).split())}")
    except ValueError as error:  # jsonargparse wraps what a class said that a config names
        said = _cause(error)
        if said is None:
            raise
        sys.exit(f"error: {said}")


def _cause(error: BaseException) -> InputError | None:
    cause = error.__cause__ or error.__context__
    return cause if cause is None or isinstance(cause, InputError) else _cause(cause)
