"""One client's examples as its Flower app is given them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clients.errors import RequestError
from clients.examples import Examples

SPLITS = ("train", "test", "validation")


class SizedExamples(Examples, Protocol):
    """Examples that can be counted."""

    def __len__(self) -> int: ...


class HeldExamples:
    """The examples of the client whose turn it is."""

    def __init__(self) -> None:
        self.held: SizedExamples | None = None

    def hold(self, examples: SizedExamples | None) -> None:
        """Makes these the examples; None where there are none."""
        self.held = examples

    def __len__(self) -> int:
        return 0 if self.held is None else len(self.held)

    def take(self, index: Tensor) -> dict[str, Tensor]:
        assert self.held is not None
        return self.held.take(index)


@dataclass(frozen=True)
class TensorExamples:
    """Columns in memory, name -> ``[n, ...]``; the input's bytes are pixels, float32 in [0, 1] when they are taken."""

    columns: Mapping[str, Tensor]
    input: str = "x"

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, index: Tensor) -> dict[str, Tensor]:
        taken = {}
        for name, column in self.columns.items():
            values = column.index_select(0, index.reshape(-1))
            if name == self.input and values.dtype == torch.uint8:
                values = values.to(torch.float32).div_(255)
            taken[name] = values.reshape((*index.shape, *column.shape[1:]))
        return taken


@dataclass(frozen=True)
class ListedExamples:
    """A map-style data set whose items are dicts, or tuples of an input and a label."""

    items: Any
    input: str = "x"

    def __len__(self) -> int:
        return len(self.items)

    def take(self, index: Tensor) -> dict[str, Tensor]:
        from torch.utils.data import default_collate

        found = default_collate([self._item(place) for place in index.reshape(-1).tolist()])
        return {name: value.reshape((*index.shape, *value.shape[1:])) for name, value in found.items()}

    def _item(self, place: int) -> dict[str, Any]:
        item = self.items[place]
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(item, Sequence) and len(item) == 2:
            return {self.input: item[0], "y": item[1]}
        raise RequestError(f"data: example {place} is a {type(item).__name__}; give dicts, or tuples (x, y)")


def client_splits(given: Any, where: str, input: str = "x") -> dict[str, SizedExamples]:
    """A client's splits, those that hold an example.

    Args:
        given: the train split alone, ``(train, test)``, or a table or an object with ``train``, ``test`` and
            ``validation``. Two tensors or arrays are inputs and labels of one split.
        where: what an error begins with.
        input: the column of inputs.

    Raises:
        RequestError: for what is none of these, and where there is nothing to train on.
    """
    if isinstance(given, Mapping) and "train" in given:
        named = dict(given)
    elif _is_pair(given):
        named = {"train": given}
    elif isinstance(given, tuple):
        named = dict(zip(SPLITS, given, strict=False))
    elif hasattr(given, "train") and not hasattr(given, "take"):
        named = {split: getattr(given, split, None) for split in SPLITS}
    else:
        named = {"train": given}
    unknown = [name for name in named if name not in SPLITS]
    if unknown:
        raise RequestError(f"{where}: unknown split {unknown[0]!r}; there are {', '.join(SPLITS)}")
    splits = {name: _examples(split, f"{where}.{name}", input) for name, split in named.items() if split is not None}
    held = {name: split for name, split in splits.items() if len(split)}
    if "train" not in held:
        raise RequestError(f"{where}: no example to train on")
    return held


def _is_pair(given: Any) -> bool:
    """Whether these are inputs and labels, ``(x [n, ...], y [n])``, and no two splits."""
    return (
        isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(v, Tensor | np.ndarray) for v in given)
    )


def _examples(split: Any, where: str, input: str) -> SizedExamples:
    if isinstance(split, torch.utils.data.DataLoader):
        split = split.dataset
    if _is_pair(split):
        split = {input: split[0], "y": split[1]}
    if isinstance(split, Mapping):
        return TensorExamples(_columns(split, where, input), input)
    if callable(getattr(split, "take", None)) and hasattr(split, "__len__") and not hasattr(split, "__getitem__"):
        return split
    if hasattr(split, "__getitem__") and hasattr(split, "__len__"):
        return ListedExamples(split, input)
    raise RequestError(
        f"{where}: {type(split).__name__} given; give columns {{'x': ..., 'y': ...}}, or a data set with len() and"
        " [index]"
    )


def _columns(split: Mapping[str, Any], where: str, input: str) -> dict[str, Tensor]:
    if not split:
        raise RequestError(f"{where}: no column; give at least one, such as {{'x': x, 'y': y}}")
    columns = {}
    for name, value in split.items():
        tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        if not isinstance(tensor, Tensor) or not tensor.dim():
            raise RequestError(f"{where}.{name}: {type(value).__name__} given; give a tensor or an array [n, ...]")
        whole = name != input and not tensor.is_floating_point()
        columns[name] = tensor.detach().to(torch.int64) if whole else tensor.detach()
    lengths = {name: len(tensor) for name, tensor in columns.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise RequestError(f"{where}: columns differ in length ({said})")
    return columns
