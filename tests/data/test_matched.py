"""Matched client tests: the server's examples, by the label mix of each client, drawn for each client alone."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from clients.errors import RequestError
from clients.parts import Part
from fedsim.data import CSR, Source, build
from fedsim.data.matched import draws, matched_tests, wishes
from fedsim.experiment import DataSettings


def clients_of(*counts: list[int]) -> tuple[CSR, np.ndarray]:
    """Clients with those label counts, and the labels of their examples."""
    labels = np.concatenate([np.repeat(np.arange(len(client)), client) for client in counts])
    offsets = np.concatenate([[0], np.cumsum([sum(client) for client in counts])])
    return CSR(np.arange(len(labels)), offsets), labels


@pytest.mark.parametrize(
    ("counts", "fraction", "expected"),
    [
        ([10, 0, 20], 0.1, [1, 0, 2]),
        ([7, 7, 7], 0.3, [2, 2, 2]),  # 6.3 in all are 6; 2.1 each
        ([3, 3, 9], 0.5, [2, 2, 4]),  # 7.5 are 8 (to even); of 1.5, 1.5 and 4.5 the lower classes are rounded up
        ([4, 1, 0], 0.5, [2, 0, 0]),  # 2.5 are 2 (to even): 2.0 and 0.5
        ([0, 0, 3], 0.1, [0, 0, 1]),  # 0.3 are none, but at least one
        ([0, 0, 0], 0.5, [0, 0, 0]),
        ([10, 10, 10], 0.7, [7, 7, 7]),  # which binary fractions just miss
    ],
)
def test_a_client_wants_its_share_of_each_class_by_largest_remainders(
    counts: list[int], fraction: float, expected: list[int]
) -> None:
    assert wishes(np.array([counts]), fraction).tolist() == [expected]


@given(
    counts=some.lists(some.lists(some.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=5),
    fraction=some.floats(0.01, 0.99),
)
@settings(max_examples=100, deadline=None)
def test_wishes_add_up_and_are_never_one_off_nor_of_a_class_that_is_not_there(
    counts: list[list[int]], fraction: float
) -> None:
    table = np.array(counts)
    wanted = wishes(table, fraction)
    sizes = table.sum(1)
    assert wanted.sum(1).tolist() == np.where(sizes > 0, np.maximum(np.rint(fraction * sizes), 1), 0).tolist()
    assert (np.abs(wanted - fraction * table) < 1 + 1e-6).all()
    assert (wanted[table == 0] == 0).all()


@given(totals=some.lists(some.integers(0, 60), min_size=3, max_size=3), seed=some.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_client_gets_its_wishes_without_repeats_as_far_as_the_test_split_has_them(
    totals: list[int], seed: int
) -> None:
    train, labels = clients_of([40, 20, 0], [0, 0, 9], [0, 0, 0], [200, 1, 1])
    tests = np.random.default_rng(seed).permutation(np.repeat(np.arange(3), totals))
    wanted = np.minimum(wishes(train.label_table(labels, 3, np.arange(4)), 0.5), totals)
    if not wanted.any():
        return
    found = matched_tests(train, labels, tests, 3, 0.5, seed)
    assert found.label_table(tests, 3, np.arange(4)).tolist() == wanted.tolist()
    for client in range(4):
        held = found.of(client)
        assert np.array_equal(held, np.unique(held))  # ascending, and no example twice


@pytest.mark.parametrize(("count", "total"), [(1, 2), (2, 3), (3, 80), (30, 100), (60, 100), (100, 100)])
def test_every_example_is_as_likely_and_so_is_every_pair(count: int, total: int) -> None:
    clients = 4000
    found = draws(np.arange(clients), np.full(clients, count), total, 0, 0).reshape(clients, count)
    assert all(len(set(row)) == count for row in found.tolist())
    held = np.zeros((clients, total))
    np.put_along_axis(held, found, 1, axis=1)
    share = count / total
    noise = np.sqrt(share * (1 - share) / clients)
    assert np.abs(held.mean(0) - share).max() <= 5 * noise
    if count > 1:
        pairs = share * (count - 1) / (total - 1)
        together = (held[:, :1] * held[:, 1:]).mean(0)
        assert np.abs(together - pairs).max() <= 5 * np.sqrt(pairs * (1 - pairs) / clients) + 1e-12


def test_few_draws_that_are_too_much_alike_become_a_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    real = np.random.default_rng(0).random

    def alike(keys: np.ndarray, size: int, start: int = 0) -> np.ndarray:
        return np.zeros((len(keys), size)) if not start else real((len(keys), size))

    monkeypatch.setattr("fedsim.data.matched.randomness.uniforms", alike)
    found = draws(np.arange(50), np.full(50, 5), 1000, 0, 0).reshape(50, 5)
    assert all(len(set(row)) == 5 for row in found.tolist())


def test_what_a_client_gets_depends_on_no_other_client() -> None:
    rows = [[40, 20, 5], [3, 3, 9], [0, 60, 1]]
    tests = np.arange(600) % 3
    together = matched_tests(*clients_of(*rows), tests, 3, 0.4, 7)
    apart = matched_tests(*clients_of([1, 1, 1], rows[1], [500, 0, 0]), tests, 3, 0.4, 7)
    assert together.of(1).tolist() == apart.of(1).tolist()
    assert together.of(1).tolist() != matched_tests(*clients_of(*rows), tests, 3, 0.4, 8).of(1).tolist()


def test_a_hundred_thousand_clients_take_seconds() -> None:
    clients, classes = 100_000, 10
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 60, clients)
    labels = draw.integers(0, classes, int(sizes.sum()))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tests = draw.integers(0, classes, 10_000)
    start = time.perf_counter()
    found = matched_tests(CSR(np.arange(len(labels)), offsets), labels, tests, classes, 0.2, 0)
    assert time.perf_counter() - start < 10
    assert np.abs(found.sizes - np.maximum(np.rint(0.2 * sizes), 1)).max() == 0


# ---------------------------------------------------------------------------------------------- in an experiment's data


def source(**changes: Any) -> Source:
    position = torch.arange(1500)
    return Source(**{"train": {"x": position[:, None].float(), "y": position % 5}, **changes})


def settings_of(**changes: Any) -> DataSettings:
    partition = Part("dirichlet", {"alpha": 0.3})
    return DataSettings(
        **{"client_test": "matched", "client_test_fraction": 0.2, "clients": 20, "partition": partition, **changes}
    )


def test_clients_train_on_all_that_is_theirs_and_test_on_the_servers() -> None:
    population = build(source(), settings_of(client_validation_fraction=0.1), 0)
    own = build(source(), settings_of(client_test="own"), 0)
    sizes = population.splits["train"].sizes + population.splits["validation"].sizes
    assert sizes.tolist() == (own.splits["train"].sizes + own.splits["test"].sizes).tolist()
    assert population.columns_of("test") is population.server["test"]
    assert population.columns_of("train") is population.columns_of("validation") is population.columns
    assert own.columns_of("test") is own.columns
    everyone = np.arange(20)
    tests, trains = population.label_table("test", everyone), population.label_table("train", everyone)
    assert tests is not None
    assert trains is not None
    assert tests.tolist() == wishes(trains, 0.2).tolist()
    taken = population.columns_of("test").take(torch.from_numpy(population.splits["test"].of(3)))
    assert torch.bincount(taken["y"], minlength=5).tolist() == tests[3].tolist()
    assert not set(taken["x"][:, 0].tolist()) & set(population.columns.column("x")[population.splits["train"].order, 0])


def test_label_tables_count_each_clients_labels_and_no_others() -> None:
    population = build(source(), settings_of(client_test="own"), 0)
    table = population.label_table("train", np.array([7, 2]))
    assert table is not None
    assert table.dtype == np.int64
    for row, client in zip(table, (7, 2), strict=True):
        labels = population.columns.column("y")[population.splits["train"].of(client)]
        assert row.tolist() == torch.bincount(labels, minlength=5).tolist()
    assert population.label_table("validation", np.array([0])) is None
    real = build(Source(train={"x": torch.rand(90, 2), "y": torch.rand(90)}), settings_of(
        client_test="own", partition=Part("iid"), proxy=0), 0)  # fmt: skip
    assert real.label_table("train", np.array([0])) is None


@pytest.mark.parametrize(
    ("changes", "of_source", "said"),
    [
        ({"client_test_fraction": None}, {}, "needs data.client_test_fraction above 0"),
        ({"test_fraction": 0.0}, {}, "draws from the server's test split, and there is none"),
        ({"partition": Part("feature_shift", {"amount": 0.1})}, {}, "no feature shift reaches"),
        (
            {"partition": Part("iid")},
            {"train": {"x": torch.rand(300, 2), "y": torch.rand(300)}},
            "goes by labels in memory, one integer class an example, and column 'y'",
        ),
        (
            {"partition": Part("iid")},
            {"train": {"x": torch.rand(300, 2), "y": torch.zeros(300, 2, dtype=torch.int64)}},
            "goes by labels in memory",
        ),
        ({}, {"test": {"x": torch.rand(3, 1), "y": torch.tensor([7, 8, 9])}}, "finds no example of the clients' class"),
    ],
)
def test_what_cannot_be_matched_is_refused(changes: dict[str, Any], of_source: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=rf'data\.client_test: "matched" .*{said}') as caught:
        build(source(**of_source), settings_of(**changes), 0)
    assert "\n" not in str(caught.value)
