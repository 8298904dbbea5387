"""The state before an update, to roll back to."""

import torch
from torch import Tensor


class Rollback:
    """Copies of tensors, restored where an update does not finish."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._slots: list[tuple[Tensor, str]] = []
        """Parameter and name of each tensor of the optimiser's state, whose copies are the last."""
        self._saved = False

    @torch.no_grad()
    def save(self, tensors: list[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        """Copy tensors, and those of the optimiser's state."""
        self._slots = _slots(optimizer)
        found = [*tensors, *_at(optimizer, self._slots)]
        if [id(one) for one in found] != [id(one) for one in self._tensors]:
            self._copies = [torch.empty_like(one) for one in found]
        torch._foreach_copy_(self._copies, found)  # pyright: ignore[reportPrivateImportUsage]
        self._tensors, self._optimizer, self._saved = found, optimizer, True

    def discard(self) -> None:
        """Drop the copies: the update has ended."""
        self._saved = False

    @torch.no_grad()
    def rollback(self) -> None:
        """Restore the tensors, unless :meth:`discard` was called since."""
        if not self._saved:
            return
        if self._optimizer is not None:
            had_state = {parameter for parameter, _ in self._slots}
            for parameter in [one for one in self._optimizer.state if one not in had_state]:
                del self._optimizer.state[parameter]  # it had taken no step
        # The state's tensors may have been replaced: a compiled update lays them out flat.
        own = len(self._tensors) - len(self._slots)
        tensors = [*self._tensors[:own], *_at(self._optimizer, self._slots)]
        torch._foreach_copy_(tensors, self._copies)  # pyright: ignore[reportPrivateImportUsage]
        self._saved = False


def _slots(optimizer: torch.optim.Optimizer | None) -> list[tuple[Tensor, str]]:
    states = [] if optimizer is None else optimizer.state.items()
    return [(parameter, name) for parameter, state in states for name, one in state.items() if isinstance(one, Tensor)]


def _at(optimizer: torch.optim.Optimizer | None, slots: list[tuple[Tensor, str]]) -> list[Tensor]:
    return [] if optimizer is None else [optimizer.state[parameter][name] for parameter, name in slots]
