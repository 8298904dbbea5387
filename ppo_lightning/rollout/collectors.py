"""Collectors of a rollout's steps: by Gymnasium's arrays, by tensors, or several steps in one compiled graph."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ppo_lightning.compiler import CompilerError, CudaGraphCache, compile_function
from ppo_lightning.envs import Environments, Halves, TensorEnv
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.policy import Policy, PolicyOutput, stack
from ppo_lightning.spaces import Array, Tree, empty, flatten_spaces, to_tensor, tree_map


class Ends(NamedTuple):
    """Episodes that ended in a rollout, by step, then environment."""

    step: Tensor
    """[E]"""
    env: Tensor
    """[E]"""
    observation: Tree
    """[E, …] their last observations, as a rollout stores them; empty where no episode ended."""
    state: Tensor | None
    """[E, S] recurrent state at their end."""
    outcome: Tensor
    """[E, 2] float64, success and failure: 1 or 0 where the environment reports it, else NaN."""


class Steps(NamedTuple):
    """T steps of N environments."""

    action: Tree
    """[T, N, …]"""
    parameters: Tensor | None
    """[T · N, P] of the actions' distributions, where acting computed values, too."""
    value: Tensor | None
    """[T · N]"""
    states: Tensor | None
    """[T, N, S] recurrent state before each step."""
    ends: Ends
    state: Tensor | None
    """[N, S] recurrent state after the last step."""
    begun: Tensor | None
    """[N] bool, recurrent policies only: the observation after the last step is the first of an episode."""


class Stepper(ABC):
    """Takes T steps at a time, and writes the transitions into tensors that are allocated once.

    Args:
        environments: to step, already reset.
        num_steps: T.
        observation_space: of one environment, without its action mask.
        device: where the tensors are.
    """

    def __init__(
        self,
        environments: Environments | Halves,
        num_steps: int,
        observation_space: Space[Any],
        device: torch.device,
    ) -> None:
        self.num_envs, self.num_steps = environments.num_envs, num_steps
        num_envs = self.num_envs
        # One more observation than steps: the next rollout starts from the last.
        spaces = {
            name: empty(leaf, num_steps + 1, num_envs, device=device)
            for name, leaf in flatten_spaces(observation_space).items()
        }
        self.observations: Tree = spaces[""] if list(spaces) == [""] else spaces
        """[T + 1, N, …]"""
        self.rows = {
            "reward": torch.empty(num_steps, num_envs, device=device),
            "terminated": torch.empty(num_steps, num_envs, dtype=torch.bool, device=device),
            "truncated": torch.empty(num_steps, num_envs, dtype=torch.bool, device=device),
            "valid": torch.ones(num_steps, num_envs, dtype=torch.bool, device=device),
        }
        """Each [T, N, …], under a rollout's names."""

    def state(self) -> dict[str, Any]:
        """State from which the next rollout begins, besides the environments' own."""
        return {"observation": tree_map(lambda leaf: leaf[-1].cpu().clone(), self.observations)}

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Begin the next rollout from the state of :meth:`state`."""

    @abstractmethod
    def take(self, policy: Policy, noise: Tensor | None) -> Steps:
        """Take T steps.

        Args:
            policy: acts.
            noise: [T, N, Z] from which actions are sampled.

        Raises:
            EnvironmentFault: an environment failed, or an observation or reward is not finite.
        """


class ArrayStepper(Stepper):
    """Steps any vector through numpy arrays, which share memory with the rollout's tensors.

    Args:
        environments: what to step.
        first: [N, …] their first observations.
        num_steps: T.
        observation_space: of one environment, without its action mask.
        state_size: S of the recurrent state, 0 without.
        device: where the policy is.
    """

    def __init__(
        self,
        environments: Environments | Halves,
        first: Tree,
        num_steps: int,
        observation_space: Space[Any],
        state_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(environments, num_steps, observation_space, torch.device("cpu"))
        num_envs, self.device, self.state_size = environments.num_envs, device, state_size
        if state_size:
            self.rows["episode_start"] = torch.empty(num_steps, num_envs, dtype=torch.bool)
        if environments.action_mask is not None:
            self.rows["action_mask"] = torch.empty(num_steps, *environments.action_mask.shape, dtype=torch.bool)
        self._no_state = torch.zeros(0, state_size, device=device)
        self.parts: list[Part] = []
        for own, place in environments.parts:
            state = torch.zeros(own.num_envs, state_size, device=device) if state_size else None
            observation = tree_map(lambda leaf, place=place: leaf[place], first)
            self.parts.append(Part(own, place, observation, np.ones(own.num_envs, dtype=bool), state))

    @override
    def state(self) -> dict[str, Any]:
        begun = np.concatenate([part.begun for part in self.parts])
        memory = [part.state for part in self.parts if part.state is not None]
        return {
            **super().state(),
            "begun": torch.from_numpy(begun),
            "memory": torch.cat(memory).cpu() if memory else None,
        }

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        for part in self.parts:
            part.observation = tree_map(lambda leaf, at=part.place: leaf[at].numpy(), state["observation"])
            part.begun = state["begun"][part.place].numpy()
            if part.state is not None:
                part.state = state["memory"][part.place].to(self.device)

    @override
    def take(self, policy: Policy, noise: Tensor | None) -> Steps:
        distribution, actor = policy.distribution, policy.fast_actor()
        arrays = tree_map(Tensor.numpy, self.observations)
        finals: list[Final] = []
        for part in self.parts:
            part.begin(self.rows, arrays, self.observations, noise)
        step = 0
        try:
            # One part steps while the policy acts for the next.
            for step in range(self.num_steps):
                for part in self.parts:
                    if step:
                        part.receive(step - 1, finals)
                    part.observe(step)
                    taken = policy.act(*part.seen(step, self.device), actor=actor)
                    part.send(taken, distribution.to_numpy(taken.action))
            step = self.num_steps
            for part in self.parts:
                part.receive(step - 1, finals)
                part.observe(step)
        except EnvironmentFault:
            # An environment may fail on what its own NaN caused.
            steps = max(step - 1, 0)
            check_finite(self.observations, self.rows["reward"], self._ends(finals), steps + 1, steps)
            raise
        ends = self._ends(finals)
        check_finite(self.observations, self.rows["reward"], ends, self.num_steps + 1, self.num_steps)
        joined = [part.end() for part in self.parts]
        if len(joined) == 1:
            action, parameters, value, states, state, begun = joined[0]
        else:
            actions, *others = zip(*joined, strict=True)
            action = tree_map(lambda *leaf: torch.cat(leaf, 1), *actions)
            parameters, value, states = (None if one[0] is None else torch.cat(one, 1) for one in others[:3])
            state, begun = (None if one[0] is None else torch.cat(one) for one in others[3:])
        return Steps(
            action,
            None if parameters is None else parameters.flatten(0, 1),
            None if value is None else value.flatten(),
            states,
            ends,
            state,
            begun,
        )

    def _ends(self, finals: list["Final"]) -> Ends:
        def joined(rows: Tensor, *last: Array) -> Tensor:
            given = [to_tensor(leaf, rows.dtype).view(-1, *rows.shape[2:]) for leaf in last]
            return torch.cat([rows[0, :0], *given])

        nothing = [
            np.full((len(final.ended), 2), np.nan) if final.outcome is None else final.outcome for final in finals
        ]
        return Ends(
            torch.from_numpy(
                np.repeat([final.step for final in finals], [len(final.ended) for final in finals])
            ).long(),
            torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(final.ended for final in finals)])),
            tree_map(joined, self.observations, *(final.observation for final in finals)),
            torch.cat([final.state for final in finals if final.state is not None] or [self._no_state])
            if self.state_size
            else None,
            torch.from_numpy(np.concatenate([np.zeros((0, 2)), *nothing])),
        )


class Part:
    """Environments that step together, and the policy's inputs from them.

    Args:
        environments: of this part.
        place: which of all environments they are.
        observation: [n, …] their current observations.
        begun: [n] bool, the observation is the first of an episode.
        state: [n, S] recurrent state.
    """

    def __init__(
        self, environments: Environments, place: slice, observation: Tree, begun: Array, state: Tensor | None
    ) -> None:
        self.environments, self.place = environments, place
        self.observation, self.begun, self.state = observation, begun, state

    def begin(self, rows: dict[str, Tensor], arrays: Tree, observations: Tree, noise: Tensor | None) -> None:
        """Prepare a rollout: views of the tensors that each step reads and writes."""
        own = {key: tensor[:, self.place] for key, tensor in rows.items()}
        self._rows = {key: tensor.numpy() for key, tensor in own.items()}
        self._masks, self._starts = own.get("action_mask"), own.get("episode_start")
        self._observations = tree_map(lambda leaf: leaf[:, self.place], arrays)
        self._observed = _by_step(tree_map(lambda leaf: leaf[:, self.place], observations))
        self._noise = None if noise is None else noise[:, self.place].unbind()
        self._reward, self._terminated, self._truncated, self._valid = (
            self._rows[key] for key in ("reward", "terminated", "truncated", "valid")
        )
        self.taken: list[PolicyOutput] = []
        self.states: list[Tensor] = []

    def observe(self, step: int) -> None:
        """Store the current observation."""
        _put(self._observations, step, self.observation)

    def seen(self, step: int, device: torch.device) -> tuple[Any, ...]:
        """The policy's inputs: observation, noise, mask, recurrent state, and whether an episode begins."""
        mask = start = None
        if self._masks is not None:
            self._rows["action_mask"][step] = self.environments.action_mask
            mask = self._masks[step].to(device)
        if self._starts is not None and self.state is not None:
            self._rows["episode_start"][step] = self.begun
            start = self._starts[step].to(device)
            self.states.append(self.state)
        seen = self._observed[step]
        if device.type != "cpu":
            seen = tree_map(lambda leaf: leaf.to(device), seen)
        return seen, None if self._noise is None else self._noise[step], mask, self.state, start

    def send(self, taken: PolicyOutput, action: Any) -> None:
        """Let the environments step."""
        self.taken.append(taken)
        self.state = taken.state
        self.environments.send(action)

    def receive(self, step: int, finals: list["Final"]) -> None:
        """Store the result of the step."""
        after = self.environments.receive()
        self._reward[step], self._terminated[step], self._truncated[step] = (
            after.reward,
            after.terminated,
            after.truncated,
        )
        if after.valid is not None:
            self._valid[step] = after.valid
        if after.life_lost is not None:
            self._terminated[step] |= after.life_lost
        if after.final_observation is not None:
            state = None if self.state is None else self.state[torch.from_numpy(after.ended)]
            ended = after.ended + self.place.start
            finals.append(Final(step, ended, after.final_observation, state, after.outcome))
        self.observation, self.begun = after.observation, after.begun

    def end(self) -> tuple[Any, ...]:
        """Actions [T, n, …], parameters [T, n, P], values [T, n], recurrent state before each step and after the last."""
        joint = self.taken[0].value is not None
        return (
            stack([step.action for step in self.taken]),
            torch.stack([step.parameters for step in self.taken]) if joint else None,
            torch.stack([step.value for step in self.taken if step.value is not None]) if joint else None,
            torch.stack(self.states) if self.states else None,
            self.state,
            None if self.state is None else torch.from_numpy(self.begun),
        )


class Final(NamedTuple):
    """Episodes that ended at one step."""

    step: int
    ended: Array
    """[E] indices of environments."""
    observation: Tree
    """[E, …] their last observations, numpy."""
    state: Tensor | None
    """[E, S] recurrent state at their end."""
    outcome: Array | None
    """[E, 2]"""


class TensorStepper(Stepper):
    """Steps a vector of tensors: no copies to numpy and no device synchronisation within a rollout.

    Args:
        environments: to step, whose vector gives tensors and resets in the same step.
        num_steps: T.
        observation_space: of one environment.
        device: where the policy is.
        compiles: a :class:`TensorEnv` and the policy take several steps in one compiled graph.
    """

    CHUNK = 16
    """Maximum steps of one graph: more gain little, and take long to compile."""

    def __init__(
        self,
        environments: Environments,
        num_steps: int,
        observation_space: Space[Any],
        device: torch.device,
        *,
        compiles: bool,
    ) -> None:
        super().__init__(environments, num_steps, observation_space, device)
        self.environments, self.device = environments, device
        self.finals = tree_map(lambda leaf: torch.zeros_like(leaf[1:]), self.observations)
        """[T, N, …] observations after each step."""
        self._observation = environments.tensors
        self._graph: Callable[..., Any] | None = None
        self._policy: Policy | None = None
        self._act: Callable[..., Any] | None = None
        self.captures = compiles and device.type == "cuda"
        self.compiles = compiles and self._is_pure(environments.env)

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._observation = tree_map(lambda leaf: leaf.to(self.device), state["observation"])

    def forget_graph(self) -> None:
        """Recompile the steps after the environments have changed, which a captured graph would not see."""
        self._graph = None

    @override
    def take(self, policy: Policy, noise: Tensor | None) -> Steps:
        if self.compiles:
            env: Any = self.environments.env
            random = env.generator.get_state()
            try:
                return self._compiled(policy, noise)
            except CompilerError as error:
                rank_zero_warn(f"compile: true has no effect on rollouts, since {error}")
                self.compiles = False
                env.generator.set_state(random)
        return self._eager(policy, noise)

    def _is_pure(self, env: Any) -> bool:
        """Whether the vector behaves as its pure functions do."""
        if not isinstance(env, TensorEnv) or env.device != self.device:
            return False
        own = [name for name in ("step", "reset") if getattr(type(env), name) is not getattr(TensorEnv, name)]
        if own:
            rank_zero_warn(
                f"compile: true has no effect on rollouts, since {type(env).__name__} has {' and '.join(own)} of its own"
            )
        return not own

    def _eager(self, policy: Policy, noise: Tensor | None) -> Steps:
        environments, distribution = self.environments, policy.distribution
        reward, terminated, truncated = (self.rows[key] for key in ("reward", "terminated", "truncated"))
        observed, finals = _by_step(self.observations), _by_step(self.finals)
        drawn = [None] * self.num_steps if noise is None else noise.unbind()
        taken: list[PolicyOutput] = []
        outcomes: list[Tensor | None] = []
        act = partial(policy.act, actor=policy.fast_actor())
        if self.captures and noise is not None:
            self._act = self._act or CudaGraphCache(policy.act, policy)
            act = self._act
        lacking = torch.zeros((), dtype=torch.bool, device=self.device)
        for step in range(self.num_steps):
            _copy(observed[step], self._observation)
            taken.append(act(observed[step], drawn[step]))
            after = environments.step_tensors(distribution.unflatten(distribution.to_env_action(taken[-1].action)))
            reward[step].copy_(after.reward)
            terminated[step].copy_(after.terminated)
            truncated[step].copy_(after.truncated)
            if after.final_observation is not None:
                _copy(finals[step], after.final_observation)
            else:
                lacking |= (terminated[step] | truncated[step]).any()
            outcomes.append(after.outcome)
            self._observation = after.observation
        _copy(observed[self.num_steps], self._observation)
        if lacking:
            raise EnvironmentFault(environments.lacks_final_observation)
        return self._steps(stack([one.action for one in taken]), *_joined(taken), outcomes)

    def _compiled(self, policy: Policy, noise: Tensor | None) -> Steps:
        env: Any = self.environments.env
        if self._graph is None or policy is not self._policy:
            self._graph = compile_function(lambda *args: _several(env, policy, *args), policy)
            self._policy = policy
        graph = self._graph
        size = next(size for size in range(min(self.CHUNK, self.num_steps), 0, -1) if self.num_steps % size == 0)
        uniform = env.uniform(self.num_steps)
        state, elapsed = env.state, env.elapsed
        drawn = [None] * (self.num_steps // size) if noise is None else noise.split(size)
        actions, parameters, values = [], [], []
        rows = [self.observations, self.finals, *(self.rows[key] for key in ("reward", "terminated", "truncated"))]
        for chunk, (given, own) in enumerate(zip(drawn, uniform.split(size), strict=True)):
            state, elapsed, kept, action, *more = graph(state, elapsed, given, own)
            places = [tensor[chunk * size : (chunk + 1) * size] for tensor in rows]
            torch._foreach_copy_(places, kept)  # pyright: ignore[reportPrivateImportUsage]
            actions.append(action)
            if more:
                parameters.append(more[0])
                values.append(more[1])
        env.state, env.elapsed = state, elapsed
        self.observations[-1] = env.observe(state)
        return self._steps(
            tree_map(lambda *leaf: torch.cat(leaf), *actions),
            torch.cat(parameters).flatten(0, 1) if parameters else None,
            torch.cat(values).flatten() if values else None,
            [None] * self.num_steps,
        )

    def _steps(
        self, action: Tree, parameters: Tensor | None, value: Tensor | None, outcomes: list[Tensor | None]
    ) -> Steps:
        step, env = (self.rows["terminated"] | self.rows["truncated"]).nonzero(as_tuple=True)
        outcome = torch.full((len(step), 2), torch.nan, dtype=torch.float64)
        if any(one is not None for one in outcomes):
            unknown = torch.full((self.num_envs, 2), torch.nan, device=self.device)
            table = torch.stack([unknown if one is None else one for one in outcomes])
            outcome = table[step, env].double().cpu()
        ends = Ends(step, env, tree_map(lambda leaf: leaf[step, env], self.finals), None, outcome)
        check_finite(self.observations, self.rows["reward"], ends, self.num_steps + 1, self.num_steps)
        return Steps(action, parameters, value, None, ends, None, None)


def _several(
    env: TensorEnv, policy: Policy, state: Tensor, elapsed: Tensor, noise: Tensor | None, uniform: Tensor
) -> tuple[Any, ...]:
    """K steps of environments and policy, for one graph: state, and the rollout's entries [K, N, …]."""
    steps, actions, parameters, values = [], [], [], []
    for step, own in enumerate(uniform.unbind()):
        observation = env.observe(state)
        taken = policy.act(observation, None if noise is None else noise[step])
        after = env.advance(state, elapsed, policy.distribution.to_env_action(taken.action), own)
        state, elapsed = after.state, after.elapsed
        steps.append((observation, after.final_observation, after.reward, after.terminated, after.truncated))
        actions.append(taken.action)
        if taken.value is not None:
            parameters.append(taken.parameters)
            values.append(taken.value)
    kept = [torch.stack(column) for column in zip(*steps, strict=True)]
    both = (torch.stack(parameters), torch.stack(values)) if values else ()
    return state, elapsed, kept, stack(actions), *both


def _joined(taken: list[PolicyOutput]) -> tuple[Tensor | None, Tensor | None]:
    """Parameters [T · N, P] and values [T · N], where acting computed both."""
    values = [step.value for step in taken if step.value is not None]
    return (torch.cat([step.parameters for step in taken]), torch.cat(values)) if values else (None, None)


def _put(rows: Tree, step: int, values: Tree) -> None:
    if isinstance(rows, dict):
        for name, row in rows.items():
            _put(row, step, values[name])
    elif (
        rows.dtype == np.uint8 and rows.ndim == 5
    ):  # images, whose layout changes in the copy: torch is three times as fast at it
        torch.from_numpy(rows)[step].copy_(torch.from_numpy(np.ascontiguousarray(values)))
    else:
        rows[step] = values


def _copy(row: Tree, values: Tree) -> None:
    if isinstance(row, dict):
        for name, leaf in row.items():
            leaf.copy_(values[name])
    else:
        row.copy_(values)


def _by_step(rows: Tree) -> list[Tree]:
    """The tree of each step, of a tree of tensors [T, …]."""
    if isinstance(rows, dict):
        return [
            dict(zip(rows, leaf, strict=True)) for leaf in zip(*(row.unbind() for row in rows.values()), strict=True)
        ]
    return list(rows.unbind())


def check_finite(observations: Tree, reward: Tensor, ends: Ends, num_observations: int, num_steps: int) -> None:
    """Refuse values that are not finite, before anything is computed from them.

    Raises:
        EnvironmentFault: an observation or reward is not finite.
    """
    for tree, key, rows in [(observations, "observation", num_observations), (reward, "reward", num_steps)]:
        for name, tensor in tree.items() if isinstance(tree, Mapping) else [("", tree)]:
            tensor = tensor[:rows]
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
