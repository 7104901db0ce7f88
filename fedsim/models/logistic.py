"""Softmax regression."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from fedsim.models.network import Network


def logistic(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """One linear layer from the flattened input to the classes' logits (multinomial logistic regression).

    Args:
        input_shape: shape of one example.
        classes: how many logits.
    """
    return Network(OrderedDict(flatten=nn.Flatten(), head=nn.Linear(math.prod(input_shape), classes)))
