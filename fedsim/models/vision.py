"""Torchvision's networks with any norm, fitted to small images and any number of channels.

Their published weights are an initialisation, ``pretrained``; they fit ``stem = "large"`` and three channels.

Parameters keep torchvision's names (``conv1.weight``, ``layer1.0.bn1.weight``, ``fc.weight``), whatever the norm is.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from clients.normalization import Norm, replace_batch_norm
from clients.recipe import Rate
from fedsim.models.network import image_shape

Stem = Literal["auto", "small", "large"]


def resnet18(*, input_shape: tuple[int, ...], classes: int, norm: Norm = "batch", stem: Stem = "auto") -> nn.Module:
    """ResNet of 18 layers (He et al. 2016), 11.2 million parameters; the last layer is ``fc``.

    Args:
        input_shape: ``[C, H, W]``, ``[H, W]`` (one channel), or a flat square, ``[64]`` for 8x8.
        classes: how many logits.
        norm: what stands where batch norm does: group norm in at most 8 groups, or layer norm over channels and pixels
            with a scale a channel.
        stem: ``large`` is torchvision's, for ImageNet. ``small`` leaves out its first two halvings of height and width:
            a 3x3 convolution of stride 1 and no pooling. ``auto`` is small up to 64x64.

    Raises:
        ValueError: for inputs that are no images, or images of less than 4x4.
    """
    return _fitted("resnet18", input_shape, classes, norm, stem)


def resnet34(*, input_shape: tuple[int, ...], classes: int, norm: Norm = "batch", stem: Stem = "auto") -> nn.Module:
    """ResNet of 34 layers (He et al. 2016), 21.3 million parameters; the last layer is ``fc``.

    Arguments are those of :func:`resnet18`.
    """
    return _fitted("resnet34", input_shape, classes, norm, stem)


def resnet50(*, input_shape: tuple[int, ...], classes: int, norm: Norm = "batch", stem: Stem = "auto") -> nn.Module:
    """ResNet of 50 layers (He et al. 2016), 23.5 million parameters; the last layer is ``fc``.

    Arguments are those of :func:`resnet18`.
    """
    return _fitted("resnet50", input_shape, classes, norm, stem)


def mobilenet(
    *,
    input_shape: tuple[int, ...],
    classes: int,
    norm: Norm = "batch",
    stem: Stem = "auto",
    dropout: Rate = 0.2,
) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018), 2.2 million parameters; the last layer is ``classifier.1``.

    Args:
        input_shape: as :func:`resnet18`, and so are ``classes`` and ``norm``.
        stem: ``small`` has stride 1 in the first convolution and in the first block that halves.
        dropout: share of the features that is dropped before the logits, in training.
    """
    return _fitted("mobilenet_v2", input_shape, classes, norm, stem, dropout=dropout)


def shufflenet(*, input_shape: tuple[int, ...], classes: int, norm: Norm = "batch", stem: Stem = "auto") -> nn.Module:
    """ShuffleNetV2 x1.0 (Ma et al. 2018), 1.3 million parameters; the last layer is ``fc``.

    Arguments are those of :func:`resnet18`.
    """
    return _fitted("shufflenet_v2_x1_0", input_shape, classes, norm, stem)


class _Inputs:
    """A forward pre-hook: inputs ``[B, ...]`` of any number type as images ``[B, C, H, W]`` in that of the weights."""

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape

    def __call__(self, model: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        return x.reshape(x.shape[0], *self.shape).to(next(model.parameters()).dtype)


def _fitted(
    name: str, input_shape: tuple[int, ...], classes: int, norm: Norm, stem: Stem, **settings: Any
) -> nn.Module:
    from torchvision.models import get_model  # takes a second, which only those wait who ask for one of these

    shape = image_shape(input_shape)
    if stem not in ("auto", "small", "large"):
        raise ValueError(f"stem = {stem!r}; allowed are auto, small, large")
    model = get_model(name, weights=None, num_classes=classes, **settings)
    model.architecture = name  # by which published weights are found
    _fit_stem(model, shape[0], small=stem == "small" or (stem == "auto" and max(shape[1:]) <= 64))
    # A hook and no wrapper, so that parameters keep their names.
    model.register_forward_pre_hook(_Inputs(shape))
    return replace_batch_norm(model, norm)


def _fit_stem(model: nn.Module, channels: int, small: bool) -> None:
    """Gives the first convolution the channels; ``small`` leaves out the first two of five halvings."""
    halving = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d) and layer.stride in (2, (2, 2))
    ]
    (first, conv), (second, layer) = halving[:2]
    assert isinstance(conv, nn.Conv2d)
    if small or channels != conv.in_channels:
        kernel, stride = (3, 1) if small else (conv.kernel_size[0], 2)
        fitted = nn.Conv2d(channels, conv.out_channels, kernel, stride, padding=kernel // 2, bias=False)
        model.set_submodule(first, fitted)
    if small and isinstance(layer, nn.Conv2d):
        layer.stride = (1, 1)
    elif small:
        model.set_submodule(second, nn.Identity())
