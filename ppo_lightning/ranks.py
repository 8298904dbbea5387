"""What several processes must agree on: how much each minibatch counts, and that their parameters are equal."""

from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_lightning.spaces import cut

CHECK_INTERVAL = 10
"""Iterations between two comparisons of the processes' parameters: half a millisecond per million of them."""


class Cuts(NamedTuple):
    """How an update orders and cuts a process's samples, and how much each piece counts among those of all processes."""

    orders: Tensor
    """[E, S] int64, the order of the samples in each epoch."""
    sizes: list[int]
    """Samples of each of the M minibatches of an epoch."""
    weights: list[list[float]]
    """[E][M] rows of a minibatch over the mean of all processes' (dimensionless), 1 where they are as many.

    Gradients are averaged over processes: weighted by these, they are those of all rows together."""
    moments: Tensor | None
    """[2, E, M] mean and standard deviation of all processes' advantages, float64; None where they do not concern it."""

    def advantage(self, advantage: Tensor, epoch: int) -> Tensor:
        """Advantages [S] or [S, L], those of each of an epoch's minibatches normalised by the moments of all processes."""
        if self.moments is None:
            return advantage
        sizes = torch.tensor(self.sizes)
        mean, std = (moment[epoch].float().repeat_interleave(sizes) for moment in self.moments)  # [S], in this order
        place = self.orders[epoch].argsort()
        shape = (-1, *(1,) * (advantage.ndim - 1))
        mean, std = (moment[place].to(advantage.device).view(shape) for moment in (mean, std))
        return (advantage - mean) / (std + 1e-8)


def cut_up(
    advantage: Tensor,
    valid: Tensor | None,
    *,
    epochs: int,
    num_minibatches: int,
    generator: torch.Generator,
    world_size: int,
    normalizes: bool,
    gather: Callable[[Tensor], Tensor],
) -> Cuts:
    """Shuffle and cut the samples of an update; of several processes, learn by one gather what the others cut.

    Args:
        advantage: [S] of each sample, or [S, L] of sequences.
        valid: likewise, bool, the rows that count; None is all.
        epochs: E, passes.
        num_minibatches: M, pieces of each pass.
        generator: shuffles.
        world_size: processes.
        normalizes: advantages are to be normalised by their moments over all processes.
        gather: a row [P] of this process -> the rows of all, [ranks, P].
    """
    samples = len(advantage)
    orders = torch.stack([torch.randperm(samples, generator=generator) for _ in range(epochs)])
    sizes = cut(samples, num_minibatches)
    if world_size == 1:
        return Cuts(orders, sizes, [[1.0] * num_minibatches] * epochs, None)
    value = advantage.detach().cpu().double().view(samples, -1)
    counts = torch.ones_like(value) if valid is None else valid.cpu().view(samples, -1).double()
    powers = [counts, counts * value, counts * value.square()] if normalizes else [counts]
    rows = torch.stack([power.sum(1) for power in powers])  # [1 or 3, S]
    # Which of all epochs' minibatches each row of the orders, behind one another, is in.
    piece = torch.arange(epochs * num_minibatches).repeat_interleave(torch.tensor(sizes * epochs))
    sums = rows.new_zeros(len(rows), epochs * num_minibatches).index_add_(1, piece, rows[:, orders.flatten()])
    total = gather(sums.flatten()).view(world_size, *sums.shape).sum(0)
    weights = (sums[0] * world_size / total[0]).view(epochs, num_minibatches).tolist()
    if not normalizes:
        return Cuts(orders, sizes, weights, None)
    mean = total[1] / total[0]
    variance = (total[2] - total[0] * mean.square()).clamp_min(0) / (total[0] - 1)
    return Cuts(orders, sizes, weights, torch.stack([mean, variance.sqrt()]).view(2, epochs, num_minibatches))


def fingerprint(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """The two 32-bit halves of a hash of the tensors' bits: float64 holds each exactly, and so does a gather."""
    state = blake2b(digest_size=8)
    for tensor in tensors:
        state.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    digest = state.digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:])


def different(rows: Tensor) -> list[int]:
    """Processes whose row of ``rows`` [ranks, P] is not that of process 0."""
    return (rows != rows[0]).any(1).nonzero().flatten().tolist()
