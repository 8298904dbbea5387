"""Numbers that say how an update went. Pure functions of tensors."""

import torch
from torch import Tensor


def target_moments(value: Tensor, target: Tensor) -> Tensor:
    """What :func:`explained_variance` needs to know of values and targets [B]: one float64 row [5] for a gather.

    The number of samples, then means, then summed squared deviations, of the target and of what the critic missed of it.
    """
    both = torch.stack([target, target - value]).double()
    means = both.mean(1)
    squares = (both - means[:, None]).square().sum(1)
    return torch.cat([means.new_tensor([target.numel()]), means, squares])


def explained_variance(moments: Tensor) -> Tensor:
    """1 - Var(target - value) / Var(target): 1 is a perfect critic, 0 one no better than a constant.

    Of a constant target it is 0, since no critic is better than a constant there; Stable-Baselines3 has NaN. A target
    that varies by no more than the rounding of float32 counts as constant: with ``gamma=0`` and constant rewards all of
    its variance is rounding, and the quotient is arbitrary.

    Args:
        moments: [5] or [ranks, 5] of :func:`target_moments`, whose samples are taken together.
    """
    count, means, squares = moments.view(-1, 5).split([1, 2, 2], 1)
    mean = (count * means).sum(0) / count.sum()
    variance, unexplained = (squares + count * (means - mean).square()).sum(0) / count.sum()
    rounding = torch.finfo(torch.float32).eps ** 2 * (mean.square().sum() + variance + unexplained)
    return torch.where(variance <= rounding, 0.0, 1 - unexplained / variance)
