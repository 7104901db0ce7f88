"""The multilayer perceptron."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from clients.normalization import Norm, replace_batch_norm
from clients.recipe import Count, Rate
from fedsim.models.network import Network


def mlp(
    *,
    input_shape: tuple[int, ...],
    classes: int,
    hidden: Sequence[Count] = (64,),
    norm: Norm = "none",
    dropout: Rate = 0.0,
) -> nn.Module:
    """Linear layers with ReLU between them, on the flattened input.

    Args:
        input_shape: shape of one example.
        classes: how many logits.
        hidden: width of each hidden layer; none of them makes it softmax regression.
        norm: what stands between a hidden layer and its ReLU: batch norm, group norm in at most 8 groups of at least 2
            units, or layer norm.
        dropout: share of each hidden layer's units that is dropped after its ReLU, in training.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = math.prod(input_shape)
    for place, size in enumerate(hidden, start=1):
        layers[f"hidden{place}"] = nn.Linear(width, size)
        if norm != "none":
            batch_norm = nn.BatchNorm1d(size)
            layers[f"norm{place}"] = nn.LayerNorm(size) if norm == "layer" else replace_batch_norm(batch_norm, norm)
        layers[f"relu{place}"] = nn.ReLU()
        if dropout:
            layers[f"dropout{place}"] = nn.Dropout(dropout)
        width = size
    layers["head"] = nn.Linear(width, classes)
    return Network(layers)
