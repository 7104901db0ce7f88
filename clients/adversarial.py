"""Adversarial examples: inputs moved within a small box so that the loss rises, and local training on them.

The attacks are untargeted, under the maximum norm and in the units of the inputs: FGSM (Goodfellow, Shlens and Szegedy
2015, "Explaining and harnessing adversarial examples") and PGD (Madry et al. 2018, "Towards deep learning models
resistant to adversarial attacks"). Clients that train on them do so against their own weights, at every local step
(Zizzo et al. 2020, "FAT: Federated adversarial training").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clients import randomness
from clients.errors import RequestError
from clients.normalization import batch_norms
from clients.objective import TaskModule
from clients.recipe import Adversarial
from clients.statistics import untracked
from clients.task import Batch, Task, weighted_loss
from clients.weights import Layout

#: The gradient of a loss with respect to the inputs, of their shape.
Gradient = Callable[[Tensor], Tensor]

#: The lowest and the highest value of an input.
Range = tuple[float, float]


def fgsm(
    gradient: Gradient, x: Tensor, eps: float, *, input_range: Range | None = None, targeted: bool = False
) -> Tensor:
    """The fast gradient sign method: ``x + eps sign(gradient(x))``; a gradient of 0 moves nothing.

    Args:
        gradient: of the loss of each example, at ``x``.
        x: real-valued inputs of any shape; unchanged.
        eps: the farthest that a value moves, in the units of ``x``.
        input_range: what the result is clamped to.
        targeted: whether the loss, then that of a wanted label, is to fall instead.

    Raises:
        RequestError: for an ``eps`` below 0, or inputs that are not floating-point numbers.
    """
    _check(x, eps)
    return _clamp(_moved(gradient, x.detach(), -eps if targeted else eps), input_range)


def pgd(
    gradient: Gradient,
    x: Tensor,
    eps: float,
    *,
    steps: int,
    step_size: float | None = None,
    start: Tensor | None = None,
    input_range: Range | None = None,
    targeted: bool = False,
) -> Tensor:
    """Projected gradient descent: FGSM's step again and again, back into the ball around ``x``, then into the range.

    Args:
        gradient: of the loss of each example, at any inputs of the shape of ``x``.
        x: real-valued inputs of any shape, within the range; unchanged.
        eps: the farthest that a value moves, in the units of ``x``.
        steps: how many gradients are taken.
        step_size: how far a value moves in one step; left out, ``2.5 eps / steps``, which reaches the ball's edge from
            anywhere in it.
        start: where in the ball the attack begins, of the shape of ``x`` in [-1, 1] and in units of ``eps``
            (:func:`random_start`); left out, at ``x``.
        input_range: what every iterate is clamped to.
        targeted: whether the loss, then that of a wanted label, is to fall instead.

    Raises:
        RequestError: for settings out of range, or inputs that are not floating-point numbers.
    """
    _check(x, eps)
    if steps < 1:
        raise RequestError(f"pgd: steps = {steps}; give at least 1")
    size = 2.5 * eps / steps if step_size is None else step_size
    if not 0 <= size < math.inf:
        raise RequestError(f"pgd: step_size = {step_size}; give a number of at least 0")
    x = x.detach()
    low, high = x - eps, x + eps
    found = x if start is None else _clamp(x + eps * start.detach().to(x.dtype), input_range)
    for _ in range(steps):
        moved = _moved(gradient, found, -size if targeted else size)
        found = _clamp(torch.minimum(torch.maximum(moved, low), high), input_range)
    return found


def _check(x: Tensor, eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise RequestError(
            f"adversarial examples: eps = {eps}; give a number of at least 0, in the units of the inputs"
        )
    if not x.is_floating_point():
        raise RequestError(
            f"adversarial examples: the inputs are {str(x.dtype).removeprefix('torch.')}, along which there is no"
            " gradient; give real-valued ones"
        )


def _moved(gradient: Gradient, x: Tensor, by: float) -> Tensor:
    with torch.enable_grad():
        found = gradient(x.detach())  # its own handle, so that requires_grad_ in there is not seen here
    return x + by * found.detach().sign()


def _clamp(x: Tensor, input_range: Range | None) -> Tensor:
    return x if input_range is None else x.clamp(*input_range)


def random_start(
    seed: int, purpose: str, round: int, clients: np.ndarray, shape_of_one_client: tuple[int, ...], draw: int = 0
) -> Tensor:
    """Where attacks begin: uniform draws in [-1, 1], one stream a client whoever else is in the stack.

    A client's first examples get the same numbers however many follow them, so that padding does not matter.

    Args:
        seed: the experiment's seed.
        purpose: what the start is for.
        round: the round.
        clients: ids ``int64 [k]``.
        shape_of_one_client: e.g. ``(B, C, H, W)``.
        draw: how many draws of each stream were used before.

    Returns:
        ``float32 [k, *shape_of_one_client]``.
    """
    keys = randomness.keys(seed, purpose, round, clients)
    found = np.empty((len(keys), math.prod(shape_of_one_client)), dtype=np.float32)
    for i in range(len(keys)):  # what is drawn for one client fits the processor's cache; a whole stack does not
        found[i] = randomness.uniforms(keys[i : i + 1], found.shape[1], draw)[0]
    return torch.from_numpy(found).mul_(2).sub_(1).view(len(keys), *shape_of_one_client)


@contextmanager
def attacking(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is off and batch norm normalises as it did before, by the batch in training, and learns nothing.

    Running statistics, the model's own or those that stand in for a client's, do not move; every mode is restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms, fast = set(batch_norms(model)), torch.backends.mha.get_fastpath_enabled()
    try:
        # In evaluation mode attention takes a kernel without a derivative, where vmap hides that one is wanted.
        torch.backends.mha.set_fastpath_enabled(False)
        with untracked(model):
            for module, training in modes:
                # Not model.eval(), which would change the batch norms and may be a user's own.
                module.training = training and module in norms
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


def input_gradient(
    module: TaskModule,
    tensors: Mapping[str, Tensor],
    batch: Batch,
    mask: Tensor | None = None,
    *,
    stacked: bool,
    column: str = "x",
) -> Tensor:
    """The gradient of each client's summed task loss with respect to its inputs, by plain autograd or under ``vmap``.

    No parameter gets a gradient, and no mode or running statistic of the model changes (:func:`attacking`).

    Args:
        module: the model, seen through its task.
        tensors: the clients' weights by parameter name, ``[k, ...]`` each; those that are missing are the model's own.
        batch: columns ``[k, B, ...]``.
        mask: ``bool [k, B]`` of the examples whose loss is summed, or None where all are.
        stacked: whether all clients are computed at once.
        column: the inputs' name in the batch.

    Returns:
        ``[k, B, ...]``, 0 where the loss does not depend on an input.
    """

    def one(named: Mapping[str, Tensor], columns: Batch, real: Tensor | None) -> Tensor:
        # A model that changes its inputs in place changes a copy.
        outputs = module.with_weights(named, {**columns, column: columns[column].clone()})
        values = weighted_loss(module.task, outputs, columns)[0]
        return (values if real is None else values * real).sum()

    x = batch[column].detach().requires_grad_()
    columns = {**batch, column: x}
    with torch.enable_grad(), attacking(module.model):
        if stacked:
            every = (0, 0, None if mask is None else 0)
            losses = torch.vmap(one, every, randomness="different")(dict(tensors), columns, mask)
        else:
            losses = torch.stack([one(*_of_client(i, tensors, columns, mask)) for i in range(len(x))])
        total = losses.sum()
        if not total.requires_grad:  # a model that its inputs reach through comparisons alone
            return torch.zeros_like(x, requires_grad=False)
        (found,) = torch.autograd.grad(total, [x], materialize_grads=True)
    return found


def _of_client(
    i: int, tensors: Mapping[str, Tensor], columns: Batch, mask: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    named = {name: tensor[i] for name, tensor in tensors.items()}
    return named, {name: values[i] for name, values in columns.items()}, None if mask is None else mask[i]


def gradient_of(model: nn.Module, task: Task, batch: Batch, *, column: str = "x") -> Gradient:
    """The gradient that :func:`fgsm` and :func:`pgd` follow, of one model in the mode that it is in (dropout off).

    Args:
        model: the model, as a rule in evaluation mode; unchanged.
        task: whose loss is to rise.
        batch: columns ``[B, ...]``; what the gradient is called with stands in for the inputs.
        column: the inputs' name in the batch.
    """
    module = TaskModule(model, task)

    def gradient(x: Tensor) -> Tensor:
        alone = {name: values[None] for name, values in {**batch, column: x}.items()}
        return input_gradient(module, {}, alone, stacked=False, column=column)[0]

    return gradient


@dataclass(frozen=True)
class Adversary:
    """Makes the first part of every client's batch adversarial, against the weights that the client has at that step.

    What rises is the task's own loss, summed over the examples that are moved. Where the model has batch norm, the rest
    of the batch runs along, since it shares the statistics.

    Attributes:
        module: the model, seen through its task.
        layout: where a parameter lies in a row.
        settings: the attack.
        stacked: whether all clients are computed at once.
        input_range: what inputs are clamped to.
        seed: the experiment's seed.
        column: the inputs' name in the batch.
    """

    module: TaskModule
    layout: Layout
    settings: Adversarial
    stacked: bool
    input_range: Range | None = None
    seed: int = 0
    column: str = "x"

    def __call__(self, w: Tensor, batch: Batch, counts: Tensor, round: int, clients: np.ndarray, step: int) -> Batch:
        """The batch with its first ``ceil(fraction count)`` examples of each client moved; nothing changes in place.

        Args:
            w: the clients' weights ``[k, D]``.
            batch: columns ``[k, B, ...]``, shuffled.
            counts: real examples of each client, ``int64 [k]``; what is beyond them is never moved.
            round: the round.
            clients: ids ``int64 [k]``.
            step: the local step.

        Raises:
            RequestError: for inputs that are not floating-point numbers.
        """
        # Less a rounding error: 0.28 * 25 is 7.000000000000001.
        share = (counts.double() * self.settings.fraction - 1e-9).ceil().long()
        size = int(share.max()) if len(share) else 0
        if size == 0:
            return batch
        inputs = batch[self.column]
        _check(inputs, self.settings.eps)
        seen = inputs.shape[1] if batch_norms(self.module.model) else size
        columns = {name: values[:, :seen] for name, values in batch.items()}
        chosen = torch.arange(seen) < share[:, None]
        mask = None if bool(chosen.all()) else chosen
        tensors = self.layout.unflatten(w.detach())
        x, rest = inputs[:, :size], inputs[:, size:seen]

        def gradient(at: Tensor) -> Tensor:
            here = {**columns, self.column: torch.cat([at, rest], dim=1) if rest.shape[1] else at}
            found = input_gradient(self.module, tensors, here, mask, stacked=self.stacked, column=self.column)
            return found[:, :size]

        moved = self._attack(gradient, x, round, clients, step)
        made = inputs.clone()
        here = chosen[:, :size].view(*chosen[:, :size].shape, *[1] * (x.dim() - 2))
        made[:, :size] = torch.where(here, moved, x)
        return {**batch, self.column: made}

    def _attack(self, gradient: Gradient, x: Tensor, round: int, clients: np.ndarray, step: int) -> Tensor:
        """The inputs ``[k, n, ...]`` moved."""
        s = self.settings
        if s.attack == "fgsm":
            return fgsm(gradient, x, s.eps, input_range=self.input_range)
        start = None
        if s.random_start:
            # A stream a step: how many draws earlier steps took depends on who else was in the stack.
            start = random_start(self.seed, f"adversarial start, step {step}", round, clients, tuple(x.shape[1:]))
        return pgd(gradient, x, s.eps, steps=s.steps, step_size=s.step_size, start=start, input_range=self.input_range)
