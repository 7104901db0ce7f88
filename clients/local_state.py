"""What belongs to a client: which parameters are its own, and what it keeps between rounds and during one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from clients.normalization import batch_norms
from clients.optimizers import Optimizer
from clients.recipe import Recipe
from clients.statistics import STATISTICS, Statistics
from clients.weights import Layout, share_all_but

#: Names of what a client keeps between rounds; a correction's own state stands under ``correction/``.
PERSONAL = "personal"
MOMENTS = "optimizer/"
STEPS = "optimizer/steps"
RELEASES = "dp_sgd/releases"
CORRECTION = "correction/"


def shared_layout(recipe: Recipe, model: nn.Module) -> Layout:
    """Which of the model's parameters the recipe shares, and which stay with the client.

    Raises:
        RequestError: for a pattern of personal parameters that matches none.
    """
    share = share_all_but(recipe.personal, model)
    if recipe.batch_norm != "local":
        return Layout(model, share)
    own = {id(parameter) for norm in batch_norms(model) for parameter in norm.parameters()}
    return Layout(model, lambda name, p: id(p) not in own and (share is None or share(name, p)))


def unshared(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The model's tensors that have no place in a shared row: frozen and personal parameters, buffers."""
    shared = set(layout.names)
    parameters = {id(p) for name, p in model.named_parameters() if name in shared}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in tensors.items() if id(tensor) not in parameters}


@torch.no_grad()
def put_unshared(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors that :func:`unshared` gave back into a model, in place."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def kept_state(recipe: Recipe, layout: Layout, optimizer: Optimizer, statistics: Statistics | None) -> dict[str, int]:
    """Name -> length of what local training keeps for every client between rounds; zeros mean a fresh start.

    Personal parameters are kept as offsets from the first ones, batch-norm statistics as :class:`Statistics` says.
    """
    kept = {PERSONAL: layout.personal.size} if layout.personal.size else {}
    if statistics is not None and recipe.batch_norm != "share_all":
        kept[STATISTICS] = statistics.kept_size
    if recipe.optimizer_state == "keep" and recipe.local_training is None:
        kept |= {f"{MOMENTS}{name}": layout.all.size for name in optimizer.state} | {STEPS: 1}
    if recipe.dp_sgd is not None:
        kept[RELEASES] = 1
    return kept


@dataclass
class Stack:
    """The blocks of clients in training, ``[k, ...]`` each and changed in place; most steps first.

    Attributes:
        clients: ``int64 [k]`` ids.
        rows: ``[k, D]`` weights.
        buffers: batch norm's running statistics by buffer, where they are tracked.
        moments: the optimiser's state by name.
        state: what the clients kept from earlier rounds.
        report: numbers for the record.
    """

    clients: np.ndarray
    rows: Tensor
    buffers: dict[str, Tensor]
    moments: dict[str, Tensor]
    state: dict[str, Tensor]
    report: dict[str, Tensor] = field(default_factory=dict)


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stands under a prefix, without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
