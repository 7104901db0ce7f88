"""Weights and biases as rows: named parameters <-> slices of one row; which are shared, which stay on the client."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients.errors import RequestError, nearest
from clients.patterns import selected

Share = Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class Slot:
    """One named parameter's place in a row."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)


class Layout:
    """Maps a model's named trainable parameters to slices of one row of length ``size``.

    Only parameters have a place: buffers (batch-norm statistics, counters) and frozen parameters are never in a row.
    Tied parameters appear once. A row is float64 where any parameter is, else float32 (half precision fits exactly).

    Args:
        model: the module; its ``named_parameters()`` order is the layout's order.
        share: says of a parameter whether it is shared, as ``share(name, parameter)``; left out, all are.
            Those that are not are the layout's :attr:`personal` part.

    Attributes:
        size: length ``d`` of a row.
        dtype: dtype of a row.
        personal: the layout of what is trained but not shared.

    Raises:
        RequestError: for a complex parameter, or a model with nothing to train.
    """

    def __init__(self, model: nn.Module, share: Share | None = None):
        shared: list[tuple[str, nn.Parameter]] = []
        kept: list[tuple[str, nn.Parameter]] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.is_complex():
                raise RequestError(f"model: parameter {name!r} is complex; rows hold real numbers only")
            (shared if share is None or share(name, parameter) else kept).append((name, parameter))
        if not shared:
            raise RequestError("model: no trainable parameter is shared, so there is nothing to federate")
        double = any(parameter.dtype == torch.float64 for _, parameter in shared + kept)
        dtype = torch.float64 if double else torch.float32
        self._fill(_slots(shared), dtype)
        self.personal = Layout.of(_slots(kept), dtype)

    def _fill(self, slots: tuple[Slot, ...], dtype: torch.dtype) -> None:
        self.slots = slots
        self.dtype = dtype
        self.size = sum(slot.size for slot in slots)

    @classmethod
    def of(cls, slots: tuple[Slot, ...], dtype: torch.dtype) -> Layout:
        """A layout of these slots, without a model; nothing is personal."""
        made = cls.__new__(cls)
        made._fill(slots, dtype)
        return made

    @property
    def names(self) -> list[str]:
        """The parameters' names, in order."""
        return [slot.name for slot in self.slots]

    @property
    def all(self) -> Layout:
        """The training layout: the shared parameters, then the personal ones, in one row."""
        moved = [Slot(s.name, s.shape, s.dtype, s.start + self.size) for s in self.personal.slots]
        return Layout.of((*self.slots, *moved), self.dtype)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Name -> shape, in order."""
        return {slot.name: list(slot.shape) for slot in self.slots}

    def length(self, size: str | int) -> int:
        """How long a declared piece of state is: ``"row"`` is one number a parameter.

        Raises:
            RequestError: for any other word.
        """
        if size != "row" and not isinstance(size, int):
            raise RequestError(f'state of size {size!r}; say "row" for one number a parameter, or how many numbers')
        return self.size if size == "row" else int(size)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and (self.slots, self.dtype) == (other.slots, other.dtype)

    def __hash__(self) -> int:
        return hash((self.slots, self.dtype))

    def __repr__(self) -> str:
        return f"Layout({len(self.slots)} parameters, size={self.size}, {str(self.dtype).removeprefix('torch.')})"

    def flatten(self, source: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """Copies named tensors into a new row ``[size]``.

        Raises:
            RequestError: for a missing name or another shape.
        """
        tensors = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
        row = torch.empty(self.size, dtype=self.dtype)
        for slot in self.slots:
            if slot.name not in tensors:
                raise RequestError(f"weights: {slot.name!r} is missing{nearest(slot.name, list(tensors))}")
            tensor = tensors[slot.name]
            if tuple(tensor.shape) != slot.shape:
                raise RequestError(
                    f"weights: {slot.name!r} has shape {tuple(tensor.shape)} where the model has {slot.shape}"
                )
            row[slot.slice].copy_(tensor.detach().reshape(-1))
        return row

    def unflatten(self, row: Tensor) -> dict[str, Tensor]:
        """Named tensors of a row ``[size]``, or of a block ``[k, size]`` with ``k`` in front of every shape.

        Views of ``row`` where the dtypes agree, converted copies where a parameter has another dtype.
        """
        if row.shape[-1] != self.size:
            raise RequestError(f"weights: a row of length {row.shape[-1]} does not fit a layout of size {self.size}")
        return {
            slot.name: row[..., slot.slice].view(*row.shape[:-1], *slot.shape).to(slot.dtype) for slot in self.slots
        }

    @torch.no_grad()
    def load(self, model: nn.Module, row: Tensor) -> None:
        """Copies a row into the model's parameters, in place."""
        parameters = dict(model.named_parameters())
        for name, tensor in self.unflatten(row).items():
            parameters[name].copy_(tensor)


def _slots(parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[Slot, ...]:
    slots, start = [], 0
    for name, parameter in parameters:
        slots.append(Slot(name, tuple(parameter.shape), parameter.dtype, start))
        start += parameter.numel()
    return tuple(slots)


def share_all_but(personal: Sequence[str], model: nn.Module) -> Share | None:
    """The ``share`` function that keeps the parameters that the patterns (``"head.*"``) mean on the client.

    Raises:
        RequestError: for a pattern that matches no trainable parameter.
    """
    if not personal:
        return None
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    chosen = set(selected(personal, names, "client.personal", "trainable parameter"))
    return lambda name, parameter: name not in chosen
