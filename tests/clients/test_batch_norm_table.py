"""What batch norm judges by decides its accuracy: digits with inputs 0..16, whose scale no layer hides.

The published table is of one network, one split and one draw of each proxy, and says nothing of training. Here: three
Linear(64)-BatchNorm-ReLU layers and a head in torch's initialisation; Adam for 30 epochs in batches of 32, the short
last one of an epoch dropped; learning rate 0.01, by a cosine to 0; 500 test images drawn at random. The means are
compared of 16 networks, each with a split of its own, and 4 draws of proxy and order for each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from clients.normalization import batch_norms, batch_statistics, recalibrate, replace_batch_norm
from clients.randomness import generator, key

pytestmark = pytest.mark.slow

SEEDS, DRAWS = range(16), range(4)

#: Accuracy on 500 test images, by where the statistics come from; worst first.
PUBLISHED = {
    "batches of 50, by class": 0.208,
    "batches of 2": 0.504,
    "recalibrated on 4": 0.546,
    "as made": 0.752,
    "batches of 4": 0.760,
    "momentum 0.1 on 64": 0.826,
    "momentum 0.1 on 256": 0.910,
    "batches of 10": 0.912,
    "recalibrated on 16": 0.954,
    "group norm": 0.962,
    "batches of 50": 0.972,
    "recalibrated on 64": 0.974,
    "recalibrated on 256": 0.980,
    "true": 0.982,
    "batches of 500": 0.984,
}
#: What differs by 0.05 and more between networks or draws, so that one figure says little of the mean.
SCATTERED = {"batches of 50, by class", "recalibrated on 4", "as made", "momentum 0.1 on 64", "momentum 0.1 on 256"}


class Digits:
    """Images ``[1797, 64]`` with values 0..16, 500 of them for testing."""

    def __init__(self, seed: int):
        self.x, self.y = (torch.tensor(values) for values in load_digits(return_X_y=True))
        self.x = self.x.float()
        order = torch.randperm(len(self.x), generator=generator(seed, "split"))
        self.test, self.training = order[:500], order[500:]

    def proxy(self, size: int, draw: int) -> Tensor:
        order = torch.randperm(len(self.training), generator=generator(draw, "proxy"))
        return self.x[self.training[order[:size]]]


def trained(digits: Digits, norm: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "model"))
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(64, 10))
    replace_batch_norm(model, norm)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    for epoch in range(30):
        order = torch.randperm(len(digits.training), generator=generator(seed, "batches", epoch))
        for index in digits.training[order].split(32)[:-1]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(digits.x[index]), digits.y[index]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits, order: Tensor | None = None, batch_size: int = 500) -> float:
    index = digits.test if order is None else digits.test[order]
    outputs = torch.cat([model(digits.x[part]) for part in index.split(batch_size)])
    return float((outputs.argmax(1) == digits.y[index]).float().mean())


@torch.no_grad()
def loss(model: nn.Module, digits: Digits) -> float:
    return float(nn.functional.cross_entropy(model(digits.x[digits.test]), digits.y[digits.test]))


def as_made(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    for norm in batch_norms(made):
        norm.reset_running_stats()
    return made


@torch.no_grad()
def averaged(model: nn.Module, proxy: Tensor) -> nn.Module:
    """What one pass with torch's default momentum of 0.1 leaves: 0.9^batches of it are still mean 0, variance 1."""
    made = as_made(model).train()
    for batch in proxy.split(64):
        made(batch)
    return made.eval()


def figures(seed: int) -> Iterator[tuple[str, float]]:
    digits = Digits(seed)
    model = trained(digits, "batch", seed)
    yield "true", accuracy(model, digits)
    yield "true, loss", loss(model, digits)
    yield "as made", accuracy(as_made(model), digits)
    yield "as made, loss", loss(as_made(model), digits)
    yield "recalibrated on all", accuracy(recalibrate(copy.deepcopy(model), [digits.x[digits.training]]), digits)
    yield "group norm", accuracy(trained(digits, "group", seed), digits)
    for draw in DRAWS:
        for size in (4, 16, 64, 256):
            yield f"recalibrated on {size}", accuracy(recalibrate(model, [digits.proxy(size, draw)]), digits)
        for size in (64, 256):
            yield f"momentum 0.1 on {size}", accuracy(averaged(model, digits.proxy(size, draw)), digits)
        order = torch.randperm(500, generator=generator(draw, "order"))
        by_class = order[torch.argsort(digits.y[digits.test[order]], stable=True)]
        with batch_statistics(model):
            for size in (500, 50, 10, 4, 2):
                yield f"batches of {size}", accuracy(model, digits, order, size)
            yield "batches of 50, by class", accuracy(model, digits, by_class, 50)


@pytest.fixture(scope="module")
def found() -> dict[str, np.ndarray]:
    """Figure -> what every network and draw gave."""
    table: dict[str, list[float]] = {}
    for seed in SEEDS:
        for name, value in figures(seed):
            table.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in table.items()}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in SCATTERED])
def test_a_published_accuracy_is_met_within_three_points(name: str, found: dict[str, np.ndarray]) -> None:
    assert found[name].mean() == pytest.approx(PUBLISHED[name], abs=0.03)


@pytest.mark.parametrize("name", sorted(SCATTERED))
def test_a_published_accuracy_that_scatters_is_an_ordinary_one(name: str, found: dict[str, np.ndarray]) -> None:
    """Within two standard deviations of a single network and draw."""
    assert found[name].std() > 0.03
    assert found[name].mean() == pytest.approx(PUBLISHED[name], abs=2 * found[name].std())


@pytest.mark.parametrize(
    "chain",
    [
        ["recalibrated on 4", "recalibrated on 16", "recalibrated on 64", "recalibrated on 256"],
        ["as made", "momentum 0.1 on 64", "momentum 0.1 on 256", "recalibrated on 16"],
        ["batches of 50, by class", "batches of 2", "batches of 4", "batches of 10", "batches of 50", "batches of 500"],
        [
            "batches of 50, by class",
            "batches of 2",
            "recalibrated on 4",
            "as made",
            "batches of 10",
            "group norm",
            "true",
        ],
    ],
    ids=["more proxy examples", "what remains of mean 0 and variance 1", "larger batches", "ways of judging"],
)
def test_the_published_order_holds(chain: list[str], found: dict[str, np.ndarray]) -> None:
    means = [found[name].mean() for name in chain]
    assert means == sorted(means)
    assert [PUBLISHED[name] for name in chain] == sorted(PUBLISHED[name] for name in chain)


def test_recalibrated_on_the_training_set_is_as_good_as_trained(found: dict[str, np.ndarray]) -> None:
    assert found["recalibrated on all"].mean() == pytest.approx(found["true"].mean(), abs=0.005)


def test_the_loss_tells_more_than_the_accuracy(found: dict[str, np.ndarray]) -> None:
    """Published: 0.052 with true statistics, and 125 times that with the statistics that batch norm is made with."""
    assert found["true, loss"].mean() == pytest.approx(0.052, abs=0.03)
    assert found["as made, loss"].mean() > 100 * found["true, loss"].mean()
