"""What is looked for in the numbers of a source before anything is built on them."""

from __future__ import annotations

import torch
from torch import Tensor

from clients.errors import RequestError
from fedsim.data.columns import Columns, TensorColumns
from fedsim.data.mapped import MappedColumns
from fedsim.data.source import SPLITS, Source
from fedsim.data.tensors import not_finite


def check_finite(source: Source) -> None:
    """Refuses NaN and infinities among the numbers that lie in memory.

    Raises:
        RequestError: names the split, the column, and the place.
    """
    for split in SPLITS:
        columns = source.columns(split)
        if isinstance(columns, TensorColumns | MappedColumns):
            for name, tensor in columns.tensors.items():
                wrong = not_finite(tensor)
                if wrong is not None:
                    raise RequestError(f"data.source.{split}.{name}: {wrong}; every number must be finite")


def count_classes(source: Source, labels: Tensor | None) -> int | None:
    """How many classes the labels of all splits are of: what the source says, or one more than the largest.

    Args:
        source: whose labels.
        labels: the training split's, where they are at hand.

    Returns:
        None where labels are no classes: real numbers, or none at all.

    Raises:
        RequestError: for a class below 0 (of labels that are one an example; others may mark what does not count), or
            one that the source's own number does not allow, with its place.
    """
    largest = -1
    for split in SPLITS:
        columns = source.columns(split)
        if columns is None or source.label not in columns.names:
            continue
        if not _whole(columns.dtype(source.label)):
            return None
        if source.classes is not None and (labels is None or split != "train") and columns.held(source.label) is None:
            continue  # to read them all is what naming the number spares
        start = 0
        for values in [labels] if split == "train" and labels is not None else columns.blocks(source.label):
            largest = max(largest, int(values.max()))
            _check_classes(values, start, source, split)
            start += len(values)
    return source.classes if source.classes is not None else (largest + 1 if largest >= 0 else None)


def _whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _check_classes(values: Tensor, start: int, source: Source, split: str) -> None:
    where = f"data.source.{split}.{source.label}"
    if values.dim() == 1 and int(values.min()) < 0:
        place = int(values.argmin())
        raise RequestError(
            f"{where}: class {int(values[place])} at [{start + place}]; classes count from 0 (real targets are floats)"
        )
    if source.classes is not None and int(values.max()) >= source.classes:
        first = (values >= source.classes).nonzero()[0]
        at = [start + int(first[0]), *first[1:].tolist()]
        raise RequestError(
            f"{where}: class {int(values[tuple(first)])} at {at}; the source says that there are {source.classes}"
            " classes, and they count from 0"
        )


def class_labels(columns: Columns, name: str) -> Tensor | None:
    """Labels ``int [N]`` of one class an example that lie in memory, or None."""
    if name not in columns.names or columns.shape(name):
        return None
    held = columns.held(name)
    return held if held is not None and _whole(held.dtype) else None
