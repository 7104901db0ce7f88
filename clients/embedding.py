"""Embeddings as vmap should run them: its rule forgets, in the gradient, that padding has none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clients.errors import RunError


def keep_padding(model: nn.Module) -> nn.Module:
    """Keeps the padding's row of every embedding of ``model`` (in place) from being trained under ``vmap``.

    Parameters, their names and results stay as they are. ``scale_grad_by_freq`` is refused: how often a word occurs is
    not known from a batch that is filled up.

    Args:
        model: changed in place (the class of its embeddings with such a setting), and returned.
    """
    for module in model.modules():
        told = isinstance(module, nn.Embedding) and (module.padding_idx is not None or module.scale_grad_by_freq)
        if told and not isinstance(module, _Embedding):
            own = type(module)
            module.__class__ = _Embedding if own is nn.Embedding else type(own.__name__, (own, _Embedding), {})
    return model


class _Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        if self.scale_grad_by_freq:
            raise RunError(
                "nn.Embedding: scale_grad_by_freq cannot be trained in a stack; leave it out, or set"
                ' client.execution = "loop"'
            )
        found = super().forward(input)
        padding = torch.eq(input, self.padding_idx)  # type: ignore[arg-type]
        return torch.where(padding[..., None], found.detach(), found)
