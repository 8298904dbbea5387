"""What an update changes, as it was before."""

import torch
from torch import Tensor


class Snapshot:
    """Copies of tensors, to go back to if what changes them does not end."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._kept = False

    @torch.no_grad()
    def keep(self, tensors: list[Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        """Copy tensors, and those of the optimiser's state."""
        found = [*tensors, *_tensors(optimizer)]
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
        known = {id(one) for one in self._tensors}
        if self._optimizer is not None and any(id(one) not in known for one in _tensors(self._optimizer)):
            self._optimizer.state.clear()  # it had taken no step
        torch._foreach_copy_(self._tensors, self._copies)  # pyright: ignore[reportPrivateImportUsage]
        self._kept = False


def _tensors(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    states = [] if optimizer is None else optimizer.state.values()
    return [one for state in states for one in state.values() if isinstance(one, Tensor)]
