"""Feature shift: each client sees its inputs through a noise, a rotation or a brightness of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clients import randomness
from clients.errors import RequestError
from fedsim.data.dealing import Partition

if TYPE_CHECKING:
    from torch import Tensor

#: Numbers that are drawn at once, so that noise for many examples takes little memory.
_BLOCK = 2**21


@dataclass(frozen=True)
class FeatureShift:
    """What happens to the inputs of each of ``clients`` clients.

    Attributes:
        kind: ``noise`` adds Gaussian noise whose standard deviation is ``amount * (k + 1) / clients`` for client ``k``
            (Li, Diao, Chen and He 2022); ``rotation`` turns images anticlockwise by angles evenly spread over
            ``[-amount, amount]`` degrees; ``brightness`` multiplies by gains evenly spread over ``1 - amount`` to
            ``1 + amount``.
        amount: see there.
        clients: how many.
    """

    kind: Literal["noise", "rotation", "brightness"]
    amount: float
    clients: int

    def of(self, clients: Any) -> np.ndarray:
        """The standard deviation, angle in degrees or gain of each of some clients, ``float64``."""
        ids = np.asarray(clients)
        if self.kind == "noise":
            return self.amount * (ids + 1) / self.clients
        place = 2 * ids / (self.clients - 1) - 1 if self.clients > 1 else np.zeros(ids.shape)
        return self.amount * place + (1 if self.kind == "brightness" else 0)

    def apply(
        self,
        x: Tensor,
        clients: Tensor,
        examples: Tensor,
        seed: int,
        input_range: tuple[float, float] | None = None,
    ) -> Tensor:
        """Shifted inputs; an example's are the same whatever others are given beside it.

        Args:
            x: inputs ``[n, ...]``, floating point.
            clients: ``int64 [n]`` whose each is.
            examples: ``int64 [n]`` positions in the pool; each has a noise of its own.
            seed: the seed that noise is drawn by.
            input_range: ``(low, high)`` that the result is held to. What a rotation brings in from outside the image is
                ``low``, or 0 where there is no range.

        Returns:
            ``[n, ...]`` of the same type; ``x`` is left as it is.

        Raises:
            RequestError: for inputs that are no numbers with a fraction, and for a rotation of what is no image.
        """
        import torch

        if not x.is_floating_point():
            raise RequestError(f"data.partition.kind: {self.kind} changes floating-point inputs; these are {x.dtype}")
        amounts = self.of(clients.cpu().numpy())
        shifts = torch.from_numpy(amounts).to(x)
        if self.kind == "rotation":
            shifted = _rotated(x, amounts, 0.0 if input_range is None else input_range[0])
        elif self.kind == "brightness":
            shifted = x * shifts.reshape(-1, *[1] * (x.dim() - 1))
        else:
            shifted = x.clone()
            flat, start = shifted.reshape(len(x), math.prod(x.shape[1:])), 0
            for noise in _noise(examples.cpu().numpy(), flat.shape[1], seed):
                rows = slice(start, start + len(noise))
                flat[rows] += torch.from_numpy(noise).to(x) * shifts[rows, None]
                start += len(noise)
            shifted = flat.reshape(x.shape)
        return shifted if input_range is None else shifted.clamp(*input_range)


class ShiftedPartition(Partition):
    """A partition whose clients see their inputs through ``shift``; unpacks into ``order, offsets`` as any."""

    shift: FeatureShift

    def __new__(cls, order: np.ndarray, offsets: np.ndarray, shift: FeatureShift) -> ShiftedPartition:
        made = super().__new__(cls, order, offsets)
        made.shift = shift
        return made

    def __getnewargs__(self) -> Any:
        return (*self, self.shift)


def _noise(examples: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Standard normal numbers of each example, ``float64 [n, size]`` in blocks of rows."""
    from scipy.special import ndtri  # number by number: numpy's sine and logarithm round by where a number stands

    rows = max(1, _BLOCK // max(1, size))
    for start in range(0, len(examples), rows):
        keys = randomness.keys(seed, "feature shift", clients=examples[start : start + rows])
        yield ndtri(np.maximum(randomness.uniforms(keys, size), 2.0**-54))


def _rotated(x: Tensor, degrees: np.ndarray, outside: float) -> Tensor:
    """Images turned anticlockwise about their middle, each by its own angle, by bilinear interpolation.

    Args:
        x: ``[n, C, H, W]``, ``[n, H, W]``, or flat square images ``[n, side * side]``.
        degrees: ``[n]``.
        outside: the value beyond the edges.
    """
    import torch
    from torch.nn.functional import grid_sample

    height, width = _image(tuple(x.shape[1:]))
    images = x.reshape(len(x), math.prod(x.shape[1:]) // (height * width), height, width) - outside
    # in pixels from the middle and element by element: a product of matrices may round by how many there are
    down = (torch.arange(height).to(x) - (height - 1) / 2)[None, :, None]
    right = (torch.arange(width).to(x) - (width - 1) / 2)[None, None, :]
    radians = np.deg2rad(degrees).tolist()
    cosine, sine = (torch.tensor([of(a) for a in radians]).to(x)[:, None, None] for of in (math.cos, math.sin))
    grid = torch.stack(
        [(cosine * right - sine * down) * (2 / width), (sine * right + cosine * down) * (2 / height)], -1
    )
    return (grid_sample(images, grid, align_corners=False) + outside).reshape(x.shape)


def _image(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of an example of that shape."""
    if len(shape) in (2, 3):
        return shape[-2], shape[-1]
    side = math.isqrt(shape[0]) if len(shape) == 1 else 0
    if side < 2 or side * side != shape[0]:
        raise RequestError(
            f"data.partition.kind: rotation turns images [C, H, W], [H, W] or flat squares, and an example here is "
            f"{list(shape)}; take noise or brightness"
        )
    return side, side
