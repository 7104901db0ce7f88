"""A ClientApp that does what it is told, and server apps made of a function: for the tests of the grid."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim.flower import SimulationResult, simulate

told = ClientApp()


@told.query()
def query(message: Message, context: Context) -> Message:
    """Replies with its content, its partition, and how often it was asked."""
    count = context.state["asked"]["count"] + 1 if "asked" in context.state else 1
    context.state["asked"] = MetricRecord({"count": count})
    content = RecordDict({key: record for key, record in message.content.items()})
    content["me"] = ConfigRecord({"partition": context.node_config["partition-id"], "asked": count})
    return Message(content, reply_to=message)


@told.query("draw")
def draw(message: Message, context: Context) -> Message:
    """Replies with draws from the three global generators."""
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    return Message(RecordDict({"drawn": MetricRecord({"values": drawn})}), reply_to=message)


@told.query("spoil")
def spoil(message: Message, context: Context) -> Message:
    """Changes all that it is given, after it has noted what that was."""
    config, arrays = message.content["config"], message.content["arrays"]
    seen = {"list": list(config["list"]), "word": config["word"], "sum": float(arrays["w"].numpy().sum())}
    config["list"].append(9)
    config["word"] = "spoilt"
    arrays["w"].data = Array(np.full(3, 9.0)).data
    context.run_config["word"] = "spoilt"
    del message.content["arrays"]
    return Message(RecordDict({"seen": ConfigRecord(seen)}), reply_to=message)


@told.train()
def misbehave(message: Message, context: Context) -> Message:
    """Does, in the partitions named, what the configuration says; in others it answers."""
    config = message.content["config"]
    context.state["tried"] = MetricRecord({"times": 1})
    if context.node_config["partition-id"] in config["partitions"]:
        _DEEDS[config["deed"]]()
        if config["deed"] == "nothing":
            return None  # type: ignore[return-value]
        if config["deed"] == "another":
            return Message(RecordDict(), dst_node_id=1, message_type="train")
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


@told.query("tried")
def tried(message: Message, context: Context) -> Message:
    """Whether the node's state knows of a training."""
    return Message(RecordDict({"metrics": MetricRecord({"tried": int("tried" in context.state)})}), reply_to=message)


def _raise() -> None:
    raise ValueError("no data here")


def _swallow() -> None:
    """Sleeps on, whatever interrupts it."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            time.sleep(30)
        except Exception:
            continue


_DEEDS: dict[str, Callable[[], Any]] = {
    "raise": _raise,
    "exit": lambda: exit(3),
    "die": lambda: os._exit(9),
    "hang": _swallow,
    "nap": lambda: time.sleep(0.15),
    "nothing": lambda: None,
    "another": lambda: None,
}


def served(function: Callable[[Grid, Context], Any]) -> ServerApp:
    """A ServerApp whose main function it is."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> Any:
        return function(grid, context)

    return app


def run(function: Callable[[Grid, Context], Any], nodes: int = 3, app: ClientApp = told, **options: Any) -> Any:
    """What a server function returns over so many nodes."""
    return simulated(function, nodes, app, **options).returned


def simulated(
    function: Callable[[Grid, Context], Any], nodes: int = 3, app: ClientApp = told, **options: Any
) -> SimulationResult:
    """The whole result; in this process unless told otherwise."""
    return simulate(served(function), app, nodes, **{"engine": "inline", "quiet": True, **options})


def asked(node: int, kind: str = "query", content: RecordDict | None = None, **options: Any) -> Message:
    """A message."""
    return Message(RecordDict() if content is None else content, dst_node_id=node, message_type=kind, **options)


def order(deed: str, *partitions: int) -> RecordDict:
    """The content by which some partitions misbehave in training."""
    return RecordDict({"config": ConfigRecord({"deed": deed, "partitions": list(partitions), "server-round": 7})})


def weights(*values: float) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.array(values))})
