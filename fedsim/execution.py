"""Stacked or loop: a static rule on device and model, after two clients were trained both ways."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from clients.dropout import set_dropout
from clients.local_state import shared_layout
from clients.training import Trained
from fedsim.worker import Setup

_AGREE = 1e-4
_LARGEST_STACK = 64
_LOOP_CHUNKS = 32
_LARGE_LSTM = 64


@dataclass(frozen=True)
class Execution:
    """How clients train, and why.

    Attributes:
        stacked: many clients at once, or one after another.
        reason: one line for the record.
    """

    stacked: bool
    reason: str

    @property
    def name(self) -> str:
        return "stacked" if self.stacked else "loop"


def decide(setup: Setup) -> Execution:
    """Which execution the recipe's ``execution`` comes to for this model, loss and correction.

    Raises:
        ValueError: where ``stacked`` is asked for and cannot be; the message is the reason.
    """
    asked = setup.recipe.execution
    if asked == "loop":
        return Execution(False, "asked for")
    if setup.local_training is not None:
        return Execution(False, "local_training trains client by client")
    if setup.recipe.dp_sgd is not None:
        return Execution(False, "dp_sgd trains client by client, through Opacus")
    if asked == "auto" and any(
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in setup.model.modules()
    ):
        return Execution(False, "convolutions on a CPU are faster one client at a time")
    if asked == "auto" and any(isinstance(m, nn.LSTM) and m.hidden_size >= _LARGE_LSTM for m in setup.model.modules()):
        return Execution(False, f"LSTMs of {_LARGE_LSTM} units and more are faster one client at a time on a CPU")
    obstacle = probe(setup)
    if obstacle and asked == "stacked":
        raise ValueError(obstacle)
    if obstacle:
        return Execution(False, obstacle)
    return Execution(True, "asked for" if asked == "stacked" else "two clients trained both ways agree")


def probe(setup: Setup) -> str:
    """Trains two clients both ways for a few steps; empty if they agree, else what stands in the way.

    One of the two has a short last batch and they have unequal numbers of steps, so that masking is tried too. Dropout
    is off: the two ways draw differently.
    """
    able = setup.population.trainable
    enough = able[setup.population.splits["train"].sizes[able] > 1]  # one example is too few for batch norm
    clients = (enough if len(enough) > 1 else able)[:2]
    if len(clients) < 2:
        return "there are not two clients to stack"
    few = _without_dropout(setup)
    short = {"epochs": 1, "steps": None, "early_stopping": None}
    few = replace(few, recipe=setup.recipe.model_copy(update=short))
    loop, stack = (_trained(few, clients, stacked) for stacked in (False, True))
    if loop.failures:
        return ""  # the client's own code raises either way; training will say so
    if stack.failures or len(stack.updates) < len(clients):
        return f"vmap cannot trace it: {stack.failures[0].message}"
    apart = _apart(loop, stack)
    if apart < _AGREE:
        return ""
    # Rounding alone can set them apart: Adam turns the noise of a gradient that is zero (an attention's key bias, say)
    # into steps of full length. In float64 such a difference is gone, and any other is not.
    wide = _in_float64(few)
    if wide is not few and _apart(*(_trained(wide, clients, stacked) for stacked in (False, True))) < _AGREE**2:
        return ""
    return f"stacked and loop training differ by {apart:.1e} (above {_AGREE:g})"


def _trained(setup: Setup, clients: np.ndarray, stacked: bool) -> Trained:
    """A few steps of these clients from the first weights and no state."""
    trainer = setup.trainer(stacked=stacked, members=_few(setup, clients))
    return trainer.train(clients, setup.layout.flatten(setup.model), 0)


def _apart(loop: Trained, stack: Trained) -> float:
    """How far the two are apart, relative to the loop's update; infinite where one of them failed."""
    if len(loop.updates) != len(stack.updates):
        return math.inf
    return float((loop.updates.rows - stack.updates.rows).norm() / loop.updates.rows.norm().clamp(min=1e-30))


def _without_dropout(setup: Setup) -> Setup:
    model = copy.deepcopy(setup.model)
    set_dropout(model, 0.0)
    return replace(setup, model=model)


def _in_float64(setup: Setup) -> Setup:
    """The same with float64 parameters and rows; the setup itself where its rows are float64."""
    if setup.layout.dtype == torch.float64:
        return setup
    model = copy.deepcopy(setup.model).double()
    return replace(setup, model=model, layout=shared_layout(setup.recipe, model))


def _few(setup: Setup, clients: np.ndarray) -> Callable[[int], np.ndarray]:
    """At most a few batches of each client, the second one shorter by half a batch."""
    batch = setup.recipe.batch_size
    most = {int(clients[0]): 2 * batch + batch // 2, int(clients[1]): batch + math.ceil(batch / 2)}
    return lambda client: setup.population.splits["train"].of(client)[: max(2, most[client])]


def chunk_sizes(setup: Setup, stacked: bool, cohort: int, memory_mib: int) -> int:
    """Clients a chunk: the stack trained at once, or so many loop clients that a round has about 32 chunks.

    A function of the experiment alone, never of the number of workers.
    """
    if not stacked:
        return max(1, -(-cohort // _LOOP_CHUNKS))
    block = setup.layout.all
    per_client = block.size * block.dtype.itemsize * (3 + len(setup.optimizer.state))
    return max(1, min(_LARGEST_STACK, -(-cohort // 2), (memory_mib << 20) // per_client))
