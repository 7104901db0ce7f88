"""fedsim's simulator of Flower apps, ``fedsim.flower.simulate``, with the very app that Flower's simulator runs."""

from __future__ import annotations

import torch

from fedsim.flower import simulate
from tests.benchmarks.work import WORKS, Job, Timing, serve


def measure(job: Job) -> Timing:
    """Time the rounds of a job under fedsim."""
    from tests.benchmarks import flower_client, flower_server

    server, strategy = flower_server.server_of(job)
    simulate(
        server,
        flower_client.app,
        WORKS[job.work].population,
        engine="processes",
        workers=job.processes,
        quiet=True,
    )
    return strategy.timing(job, {"torch": str(torch.__version__)})


if __name__ == "__main__":
    serve(measure)
