"""Plug-ins around a codec: what it loses is sent later, or it acts on what clients are sent."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clients.errors import RequestError
from clients.updates import Updates
from strategies.codecs import built, coded, slices
from strategies.context import Context
from strategies.plugins import Plugin, State


@dataclass(frozen=True)
class ErrorFeedback(Plugin):
    """Adds to each update what a codec has lost of the client's earlier ones.

    With g the update and e what is kept: ``c = Q(g + e)`` is sent and ``e <- g + e - c`` is kept (Seide et al. 2014,
    "1-bit stochastic gradient descent"; Karimireddy et al. 2019, "Error feedback fixes signSGD", Algorithm 2), so that
    over the rounds ``sum c + e = sum g`` for every client, however often it takes part. e stays bounded where Q is a
    contraction, and may grow without end around another codec, which is refused. Biased in each round, as the codec is.

    Bytes are the codec's. Keeps e, a row, with every client.

    Args:
        codec: the codec: its name, a table with its name and settings, or the object; a contraction, such as ``top_k``.
    """

    codec: Any
    base: InitVar[Path | None] = None
    client_state = {"residual": "row"}

    def __post_init__(self, base: Path | None) -> None:
        codec = built(self.codec, base, "plugins.error_feedback.codec")
        object.__setattr__(self, "codec", codec)
        if not codec.contraction:
            mend = (
                "it is unbiased and needs no feedback: put it among the plug-ins by itself, or give top_k or sign here"
                if codec.unbiased
                else "give top_k or sign"
            )
            raise RequestError(
                f"plugins.error_feedback.codec: what {codec!r} loses can be more than what it is given, so the feedback"
                f" would grow without end; {mend}"
            )

    def client(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        owed = u.rows + state["residual"]
        u = coded(self.codec, u, owed, ctx)
        return u, {**state, "residual": owed - u.rows}


@dataclass(frozen=True)
class Downlink(Plugin):
    """Sends clients the weights through a codec: they are given ``decode(encode(weights))``, the same for all.

    The server keeps its exact weights, and moves those by what clients send; a client's update is the difference to
    what it was sent. Draws are new every round. A codec that keeps all coordinates, such as ``quantize`` of 8 bits or
    more, suits weights; to one that drops coordinates they would be zero.

    Bytes are the codec's, for each client. Keeps nothing.

    Args:
        codec: the codec: its name, a table with its name and settings, or the object.
    """

    codec: Any
    base: InitVar[Path | None] = None

    def __post_init__(self, base: Path | None) -> None:
        object.__setattr__(self, "codec", built(self.codec, base, "plugins.downlink.codec"))

    @property
    def note(self) -> str:  # type: ignore[override]
        if not self.codec.contraction:
            return ""
        return f"Clients began from what {self.codec!r} leaves of the weights, which drops coordinates or magnitudes."

    def down(self, row: Tensor, state: State, ctx: Context) -> tuple[Tensor, int]:
        sent, nbytes = self.codec.transmit(row[None], [ctx.generator("down")], slices(ctx))
        return sent[0], int(nbytes[0])
