"""How an update shuffles its samples and splits them into minibatches."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from ppo_lightning.policy import Policy
from ppo_lightning.spaces import index_rows, split_sizes

Samples = Mapping[str, Any]
"""Tensors [S, …] by name, and nested mappings of them."""

ESTIMATES = ("state_value", "advantage", "value_target")

LARGE = 1 << 24
"""Bytes of samples from which minibatches are copied one at a time, so that each reuses the memory of the one before."""


class MinibatchPlan(NamedTuple):
    """How an update orders and splits this rank's samples, and how much each minibatch weighs among those of all ranks."""

    permutations: Tensor
    """[E, S] int64, the order of the samples in each epoch."""
    sizes: list[int]
    """Samples of each of the M minibatches of an epoch."""
    loss_weights: list[list[float]]
    """[E][M] samples of a minibatch over the mean of all ranks' (dimensionless), 1 where they are equal.

    Gradients are averaged over ranks: weighted by these, they are those of all samples together."""
    moments: Tensor | None
    """[2, E, M] mean and standard deviation of the advantages of all ranks, float64; None where they are not used."""

    def normalized_advantage(self, advantage: Tensor, epoch: int) -> Tensor:
        """Advantages [S] or [S, L], normalised in each of an epoch's minibatches by the moments of all ranks."""
        if self.moments is None:
            return advantage
        sizes = torch.tensor(self.sizes)
        mean, std = (moment[epoch].float().repeat_interleave(sizes) for moment in self.moments)  # [S], permuted
        inverse = self.permutations[epoch].argsort()
        shape = (-1, *(1,) * (advantage.ndim - 1))
        mean, std = (moment[inverse].to(advantage.device).view(shape) for moment in (mean, std))
        return (advantage - mean) / (std + 1e-8)


def training_samples(rollout: TensorDict, policy: Policy, sequence_length: int | None) -> dict[str, Any]:
    """Samples [T · N] of a rollout [T, N], or sequences [B, L] of single environments, by the rollout's keys.

    Args:
        rollout: with advantages.
        policy: whose normalisers are applied: to observations, and with PopArt to values and their targets.
        sequence_length: L; None for a policy that is not recurrent.
    """
    keys = [key for key in rollout.keys() if key not in ("observation", "policy_version", *ESTIMATES)]  # noqa: SIM118
    samples = {**rollout.select(*keys).flatten().to_dict(), **estimates(rollout, policy)}
    samples["observation"] = policy.features(rollout["observation"].flatten(0, 1))
    if bool(samples["valid"].all()):
        del samples["valid"]
    if sequence_length is not None:
        samples = map_samples(lambda leaf: to_sequences(leaf, sequence_length, rollout.shape[1]), samples)
    return samples


def estimates(rollout: TensorDict, policy: Policy) -> dict[str, Any]:
    """The samples [T · N] that depend on the critic, :data:`ESTIMATES`, with PopArt normalised."""
    samples = rollout.select(*ESTIMATES).flatten().to_dict()
    if policy.value_normalizer is not None:
        for key in ("value_target", "state_value"):
            samples[key] = policy.value_normalizer.normalize(samples[key])
    return samples


def plan_minibatches(
    samples: Samples,
    *,
    epochs: int,
    num_minibatches: int,
    generator: torch.Generator,
    world_size: int,
    normalizes: bool,
    gather: Callable[[Tensor], Tensor],
) -> MinibatchPlan:
    """Shuffle and split the samples of an update; of several ranks, with one gather.

    Args:
        samples: ``advantage`` [S] or [S, L] and, where some do not count, ``valid`` likewise. Samples [S] that do not count
            are left out, and S is then the number of those that do.
        epochs: E.
        num_minibatches: M, of each epoch.
        generator: shuffles.
        world_size: ranks.
        normalizes: advantages are normalised by their moments over all ranks.
        gather: a row [P] of this rank -> the rows of all, [ranks, P].
    """
    advantage, valid = samples["advantage"], samples.get("valid")
    if valid is not None and valid.ndim == 1:
        advantage, valid = advantage[valid], None
    count = len(advantage)
    permutations = torch.stack([torch.randperm(count, generator=generator) for _ in range(epochs)])
    sizes = split_sizes(count, num_minibatches)
    plan = MinibatchPlan(permutations, sizes, [[1.0] * num_minibatches] * epochs, None)
    return plan if world_size == 1 else plan_over_ranks(plan, samples, world_size, normalizes, gather)


def plan_over_ranks(
    plan: MinibatchPlan, samples: Samples, world_size: int, normalizes: bool, gather: Callable[[Tensor], Tensor]
) -> MinibatchPlan:
    """The plan with the weights and moments of all ranks' samples; parameters as of :func:`plan_minibatches`."""
    permutations, sizes = plan.permutations, plan.sizes
    epochs, num_minibatches = len(permutations), len(sizes)
    advantage, valid = samples["advantage"], samples.get("valid")
    if valid is not None and valid.ndim == 1:
        advantage, valid = advantage[valid], None
    count = len(advantage)
    value = advantage.detach().cpu().double().view(count, -1)
    counts = torch.ones_like(value) if valid is None else valid.cpu().view(count, -1).double()
    powers = [counts, counts * value, counts * value.square()] if normalizes else [counts]
    rows = torch.stack([power.sum(1) for power in powers])  # [1 or 3, S]
    # The minibatch, of all epochs, that each sample of the permutations is in.
    minibatch = torch.arange(epochs * num_minibatches).repeat_interleave(torch.tensor(sizes * epochs))
    sums = rows.new_zeros(len(rows), epochs * num_minibatches).index_add_(1, minibatch, rows[:, permutations.flatten()])
    total = gather(sums.flatten()).view(world_size, *sums.shape).sum(0)
    weights = (sums[0] * world_size / total[0]).view(epochs, num_minibatches).tolist()
    if not normalizes:
        return MinibatchPlan(permutations, sizes, weights, None)
    mean = total[1] / total[0]
    variance = (total[2] - total[0] * mean.square()).clamp_min(0) / (total[0] - 1)
    moments = torch.stack([mean, variance.sqrt()]).view(2, epochs, num_minibatches)
    return MinibatchPlan(permutations, sizes, weights, moments)


def minibatches(samples: Samples, permutation: Tensor, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """The samples of an epoch in minibatches."""
    if sum(leaf.nbytes for leaf in tensors(samples)) > LARGE:
        return (index_samples(samples, index) for index in permutation.split(sizes))
    return split_samples(index_samples(samples, permutation), sizes)


def microbatches(minibatch: Samples, count: int) -> list[tuple[Samples, float]]:
    """A minibatch [B] in ``count`` parts, with the share of its samples that each has."""
    if count == 1:
        return [(minibatch, 1.0)]
    valid = minibatch.get("valid")
    size = len(minibatch["advantage"])
    parts = list(split_samples(minibatch, split_sizes(size, min(count, size))))
    counts = [len(part["advantage"]) if valid is None else int(part["valid"].sum()) for part in parts]
    return [(part, own / sum(counts)) for part, own in zip(parts, counts, strict=True)]


def to_sequences(rows: Tensor, length: int, num_envs: int) -> Tensor:
    """A tensor [T · N, …] of T steps of N environments, as sequences [T · N / L, L, …] of single environments."""
    return rows.view(-1, length, num_envs, *rows.shape[1:]).transpose(1, 2).reshape(-1, length, *rows.shape[1:])


def map_samples(function: Callable[[Tensor], Any], samples: Samples) -> dict[str, Any]:
    """``function`` of each tensor."""
    return {
        name: map_samples(function, leaf) if isinstance(leaf, Mapping) else function(leaf)
        for name, leaf in samples.items()
    }


def index_samples(samples: Samples, index: Tensor) -> dict[str, Any]:
    """The samples that ``index`` [B] names, in its order."""
    return map_samples(lambda leaf: index_rows(leaf, index), samples)


def split_samples(samples: Samples, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Views of so many samples each."""
    parts = [
        split_samples(leaf, sizes) if isinstance(leaf, Mapping) else leaf.split(sizes) for leaf in samples.values()
    ]
    return (dict(zip(samples, part, strict=True)) for part in zip(*parts, strict=True))


def tensors(samples: Samples) -> Iterator[Tensor]:
    """All tensors."""
    for leaf in samples.values():
        yield from tensors(leaf) if isinstance(leaf, Mapping) else (leaf,)
