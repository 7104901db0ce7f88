"""The server: the same strategy, on whatever grid Flower gives."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from clients.flower_app import initial_arrays
from digits_app.task import SEED, model, recipe, server_examples, strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds and says what came of them."""
    result = strategy.start(
        grid=grid,
        initial_arrays=initial_arrays(model, recipe, SEED),
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=evaluate,
        seed=SEED,
    )
    last = result.evaluate_metrics_serverapp[max(result.evaluate_metrics_serverapp)]
    print(f"test accuracy {last['accuracy']:.3f}")


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Accuracy and loss on the pictures that no client has."""
    net = model()
    net.load_state_dict(arrays.to_torch_state_dict())
    x, y = server_examples()
    with torch.no_grad():
        outputs = net(x)
    loss = torch.nn.functional.cross_entropy(outputs, y)
    return MetricRecord({"accuracy": float((outputs.argmax(1) == y).float().mean()), "loss": float(loss)})
