"""The dataset that is its own simulator: one rollout per pass, collected with the policy as it is now."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import Space
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import IterableDataset

from ppo_lightning.algorithm.compiler import MAX_SAMPLES, CompilerError, compile_function
from ppo_lightning.envs import Environments, Halves
from ppo_lightning.envs.info import Sums, added
from ppo_lightning.policy import Policy
from ppo_lightning.spaces import Tree, cut, tree_map
from ppo_lightning.stepping import ArrayStepper, Ends, Stepper, Steps, TensorStepper, warn_of_bounds
from ppo_lightning.streams import random_state, restore_random_state

ENDLESS = 10_000
"""Steps of each environment after which it is worth saying that no episode has ended."""


class Learner(Protocol):
    """What collecting needs to know of the module that learns from it."""

    policy: Policy
    generator: torch.Generator
    compiles: bool

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        ...

    @property
    def policy_version(self) -> int:
        """How many updates it has had."""
        ...

    def make_environments(self) -> Environments | Halves:
        """What to step."""
        ...

    def environment_seed(self) -> int:
        """Seed of the first environment."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of updates."""
        ...


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
        self.environments: Environments | Halves | None = None
        self.episodes = EpisodeStatistics()
        self.discounted = torch.zeros(0)
        """[N] discounted return so far of the episodes that go on, where rewards are normalised."""
        self.logged: Sums = {}
        """What the environments said in ``info`` during the last rollout."""
        self.collect_seconds = 0.0
        """Wall-clock seconds that the last rollout took."""
        self.pending = False
        """A rollout has begun that no update has learnt from yet."""
        self.saved: dict[str, Any] | None = None
        """What a run that was saved goes on from, as :meth:`state` gave it, until the environments are made."""
        self._is_endless = False
        self._stepper: Stepper | None = None
        self._score: Callable[..., tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[TensorDict]:
        yield self.collect()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "environments": None, "_stepper": None, "_score": None}  # simulators stay where they are

    def close(self) -> None:
        """Stop the simulators; the next rollout starts new ones."""
        self._stepper = None
        if self.environments is not None:
            self.environments.close()
            self.environments = None

    def start(self) -> Stepper:
        """Make and reset the environments, and allocate what rollouts are written to."""
        learner = self.learner
        self.environments = environments = learner.make_environments()
        first = environments.reset(learner.environment_seed())
        self.discounted = torch.zeros(environments.num_envs)
        self.episodes.restart(environments.num_envs)
        stepper = self._make_stepper(environments, first)
        saved, self.saved = self.saved, None
        if saved is not None:
            if environments.restore(saved["environments"]):
                stepper.restore(saved["stepper"])
                self.discounted, self.episodes.carry = saved["discounted"], saved["carry"]
            else:
                rank_zero_info("environments begin anew: those that were saved were made otherwise")
            restore_random_state(saved["random"], learner.generator)  # resets may have drawn from the shared ones
        return stepper

    def _make_stepper(self, environments: Environments | Halves, first: Tree) -> Stepper:
        """What takes ``num_steps`` steps of environments that show ``first`` [N, …]."""
        state_size, device = self.learner.policy.state_size, self.learner.device
        if isinstance(environments, Environments) and environments.tensors is not None and not state_size:
            return TensorStepper(
                environments, self.num_steps, self.observation_space, device, compiles=self.learner.compiles
            )
        return ArrayStepper(environments, first, self.num_steps, self.observation_space, state_size, device)

    def steer(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of the environments that run; :meth:`Learner.make_environments` does so of new ones."""
        if self.environments is not None and self._stepper is not None:
            self.environments.steer(attributes)
            if isinstance(self._stepper, TensorStepper):
                self._stepper.forget_graph()

    def resize(self, num_steps: int) -> None:
        """Take rollouts of another length from now on, from where the environments are.

        Args:
            num_steps: T, steps of each environment per rollout.
        """
        self.num_steps = num_steps
        if self.environments is not None and self._stepper is not None:
            state = self._stepper.state()
            first = tree_map(Tensor.numpy, state["observation"])
            self._stepper = self._make_stepper(self.environments, first)
            self._stepper.restore(state)

    def state(self) -> dict[str, Any] | None:
        """What the next rollout goes on from, as plain data; None where an environment's state cannot be told."""
        if self.saved is not None:
            return self.saved
        if self.pending or self._stepper is None or self.environments is None:
            return None
        environments = self.environments.state()
        if environments is None:
            return None
        return {
            "environments": environments,
            "stepper": self._stepper.state(),
            "discounted": self.discounted.cpu(),
            "carry": self.episodes.carry,
            "random": random_state(self.learner.generator),
        }

    @torch.no_grad()
    def collect(self) -> TensorDict:
        """Step all environments T times and return what happened, on the learner's device.

        Raises:
            EnvironmentFault: an environment failed, or an observation or reward is not finite.
        """
        started = time.perf_counter()
        is_first = self._stepper is None
        if self._stepper is None:
            self._stepper = self.start()
        learner, stepper = self.learner, self._stepper
        self.pending = True
        num_envs = stepper.num_envs
        noise = learner.policy.distribution.noise(self.num_steps, num_envs, generator=learner.generator)
        with learner.autocast():
            steps = stepper.take(learner.policy, noise.to(learner.device))
            rollout = self._evaluate(learner.policy, stepper, steps)
        if is_first:
            warn_of_bounds(stepper.observations, self.observation_space)
        self.episodes.add(stepper.rows["reward"], stepper.rows["valid"], steps.ends)
        if not self._is_endless and self.environments is not None and self.episodes.shortest() >= ENDLESS:
            self._is_endless = True
            rank_zero_warn(
                f"no episode has ended in {ENDLESS:,} steps of each environment, so that there are no returns to report: "
                f"{self.environments.time_limit_advice}"
            )
        if self.environments is not None:
            self.logged = added([part.logged.take() for part, _ in self.environments.parts])
        self.collect_seconds = time.perf_counter() - started
        return rollout

    def _evaluate(self, policy: Policy, stepper: Stepper, steps: Steps) -> TensorDict:
        """Log-probabilities and values of a whole rollout at once; exact, since normalisers are frozen meanwhile."""
        device, ends = self.learner.device, steps.ends
        rows = {key: tensor.to(device) for key, tensor in stepper.rows.items()}
        observation = tree_map(lambda leaf: leaf.to(device), stepper.observations)
        num_steps, num_envs = rows["reward"].shape
        acted_on = tree_map(lambda leaf: leaf[:num_steps].flatten(0, 1), observation)
        action = tree_map(lambda leaf: leaf.flatten(0, 1), steps.action)
        mask = rows["action_mask"].flatten(0, 1) if "action_mask" in rows else None
        if steps.parameters is not None and steps.value is not None:
            value = steps.value
            log_prob = _log_prob(policy, steps.parameters, action, mask)
        else:
            log_prob, value = self._scores(policy, acted_on, action, mask)
        value = value.view(num_steps, num_envs)
        # V(s'ₜ) is V(sₜ₊₁), except where an episode ended: there sₜ₊₁ belongs to the next one.
        later = self._values_after(policy, observation, steps)
        next_value = torch.cat([value[1:], later[None, :num_envs]])
        next_value[ends.step, ends.env] = later[num_envs:]
        if steps.states is not None:
            rows["memory_state"] = steps.states
        batch = TensorDict(
            {
                "observation": tree_map(lambda leaf: leaf[:num_steps], observation),
                "action": steps.action,
                "action_log_prob": log_prob.view(num_steps, num_envs),
                "state_value": value,
                "next_state_value": next_value,
                **rows,
            },
            batch_size=[num_steps, num_envs],
            device=device,
        )
        return batch.set_non_tensor("policy_version", self.learner.policy_version)

    def _scores(self, policy: Policy, observation: Tree, action: Tree, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values [T · N] in one pass."""
        pieces = self._pieces(observation)
        if self.learner.compiles and len(pieces) == 1:
            score = self._score = self._score or compile_function(policy.score, policy)
            try:
                parts = [score(*part) for part in _in_cache((observation, action, mask))]
                return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            except CompilerError as error:
                rank_zero_warn(f"compile: true has no effect on values, since {error}")
                self._score = policy.score
        if len(pieces) == 1:
            return policy.score(observation, action, mask)
        parts = [policy(policy.features(piece)) for piece in pieces]
        parameters, values = (torch.cat(part) for part in zip(*parts, strict=True))
        return _log_prob(policy, parameters, action, mask), values

    def _values_after(self, policy: Policy, observation: Tree, steps: Steps) -> Tensor:
        """Values [N + E] of the observations after the last step, and of the final ones of all episodes that ended."""
        after = tree_map(
            lambda leaf, final: torch.cat([leaf[self.num_steps], final.to(leaf.device)]),
            observation,
            steps.ends.observation,
        )
        if steps.state is None or steps.ends.state is None or steps.begun is None:
            return torch.cat([policy.critic(policy.features(piece)) for piece in self._pieces(after)])
        state = torch.cat([steps.state, steps.ends.state])
        start = torch.zeros(len(state), dtype=torch.bool)
        start[: len(steps.begun)] = steps.begun
        return policy.advance(policy.features(after), state, start.to(state.device))[1]

    def _pieces(self, rows: Tree) -> list[Tree]:
        """A tree of tensors [B, …] in pieces."""
        leaves = rows.values() if isinstance(rows, Mapping) else [rows]
        size = max(1, self.PIECE // sum(leaf[0].numel() for leaf in leaves))
        if isinstance(rows, Mapping):
            pieces = zip(*(leaf.split(size) for leaf in leaves), strict=True)
            return [dict(zip(rows, piece, strict=True)) for piece in pieces]
        return list(rows.split(size))


def _in_cache(trees: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Trees of tensors [B, …], or None, in parts of at most ``MAX_SAMPLES`` rows."""
    leaf = next(iter(trees[0].values())) if isinstance(trees[0], Mapping) else trees[0]
    if leaf.device.type != "cpu" or len(leaf) <= MAX_SAMPLES:
        return [trees]
    sizes = cut(len(leaf), -(-len(leaf) // MAX_SAMPLES))
    ends = list(accumulate(sizes))
    places = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [
        tuple(None if tree is None else tree_map(lambda leaf, at=at: leaf[at], tree) for tree in trees) for at in places
    ]


def _log_prob(policy: Policy, parameters: Tensor, action: Tree, mask: Tensor | None) -> Tensor:
    if mask is not None:
        parameters = policy.distribution.masked(parameters, mask)
    return policy.distribution.log_prob_and_entropy(parameters, action)[0]


class EpisodeStatistics:
    """Returns, lengths, successes and failures of finished episodes, computed once per rollout.

    The episodes of the current rollout are in :attr:`finished` until they are taken; :attr:`window` holds the last 100
    of all ranks, and the episodes that go on are carried from rollout to rollout.
    """

    WINDOW = 100

    def __init__(self) -> None:
        self.window: deque[tuple[float, ...]] = deque(maxlen=self.WINDOW)
        self.finished = torch.zeros(0, 4, dtype=torch.float64)
        self.steps = torch.zeros(0, dtype=torch.int64)
        """[E] of the current rollout, at which its episodes ended."""
        self.carry = torch.zeros(2, 0, dtype=torch.float64)
        """[2, N] return and length so far of the episodes that go on."""

    def restart(self, num_envs: int) -> None:
        """Begin all episodes anew."""
        self.carry = torch.zeros(2, num_envs, dtype=torch.float64)

    def add(self, reward: Tensor, valid: Tensor, ends: Ends) -> None:
        """Account for one rollout.

        Args:
            reward: [T, N] as the environments gave it.
            valid: [T, N] bool, the row is an environment step.
            ends: the episodes that ended.
        """
        length = valid.double().cpu()
        sums = torch.stack([reward.double().cpu() * length, length]).cumsum(1) + self.carry[:, None]  # [2, T, N]
        # Along each environment, an episode's sum is the running sum at its end less that at the end before.
        order = (ends.env.cpu() * len(length) + ends.step.cpu()).argsort()
        env, step = ends.env.cpu()[order], ends.step.cpu()[order]
        at_end = sums[:, step, env]  # [2, E], by environment, then step
        before = torch.where(env[1:] == env[:-1], at_end[:, :-1], 0.0)
        totals = at_end - torch.cat([torch.zeros(2, min(1, len(env)), dtype=torch.float64), before], 1)
        self.finished = torch.empty(len(env), 4, dtype=torch.float64)
        self.finished[order, :2] = totals.T
        self.finished[:, 2:] = ends.outcome
        self.steps = ends.step.cpu()
        self.carry = sums[:, -1].clone()
        latest = torch.ones(len(env), dtype=torch.bool)
        latest[:-1] = env[1:] != env[:-1]
        self.carry[:, env[latest]] -= at_end[:, latest]

    def shortest(self) -> int:
        """Steps that each environment has gone on for at least; 0 where any episode has ended."""
        return 0 if self.window or len(self.finished) else int(self.carry[1].min())

    def record(self, episodes: Tensor) -> None:
        """Put finished episodes [E, 4] (return, length, success, failure) into the window."""
        self.window.extend(tuple(episode) for episode in episodes.tolist())

    def means(self) -> dict[str, float]:
        """Returns, lengths and rates over the window, under Stable-Baselines3's names; none without episodes."""
        if not self.window:
            return {}
        returns, lengths, successes, failures = (np.asarray(column) for column in zip(*self.window, strict=True))
        means = {
            "rollout/ep_rew_mean": float(returns.mean()),
            "rollout/ep_rew_min": float(returns.min()),
            "rollout/ep_rew_max": float(returns.max()),
            "rollout/ep_len_mean": float(lengths.mean()),
        }
        if not np.isnan(successes).all():
            means["rollout/success_rate"] = float(np.nanmean(successes))
        if not np.isnan(failures).all():
            means["rollout/fail_rate"] = float(np.nanmean(failures))
        return means
