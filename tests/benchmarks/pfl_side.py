"""pfl-research (package ``pfl``), run in its own virtual environment, one process or several joined its own way.

Started with ``PFL_WORKER_ADDRESSES`` and ``PFL_WORKER_RANK`` set, pfl's processes share a cohort and reduce their sums
by ``torch.distributed``; each process runs this module and the first one reports.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version

import numpy as np
import torch
from pfl.aggregate.base import get_num_devices_weight_name
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.common_types import Population
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, distributed, nn
from torch.nn import functional

from tests.benchmarks import plain
from tests.benchmarks.work import BATCH_SIZE, EXAMPLES, LEARNING_RATE, WORKS, Job, Timing, Work, read_data, serve


class Model(nn.Module):
    """The plain model with the two methods that pfl asks for; it also sums the losses and counts the steps."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.net = plain.build(work)
        self.total = torch.zeros(())
        self.steps = 0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a training batch."""
        loss = functional.cross_entropy(self.net(x), y)
        self.total += loss.detach()
        self.steps += 1
        return loss

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Required by pfl, which evaluates in its first iteration only; that one is warm-up."""
        return {"loss": Weighted(functional.cross_entropy(self.net(x), y, reduction="sum").item(), len(y))}


class Clock(TrainingProcessCallback):
    """Notes when each central iteration ends, and what was trained in it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.ends: list[float] = []
        self.clients: list[int] = []
        self.totals: list[list[float]] = []

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Called by pfl once the new weights are in place."""
        self.ends.append(time.perf_counter())
        # Every process is given the number of users of all.
        self.clients.append(int(aggregate_metrics[get_num_devices_weight_name(Population.TRAIN)]))
        self.totals.append([self.model.total.item(), self.model.steps])
        self.model.total.zero_()
        self.model.steps = 0
        return False, Metrics()


def measure(job: Job) -> Timing | None:
    """Time the central iterations of a job; ``None`` from every process but the first."""
    torch.set_num_threads(1)
    np.random.seed(0)  # pfl draws its users and the processes' common seeds from NumPy's global generator
    torch.manual_seed(int(os.environ.get("PFL_WORKER_RANK", "0")))
    work = WORKS[job.work]
    model = Model(work)
    clock = Clock(model)
    data = _federated(work, job)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=job.rounds,
            train_cohort_size=work.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=PyTorchModel(model, torch.optim.SGD, torch.optim.SGD(model.parameters(), lr=1.0)),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH_SIZE
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=EXAMPLES),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    totals = torch.tensor(clock.totals, dtype=torch.float64)
    pytorch_ops.distributed.all_reduce([totals])
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if pytorch_ops.distributed.global_rank > 0:
        return None
    losses = (totals[:, 0] / totals[:, 1]).tolist()
    steps = [int(count) for count in totals[:, 1].tolist()]
    ends, warm = clock.ends, job.warm
    seconds = [end - start for start, end in zip(ends[warm - 1 : -1], ends[warm:], strict=True)]
    versions = {"pfl": version("pfl"), "torch": str(torch.__version__)}
    return Timing(seconds, clock.clients[warm:], steps[warm:], losses, versions)


def _federated(work: Work, job: Job) -> FederatedDataset:
    x, y = (torch.from_numpy(array) for array in read_data(job.data))

    def user(client: int) -> Dataset:
        # pfl's data set iterates in order: shuffle when it is made, once a round, as one epoch needs.
        order = torch.randperm(EXAMPLES)
        return Dataset(raw_data=[x[client][order], y[client][order]], user_id=str(client))

    users = np.random.permutation(work.population).tolist()
    return FederatedDataset(user, MinimizeReuseUserSampler(users))


if __name__ == "__main__":
    serve(measure)
    # Gloo's threads now and then abort the process while it exits, long after the answer is written: skip the exit.
    os._exit(0)
