"""Columns of Hugging Face data sets (https://huggingface.co/docs/datasets); ``datasets`` is never imported here.

What can be a tensor becomes one: numbers, arrays of one shape, and images, which are decoded to bytes ``[C, H, W]``.
Other columns (text, nested lists of different lengths) are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients.errors import RequestError, nearest
from fedsim.data.columns import Columns, TensorColumns

#: What the splits of a ``DatasetDict`` are called, ours first.
_SPLITS = {"train": ("train",), "test": ("test",), "validation": ("validation", "valid", "val", "dev")}

_LABELS = ("y", "label", "labels", "target", "fine_label")


def is_dataset(thing: Any, whole: bool = False) -> bool:
    """Whether a thing is a ``datasets.Dataset``, or (``whole``) a ``DatasetDict`` of splits."""
    datasets = sys.modules.get("datasets")  # without it, nobody has made one
    if datasets is None:
        return False
    return isinstance(thing, datasets.Dataset) or (whole and isinstance(thing, datasets.DatasetDict))


def columns_of(dataset: Any, where: str) -> Columns:
    """The columns of a ``datasets.Dataset`` that can be tensors, in memory.

    Raises:
        RequestError: where none can, with the reasons, or for no example.
    """
    if not len(dataset):
        raise RequestError(f"{where}: no example")
    found = {name: _column(dataset, name) for name in dataset.column_names}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        said = "; ".join(f"{name} {reason}" for name, reason in found.items()) or "it has none"
        raise RequestError(f"{where}: no column of this data set can be a tensor: {said}")
    return TensorColumns(tensors)


def check_needed(dataset: Any, columns: Columns, needed: Sequence[str], where: str) -> None:
    """Refuses a data set where a needed column was left out.

    Raises:
        RequestError: naming the column, and why.
    """
    if is_dataset(dataset):
        for name in needed:
            if name in dataset.column_names and name not in columns.names:
                raise RequestError(f"{where}: column {name!r} {_column(dataset, name)}")


def splits_of(given: Any, where: str, x: str | None = None, label: str | None = None) -> dict[str, Any]:
    """The arguments of a ``Source`` of a ``Dataset`` or ``DatasetDict``, its input called ``x`` and its label ``y``.

    Args:
        given: the data set.
        where: the key that an error names.
        x: the column of inputs; left out, ``x``, or the only image, or the only array.
        label: the column of labels; left out, one of the usual names, or the only ``ClassLabel``.

    Raises:
        RequestError: for no train split, or columns that are not there or cannot be tensors.
    """
    found: dict[str, Any]
    if isinstance(given, Mapping):
        found = {
            split: given[name]
            for split, names in _SPLITS.items()
            if (name := next((name for name in names if name in given), None)) is not None
        }
        if "train" not in found:
            raise RequestError(f"{where}: no split 'train'; it has {', '.join(given) or 'none'}")
    else:
        found = {"train": given}
    train = found["train"]
    label = _named(train, label, f"{where}.label") if label is not None else _find_label(train, where)
    x = _named(train, x, f"{where}.x") if x is not None else _find_input(train, label, where)
    splits = {}
    for split, dataset in found.items():
        columns = columns_of(dataset, f"{where}.{split}")
        check_needed(dataset, columns, [x, label], f"{where}.{split}")
        assert isinstance(columns, TensorColumns)
        names = {x: "x", label: "y"}
        taken = {old for old in columns.tensors if old not in names and old in ("x", "y")}  # another's new name
        missing = [name for name in names if name not in columns.tensors]
        if missing:
            raise RequestError(f"{where}.{split}: no column {missing[0]!r}{nearest(missing[0], columns.names)}")
        splits[split] = TensorColumns(
            {names.get(old, old): tensor for old, tensor in columns.tensors.items() if old not in taken}
        )
    pixels = all(columns.dtype("x") == torch.uint8 for columns in splits.values()) and _is_image(train, x)
    return {**splits, "input_range": (0.0, 1.0) if pixels else None}


def _named(dataset: Any, name: str, where: str) -> str:
    known = dataset.column_names
    if name not in known:
        raise RequestError(f"{where}: no column {name!r}; the data set has {', '.join(known)}{nearest(name, known)}")
    return name


def _find_label(dataset: Any, where: str) -> str:
    usual = [name for name in _LABELS if name in dataset.column_names]
    classes = [name for name, feature in dataset.features.items() if type(feature).__name__ == "ClassLabel"]
    if usual or len(classes) == 1:
        return usual[0] if usual else classes[0]
    raise RequestError(f"{where}.label: which column is it? Name one of {', '.join(dataset.column_names)}")


def _find_input(dataset: Any, label: str, where: str) -> str:
    others = [name for name in dataset.column_names if name != label]
    images = [name for name in others if _is_image(dataset, name)]
    arrays = [name for name in others if _is_array(dataset.features[name])]
    for found in (["x"] if "x" in others else [], images, arrays, others):
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise RequestError(f"{where}.x: which column is it? Name one of {', '.join(others) or 'no others'}")


def _is_image(dataset: Any, name: str) -> bool:
    return type(dataset.features[name]).__name__ == "Image"


def _is_array(feature: Any) -> bool:
    """Whether a feature is numbers of more than one an example."""
    if type(feature).__name__ in ("Array2D", "Array3D", "Array4D", "Array5D"):
        return True
    inner = getattr(feature, "feature", None)
    return inner is not None and (
        _is_array(inner) or str(getattr(inner, "dtype", "string"))[:3] in ("int", "uin", "flo")
    )


def _column(dataset: Any, name: str) -> Tensor | str:
    """A column as a tensor ``[N, ...]``, or why it is none."""
    if _is_image(dataset, name):
        return _images(dataset, name)
    try:
        values = np.asarray(dataset.with_format("numpy", columns=[name])[:][name])
    except (TypeError, ValueError) as error:
        return f"cannot be read as an array ({' '.join(str(error).split())})"
    if values.dtype.kind in "US":
        return "holds strings, which are no numbers"
    if values.dtype.kind not in "biuf":
        return "holds examples of different shapes, or no numbers; pad or crop them to one shape"
    return torch.from_numpy(np.ascontiguousarray(values) if values.flags.writeable else values.copy())


def _images(dataset: Any, name: str) -> Tensor | str:
    """Images as bytes ``[N, C, H, W]``, or why they are none."""
    images: Tensor | None = None
    for i, example in enumerate(dataset.select_columns([name]).with_format(None)):
        image = example[name]
        if image is None:
            return f"has no image at {i}"
        pixels = np.asarray(image.convert(_MODES.get(image.mode, image.mode)))
        if pixels.dtype != np.uint8:
            return f"has an image of mode {image.mode} at {i}, which is not of bytes"
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if images is None:
            images = torch.empty((len(dataset), *pixels.shape), dtype=torch.uint8)
        if pixels.shape != tuple(images.shape[1:]):
            return (
                f"has images of different shapes, {list(images.shape[1:])} at 0 and {list(pixels.shape)} at {i}; resize"
                " them to one"
            )
        images[i] = torch.from_numpy(pixels.copy())
    assert images is not None
    return images


#: Modes of pictures whose pixels are no intensities, and what they are read as.
_MODES = {"P": "RGB", "1": "L", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "LAB": "RGB"}
