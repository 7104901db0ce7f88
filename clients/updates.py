"""What clients send: a block of updates, one row a client, and the statistics beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Updates:
    """A chunk of clients in the worker, or the whole cohort where a rule needs rows; ordered by client id.

    Attributes:
        rows: ``[k, d]`` updates, local minus global.
        clients: ``int64 [k]`` ids.
        examples: ``int64 [k]`` training examples each client holds.
        steps: ``int64 [k]`` local steps each client took.
        weights: ``float64 [k]`` how much each row counts; an aggregator's ``prepare`` sets them.
        sends: named statistics that travel beside the rows and add, ``[k]`` or ``[k, m]``; billed.
        nbytes: ``int64 [k]`` bytes of each client's encoded row; ``None`` while the rows travel as they are.
        report: values for the record of each client, ``[k]`` each; neither sent nor billed, and no rule reads them.

    In sum mode, after the reduction, ``rows`` is the weighted sum ``[1, d]`` in float64, ``weights`` ``[1]`` its total
    weight and each of ``sends`` the sum over clients (``[1]`` or ``[1, m]``).
    """

    rows: Tensor
    clients: Tensor
    examples: Tensor
    steps: Tensor
    weights: Tensor
    sends: dict[str, Tensor] = field(default_factory=dict)
    nbytes: Tensor | None = None
    report: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clients)

    def replace(self, **changes: Any) -> Updates:
        """A copy with some fields changed; tensors are shared with the original."""
        return dataclasses.replace(self, **changes)

    def send(self, **statistics: Tensor) -> Updates:
        """A copy that also sends these statistics."""
        return self.replace(sends={**self.sends, **statistics})

    def tell(self, **values: Tensor) -> Updates:
        """A copy that also has these values for the record."""
        return self.replace(report={**self.report, **values})

    def select(self, which: Tensor) -> Updates:
        """The clients at these positions (``int64`` indices or a ``bool`` mask ``[k]``)."""
        picked = {name: getattr(self, name)[which] for name in ("rows", "clients", "examples", "steps", "weights")}
        return Updates(
            **picked,
            sends={name: value[which] for name, value in self.sends.items()},
            nbytes=None if self.nbytes is None else self.nbytes[which],
            report={name: value[which] for name, value in self.report.items()},
        )

    def bill(self) -> Tensor:
        """``int64 [k]`` bytes each client sends: its encoded row, its example count, and its named statistics."""
        plain = self.rows.shape[1] * self.rows.element_size()
        bill = torch.full((len(self),), plain, dtype=torch.int64) if self.nbytes is None else self.nbytes.clone()
        bill += self.examples.element_size()
        for value in self.sends.values():
            bill += value.element_size() * (value[0].numel() if len(value) else 0)
        return bill

    @staticmethod
    def join(parts: Sequence[Updates], rows: Tensor | None = None) -> Updates:
        """Several blocks as one, ordered by client id.

        Args:
            parts: the blocks.
            rows: the joined matrix ``[n, d]`` where it exists already, in client order; the parts' rows are not read.
        """
        clients = torch.cat([part.clients for part in parts])
        order = clients.argsort()
        # Most often they are in order already, and moving large rows once more is what costs.
        in_order = bool((clients[1:] > clients[:-1]).all())

        def joined(tensors: list[Tensor]) -> Tensor:
            whole = torch.cat(tensors)
            return whole if in_order else whole[order]

        coded = [part.nbytes for part in parts if part.nbytes is not None]
        return Updates(
            rows=joined([part.rows for part in parts]) if rows is None else rows,
            clients=joined([part.clients for part in parts]),
            examples=joined([part.examples for part in parts]),
            steps=joined([part.steps for part in parts]),
            weights=joined([part.weights for part in parts]),
            sends={name: joined([part.sends[name] for part in parts]) for name in parts[0].sends},
            nbytes=joined(coded) if len(coded) == len(parts) else None,
            report={name: joined([part.report[name] for part in parts]) for name in parts[0].report},
        )
