"""numpyexample: A Flower / NumPy app."""

import random

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from numpyexample.task import get_dummy_model

# Create ServerApp
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Main entry point for the ServerApp."""
    random.seed(1)
    num_rounds: int = context.run_config["num-server-rounds"]
    fraction_train: float = context.run_config["fraction-train"]

    # Load initial model
    arrays = ArrayRecord([get_dummy_model()])

    # Initialize and start FedAvg strategy
    strategy = FedAvg(fraction_train=fraction_train)
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=num_rounds)

    print("Final model:", result.arrays.to_numpy_ndarrays())
