"""The dataset that is its own simulator: one rollout per pass, collected with the policy as it is now."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import Space
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import IterableDataset

from ppo_lightning.envs import Environments
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.policy import Policy, Step, stack
from ppo_lightning.spaces import Array, Tree, empty, leaves, tree_map


class Learner(Protocol):
    """What collecting needs to know of the module that learns from it."""

    policy: Policy
    generator: torch.Generator

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        ...

    @property
    def policy_version(self) -> int:
        """How many updates it has had."""
        ...

    def make_environments(self) -> Environments:
        """What to step."""
        ...

    def environment_seed(self) -> int:
        """Seed of the first environment."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of updates."""
        ...


class Final(NamedTuple):
    """Episodes that ended at one step."""

    step: int
    ended: Array
    """[E] environments."""
    observation: Tree
    """[E, …] their last observations, numpy."""
    state: Tensor | None
    """[E, S] what the policy's memory held then."""


class RolloutDataset(IterableDataset[TensorDict]):
    """Steps the learner's environments with its policy; each pass yields one rollout, a TensorDict [T, N].

    Its length is exactly 1: a sized iterable is never fetched ahead of the update before it, so that no rollout is a
    policy old. Asking for an iterator does nothing; the episodes go on where the last rollout left them.

    A rollout holds ``observation``, ``action``, ``action_log_prob``, ``state_value``, ``next_state_value``,
    ``reward``, ``terminated``, ``truncated`` and ``valid`` (False for the dummy rows of NEXT_STEP vectors), and the
    number ``policy_version``. Observations and actions of Dict or Tuple spaces are TensorDicts of their parts, by path.
    Where there are masks it holds ``action_mask``, and of a policy with memory ``memory_state`` (before each step) and
    ``episode_start`` (the memory is reset before it). Its tensors are overwritten by the next rollout.

    Args:
        learner: module whose policy acts and whose environments are stepped.
        num_steps: T, steps of each environment per rollout.
        observation_space: of one environment, without its action mask.
    """

    PIECE = 1 << 23
    """Numbers of observation that the pass over a whole rollout takes at once: pictures in pieces that stay in cache."""

    def __init__(self, learner: Learner, num_steps: int, observation_space: Space[Any]) -> None:
        self.learner = learner
        self.num_steps = num_steps
        self.observation_space = observation_space
        self.environments: Environments | None = None
        self.episodes = EpisodeStatistics()
        self.discounted = torch.zeros(0)
        """[N] discounted return so far of the episodes that go on, where rewards are normalised."""
        self.collect_seconds = 0.0
        """Wall-clock seconds that the last rollout took."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[TensorDict]:
        yield self.collect()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "environments": None, "_rows": None}  # simulators stay where they are

    def close(self) -> None:
        """Stop the simulators; the next rollout starts new ones."""
        if self.environments is not None:
            self.environments.close()
            self.environments = None

    def start(self) -> Environments:
        """Make and reset the environments, and allocate what rollouts are written to."""
        environments = self.learner.make_environments()
        self._observation = environments.reset(self.learner.environment_seed())
        steps, num_envs = self.num_steps, environments.num_envs

        # One more observation than steps: the last is where the next rollout goes on.
        spaces = {name: empty(leaf, steps + 1, num_envs) for name, leaf in leaves(self.observation_space).items()}
        self._observations: Tree = spaces[""] if list(spaces) == [""] else spaces
        self._rows = {
            "reward": torch.empty(steps, num_envs),
            "terminated": torch.empty(steps, num_envs, dtype=torch.bool),
            "truncated": torch.empty(steps, num_envs, dtype=torch.bool),
            "valid": torch.ones(steps, num_envs, dtype=torch.bool),
        }
        self._start = np.ones(num_envs, dtype=bool)
        self._state: Tensor | None = None
        if self.learner.policy.state_size:
            self._state = torch.zeros(num_envs, self.learner.policy.state_size, device=self.learner.device)
            self._rows["episode_start"] = torch.empty(steps, num_envs, dtype=torch.bool)
        if environments.action_mask is not None:
            self._rows["action_mask"] = torch.empty(steps, *environments.action_mask.shape, dtype=torch.bool)
        self.discounted = torch.zeros(num_envs)
        self.episodes.restart(num_envs)
        return environments

    @torch.no_grad()
    def collect(self) -> TensorDict:
        """Step all environments T times and return what happened, on the learner's device.

        Raises:
            EnvironmentFault: an environment failed, or an observation or reward is not finite.
        """
        started = time.perf_counter()
        if self.environments is None:
            self.environments = self.start()
        policy, device, environments = self.learner.policy, self.learner.device, self.environments
        num_envs, distribution = environments.num_envs, policy.distribution
        rows = {key: tensor.numpy() for key, tensor in self._rows.items()}
        reward, terminated, truncated, valid = (rows[key] for key in ("reward", "terminated", "truncated", "valid"))
        starts, masks = rows.get("episode_start"), rows.get("action_mask")
        observation = tree_map(Tensor.numpy, self._observations)
        observed = _by_step(self._observations)
        noise = distribution.noise(self.num_steps, num_envs, generator=self.learner.generator).to(device).unbind()
        taken: list[Step] = []
        states: list[Tensor] = []
        finals: list[Final] = []
        successes: list[Array] = []
        mask = start = None

        step = 0
        try:
            with self.learner.autocast():
                for step in range(self.num_steps):
                    _put(observation, step, self._observation)
                    seen = observed[step]
                    if masks is not None:
                        masks[step] = environments.action_mask
                        mask = self._rows["action_mask"][step].to(device)
                    if starts is not None and self._state is not None:
                        starts[step] = self._start
                        start = self._rows["episode_start"][step].to(device)
                        states.append(self._state)
                    if device.type != "cpu":
                        seen = tree_map(lambda leaf: leaf.to(device), seen)
                    taken.append(policy.act(seen, noise[step], mask, self._state, start))
                    self._state = taken[-1].state
                    after = environments.step(distribution.decode(tree_map(_to_numpy, taken[-1].action)))
                    reward[step], terminated[step], truncated[step] = after.reward, after.terminated, after.truncated
                    if after.valid is not None:
                        valid[step] = after.valid
                    if after.life_lost is not None:
                        terminated[step] |= after.life_lost
                    if after.final_observation is not None:
                        state = None if self._state is None else self._state[torch.from_numpy(after.ended)]
                        finals.append(Final(step, after.ended, after.final_observation, state))
                        nothing = np.full(len(after.ended), np.nan)
                        successes.append(nothing if after.success is None else after.success)
                    self._observation, self._start = after.observation, after.begun
            _put(observation, self.num_steps, self._observation)
        except EnvironmentFault:
            self._check_finite(step + 1, step, finals)  # an environment may well choke on what its own NaN caused
            raise
        self._check_finite(self.num_steps + 1, self.num_steps, finals)
        done = np.zeros(valid.shape, dtype=bool)
        for final in finals:
            done[final.step, final.ended] = True
        self.episodes.add(self._rows["reward"], done, valid, successes)
        rollout = self._evaluate(policy, taken, states, finals)
        self.collect_seconds = time.perf_counter() - started
        return rollout

    def _evaluate(self, policy: Policy, taken: list[Step], states: list[Tensor], finals: list[Final]) -> TensorDict:
        """Log-probabilities and values of a whole rollout at once; exact, since normalisers are frozen meanwhile."""
        device = self.learner.device
        rows = {key: tensor.to(device) for key, tensor in self._rows.items()}
        if states:
            rows["memory_state"] = torch.stack(states)
        observation = tree_map(lambda leaf: leaf.to(device), self._observations)
        steps, num_envs = rows["reward"].shape
        with self.learner.autocast():
            parameters, value = self._pass(
                policy, tree_map(lambda leaf: leaf[:steps].flatten(0, 1), observation), taken
            )
            later = self._values_after(policy, observation, finals)
        action = stack([step.action for step in taken])
        if "action_mask" in rows:
            parameters = policy.distribution.masked(parameters, rows["action_mask"].flatten(0, 1))
        log_prob, _ = policy.distribution.log_prob_and_entropy(
            parameters, tree_map(lambda leaf: leaf.flatten(0, 1), action)
        )
        value = value.view(steps, num_envs)
        # V(s'ₜ) is V(sₜ₊₁), except where an episode ended: there sₜ₊₁ belongs to the next one.
        next_value = torch.cat([value[1:], later[None, :num_envs]])
        if finals:
            step = np.concatenate([np.full(len(final.ended), final.step) for final in finals])
            ended = np.concatenate([final.ended for final in finals])
            next_value[torch.from_numpy(step), torch.from_numpy(ended)] = later[num_envs:]
        batch = TensorDict(
            {
                "observation": tree_map(lambda leaf: leaf[:steps], observation),
                "action": action,
                "action_log_prob": log_prob.view(steps, num_envs),
                "state_value": value,
                "next_state_value": next_value,
                **rows,
            },
            batch_size=[steps, num_envs],
            device=device,
        )
        return batch.set_non_tensor("policy_version", self.learner.policy_version)

    def _pass(self, policy: Policy, observation: Tree, taken: list[Step]) -> tuple[Tensor, Tensor]:
        """Parameters [T · N, P] and values [T · N]: from acting where it gave both, else in one pass."""
        values = [step.value for step in taken if step.value is not None]
        if values:
            return torch.cat([step.parameters for step in taken]), torch.cat(values)
        parts = [policy(policy.features(piece)) for piece in self._pieces(observation)]
        parameters, values = zip(*parts, strict=True)
        return torch.cat(parameters), torch.cat(values)

    def _values_after(self, policy: Policy, observation: Tree, finals: list[Final]) -> Tensor:
        """Values [N + E] of the observations after the last step, and of the final ones of all episodes that ended."""

        def tensor(rows: Tensor, final: Array) -> Tensor:
            return torch.from_numpy(final).to(rows.device, rows.dtype).view(-1, *rows.shape[2:])

        last = [tree_map(tensor, observation, final.observation) for final in finals]
        after = tree_map(lambda leaf, *final: torch.cat([leaf[self.num_steps], *final]), observation, *last)
        if self._state is None:
            return torch.cat([policy.critic(policy.features(piece)) for piece in self._pieces(after)])
        state = torch.cat([self._state, *(final.state for final in finals if final.state is not None)])
        start = torch.zeros(len(state), dtype=torch.bool)
        start[: len(self._start)] = torch.from_numpy(self._start)
        return policy.advance(policy.features(after), state, start.to(state.device))[1]

    def _pieces(self, rows: Tree) -> list[Tree]:
        """A tree of tensors [B, …] in pieces."""
        leaves = rows.values() if isinstance(rows, Mapping) else [rows]
        size = max(1, self.PIECE // sum(leaf[0].numel() for leaf in leaves))
        if isinstance(rows, Mapping):
            pieces = zip(*(leaf.split(size) for leaf in leaves), strict=True)
            return [dict(zip(rows, piece, strict=True)) for piece in pieces]
        return list(rows.split(size))

    def _check_finite(self, observations: int, steps: int, finals: list[Final]) -> None:
        """Refuse what would poison the parameters, before anything is computed from it."""
        trees = [(self._observations, "observation", observations), (self._rows["reward"], "reward", steps)]
        for tree, key, rows in trees:
            for name, tensor in tree.items() if isinstance(tree, Mapping) else [("", tree)]:
                tensor = tensor[:rows]
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    step, index = (~tensor.isfinite()).nonzero()[0, :2].tolist()
                    raise _not_finite(f"{key} {name}".strip(), index, step, tensor[step, index])
        for final in finals:
            tree = final.observation
            for name, leaf in tree.items() if isinstance(tree, Mapping) else [("", tree)]:
                if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all():
                    row = int(np.flatnonzero(~np.isfinite(leaf).reshape(len(leaf), -1).all(1))[0])
                    key = f"final observation {name}".strip()
                    raise _not_finite(key, int(final.ended[row]), final.step, leaf[row])


def _put(rows: Tree, step: int, values: Tree) -> None:
    if isinstance(rows, dict):
        for name, row in rows.items():
            _put(row, step, values[name])
    elif (
        rows.dtype == np.uint8 and rows.ndim == 5
    ):  # pictures, laid out anew on the way: torch is three times as fast at it
        torch.from_numpy(rows)[step].copy_(torch.from_numpy(np.ascontiguousarray(values)))
    else:
        rows[step] = values


def _by_step(rows: Tree) -> list[Tree]:
    """The tree of each step, of a tree of tensors [T, …]."""
    if isinstance(rows, dict):
        return [
            dict(zip(rows, leaf, strict=True)) for leaf in zip(*(row.unbind() for row in rows.values()), strict=True)
        ]
    return list(rows.unbind())


def _to_numpy(tensor: Tensor) -> Array:
    return tensor.cpu().numpy()


def _not_finite(key: str, index: int, step: int, value: object) -> EnvironmentFault:
    return EnvironmentFault(
        f"environment {index} returned a {key} that is not finite at step {step} of the rollout: {value}; no parameter "
        "was changed: correct the environment, or clip there what it divides by or takes the logarithm of"
    )


class EpisodeStatistics:
    """Returns, lengths and successes of finished episodes, computed once per rollout.

    The episodes of the current rollout are in :attr:`finished` until they are taken; :attr:`window` holds the last 100
    of all ranks, and the episodes that go on are carried from rollout to rollout.
    """

    WINDOW = 100

    def __init__(self) -> None:
        self.window: deque[tuple[float, float, float]] = deque(maxlen=self.WINDOW)
        self.finished = torch.zeros(0, 3, dtype=torch.float64)

    def restart(self, num_envs: int) -> None:
        """Begin all episodes anew."""
        self._carry = torch.zeros(2, num_envs, dtype=torch.float64)  # return and length so far

    def add(
        self,
        reward: Tensor,
        done: np.ndarray[Any, Any],
        valid: np.ndarray[Any, Any],
        successes: list[np.ndarray[Any, Any]],
    ) -> None:
        """Account for one rollout.

        Args:
            reward: [T, N] as the environments gave it.
            done: [T, N] bool, an episode ended.
            valid: [T, N] bool, the row is an environment step.
            successes: of the episodes that ended, in the order of steps, then environments.
        """
        length = torch.from_numpy(valid).double()
        sums = torch.stack([reward.double() * length, length]).cumsum(1) + self._carry[:, None]  # [2, T, N]
        # Along each environment, an episode's sum is the running sum at its end less that at the end before.
        env, step = torch.from_numpy(done).T.nonzero(as_tuple=True)
        ends = sums[:, step, env]  # [2, E], by environment, then step
        before = torch.where(env[1:] == env[:-1], ends[:, :-1], 0.0)
        totals = ends - torch.cat([torch.zeros(2, min(1, len(env)), dtype=torch.float64), before], 1)
        order = (step * done.shape[1] + env).argsort()
        success = torch.from_numpy(np.concatenate(successes)) if successes else torch.zeros(0, dtype=torch.float64)
        self.finished = torch.cat([totals[:, order].T, success[:, None]], 1)  # [E, 3]
        self._carry = sums[:, -1].clone()
        latest = torch.ones(len(env), dtype=torch.bool)
        latest[:-1] = env[1:] != env[:-1]
        self._carry[:, env[latest]] -= ends[:, latest]

    def record(self, episodes: Tensor) -> None:
        """Put finished episodes [E, 3] (return, length, success) into the window."""
        self.window.extend((float(r), float(length), float(s)) for r, length, s in episodes.tolist())

    def means(self) -> dict[str, float]:
        """Mean return, length and success rate over the window, under Stable-Baselines3's names; none without episodes."""
        if not self.window:
            return {}
        returns, lengths, successes = (np.asarray(column) for column in zip(*self.window, strict=True))
        means = {"rollout/ep_rew_mean": float(returns.mean()), "rollout/ep_len_mean": float(lengths.mean())}
        if not np.isnan(successes).all():
            means["rollout/success_rate"] = float(np.nanmean(successes))
        return means
