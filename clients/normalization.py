"""Batch norm when only weights and biases are shared: statistics never leave a client, the server estimates its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from clients.errors import RequestError

#: What may stand where batch norm stands.
Norm = Literal["none", "batch", "group", "layer"]


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The model's batch-norm layers, found by type and never by name."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


class FixedBatchNorm(nn.Module):
    """A batch norm that is not trained: ``(x - mean) / sqrt(variance + eps) * weight + bias``, all four as they came.

    Its tensors have a batch norm's names, and none of them is a parameter.

    Args:
        norm: the batch norm that it takes the place of; it has running statistics.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _BatchNorm):
        super().__init__()
        assert norm.running_mean is not None
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(norm, name)
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.running_var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return x * scale.view(shape) + shift.view(shape)

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, eps={self.eps}"


def has_statistics(norm: _BatchNorm) -> bool:
    """Whether a batch norm's running statistics are others than those that it is made with, mean 0 and variance 1."""
    if norm.running_mean is None or norm.running_var is None:
        return False
    return bool((norm.running_mean != 0).any() or (norm.running_var != 1).any())


def without_running_statistics(model: nn.Module) -> nn.Module:
    """Lets every batch and instance norm of ``model`` (in place) use the batch's own statistics and keep none.

    Local training normalises by batch statistics anyway; without buffers nothing can leak from one client to the next.
    """
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


#: Norm layers of every kind, by type: what stands in their parameters is scales and shifts.
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


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

    The statistics are those that one pass in training mode over all inputs at once leaves in fresh buffers
    (``momentum=None``), however the inputs are cut into batches and whichever way they are ordered: the first layer's
    are exactly their mean and unbiased variance. One batch takes one pass. Several take a pass a layer, each only as
    far as that layer, since its inputs are known once all layers before it normalise by the whole. Dropout is off;
    modes are restored.

    Args:
        model: changed in place (buffers only), and returned. Batch norms without running statistics are left alone,
            and one that is never called is as it was made.
        batches: what ``model`` is called with, of any sizes; a mapping of columns is passed as one. Of a tuple or list,
            as a DataLoader gives them, the first is the input. A tensor is one batch.

    Raises:
        RequestError: where there are fewer than 2 examples, a layer has fewer than 2 values a channel, or one of them
            is NaN or infinite.
    """
    norms = [norm for norm in batch_norms(model) if norm.running_mean is not None]
    if not norms:
        return model
    given = [batches] if isinstance(batches, Tensor) else batches
    listed = [batch for batch in map(_inputs, given) if _size(batch)]
    if (size := sum(map(_size, listed))) < 2:
        raise RequestError(
            f"recalibration needs at least 2 unlabelled examples and has {size}; give it more"
            " (the server's are data.proxy)"
        )
    modes = [(module, module.training) for module in model.modules()]
    calls = _Calls(whole=len(listed) == 1)
    handles = [norm.register_forward_pre_hook(calls, with_kwargs=True) for norm in norms]
    try:
        model.eval()
        while calls.measure(model, listed):
            pass
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    for norm in norms:
        calls.settle(norm)
    return model


def _inputs(batch: Any) -> Any:
    """A batch as the model is called with it."""
    batch = batch[0] if isinstance(batch, tuple | list) else batch
    return batch if isinstance(batch, Tensor | Mapping) else torch.as_tensor(batch)


class _Reached(BaseException):
    """Ends a forward pass at the call that is measured; no ``except Exception`` in a model stops it."""


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations ``[C]``, pooled in float64 (Chan, Golub and LeVeque 1979)."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Adds inputs ``[B, C, ...]``."""
        values = x.to(torch.float64).transpose(0, 1).flatten(1)
        count, total = values.shape[1], self.count + values.shape[1]
        mean = values.mean(1)
        delta = mean - self.mean
        self.squares = self.squares + (values - mean[:, None]).square().sum(1)
        self.squares = self.squares + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


class _Calls:
    """A forward pre-hook of batch norms in evaluation mode; it measures one call after another, in their order.

    A call is a layer and how often it was called before in the same forward pass. Once measured, it normalises by its
    own mean and biased variance, as training mode does.

    Args:
        whole: whether a pass is a single batch, so that every call is measured in it.
    """

    def __init__(self, whole: bool):
        self.whole = whole
        self.known: dict[tuple[nn.Module, int], _Moments] = {}
        self.target: tuple[nn.Module, int] | None = None
        self.times: Counter[nn.Module] = Counter()
        self.last = self.more = False

    def measure(self, model: nn.Module, batches: list[Any]) -> bool:
        """Measures the first call that is not known yet over all batches; whether there are more of them."""
        self.target, self.more = None, False
        for place, batch in enumerate(batches, start=1):
            self.last = place == len(batches)
            self.times.clear()
            with suppress(_Reached):
                # The batch comes again in the next pass, and a model may change its inputs in place.
                model(_copy(batch))
        return self.more

    def __call__(self, norm: _BatchNorm, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        call = norm, self.times[norm]
        self.times[norm] += 1
        if call not in self.known:
            if self.target is not None and not self.whole:
                self.more = True
                raise _Reached
            self.target = call
            self.known[call] = _Moments()
        found = self.known[call]
        if call == self.target:
            found.add(*arguments, **keywords)
            if not self.last:
                raise _Reached
        _write(norm, found.mean, found.squares / found.count)

    def settle(self, norm: _BatchNorm) -> None:
        """Leaves in a layer the averages over its calls: of their means and of their unbiased variances."""
        found = [moments for (layer, _), moments in self.known.items() if layer is norm]
        if any(moments.count < 2 for moments in found):
            raise RequestError(f"recalibration leaves {norm} a single value a channel; give it more examples")
        if any(not bool(torch.isfinite(torch.as_tensor(moments.squares)).all()) for moments in found):
            raise RequestError(f"recalibration meets NaN or infinite values before {norm}; look at inputs and weights")
        if found:
            variances = [moments.squares / (moments.count - 1) for moments in found]
            _write(norm, sum(moments.mean for moments in found) / len(found), sum(variances) / len(found))
        else:
            _write(norm, 0.0, 1.0)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(len(found))


def _write(norm: _BatchNorm, mean: Tensor | float, variance: Tensor | float) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.as_tensor(mean))
    norm.running_var.copy_(torch.as_tensor(variance))


def _columns(batch: Any) -> list[Tensor]:
    return list(batch.values()) if isinstance(batch, Mapping) else [batch]


def _size(batch: Any) -> int:
    return len(_columns(batch)[0])


def _copy(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: column.clone() for name, column in batch.items()}
    return batch.clone()


def replace_batch_norm(model: nn.Module, kind: Norm, groups: int = 8) -> nn.Module:
    """Puts a norm that keeps no statistics in the place of every batch norm, in place, found by type.

    Scale and shift (the parameters themselves), ``eps`` and the mode are carried over; a batch norm that stands in two
    places stays one. ``group`` is group norm (Wu and He 2018), ``layer`` normalises over all of an example with a scale
    a channel, ``none`` leaves nothing there, ``batch`` everything as it is.

    Args:
        model: changed in place.
        kind: what is put there.
        groups: the most groups of ``group``; they divide the channels, at least 2 in each.

    Returns:
        The model; where it is itself a batch norm, what replaces it.

    Raises:
        RequestError: for an unknown kind, or a batch norm that cannot be replaced.
    """
    if kind not in get_args(Norm):
        raise RequestError(f"norm: unknown kind {kind!r}; allowed are {', '.join(get_args(Norm))}")
    if kind == "batch":
        return model
    made = {norm: _replacement(norm, kind, groups) for norm in batch_norms(model)}
    for module in list(model.modules()):
        # Not named_children, which names a layer that stands in two places once.
        for name, child in module._modules.items():
            if isinstance(child, _BatchNorm):
                module._modules[name] = made[child]
    return made[model] if isinstance(model, _BatchNorm) else model


def group_count(channels: int, most: int = 8) -> int:
    """Groups for a group norm: the most, up to ``most``, that divide the channels into equal groups of at least 2.

    A group of a single unit would always be normalised to zero.
    """
    return max((count for count in range(2, most + 1) if channels % count == 0 and channels // count >= 2), default=1)


def _replacement(norm: _BatchNorm, kind: str, groups: int) -> nn.Module:
    if isinstance(norm, LazyModuleMixin):
        raise RequestError(
            f"norm: {type(norm).__name__} does not know its channels yet; run one batch through the model first"
        )
    if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise RequestError(
            f"norm: {type(norm).__name__} has a forward of its own, which would be lost; replace it in the model"
        )
    if kind == "none":
        return nn.Identity().train(norm.training)
    count = group_count(norm.num_features, groups) if kind == "group" else 1
    made = nn.GroupNorm(count, norm.num_features, norm.eps, affine=False)
    made.affine, made.weight, made.bias = norm.affine, norm.weight, norm.bias
    return made.train(norm.training)
