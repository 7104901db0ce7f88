"""Dropout of a whole model, found by type: dropout layers, and the rates that attention and recurrent layers carry."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def set_dropout(model: nn.Module, rate: float) -> int:
    """Sets the rate of every dropout of ``model`` in place; returns how many there are."""
    count = 0
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = rate
            count += 1
        elif isinstance(getattr(module, "dropout", None), float):
            if getattr(module, "num_layers", 2) > 1:  # a recurrent layer alone has nothing to drop between
                count += 1
            setattr(module, "dropout", rate)  # noqa: B010  (a tensor or module, for all that the type checker knows)
    return count
