"""The ranks of a run, their collective operations, and what they exchange in each iteration."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar, cast

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from typing_extensions import override

from ppo_lightning.algorithm.optimizer_step import Backend, parameters_of
from ppo_lightning.errors import ProcessFault
from ppo_lightning.runs.shared_memory import SharedMemoryAllReduce, make_shared_memory

T = TypeVar("T")

CHECK_INTERVAL = 10
"""Iterations between two comparisons of the ranks' parameters: half a millisecond per million of them."""


class Ranks:
    """The ranks of a run; one rank without a Trainer.

    Args:
        trainer: of the run.
    """

    def __init__(self, trainer: Any = None) -> None:
        self._trainer = trainer
        self.shared: SharedMemoryAllReduce | None = None
        """Memory that all ranks share during training, where possible."""

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return 0 if self._trainer is None else self._trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return 1 if self._trainer is None else self._trainer.world_size

    def share_memory(self, parameters: list[nn.Parameter]) -> None:
        """Exchange through shared memory from now on, where that is possible; gradients are those of ``parameters``."""
        self.shared = make_shared_memory(self._trainer, parameters)

    def gather(self, row: Tensor) -> Tensor:
        """The tensors [P] of all ranks, stacked [ranks, P]."""
        if self.world_size == 1:
            return row
        if self.shared is not None and self.shared.fits(row):
            return self.shared.gather(row)
        sent = row.to(self._trainer.strategy.root_device).contiguous()
        rows = [torch.empty_like(sent) for _ in range(self.world_size)]
        torch.distributed.all_gather(rows, sent)
        return torch.stack(rows).to(row.device)

    def gather_objects(self, value: T) -> list[T]:
        """A plain object of each rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor [P] by its mean over all ranks."""
        if self.world_size == 1:
            return
        if self.shared is None:
            torch.distributed.all_reduce(tensor)
        else:
            self.shared.all_reduce(tensor)
        tensor.div_(self.world_size)

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace gradients by their means over all ranks."""
        if self.shared is not None:
            self.shared.average_gradients(parameters)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def check_in_sync(self, fingerprints: Tensor, iteration: int) -> None:
        """Refuse to continue with parameters whose fingerprints [ranks, 2] differ between ranks (:class:`ProcessFault`)."""
        others = (fingerprints != fingerprints[0]).any(1).nonzero().flatten().tolist()
        if others:
            names = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
            raise ProcessFault(
                f"after iteration {iteration} the parameters of {names} are not those of rank 0: something changes them on "
                "one rank alone (a callback, a hook, a backward() of its own), or their processors differ and round "
                "differently; remove it, or use machines of one kind, and resume from the last checkpoint"
            )


class Counts(NamedTuple):
    """Counts of an iteration."""

    env_steps: int
    """Environment steps."""
    episodes: Tensor
    """[E, 5] float64 finished episodes: return, length, success, failure, and the step of the rollout."""
    signal: int
    """Number of the signal that asked the run to stop; 0 without."""
    fingerprint: tuple[int, int]
    """Of the parameters (:func:`fingerprint`), or zeros."""
    has_info: bool
    """The environments reported metrics in ``info``."""


def gather_counts(own: Counts, ranks: Ranks, window: int) -> tuple[Counts, Tensor]:
    """The counts over all ranks, by one gather of at most ``window`` of the newest episodes, and fingerprints [ranks, 2]."""
    newest = own.episodes[-window:]
    numbers = [own.env_steps, len(newest), own.signal, *own.fingerprint, own.has_info]
    packed = torch.zeros(len(numbers) + 5 * window, dtype=torch.float64)  # on the CPU: not every device has float64
    packed[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    packed[len(numbers) : len(numbers) + newest.numel()] = newest.flatten()
    rows = ranks.gather(packed).view(-1, len(packed))
    episodes = torch.cat([row[len(numbers) :].view(window, 5)[: int(row[1])] for row in rows])
    if ranks.world_size > 1:  # as of one rank: by step, then environment
        episodes = episodes[episodes[:, 4].argsort(stable=True)]
    signals = rows[:, 2][rows[:, 2] != 0]
    stop = int(signals[-1]) if len(signals) else 0
    counts = Counts(int(rows[:, 0].sum()), episodes, stop, own.fingerprint, bool(rows[:, 5].any()))
    return counts, rows[:, 3:5]


class LightningBackend(Backend):
    """Backward passes and steps of a Trainer's run.

    Args:
        module: the LightningModule that trains.
        optimizer: takes the steps.
        ranks: of the run.
        bypass: skip Lightning's calls around a gradient step, which do nothing.
    """

    def __init__(self, module: Any, optimizer: torch.optim.Optimizer, ranks: Ranks, *, bypass: bool) -> None:
        super().__init__(optimizer)
        self.module, self.ranks, self.bypass = module, ranks, bypass
        self.parameters = parameters_of(optimizer)

    @override
    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self.bypass:
            super().backward(loss, last=last)
            if last:
                self.ranks.average_gradients(self.parameters)
            return
        waits = not last and self.ranks.world_size > 1
        with cast(Any, self.module.trainer.strategy).block_backward_sync() if waits else nullcontext():
            self.module.manual_backward(loss)

    @override
    def step(self, clip: Callable[[], None]) -> None:
        if self.bypass:
            super().step(clip)
        else:  # whose clipping is the module's on_before_optimizer_step
            self.module.trainer.strategy.optimizer_step(self.optimizer, lambda: None)

    @override
    def all_reduce(self, tensor: Tensor) -> None:
        self.ranks.average(tensor)


def can_bypass_strategy(trainer: Any, ranks: Ranks) -> bool:
    """Whether Lightning's calls around a gradient step do nothing but call hooks, at a tenth of a millisecond each.

    That is so on one rank, or where shared memory averages the gradients, without a gradient scaler.
    """
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    reduces = ranks.shared is not None and ranks.shared.reduces_gradients
    return (reduces or type(trainer.strategy) is SingleDeviceStrategy) and not scaled


def fingerprint(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """The two 32-bit halves of a hash of the tensors' bits: float64 holds each exactly, and so does a gather."""
    state = blake2b(digest_size=8)
    for tensor in tensors:
        state.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    digest = state.digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:])
