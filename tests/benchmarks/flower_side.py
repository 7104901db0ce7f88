"""Flower's own simulator, ``flwr.simulation.run_simulation``, with as many warm Ray actors as processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import flwr
import ray
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from tests.benchmarks import flower_client, plain
from tests.benchmarks.work import WORKS, Job, Timing, Work, serve


class TimedFedAvg(FedAvg):
    """Flower's FedAvg, writing down when each round ends and what its clients report."""

    def __init__(self, work: Work) -> None:
        super().__init__(
            fraction_train=work.cohort / work.population,
            fraction_evaluate=0.0,
            min_train_nodes=work.cohort,
            min_available_nodes=work.population,
        )
        self.ends: list[float] = []
        self.clients: list[int] = []
        self.steps: list[int] = []
        self.losses: list[float] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate as Flower does, then note the time."""
        replies = list(replies)
        if failed := [reply for reply in replies if reply.has_error()]:
            raise RuntimeError(f"{len(failed)} clients failed in round {server_round}: {failed[0].error.reason}")
        metrics = [reply.content["metrics"] for reply in replies]
        result = super().aggregate_train(server_round, replies)
        self.ends.append(time.perf_counter())
        self.clients.append(len(metrics))
        self.steps.append(sum(metric["steps"] for metric in metrics))
        self.losses.append(sum(metric["loss"] for metric in metrics) / len(metrics))
        return result


def measure(job: Job) -> Timing:
    """Time the rounds of a job from one end of aggregation to the next; start-up falls into the warm rounds."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    work = WORKS[job.work]
    strategy = TimedFedAvg(work)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        torch.set_num_threads(1)
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(plain.build(work).state_dict()),
            num_rounds=job.rounds,
            train_config=ConfigRecord({"work": job.work, "data": job.data}),
        )

    run_simulation(
        server_app=server,
        client_app=flower_client.app,
        num_supernodes=work.population,
        backend_config={
            "init_args": {"num_cpus": job.processes, "num_gpus": 0, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0},
        },
    )
    ends, warm = strategy.ends, job.warm
    seconds = [end - start for start, end in zip(ends[warm - 1 : -1], ends[warm:], strict=True)]
    versions = {"flwr": flwr.__version__, "ray": ray.__version__, "torch": str(torch.__version__)}
    return Timing(seconds, strategy.clients[warm:], strategy.steps[warm:], strategy.losses, versions)


if __name__ == "__main__":
    serve(measure)
