"""What goes wrong at the border, in one sentence each: what, where, what to do."""


class InputError(ValueError):
    """Something the user gave (a parameter, a space, a checkpoint) that cannot be used."""


class EnvironmentFault(RuntimeError):  # noqa: N818 - what it is, beside EnvironmentError, which Python has
    """An environment raised, hung, or returned something that is not an observation or a reward."""


class ProcessFault(RuntimeError):  # noqa: N818 - as above
    """A process of several died, hangs, or holds other parameters than the rest."""
