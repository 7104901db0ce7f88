"""How the server's first weights are drawn, by name. Every client starts from them.

A function whose first argument is ``weight`` fills one layer's weight in place and returns it; one whose first argument
is ``model`` fills the whole model. ``fan_in`` and ``fan_out`` are those of the layer's true connections: inputs that
reach one output, and outputs that one input reaches (torch's own are wrong for grouped and transposed convolutions).
Variances: Glorot and Bengio 2010, ``2 / (fan_in + fan_out)``; He et al. 2015, ``2 / fan_in``;
LeCun et al. 1998, ``1 / fan_in``. Uniform draws have the same variance, so their limit is ``sqrt(3 variance)``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd

from clients import randomness
from clients.catalog import build_function
from clients.errors import RequestError, nearest
from clients.normalization import NORMS
from clients.parts import Part
from clients.recipe import NonNegative, Positive
from clients.transfer import load_published
from clients.weight_files import load_weights

Mode = Literal["fan_in", "fan_out"]


def xavier_uniform(weight: Tensor, fan_in: int, fan_out: int, generator: Generator, *, gain: Positive = 1.0) -> Tensor:
    """Uniform, variance 2 gain^2 / (fan_in + fan_out)."""
    return _uniform(weight, 2 * gain**2 / (fan_in + fan_out), generator)


def xavier_normal(weight: Tensor, fan_in: int, fan_out: int, generator: Generator, *, gain: Positive = 1.0) -> Tensor:
    """Normal, variance 2 gain^2 / (fan_in + fan_out)."""
    return _normal(weight, 2 * gain**2 / (fan_in + fan_out), generator)


def he_uniform(
    weight: Tensor,
    fan_in: int,
    fan_out: int,
    generator: Generator,
    *,
    slope: NonNegative = 0.0,
    mode: Mode = "fan_in",
) -> Tensor:
    """Uniform, variance 2 / ((1 + slope^2) fan), for a (leaky) ReLU."""
    return _uniform(weight, _he(fan_in, fan_out, slope, mode), generator)


def he_normal(
    weight: Tensor,
    fan_in: int,
    fan_out: int,
    generator: Generator,
    *,
    slope: NonNegative = 0.0,
    mode: Mode = "fan_in",
) -> Tensor:
    """Normal, variance 2 / ((1 + slope^2) fan), for a (leaky) ReLU."""
    return _normal(weight, _he(fan_in, fan_out, slope, mode), generator)


def lecun_uniform(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """Uniform, variance 1 / fan_in."""
    return _uniform(weight, 1 / fan_in, generator)


def lecun_normal(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """Normal, variance 1 / fan_in."""
    return _normal(weight, 1 / fan_in, generator)


def truncated_normal(
    weight: Tensor, fan_in: int, fan_out: int, generator: Generator, *, std: Positive = 0.02
) -> Tensor:
    """Normal with this standard deviation, cut at two of them."""
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def orthogonal(weight: Tensor, fan_in: int, fan_out: int, generator: Generator, *, gain: Positive = 1.0) -> Tensor:
    """Orthonormal rows or columns (Saxe et al. 2014), times ``gain``."""
    return nn.init.orthogonal_(weight, gain=gain, generator=generator)


def zeros(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """All zeros: right for a single layer (logistic regression), useless for deeper ones."""
    return weight.zero_()


def default(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """The layer's own ``reset_parameters``, which draws its bias too (:func:`initialize` calls it)."""
    return weight


def file(
    model: nn.Module, generator: Generator, *, path: Path, new: Sequence[str] = (), base: Path | None = None
) -> nn.Module:
    """The weights of a file: safetensors, a PyTorch state dict, or an earlier run (its folder, or a checkpoint).

    ``new`` names layers that begin as the model made them, such as a head for other classes.
    """
    return load_weights(model, (base or Path()) / path, new=new)


def pretrained(
    model: nn.Module,
    generator: Generator,
    *,
    weights: str = "DEFAULT",
    architecture: str | None = None,
    new: Sequence[str] = (),
) -> nn.Module:
    """The weights that torchvision publishes for the model's architecture, downloaded once.

    ``weights`` is a name of theirs (``IMAGENET1K_V1``), ``architecture`` the model's where it cannot be told
    (``resnet18``), and ``new`` names layers that begin as the model made them, such as a head for other classes.
    """
    return load_published(model, weights, architecture, new)


def _he(fan_in: int, fan_out: int, slope: float, mode: Mode) -> float:
    return 2 / ((1 + slope**2) * (fan_in if mode == "fan_in" else fan_out))


def _uniform(weight: Tensor, variance: float, generator: Generator) -> Tensor:
    limit = math.sqrt(3 * variance)
    return weight.uniform_(-limit, limit, generator=generator)


def _normal(weight: Tensor, variance: float, generator: Generator) -> Tensor:
    return weight.normal_(0.0, math.sqrt(variance), generator=generator)


def fans(module: nn.Module) -> tuple[int, int]:
    """``(fan_in, fan_out)`` of a linear, convolutional or embedding layer, with its groups and transposition."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Bilinear):
        return module.in1_features * module.in2_features, module.out_features
    if isinstance(module, nn.Embedding):  # as torch has it: each output has as many inputs as the vector is long
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, _ConvNd):
        field = math.prod(module.kernel_size)
        return module.in_channels // module.groups * field, module.out_channels // module.groups * field
    raise TypeError(f"{type(module).__name__} has no fans")


def is_weighted(module: nn.Module) -> bool:
    """Whether initialisation by name applies to this layer's ``weight``: linear, bilinear, convolutional.

    Not where the weight is computed from other parameters (weight norm, spectral norm).
    """
    return isinstance(module, nn.Linear | nn.Bilinear | _ConvNd) and isinstance(module.weight, nn.Parameter)


@torch.no_grad()
def initialize(
    module: nn.Module,
    name: str | Part | None,
    seed: int,
    base: Path | None = None,
    layers: Mapping[str, str | Part] = MappingProxyType({}),
) -> nn.Module:
    """Draws a model's weights in place, layer by layer, each from its own keyed generator.

    Weights of linear and convolutional layers are drawn by ``name``; their biases become 0, norm scales 1 and shifts 0.
    Other layers (embeddings, recurrent layers, attention's packed projection, a user's own) draw anew by their own
    ``reset_parameters``. ``default`` lets every layer do that; ``file`` draws nothing. An embedding's padding stays 0.

    Args:
        module: the model; changed in place, and returned.
        name: an initialisation's name, ``"file.py:function"``, or a :class:`Part` with settings; None keeps what is.
        seed: the same seed gives the same weights on every platform.
        base: the folder that ``file.py`` in the name is relative to.
        layers: pattern of layers -> initialisation of their weights instead; of several that match, the last. A pattern
            is matched against a layer's name and its weight's (``"head"``, ``"head.*"``, ``"conv*"``); linear,
            convolutional and embedding layers can be named.

    Raises:
        RequestError: for an unknown name or setting, a pattern that matches no layer, a file that does not fit, and for
            what a user's own function returns that is no weight.
    """
    if name is not None:
        _initialize(module, Part.of(name), seed, base)
    for pattern, part in layers.items():
        _initialize_layers(module, pattern, Part.of(part), seed, base)
    return module


def _initialize(model: nn.Module, part: Part, seed: int, base: Path | None) -> None:
    key = "client.initialization"
    fill = build_function(part, "initializations", base, key=key)
    if _fills_models(fill):
        offered = {"base": base} if "base" in inspect.signature(fill).parameters else {}
        with _saying(key, f"on {type(model).__name__}"):
            filled = fill(model, randomness.generator(seed, "initialization"), **offered)
        if filled is not None and filled is not model:
            raise RequestError(f"{key}: {part.name} did not return the model; fill the given one in place")
        return
    for place, module in model.named_modules():
        if isinstance(module, NORMS):
            for kind, parameter in module.named_parameters(recurse=False):
                parameter.fill_(1.0 if kind == "weight" else 0.0)
        elif is_weighted(module):
            _initialize_layer(module, place, fill, seed, key)
        else:
            _reset(module, place, seed)


def _initialize_layers(model: nn.Module, pattern: str, part: Part, seed: int, base: Path | None) -> None:
    key = f"client.layer_initialization.{pattern}"
    able = {place: m for place, m in model.named_modules() if is_weighted(m) or isinstance(m, nn.Embedding)}
    weights = {place: f"{place}.weight".lstrip(".") for place in able}
    chosen = [place for place in able if fnmatchcase(place, pattern) or fnmatchcase(weights[place], pattern)]
    if not chosen:
        known = [place or weights[place] for place in able]
        raise RequestError(
            f"{key}: matches no layer whose weights can be drawn; the model has {', '.join(known) or 'none'}"
            f"{nearest(pattern, known)}"
        )
    fill = build_function(part, "initializations", base, key=key)
    if _fills_models(fill):
        raise RequestError(f"{key}: {part.name} fills whole models, not layers; give it as client.initialization")
    for place in chosen:
        _initialize_layer(able[place], place, fill, seed, key)


def _fills_models(fill: Callable[..., object]) -> bool:
    return next(iter(inspect.signature(fill).parameters), "") == "model"


def _initialize_layer(module: nn.Module, place: str, fill: Callable[..., Tensor | None], seed: int, key: str) -> None:
    if fill is default:
        _reset(module, place, seed)
        return
    for kind, parameter in module.named_parameters(recurse=False):
        if kind == "weight":
            _draw(fill, parameter, fans(module), randomness.generator(seed, f"initialization/{place}"), key)
        else:
            parameter.zero_()
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()


def _reset(module: nn.Module, place: str, seed: int) -> None:
    """Lets a layer with parameters draw them by its own rule, where it has one."""
    draw = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(draw) and next(module.parameters(recurse=False), None) is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(randomness.key(seed, f"initialization/{place}"))
            draw()


@contextmanager
def _saying(key: str, where: str) -> Iterator[None]:
    """Says of an error in a user's own function which key named it, and what it was given."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"{key}: raises {type(error).__name__} {where}: {error}") from error


def _draw(
    fill: Callable[..., Tensor | None], parameter: Tensor, fan: tuple[int, int], generator: Generator, key: str
) -> None:
    """Draws on the CPU, in float32 at least: elsewhere a generator's numbers are others, or there are none."""
    wide = parameter.to("cpu", torch.promote_types(parameter.dtype, torch.float32))
    with _saying(key, f"on a weight of shape {list(parameter.shape)}"):
        filled = fill(wide, fan[0], fan[1], generator)
    filled = wide if filled is None else filled
    if not isinstance(filled, Tensor) or filled.shape != parameter.shape:
        made = f"shape {list(filled.shape)}" if isinstance(filled, Tensor) else type(filled).__name__
        raise RequestError(f"{key}: returned {made} for a weight of shape {list(parameter.shape)}; fill and return it")
    if filled is not parameter:
        parameter.copy_(filled)
