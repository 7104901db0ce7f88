"""fedsim itself, through its public iterator over rounds, which writes no run directory, as no rival does."""

from __future__ import annotations

import time

import torch

import fedsim
from tests.benchmarks.work import BATCH_SIZE, LEARNING_RATE, WORKS, Job, Timing, serve


def experiment(job: Job) -> fedsim.Experiment:
    """The work as an experiment. It has one round more than the job: the last round evaluates and is not timed."""
    work = WORKS[job.work]
    return fedsim.Experiment(
        name="benchmark",
        rounds=job.rounds + 1,
        data={
            "source": {"name": "arrays", "path": job.data},
            "clients": work.population,
            "partition": "natural",
            "proxy": 0,
        },
        model={"name": work.model},
        client={"optimizer": "sgd", "lr": LEARNING_RATE, "batch_size": BATCH_SIZE, "epochs": 1},
        strategy={"name": "fedavg", "clients_per_round": work.cohort},
        evaluation={"every": job.rounds + 1},
    )


def measure(job: Job) -> Timing:
    """Time the rounds of a job from one record to the next, so that nothing that a round does escapes the clock."""
    ends, records = [], []
    for record in fedsim.rounds(experiment(job), engine="processes", workers=job.processes):
        ends.append(time.perf_counter())
        records.append(record)
    # Drop the initial evaluation (round 0), where there is one, and the last round, which evaluates.
    trained = [index for index, record in enumerate(records) if 0 < record.round <= job.rounds]
    timed = trained[job.warm :]
    return Timing(
        seconds=[ends[index] - ends[index - 1] for index in timed],
        clients=[records[index].completed for index in timed],
        steps=[sum(client["steps"] for client in records[index].clients) for index in timed],
        losses=[_mean_loss(records[index]) for index in trained],
        versions={"torch": str(torch.__version__)},
    )


def _mean_loss(record: fedsim.RoundRecord) -> float:
    return sum(client["loss"] for client in record.clients) / len(record.clients)


if __name__ == "__main__":
    serve(measure)
