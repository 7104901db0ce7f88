"""Plug-ins: functions on rows that protect, shrink or change what a client sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clients.updates import Updates
from strategies.context import Context

if TYPE_CHECKING:
    from strategies.guarantees import Guarantee

State = dict[str, Any]


class Plugin:
    """The base of every plug-in: it overrides the halves it needs. State is returned, never kept on ``self``.

    Attributes:
        client_state: name -> ``"row"`` or a length ``m``; kept per client between rounds, zeros at first, and adopted
            in rounds that move the weights.
        stands: names of client state that is adopted in any case (what a client has spent).
        owns_sum: whether the plug-in owns the addition (secure sum), so that no single row is ever seen.
        repeats: whether ``server_each`` only repeats what the client half does, so that an owned sum may leave it out.
        private: whether what ``server_sum`` and ``server_total`` make of the clients' values beside ``u.rows`` is
            noised, or nothing, so that the plug-in may stand beside central noise.
        noises: whether the plug-in's ``server_total`` hides every client by noise of ``ctx.sensitivity``.
        note: a sentence that a reader of the run must know.
    """

    client_state: Mapping[str, str | int] = {}
    stands: tuple[str, ...] = ()
    owns_sum: bool = False
    repeats: bool = False
    private: bool = False
    noises: bool = False
    note: str = ""

    def fits(self, strategy: Any) -> list[str]:
        """What of the strategy that it is part of does not go with the plug-in, one line a key, with the mend."""
        return []

    def init(self, ctx: Context) -> State:
        """The server's first state: a dict of tensors. It is broadcast where ``client`` or ``server_each`` read it."""
        return {}

    def down(self, row: Tensor, state: State, ctx: Context) -> tuple[Tensor, int]:
        """What clients are sent in place of the weights ``row`` ``[d]``, and how many bytes that takes."""
        return row, row.nbytes

    def client(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        """Before the update leaves. ``state`` holds the server's state and each ``client_state`` as ``[k, ...]``;
        what comes back under those names is the new client state."""
        return u, state

    def server_each(self, u: Updates, state: State, ctx: Context) -> Updates:
        """On arrival, client by client (decode, clip again); the last plug-in's comes first."""
        return u

    def server_sum(self, u: Updates, state: State, ctx: Context) -> Updates:
        """After the addition and before the rule, where that needs the sum: ``u.rows`` is it, ``float64 [1, d]``."""
        return u

    def server_total(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        """After the rule and before the server optimiser; ``u.rows`` ``[1, d]`` is the aggregate update."""
        return u, state

    def bounded_by(self, state: State) -> float | None:
        """The largest Euclidean norm that a row has after ``server_each``, whatever was sent; None where there is no
        such norm."""
        return None

    def deviation(self, strategy: Any, expected: float) -> float | None:
        """The standard deviation, in clients, of the noise on a count that the plug-in releases beside the update, at
        so many clients a round; None where it releases none."""
        return None

    def guarantee(self, strategy: Any, clients: int, rounds: int) -> Guarantee | None:
        """The differential privacy that the plug-in gives, with so many clients that can be trained, over so many
        rounds."""
        return None

    def overrides(self, *halves: str) -> bool:
        """Whether the plug-in has one of these halves of its own."""
        return any(getattr(type(self), half) is not getattr(Plugin, half) for half in halves)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
