"""The default network: encoders, hidden layers, recurrent layers, and a head each for actions and values."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any, NamedTuple, cast

import torch
from gymnasium import Space
from gymnasium.spaces import Box
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from typing_extensions import override

from ppo_lightning.errors import InputError
from ppo_lightning.parameters import FINITE, ONE_OR_MORE, Limit, checked
from ppo_lightning.policy.distributions import (
    ActionDistribution,
    Composite,
    DiagonalGaussian,
    Family,
    StateDependentExploration,
    action_distribution,
)
from ppo_lightning.policy.encoders import Encoder, ImpalaCNN, NatureCNN, linear, mlp
from ppo_lightning.policy.recurrent import RecurrentLayer, RNNType
from ppo_lightning.spaces import Tree, flatten_spaces, is_image, subspaces, tensor_spec, tree_map

UNITS = Limit("be 1 or more (a list of whole numbers)", lambda size: size >= 1)
"""Of each layer."""


LOG_STD_RANGE = (-20.0, 2.0)
"""Lowest and highest log standard deviation, unless they are set."""


class ActorCritic(nn.Module):
    """Encoders, hidden layers and recurrent layers of policy and value, separate or shared, with orthogonal initialisation.

    Weights are orthogonal with gain √2 in hidden layers, 0.01 at the policy's output and 1 at the value's, biases 0
    (Huang et al. 2022, detail 2). The parts of a Dict or Tuple observation are encoded one by one and concatenated:
    images by a CNN, everything else unchanged, unless ``encoders`` sets another network.

    Args:
        observation_space: of the environment.
        action_space: of the environment.
        hidden_sizes: units of each hidden layer; null is 64, 64, and no hidden layers after images alone.
        critic_hidden_sizes: the same for the value; null is hidden_sizes.
        activation: class of the activation after each hidden layer.
        layer_norm: normalise each hidden layer's output before its activation.
        image_encoder: class_path or callable (space) -> network for images; null is NatureCNN from 36 × 36 pixels,
            ImpalaCNN below.
        encoders: the same for parts of a Dict or Tuple, by path ("state", "arm.0").
        rnn: lstm or gru after the hidden layers; null is no recurrent layer.
        rnn_size: units of the recurrent layer.
        shared: policy and value have encoders, hidden layers and recurrent layer in common.
        actor_keys: parts of a Dict or Tuple that are inputs of the policy; null is all.
        critic_keys: parts that are inputs of the value; null is all. More than the policy's make a privileged critic.
        distribution: over Box actions: normal (clipped to the bounds by the environment alone), tanh (normal, squashed
            into the bounds), beta (on the bounds), gsde (normal, with noise that is a function of the state).
        log_std_init: initial log standard deviation of normal, tanh and gsde, in log action units (tanh: before it).
        log_std_range: lowest and highest log standard deviation.
        state_dependent_std: the standard deviation of normal and tanh is an output of the network, not a parameter.
        sde_sample_freq: steps for which the noise of gsde is kept.
        entropy_weights: weights of the parts of a Dict or Tuple action in the entropy, by path; 1 where none is given.

    Raises:
        InputError: an option does not suit the spaces.
    """

    @checked(
        hidden_sizes=UNITS,
        critic_hidden_sizes=UNITS,
        rnn_size=ONE_OR_MORE,
        log_std_init=FINITE,
        log_std_range=FINITE,
        sde_sample_freq=ONE_OR_MORE,
        entropy_weights=FINITE,
    )
    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        hidden_sizes: Sequence[int] | None = None,
        critic_hidden_sizes: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.Tanh,
        layer_norm: bool = False,
        image_encoder: Encoder | None = None,
        encoders: dict[str, Encoder] | None = None,
        rnn: RNNType | None = None,
        rnn_size: int = 64,
        shared: bool = False,
        actor_keys: Sequence[str] | None = None,
        critic_keys: Sequence[str] | None = None,
        distribution: Family = "normal",
        log_std_init: float = 0.0,
        log_std_range: tuple[float, float] = LOG_STD_RANGE,
        state_dependent_std: bool = False,
        sde_sample_freq: int = 4,
        entropy_weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if shared and (actor_keys is not None or critic_keys is not None):
            raise InputError("shared: true gives policy and value the same input: leave out actor_keys and critic_keys")
        if shared and critic_hidden_sizes is not None:
            raise InputError(
                "shared: true gives policy and value the same hidden layers: leave out critic_hidden_sizes"
            )
        if entropy_weights and subspaces(action_space) is None:
            raise InputError(
                f"entropy_weights are for the parts of a Dict or Tuple, the action space is {action_space}"
            )
        std = StdOptions(float(log_std_init), *log_std_range, state_dependent_std)
        std.check(action_space, distribution)

        def trunk(keys: Sequence[str] | None, option: str, sizes: Sequence[int] | None) -> Trunk:
            spaces = select_spaces(flatten_spaces(observation_space), keys, option)
            layers = build_encoders(spaces, image_encoder, encoders or {}, flatten_spaces(observation_space))
            return Trunk(layers, spaces, sizes, activation, layer_norm, rnn, rnn_size)

        self.actor_trunk = trunk(actor_keys, "actor_keys", hidden_sizes)
        self.distribution = action_distribution(
            action_space,
            distribution,
            num_latent=self.actor_trunk.size,
            sample_freq=sde_sample_freq,
            entropy_weights=entropy_weights,
        )
        self.action_head = action_head(self.distribution, self.actor_trunk.size, std)
        of_critic = hidden_sizes if critic_hidden_sizes is None else critic_hidden_sizes
        self.critic_trunk = self.actor_trunk if shared else trunk(critic_keys, "critic_keys", of_critic)
        self.value_head = linear(self.critic_trunk.size, 1, gain=1.0)
        self.shared = shared
        self.state_size = self.actor_trunk.state_size * (1 if shared else 2)

    @override
    def forward(self, observation: Tree, state: Tensor | None = None, start: Tensor | None = None) -> Any:
        """Distribution parameters [B, P] and values [B] for observations [B, …].

        With a recurrent layer: for sequences [L, B, …] of observations, the state [B, S] before them and the flags [L, B]
        that an episode starts there, parameters [L, B, P], values [L, B] and the state after them.
        """
        if state is None or start is None:
            latent = self.actor_trunk(observation)
            valued = latent if self.shared else self.critic_trunk(observation)
            return self.action_head(latent), self.value_head(valued).squeeze(-1)
        if self.shared:
            latent, state = self.actor_trunk.unroll(observation, state, start)
            return self.action_head(latent), self.value_head(latent).squeeze(-1), state
        acting, valuing = state.chunk(2, -1)
        latent, acting = self.actor_trunk.unroll(observation, acting, start)
        valued, valuing = self.critic_trunk.unroll(observation, valuing, start)
        return self.action_head(latent), self.value_head(valued).squeeze(-1), torch.cat([acting, valuing], -1)

    def actor(self, observation: Tree) -> Tensor:
        """Distribution parameters [B, P] alone: all that acting needs, without recurrence."""
        return self.action_head(self.actor_trunk(observation))

    def latent(self, observation: Tree, state: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """Input of the action head: [B, H], or recurrent [L, B, H] (arguments as of :meth:`forward`)."""
        if state is None or start is None:
            return self.actor_trunk(observation)
        return self.actor_trunk.unroll(observation, state[:, : self.actor_trunk.state_size], start)[0]

    def fast_actor(self) -> Callable[[Tensor], Tensor] | None:
        """What :meth:`actor` does, while parameters and hooks stay as they are; None where the network is no plain MLP.

        Calling modules takes as long as what a small layer computes: here each is looked up once per rollout.
        """
        trunk = self.actor_trunk
        plain = type(self).actor is ActorCritic.actor and type(trunk) is Trunk and type(trunk.layers) is nn.Sequential
        if not (plain and trunk.is_flat) or any(map(_is_hooked, (self, trunk, trunk.layers))):
            return None
        steps = [fast_layer(layer) for layer in [*trunk.layers, self.action_head]]

        def act(observation: Tensor) -> Tensor:
            latent = observation.flatten(1)
            for step in steps:
                latent = step(latent)
            return latent

        return act

    def critic(self, observation: Tree) -> Tensor:
        """Values [B] alone: all that bootstrapping needs, without recurrence."""
        return self.value_head(self.critic_trunk(observation)).squeeze(-1)


def fast_layer(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer as a function, with its present parameters, unless something is hooked to it."""
    if _is_hooked(layer):
        return layer
    if type(layer) is nn.Linear and layer.bias is not None and not torch.is_autocast_enabled(layer.weight.device.type):
        # What torch's linear calls, with a fifth less time for a small layer: nothing is asked about gradients.
        bias, weight = layer.bias.detach(), layer.weight.detach().t()
        return lambda latent: torch.addmm(bias, latent, weight)
    return layer.forward


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or _global_forward_hooks or _global_forward_pre_hooks)


class Trunk(nn.Module):
    """Observations to a latent vector: an encoder for each part, hidden layers, recurrent layer."""

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        spaces: Mapping[str, Space[Any]],
        hidden_sizes: Sequence[int] | None,
        activation: type[nn.Module],
        layer_norm: bool,
        rnn: RNNType | None,
        rnn_size: int,
    ) -> None:
        super().__init__()
        self.names = list(spaces)
        self.encoders = nn.ModuleList(encoders)
        self.is_flat = self.names == [""] and isinstance(encoders[0], nn.Flatten)
        inputs = sum(output_size(encoder, space) for encoder, space in zip(encoders, spaces.values(), strict=True))
        if hidden_sizes is None:
            hidden_sizes = () if all(map(is_image, spaces.values())) else (64, 64)
        sizes = [inputs, *hidden_sizes]
        self.layers = mlp(sizes, activation, layer_norm=layer_norm)
        self.recurrent = None if rnn is None else RecurrentLayer(rnn, sizes[-1], rnn_size)
        self.size = sizes[-1] if rnn is None else rnn_size
        self.state_size = 0 if self.recurrent is None else self.recurrent.state_size

    @override
    def forward(self, observation: Tree) -> Tensor:
        """Latent [B, F] before the recurrent layer."""
        if self.is_flat:
            return self.layers(observation.flatten(1))
        if self.names == [""]:
            return self.layers(self.encoders[0](observation))
        parts = [encoder(observation[name]) for name, encoder in zip(self.names, self.encoders, strict=True)]
        return self.layers(torch.cat(parts, -1))

    def unroll(self, observation: Tree, state: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [L, B, H] behind the recurrent layer, and its state [B, S] after them."""
        assert self.recurrent is not None
        latent = self(tree_map(lambda leaf: leaf.flatten(0, 1), observation))
        return self.recurrent(latent.unflatten(0, start.shape), state, start)


def select_spaces(spaces: Mapping[str, Space[Any]], keys: Sequence[str] | None, option: str) -> dict[str, Space[Any]]:
    """The parts that keys name: each a path, or what a path begins with."""
    if keys is None:
        return dict(spaces)
    if not keys:
        raise InputError(f"{option} names nothing, the parts of the observation are {list(spaces)}")
    chosen = {}
    for key in keys:
        found = {name: space for name, space in spaces.items() if name == key or name.startswith(f"{key}.")}
        if not found or not key:
            raise InputError(f"{option} names {key!r}, the parts of the observation are {list(spaces)}")
        chosen.update(found)
    return {name: space for name, space in spaces.items() if name in chosen}


def build_encoders(
    spaces: Mapping[str, Space[Any]],
    image_encoder: Encoder | None,
    encoders: Mapping[str, Encoder],
    everything: Mapping[str, Space[Any]],
) -> list[nn.Module]:
    """A network for each part of an observation that policy or value sees, of ``everything`` that there is."""
    unknown = encoders.keys() - everything.keys()
    if unknown:
        raise InputError(f"encoders names {sorted(unknown)}, the parts of the observation are {list(everything)}")
    images = [name for name, space in everything.items() if is_image(space)]
    if image_encoder is not None and not images:
        # A lone Box of another kind, floats perhaps, is encoded as asked; the encoder refuses what it cannot take.
        images = [""] if list(everything) == [""] else []
        if not images:
            raise InputError(f"image_encoder was given, no part of the observation is an image: {list(everything)}")
    layers = []
    for name, space in spaces.items():
        make = encoders.get(name)
        if make is None and name in images:
            make = image_encoder or default_image_encoder
        layer = nn.Flatten() if make is None else make(space)
        if not isinstance(layer, nn.Module):
            raise InputError(f"the encoder of {name!r} is a {type(layer).__name__}: it must be a torch.nn.Module")
        layers.append(layer)
    return layers


def default_image_encoder(space: Space[Any]) -> nn.Module:
    """NatureCNN where images are large enough for it, else ImpalaCNN."""
    try:
        return NatureCNN(space)
    except InputError:
        return ImpalaCNN(space)


def output_size(encoder: nn.Module, space: Space[Any]) -> int:
    """Size of what an encoder returns for one part of an observation.

    Raises:
        InputError: it is not one vector per sample.
    """
    if isinstance(encoder, nn.Flatten):
        return math.prod(tensor_spec(space).feature_shape)
    dtype = torch.uint8 if is_image(space) else torch.float32
    name = type(encoder).__name__
    try:
        with torch.no_grad():
            output = encoder(torch.zeros(2, *tensor_spec(space).feature_shape, dtype=dtype))
        shape = tuple(output.shape)
    except Exception as error:
        raise InputError(
            f"the encoder {name} raised {type(error).__name__} on 2 observations of {space}: {error}"
        ) from error
    if len(shape) != 2 or shape[0] != 2:
        raise InputError(
            f"the encoder {name} returned {shape} for 2 observations of {space}: it must return one vector for each, (2, F)"
        )
    return output.shape[1]


# --- from the latent to the parameters of a distribution ---------------------------------------------------------------


class StdOptions(NamedTuple):
    """Standard deviations of normal, tanh and gsde, as of :class:`ActorCritic`."""

    init: float
    low: float
    high: float
    state_dependent: bool

    def check(self, action_space: Space[Any], distribution: Family) -> None:
        """Refuse bounds that exclude each other or the initial value, and options that have no effect.

        Raises:
            InputError: it names the option.
        """
        if not self.low < self.high:
            raise InputError(f"log_std_range must rise, got {(self.low, self.high)}")
        if not self.low <= self.init <= self.high:
            raise InputError(f"log_std_init = {self.init} must lie within log_std_range = {(self.low, self.high)}")
        boxes = any(isinstance(space, Box) for space in flatten_spaces(action_space).values())
        changed = {
            "state_dependent_std": self.state_dependent,
            "log_std_init": self.init != 0.0,
            "log_std_range": (self.low, self.high) != LOG_STD_RANGE,
        }
        option = next((name for name, is_changed in changed.items() if is_changed), None)
        if option is not None and (distribution == "beta" or not boxes):
            kind = "beta" if boxes else "discrete actions"
            raise InputError(
                f"{option} is for the standard deviations of normal, tanh and gsde, which {kind} do not have: leave it out"
            )
        if self.state_dependent and distribution == "gsde":
            raise InputError(
                "state_dependent_std is for normal and tanh, the standard deviation of gsde depends on the state by itself: "
                "leave it out"
            )


@singledispatch
def action_head(distribution: ActionDistribution, inputs: int, std: StdOptions) -> nn.Module:
    """Network from a latent [B, F] to a distribution's parameters [B, P], which are all its outputs."""
    return linear(inputs, distribution.num_parameters, gain=0.01)


@action_head.register
def _(distribution: DiagonalGaussian, inputs: int, std: StdOptions) -> nn.Module:
    return GaussianHead(inputs, distribution.num_noise, std)


@action_head.register
def _(distribution: StateDependentExploration, inputs: int, std: StdOptions) -> nn.Module:
    return GSDEHead(inputs, distribution.num_noise // inputs, std)


@action_head.register
def _(distribution: Composite, inputs: int, std: StdOptions) -> nn.Module:
    return CompositeHead([action_head(part, inputs, std) for part in distribution.parts.values()])


class GaussianHead(nn.Module):
    """Means as outputs, log standard deviations as a parameter that is the same in every state, or as outputs too."""

    def __init__(self, inputs: int, dims: int, std: StdOptions) -> None:
        super().__init__()
        self.low, self.high = std.low, std.high
        self.mean = linear(inputs, dims, gain=0.01)
        self.log_std: nn.Parameter | None = None
        self.log_std_layer: nn.Linear | None = None
        if std.state_dependent:
            self.log_std_layer = linear(inputs, dims, gain=0.01)
            nn.init.constant_(self.log_std_layer.bias, std.init)
        else:
            self.log_std = nn.Parameter(torch.full((dims,), std.init))

    @override
    def forward(self, latent: Tensor) -> Tensor:
        """Means and log standard deviations [B, 2d]."""
        mean = self.mean(latent)
        log_std = self.log_std if self.log_std_layer is None else self.log_std_layer(latent)
        return torch.cat([mean, clamp_with_pullback(log_std, self.low, self.high).expand_as(mean)], -1)


class GSDEHead(nn.Module):
    """Means as outputs, and loadings: the latent times the standard deviations of the exploration matrix.

    The latent is learnt by the means alone; from the loadings no gradient flows into it.
    """

    def __init__(self, inputs: int, dims: int, std: StdOptions) -> None:
        super().__init__()
        self.low, self.high = std.low, std.high
        self.mean = linear(inputs, dims, gain=0.01)
        self.log_std = nn.Parameter(torch.full((inputs, dims), std.init))

    @override
    def forward(self, latent: Tensor) -> Tensor:
        """Means and loadings [B, d + F d]."""
        loadings = latent.detach().unsqueeze(-1) * clamp_with_pullback(self.log_std, self.low, self.high).exp()
        return torch.cat([self.mean(latent), loadings.flatten(-2)], -1)


class CompositeHead(nn.Module):
    """One head for each part of a Dict or Tuple."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    @override
    def forward(self, latent: Tensor) -> Tensor:
        """Parameters of all parts [B, P]."""
        return torch.cat([head(latent) for head in self.heads], -1)


def clamp_with_pullback(log_std: Any, low: float, high: float) -> Tensor:
    """``log_std`` between its bounds; beyond them the gradient can still pull it back, which torch.clamp prevents."""
    if not torch.is_grad_enabled():
        return log_std.clamp(low, high)
    # A view: torch 2.13 compiles the custom gradient of an intermediate, and drops that of a parameter itself.
    return cast(Tensor, _ClampWithPullback.apply(log_std.view_as(log_std), low, high))


class _ClampWithPullback(torch.autograd.Function):
    """Passes a gradient on, except where a step against it leads values further beyond their bounds."""

    @staticmethod
    @override
    def forward(values: Tensor, low: float, high: float) -> Tensor:
        return values.clamp(low, high)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values, ctx.low, ctx.high = inputs
        ctx.save_for_backward(values)

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (values,) = grad_outputs, ctx.saved_tensors
        outward = ((values > ctx.high) & (gradient < 0)) | ((values < ctx.low) & (gradient > 0))
        return gradient.masked_fill(outward, 0.0), None, None
