"""secaggexample: A Flower app with secure aggregation."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.common import Context


# Define FlowerClient and client_fn
class FlowerClient(NumPyClient):
    def __init__(self, partition_id: int):
        self.partition_id = partition_id

    def fit(self, parameters, config):
        # Every client moves by a vector of its own, so that the average is known
        moved = [array + 0.1 * (self.partition_id + 1) for array in parameters]
        return moved, 10 * (self.partition_id + 1), {}

    def evaluate(self, parameters, config):
        return float(np.mean(parameters[0])), 10, {"accuracy": 0.5}


def client_fn(context: Context):
    return FlowerClient(context.node_config["partition-id"]).to_client()


# Flower ClientApp
app = ClientApp(
    client_fn=client_fn,
    mods=[
        secaggplus_mod,
    ],
)
