"""pytorch_advanced: A custom strategy, with a learning rate that decays and a start method of its own."""

import pickle
from collections.abc import Callable, Iterable
from logging import INFO
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, Result


class CustomFedAdagrad(FedAdagrad):
    """FedAdagrad that saves the best model and reads what clients tell of their training."""

    def set_save_path(self, path: Path):
        """Set the path where model checkpoints will be saved."""
        self.save_path = path
        self.best_acc_so_far = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of federated training and maybe do LR decay."""
        if server_round % 2 == 0:
            config["lr"] *= 0.5
            log(INFO, "LR decreased to: %s", config["lr"])
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Unpack the metadata and aggregate as usual."""
        converged = 0
        for reply in replies:
            if reply.has_content():
                metadata = pickle.loads(reply.content["train-metadata"]["meta"])
                converged += metadata.converged
                # Metadata is no record that FedAdagrad aggregates
                del reply.content["train-metadata"]
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is not None:
            metrics["converged"] = converged
        return arrays, metrics

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Execute the federated learning strategy, and save the best model."""
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        result = Result()
        if evaluate_fn and (res := evaluate_fn(0, initial_arrays)):
            result.evaluate_metrics_serverapp[0] = res
        arrays = initial_arrays
        for current_round in range(1, num_rounds + 1):
            log(INFO, "[ROUND %s/%s]", current_round, num_rounds)
            train_replies = grid.send_and_receive(
                messages=self.configure_train(current_round, arrays, train_config, grid),
                timeout=timeout,
            )
            agg_arrays, agg_train_metrics = self.aggregate_train(current_round, train_replies)
            if agg_arrays is not None:
                result.arrays = agg_arrays
                arrays = agg_arrays
            if agg_train_metrics is not None:
                result.train_metrics_clientapp[current_round] = agg_train_metrics
            evaluate_replies = grid.send_and_receive(
                messages=self.configure_evaluate(current_round, arrays, evaluate_config, grid),
                timeout=timeout,
            )
            agg_evaluate_metrics = self.aggregate_evaluate(current_round, evaluate_replies)
            if agg_evaluate_metrics is not None:
                result.evaluate_metrics_clientapp[current_round] = agg_evaluate_metrics
            if evaluate_fn and (res := evaluate_fn(current_round, arrays)):
                result.evaluate_metrics_serverapp[current_round] = res
                if res["accuracy"] > self.best_acc_so_far:
                    self.best_acc_so_far = res["accuracy"]
                    torch.save(arrays.to_torch_state_dict(), self.save_path / f"model_state_round_{current_round}.pt")
        return result
