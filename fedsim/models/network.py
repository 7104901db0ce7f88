"""What the models share."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Sequential):
    """Layers in a row, the last of them called ``head``; inputs of any number type become that of the weights."""

    head: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.head.weight.dtype))


def groups(width: int) -> int:
    """Groups for a group norm: the most, up to 8, that divide ``width`` into equal groups of at least 2.

    A group of a single unit would always be normalised to zero.
    """
    return max((count for count in range(2, 9) if width % count == 0 and width // count >= 2), default=1)
