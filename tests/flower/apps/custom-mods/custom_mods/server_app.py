"""custom_mods: A Flower app with mods around its client."""

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Main entry point for the ServerApp."""
    np.random.seed(0)
    strategy = DifferentialPrivacyClientSideFixedClipping(
        FedAvg(), noise_multiplier=0.1, clipping_norm=0.5, num_sampled_clients=5
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros((3, 2)), np.zeros(2)]),
        num_rounds=context.run_config["num-server-rounds"],
    )
