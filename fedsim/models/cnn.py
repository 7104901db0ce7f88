"""The small convolutional network."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from clients.normalization import Norm, replace_batch_norm
from clients.recipe import Rate
from fedsim.models.network import Image, Network, image_shape


def cnn(
    *,
    input_shape: tuple[int, ...],
    classes: int,
    norm: Norm = "none",
    dropout: Rate = 0.0,
) -> nn.Module:
    """Two 3x3 convolutions (32 and 64 channels), each with ReLU and 2x2 max pooling, then 128 units and the logits.

    Args:
        input_shape: ``[C, H, W]``, ``[H, W]`` (one channel), or a flat square, ``[64]`` for 8x8.
        classes: how many logits.
        norm: what stands between a convolution and its ReLU: batch norm, group norm (8 groups), or layer norm over
            channels and pixels with a scale a channel (one group).
        dropout: share of the 128 units that is dropped before the logits, in training.

    Raises:
        ValueError: for inputs that are no images, or images of less than 4x4.
    """
    shape = image_shape(input_shape)
    channels, height, width = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict(image=Image(shape))
    for place, size in enumerate((32, 64), start=1):
        layers[f"conv{place}"] = nn.Conv2d(channels, size, 3, padding=1)
        if norm != "none":
            layers[f"norm{place}"] = replace_batch_norm(nn.BatchNorm2d(size), norm)
        layers[f"relu{place}"] = nn.ReLU()
        layers[f"pool{place}"] = nn.MaxPool2d(2)
        channels = size
    layers["flatten"] = nn.Flatten()
    layers["hidden"] = nn.Linear(channels * (height // 4) * (width // 4), 128)
    layers["relu"] = nn.ReLU()
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["head"] = nn.Linear(128, classes)
    return Network(layers)
