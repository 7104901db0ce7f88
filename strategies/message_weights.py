"""The server's weights under the names that arrays have in messages."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from clients.errors import RequestError
from clients.messages import named, record_of, tensors_of
from clients.weights import Layout

from flwr.app import Array, ArrayRecord  # isort: skip


class MessageWeights:
    """Takes the shared parameters out of arrays, and puts moved ones back under all their names.

    Args:
        layout: what clients share.
        aliases: other names of tied parameters -> their names in the layout.
    """

    def __init__(self, layout: Layout, aliases: Mapping[str, str]):
        self.layout, self.aliases = layout, aliases
        self._order: list[str] = []
        self._others: dict[str, Array] = {}

    def take(self, arrays: ArrayRecord) -> Tensor:
        """The weights ``[d]``; arrays that are no shared parameters go on as they are.

        Raises:
            RequestError: for arrays that lack a parameter.
        """
        missing = [name for name in self.layout.names if name not in arrays]
        if missing:
            raise RequestError(
                f"initial_arrays: {missing[0]!r}, which clients share, is missing; give"
                " clients.flower_app.initial_arrays(model, recipe), or ArrayRecord(model.state_dict())"
            )
        moved = {*self.layout.names, *self.aliases}
        self._order = list(arrays)
        self._others = {name: array for name, array in arrays.items() if name not in moved}
        return self.layout.flatten(tensors_of(arrays, self.layout.names))

    def record(self, row: Tensor) -> ArrayRecord:
        """Weights ``[d]`` in the order and under the names of the arrays that were taken."""
        own = record_of(named(self.layout, row))
        return ArrayRecord({name: self._others.get(name) or own[self.aliases.get(name, name)] for name in self._order})
