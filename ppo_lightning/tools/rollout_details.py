"""Optional statistics of observations, normalized rewards, advantages and values."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from tensordict import TensorDict
from torch import Tensor
from typing_extensions import override

from ppo_lightning.algorithm.update import UpdateResult
from ppo_lightning.callbacks.events import PPOCallback
from ppo_lightning.errors import InputError
from ppo_lightning.parameters import INDEX, checked
from ppo_lightning.policy import Policy, RunningMoments
from ppo_lightning.spaces import flatten_spaces, is_image, tensor_spec


class RolloutDetails(PPOCallback):
    """Logs statistics of each rollout as the update uses it, over all ranks.

    ``obs_raw/…`` and ``obs_normalized/…`` (``mean_avg``, ``std_avg``, ``min``, ``max``; the latter are the network's
    inputs), ``obs_raw_mean/<name>`` and ``obs_raw_std/<name>`` of each dimension; with normalized observations
    ``obs_rms_mean/<name>`` and ``obs_rms_std/<name>`` of the running moments; with normalized rewards
    ``reward_norm/return_rms_mean``, ``…_var``, ``…_std``, ``…_count``, ``normalized_reward_mean`` and ``…_std``; with
    PopArt ``popart/mu`` and ``popart/sigma``; ``advantage/mean``, ``…/std``, ``value/…``, ``returns/…``, and
    ``train/clip_fraction_epoch_<k>`` of each update epoch.

    Args:
        observation_names: of the observation's dimensions, in order; null is obs_0, obs_1, …, of a Dict <key>_0, ….
        max_dimensions: observations with more dimensions have no metrics per dimension (count).
    """

    @checked("RolloutDetails: {}", max_dimensions=INDEX)
    def __init__(self, observation_names: Sequence[str] | None = None, max_dimensions: int = 64) -> None:
        super().__init__()
        self.observation_names, self.max_dimensions = observation_names, max_dimensions
        self._names: list[str] = []
        self._metrics: dict[str, float] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Determine the names of the dimensions.

        Raises:
            InputError: the number of names is wrong, or a name occurs twice.
        """
        policy: Policy = cast(Any, pl_module).policy
        spaces = flatten_spaces(cast(Any, pl_module).rollouts.observation_space)
        sizes = {
            part: math.prod(tensor_spec(space).feature_shape) for part, space in spaces.items() if not is_image(space)
        }
        known = [(part, f"{part or 'obs'}_{index}") for part, size in sizes.items() for index in range(size)]
        names = [name for _, name in known] if self.observation_names is None else list(self.observation_names)
        if len(names) != len(known) or len(set(names)) != len(names):
            raise InputError(
                f"RolloutDetails has {len(set(names))} different observation_names, observations have {len(known)} "
                "dimensions: give one name each"
            )
        self._names, self._parts = names, list(sizes)
        self._normalized = [name for (part, _), name in zip(known, names, strict=True) if part in policy.normalized]

    @override
    @torch.no_grad()
    def on_update_start(self, trainer: Trainer, pl_module: LightningModule, rollout: TensorDict) -> None:
        """Compute the statistics of the rollout."""
        module = cast(Any, pl_module)
        policy, valid = module.policy, rollout["valid"]
        self._metrics = {}
        for kind, transform in (("obs_raw", policy.encode), ("obs_normalized", policy.features)):
            if self._names and (kind == "obs_raw" or policy.moments is not None):
                self._describe(module, kind, self._flat(transform(rollout["observation"][valid])))
        if policy.moments is not None:
            self._add_per_dimension("obs_rms_mean", self._normalized, policy.moments.mean)
            self._add_per_dimension("obs_rms_std", self._normalized, policy.moments.variance.sqrt())
        columns = {"advantage": "advantage", "value": "state_value", "returns": "value_target"}
        samples = {name: rollout[key][valid] for name, key in columns.items()}
        if module.reward_normalizer.moments is not None:
            samples["normalized"] = module.reward_normalizer(rollout["reward"][valid])
        mean, std = _moments(module, torch.stack(list(samples.values()), 1))
        for name, own_mean, own_std in zip(samples, mean.tolist(), std.tolist(), strict=True):
            prefix = "reward_norm/normalized_reward_" if name == "normalized" else f"{name}/"
            self._metrics |= {f"{prefix}mean": own_mean, f"{prefix}std": own_std}
        if module.reward_normalizer.moments is not None:
            moments, prefix = module.reward_normalizer.moments, "reward_norm/return_rms_"
            self._metrics |= {
                f"{prefix}mean": moments.mean.item(),
                f"{prefix}var": moments.variance.item(),
                f"{prefix}std": moments.variance.sqrt().item(),
                f"{prefix}count": moments.count.item(),
            }
        if policy.value_normalizer is not None:
            normalizer = policy.value_normalizer
            self._metrics |= {"popart/mu": normalizer.mean.item(), "popart/sigma": normalizer.std.item()}

    @override
    def on_update_end(self, trainer: Trainer, pl_module: LightningModule, update: UpdateResult) -> None:
        """Average the clip fraction of each epoch, where the loss gives one."""
        module = cast(Any, pl_module)
        if "clip_fraction" not in update.names:
            return
        clipped = (
            module.ranks.gather(update.column("clip_fraction").double().cpu()).view(-1, len(update.losses)).mean(0)
        )
        for epoch, part in enumerate(clipped.split(module.num_minibatches), start=1):
            self._metrics[f"train/clip_fraction_epoch_{epoch}"] = part.mean().item()

    @override
    def on_iteration_end(self, trainer: Trainer, pl_module: LightningModule, metrics: dict[str, float]) -> None:
        """Log the statistics."""
        cast(Any, pl_module).log_metrics(self._metrics)

    def _describe(self, module: Any, kind: str, seen: Tensor) -> None:
        mean, std = _moments(module, seen)
        ends = module.ranks.gather(torch.stack([seen.max(), -seen.min()]).double().cpu()).view(-1, 2).amax(0).tolist()
        self._metrics |= {
            f"{kind}/mean_avg": mean.mean().item(),
            f"{kind}/std_avg": std.mean().item(),
            f"{kind}/max": ends[0],
            f"{kind}/min": -ends[1],
        }
        self._add_per_dimension(f"{kind}_mean", self._names, mean)
        self._add_per_dimension(f"{kind}_std", self._names, std)

    def _add_per_dimension(self, kind: str, names: list[str], values: Tensor) -> None:
        if len(names) <= self.max_dimensions:
            self._metrics |= {f"{kind}/{name}": value for name, value in zip(names, values.tolist(), strict=True)}

    def _flat(self, features: Any) -> Tensor:
        if isinstance(features, Tensor):
            return features.flatten(1)
        return torch.cat([features[part].flatten(1) for part in self._parts], 1)


def _moments(module: Any, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of samples [B, D] of all ranks."""
    moments = RunningMoments((samples.shape[1],))
    moments.merge(module.ranks.gather(RunningMoments.batch_moments(samples).cpu()))
    return moments.mean, moments.variance.sqrt()
