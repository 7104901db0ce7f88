"""The multilayer perceptron."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import nn

from clients.recipe import Count
from fedsim.models.network import Network, groups


def mlp(
    *,
    input_shape: tuple[int, ...],
    classes: int,
    hidden: Sequence[Count] = (64,),
    norm: Literal["none", "batch", "group", "layer"] = "none",
) -> nn.Module:
    """Linear layers with ReLU between them, on the flattened input.

    Args:
        input_shape: shape of one example.
        classes: how many logits.
        hidden: width of each hidden layer; none of them makes it softmax regression.
        norm: what stands between a hidden layer and its ReLU: batch norm, group norm in at most 8 groups of at least 2
            units, or layer norm.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = math.prod(input_shape)
    for place, size in enumerate(hidden, start=1):
        layers[f"hidden{place}"] = nn.Linear(width, size)
        if norm != "none":
            layers[f"norm{place}"] = _norm(norm, size)
        layers[f"relu{place}"] = nn.ReLU()
        width = size
    layers["head"] = nn.Linear(width, classes)
    return Network(layers)


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm1d(width)
    if kind == "group":
        return nn.GroupNorm(groups(width), width)
    if kind == "layer":
        return nn.LayerNorm(width)
    raise ValueError(f"norm = {kind!r}; allowed are none, batch, group, layer")
