"""Worker processes in two groups, of which one steps while the policy acts for the other."""

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import numpy as np
from gymnasium.vector import AsyncVectorEnv

from ppo_lightning.envs.info import SumsAndCounts, merge_sums
from ppo_lightning.envs.vector import VectorEnvAdapter
from ppo_lightning.envs.workers import close
from ppo_lightning.spaces import Array, Tree, tree_map


class DoubleBufferedEnvs:
    """Two groups of worker processes, with the interface of a :class:`VectorEnvAdapter` of all.

    A collector steps the :attr:`groups` in turns: one steps while the policy acts for the other.

    Args:
        first: environments 0 to N/2.
        second: the remaining ones.
    """

    def __init__(self, first: VectorEnvAdapter, second: VectorEnvAdapter) -> None:
        self._envs = first, second
        self.name, self.num_envs = first.name, first.num_envs + second.num_envs
        self.time_limit_advice, self.resets_take_a_step = first.time_limit_advice, first.resets_take_a_step
        self.groups = [(slice(0, first.num_envs), first), (slice(first.num_envs, self.num_envs), second)]
        """Both groups, and the indices of their environments."""

    @property
    def action_mask(self) -> Array | None:
        """[N, M] bool, allowed actions after the last reset or step; None without masks."""
        first, second = (envs.action_mask for envs in self._envs)
        return None if first is None or second is None else np.concatenate([first, second])

    def reset(self, seed: int | None) -> Tree:
        """Start all episodes: environment i is seeded with ``seed + i``."""
        each = [envs.reset(None if seed is None else seed + rows.start) for rows, envs in self.groups]
        return tree_map(lambda *leaf: np.concatenate(leaf), *each)

    def set_env_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of all environments, or call their methods: changed ones now, all after a restart."""
        for envs in self._envs:
            envs.set_env_attributes(attributes)

    def pop_info(self) -> SumsAndCounts:
        """Metrics from ``info`` since the last call."""
        return merge_sums([envs.pop_info() for envs in self._envs])

    def state(self) -> dict[str, Any] | None:
        """State of all environments between two steps, as plain data; None where one cannot be saved."""
        states = [envs.state() for envs in self._envs]
        return None if None in states else {"groups": states}

    def restore(self, state: dict[str, Any]) -> bool:
        """Restore, after a reset, the state of :meth:`state`; False if it is of other environments."""
        states = state.get("groups", [])
        return len(states) == 2 and all(envs.restore(own) for envs, own in zip(self._envs, states, strict=True))

    def close(self) -> None:
        """Close both groups, at the same time."""
        close(*(cast(AsyncVectorEnv, envs.env) for envs in self._envs if envs.detach_finalizer()))


VectorEnvs: TypeAlias = VectorEnvAdapter | DoubleBufferedEnvs
"""What a collector steps: the environments of each of its ``groups`` together."""
