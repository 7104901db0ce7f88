"""How the server's first weights are drawn, by name. Every client starts from them.

Each function fills one weight tensor in place and returns it. ``fan_in`` and ``fan_out`` are those of the layer's true
connections: inputs that reach one output, and outputs that one input reaches (torch's own are wrong for grouped and
transposed convolutions). Variances: Glorot and Bengio 2010, ``2 / (fan_in + fan_out)``; He et al. 2015, ``2 / fan_in``;
LeCun et al. 1998, ``1 / fan_in``. Uniform draws have the same variance, so their limit is ``sqrt(3 variance)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from clients import randomness
from clients.catalog import build_function
from clients.parts import Part

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def xavier_uniform(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """Uniform, variance 2 / (fan_in + fan_out)."""
    return _uniform(weight, 2 / (fan_in + fan_out), generator)


def xavier_normal(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """Normal, variance 2 / (fan_in + fan_out)."""
    return _normal(weight, 2 / (fan_in + fan_out), generator)


def he_uniform(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """Uniform, variance 2 / fan_in."""
    return _uniform(weight, 2 / fan_in, generator)


def he_normal(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """Normal, variance 2 / fan_in."""
    return _normal(weight, 2 / fan_in, generator)


def lecun_uniform(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """Uniform, variance 1 / fan_in."""
    return _uniform(weight, 1 / fan_in, generator)


def lecun_normal(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """Normal, variance 1 / fan_in."""
    return _normal(weight, 1 / fan_in, generator)


def truncated_normal(weight: Tensor, fan_in: int, fan_out: int, generator: Generator, *, std: float = 0.02) -> Tensor:
    """Normal with this standard deviation, cut at two of them."""
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def orthogonal(weight: Tensor, fan_in: int, fan_out: int, generator: Generator, *, gain: float = 1.0) -> Tensor:
    """Orthonormal rows or columns (Saxe et al. 2014), times ``gain``."""
    return nn.init.orthogonal_(weight, gain=gain, generator=generator)


def zeros(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """All zeros: right for a single layer (logistic regression), useless for deeper ones."""
    return weight.zero_()


def default(weight: Tensor, fan_in: int, fan_out: int, generator: Generator) -> Tensor:
    """What the layer's own ``reset_parameters`` drew when the model was built."""
    return weight


def _uniform(weight: Tensor, variance: float, generator: Generator) -> Tensor:
    limit = math.sqrt(3 * variance)
    return weight.uniform_(-limit, limit, generator=generator)


def _normal(weight: Tensor, variance: float, generator: Generator) -> Tensor:
    return weight.normal_(0.0, math.sqrt(variance), generator=generator)


def fans(module: nn.Module) -> tuple[int, int]:
    """``(fan_in, fan_out)`` of a linear or convolutional layer, groups and transposition taken into account."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Bilinear):
        return module.in1_features * module.in2_features, module.out_features
    if isinstance(module, _ConvNd):
        field = math.prod(module.kernel_size)
        return module.in_channels // module.groups * field, module.out_channels // module.groups * field
    raise TypeError(f"{type(module).__name__} has no fans")


def is_weighted(module: nn.Module) -> bool:
    """Whether initialisation by name applies to this layer's ``weight``: linear, bilinear, convolutional."""
    return isinstance(module, nn.Linear | nn.Bilinear | _ConvNd)


@torch.no_grad()
def initialize(model: nn.Module, name: str | Part, seed: int, base: Path | None = None) -> nn.Module:
    """Draws a model's weights in place, layer by layer, each from its own keyed generator.

    Weights of linear and convolutional layers are drawn by ``name``; their biases become 0, norm scales 1 and shifts 0.
    Other layers (embeddings, recurrent layers, attention's packed projection, a user's own) draw anew by their own
    ``reset_parameters``. ``default`` lets every layer do that.

    Args:
        model: changed in place, and returned.
        name: an initialisation's name, ``"file.py:function"``, or a :class:`Part` with settings.
        seed: the same seed gives the same weights on every platform.
        base: the folder that ``file.py`` in the name is relative to.

    Raises:
        RequestError: for an unknown name or setting.
    """
    part = Part.of(name)
    fill = build_function(part, "initializations", base, key="client.initialization")
    plain = not part.own and part.name.lower() == "default"
    for place, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        if isinstance(module, _NORMS) or (is_weighted(module) and not plain):
            for kind, parameter in own.items():
                if kind != "weight":
                    parameter.zero_()
                elif isinstance(module, _NORMS):
                    parameter.fill_(1.0)
                else:
                    _draw(fill, parameter, fans(module), randomness.generator(seed, f"initialization/{place}"))
        elif callable(getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(randomness.key(seed, f"initialization/{place}"))
                (getattr(module, "reset_parameters", None) or module._reset_parameters)()
    return model


def _draw(fill: Callable[..., Tensor], parameter: Tensor, fan: tuple[int, int], generator: Generator) -> None:
    """Draws in float32 at least: half precision cannot be drawn or orthogonalised on every platform."""
    wide = parameter if parameter.dtype in (torch.float32, torch.float64) else parameter.float()
    filled = fill(wide, fan[0], fan[1], generator)
    if filled is not parameter:
        parameter.copy_(filled)
