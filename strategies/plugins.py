"""Plug-ins: functions on rows that protect, shrink or change what a client sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clients.updates import Updates
from strategies.context import Context

State = dict[str, Any]


class Plugin:
    """The base of every plug-in: it overrides the halves it needs. State is returned, never kept on ``self``.

    Attributes:
        client_state: name -> ``"row"`` or a length ``m``; kept per client between rounds, zeros at first.
        owns_sum: whether the plug-in owns the addition (secure sum), so that no single row is ever seen.
    """

    client_state: Mapping[str, str | int] = {}
    owns_sum: bool = False

    def init(self, ctx: Context) -> State:
        """The server's first state: a dict of tensors. It is broadcast to the client half."""
        return {}

    def client(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        """Before the update leaves. ``state`` holds the server's state and each ``client_state`` as ``[k, ...]``;
        what comes back under those names is the new client state."""
        return u, state

    def server_each(self, u: Updates, state: State, ctx: Context) -> Updates:
        """On arrival, client by client (decode, clip again)."""
        return u

    def server_total(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        """After the reduction and before the server optimiser; ``u.rows`` ``[1, d]`` is the aggregate update."""
        return u, state

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
