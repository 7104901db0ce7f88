"""flwr-datasets' Partitioners serve as partitions, and ours has the distribution of theirs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from clients.errors import RequestError
from fedsim.data import TensorColumns, dirichlet, foreign, partition
from fedsim.data.dealing import Partition

pytest.importorskip("flwr_datasets")

DIRICHLET = "flwr_datasets.partitioner:DirichletPartitioner"
Y = np.random.default_rng(0).integers(0, 5, 300)
COLUMNS = TensorColumns(
    {"x": torch.rand(300, 4), "label": torch.from_numpy(Y), "age": torch.from_numpy(np.arange(300) % 90)}
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def dealt(name: Any, experiment_seed: int = 0, **settings: Any) -> Partition:
    given = {"name": name, **settings} if settings else name
    return partition(given, Y, 100, experiment_seed, ids=np.arange(300) // 100, columns=COLUMNS)


def same(first: Partition, second: Partition) -> bool:
    return np.array_equal(first.order, second.order) and np.array_equal(first.offsets, second.offsets)


@pytest.mark.parametrize(
    ("name", "settings", "clients"),
    [
        ("DirichletPartitioner", {"num_partitions": 7, "partition_by": "label", "alpha": 0.5}, 7),
        ("IidPartitioner", {"num_partitions": 7}, 7),
        ("LinearPartitioner", {"num_partitions": 4}, 4),
        ("NaturalIdPartitioner", {"partition_by": "age"}, 90),
        ("NaturalIdPartitioner", {"partition_by": "client"}, 3),
        ("SizePartitioner", {"partition_sizes": [100, 200]}, 2),
        ("ContinuousPartitioner", {"num_partitions": 6, "partition_by": "age", "strictness": 1.0}, 6),
    ],
)
def test_a_partitioner_has_its_own_number_of_clients(name: str, settings: dict[str, Any], clients: int) -> None:
    found = dealt(f"flwr_datasets.partitioner:{name}", **settings)
    assert np.array_equal(np.sort(found.order), np.arange(300))
    assert len(found.offsets) == clients + 1
    assert same(found, dealt(f"flwr_datasets.partitioner:{name}", **settings))
    assert not same(found, dealt(f"flwr_datasets.partitioner:{name}", experiment_seed=1, **settings))


def test_positions_are_those_of_the_source() -> None:
    found = dealt("flwr_datasets.partitioner:NaturalIdPartitioner", partition_by="client")
    for client in range(3):
        held = found.order[found.offsets[client] : found.offsets[client + 1]]
        assert set(held // 100) == {client}


def test_a_partitioner_that_is_given_as_an_object_stays_as_it_is() -> None:
    from flwr_datasets.partitioner import DirichletPartitioner

    given = DirichletPartitioner(7, "label", 0.5)
    first = dealt(given)
    assert not given.is_dataset_assigned()
    assert same(first, dealt(given))
    assert not same(first, dealt(given, experiment_seed=1))


def test_a_named_partitioner_draws_by_the_experiments_seed_unless_it_has_its_own() -> None:
    """Sizes come of the partitioner's draws alone, whatever the order of rows."""
    settings = {"num_partitions": 7, "partition_by": "label", "alpha": 0.5}

    def sizes(experiment_seed: int, **more: Any) -> list[int]:
        return np.diff(dealt(DIRICHLET, experiment_seed, **settings, **more).offsets).tolist()

    assert sizes(3) == sizes(0, seed=3) == sizes(1, seed=3)
    assert sizes(3) != sizes(4)


def test_columns_may_be_left_out() -> None:
    named = {"name": DIRICHLET, "num_partitions": 7, "partition_by": "y", "alpha": 0.5}
    assert len(partition(named, Y, 100, 0).offsets) == 8


def test_columns_of_strings_serve_too() -> None:
    class Named:
        names = ("hospital",)

        def column(self, name: str) -> np.ndarray:
            return np.array(["mercy", "grace", "mercy"])

    named = {"name": "flwr_datasets.partitioner:NaturalIdPartitioner", "partition_by": "hospital"}
    order, offsets = partition(named, np.empty((3, 0)), 100, 0, columns=Named())
    assert offsets.tolist() == [0, 1, 3]
    assert order[0] == 1


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "DirichletPartitioner",
            {"num_partitions": 7, "partition_by": "lable", "alpha": 0.5},
            "DirichletPartitioner asks for the column 'lable'; those of one value an example are label, age, client; "
            "did you mean 'label'",
        ),
        ("NaturalIdPartitioner", {"partition_by": "x"}, "asks for the column 'x'; those of one value an example"),
        ("DirichletPartitioner", {"num_partitions": 7, "partition_by": "label", "alpha": -1.0}, "Alpha values should"),
        (
            "DirichletPartitioner",
            {"num_partitions": 700, "partition_by": "label", "alpha": 1.0},
            "number of partitions",
        ),
        ("DirichletPartitioner", {"num_partition": 7}, "num_partition: unknown key.*did you mean 'num_partitions'"),
        ("SizePartitioner", {"partition_sizes": [100, 199]}, r"SizePartitioner gave example \d+ to 0 clients"),
        ("VerticalEvenPartitioner", {"num_partitions": 2}, "VerticalEvenPartitioner deals out columns"),
    ],
)
def test_what_a_partitioner_cannot_do_is_said(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=rf"^data\.partition.*{said}"):
        dealt(f"flwr_datasets.partitioner:{name}", **settings)


def test_a_partitioner_that_doubles_examples_is_refused() -> None:
    class Doubling:
        num_partitions = 2

        def load_partition(self, part: int) -> Any:
            return self.dataset  # type: ignore[attr-defined]

    with pytest.raises(RequestError, match=r"data\.partition: .*Doubling gave example 0 to 2 clients; each has one"):
        dealt(Doubling())


def test_a_partitioner_with_a_data_set_is_refused() -> None:
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    given = IidPartitioner(2)
    given.dataset = Dataset.from_dict({"y": [1, 2]})
    with pytest.raises(RequestError, match=r"data\.partition: this IidPartitioner has a data set already"):
        dealt(given)


def test_without_flwr_datasets_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr_datasets.partitioner import IidPartitioner

    install = r'needs flwr-datasets, which is not installed; pip install "fedsim\[datasets\]"'
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=rf"data\.partition: IidPartitioner {install}"):
        dealt(IidPartitioner(2))
    monkeypatch.setattr(foreign, "_installed", lambda: False)
    with pytest.raises(RequestError, match=rf"data\.partition: {DIRICHLET} {install}"):
        dealt(DIRICHLET)


CLIENTS = 10
SEEDS = range(150)
LABELS = np.random.default_rng(1).integers(0, 10, 1000)


def told(mix: Callable[[int], np.ndarray]) -> np.ndarray:
    """Size, largest class's share and number of classes of every client of every seed, from its label counts.

    Clients of one seed share a sum, so that sizes come out a little more alike than independent draws would be.
    """
    mixes = np.concatenate([mix(seed) for seed in SEEDS])
    sizes = mixes.sum(axis=1)
    return np.array([sizes, mixes.max(axis=1) / sizes, (mixes > 0).sum(axis=1)])


def ours(alpha: float, variant: Any) -> np.ndarray:
    def mix(seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        order, offsets = dirichlet(LABELS, CLIENTS, generator, alpha=alpha, variant=variant, min_examples=5)
        return np.array([np.bincount(LABELS[order[a:b]], minlength=10) for a, b in pairwise(offsets)])

    return told(mix)


@pytest.fixture(scope="module")
def theirs() -> np.ndarray:
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    whole = Dataset.from_dict({"y": LABELS})

    def mix(seed: int) -> np.ndarray:
        drawn = DirichletPartitioner(CLIENTS, "y", 0.5, min_partition_size=5, self_balancing=False, seed=10_000 + seed)
        drawn.dataset = whole
        parts = [drawn.load_partition(client)["y"][:] for client in range(CLIENTS)]
        return np.array([np.bincount(part, minlength=10) for part in parts])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return told(mix)


def test_dirichlet_per_class_has_the_distribution_of_flowers_partitioner(theirs: np.ndarray) -> None:
    """Kolmogorov and Smirnov's two-sample test of clients' sizes, largest class shares and numbers of classes."""
    for mine, other in zip(ours(0.5, "per_class"), theirs, strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 0.01


@pytest.mark.parametrize(("alpha", "variant"), [(1.0, "per_class"), (0.25, "per_class"), (0.5, "per_client")])
def test_another_alpha_or_variant_is_told_apart(theirs: np.ndarray, alpha: float, variant: str) -> None:
    for mine, other in zip(ours(alpha, variant), theirs, strict=True):
        assert stats.ks_2samp(mine, other).pvalue < 0.01
