"""custom_mods: A Flower app with mods around its client."""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable


def get_file_mod(name: str):
    """Return a mod that writes the metrics of every reply to a file of the client's."""

    def file_mod(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
        start_time = time.time()
        reply = call_next(msg, context)
        logdir = Path(context.run_config["logdir"])
        logdir.mkdir(exist_ok=True)
        with (logdir / f"{name}-{context.node_config['partition-id']}.txt").open("a") as file:
            file.write(f"{msg.metadata.message_type} {time.time() - start_time > 0}\n")
        return reply

    return file_mod


def counting_mod(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Count the messages of a client in its state, and say so in the reply."""
    seen = context.state.config_records.get("seen", ConfigRecord({"messages": 0}))
    seen["messages"] = seen["messages"] + 1
    context.state["seen"] = seen
    reply = call_next(msg, context)
    reply.content["metrics"]["messages"] = seen["messages"]
    return reply


app = ClientApp(mods=[get_file_mod("custom-mods"), counting_mod])


@app.train(mods=[arrays_size_mod, fixedclipping_mod])
def train(msg: Message, context: Context):
    """Move far into a direction of one's own; the mod clips how far."""
    weights = msg.content["arrays"].to_numpy_ndarrays()
    moved = [array + np.random.randn(*array.shape) * 100 for array in weights]
    content = RecordDict({"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": 10, "loss": 1.0})})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    norm = float(np.sqrt(sum((array**2).sum() for array in msg.content["arrays"].to_numpy_ndarrays())))
    return Message(content=RecordDict({"metrics": MetricRecord({"num-examples": 1, "norm": norm})}), reply_to=msg)
