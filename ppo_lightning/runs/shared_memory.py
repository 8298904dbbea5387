"""All-reduce over the ranks of one machine, through shared memory.

A small message by gloo wakes a thread in each process and costs 0.3 to 4 ms; an update on two ranks sends one for each
minibatch. Written to shared memory, the same sum takes some ten microseconds: by gloo, two ranks of benchmarks/ddp.py train
at 0.62 (eager) and 0.52 (compiled) of this speed on two idle cores (torch 2.13.0, AMD EPYC). Where other processes use the
same cores, waiting ranks take their time, and gloo is faster.
"""

import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed, nn

from ppo_lightning.errors import InputError

FOLDER = Path("/dev/shm")
SPIN_S, YIELD_S, LOOK_S = 2e-3, 0.05, 0.1
"""Seconds to spin, then to yield without sleeping, and between two checks that the other ranks are alive."""
ROW = 1 << 12
"""Minimum capacity in single-precision numbers: counts and metrics are gathered here, too."""
STRIDE = 8
"""Counters lie this many numbers apart, each in a cache line of its own."""


class PeerLost(distributed.DistError):
    """A rank did not take part in an exchange: its process ended, or hangs."""


def make_shared_memory(trainer: Any, parameters: list[nn.Parameter]) -> "SharedMemoryAllReduce | None":
    """Shared memory for the ranks of a run; None with one rank, or where ranks cannot share memory.

    Under DDP, the gradients of ``parameters`` are averaged through this memory from now on.
    """
    strategy, single = trainer.strategy, all(one.dtype == torch.float32 for one in parameters)
    if trainer.world_size == 1 or not (single and can_share(trainer.num_nodes, strategy.root_device)):
        return None
    size = sum(one.numel() for one in parameters) + 1  # and the divergence, or which parameters have gradients
    size = max(size + size % 2, ROW)
    try:
        shared = SharedMemoryAllReduce(trainer.global_rank, trainer.world_size, size)
    except OSError as error:  # on all ranks
        rank_zero_warn(
            f"gradients are averaged by messages, which is slower: {error}; enlarge {FOLDER} (docker: --shm-size)"
        )
        return None
    if isinstance(strategy, DDPStrategy) and strategy._ddp_comm_hook is None:
        cast(Any, strategy.model).register_comm_hook(shared, _average)
        # To find unused parameters, DDP remembers those used in any backward pass that it has not finished itself.
        shared.reduces_gradients = not strategy._ddp_kwargs.get("find_unused_parameters", False)
    return shared


def can_share(num_nodes: int, device: torch.device) -> bool:
    """Whether processes can share memory: on one machine with Linux, whose processor keeps the order of stores."""
    alike = num_nodes == 1 and device.type == "cpu"
    return alike and FOLDER.is_dir() and platform.machine() in ("x86_64", "AMD64")


def _average(
    sums: "SharedMemoryAllReduce",
    bucket: distributed.GradBucket,  # pyright: ignore[reportPrivateImportUsage]  # torch looks at this annotation
) -> torch.futures.Future[Tensor]:
    gradient = bucket.buffer()
    sums.all_reduce(gradient)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradient.div_(len(sums.pids)))
    return done


class SharedMemoryAllReduce:
    """Sums tensors over all ranks; each gets the same bits, since all sum in the same order.

    Args:
        rank: of this process.
        world_size: number of ranks.
        size: numbers of the largest tensor, an even one.

    Raises:
        OSError: the memory cannot be allocated, on all ranks alike.
    """

    def __init__(self, rank: int, world_size: int, size: int) -> None:
        self.rank, self.round, self.reduces_gradients = rank, 0, False
        numbers = 2 * world_size * (STRIDE + size)
        place = [allocate(4 * numbers)] if rank == 0 else [None]
        distributed.broadcast_object_list(place)
        if place[0] is None:
            raise OSError(f"no room for {4 * numbers:,} bytes in {FOLDER}")
        try:
            memory = torch.from_file(place[0], shared=True, size=numbers)
            distributed.barrier()
        finally:
            if rank == 0:
                Path(place[0]).unlink()  # the memory stays until all ranks have ended
        self.counters = memory[: 2 * STRIDE * world_size].view(torch.int64).numpy()[::STRIDE]
        self.values = memory[2 * STRIDE * world_size :].view(2, world_size, size)
        """Of this round and the previous one, which other ranks may still read."""
        self.pids: list[int] = [0] * world_size
        distributed.all_gather_object(self.pids, os.getpid())

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor [P] by its sum over all ranks, which all call this in the same order.

        Raises:
            PeerLost: a rank died, or did not call within the process group's timeout.
        """
        values = self._exchange(tensor)
        tensor.copy_(values[0])
        for other in values[1:]:
            tensor.add_(other)

    def fits(self, row: Tensor) -> bool:
        """Whether :meth:`gather` can take a row."""
        return row.nbytes <= self.values[0, 0].nbytes

    def gather(self, row: Tensor) -> Tensor:
        """The tensors [P] of all ranks, stacked [ranks, P]; otherwise as :meth:`all_reduce`."""
        return self._exchange(row).clone()

    def _exchange(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks [ranks, P], valid until the next but one call."""
        self.round += 1
        values = self.values[self.round % 2].view(tensor.dtype)[:, : len(tensor)]
        values[self.rank].copy_(tensor)
        self.counters[self.rank] = self.round
        if (self.counters < self.round).any():
            self._wait()
        return values

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace the gradients by their means over all ranks, as DDP would, without its hook per parameter.

        Raises:
            InputError: other parameters have gradients on another rank.
        """
        gradients = [one.grad for one in parameters if one.grad is not None]
        which = float(sum(place for place, one in enumerate(parameters, 1) if one.grad is not None))
        flat = torch.cat([gradients[0].new_tensor([which]), *(gradient.flatten() for gradient in gradients)])
        self.all_reduce(flat)
        if flat[0] != which * len(self.pids):
            raise InputError(
                "the loss gave gradients to other parameters on one rank than on another: let it use each of its parameters "
                "on all ranks, with weight 0 where a minibatch does not need it"
            )
        pieces = flat[1:].div_(len(self.pids)).split([gradient.numel() for gradient in gradients])
        means = [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]
        torch._foreach_copy_(gradients, means)  # pyright: ignore[reportPrivateImportUsage]

    def _wait(self) -> None:
        begun = time.perf_counter()
        look = begun + LOOK_S
        while (self.counters < self.round).any():
            now = time.perf_counter()
            if now - begun > YIELD_S:
                time.sleep(SPIN_S / 2)
            elif now - begun > SPIN_S:
                os.sched_yield()
            if now > look:
                self._check_peers(now - begun)
                look = now + LOOK_S

    def _check_peers(self, waited: float) -> None:
        late = [rank for rank, count in enumerate(self.counters.tolist()) if count < self.round]
        dead = [rank for rank in late if not is_alive(self.pids[rank])]
        timeout = distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout  # pyright: ignore
        if dead or waited > timeout.total_seconds():
            what = "ended" if dead else f"did not come within {waited:.0f} s"
            names = " and ".join(f"rank {rank}" for rank in dead or late)
            raise PeerLost(f"{names} {what} during an exchange")


def allocate(size: int) -> str | None:
    """A file of so many bytes in memory; None where there is no room."""
    handle, place = tempfile.mkstemp(prefix="ppo_lightning_", dir=FOLDER)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError:
        os.unlink(place)
        return None
    finally:
        os.close(handle)
    return place


def is_alive(pid: int | str) -> bool:
    """Whether a process of this machine runs, and is no zombie."""
    try:
        os.kill(int(pid), 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # it has just ended, or the system has no /proc
        return not Path("/proc/self").exists()
