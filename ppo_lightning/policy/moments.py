"""Running mean and variance, as buffers."""

import torch
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Mean and variance of a stream of samples, merged batch by batch.

    With n samples seen and a batch of m (Chan, Golub & LeVeque 1979):

        δ = x̄ - μ,    μ ← μ + δ m/(n+m),    S ← S + Sₓ + δ² n m/(n+m),    σ² = S/n

    The moments are buffers, so checkpoints, devices and exports carry them without further code. Before the first
    batch they are those of samples that need no normalising: mean 0, variance 1.

    Args:
        shape: shape of one sample. ``mean`` and ``variance`` have this shape, in the sample's units
            (variance: units²), as float64; ``count`` is the number of samples, int64.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def batch_moments(self, samples: Tensor) -> Tensor:
        """Count, mean and summed squared deviations of samples [B, …], packed as one float64 row for a gather."""
        samples = samples.double()
        mean = samples.mean(0)
        squares = (samples - mean).square().sum(0)
        return torch.cat([mean.new_tensor([len(samples)]), mean.flatten(), squares.flatten()])

    @torch.no_grad()
    def merge(self, packed: Tensor) -> None:
        """Merge what :meth:`batch_moments` packed, [P] or [ranks, P], in order."""
        size = self.mean.numel()
        for row in packed.reshape(-1, 1 + 2 * size):
            count = row[0]
            if count == 0:
                continue
            mean, squares = (part.view_as(self.mean) for part in row[1:].split(size))
            total = self.count + count
            delta = mean - self.mean
            squares = self.variance * self.count + squares + delta.square() * self.count * count / total
            self.mean.add_(delta * (count / total))
            self.variance.copy_(squares / total)
            self.count.copy_(total)
