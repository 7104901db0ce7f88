"""What a round leaves behind: plain values, handed to callbacks, to the run store and to the progress display."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: What the record of a client always holds; any further key is a value, a number or a word, that a rule
#: reports (JSON column ``info``).
CLIENT_FIELDS = ("client", "chunk", "examples", "steps", "weight", "loss", "update_norm")


@dataclass
class Event:
    """Something that a reader of the run should know of.

    Attributes:
        round: the round in which it happened.
        kind: ``client_failed``, ``dropped_update``, ``worker_lost``, ``checkpoint_damaged``, ``cohort_too_small``, ...
        message: one line that says what happened.
        client: the client at fault, where there is one.
        stage: what was being done (``train``, ``evaluate``, ...), where it is known.
        traceback: the traceback of a client's or rule's own code.
    """

    round: int
    kind: str
    message: str
    client: int | None = None
    stage: str | None = None
    traceback: str = ""


@dataclass
class RoundRecord:
    """One round. Round 0 is the evaluation of the initial weights: no client trains in it.

    Attributes:
        round: its number, from 1.
        cohort: clients that were asked.
        completed: clients whose update was combined.
        clients: one dict a client with :data:`CLIENT_FIELDS`: ``loss`` is the mean training loss of its local steps,
            ``update_norm`` the Euclidean norm of what it sent; further keys are values that a rule reports.
        chunks: one dict a chunk: ``chunk``, ``pid`` of the process that trained it, ``clients`` (how many) and
            ``seconds``.
        events: what happened in the round.
        bytes_up: bytes sent by clients, measured on the encoded payloads.
        bytes_down: bytes sent to clients.
        malicious: how many of the cohort's clients attacked, ``None`` where nobody does.
        bytes_saved: bytes that were not sent, up and down together, because parameters are frozen or stay with the
            clients, against sending the whole model both ways.
        epsilon: privacy spent so far, ``None`` without a privacy plug-in.
        simulated_seconds: how long the round would have taken on the clients' devices, ``None`` where not simulated.
        seconds: how long it took here, train_seconds: how much of that was local training.
        metrics: split (``test``, ``validation``, ``client_test``, ``client_validation``, ``attack``) to name to
            value, with ``examples`` beside the metrics; empty in rounds without an evaluation. The accuracy on
            ``attack`` is the share of the server's test examples with which an attack has its way.
        client_metrics: one dict a client and split: ``client``, ``split``, ``examples`` and its metrics.
    """

    round: int
    cohort: int
    completed: int
    clients: list[dict[str, Any]] = field(default_factory=list)
    chunks: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_saved: int = 0
    malicious: int | None = None
    epsilon: float | None = None
    simulated_seconds: float | None = None
    seconds: float = 0.0
    train_seconds: float = 0.0
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    client_metrics: list[dict[str, Any]] = field(default_factory=list)
