"""pytorch_advanced: A Flower / PyTorch app."""

import pickle

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from pytorch_advanced.task import Net, head_of, load_data
from pytorch_advanced.task import test as test_fn
from pytorch_advanced.task import train as train_fn

# Flower ClientApp
app = ClientApp()

LAYER_NAME = "classification-layer"
METADATA_KEY = "train-metadata"


def save_layer_weights_to_state(state: RecordDict, model: Net):
    """Save last layer weights to state."""
    state[LAYER_NAME] = ArrayRecord(head_of(model))


def load_layer_weights_from_state(state: RecordDict, model: Net):
    """Load last layer weights to state."""
    if LAYER_NAME in state.array_records:
        model.load_state_dict(state[LAYER_NAME].to_torch_state_dict(), strict=False)


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    load_layer_weights_from_state(context.state, model)
    device = torch.device("cpu")

    partition_id = context.node_config["partition-id"]
    num_partitions = context.node_config["num-partitions"]
    trainloader, _ = load_data(partition_id, num_partitions)
    train_loss, metadata = train_fn(
        model,
        trainloader,
        context.run_config["local-epochs"],
        msg.content["config"]["lr"],
        device,
    )

    # Save classification head to context's state to use in a future fit() call
    save_layer_weights_to_state(context.state, model)

    # A record of how often this client was asked
    fits = context.state.metric_records.get("fits", MetricRecord({"count": 0}))
    fits["count"] = fits["count"] + 1
    context.state["fits"] = fits

    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord(
                {"train_loss": train_loss, "fits": fits["count"], "num-examples": len(trainloader.dataset)}
            ),
            METADATA_KEY: ConfigRecord({"meta": pickle.dumps(metadata)}),
        }
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    load_layer_weights_from_state(context.state, model)
    _, valloader = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    eval_loss, eval_acc = test_fn(model, valloader, torch.device("cpu"))
    metrics = MetricRecord({"eval_loss": eval_loss, "eval_acc": eval_acc, "num-examples": len(valloader.dataset)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
