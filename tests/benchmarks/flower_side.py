"""Flower's own simulator, ``flwr.simulation.run_simulation``, with as many warm Ray actors as processes."""

from __future__ import annotations

import logging

import flwr
import ray
import torch
from flwr.simulation import run_simulation

from tests.benchmarks import flower_client, flower_server
from tests.benchmarks.work import WORKS, Job, Timing, serve


def measure(job: Job) -> Timing:
    """Time the rounds of a job under Flower's simulator."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    server, strategy = flower_server.server_of(job)
    run_simulation(
        server_app=server,
        client_app=flower_client.app,
        num_supernodes=WORKS[job.work].population,
        backend_config={
            "init_args": {"num_cpus": job.processes, "num_gpus": 0, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0},
        },
    )
    versions = {"flwr": flwr.__version__, "ray": ray.__version__, "torch": str(torch.__version__)}
    return strategy.timing(job, versions)


if __name__ == "__main__":
    serve(measure)
