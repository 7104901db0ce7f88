"""Batch norm when only weights and biases are shared: statistics never leave a client, the server estimates its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from clients.errors import RequestError


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The model's batch-norm layers, found by type and never by name."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def without_running_statistics(model: nn.Module) -> nn.Module:
    """Lets every batch and instance norm of ``model`` (in place) use the batch's own statistics and keep none.

    Local training normalises by batch statistics anyway; without buffers nothing can leak from one client to the next.
    """
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm normalises by the batch while all else (dropout) stays in evaluation mode."""
    norms = batch_norms(model)
    before = [(norm.training, norm.momentum, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.train()
        yield
    finally:
        for norm, (training, momentum, track) in zip(norms, before, strict=True):
            norm.momentum, norm.track_running_stats = momentum, track
            norm.train(training)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Estimates batch-norm statistics anew from unlabelled inputs (the statistics pass of sBN, Diao et al. 2021).

    Cumulative over the batches (``momentum=None``), from a fresh start; with one batch the first layer's statistics are
    exactly the inputs' mean and unbiased variance. Dropout is off; momentum and modes are restored.

    Args:
        model: changed in place (buffers only), and returned.
        batches: what ``model`` is called with; a mapping of columns is passed as it is.

    Raises:
        RequestError: where there is no batch, or one of a single example.
    """
    norms = batch_norms(model)
    if not norms:
        return model
    was_training = model.training
    model.eval()
    seen = 0
    with batch_statistics(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        for batch in batches:
            size = _size(batch)
            if size < 2:
                raise RequestError("evaluation.batch_norm: recalibration needs batches of at least 2 examples")
            model(batch)
            seen += size
    model.train(was_training)
    if not seen:
        raise RequestError("evaluation.batch_norm: recalibration has no proxy examples; set data.proxy above 1")
    return model


def _size(batch: Any) -> int:
    first: Tensor = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
    return len(first)
