"""A plain PyTorch loop: one reused model a process, weights and sums in shared memory, the cohort split evenly.

It is what one would write by hand for this one experiment: no sampling rules, no record, no checkpoint.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

import torch
from torch import Tensor, multiprocessing, nn

from tests.benchmarks import plain
from tests.benchmarks.work import WORKS, Job, Timing, cohort, read_data, serve


class Trainer:
    """Trains clients one after another in one model and sums their weights.

    Attributes:
        weights: the global weights, a tensor for each parameter.
        total: the sum of the local weights, likewise.
    """

    def __init__(self, job: Job, weights: list[Tensor], total: list[Tensor]) -> None:
        self.model = plain.build(WORKS[job.work])
        self.weights, self.total = weights, total
        x, y = read_data(job.data)
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)

    @torch.no_grad()
    def load(self) -> None:
        """Put the global weights into the model."""
        for parameter, weight in zip(self.model.parameters(), self.weights, strict=True):
            parameter.copy_(weight)

    @torch.no_grad()
    def add(self) -> None:
        """Add the model's weights to the sum."""
        for parameter, total in zip(self.model.parameters(), self.total, strict=True):
            total.add_(parameter)

    def train(self, clients: list[int]) -> tuple[int, int, float]:
        """Train clients; return how many, their steps, and the sum of the steps' losses."""
        for total in self.total:
            total.zero_()
        trained, steps, loss = 0, 0, 0.0
        for client in clients:
            self.load()
            client_loss, client_steps = plain.train(self.model, self.x[client], self.y[client])
            self.add()
            trained, steps, loss = trained + 1, steps + client_steps, loss + client_loss
        return trained, steps, loss


def worker(connection: Connection, job: Job, weights: list[Tensor], total: list[Tensor]) -> None:
    """One process: trains the clients whose ids arrive until ``None`` does."""
    torch.set_num_threads(1)
    trainer = Trainer(job, weights, total)
    while (clients := connection.recv()) is not None:
        connection.send(trainer.train(clients))


def measure(job: Job) -> Timing:
    """Time the rounds of a job: in this process if it asks for one process, else in as many workers."""
    torch.set_num_threads(1)
    work = WORKS[job.work]
    weights = _shared(plain.build(work))
    totals = [_shared(plain.build(work)) for _ in range(job.processes)]
    connections, workers = _start(job, weights, totals) if job.processes > 1 else ([], [])
    trainer = None if workers else Trainer(job, weights, totals[0])

    seconds, trained, steps, losses = [], [], [], []
    for number in range(job.rounds):
        start = time.perf_counter()
        clients = cohort(work, number).tolist()
        if trainer is not None:
            results = [trainer.train(clients)]
        else:
            for rank, connection in enumerate(connections):
                connection.send(clients[rank :: job.processes])
            results = [connection.recv() for connection in connections]
        for index, weight in enumerate(weights):
            weight.copy_(sum(total[index] for total in totals)).div_(len(clients))
        seconds.append(time.perf_counter() - start)
        trained.append(sum(count for count, _, _ in results))
        steps.append(sum(count for _, count, _ in results))
        losses.append(sum(loss for _, _, loss in results) / steps[-1])

    for connection in connections:
        connection.send(None)
    for process in workers:
        process.join()
    warm = job.warm
    return Timing(seconds[warm:], trained[warm:], steps[warm:], losses, {"torch": str(torch.__version__)})


def _shared(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone().share_memory_() for parameter in model.parameters()]


def _start(
    job: Job, weights: list[Tensor], totals: list[list[Tensor]]
) -> tuple[list[Connection], list[multiprocessing.Process]]:
    context = multiprocessing.get_context("spawn")
    connections, workers = [], []
    for total in totals:
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(there, job, weights, total), daemon=True)
        process.start()
        connections.append(here)
        workers.append(process)
    return connections, workers


if __name__ == "__main__":
    serve(measure)
