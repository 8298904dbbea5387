"""Gradients before a step: clipped by their norm, and never stepped by where that is not finite."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

MAX_SKIPPED = 10
"""Gradient steps in a row that may be left out, because the gradient was not finite."""


def clip_by_norm(parameters: Sequence[nn.Parameter], max_norm: float | None) -> tuple[Tensor, Tensor]:
    """Scale all gradients together down to a norm, as :func:`torch.nn.utils.clip_grad_norm_` does.

    Args:
        parameters: P of them, some without a gradient maybe.
        max_norm: Euclidean, over all parameters; None does not clip.

    Returns:
        The norm that they had, and that of each parameter [P], which metrics are made from; 0 without a gradient.
    """
    gradients = [one.grad for one in parameters if one.grad is not None]
    parts = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
    norm = parts.norm()
    nn.utils.clip_grads_with_norm_(parameters, max_norm or torch.inf, norm)
    if len(parts) < len(parameters):
        have = torch.tensor([one.grad is not None for one in parameters], device=parts.device)
        parts = parts.new_zeros(len(have)).masked_scatter(have, parts)
    return norm, parts


class Guard:
    """Which gradients a step may be taken by, and how many were left out.

    All processes decide alike: their gradients are the same by then.

    Args:
        non_finite: ``raise`` ends the run by the first whose norm is not finite, ``skip`` by the eleventh in a row.
    """

    def __init__(self, non_finite: Literal["raise", "skip"]) -> None:
        self.non_finite = non_finite
        self.reset()

    def reset(self) -> None:
        """Count from 0."""
        self.skipped = self.in_a_row = 0

    def accepts(self, norm: float, iteration: int, write: Callable[[float], Path]) -> bool:
        """Whether a step may be taken; else it is to be left out.

        Args:
            norm: of the gradient.
            iteration: number of the current one, from 1.
            write: saves what the gradient was computed from, and says where.

        Raises:
            FloatingPointError: the norm is not finite, and that is not to be skipped.
        """
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.non_finite == "skip" and self.in_a_row <= MAX_SKIPPED:
            return False
        file = write(norm)
        times = f" {self.in_a_row} times in a row" if self.non_finite == "skip" else ""
        raise FloatingPointError(
            f"the gradient's norm is {norm}{times} in iteration {iteration}, the step was not taken: lower the learning "
            "rate, or look for observations or rewards of extreme size (normalize_observation, normalize_reward); "
            f"{file} holds what it was computed from"
        )
