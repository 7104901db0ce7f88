"""The Flower server of the benchmarks, the same for Flower's simulator and for fedsim's."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from tests.benchmarks import plain
from tests.benchmarks.work import WORKS, Job, Timing, Work


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

    def timing(self, job: Job, versions: dict[str, str]) -> Timing:
        """The timed rounds, each from one end of aggregation to the next; start-up falls into the warm rounds."""
        seconds = [end - start for start, end in zip(self.ends[job.warm - 1 : -1], self.ends[job.warm :], strict=True)]
        return Timing(seconds, self.clients[job.warm :], self.steps[job.warm :], self.losses, versions)


def server_of(job: Job) -> tuple[ServerApp, TimedFedAvg]:
    """The app that plays a job's rounds, and the strategy that writes down what came of them."""
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

    return server, strategy
