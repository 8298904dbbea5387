"""The dataset that is its own simulator: one rollout per pass, collected with the policy as it is now."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import Space
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import IterableDataset

from ppo_lightning.envs import Environments
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.policy import Policy
from ppo_lightning.spaces import action_decoder, storage


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


class RolloutDataset(IterableDataset[TensorDict]):
    """Steps the learner's environments with its policy; each pass yields one rollout, a TensorDict [T, N].

    Its length is exactly 1: a sized iterable is never fetched ahead of the update before it, so that no rollout is a
    policy old. Asking for an iterator does nothing; the episodes go on where the last rollout left them.

    A rollout holds ``observation``, ``action``, ``action_log_prob``, ``state_value``, ``next_state_value``,
    ``reward``, ``terminated``, ``truncated`` and ``valid`` (False for the dummy rows of NEXT_STEP vectors), and the
    number ``policy_version``. Its tensors are overwritten by the next rollout.

    Args:
        learner: module whose policy acts and whose environments are stepped.
        num_steps: T, steps of each environment per rollout.
        observation_space: of one environment.
        action_space: of one environment.
    """

    def __init__(
        self, learner: Learner, num_steps: int, observation_space: Space[Any], action_space: Space[Any]
    ) -> None:
        self.learner = learner
        self.num_steps = num_steps
        self.observation_space = observation_space
        self.decode_action = action_decoder(action_space)
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
        shape, dtype = storage(self.observation_space)
        # One more observation than steps: the last is where the next rollout goes on.
        self._rows = {
            "observation": torch.empty(steps + 1, num_envs, *shape, dtype=dtype),
            "reward": torch.empty(steps, num_envs),
            "terminated": torch.empty(steps, num_envs, dtype=torch.bool),
            "truncated": torch.empty(steps, num_envs, dtype=torch.bool),
            "valid": torch.ones(steps, num_envs, dtype=torch.bool),
        }
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
        num_envs = environments.num_envs
        observation, reward, terminated, truncated, valid = (row.numpy() for row in self._rows.values())
        observed = self._rows["observation"].unbind()
        noise = (
            policy.distribution.noise(self.num_steps, num_envs, generator=self.learner.generator).to(device).unbind()
        )
        actions: list[Tensor] = []
        finals: list[tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []  # step, environments, observations
        successes: list[np.ndarray[Any, Any]] = []
        on_cpu = device.type == "cpu"

        step = 0
        try:
            with self.learner.autocast():
                for step in range(self.num_steps):
                    observation[step] = self._observation
                    action = policy.act(observed[step] if on_cpu else observed[step].to(device), noise[step])
                    actions.append(action)
                    after = environments.step(self.decode_action(action.cpu().numpy()))
                    reward[step], terminated[step], truncated[step] = after.reward, after.terminated, after.truncated
                    if after.valid is not None:
                        valid[step] = after.valid
                    if after.final_observation is not None:
                        finals.append((step, after.ended, after.final_observation))
                        nothing = np.full(len(after.ended), np.nan)
                        successes.append(nothing if after.success is None else after.success)
                    self._observation = after.observation
            observation[self.num_steps] = self._observation
        except EnvironmentFault:
            self._check_finite(step + 1, step, finals)  # an environment may well choke on what its own NaN caused
            raise
        self._check_finite(self.num_steps + 1, self.num_steps, finals)
        self.episodes.add(self._rows["reward"], terminated | truncated, valid, successes)
        rollout = self._evaluate(policy, torch.stack(actions), finals)
        self.collect_seconds = time.perf_counter() - started
        return rollout

    def _evaluate(
        self,
        policy: Policy,
        action: Tensor,
        finals: list[tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]],
    ) -> TensorDict:
        """Log-probabilities and values of a whole rollout in one pass; exact, since normalisers are frozen meanwhile."""
        device = action.device
        rows = {key: tensor.to(device) for key, tensor in self._rows.items()}
        observation = rows.pop("observation")
        steps, num_envs = rows["reward"].shape
        shape, dtype = observation.shape[2:], observation.dtype
        last = [torch.from_numpy(final).to(device, dtype).view(-1, *shape) for _, _, final in finals]
        with self.learner.autocast():
            features = policy.features(torch.cat([observation.flatten(0, 1), *last]))
            acted = features[: steps * num_envs]
            parameters, value = policy(acted)
            later = policy.critic(features[steps * num_envs :])
        log_prob, _ = policy.distribution.log_prob_and_entropy(parameters, action.flatten(0, 1))
        value = value.view(steps, num_envs)
        # V(s'ₜ) is V(sₜ₊₁), except where an episode ended: there sₜ₊₁ belongs to the next one.
        next_value = torch.cat([value[1:], later[None, :num_envs]])
        if finals:
            step = np.concatenate([np.full(len(ended), step) for step, ended, _ in finals])
            ended = np.concatenate([ended for _, ended, _ in finals])
            next_value[torch.from_numpy(step), torch.from_numpy(ended)] = later[num_envs:]
        batch = TensorDict(
            {
                "observation": observation[:steps],
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

    def _check_finite(
        self, observations: int, steps: int, finals: list[tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]]
    ) -> None:
        """Refuse what would poison the parameters, before anything is computed from it."""
        for key, rows in (("observation", observations), ("reward", steps)):
            tensor = self._rows[key][:rows]
            if tensor.is_floating_point() and not tensor.isfinite().all():
                step, index = (~tensor.isfinite()).nonzero()[0, :2].tolist()
                raise _not_finite(key, index, step, tensor[step, index])
        for step, ended, final in finals:
            if np.issubdtype(final.dtype, np.floating) and not np.isfinite(final).all():
                row = int(np.flatnonzero(~np.isfinite(final).reshape(len(final), -1).all(1))[0])
                raise _not_finite("final observation", int(ended[row]), step, final[row])


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


def no_autocast() -> AbstractContextManager[Any]:
    """The context in which nothing is cast: for policies outside a Trainer."""
    return nullcontext()
