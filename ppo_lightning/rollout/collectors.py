"""Collectors of a rollout's steps: by Gymnasium's arrays, by tensors, or several steps in one compiled graph."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ppo_lightning.compiler import Compilation, CompiledFunction, CompilerError, CudaGraphCache
from ppo_lightning.envs import TensorEnv, VectorEnvAdapter, VectorEnvs
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.policy import Policy, PolicyOutput, stack
from ppo_lightning.spaces import Array, Tree, empty, flatten_spaces, to_tensor, tree_map


class EpisodeEnds(NamedTuple):
    """Episodes that ended in a rollout, by step, then environment."""

    step: Tensor
    """[E]"""
    env: Tensor
    """[E]"""
    observation: Tree
    """[E, …] their last observations, as a rollout stores them; empty where no episode ended."""
    recurrent_state: Tensor | None
    """[E, S] at their end."""
    success_failure: Tensor
    """[E, 2] float64, success and failure: 1 or 0 where the environment reports it, else NaN."""


class CollectedSteps(NamedTuple):
    """T steps of N environments, besides the fields that a collector stores."""

    action: Tree
    """[T, N, …]"""
    parameters: Tensor | None
    """[T, N, P] of the actions' distributions, where acting computed values, too."""
    value: Tensor | None
    """[T, N]"""
    ends: EpisodeEnds
    recurrent_states: Tensor | None = None
    """[T, N, S] before each step."""
    recurrent_state: Tensor | None = None
    """[N, S] after the last step."""
    is_first: Tensor | None = None
    """[N] bool, recurrent policies only: the observation after the last step is the first of an episode."""


class Collector(ABC):
    """Takes T steps at a time, and writes the transitions into tensors that are allocated once.

    Args:
        first: [N, …] first observations of the environments, arrays or tensors.
        num_envs: N.
        num_steps: T.
        observation_space: of one environment, without its action mask.
        device: where the tensors are.
    """

    def __init__(
        self, first: Tree, num_envs: int, num_steps: int, observation_space: Space[Any], device: torch.device
    ) -> None:
        self.num_envs, self.num_steps = num_envs, num_steps
        spaces = {
            name: empty(leaf, num_steps + 1, num_envs, device=device)
            for name, leaf in flatten_spaces(observation_space).items()
        }
        self.observations: Tree = spaces[""] if list(spaces) == [""] else spaces
        """[T + 1, N, …]: one more than steps, since the next rollout starts from the last."""
        self._set_last_observation(first)
        self.fields = {
            "reward": torch.empty(num_steps, num_envs, device=device),
            "terminated": torch.empty(num_steps, num_envs, dtype=torch.bool, device=device),
            "truncated": torch.empty(num_steps, num_envs, dtype=torch.bool, device=device),
            "valid": torch.ones(num_steps, num_envs, dtype=torch.bool, device=device),
        }
        """Each [T, N, …], under a rollout's names."""

    def _set_last_observation(self, observation: Tree) -> None:
        def write(stored: Tensor, leaf: Tensor | Array) -> None:
            stored[-1].copy_(leaf if isinstance(leaf, Tensor) else to_tensor(leaf, stored.dtype))

        tree_map(write, self.observations, observation)

    def state(self) -> dict[str, Any]:
        """State from which the next rollout begins, besides the environments' own."""
        return {"observation": tree_map(lambda leaf: leaf[-1].cpu().clone(), self.observations)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Begin the next rollout from the state of :meth:`state`."""
        self._set_last_observation(state["observation"])

    def invalidate_graph(self) -> None:  # noqa: B027 - only graphs need it
        """Recompile the steps after the environments have changed, which a captured graph would not see."""

    def collect(self, policy: Policy, noise: Tensor) -> CollectedSteps:
        """Take T steps.

        Args:
            policy: acts.
            noise: [T, N, Z] from which actions are sampled.

        Raises:
            EnvironmentFault: an environment failed, or an observation or reward is not finite.
        """
        tree_map(lambda leaf: leaf[0].copy_(leaf[-1]), self.observations)
        steps = self._collect(policy, noise)
        check_finite(self.observations, self.fields["reward"], steps.ends)
        return steps

    @abstractmethod
    def _collect(self, policy: Policy, noise: Tensor) -> CollectedSteps:
        """Take T steps from the first observations [0], and store them."""


class FinishedEpisodes(NamedTuple):
    """Episodes that ended at one step of a group of environments."""

    step: Array
    """[E] the same step for each."""
    env: Array
    """[E] indices of the environments."""
    observation: Tree
    """[E, …] their last observations, numpy."""
    recurrent_state: Tensor | None
    """[E, S] at their end."""
    success_failure: Array
    """[E, 2]"""


class NumpyCollector(Collector):
    """Steps any vector through numpy arrays, which share memory with the rollout's tensors.

    Args:
        envs: to step, already reset.
        first: [N, …] their first observations.
        num_steps: T.
        observation_space: of one environment, without its action mask.
        state_size: S of the recurrent state, 0 without.
        device: where the policy is.
    """

    def __init__(
        self,
        envs: VectorEnvs,
        first: Tree,
        num_steps: int,
        observation_space: Space[Any],
        state_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(first, envs.num_envs, num_steps, observation_space, torch.device("cpu"))
        self.envs, self.device = envs, device
        self._is_first = np.ones(self.num_envs, dtype=bool)
        self._recurrent_state = torch.zeros(self.num_envs, state_size, device=device) if state_size else None
        if state_size:
            self.fields["episode_start"] = torch.empty(num_steps, self.num_envs, dtype=torch.bool)
        if envs.action_mask is not None:
            self.fields["action_mask"] = torch.empty(num_steps, *envs.action_mask.shape, dtype=torch.bool)

    @override
    def state(self) -> dict[str, Any]:
        state = self._recurrent_state
        return {
            **super().state(),
            "is_first": torch.from_numpy(self._is_first.copy()),
            "recurrent_state": None if state is None else state.cpu().clone(),
        }

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._is_first = state["is_first"].numpy().copy()
        if self._recurrent_state is not None:
            self._recurrent_state = state["recurrent_state"].to(self.device)

    @override
    def _collect(self, policy: Policy, noise: Tensor) -> CollectedSteps:
        finished: list[FinishedEpisodes] = []
        groups: list[list[PolicyOutput]] = [[] for _ in self.envs.groups]
        actor = policy.fast_actor()
        loops = [
            self._steps(rows, envs, policy, actor, noise, steps, finished)
            for (rows, envs), steps in zip(self.envs.groups, groups, strict=True)
        ]
        try:
            for _ in range(self.num_steps + 1):
                for loop in loops:
                    next(loop, None)
        except EnvironmentFault:
            # An environment may fail on what its own NaN caused.
            stored = max(min(map(len, groups)) - 1, 0)
            observations = tree_map(lambda leaf: leaf[: stored + 1], self.observations)
            check_finite(observations, self.fields["reward"][:stored], self._episode_ends(finished))
            raise
        ends = self._episode_ends(finished)
        before = self._recurrent_state
        if before is None:
            return CollectedSteps(*stack_steps(groups), ends)
        states = _join([stack([step.state for step in steps]) for steps in groups])
        self._recurrent_state = states[-1]
        is_first = torch.from_numpy(self._is_first)
        return CollectedSteps(*stack_steps(groups), ends, torch.cat([before[None], states[:-1]]), states[-1], is_first)

    def _steps(
        self,
        rows: slice,
        envs: VectorEnvAdapter,
        policy: Policy,
        actor: Callable[[Tensor], Tensor] | None,
        noise: Tensor,
        steps: list[PolicyOutput],
        finished: list[FinishedEpisodes],
    ) -> Iterator[None]:
        """Take T steps of a group of environments; yields while they step, so that the policy acts for another group."""
        to_numpy, device = policy.distribution.to_numpy, self.device
        fields = {name: tensor[:, rows] for name, tensor in self.fields.items()}
        arrays = {name: tensor.numpy() for name, tensor in fields.items()}
        reward, terminated, truncated, valid = (arrays[key] for key in ("reward", "terminated", "truncated", "valid"))
        masks, starts = fields.get("action_mask"), fields.get("episode_start")
        observations = tree_map(lambda leaf: leaf[:, rows], self.observations)
        stored, inputs = tree_map(Tensor.numpy, observations), unbind_tree(observations)
        drawn = noise[:, rows].unbind()
        is_first, mask, start = self._is_first[rows], None, None
        state = None if self._recurrent_state is None else self._recurrent_state[rows]
        for step in range(self.num_steps):
            if masks is not None:
                arrays["action_mask"][step] = envs.action_mask
                mask = masks[step].to(device)
            if starts is not None:
                arrays["episode_start"][step] = is_first
                start = starts[step].to(device)
            observation = inputs[step]
            if device.type != "cpu":
                observation = tree_map(lambda leaf: leaf.to(device), observation)
            taken = policy.act(observation, drawn[step], mask, state, start, actor=actor)
            steps.append(taken)
            envs.step_async(to_numpy(taken.action))
            yield
            after = envs.step_wait()
            reward[step], terminated[step], truncated[step] = after.reward, after.terminated, after.truncated
            if after.valid is not None:
                valid[step] = after.valid
            if after.life_lost is not None:
                terminated[step] |= after.life_lost
            state, is_first = taken.state, after.is_first
            if after.final_observation is not None:
                ended, outcome = after.done_indices, after.success_failure
                finished.append(
                    FinishedEpisodes(
                        np.full(len(ended), step),
                        ended + rows.start,
                        after.final_observation,
                        None if state is None else state[torch.from_numpy(ended)],
                        np.full((len(ended), 2), np.nan) if outcome is None else outcome,
                    )
                )
            write_step(stored, step + 1, after.observation)
        self._is_first[rows] = is_first

    def _episode_ends(self, finished: list[FinishedEpisodes]) -> EpisodeEnds:
        def join(stored: Tensor, *final: Array) -> Tensor:
            converted = [to_tensor(leaf, stored.dtype).view(-1, *stored.shape[2:]) for leaf in final]
            return torch.cat([stored[0, :0], *converted])

        state, none = self._recurrent_state, np.zeros(0, np.int64)
        states = [one.recurrent_state for one in finished if one.recurrent_state is not None]
        return EpisodeEnds(
            torch.from_numpy(np.concatenate([none, *(one.step for one in finished)])),
            torch.from_numpy(np.concatenate([none, *(one.env for one in finished)])),
            tree_map(join, self.observations, *(one.observation for one in finished)),
            None if state is None else torch.cat([state[:0], *states]),
            torch.from_numpy(np.concatenate([np.zeros((0, 2)), *(one.success_failure for one in finished)])),
        )


class TensorCollector(Collector):
    """Steps a vector of tensors: no copies to numpy and no device synchronisation within a rollout.

    Args:
        envs: to step, already reset, whose vector gives tensors and resets in the same step.
        num_steps: T.
        observation_space: of one environment.
        device: where the policy is.
        compilation: whether a :class:`TensorEnv` and the policy take several steps in one compiled graph.
    """

    MAX_UNROLLED = 16
    """Maximum steps of one graph: more gain little, and take long to compile."""

    def __init__(
        self,
        envs: VectorEnvAdapter,
        num_steps: int,
        observation_space: Space[Any],
        device: torch.device,
        *,
        compilation: Compilation,
    ) -> None:
        super().__init__(envs.tensor_observation, envs.num_envs, num_steps, observation_space, device)
        self.envs, self.device = envs, device
        self.final_observations = tree_map(lambda leaf: torch.zeros_like(leaf[1:]), self.observations)
        """[T, N, …] observations after each step."""
        self._graph: CompiledFunction | None = None
        self._policy: Policy | None = None
        self._act: Callable[..., Any] | None = None
        self.compilation = compilation
        self.uses_cuda_graphs = compilation.is_on(device) and device.type == "cuda"
        self.compiles = compilation.is_on(device) and self._can_compile(envs.env)

    @override
    def invalidate_graph(self) -> None:
        self._graph = None

    @override
    def _collect(self, policy: Policy, noise: Tensor) -> CollectedSteps:
        if self.compiles:
            env: Any = self.envs.env
            random = env.generator.get_state()
            try:
                return self._compiled(policy, noise)
            except CompilerError as error:
                self.compilation.report_eager("rollouts", error)
                self.compiles = False
                env.generator.set_state(random)
        return self._eager(policy, noise)

    def _can_compile(self, env: Any) -> bool:
        """Whether the vector behaves as its pure functions do."""
        if not isinstance(env, TensorEnv) or env.device != self.device:
            return False
        own = [name for name in ("step", "reset") if getattr(type(env), name) is not getattr(TensorEnv, name)]
        if own:
            self.compilation.report_eager("rollouts", f"{type(env).__name__} has {' and '.join(own)} of its own")
        return not own

    def _eager(self, policy: Policy, noise: Tensor) -> CollectedSteps:
        envs, distribution = self.envs, policy.distribution
        reward, terminated, truncated = (self.fields[key] for key in ("reward", "terminated", "truncated"))
        stored, final = unbind_tree(self.observations), unbind_tree(self.final_observations)
        drawn = noise.unbind()
        steps: list[PolicyOutput] = []
        outcomes: list[Tensor | None] = []
        act = partial(policy.act, actor=policy.fast_actor())
        if self.uses_cuda_graphs:
            act = self._act = self._act or CudaGraphCache(policy.act, policy)
        is_missing_final = torch.zeros((), dtype=torch.bool, device=self.device)
        for step in range(self.num_steps):
            taken = act(stored[step], drawn[step])
            steps.append(taken)
            after = envs.step_tensors(distribution.unflatten(distribution.to_env_action(taken.action)))
            reward[step].copy_(after.reward)
            terminated[step].copy_(after.terminated)
            truncated[step].copy_(after.truncated)
            if after.final_observation is not None:
                tree_map(Tensor.copy_, final[step], after.final_observation)
            else:
                is_missing_final |= (terminated[step] | truncated[step]).any()
            outcomes.append(after.success_failure)
            tree_map(Tensor.copy_, stored[step + 1], after.observation)
        if is_missing_final:
            raise EnvironmentFault(envs.missing_final_obs_message)
        return CollectedSteps(*stack_steps([steps]), self._episode_ends(outcomes))

    def _compiled(self, policy: Policy, noise: Tensor) -> CollectedSteps:
        env: Any = self.envs.env
        if self._graph is None or policy is not self._policy:
            self._graph = CompiledFunction(lambda *args: unrolled_steps(env, policy, *args), policy)
            self._policy = policy
        graph = self._graph
        sizes = range(min(self.MAX_UNROLLED, self.num_steps), 0, -1)
        size = next(size for size in sizes if self.num_steps % size == 0)
        reset_noise = env.reset_noise(self.num_steps)
        state, episode_step = env.state, env.episode_step
        actions, parameters, values = [], [], []
        stored = [self.observations, self.final_observations]
        stored += [self.fields[key] for key in ("reward", "terminated", "truncated")]
        graph.check_again()
        for chunk, (given, own) in enumerate(zip(noise.split(size), reset_noise.split(size), strict=True)):
            state, episode_step, results, action, *more = graph.repeat(state, episode_step, given, own)
            places = [tensor[chunk * size : (chunk + 1) * size] for tensor in stored]
            torch._foreach_copy_(places, results)  # pyright: ignore[reportPrivateImportUsage]
            actions.append(action)
            if more:
                parameters.append(more[0])
                values.append(more[1])
        env.state, env.episode_step = state, episode_step
        self.observations[-1] = env.observe(state)
        return CollectedSteps(
            tree_map(lambda *leaf: torch.cat(leaf), *actions),
            torch.cat(parameters) if parameters else None,
            torch.cat(values) if values else None,
            self._episode_ends([]),
        )

    def _episode_ends(self, outcomes: list[Tensor | None]) -> EpisodeEnds:
        step, env = (self.fields["terminated"] | self.fields["truncated"]).nonzero(as_tuple=True)
        outcome = torch.full((len(step), 2), torch.nan, dtype=torch.float64)
        if any(one is not None for one in outcomes):
            unknown = torch.full((self.num_envs, 2), torch.nan, device=self.device)
            table = torch.stack([unknown if one is None else one for one in outcomes])
            outcome = table[step, env].double().cpu()
        return EpisodeEnds(step, env, tree_map(lambda leaf: leaf[step, env], self.final_observations), None, outcome)


def unrolled_steps(
    env: TensorEnv, policy: Policy, state: Tensor, episode_step: Tensor, noise: Tensor, reset_noise: Tensor
) -> tuple[Any, ...]:
    """K steps of environments and policy, for one graph: state, and the rollout's entries [K, N, …]."""
    steps, actions, parameters, values = [], [], [], []
    for given, own in zip(noise.unbind(), reset_noise.unbind(), strict=True):
        observation = env.observe(state)
        taken = policy.act(observation, given)
        after = env.functional_step(state, episode_step, policy.distribution.to_env_action(taken.action), own)
        state, episode_step = after.state, after.episode_step
        steps.append((observation, after.final_observation, after.reward, after.terminated, after.truncated))
        actions.append(taken.action)
        if taken.value is not None:
            parameters.append(taken.parameters)
            values.append(taken.value)
    kept = [torch.stack(column) for column in zip(*steps, strict=True)]
    both = (torch.stack(parameters), torch.stack(values)) if values else ()
    return state, episode_step, kept, stack(actions), *both


def stack_steps(groups: list[list[PolicyOutput]]) -> tuple[Tree, Tensor | None, Tensor | None]:
    """Actions [T, N, …], and parameters [T, N, P] and values [T, N] where acting computed values.

    Args:
        groups: T steps of each group of environments.
    """
    action = _join([stack([step.action for step in steps]) for steps in groups])
    if groups[0][0].value is None:
        return action, None, None
    parameters = _join([torch.stack([step.parameters for step in steps]) for steps in groups])
    return action, parameters, _join([stack([step.value for step in steps]) for steps in groups])


def _join(groups: list[Tree]) -> Tree:
    """Trees of tensors [T, n, …] of all groups as one [T, N, …]."""
    return groups[0] if len(groups) == 1 else tree_map(lambda *leaf: torch.cat(leaf, 1), *groups)


def write_step(arrays: Tree, step: int, values: Tree) -> None:
    """Write arrays [N, …] into those of all steps [T, N, …]."""
    if isinstance(arrays, dict):
        for name, array in arrays.items():
            write_step(array, step, values[name])
    elif arrays.dtype == np.uint8 and arrays.ndim == 5:
        # Images, whose layout changes in the copy: torch is three times as fast at it.
        torch.from_numpy(arrays)[step].copy_(torch.from_numpy(np.ascontiguousarray(values)))
    else:
        arrays[step] = values


def unbind_tree(tree: Tree) -> list[Tree]:
    """The tree of each step, of a tree of tensors [T, …]."""
    if not isinstance(tree, dict):
        return list(tree.unbind())
    return [dict(zip(tree, leaf, strict=True)) for leaf in zip(*(leaf.unbind() for leaf in tree.values()), strict=True)]


def check_finite(observations: Tree, reward: Tensor, ends: EpisodeEnds) -> None:
    """Refuse values that are not finite, before anything is computed from them.

    Args:
        observations: [T + 1, N, …].
        reward: [T, N]
        ends: final observations.

    Raises:
        EnvironmentFault: an observation or reward is not finite.
    """
    for tree, key in [(observations, "observation"), (reward, "reward")]:
        for name, tensor in tree.items() if isinstance(tree, Mapping) else [("", tree)]:
            if tensor.is_floating_point() and not tensor.isfinite().all():
                step, index = (~tensor.isfinite()).nonzero()[0, :2].tolist()
                raise _not_finite(f"{key} {name}".strip(), index, step, tensor[step, index])
    tree = ends.observation
    for name, leaf in tree.items() if isinstance(tree, Mapping) else [("", tree)]:
        if leaf.is_floating_point() and not leaf.isfinite().all():
            row = int((~leaf.isfinite()).flatten(1).any(1).nonzero()[0])
            key = f"final observation {name}".strip()
            raise _not_finite(key, int(ends.env[row]), int(ends.step[row]), leaf[row])


def warn_of_bounds(observations: Tree, observation_space: Space[Any]) -> None:
    """Warn of an observation [T, N, …] outside of its space, which is used unchanged."""
    for name, leaf in flatten_spaces(observation_space).items():
        if not isinstance(leaf, Box) or leaf.dtype == np.uint8:  # for other spaces that is an error
            continue
        rows = observations[name] if name else observations
        low, high = (to_tensor(bound, rows.dtype).to(rows.device) for bound in (leaf.low, leaf.high))
        outside = (rows < low) | (rows > high)
        if outside.any():
            step, index = outside.nonzero()[0, :2].tolist()
            rank_zero_warn(
                f"environment {index} returned an observation {name and name + ' '}outside of {leaf} at step {step} of the "
                f"first rollout: {rows[step, index].cpu().numpy()}; nothing is clipped: correct the environment or its "
                "observation_space"
            )


def _not_finite(key: str, index: int, step: int, value: Tensor) -> EnvironmentFault:
    return EnvironmentFault(
        f"environment {index} returned a {key} that is not finite at step {step} of the rollout: {value.cpu().numpy()}; "
        "no parameter was changed: correct the environment, or clip there what it divides by or takes the logarithm of"
    )
