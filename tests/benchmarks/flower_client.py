"""The Flower client. It stands in a module of its own so that Flower pickles it by reference, not with its globals."""

from __future__ import annotations

from functools import lru_cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from tests.benchmarks import plain
from tests.benchmarks.work import WORKS, read_data

app = ClientApp()


@lru_cache(maxsize=1)
def model_of(work: str) -> nn.Module:
    """The model of a work, built once a process and reused, which favours Flower."""
    torch.set_num_threads(1)
    return plain.build(WORKS[work])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client on the weights received and reply with its own."""
    config = message.content["config"]
    model = model_of(config["work"])
    x, y = read_data(config["data"])
    client = context.node_config["partition-id"]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss, steps = plain.train(model, torch.from_numpy(x[client]), torch.from_numpy(y[client]))
    metrics = MetricRecord({"num-examples": len(y[client]), "loss": loss / steps, "steps": steps})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
