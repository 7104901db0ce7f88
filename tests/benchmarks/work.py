"""What every side does: the work, its data, and the form in which a side reports its timing. Imports NumPy only."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

BATCH_SIZE = 10
EXAMPLES = 50
TEST_EXAMPLES = 500
CLASSES = 10
LEARNING_RATE = 0.1
STEPS = EXAMPLES // BATCH_SIZE


@dataclass(frozen=True)
class Work:
    """One workload: every client takes one epoch of SGD over its 50 examples in batches of 10.

    Attributes:
        name: as on the command line.
        model: ``mlp`` (64-64-10) or ``cnn`` (conv 3x3 to 32, pool, conv 3x3 to 64, pool, 128, 10).
        shape: shape of one input.
        population: number of clients that there are.
        cohort: clients a round.
        warm: rounds before the clock starts.
        timed: rounds under the clock.
        flower: the same two numbers for Flower's simulator, whose rounds are long.
    """

    name: str
    model: str
    shape: tuple[int, ...]
    population: int
    cohort: int
    warm: int
    timed: int
    flower: tuple[int, int]


WORKS = {
    work.name: work
    for work in (
        Work("mlp50", "mlp", (64,), population=1000, cohort=50, warm=10, timed=150, flower=(5, 15)),
        Work("mlp400", "mlp", (64,), population=1000, cohort=400, warm=3, timed=25, flower=(2, 6)),
        Work("conv", "cnn", (3, 32, 32), population=200, cohort=50, warm=3, timed=8, flower=(3, 8)),
    )
}


@dataclass(frozen=True)
class Job:
    """What one side is asked to do, passed to its process as JSON.

    Attributes:
        work: name of the work.
        data: path of the .npz file with ``x`` [N, ...], ``y`` [N], ``clients`` [N], ``x_test`` and ``y_test``.
        processes: processes that train.
        warm: rounds before the clock starts.
        timed: rounds under the clock.
    """

    work: str
    data: str
    processes: int
    warm: int
    timed: int

    @property
    def rounds(self) -> int:
        """All rounds, timed or not."""
        return self.warm + self.timed


@dataclass(frozen=True)
class Timing:
    """What one side reports.

    Attributes:
        seconds: wall-clock seconds of each timed round, from the end of the round before it to its own end.
        clients: clients trained in each timed round.
        steps: local steps taken in each timed round, by all of its clients together.
        losses: mean training loss of each round, the warm ones included.
        versions: package -> version.
    """

    seconds: list[float]
    clients: list[int]
    steps: list[int]
    losses: list[float]
    versions: dict[str, str]

    @property
    def rate(self) -> float:
        """Clients trained per second over all timed rounds."""
        return sum(self.clients) / sum(self.seconds)


def write_data(work: Work, directory: Path) -> Path:
    """Write the fixed random examples of a work, all clients' in one file, and the test split that fedsim asks for.

    A class is a random pattern and an example is its class's pattern in noise, so that training has something to learn
    and a side that does not train shows.
    """
    generator = np.random.default_rng(20240)
    examples = work.population * EXAMPLES
    labels = generator.integers(0, CLASSES, examples + TEST_EXAMPLES)
    # Noise of variance 1, patterns of 3/8 a coordinate.
    patterns = generator.standard_normal((CLASSES, *work.shape), dtype=np.float32)
    if work.model == "cnn":
        # Blocks of 8x8, which small filters and pooling can see.
        patterns = patterns[..., ::8, ::8].repeat(8, axis=-1).repeat(8, axis=-2)
    x = generator.standard_normal((len(labels), *work.shape), dtype=np.float32)
    x += np.float32(0.375) * patterns[labels]
    if work.model == "cnn":
        x *= np.float32(0.25)  # the scale of images in [0, 1]: at 1 the learning rate diverges
    path = directory / f"{work.name}.npz"
    train, test = np.s_[:examples], np.s_[examples:]
    clients = np.repeat(np.arange(work.population), EXAMPLES)
    np.savez(path, x=x[train], y=labels[train], x_test=x[test], y_test=labels[test], clients=clients)
    return path


@lru_cache(maxsize=1)
def read_data(path: str) -> tuple[np.ndarray, np.ndarray]:
    """``x`` [population, 50, ...] and ``y`` [population, 50]; read once a process."""
    with np.load(path) as arrays:
        x, y = arrays["x"], arrays["y"]
    return x.reshape(-1, EXAMPLES, *x.shape[1:]), y.reshape(-1, EXAMPLES)


def cohort(work: Work, number: int) -> np.ndarray:
    """The ids [n] of the clients of a round."""
    return np.random.default_rng([number, work.cohort]).choice(work.population, work.cohort, replace=False)


def serve(measure: Callable[[Job], Timing | None]) -> None:
    """The main function of a side's process: read the job, measure, write the timing (``None`` writes nothing).

    The job and the path of the answer come as arguments; the answer goes to a file because the sides' libraries print.
    """
    job, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    timing = measure(Job(**job))
    if timing is not None:
        answer.write_text(json.dumps(asdict(timing)), encoding="utf-8")
