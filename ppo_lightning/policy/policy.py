"""From the environment's observations to the rollout's actions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from gymnasium import Space
from gymnasium.spaces import Box
from tensordict import TensorDict
from torch import Tensor, nn
from typing_extensions import override

from ppo_lightning.errors import InputError
from ppo_lightning.parameters import PopArt, calling, shown
from ppo_lightning.policy.distributions import ActionDistribution, action_distribution
from ppo_lightning.policy.moments import RunningMoments, ValueNormalizer
from ppo_lightning.spaces import Tree, example, flatten_spaces, is_image, signature, tensor_spec, tree_map

Network = Callable[[Space[Any], Space[Any]], nn.Module]
"""(observation_space, action_space) -> module whose forward maps features [B, …] to (parameters [B, P], values [B])."""

CLIP = 10.0  # normalised observations and rewards are clipped at ±10 (Huang et al. 2022, continuous details 7 and 9)


class Policy(nn.Module):
    """Observation encoding, running normalisation, the network, and the distribution over actions.

    Args:
        observation_space: of one environment, without its action mask.
        action_space: of one environment.
        network: makes the network. Its ``forward`` returns distribution parameters [B, P] and values [B]. Where it also
            has methods ``actor`` (parameters alone) and ``critic`` (values alone), acting and bootstrapping use those;
            an attribute ``shared: true`` declares that values are nearly free with the parameters.
            An attribute ``distribution`` defines the parameters; without it they are logits, or means and log standard
            deviations. An attribute ``state_size`` above 0 declares a recurrent network, whose
            ``forward`` takes observations [L, B, …], the state [B, S] before them and the flags [L, B] that an
            episode starts there, and returns parameters [L, B, P], values [L, B] and the state after them.
        normalize_observation: subtract the running mean of observations and divide by their standard deviation; numeric
            parts only, neither images nor one-hot codes.
        popart: how value targets are normalised, if they are.

    Raises:
        InputError: a space is not supported, or the network's output does not fit it.
    """

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        network: Network,
        normalize_observation: bool,
        popart: PopArt | None = None,
    ) -> None:
        super().__init__()
        for space in (observation_space, action_space):
            signature(space)  # refuses unsupported ones before anything is built
        spaces = flatten_spaces(observation_space)
        self.encoders = {name: tensor_spec(leaf).encode for name, leaf in spaces.items()}
        self.normalized: dict[str, slice] = {}
        """Where in the moments those parts of an observation are that are normalised."""
        size = 0
        for name, leaf in spaces.items() if normalize_observation else ():
            if isinstance(leaf, Box) and not is_image(leaf):
                own = math.prod(tensor_spec(leaf).feature_shape)
                self.normalized[name], size = slice(size, size + own), size + own
        if normalize_observation and not size:
            raise InputError(
                "normalize_observation needs an observation with a Box of numbers, this environment's is "
                f"{observation_space!r}: turn it off"
            )
        self.moments = RunningMoments((size,)) if size else None
        self.value_normalizer = None if popart is None else ValueNormalizer(popart.beta)
        self.network = _make_network(network, observation_space, action_space)
        name = type(self.network).__name__
        own = getattr(self.network, "distribution", None)
        if not isinstance(own, ActionDistribution | None):
            raise InputError(
                f"the network {name} has a distribution that is a {type(own).__name__}: make it by "
                "ppo_lightning.action_distribution(action_space, …)"
            )
        self.distribution = own or action_distribution(action_space)
        self.state_size = getattr(self.network, "state_size", 0)
        if type(self.state_size) is not int or self.state_size < 0:
            raise InputError(
                f"the network {name} has a state_size of {shown(self.state_size)}: it must be a whole number of 0 or more"
            )
        # Layers may well be called actor and critic; only methods of the network's class compute one head alone.
        methods = [getattr(type(self.network), head, None) for head in ("actor", "critic")]
        self._has_separate_heads = all(map(callable, methods))
        shared = getattr(self.network, "shared", False) is True
        self.value_with_action = bool(self.state_size or not self._has_separate_heads or shared)
        """Acting computes the values, too: for recurrent policies, and where policy and value share layers."""
        self._spaces = observation_space, action_space
        self._check_network()

    def check_trainable(self) -> None:
        """Refuse a network that nothing can be learnt with.

        Raises:
            InputError: its outputs depend on none of its parameters that learn.
        """
        if not self.actor_critic_masks.any():
            raise InputError(
                f"the outputs of the network {type(self.network).__name__} depend on none of its parameters that learn: there "
                "is nothing to train"
            )

    def check_again(self) -> None:
        """Check the network as at construction, where modules were replaced, added or removed since.

        Raises:
            InputError: the network's output does not fit the spaces any more.
        """
        if [*map(id, self.parameters())] != [*map(id, self._checked)]:
            self._check_network()

    def _check_network(self) -> None:
        observation_space, action_space = self._spaces
        self._checked = list(self.parameters())
        """Parameters that :attr:`actor_critic_masks` is about."""
        device, name = self._checked[0].device, type(self.network).__name__
        samples = {key: torch.from_numpy(example(leaf)) for key, leaf in flatten_spaces(observation_space).items()}
        observation = {key: sample.expand(2, *sample.shape).to(device) for key, sample in samples.items()}
        try:
            # Without dropout, so that outputs can be compared; cuDNN has no gradient of recurrent layers in evaluation mode.
            with nullcontext() if self.state_size else in_eval_mode(self), torch.enable_grad():
                features = self.features(observation.get("", observation))
                if self.state_size:
                    features = tree_map(lambda leaf: leaf.unsqueeze(0), features)
                    start = torch.ones(1, 2, dtype=torch.bool, device=device)
                    state = torch.zeros(2, self.state_size, device=device)
                    parameters, value, state = self.network(features, state, start)
                    fits, parameters, value = state.shape == (2, self.state_size), parameters[0], value[0]
                else:
                    (parameters, value), fits = self.network(features), True
                    if self._has_separate_heads:
                        network: Any = self.network
                        alone = network.actor(features), network.critic(features)
                        fits = all(map(torch.allclose, alone, (parameters, value)))
                got = tuple(parameters.shape), tuple(value.shape)
                reached = [self._parameters_in_graph(output) for output in (parameters, self._value(value))]
        except Exception as error:
            raise InputError(
                f"the network {name} raised {type(error).__name__} on 2 observations of {signature(observation_space)}: "
                f"{error}"
            ) from error
        expected = (2, self.distribution.num_parameters)
        hint = "" if fits else "; its methods actor and critic must return what forward does"
        if self.state_size and not fits:
            hint = f"; a recurrent network also returns a state (2, {self.state_size})"
        if not (got == (expected, (2,)) and fits):
            raise InputError(
                f"the network {name} returned parameters {got[0]} and values {got[1]} for 2 observations, "
                f"{signature(action_space)} needs {expected} and (2,): change its output layers{hint}"
            )
        self.actor_critic_masks = torch.tensor(reached, dtype=torch.float32)
        """[2, P] 1 for each of the parameters that the action depends on, and for those that the value depends on."""

    def masks_of(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """[2, P] of :attr:`actor_critic_masks` for parameters of any order; 0 for those that are not the policy's."""
        columns = {
            id(one): column for one, column in zip(self._checked, self.actor_critic_masks.unbind(1), strict=True)
        }
        return torch.stack([columns.get(id(one), torch.zeros(2)) for one in parameters], 1)

    @property
    def critic_parameters(self) -> list[nn.Parameter]:
        """Those that the value depends on and the action does not."""
        acts, values = self.actor_critic_masks.bool().tolist()
        return [one for one, act, value in zip(self.parameters(), acts, values, strict=True) if value and not act]

    def _parameters_in_graph(self, output: Tensor) -> list[bool]:
        parameters = list(self.parameters())
        learnt = [one for one in parameters if one.requires_grad]
        if not output.requires_grad:
            return [False] * len(parameters)
        gradients = torch.autograd.grad(output.sum(), learnt, retain_graph=True, allow_unused=True)
        reached = {id(one) for one, gradient in zip(learnt, gradients, strict=True) if gradient is not None}
        return [id(one) in reached for one in parameters]

    def encode(self, observation: Tree) -> Tree:
        """Features of stored observations [B, …] before they are normalised."""
        if "" in self.encoders:
            return self.encoders[""](observation)
        return {name: encode(observation[name]) for name, encode in self.encoders.items()}

    def normalizable_features(self, observation: Tree) -> Tensor:
        """Features [B, D] of stored observations [B, …] before they are normalised: samples for the moments."""
        encoded = self.encode(observation)
        if "" in self.normalized:
            return encoded.flatten(1)
        return torch.cat([encoded[name].flatten(1) for name in self.normalized], -1)

    def features(self, observation: Tree) -> Tree:
        """Network inputs from stored observations [B, …]: numeric parts are normalised if enabled, clipped at ±10."""
        features = self.encode(observation)
        if self.moments is None:
            return features
        mean, factor = self.moments.mean.float(), (self.moments.variance.float() + 1e-8).rsqrt()
        if "" in self.normalized:
            return _normalized(features, mean, factor)
        for name, part in self.normalized.items():
            features[name] = _normalized(features[name], mean[part], factor[part])
        return features

    @override
    def forward(self, features: Tree) -> tuple[Tensor, Tensor]:
        """Distribution parameters [B, P] and values [B] of a feed-forward policy; float32 under autocast too."""
        parameters, value = self.network(features)
        return parameters.float(), self._value(value)

    def fast_actor(self) -> Callable[[Any], Tensor] | None:
        """What :meth:`actor` does, made once for many steps with the same parameters, where the network can make it."""
        make = getattr(self.network, "fast_actor", None)
        if self.value_with_action or make is None or "actor" in vars(self.network):
            return None
        return make()

    def actor(self, features: Tree) -> Tensor:
        """Distribution parameters [B, P] of a feed-forward policy."""
        network: Any = self.network
        return (network.actor(features) if self._has_separate_heads else network(features)[0]).float()

    def critic(self, features: Tree) -> Tensor:
        """Values [B], in (normalised) reward units, of a feed-forward policy."""
        network: Any = self.network
        return self._value(network.critic(features) if self._has_separate_heads else network(features)[1])

    def recurrent_step(self, features: Tree, state: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of a recurrent policy: parameters [B, P], values [B] and the state [B, S] after it.

        Args:
            features: [B, …].
            state: [B, S] before it.
            start: [B] bool, it is the first of an episode: the state is reset.
        """
        features = tree_map(lambda leaf: leaf.unsqueeze(0), features)
        parameters, value, state = self.network(features, state, start.unsqueeze(0))
        return parameters[0].float(), self._value(value[0]), state

    def _value(self, output: Tensor) -> Tensor:
        return output.float() if self.value_normalizer is None else self.value_normalizer(output.float())

    def evaluate_actions(self, batch: TensorDict | Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of stored actions, entropy, and value as the loss compares it, each like the batch.

        Args:
            batch: [B], or recurrent sequences [B, L]: ``observation`` as :meth:`features`, ``action``, and where there
                are any ``action_mask``, ``recurrent_state`` and ``episode_start``.
        """
        action, mask = batch["action"], batch.get("action_mask", None)
        if not self.state_size:
            parameters, output = self.network(batch["observation"])
            return self._evaluate(parameters, output, action, mask)
        features, state, start = _network_inputs(batch)
        parameters, output, _ = self.network(features, state, start)
        parameters, output = parameters.transpose(0, 1).flatten(0, 1), output.T.flatten()
        action = tree_map(lambda leaf: leaf.flatten(0, 1), action)
        scores = self._evaluate(parameters, output, action, None if mask is None else mask.flatten(0, 1))
        log_prob, entropy, value = (score.view(start.T.shape) for score in scores)
        return log_prob, entropy, value

    def _evaluate(
        self, parameters: Tensor, output: Tensor, action: Tree, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters, output = self._masked(parameters.float(), mask), output.float()
        value = output if self.value_normalizer is None else self.value_normalizer.normalized_value(output)
        return *self.distribution.log_prob_and_entropy(parameters, action), value

    def latent(self, batch: TensorDict | Mapping[str, Any]) -> Tensor:
        """The last hidden features of the network's actor, [B, H], or [B, L, H] of sequences.

        Args:
            batch: as of :meth:`evaluate_actions`.

        Raises:
            InputError: the network has no method ``latent``.
        """
        latent = getattr(self.network, "latent", None)
        if latent is None:
            raise InputError(
                f"evaluate.latent needs a method latent(features) -> [B, H], which the network {type(self.network).__name__} "
                "does not have: add it"
            )
        if not self.state_size:
            return latent(batch["observation"])
        return latent(*_network_inputs(batch)).transpose(0, 1)

    def log_prob_and_value(self, observation: Tree, action: Tree, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B] of stored actions, and values [B] in (normalised) reward units, of a feed-forward policy."""
        parameters, value = self(self.features(observation))
        return self.distribution.log_prob_and_entropy(self._masked(parameters, mask), action)[0], value

    def _masked(self, parameters: Tensor, mask: Tensor | None) -> Tensor:
        return parameters if mask is None else self.distribution.apply_mask(parameters, mask)

    def std(self, row: TensorDict) -> Tensor | None:
        """Standard deviations [N, d] of actions after one step [N] of a rollout; None where there are none."""
        features = self.features(row["observation"])
        if not self.state_size:
            return self.distribution.std(self.actor(features))
        return self.distribution.std(self.recurrent_step(features, row["recurrent_state"], row["episode_start"])[0])

    def act(
        self,
        observation: Tree,
        noise: Tensor | None,
        mask: Tensor | None = None,
        state: Tensor | None = None,
        start: Tensor | None = None,
        actor: Callable[[Any], Tensor] | None = None,
    ) -> "PolicyOutput":
        """Choose actions for stored observations.

        Args:
            observation: [B, …].
            noise: what draws the actions, [B, Z]; None takes the most probable ones.
            mask: [B, M] bool, what is allowed; None is everything.
            state: [B, S] of a recurrent policy.
            start: [B] bool, the observation is the first of an episode.
            actor: what :meth:`fast_actor` made.
        """
        features, value = self.features(observation), None
        if state is not None and start is not None:
            parameters, value, state = self.recurrent_step(features, state, start)
        elif self.value_with_action:
            parameters, value = self(features)
        else:
            parameters = self.actor(features) if actor is None else actor(features).float()
        parameters = self._masked(parameters, mask)
        return PolicyOutput(self.distribution.sample(parameters, noise), parameters, value, state)


def _with_descendants(module: nn.Module) -> Iterator[nn.Module]:
    """What ``modules()`` gives, in less time: acting on one observation asks for it in every call."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _with_descendants(child)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore each submodule's mode afterwards.

    Where no submodule has a way of its own to do so, the flags are written directly: ``eval()`` takes longer than a small
    network's action.
    """
    training = [one for one in _with_descendants(module) if one.training]
    if all(_has_plain_mode(one) for one in training):
        flags = [vars(one) for one in training]
        for own in flags:
            own["training"] = False
        try:
            yield
        finally:
            for own in flags:
                own["training"] = True
    else:
        module.eval()
        try:
            yield
        finally:
            for one in training:
                one.training = True


def _has_plain_mode(module: nn.Module) -> bool:
    """Whether its mode is torch's flag: scripted modules keep theirs elsewhere, others override ``train`` or ``eval``."""
    kind = type(module)
    return kind.train is nn.Module.train and kind.eval is nn.Module.eval and "training" in vars(module)


def _make_network(network: Network, observation_space: Space[Any], action_space: Space[Any]) -> nn.Module:
    if isinstance(network, nn.Module | str) or not callable(network):
        raise InputError(f"policy must be a callable (observation_space, action_space) -> module, got {network!r}")
    with calling("policy", "(observation_space, action_space)"):
        made = network(observation_space, action_space)
    if not isinstance(made, nn.Module) or not any(one.requires_grad for one in made.parameters()):
        raise InputError(
            f"policy made a {type(made).__name__}: it must return a torch.nn.Module with parameters to learn"
        )
    return made


class PolicyOutput(NamedTuple):
    """What a policy did at one step of B environments."""

    action: Tree
    """[B, …] as a rollout keeps it."""
    parameters: Tensor
    """[B, P] of the distribution that it was drawn from."""
    value: Tensor | None
    """[B], where the network gave it on the way."""
    state: Tensor | None
    """[B, S] recurrent state after the step."""


def _normalized(features: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    shape = features.shape[1:]
    return ((features - mean.view(shape)) * factor.view(shape)).clamp_(-CLIP, CLIP)


def _network_inputs(batch: TensorDict | Mapping[str, Any]) -> tuple[Tree, Tensor, Tensor]:
    """Observations [L, B, …], state [B, S] before them and episode starts [L, B] of sequences [B, L]."""
    features = tree_map(lambda leaf: leaf.transpose(0, 1), batch["observation"])
    return features, batch["recurrent_state"][:, 0], batch["episode_start"].T
