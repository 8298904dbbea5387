"""From one basic observation to a vector: MLP, Nature CNN, IMPALA CNN."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from gymnasium import Space
from gymnasium.spaces import Box
from torch import Tensor, nn
from typing_extensions import override

from ppo_lightning.errors import InputError
from ppo_lightning.parameters import COUNT, FINITE_NOT_NEGATIVE, checked
from ppo_lightning.spaces import channels_are_last, is_image, tensor_spec

Encoder = Callable[[Space[Any]], nn.Module]
"""(space) -> module that maps its features [B, …] to [B, F]."""
Channels = Literal["auto", "first", "last"]


def linear(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> nn.Linear:
    """A layer with orthogonal weights and biases 0 (Huang et al. 2022, detail 2)."""
    return orthogonal(nn.Linear(inputs, outputs), gain)


def orthogonal(layer: Any, gain: float = math.sqrt(2)) -> Any:
    """The layer itself, its weights orthogonal and its biases 0."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: Sequence[int], activation: type[nn.Module], *, layer_norm: bool = False) -> nn.Sequential:
    """Linear layers from ``sizes[0]`` inputs to ``sizes[1]``, ``sizes[2]``, … units, an activation after each."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [linear(inputs, outputs), *([nn.LayerNorm(outputs)] if layer_norm else []), activation()]
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """Perceptron over a flattened observation.

    Args:
        space: of the observation; bytes of an image are divided by 255.
        hidden_sizes: units of each layer; the last is the size of the output.
        activation: class of what follows each layer.
        layer_norm: normalise each layer's output before its activation.
    """

    @checked("{} of MLP", hidden_sizes=COUNT)
    def __init__(
        self,
        space: Space[Any],
        hidden_sizes: Sequence[int] = (64,),
        activation: type[nn.Module] = nn.Tanh,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.scale = 1 / 255 if is_image(space) else None
        self.layers = mlp(
            [math.prod(tensor_spec(space).feature_shape), *hidden_sizes], activation, layer_norm=layer_norm
        )

    @override
    def forward(self, observation: Tensor) -> Tensor:
        """[B, F] for features [B, …]."""
        flat = observation.flatten(1)
        return self.layers(flat if self.scale is None else flat.float() * self.scale)


class ImageEncoder(nn.Module):
    """Base of the convolutional networks: converts images to the layout of convolutions.

    Bytes become floats here, on the network's device; stacked frames become channels.

    Args:
        space: a Box of [H, W], [C, H, W], [H, W, C], or a stack of the latter two.
        scale: what values are divided by; 0 takes 255 for bytes and 1 for floats.
        channels: whether channels come before or after the pixels; auto sees it by the shape.
        smallest: pixels that each side must have.

    Raises:
        InputError: the space is no image, or too small.
    """

    layers: nn.Module
    """From images [B, C, H, W] to flat features."""
    output: nn.Module

    def __init__(self, space: Space[Any], scale: float, channels: Channels, smallest: int) -> None:
        super().__init__()
        if not isinstance(space, Box) or len(space.shape) not in (2, 3, 4):
            raise InputError(
                f"{type(self).__name__} needs an image (a Box of 2 to 4 dimensions), the observation is {space}: use "
                "encoders or image_encoder for images only"
            )
        image = space.shape[-3:] if len(space.shape) > 2 else (1, *space.shape)
        self.last = len(space.shape) > 2 and (channels == "last" or (channels == "auto" and channels_are_last(image)))
        count, *pixels = (image[2], *image[:2]) if self.last else image
        if min(pixels) < smallest:
            raise InputError(
                f"{type(self).__name__} needs images of at least {smallest} × {smallest}, the observation {space} has "
                f"{pixels[0]} × {pixels[1]}: take ImpalaCNN, or resize with gymnasium.wrappers.ResizeObservation"
            )
        self.shape = (count * (space.shape[0] if len(space.shape) == 4 else 1), *pixels)
        self.scale = scale or (255.0 if space.dtype == "uint8" else 1.0)

    def to_nchw(self, observation: Tensor) -> Tensor:
        """Floats [B, C, H, W], channels last in memory, in the precision of the update; not scaled yet."""
        if self.last:
            observation = observation.movedim(-1, -3)
        observation = observation.reshape(-1, *self.shape)
        kind = observation.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        return observation.to(dtype, memory_format=torch.channels_last)

    def output_layer(self, layers: nn.Module, features: int) -> nn.Sequential:
        """A linear layer with an activation, for what ``layers`` return."""
        with torch.no_grad():
            size = layers(torch.zeros(1, *self.shape)).flatten(1).shape[1]
        return nn.Sequential(linear(size, features), nn.ReLU())

    @override
    def forward(self, observation: Tensor) -> Tensor:
        """[B, features] for images [B, …]."""
        return self.output(self.layers(self.to_nchw(observation)))


class ScaledConv2d(nn.Conv2d):
    """A convolution that divides its input by ``scale``, by dividing its weights: there are fewer of them than of pixels.

    Forward and backward of NatureCNN on 256 images of [4, 84, 84] take 0.90 of the time that dividing the images takes (one
    thread, median of 150 pairs). In bfloat16 bytes are exact, and their 255th parts are not.

    Args:
        scale: what to divide by.
        channels: of the input, then of the output.
        kernel_size: pixels each way.
        stride: pixels.
        padding: pixels.
    """

    def __init__(
        self, scale: float, channels: tuple[int, int], kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(*channels, kernel_size, stride, padding)
        self.scale = scale

    @override
    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W]."""
        return self._conv_forward(input, self.weight * (1 / self.scale), self.bias)


class NatureCNN(ImageEncoder):
    """Three convolutions and a layer of 512 (Mnih et al. 2015), orthogonal.

    Args:
        space: images of at least 36 × 36.
        features: units of the last layer.
        scale: what values are divided by; 0 takes 255 for bytes and 1 for floats.
        channels: whether channels come before or after the pixels; auto sees it by the shape.
    """

    @checked("{} of NatureCNN", features=COUNT, scale=FINITE_NOT_NEGATIVE)
    def __init__(self, space: Space[Any], features: int = 512, scale: float = 0.0, channels: Channels = "auto") -> None:
        super().__init__(space, scale, channels, smallest=36)
        self.layers = nn.Sequential(
            orthogonal(ScaledConv2d(self.scale, (self.shape[0], 32), 8, 4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, 2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, 1)),
            nn.ReLU(),
            nn.Flatten(),
        ).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.output = self.output_layer(self.layers, features)


class ImpalaCNN(ImageEncoder):
    """Residual network of three blocks and a layer of 256 (Espeholt et al. 2018), for images of any size.

    Args:
        space: images.
        depths: channels of each block; each halves the image.
        features: units of the last layer.
        scale: what values are divided by; 0 takes 255 for bytes and 1 for floats.
        channels: whether channels come before or after the pixels; auto sees it by the shape.
    """

    @checked("{} of ImpalaCNN", depths=COUNT, features=COUNT, scale=FINITE_NOT_NEGATIVE)
    def __init__(
        self,
        space: Space[Any],
        depths: Sequence[int] = (16, 32, 32),
        features: int = 256,
        scale: float = 0.0,
        channels: Channels = "auto",
    ) -> None:
        super().__init__(space, scale, channels, smallest=1)
        blocks: list[nn.Module] = []
        for inputs, outputs in pairwise([self.shape[0], *depths]):
            first = ScaledConv2d(1.0 if blocks else self.scale, (inputs, outputs), 3, padding=1)
            blocks += [orthogonal(first), nn.MaxPool2d(3, 2, padding=1), Residual(outputs), Residual(outputs)]
        self.layers = nn.Sequential(*blocks, nn.ReLU(), nn.Flatten()).to(
            memory_format=torch.channels_last  # pyright: ignore[reportCallIssue]
        )
        self.output = self.output_layer(self.layers, features)


class Residual(nn.Module):
    """x + conv(relu(conv(relu x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            orthogonal(nn.Conv2d(channels, channels, 3, padding=1)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(channels, channels, 3, padding=1)),
        )

    @override
    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W]."""
        return image + self.layers(image)
