"""A dataset that simulates: one rollout per epoch, collected with the current policy."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from gymnasium import Space
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import IterableDataset

from ppo_lightning.compiler import MAX_SAMPLES, Compilation, CompiledFunction, CompilerError
from ppo_lightning.envs import EnvOverrides, EnvProvider, VectorEnvAdapter, VectorEnvs
from ppo_lightning.envs.info import SumsAndCounts
from ppo_lightning.envs.streams import get_rng_state, set_rng_state, temporarily_seeded
from ppo_lightning.errors import InputError
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import check_memory, check_samples, check_sequences, physical_memory
from ppo_lightning.policy import Policy
from ppo_lightning.rollout.collectors import (
    CollectedSteps,
    Collector,
    NumpyCollector,
    TensorCollector,
    warn_of_bounds,
)
from ppo_lightning.rollout.episodes import EpisodeStatistics
from ppo_lightning.spaces import Tree, flat_specs, split_sizes, tree_map, without_mask

WARN_WITHOUT_EPISODE_END = 10_000
"""Steps of each environment after which a run warns that no episode has ended."""


class RolloutDataset(IterableDataset[TensorDict]):
    """Steps the learner's environments with its policy; each iteration yields one rollout, a TensorDict [T, N].

    Its length is exactly 1: Lightning does not prefetch a sized iterable, so that each rollout is of the current policy.
    A new iterator does not reset the environments: unfinished episodes continue.

    A rollout holds ``observation``, ``action``, ``action_log_prob``, ``state_value``, ``next_state_value``,
    ``reward``, ``terminated``, ``truncated`` and ``valid`` (False for the dummy steps of NEXT_STEP vectors), and the
    number ``policy_version``. Observations and actions of Dict or Tuple spaces are TensorDicts of their leaves, by path.
    With masks it holds ``action_mask``, and with a recurrent policy ``recurrent_state`` (before each step) and
    ``episode_start`` (the recurrent state is reset before it). Its tensors are overwritten by the next rollout.

    Args:
        learner: module whose policy acts.
        provider: of the environments that are stepped.
        num_steps: T, steps of each environment per rollout.
        num_minibatches: that a rollout must suffice for (count).
        sequence_length: of a recurrent policy, into which rollouts are split (steps); None is num_steps.
        compilation: whether the computation of values, and the steps of tensor environments, are compiled.
    """

    MAX_NUMEL = 1 << 23
    """Elements of observations per forward pass over a rollout, so that activations of images stay in cache."""

    def __init__(
        self,
        learner: PPOModule,
        provider: EnvProvider,
        *,
        num_steps: int,
        num_minibatches: int,
        sequence_length: int | None,
        compilation: Compilation,
    ) -> None:
        self.learner, self.provider, self.compilation = learner, provider, compilation
        self.num_steps, self.num_minibatches = num_steps, num_minibatches
        self.environments: VectorEnvs | None = None
        self.observation_space = without_mask(provider.observation_space)
        self._given_sequence_length = sequence_length
        self.sequence_length = self.check_num_steps(num_steps)
        """Steps into which rollouts are split for a recurrent policy; None without recurrence."""
        self.episodes = EpisodeStatistics()
        self.running_return = torch.zeros(0)
        """[N] discounted return so far of the unfinished episodes, where rewards are normalised."""
        self.info_sums: SumsAndCounts = {}
        """Metrics from the environments' ``info`` during the last rollout."""
        self.collect_seconds = 0.0
        """Wall-clock seconds that the last rollout took."""
        self.unconsumed = False
        """The current rollout has not been used in an update yet."""
        self.resume_state: dict[str, Any] | None = None
        """The saved state to resume from, as :meth:`state` returned it, until the environments are made."""
        self._has_warned = False
        self.collector: Collector | None = None
        self._steps: CollectedSteps | None = None
        """Of the last rollout."""
        self._score: Callable[..., tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[TensorDict]:
        yield self.collect()

    def __getstate__(self) -> dict[str, Any]:
        # Simulators are not pickled.
        return {**vars(self), "environments": None, "collector": None, "_steps": None, "_score": None}

    def close(self) -> None:
        """Stop the simulators; the next rollout starts new ones."""
        self.collector = None
        if self.environments is not None:
            self.environments.close()
            self.environments = None

    def start(self) -> Collector:
        """Make and reset the environments, and allocate the rollout's tensors."""
        learner = self.learner
        seed = learner.environment_seed()
        # Environments may be random when they are made: those of a resumed run are made as they were.
        with temporarily_seeded(seed - learner.num_env_steps):
            self.environments = environments = self._make_environments()
        first = environments.reset(seed)
        self.running_return = torch.zeros(environments.num_envs)
        self.episodes.restart(environments.num_envs)
        collector = self._make_collector(environments, first)
        saved, self.resume_state = self.resume_state, None
        if saved is not None:
            if environments.restore(saved["environments"]):
                collector.restore(saved["collector"])
                self.running_return, self.episodes.running_totals = saved["running_return"], saved["running_totals"]
            else:
                rank_zero_info("environments begin new episodes: those that were saved were made otherwise")
            set_rng_state(saved["random"], learner.generator)  # resets may have used the shared generators
        return collector

    def _make_collector(self, environments: VectorEnvs, first: Tree) -> Collector:
        """A collector of ``num_steps`` steps, from the observations ``first`` [N, …]."""
        state_size, device = self.learner.policy.state_size, self.learner.device
        if (
            isinstance(environments, VectorEnvAdapter)
            and environments.tensor_observation is not None
            and not state_size
        ):
            return TensorCollector(
                environments, self.num_steps, self.observation_space, device, compilation=self.compilation
            )
        return NumpyCollector(environments, first, self.num_steps, self.observation_space, state_size, device)

    def _make_environments(self) -> VectorEnvs:
        if self.learner.device.type == "cpu":
            check_memory(
                rollout_memory(self.observation_space, self.num_steps, self.provider.num_envs), physical_memory()
            )
        environments = self.provider.train_envs()
        try:
            self._check_resets(environments, self.num_steps)
        except InputError:
            environments.close()
            raise
        return environments

    def check_num_steps(self, num_steps: int) -> int | None:
        """Refuse a length of rollouts that cannot be split; else the steps of a sequence, None without recurrence.

        Raises:
            InputError: it cannot be split into minibatches or sequences.
        """
        num_envs, is_recurrent = self.provider.num_envs, bool(self.learner.policy.state_size)
        check_samples(num_steps, num_envs, self.num_minibatches)
        if self.environments is not None:
            self._check_resets(self.environments, num_steps)
        given = self._given_sequence_length
        return check_sequences(given, num_steps, num_envs, self.num_minibatches, is_recurrent=is_recurrent)

    def _check_resets(self, environments: VectorEnvs, num_steps: int) -> None:
        """Refuse NEXT_STEP environments, which spend a step on every reset, where a minibatch could be empty."""
        name, num_envs = self.provider.factory.name, environments.num_envs
        if not environments.resets_take_a_step:
            return
        if self.sequence_length == 1:
            raise InputError(
                f"{name} spends a step on every reset (NEXT_STEP), of which sequences of one step may consist: raise "
                "sequence_length to 2 or more"
            )
        least = num_steps // 2 * num_envs
        if not self.learner.policy.state_size and self.num_minibatches > least:
            raise InputError(
                f"{name} spends a step on every reset (NEXT_STEP), which can leave {least} of num_steps · num_envs = "
                f"{num_steps} · {num_envs} samples: num_minibatches = {self.num_minibatches} is too many, lower it or raise "
                "num_steps"
            )

    def set_env_overrides(self, overrides: EnvOverrides, *, restart: bool) -> None:
        """Change the environments between two rollouts.

        Attributes are set on the existing environments; with other arguments these are recreated and start new episodes.

        Args:
            overrides: attributes and arguments that differ from the run's own.
            restart: recreate the environments where their arguments change; False restores the overrides of a resumed run,
                whose saved environments have them already.

        Raises:
            InputError: the environments lack an attribute, or have other spaces with these arguments.
        """
        before, self.provider.overrides = self.provider.overrides, overrides
        if restart and overrides.env_kwargs != before.env_kwargs:
            self.provider.check_spaces(overrides)
            self.close()
            self.resume_state = None
        elif overrides.attributes != before.attributes:
            self._set_env_attributes(overrides.attributes)

    def _set_env_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of the existing environments; the provider sets those of new ones."""
        if self.environments is not None and self.collector is not None:
            self.environments.set_env_attributes(attributes)
            self.collector.invalidate_graph()

    def set_num_steps(self, num_steps: int) -> None:
        """Collect rollouts of another length from now on; the episodes continue.

        Args:
            num_steps: T, steps of each environment per rollout.

        Raises:
            InputError: they cannot be split into minibatches or sequences.
        """
        sequence_length = self.check_num_steps(num_steps)
        if num_steps == self.num_steps:
            return
        self.num_steps, self.sequence_length = num_steps, sequence_length
        if self.environments is not None and self.collector is not None:
            state = self.collector.state()
            first = tree_map(Tensor.numpy, state["observation"])
            self.collector = self._make_collector(self.environments, first)
            self.collector.restore(state)

    def load(self, contents: Mapping[str, Any]) -> None:
        """Load the last episodes of a checkpoint."""
        self.episodes.ep_info_buffer.clear()
        self.episodes.ep_info_buffer.extend(tuple(episode) for episode in contents["episodes"])

    def state(self) -> dict[str, Any] | None:
        """State from which the next rollout continues, as plain data; None where an environment cannot save its state."""
        if self.resume_state is not None:
            return self.resume_state
        if self.unconsumed or self.collector is None or self.environments is None:
            return None
        environments = self.environments.state()
        if environments is None:
            return None
        return {
            "environments": environments,
            "collector": self.collector.state(),
            "running_return": self.running_return.cpu(),
            "running_totals": self.episodes.running_totals,
            "random": get_rng_state(self.learner.generator),
        }

    @torch.no_grad()
    def collect(self) -> TensorDict:
        """Step all environments T times and return the rollout, on the learner's device.

        Raises:
            EnvironmentFault: an environment failed, or an observation or reward is not finite.
        """
        started = time.perf_counter()
        is_first = self.collector is None
        if self.collector is None:
            self.collector = self.start()
        learner, collector = self.learner, self.collector
        self.unconsumed = True
        num_envs = collector.num_envs
        noise = learner.policy.distribution.noise(self.num_steps, num_envs, generator=learner.generator)
        with learner.autocast():
            steps = collector.collect(learner.policy, noise.to(learner.device))
            rollout = self._evaluate(learner.policy, collector, steps)
        self._steps = steps
        if is_first:
            warn_of_bounds(collector.observations, self.observation_space)
        self.episodes.add(collector.fields["reward"], collector.fields["valid"], steps.ends)
        if not self._has_warned and self.episodes.min_running_length() >= WARN_WITHOUT_EPISODE_END:
            self._has_warned = True
            rank_zero_warn(
                f"no episode has ended in {WARN_WITHOUT_EPISODE_END:,} steps of each environment, so that there are no "
                f"returns to report: {self.provider.factory.time_limit_advice}"
            )
        if self.environments is not None:
            self.info_sums = self.environments.pop_info()
        self.collect_seconds = time.perf_counter() - started
        return rollout

    def _evaluate(self, policy: Policy, collector: Collector, steps: CollectedSteps) -> TensorDict:
        """Log-probabilities and values of a whole rollout at once; exact, since normalisers are frozen during a rollout."""
        device = self.learner.device
        fields = {key: tensor.to(device) for key, tensor in collector.fields.items()}
        observation = tree_map(lambda leaf: leaf.to(device), collector.observations)
        num_steps, num_envs = fields["reward"].shape
        acted_on = tree_map(lambda leaf: leaf[:num_steps].flatten(0, 1), observation)
        action = tree_map(lambda leaf: leaf.flatten(0, 1), steps.action)
        mask = fields["action_mask"].flatten(0, 1) if "action_mask" in fields else None
        if steps.parameters is not None and steps.value is not None:
            value = steps.value
            log_prob = _log_prob(policy, steps.parameters.flatten(0, 1), action, mask)
        else:
            log_prob, value = self._log_probs_and_values(policy, acted_on, action, mask)
        value = value.view(num_steps, num_envs)
        next_value = self._next_values(policy, value, observation, steps)
        if steps.recurrent_states is not None:
            fields["recurrent_state"] = steps.recurrent_states
        batch = TensorDict(
            {
                "observation": tree_map(lambda leaf: leaf[:num_steps], observation),
                "action": steps.action,
                "action_log_prob": log_prob.view(num_steps, num_envs),
                "state_value": value,
                "next_state_value": next_value,
                **fields,
            },
            batch_size=[num_steps, num_envs],
            device=device,
        )
        return batch.set_non_tensor("policy_version", self.learner.policy_version)

    def _log_probs_and_values(
        self, policy: Policy, observation: Tree, action: Tree, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values [T · N] in one pass."""
        pieces = self._split(observation)
        if self.compilation.is_on(self.learner.device) and len(pieces) == 1:
            score = self._score = self._score or CompiledFunction(policy.log_prob_and_value, policy)
            try:
                parts = [score(*part) for part in _split_samples((observation, action, mask))]
                return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            except CompilerError as error:
                self.compilation.report_eager("values", error)
                self._score = policy.log_prob_and_value
        if len(pieces) == 1:
            return policy.log_prob_and_value(observation, action, mask)
        parts = [policy(policy.features(piece)) for piece in pieces]
        parameters, values = (torch.cat(part) for part in zip(*parts, strict=True))
        return _log_prob(policy, parameters, action, mask), values

    @torch.no_grad()
    def with_present_values(self, rollout: TensorDict) -> TensorDict:
        """The last rollout [T, N] with the values of the present critic, which is not recurrent; the rollout is not changed."""
        assert self.collector is not None
        assert self._steps is not None
        learner, again = self.learner, rollout.copy()
        observation = tree_map(lambda leaf: leaf.to(learner.device), self.collector.observations)
        acted_on = tree_map(lambda leaf: leaf[:-1].flatten(0, 1), observation)
        with learner.autocast():
            values = [learner.policy.critic(learner.policy.features(piece)) for piece in self._split(acted_on)]
            value = torch.cat(values).view(rollout.shape)
            next_value = self._next_values(learner.policy, value, observation, self._steps)
        return again.update({"state_value": value, "next_state_value": next_value})

    def _next_values(self, policy: Policy, value: Tensor, observation: Tree, steps: CollectedSteps) -> Tensor:
        """V(s'ₜ) [T, N]: V(sₜ₊₁), except where an episode ended; there sₜ₊₁ belongs to the next one."""
        later, num_envs = self._bootstrap_values(policy, observation, steps), value.shape[1]
        next_value = torch.cat([value[1:], later[None, :num_envs]])
        next_value[steps.ends.step, steps.ends.env] = later[num_envs:]
        return next_value

    def _bootstrap_values(self, policy: Policy, observation: Tree, steps: CollectedSteps) -> Tensor:
        """Values [N + E] of the observations after the last step, and of the final ones of all finished episodes."""
        after = tree_map(
            lambda leaf, final: torch.cat([leaf[self.num_steps], final.to(leaf.device)]),
            observation,
            steps.ends.observation,
        )
        if steps.recurrent_state is None or steps.ends.recurrent_state is None or steps.is_first is None:
            return torch.cat([policy.critic(policy.features(piece)) for piece in self._split(after)])
        state = torch.cat([steps.recurrent_state, steps.ends.recurrent_state])
        start = torch.zeros(len(state), dtype=torch.bool)
        start[: len(steps.is_first)] = steps.is_first
        return policy.recurrent_step(policy.features(after), state, start.to(state.device))[1]

    def _split(self, rows: Tree) -> list[Tree]:
        """Split a tree of tensors [B, …] along B."""
        leaves = rows.values() if isinstance(rows, Mapping) else [rows]
        size = max(1, self.MAX_NUMEL // sum(leaf[0].numel() for leaf in leaves))
        if isinstance(rows, Mapping):
            pieces = zip(*(leaf.split(size) for leaf in leaves), strict=True)
            return [dict(zip(rows, piece, strict=True)) for piece in pieces]
        return list(rows.split(size))


def rollout_memory(
    observation_space: Space[Any], num_steps: int, num_envs: int, update_epochs: int = 0, num_eval_episodes: int = 0
) -> dict[str, int]:
    """Bytes of a rollout's observations, an update's permutations and an evaluation's episodes, by their parameters."""
    specs = list(flat_specs(observation_space).values())
    sample = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
    return {
        f"num_steps · num_envs = {num_steps} · {num_envs}": num_steps * num_envs * sample,
        f"update_epochs = {update_epochs}": update_epochs * num_steps * num_envs * 8,
        f"num_eval_episodes = {num_eval_episodes}": num_eval_episodes * 40,
    }


def check_rollout(batch: Any, policy_version: int) -> None:
    """Refuse anything but a rollout of the current policy.

    Raises:
        InputError: it comes from another loader, or was collected before the last update.
    """
    if not (isinstance(batch, TensorDict) and "policy_version" in batch):
        raise InputError(
            f"training got a batch of another loader ({type(batch).__name__}), and PPO collects its own rollouts: leave "
            "train_dataloaders out of Trainer.fit"
        )
    if batch["policy_version"] != policy_version:
        raise InputError(
            f"the rollout was collected with policy {batch['policy_version']}, this is policy {policy_version}: something "
            "fetched it ahead of the update; pass train_dataloader() on as it is, in no DataLoader"
        )


def _split_samples(trees: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Split trees of tensors [B, …], or None, into at most ``MAX_SAMPLES`` samples each."""
    leaf = next(iter(trees[0].values())) if isinstance(trees[0], Mapping) else trees[0]
    if leaf.device.type != "cpu" or len(leaf) <= MAX_SAMPLES:
        return [trees]
    sizes = split_sizes(len(leaf), -(-len(leaf) // MAX_SAMPLES))
    ends = list(accumulate(sizes))
    places = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [
        tuple(None if tree is None else tree_map(lambda leaf, at=at: leaf[at], tree) for tree in trees) for at in places
    ]


def _log_prob(policy: Policy, parameters: Tensor, action: Tree, mask: Tensor | None) -> Tensor:
    if mask is not None:
        parameters = policy.distribution.apply_mask(parameters, mask)
    return policy.distribution.log_prob_and_entropy(parameters, action)[0]
