"""Distributions over actions, as plain tensor maths on what a network returns.

One class per kind of space, chosen by :func:`action_distribution`. They hold no tensors: sampling takes noise that was
drawn for a whole rollout at once, so that choosing an action costs a few kernels and no generator.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache, singledispatch
from itertools import accumulate
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from torch import Tensor
from torch.nn.functional import softplus
from typing_extensions import override

from ppo_lightning.errors import InputError
from ppo_lightning.spaces import Array, Tree, action_dims, flatten_spaces, tensor_spec, torch_dtype, tree_map, unflatten

LOG_2PI = math.log(2 * math.pi)
MASKED_LOGIT = torch.finfo(torch.float32).min
"""Logit of a forbidden action. Its probability is exactly 0, and unlike -∞ it makes no NaN of 0 · log 0."""

Family = Literal["normal", "tanh", "beta", "gsde"]
"""Distributions over a Box: normal, normal squashed into its bounds by tanh, Beta on its bounds, and normal with
generalised state-dependent exploration."""


class ActionDistribution(ABC):
    """A family of distributions over one action space, described by ``parameters`` [B, P].

    Actions are stored as they were drawn, in the distribution's own coordinates: only :meth:`to_env_action` gives what the
    environment takes, so no log-probability suffers from a transformation that would have to be undone.
    """

    num_parameters: int
    """P: what the network must return per sample."""
    num_noise: int
    """Z: random numbers that drawing one action needs."""
    has_std = False
    """Whether the family has standard deviations."""
    noise_period = 1
    """Steps for which noise is kept."""

    @abstractmethod
    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Draw the noise [*shape, Z] that :meth:`sample` turns into actions; steps are the first of two dimensions."""

    def noise_from_uniform(self, uniform: Tensor) -> Tensor:
        """Noise [B, Z] as of :meth:`noise`, of numbers [B, 2 Z] uniform on [0, 1): for exports, which draw none themselves."""
        return normal_from_uniform(uniform)

    @abstractmethod
    def sample(self, parameters: Tensor, noise: Tensor | None) -> Tree:
        """Actions [B, …] drawn from the distributions, the same ones for the same noise; without noise the most probable."""

    def mode(self, parameters: Tensor) -> Tree:
        """The most probable actions [B, …]."""
        return self.sample(parameters, None)

    @abstractmethod
    def log_prob_and_entropy(self, parameters: Tensor, action: Tree) -> tuple[Tensor, Tensor]:
        """Log-probability (or log-density) of the actions, and entropy, each [B], in nats."""

    @abstractmethod
    def to_env_action(self, action: Any) -> Tree:
        """What the environment is given for actions [N, …], as tensors; of a Dict or Tuple its parts."""

    def unflatten(self, tree: Tree) -> Any:
        """Parts of a Dict or Tuple as Gymnasium takes them; of other spaces what was given."""
        return tree

    def to_numpy(self, action: Tree) -> Any:
        """Actions [N, …] as a Gymnasium vector takes them."""
        return self.unflatten(tree_map(_to_numpy, self.to_env_action(action)))

    def apply_mask(self, parameters: Tensor, mask: Tensor) -> Tensor:
        """Parameters [B, P] under which what ``mask`` [B, M] forbids has probability 0, and no part in the entropy."""
        return parameters.masked_fill(~mask, MASKED_LOGIT)

    def std(self, parameters: Tensor) -> Tensor | None:
        """Standard deviations [B, d] where the family has them, else None."""
        return None

    def clipped(self, action: Any) -> Tensor | None:
        """Which actions [*B, …] are outside the bounds, [*B] bool; None where :meth:`to_env_action` clips nothing."""
        return None

    def signature(self) -> str:
        """A name that two distributions share exactly when they read parameters alike."""
        return type(self).__name__


def _to_numpy(tensor: Tensor) -> Array:
    return tensor.cpu().numpy()


def normal_from_uniform(uniform: Tensor) -> Tensor:
    """Standard normals [B, Z] of numbers [B, 2 Z] uniform on [0, 1) (Box & Muller 1958)."""
    first, second = uniform.chunk(2, -1)
    return (2 * exponential_from_uniform(first)).sqrt() * torch.cos(2 * math.pi * second)


def exponential_from_uniform(uniform: Tensor) -> Tensor:
    """Standard exponentials of numbers uniform on [0, 1); not by log1p, which other runtimes compute as log(1 + x)."""
    return -(1 - uniform).log()


# --- discrete ----------------------------------------------------------------------------------------------------------


class MultiCategorical(ActionDistribution):
    """Independent categorical choices between ``sizes`` actions; ``parameters`` are all their logits [B, Σ sizes].

    A bit of MultiBinary is a choice between two: its logits are those of 0 and of 1.

    Args:
        shape: of an action.
        sizes: alternatives of each choice.
        start: [*shape] the environment's numbers of the first alternatives (NumPy).
        dtype: of the environment's actions (NumPy).
    """

    def __init__(self, shape: tuple[int, ...], sizes: tuple[int, ...], start: Any, dtype: Any) -> None:
        self.shape, self.sizes, self.dtype = shape, sizes, dtype
        self.start = start if np.any(start) else None
        self.num_parameters = self.num_noise = sum(sizes)

    @override
    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Standard Gumbel noise: the argmax of logits + noise is distributed as softmax(logits) (Gumbel 1954).

        It is always finite: an infinite one would win over the logit of a forbidden action.
        """
        exponential = torch.empty(*shape, self.num_noise).exponential_(generator=generator)
        return exponential.clamp_min_(torch.finfo(torch.float32).tiny).log_().neg_()

    @override
    def noise_from_uniform(self, uniform: Tensor) -> Tensor:
        exponential = exponential_from_uniform(uniform.chunk(2, -1)[0])
        return -exponential.clamp_min(torch.finfo(torch.float32).tiny).log()

    @override
    def sample(self, parameters: Tensor, noise: Tensor | None) -> Tensor:
        perturbed = parameters if noise is None else parameters + noise
        return self._split_parameters(perturbed).argmax(-1).view(-1, *self.shape)

    @override
    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = self._split_parameters(parameters).log_softmax(-1)  # [B, choices, actions]
        entropy = -(log_probs.exp() * log_probs).sum((-2, -1))
        return log_probs.gather(-1, action.reshape(*log_probs.shape[:2], 1)).sum((-2, -1)), entropy

    def _split_parameters(self, parameters: Tensor) -> Tensor:
        """Logits [B, choices, most actions], those of smaller choices padded with :data:`MASKED_LOGIT`."""
        most = max(self.sizes)
        if min(self.sizes) == most:
            return parameters.unflatten(-1, (-1, most))
        index, padding = _padding(self.sizes, parameters.device)
        return parameters[..., index].masked_fill(padding, MASKED_LOGIT)

    @override
    def to_env_action(self, action: Tensor) -> Tensor:
        shifted = action if self.start is None else action + _start(self, action.device)
        # A copy: environments may change what they are given in place.
        return shifted.to(torch_dtype(self.dtype), copy=self.start is None)


class Categorical(MultiCategorical):
    """Probabilities softmax(logits) of n actions; ``parameters`` are the logits [B, n].

    Args:
        n: actions.
        start: the environment's number of the first action.
        dtype: of the environment's actions (NumPy).
    """

    def __init__(self, n: int, start: int = 0, dtype: Any = np.int64) -> None:
        super().__init__((), (n,), start, dtype)

    @override
    def sample(self, parameters: Tensor, noise: Tensor | None) -> Tensor:
        return (parameters if noise is None else parameters + noise).argmax(-1)

    @override
    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = parameters.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1), entropy


@cache
def _start(distribution: MultiCategorical, device: torch.device) -> Tensor:
    return torch.as_tensor(np.asarray(distribution.start)).to(device)


@cache
def _padding(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Index [choices, most] of each choice's logits, and where there is none."""
    begins = torch.tensor([0, *accumulate(sizes)][:-1], device=device)
    place = torch.arange(max(sizes), device=device)
    padding = place >= torch.tensor(sizes, device=device)[:, None]
    return (begins[:, None] + place).masked_fill(padding, 0), padding


# --- Box ---------------------------------------------------------------------------------------------------------------


class DiagonalGaussian(ActionDistribution):
    """Independent normals over a Box; ``parameters`` are means and log standard deviations [B, 2d].

    The action is not clipped here: what is stored is what was drawn, and only the environment is given its clipping.

    Args:
        space: of the actions.
    """

    has_std = True

    def __init__(self, space: Box) -> None:
        self.space, self.num_noise = space, math.prod(space.shape)
        self.num_parameters = 2 * self.num_noise

    @override
    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, self.num_noise, generator=generator)

    @override
    def sample(self, parameters: Tensor, noise: Tensor | None) -> Tensor:
        mean, log_std = parameters.chunk(2, -1)
        action = mean if noise is None else torch.addcmul(mean, log_std.exp(), noise)
        return action.reshape(-1, *self.space.shape)

    @override
    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = parameters.chunk(2, -1)
        return gaussian_log_prob_and_entropy(mean, log_std, action)

    @override
    def to_env_action(self, action: Tensor) -> Tensor:
        return action.clamp(*_bounds(self, action.device)).to(torch_dtype(self.space.dtype))

    @override
    def std(self, parameters: Tensor) -> Tensor:
        return parameters.chunk(2, -1)[1].exp()

    @override
    def clipped(self, action: Tensor) -> Tensor | None:
        if not (self.space.bounded_below.any() or self.space.bounded_above.any()):
            return None
        low, high = _bounds(self, action.device)
        outside = (action < low) | (action > high)
        return outside.reshape(*outside.shape[: outside.ndim - low.ndim], -1).any(-1)


def gaussian_log_prob_and_entropy(mean: Tensor, log_std: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density of actions under independent normals [B, d], and their entropy, each [B]."""
    standardized = (action.reshape(mean.shape) - mean) * (-log_std).exp()
    total_log_std, dims = log_std.sum(-1), mean.shape[-1]
    log_prob = -0.5 * (standardized.square().sum(-1) + dims * LOG_2PI) - total_log_std
    return log_prob, total_log_std + 0.5 * dims * (1 + LOG_2PI)


class SquashedGaussian(DiagonalGaussian):
    """Independent normals u, squashed into the bounds of a Box: a = low + (high - low) (tanh u + 1) / 2.

    Stored is u. With h half the width of the bounds, log p(a) = log N(u) - Σ log h (1 - tanh² u), and the entropy is that
    of the normal plus E[log h (1 - tanh² u)], by a fixed quadrature over u (Haarnoja et al. 2018, appendix C).
    """

    def __init__(self, space: Box) -> None:
        super().__init__(space)
        self.log_half_width = log_half_width(space, "tanh")

    @override
    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, entropy = super().log_prob_and_entropy(parameters, action)
        mean, log_std = parameters.chunk(2, -1)
        nodes, weights = _quadrature(parameters.device)
        expected = (tanh_log_det_jacobian(mean[..., None] + log_std.exp()[..., None] * nodes) @ weights).sum(-1)
        log_det = tanh_log_det_jacobian(action.reshape(mean.shape)).sum(-1)
        return log_prob - log_det - self.log_half_width, entropy + expected + self.log_half_width

    @override
    def to_env_action(self, action: Tensor) -> Tensor:
        return scale_to_bounds((action.tanh() + 1) / 2, self)

    @override
    def clipped(self, action: Tensor) -> None:
        return None


def tanh_log_det_jacobian(u: Tensor) -> Tensor:
    """Logarithm of 1 - tanh² u, exact where tanh u has rounded to 1."""
    return 2 * (math.log(2) - u - softplus(-2 * u))


@cache
def _quadrature(device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights for expectations over a standard normal: the trapezoidal rule, ±6 deviations in 96 steps.

    It errs by less than 1e-4 for log(1 - tanh²) up to deviations of e², where Gauss-Hermite needs more nodes.
    """
    nodes = torch.linspace(-6, 6, 97, dtype=torch.float64)
    weights = (-0.5 * nodes.square()).exp()
    return nodes.float().to(device), (weights / weights.sum()).float().to(device)


class Beta(ActionDistribution):
    """Independent Beta distributions on the bounds of a Box (Chou et al. 2017).

    ``parameters`` are a and b [B, 2d] with α = 1 + softplus a, β = 1 + softplus b, so that each has one peak. Stored is
    the place x between the bounds, 0 to 1.

    Args:
        space: of the actions.
    """

    has_std = True
    PROPOSALS = 8
    EDGE = 1e-6
    """Samples keep this distance from the bounds, where the density is 0 or has no logarithm."""

    def __init__(self, space: Box) -> None:
        self.space = space
        self.num_parameters = 2 * math.prod(space.shape)
        self.num_noise = self.num_parameters * 2 * self.PROPOSALS
        self.log_width = log_half_width(space, "beta") + math.prod(space.shape) * math.log(2)

    def concentrations(self, parameters: Tensor) -> Tensor:
        """Both α and β, [B, 2d]."""
        return 1 + softplus(parameters)

    @override
    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        half = (*shape, self.num_noise // 2)
        return torch.cat(
            [torch.randn(half, generator=generator), -torch.empty(half).exponential_(generator=generator)], -1
        )

    @override
    def noise_from_uniform(self, uniform: Tensor) -> Tensor:
        normal, rest = uniform.chunk(2, -1)
        return torch.cat([normal_from_uniform(normal), -exponential_from_uniform(rest.chunk(2, -1)[0])], -1)

    @override
    def sample(self, parameters: Tensor, noise: Tensor | None) -> Tensor:
        """X / (X + Y) of two gamma variables, each the first accepted proposal of Marsaglia & Tsang (2000).

        A proposal is refused in less than 5 % of cases, all eight in 1e-11 of them; then the first is taken.
        """
        if noise is None:
            upper, lower = (softplus(parameters) + 1e-30).chunk(2, -1)
            return (upper / (upper + lower)).view(-1, *self.space.shape)
        shape = (self.concentrations(parameters) - 1 / 3).unsqueeze(-1)
        normal, log_uniform = noise.chunk(2, -1)
        normal = normal.unflatten(-1, (-1, self.PROPOSALS))
        cube = (1 + normal * (9 * shape).rsqrt()).pow(3)
        bound = 0.5 * normal.square() + shape * (1 - cube + cube.clamp_min(1e-30).log())
        accepted = (cube > 0) & (log_uniform.unflatten(-1, (-1, self.PROPOSALS)) < bound)
        gamma = (shape * cube).gather(-1, accepted.byte().argmax(-1, keepdim=True)).squeeze(-1).clamp_min(1e-30)
        upper, lower = gamma.chunk(2, -1)
        return (upper / (upper + lower)).clamp(self.EDGE, 1 - self.EDGE).view(-1, *self.space.shape)

    @override
    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        # In float64, since terms as large as the concentrations cancel; MPS has none.
        wide = torch.float32 if parameters.device.type == "mps" else torch.float64
        alpha, beta = self.concentrations(parameters).to(wide).chunk(2, -1)
        total = alpha + beta
        x = action.reshape(alpha.shape).to(wide)
        log_beta = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(total)
        log_prob = (alpha - 1) * x.log() + (beta - 1) * torch.log1p(-x) - log_beta
        entropy = (
            log_beta
            - (alpha - 1) * torch.digamma(alpha)
            - (beta - 1) * torch.digamma(beta)
            + (total - 2) * torch.digamma(total)
        )
        return log_prob.sum(-1).float() - self.log_width, entropy.sum(-1).float() + self.log_width

    @override
    def to_env_action(self, action: Tensor) -> Tensor:
        return scale_to_bounds(action, self)

    @override
    def std(self, parameters: Tensor) -> Tensor:
        alpha, beta = self.concentrations(parameters).chunk(2, -1)
        total = alpha + beta
        width = parameters.new_tensor((self.space.high - self.space.low).flatten())
        return (alpha * beta / (total + 1)).sqrt() / total * width


class StateDependentExploration(DiagonalGaussian):
    """Normals whose noise is a function of the state, held for several steps (Raffin et al. 2021, gSDE).

    ``parameters`` are means [B, d] and loadings w [B, L·d], the network's latent φ(s) [B, L] times the standard
    deviations [L, d] of the exploration matrix ε. An action is mean + Σₗ wₗ εₗ, with ε redrawn every ``sample_freq``
    steps, so it is normal with variance Σₗ wₗ², and equal states are given equal noise meanwhile.

    Args:
        space: of the actions.
        num_latent: L.
        sample_freq: steps for which an exploration matrix is kept (environment steps of one environment).
    """

    def __init__(self, space: Box, num_latent: int, sample_freq: int) -> None:
        super().__init__(space)
        self.num_latent, self.noise_period, dims = num_latent, sample_freq, self.num_noise
        self.num_noise = num_latent * dims
        self.num_parameters = dims + self.num_noise

    @override
    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        if len(shape) < 2:
            return super().noise(*shape, generator=generator)
        steps = torch.arange(shape[0]) // self.noise_period
        return super().noise(int(steps[-1]) + 1, *shape[1:], generator=generator)[steps]

    def _split_parameters(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Means [B, d] and loadings [B, L, d]."""
        mean, loadings = parameters.split([self.num_parameters - self.num_noise, self.num_noise], -1)
        return mean, loadings.unflatten(-1, (self.num_latent, -1))

    @override
    def sample(self, parameters: Tensor, noise: Tensor | None) -> Tensor:
        mean, loadings = self._split_parameters(parameters)
        action = mean if noise is None else mean + (loadings * noise.view_as(loadings)).sum(-2)
        return action.reshape(-1, *self.space.shape)

    @override
    def log_prob_and_entropy(self, parameters: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        mean, loadings = self._split_parameters(parameters)
        log_std = 0.5 * (loadings.square().sum(-2) + 1e-6).log()
        return gaussian_log_prob_and_entropy(mean, log_std, action)

    @override
    def std(self, parameters: Tensor) -> Tensor:
        return (self._split_parameters(parameters)[1].square().sum(-2) + 1e-6).sqrt()


def log_half_width(space: Box, family: str) -> float:
    """Σ log((high - low) / 2) over all dimensions.

    Raises:
        InputError: a Box has no bounds to stay between, which the ``family`` needs.
    """
    with np.errstate(over="ignore"):
        widths = space.high - space.low
    if not (space.is_bounded("both") and np.isfinite(widths).all() and (widths > 0).all()):
        raise InputError(
            f"distribution {family} needs finite bounds with room between them, the action space is {space}: give it bounds "
            "with gymnasium.wrappers.TransformAction, or take distribution normal"
        )
    return float(np.log((space.high.astype(np.float64) - space.low) / 2).sum())


@cache
def _bounds(distribution: DiagonalGaussian | Beta, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lowest and highest actions, as exactly as the device can."""
    space = distribution.space
    exact = torch.float32 if space.dtype == np.float32 or device.type == "mps" else torch.float64
    low, high = (torch.from_numpy(bound).to(device, exact) for bound in (space.low, space.high))
    return low, high


def scale_to_bounds(share: Tensor, distribution: SquashedGaussian | Beta) -> Tensor:
    """From shares (0 to 1) of the way between the bounds to actions within them."""
    low, high = _bounds(distribution, share.device)
    wide = low.to(torch.float32 if share.device.type == "mps" else torch.float64)
    return torch.clamp(wide + (high - wide) * share, low, high).to(torch_dtype(distribution.space.dtype))


# --- Dict and Tuple ----------------------------------------------------------------------------------------------------


class Composite(ActionDistribution):
    """Independent distributions over the parts of a Dict or Tuple; an action is a dictionary of parts, by path.

    Parameters, noise and masks are the concatenation of those of the parts, in the order of :func:`flatten_spaces`.
    Log-probabilities are summed, and entropies with a weight for each part.

    Args:
        space: of the actions.
        parts: by path.
        entropy_weights: by path, 1 where none is given.
    """

    def __init__(
        self, space: Space[Any], parts: Mapping[str, ActionDistribution], entropy_weights: Mapping[str, float]
    ) -> None:
        self.space, self.parts, self.entropy_weights = space, parts, entropy_weights
        self.parameter_sizes = [part.num_parameters for part in parts.values()]
        self.noise_sizes = [part.num_noise for part in parts.values()]
        self.mask_sizes = [sum(action_dims(leaf)) for leaf in flatten_spaces(space).values()]
        self.num_parameters, self.num_noise = sum(self.parameter_sizes), sum(self.noise_sizes)
        self.has_std = any(part.has_std for part in parts.values())
        self.noise_period = math.lcm(*(part.noise_period for part in parts.values()))

    @override
    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        return torch.cat([part.noise(*shape, generator=generator) for part in self.parts.values()], -1)

    @override
    def noise_from_uniform(self, uniform: Tensor) -> Tensor:
        parts = uniform.split([2 * size for size in self.noise_sizes], -1)
        return torch.cat(
            [part.noise_from_uniform(own) for part, own in zip(self.parts.values(), parts, strict=True)], -1
        )

    def _split(self, tensor: Tensor, sizes: list[int]) -> dict[str, Tensor]:
        return dict(zip(self.parts, tensor.split(sizes, -1), strict=True))

    @override
    def sample(self, parameters: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        described = self._split(parameters, self.parameter_sizes)
        drawn = {} if noise is None else self._split(noise, self.noise_sizes)
        return {name: part.sample(described[name], drawn.get(name)) for name, part in self.parts.items()}

    @override
    def log_prob_and_entropy(self, parameters: Tensor, action: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        log_prob = entropy = parameters.new_zeros(())
        for name, described in self._split(parameters, self.parameter_sizes).items():
            one_log_prob, one_entropy = self.parts[name].log_prob_and_entropy(described, action[name])
            log_prob = log_prob + one_log_prob
            entropy = entropy + self.entropy_weights.get(name, 1.0) * one_entropy
        return log_prob, entropy

    @override
    def apply_mask(self, parameters: Tensor, mask: Tensor) -> Tensor:
        described = self._split(parameters, self.parameter_sizes)
        for name, own in self._split(mask, self.mask_sizes).items():
            if own.shape[-1]:
                described[name] = self.parts[name].apply_mask(described[name], own)
        return torch.cat(list(described.values()), -1)

    @override
    def signature(self) -> str:
        return ", ".join(f"{name}: {part.signature()}" for name, part in self.parts.items())

    @override
    def to_env_action(self, action: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: part.to_env_action(action[name]) for name, part in self.parts.items()}

    @override
    def unflatten(self, tree: Tree) -> Any:
        return unflatten(self.space, tree)

    @override
    def std(self, parameters: Tensor) -> Tensor | None:
        described = self._split(parameters, self.parameter_sizes)
        deviations = [part.std(described[name]) for name, part in self.parts.items()]
        known = [deviation for deviation in deviations if deviation is not None]
        return torch.cat(known, -1) if known else None

    @override
    def clipped(self, action: Mapping[str, Tensor]) -> Tensor | None:
        parts = [part.clipped(action[name]) for name, part in self.parts.items()]
        known = [part for part in parts if part is not None]
        return torch.stack(known).any(0) if known else None


# --- which for which space ---------------------------------------------------------------------------------------------


def action_distribution(
    space: Space[Any],
    family: Family = "normal",
    *,
    num_latent: int = 64,
    sample_freq: int = 4,
    entropy_weights: Mapping[str, float] | None = None,
) -> ActionDistribution:
    """The family of distributions that suits an action space.

    Args:
        space: of one environment's actions.
        family: of Box spaces, alone or within a Dict or Tuple.
        num_latent: L of gsde, the size of the network's latent.
        sample_freq: of gsde, steps for which its noise is kept.
        entropy_weights: of the parts of a Dict or Tuple by path, 1 where none is given.

    Raises:
        InputError: the space is not supported, or does not suit the family.
    """
    spaces = flatten_spaces(space)
    if family != "normal" and not any(isinstance(leaf, Box) for leaf in spaces.values()):
        raise InputError(
            f"distribution {family} is for continuous actions, the action space {space} has none: leave distribution out"
        )
    parts = {name: _distribution(leaf, family, num_latent, sample_freq) for name, leaf in spaces.items()}
    if "" in parts:
        return parts[""]
    unknown = (entropy_weights or {}).keys() - parts.keys()
    if unknown:
        raise InputError(f"entropy_weights names {sorted(unknown)}, the parts of the action space are {list(parts)}")
    return Composite(space, parts, dict(entropy_weights or {}))


@singledispatch
def _distribution(space: Space[Any], family: Family, num_latent: int, sample_freq: int) -> ActionDistribution:
    raise InputError(f"there is no distribution over the action space {space!r}")


@_distribution.register
def _(space: Discrete, *options: Any) -> ActionDistribution:
    return Categorical(int(space.n), int(space.start), space.dtype)


@_distribution.register(MultiDiscrete)
@_distribution.register(MultiBinary)
def _(space: MultiDiscrete | MultiBinary, *options: Any) -> ActionDistribution:
    spec = tensor_spec(space)
    return MultiCategorical(spec.shape, spec.action_dims, spec.low, space.dtype)


@_distribution.register
def _(space: Box, family: Family, num_latent: int, sample_freq: int) -> ActionDistribution:
    if not np.issubdtype(space.dtype, np.floating):
        raise InputError(
            f"the action space {space!r} has integer bounds: make it Discrete or MultiDiscrete, or a Box of floats that "
            "the environment rounds"
        )
    match family:
        case "normal":
            return DiagonalGaussian(space)
        case "tanh":
            return SquashedGaussian(space)
        case "beta":
            return Beta(space)
        case "gsde":
            return StateDependentExploration(space, num_latent, sample_freq)
    raise InputError(f"distribution must be one of {get_args(Family)}, got {family!r}")


def stack(trees: list[Tree]) -> Tree:
    """Trees of tensors as one, along a new first dimension."""
    return tree_map(lambda *leaf: torch.stack(leaf), *trees)
