"""numpyexample: A Flower / NumPy app."""

from random import random
from time import sleep

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

# Flower ClientApp
app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    ndarrays = msg.content["arrays"].to_numpy_ndarrays()
    # Simulate local training
    sleep(0.001)
    ndarrays = [array + np.random.rand(*array.shape) for array in ndarrays]
    content = RecordDict(
        {
            "arrays": ArrayRecord(ndarrays),
            "metrics": MetricRecord({"train_metric": random(), "num-examples": 1}),
        }
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    ndarrays = msg.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"eval_metric": float(ndarrays[0].sum()), "num-examples": 1})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
