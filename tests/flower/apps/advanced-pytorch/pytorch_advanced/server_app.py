"""pytorch_advanced: A Flower / PyTorch app."""

import random
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from pytorch_advanced.strategy import CustomFedAdagrad
from pytorch_advanced.task import Net, central_test, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Main entry point for the ServerApp."""
    random.seed(7)
    torch.manual_seed(7)
    device = context.run_config["server-device"]

    strategy = CustomFedAdagrad(
        fraction_train=context.run_config["fraction-train"],
        fraction_evaluate=context.run_config["fraction-evaluate"],
        eta=0.1,
        tau=0.01,
    )
    save_path = Path("outputs")
    save_path.mkdir(parents=True, exist_ok=True)
    strategy.set_save_path(save_path)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=get_evaluate_fn(device=device),
    )


def get_evaluate_fn(device: str):
    """Return a callback that evaluates the global model."""

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        net = Net()
        net.load_state_dict(arrays.to_torch_state_dict())
        net.to(device)
        loss, accuracy = test(net, central_test(), device=device)
        return MetricRecord({"accuracy": accuracy, "loss": loss})

    return evaluate
