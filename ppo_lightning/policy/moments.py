"""Running mean and variance, as buffers: of observations and returns, and of what a critic predicts."""

import torch
from torch import Tensor, nn
from typing_extensions import override


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

    @staticmethod
    def batch_moments(samples: Tensor) -> Tensor:
        """Count, mean and summed squared deviations of samples [B, …], packed as one float64 row for a gather."""
        samples = samples.double()
        mean = samples.mean(0)
        squares = (samples - mean).square().sum(0)
        return torch.cat([mean.new_tensor([len(samples)]), mean.flatten(), squares.flatten()])

    @torch.no_grad()
    def merge(self, packed: Tensor) -> None:
        """Merge what :meth:`batch_moments` packed, [P] or [ranks, P], in order; not a row that is not finite."""
        size = self.mean.numel()
        for row in packed.reshape(-1, 1 + 2 * size):
            count = row[0]
            if count == 0 or not row.isfinite().all():  # once in the moments, it would stay there
                continue
            mean, squares = (part.view_as(self.mean) for part in row[1:].split(size))
            total = self.count + count
            delta = mean - self.mean
            squares = self.variance * self.count + squares + delta.square() * self.count * count / total
            self.mean.add_(delta * (count / total))
            self.variance.copy_(squares / total)
            self.count.copy_(total)


class ValueNormalizer(nn.Module):
    """PopArt (van Hasselt et al. 2016): the critic learns normalised targets, and its output is V = σ (w v + b) + μ.

    v is what the network returns, w and b are parameters. When the moments of the targets move, so do w and b, such that
    V stays what it was for every state:

        w ← w σ / σ',    b ← (σ b + μ - μ') / σ'

    The moments are exponentially weighted from μ = 0, σ = 1 on, a batch of n targets with 1 - (1 - β)ⁿ. They are not
    corrected for that beginning: moved all at once, μ would leave the old V hundreds of σ behind.

    Args:
        beta: weight β of one target.
    """

    MIN_STD = 1e-2
    """Of targets that hardly vary: dividing by less would blow noise up."""

    mean: Tensor
    square: Tensor

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.weight = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("square", torch.ones((), dtype=torch.float64))

    @property
    def std(self) -> Tensor:
        """σ, float64."""
        return (self.square - self.mean.square()).clamp_min(self.MIN_STD**2).sqrt()

    @override
    def forward(self, output: Tensor) -> Tensor:
        """Values [B], in (normalised) reward units, for the network's outputs [B]."""
        return self.normalized_value(output) * self.std.float() + self.mean.float()

    def normalized_value(self, output: Tensor) -> Tensor:
        """Normalised values [B]: what the loss compares with normalised targets."""
        return self.weight * output + self.bias

    def normalize(self, value: Tensor) -> Tensor:
        """Values or targets in reward units, as :meth:`normalized_value` has them."""
        return (value - self.mean.float()) / self.std.float()

    @torch.no_grad()
    def merge(self, packed: Tensor) -> None:
        """Take in the targets of a rollout where they are finite.

        Args:
            packed: by :meth:`RunningMoments.batch_moments`, [3] or [ranks, 3].
        """
        packed = packed.view(-1, 3)
        count, mean, squares = packed[packed.isfinite().all(1)].unbind(1)
        samples = count.sum()
        if samples == 0:
            return
        first = (count * mean).sum() / samples
        second = (squares + count * mean.square()).sum() / samples
        share = 1 - (1 - self.beta) ** samples
        old_mean, old_std = self.mean.clone(), self.std
        self.mean.lerp_(first, share)
        self.square.lerp_(second, share)
        self.weight.mul_(old_std / self.std)
        self.bias.copy_((old_std * self.bias + old_mean - self.mean) / self.std)


def statistics_of(module: nn.Module) -> set[int]:
    """Identities of the buffers of a module that are running statistics."""
    kinds = RunningMoments | ValueNormalizer
    return {id(buffer) for one in module.modules() if isinstance(one, kinds) for buffer in one.buffers()}
