"""What the models share."""

from __future__ import annotations

import math

from torch import Tensor, nn


class Network(nn.Sequential):
    """Layers in a row, the last of them called ``head``; inputs of any number type become that of the weights."""

    head: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.head.weight.dtype))


class Image(nn.Module):
    """Inputs ``[B, ...]`` as images ``[B, C, H, W]``."""

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)

    def extra_repr(self) -> str:
        return "x".join(map(str, self.shape))


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """``(C, H, W)`` of inputs ``[C, H, W]``, ``[H, W]`` (one channel) or a flat square, ``[64]`` for 8x8.

    Raises:
        ValueError: for inputs that are no images, or images of less than 4x4.
    """
    side = math.isqrt(math.prod(shape))
    if len(shape) == 1 and side * side == shape[0]:
        channels, height, width = 1, side, side
    elif len(shape) == 2:
        channels, height, width = 1, *shape
    elif len(shape) == 3:
        channels, height, width = shape
    else:
        raise ValueError(f"inputs of shape {list(shape)} are no images; give [C, H, W], [H, W] or a flat square")
    if height < 4 or width < 4:
        raise ValueError(f"images of {height}x{width} are too small; 4x4 is the least, [C, H, W]")
    return channels, height, width
