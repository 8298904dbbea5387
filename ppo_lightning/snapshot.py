"""What an update changes, as it was before."""

import torch
from torch import Tensor


class Snapshot:
    """Copies of tensors, to go back to if what changes them does not end."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._slots: list[tuple[Tensor, str]] = []
        """Parameter and name of each tensor of the optimiser's state, whose copies are the last."""
        self._kept = False

    @torch.no_grad()
    def keep(self, tensors: list[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        """Copy tensors, and those of the optimiser's state."""
        self._slots = _slots(optimizer)
        found = [*tensors, *_at(optimizer, self._slots)]
        if [id(one) for one in found] != [id(one) for one in self._tensors]:
            self._copies = [torch.empty_like(one) for one in found]
        torch._foreach_copy_(self._copies, found)  # pyright: ignore[reportPrivateImportUsage]
        self._tensors, self._optimizer, self._kept = found, optimizer, True

    def forget(self) -> None:
        """All has gone well."""
        self._kept = False

    @torch.no_grad()
    def restore(self) -> None:
        """Put the tensors back, unless :meth:`forget` was called since."""
        if not self._kept:
            return
        if self._optimizer is not None:
            had_state = {parameter for parameter, _ in self._slots}
            for parameter in [one for one in self._optimizer.state if one not in had_state]:
                del self._optimizer.state[parameter]  # it had taken no step
        # The state's tensors may be others by now: a compiled update lays them out flat.
        own = len(self._tensors) - len(self._slots)
        tensors = [*self._tensors[:own], *_at(self._optimizer, self._slots)]
        torch._foreach_copy_(tensors, self._copies)  # pyright: ignore[reportPrivateImportUsage]
        self._kept = False


def _slots(optimizer: torch.optim.Optimizer | None) -> list[tuple[Tensor, str]]:
    states = [] if optimizer is None else optimizer.state.items()
    return [(parameter, name) for parameter, state in states for name, one in state.items() if isinstance(one, Tensor)]


def _at(optimizer: torch.optim.Optimizer | None, slots: list[tuple[Tensor, str]]) -> list[Tensor]:
    return [] if optimizer is None else [optimizer.state[parameter][name] for parameter, name in slots]
