"""Checks: what looks at a run's result and reports on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from clients.updates import Updates
from strategies.context import Context

#: ``metrics``: name -> number; ``tables``: name -> rows, one dict each; ``figures``: name -> a plotly figure as a dict.
Findings = tuple[Mapping[str, float], Mapping[str, Sequence[Mapping[str, Any]]], Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class CheckContext(Context):
    """A context after the last round: ``weights`` are the final ones.

    Attributes:
        model: the model with the final weights, in evaluation mode, batch norm recalibrated; a check may change it.
        updates: the last round's cohort with its rows, for checks that need them.
    """

    model: nn.Module | None = None
    updates: Updates | None = None


class Check:
    """The base of every check. It uses no training randomness: switching one on does not change the weights.

    Attributes:
        needs: ``"weights"``, or ``"rows"`` where it looks at the last round's updates.
    """

    needs: Literal["weights", "rows"] = "weights"

    def fits(self, strategy: Any) -> list[str]:
        """What of the strategy does not go with the check, one line a key, with the mend; told before a run."""
        return []

    def run(self, ctx: CheckContext) -> Findings:
        """Metrics, tables and figures.

        Raises:
            Exception: whatever keeps it from an answer; the run is kept, the failure recorded, the exit code 3.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
