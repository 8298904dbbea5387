"""Counts of an iteration, on one rank and over all ranks."""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_lightning.runs.ranks import Ranks


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


def exchange_counts(own: Counts, ranks: Ranks, window: int) -> tuple[Counts, Tensor]:
    """The counts over all ranks, by one gather, and their fingerprints [ranks, 2].

    Args:
        own: of this rank.
        ranks: of the run.
        window: how many of the newest episodes are exchanged at most (count).
    """
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
