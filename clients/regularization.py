"""What holds local training back: penalties on weights, as gradients or as proximal maps, on blocks ``[k, D]``.

The proximal map of a penalty, ``argmin_w 1/2 ||w - b||^2 + penalty(w)``, reaches exact zeros where a step along its
gradient only jumps about them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from clients.normalization import NORMS
from clients.recipe import Regularization
from clients.weights import Layout, Slot

Amount = float | Tensor


def soft_threshold(row: Tensor, amount: Amount) -> Tensor:
    """``sign(w) max(|w| - amount, 0)``, the proximal map of ``amount ||w||_1`` (Tibshirani 1996): exact zeros.

    Args:
        row: weights of any shape.
        amount: not negative; a number, or a tensor that broadcasts (``[k, 1]``: one for each client).

    Raises:
        ValueError: for a negative number, or none.
    """
    if isinstance(amount, float | int) and not amount >= 0:
        raise ValueError(f"soft_threshold: amount = {amount}; give 0 or more")
    bound: Any = amount
    return row - row.clamp(-bound, bound)  # the same, in half the passes over the block


def elastic_net(row: Tensor, l1: Amount, l2: Amount) -> Tensor:
    """``soft(w, l1) / (1 + l2)``, the proximal map of ``l1 ||w||_1 + l2/2 ||w||^2`` (Zou and Hastie 2005)."""
    return soft_threshold(row, l1) / (1 + l2)


def group_shrink(groups: Tensor, amount: Amount, dim: int | tuple[int, ...] = -1) -> Tensor:
    """``w_g max(0, 1 - amount sqrt(|g|) / ||w_g||)``, the proximal map of the group lasso (Yuan and Lin 2006).

    Args:
        groups: weights, each group spread over the dimensions ``dim``. A group of zeros stays one.
        amount: not negative; a number, or a tensor that broadcasts against ``groups``.
        dim: the dimensions of one group.
    """
    dims = (dim,) if isinstance(dim, int) else dim
    size = math.prod(groups.shape[d] for d in dims)
    norm = torch.linalg.vector_norm(groups, dim=dims, keepdim=True)
    return groups * (1 - amount * size**0.5 / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(min=0)


def clip_norm(grads: Tensor, largest: float) -> Tensor:
    """Scales each row of ``[k, D]`` in place so that its Euclidean norm is at most ``largest`` (Pascanu et al. 2013).

    As torch's ``clip_grad_norm_``, row by row. A row with NaN or infinite entries is left as it is, to be found later.
    """
    norm = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
    if bool(norm.isinf().any()):  # Squares of float32 overflow long before the numbers do.
        norm = torch.linalg.vector_norm(grads, dim=1, keepdim=True, dtype=torch.float64)
    scale = (largest / (norm + 1e-6)).clamp(max=1).where(norm.isfinite(), 1)
    return grads.mul_(scale.to(grads.dtype))


def proximal_gradient(rows: Tensor, start: Tensor, mu: float) -> Tensor:
    """``mu (w - w_start)``, the gradient of ``mu/2 ||w - w_start||^2``, for rows ``[k, d]`` and ``start`` ``[d]``."""
    return (rows - start).mul_(mu)


class Penalties:
    """A recipe's penalties on a block ``[k, D]``, in place; what has no amount costs nothing and changes no bit.

    A learning rate is a number, or ``[k, 1]``, ``[1, D]``, ``[k, D]`` where clients or parameters differ.

    Args:
        regularization: the amounts.
        model: tells biases and norm layers from other weights, by type.
        layout: the training layout, shared parameters first.
    """

    def __init__(self, regularization: Regularization, model: nn.Module, layout: Layout):
        self.said = regularization
        modules = list(model.modules())
        places = {id(p): (module, name) for module in modules for name, p in module.named_parameters(recurse=False)}
        where = {name: places[id(parameter)] for name, parameter in model.named_parameters()}
        falls = [self._falls(slot, *where[slot.name]) for slot in layout]
        #: ``[D]``, 1 where the penalties fall; None where they fall everywhere.
        self.mask: Tensor | None = None
        if not all(falls):
            parts = [torch.full((slot.size,), float(on)) for slot, on in zip(layout, falls, strict=True)]
            self.mask = torch.cat(parts).to(layout.dtype)
        #: Weights made of output channels, each as a shape whose channels are spread over dimensions 1 and 3.
        self.channels = {slot: shape for slot in layout if (shape := _channels(slot, where[slot.name][0]))}

    def _falls(self, slot: Slot, module: nn.Module, name: str) -> bool:
        """Whether L1, L2, decay and elastic net fall on a parameter, which goes by ``name`` in its module."""
        if isinstance(module, NORMS):
            return self.said.penalize_norms
        return self.said.penalize_biases or not _is_bias(slot, name)

    @property
    def active(self) -> tuple[bool, bool, bool]:
        """Whether ``gradient``, ``before`` and ``after`` have anything to do."""
        said = self.said
        shrinks = said.l1 or said.elastic_net.l1 or said.elastic_net.l2 or (said.group_lasso and self.channels)
        return bool(said.l2 or said.proximal), bool(said.weight_decay), bool(shrinks)

    def gradient(self, grads: Tensor, rows: Tensor, start: Tensor, shared: int) -> None:
        """Adds the gradients of the proximal term and of L2.

        Args:
            grads: ``[k, D]``.
            rows: ``[k, D]`` weights.
            start: ``[shared]`` the global weights; biases and norms are held to them too (Li et al. 2020).
            shared: how many columns, the first ones, are shared.
        """
        if self.said.proximal:
            grads[:, :shared].add_(proximal_gradient(rows[:, :shared], start, self.said.proximal))
        if self.said.l2:
            if self.mask is None:
                grads.add_(rows, alpha=self.said.l2)
            else:
                grads.addcmul_(rows, self.mask, value=self.said.l2)

    def before(self, rows: Tensor, lr: Amount) -> None:
        """Decoupled decay, ``w <- w - lr weight_decay w`` (Loshchilov and Hutter 2019)."""
        if self.said.weight_decay:
            rows.mul_(1 - self._amount(lr, self.said.weight_decay))

    def after(self, rows: Tensor, lr: Amount) -> None:
        """The proximal maps of ``lr`` times L1, the elastic net and the group lasso, in this order."""
        net = self.said.elastic_net
        if self.said.l1:
            rows.copy_(soft_threshold(rows, self._amount(lr, self.said.l1)))
        if net.l1 or net.l2:
            rows.copy_(elastic_net(rows, self._amount(lr, net.l1), self._amount(lr, net.l2)))
        if self.said.group_lasso:
            amount = lr * self.said.group_lasso
            for slot, shape in self.channels.items():
                weight, here = rows[:, slot.slice].view(len(rows), *shape), amount
                if isinstance(amount, Tensor):  # within a parameter the rate is one
                    place = slot.start if amount.shape[1] > 1 else 0
                    here = amount[:, place].reshape(-1, 1, 1, 1, 1)
                weight.copy_(group_shrink(weight, here, dim=(2, 4)))

    def _amount(self, lr: Amount, penalty: float) -> Amount:
        return lr * penalty if self.mask is None else lr * penalty * self.mask


def _is_bias(slot: Slot, name: str) -> bool:
    """``bias``, and the ``bias_ih_l0`` and ``in_proj_bias`` of recurrent and attention layers."""
    return len(slot.shape) == 1 and "bias" in name.split("_")


def _channels(slot: Slot, module: nn.Module) -> tuple[int, int, int, int] | None:
    """A weight's shape ``(a, b, c, e)`` whose output channels ``(a, c)`` are spread over ``b`` and ``e``.

    Output channels come first, except in a transposed convolution. None for biases, and for norms of any shape.
    """
    if len(slot.shape) < 2 or isinstance(module, NORMS):
        return None
    if isinstance(module, _ConvTransposeNd):
        inputs, outputs, *window = slot.shape
        return module.groups, inputs // module.groups, outputs, math.prod(window)
    return slot.shape[0], 1, 1, slot.size // slot.shape[0]


def describe(regularization: Regularization) -> str:
    """One line for the record: what the reported training loss leaves out; empty where that is nothing."""
    said, net = regularization, regularization.elastic_net
    amounts = {
        "l1": said.l1,
        "l2": said.l2,
        "weight decay": said.weight_decay,
        "elastic net l1": net.l1,
        "elastic net l2": net.l2,
        "group lasso": said.group_lasso,
        "proximal": said.proximal,
        "label smoothing": said.label_smoothing,
    }
    told = [f"{name} {amount:g}" for name, amount in amounts.items() if amount]
    if not told:
        return ""
    listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    verb = "is" if len(told) == 1 else "are"
    return f"The reported training loss is the task's own: {listed} {verb} not part of it."
