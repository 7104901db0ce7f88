"""Arrays of a model that are no shared parameters by name: the other names of tied ones, and frozen ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clients.errors import RequestError
from clients.normalization import FixedBatchNorm, batch_norms
from clients.weights import Layout


def aliases(model: nn.Module, layout: Layout) -> dict[str, str]:
    """Other names of the layout's parameters -> their names there: a tied parameter has several."""
    every = dict(model.named_parameters(remove_duplicate=False))
    names = {id(every[name]): name for name in layout.names}
    return {
        name: names[id(parameter)]
        for name, parameter in every.items()
        if id(parameter) in names and names[id(parameter)] != name
    }


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """What of the model stands for good: parameters that are not trained, and batch norms that are fixed."""
    found = {
        name: parameter.detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    for place, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FixedBatchNorm):
            found |= {f"{place}.{name}": buffer for name, buffer in module.named_buffers()}
    return found


@torch.no_grad()
def with_frozen(model: nn.Module, sent: Mapping[str, Tensor], made: nn.Module, lasting: bool) -> nn.Module:
    """The model with the frozen tensors that were sent in place of its own.

    Args:
        model: the model.
        sent: tensors by name; those that are not frozen in the model are not looked at.
        made: what this gave the last time.
        lasting: whether the server sends them with every message.

    Returns:
        ``model`` itself where it has these tensors already, or ``made`` where that has; else a copy.

    Raises:
        RequestError: for another shape, for running statistics of a frozen batch norm that has none of its own, and for
            other values from a server that will not send them again.
    """
    own = frozen(model)
    for name, tensor in sent.items():
        if name in own and tensor.shape != own[name].shape:
            raise RequestError(
                f"weights: {name!r}, which is frozen, has shape {tuple(tensor.shape)} where the model has"
                f" {tuple(own[name].shape)}"
            )
    _refuse_statistics(model, sent)
    wanted = {name: sent[name].to(mine) if name in sent else mine for name, mine in own.items()}
    other = [name for name, mine in own.items() if not torch.equal(wanted[name], mine)]
    if not other:
        return model
    if not lasting:
        raise RequestError(
            f"weights: {other[0]!r} is frozen, and the server sends other values than the client's, and will not send"
            " them again; give client_app the model with these weights, or start from initial_arrays(model, recipe)"
        )
    if all(torch.equal(wanted[name], tensor) for name, tensor in frozen(made).items()):
        return made
    copied = copy.deepcopy(model)
    for name, place in frozen(copied).items():
        place.copy_(wanted[name])
    return copied


def _refuse_statistics(model: nn.Module, sent: Mapping[str, Tensor]) -> None:
    """A batch norm that was frozen without statistics goes by those of its inputs, whatever the server's goes by."""
    norms = set(batch_norms(model))
    for place, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        if module not in norms or not parameters or any(p.requires_grad for p in parameters):
            continue
        mean, variance = sent.get(f"{place}.running_mean"), sent.get(f"{place}.running_var")
        if (mean is not None and bool((mean != 0).any())) or (variance is not None and bool((variance != 1).any())):
            raise RequestError(
                f"weights: the batch norm {place!r} is frozen, and the server sends statistics of it where the client's"
                " has none; give client_app the model with its published weights, statistics included"
            )
