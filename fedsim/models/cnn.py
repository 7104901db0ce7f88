"""The small convolutional network."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from fedsim.models.network import Network


def cnn(
    *,
    input_shape: tuple[int, ...],
    classes: int,
    norm: Literal["none", "batch", "group", "layer"] = "none",
) -> nn.Module:
    """Two 3x3 convolutions (32 and 64 channels), each with ReLU and 2x2 max pooling, then 128 units and the logits.

    Args:
        input_shape: ``[C, H, W]``, ``[H, W]`` (one channel), or a flat square, ``[64]`` for 8x8.
        classes: how many logits.
        norm: what stands between a convolution and its ReLU: batch norm, group norm (8 groups), or layer norm over
            channels and pixels with a scale a channel (one group).

    Raises:
        ValueError: for inputs that are no images, or images of less than 4x4.
    """
    shape = _image_shape(input_shape)
    channels, height, width = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict(image=_Image(shape))
    for place, size in enumerate((32, 64), start=1):
        layers[f"conv{place}"] = nn.Conv2d(channels, size, 3, padding=1)
        if norm != "none":
            layers[f"norm{place}"] = _norm(norm, size)
        layers[f"relu{place}"] = nn.ReLU()
        layers[f"pool{place}"] = nn.MaxPool2d(2)
        channels = size
    layers["flatten"] = nn.Flatten()
    layers["hidden"] = nn.Linear(channels * (height // 4) * (width // 4), 128)
    layers["relu"] = nn.ReLU()
    layers["head"] = nn.Linear(128, classes)
    return Network(layers)


class _Image(nn.Module):
    """Inputs ``[B, ...]`` as images ``[B, C, H, W]``."""

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)

    def extra_repr(self) -> str:
        return "x".join(map(str, self.shape))


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    side = math.isqrt(math.prod(shape))
    if len(shape) == 1 and side * side == shape[0]:
        channels, height, width = 1, side, side
    elif len(shape) == 2:
        channels, height, width = 1, *shape
    elif len(shape) == 3:
        channels, height, width = shape
    else:
        raise ValueError(f"inputs of shape {list(shape)} are no images; cnn takes [C, H, W], [H, W] or a flat square")
    if height < 4 or width < 4:
        raise ValueError(f"images of {height}x{width} are too small for two poolings; 4x4 is the least, [C, H, W]")
    return channels, height, width


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind in ("group", "layer"):
        return nn.GroupNorm(8 if kind == "group" else 1, channels)
    raise ValueError(f"norm = {kind!r}; allowed are none, batch, group, layer")
