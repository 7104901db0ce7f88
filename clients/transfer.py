"""Starting from weights that others trained: published ones, frozen parameters, low-rank adapters, rates by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from urllib.error import URLError

import torch
from torch import Tensor, nn

from clients import randomness
from clients.errors import RequestError
from clients.normalization import FixedBatchNorm, batch_norms, has_statistics
from clients.patterns import listed, matches, selected
from clients.recipe import Adapters, Recipe
from clients.task import Batch, Task, weighted_loss
from clients.weight_files import KEY, put_weights
from clients.weights import Layout


def load_published(
    model: nn.Module, weights: str = "DEFAULT", architecture: str | None = None, new: Sequence[str] = ()
) -> nn.Module:
    """Puts the weights that torchvision publishes for an architecture into a model, in place.

    Args:
        model: one of that architecture, but for the layers in ``new``.
        weights: their name, e.g. ``"IMAGENET1K_V1"``.
        architecture: the architecture's name, e.g. ``"resnet18"``; left out, the model's ``architecture`` attribute.
        new: patterns of layers that stay as they are in the model.

    Raises:
        RequestError: for an unknown name, weights that do not fit, and where they cannot be fetched.
    """
    from torchvision.models import get_model_weights  # takes a second

    name = architecture or getattr(model, "architecture", None)
    if name is None:
        raise RequestError(
            f"{KEY}.architecture: {type(model).__name__} does not say which of torchvision's it is; give it, e.g."
            ' "resnet18"'
        )
    try:
        known = get_model_weights(name)
    except ValueError:
        raise RequestError(f"{KEY}.architecture: torchvision has no weights for {name!r}") from None
    if weights not in known.__members__:
        raise RequestError(f"{KEY}.weights: {name} has {', '.join(known.__members__)}, and no {weights!r}")
    entry = known[weights]
    try:
        found = entry.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        place = f"{torch.hub.get_dir()}/checkpoints/{entry.url.rpartition('/')[2]}"
        raise RequestError(
            f"{KEY}: the weights of {name} cannot be fetched from {entry.url} ({error}); put the file at {place}, or"
            ' give a file of your own: {name = "file", path = ...}'
        ) from None
    return put_weights(model, found, entry.url.rpartition("/")[2], KEY, new)


def prepare(model: nn.Module, recipe: Recipe, seed: int) -> nn.Module:
    """What a recipe says of a model whose first weights are there: parameters frozen, adapters put in; in place.

    Raises:
        RequestError: for patterns that match nothing.
    """
    patterns = ("*",) if recipe.freeze is None and recipe.adapters is not None else recipe.freeze or ()
    freeze(model, patterns)
    if recipe.adapters is not None:
        add_adapters(model, recipe.adapters, seed)
    return model


def freeze(model: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """Freezes the parameters that the patterns mean, in place.

    A batch norm all of whose parameters are frozen keeps the statistics that came with its weights, as
    :class:`~clients.normalization.FixedBatchNorm`; where none did, it goes on by the statistics of its inputs.

    Raises:
        RequestError: for a pattern that matches no parameter.
    """
    names = selected(patterns, [name for name, _ in model.named_parameters()], "client.freeze")
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)
    norms = set(batch_norms(model))
    for place, module in list(model.named_modules()):
        if module in norms and place and _is_frozen(module) and has_statistics(module):
            model.set_submodule(place, FixedBatchNorm(module))
    return model


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def frozen_size(model: nn.Module) -> int:
    """How many of a model's weights and biases are frozen, those of batch norms that are fixed included."""
    fixed = [module for module in model.modules() if isinstance(module, FixedBatchNorm)]
    inside = [tensor.numel() for norm in fixed for tensor in (norm.weight, norm.bias) if tensor is not None]
    return sum(inside) + sum(p.numel() for p in model.parameters() if not p.requires_grad)


def rate_factors(factors: Mapping[str, float], layout: Layout) -> Tensor | None:
    """The factor on every parameter's learning rate ``[D]``, or None where there are none.

    Args:
        factors: pattern of parameters -> factor; of several that match, the last counts.
        layout: the training layout.

    Raises:
        RequestError: for a pattern that matches no trained parameter.
    """
    if not factors:
        return None
    for pattern in factors:
        selected([pattern.removeprefix("!")], layout.names, "client.lr_factors", "trained parameter")
    row = torch.ones(layout.size, dtype=layout.dtype)
    for slot in layout:
        for pattern, factor in factors.items():
            if matches(pattern, slot.name):
                row[slot.slice] = factor
    return row


# ------------------------------------------------------------------------------------------------ low-rank adapters


_FACTOR = ".lora_B.weight"


class _LowRank:
    """A forward hook: adds ``scale * B(A(x))`` of the layer's adapter to what the layer gives.

    A hook and no module of another type, so that layers keep their type and their parameters their names.
    """

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        (x,), places = inputs, dict(layer.named_children())
        for name in ("lora_dropout", "lora_A", "lora_B"):
            x = places[name](x)
        return outputs + self.scale * x


def add_adapters(model: nn.Module, adapters: Adapters, seed: int) -> nn.Module:
    """Puts a low-rank adapter beside linear layers, in place; the model computes what it did, since ``B`` is zero.

    Parameters are called ``LAYER.lora_A.weight`` ``[rank, in]`` and ``LAYER.lora_B.weight`` ``[out, rank]``. Linear
    layers are ``nn.Linear`` and transformers' ``Conv1D``; not those inside ``nn.MultiheadAttention``, which reads their
    weights without calling them.

    Args:
        model: the model.
        adapters: rank, scale and places.
        seed: draws ``A``; every client starts from the same.

    Raises:
        RequestError: for a pattern that matches no such layer, or a rank that is no less than a layer's size.
    """
    able = _linear_layers(model)
    chosen = selected(adapters.layers or ("*",), list(able), "client.adapters.layers", "linear layer")
    if not chosen:
        raise RequestError(f"client.adapters.layers: no linear layer is left; the model has {listed(list(able))}")
    for name in chosen:
        layer = able[name]
        inputs, outputs = _features(layer)
        if adapters.rank > min(inputs, outputs):
            raise RequestError(
                f"client.adapters.rank: {adapters.rank} is more than {name!r} has, {inputs} in and {outputs} out; give"
                " less, or leave the layer out of client.adapters.layers"
            )
        like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        layer.lora_A = nn.Linear(inputs, adapters.rank, bias=False, **like)
        layer.lora_B = nn.Linear(adapters.rank, outputs, bias=False, **like)
        layer.lora_dropout = nn.Dropout(adapters.dropout) if adapters.dropout else nn.Identity()
        with torch.no_grad():
            draw = randomness.generator(seed, f"adapters/{name}")
            bound = 1 / math.sqrt(inputs)
            layer.lora_A.weight.uniform_(-bound, bound, generator=draw)
            layer.lora_B.weight.zero_()
        layer.lora_A.weight.requires_grad_(not adapters.freeze_a)
        layer.register_forward_hook(_LowRank(adapters.alpha / adapters.rank))
    return model


def unreached_adapters(model: nn.Module, task: Task, batch: Batch) -> list[str]:
    """The layers whose adapters have no effect on a batch's loss, since the model reads their weights uncalled."""
    factors = {name: p for name, p in model.named_parameters() if name.endswith(_FACTOR) and p.requires_grad}
    with torch.enable_grad():
        loss = weighted_loss(task, task.forward(model, batch), batch)[0].sum()
        found = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
    return [name.removesuffix(_FACTOR) for name, grad in zip(factors, found, strict=True) if grad is None]


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Adds every adapter's product to its layer's weight and takes the adapter out, in place: the plain model.

    A weight that was tied to another layer's is not any more.
    """
    for layer in list(model.modules()):
        for number, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, _LowRank):
                own = dict(layer.named_parameters())
                product = hook.scale * own["lora_B.weight"] @ own["lora_A.weight"]
                # A parameter of its own: one that is tied would change the other layer, too.
                merged = own["weight"] + (product if isinstance(layer, nn.Linear) else product.T)
                layer.weight = nn.Parameter(merged, requires_grad=own["weight"].requires_grad)
                del layer.lora_A, layer.lora_B, layer.lora_dropout, layer._forward_hooks[number]
    return model


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> the layers that an adapter can stand beside."""
    inside = {id(child) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.modules()}
    return {
        name: layer
        for name, layer in model.named_modules()
        if id(layer) not in inside and (isinstance(layer, nn.Linear) or _is_transposed_linear(layer))
    }


def _is_transposed_linear(layer: nn.Module) -> bool:
    """Transformers' ``Conv1D``, a linear layer with its weight ``[in, out]``, told without importing transformers."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and getattr(layer, "weight", None) is not None


def _features(layer: nn.Module) -> tuple[int, int]:
    """``(in, out)``."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    inputs, outputs = dict(layer.named_parameters())["weight"].shape
    return inputs, outputs
