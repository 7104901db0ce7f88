"""Skews of quantity, of classes and by a column are what they say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from clients import randomness
from clients.errors import RequestError
from fedsim.data import TensorColumns, class_sets, partition
from fedsim.data.partitions import pathological, quantity_skew


def draw(seed: int = 0) -> np.random.Generator:
    return randomness.numpy_generator(seed, "partition")


def mixes(found: Any, y: np.ndarray) -> np.ndarray:
    """Label counts ``[clients, classes]``."""
    owner = np.repeat(np.arange(len(found[1]) - 1), np.diff(found[1]))
    counts = np.zeros((len(found[1]) - 1, y.max() + 1), dtype=int)
    np.add.at(counts, (owner, y[found[0]]), 1)
    return counts


class Named:
    """Columns that may hold strings."""

    def __init__(self, **columns: Any):
        self.columns = columns

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.columns)

    def column(self, name: str) -> Any:
        return self.columns[name]


def test_quantity_skew_has_the_moments_of_dirichlet_shares() -> None:
    """A client's share ~ Beta(alpha, alpha (clients - 1)): mean 1/clients and its variance."""
    clients, alpha = 20, 0.5
    y = np.zeros(100_000, dtype=int)
    shares = np.array([np.diff(quantity_skew(y, clients, draw(seed), alpha=alpha)[1])[0] for seed in range(400)]) / 1e5
    mean = 1 / clients
    variance = mean * (1 - mean) / (clients * alpha + 1)
    assert shares.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / 400))
    assert shares.var() == pytest.approx(variance, rel=0.2)


def test_lognormal_sizes_have_logarithms_of_standard_deviation_alpha() -> None:
    sizes = np.diff(quantity_skew(np.zeros(2_000_000), 2000, draw(), alpha=0.7, law="lognormal")[1])
    logarithms = np.log(sizes)
    assert logarithms.std() == pytest.approx(0.7, rel=0.05)
    skewness = (((logarithms - logarithms.mean()) / logarithms.std()) ** 3).mean()
    assert abs(skewness) < 4 * np.sqrt(6 / 2000)


def test_power_sizes_fall_with_the_rank_to_the_power_of_alpha() -> None:
    sizes = np.diff(quantity_skew(np.zeros(1_000_000), 50, draw(), alpha=1.5, law="power")[1])
    ranks = np.arange(1, 51)
    assert np.sort(sizes)[::-1] == pytest.approx(1e6 * ranks**-1.5 / (ranks**-1.5).sum(), abs=1)
    assert not np.array_equal(np.sort(sizes)[::-1], sizes)  # the first client is not the largest


def test_quantity_skew_leaves_labels_as_they_are() -> None:
    y = np.arange(200_000) % 10
    counts = mixes(quantity_skew(y, 10, draw(), alpha=1.0, min_examples=2000), y)
    sizes = counts.sum(axis=1)
    assert sizes.max() > 2 * sizes.min()
    assert counts / sizes[:, None] == pytest.approx(0.1, abs=5 * np.sqrt(0.09 / 2000))


@given(
    examples=some.integers(1, 300),
    clients=some.integers(1, 60),
    least=some.integers(1, 5),
    law=some.sampled_from([("dirichlet", 1e-3), ("dirichlet", 50.0), ("lognormal", 900.0), ("power", 700.0)]),
    seed=some.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_quantity_skew_keeps_min_examples_by_lowering_the_largest_alone(
    examples: int, clients: int, least: int, law: tuple[Any, float], seed: int
) -> None:
    y = np.zeros(examples)
    if examples < clients * least:
        with pytest.raises(RequestError, match=r"data\.(clients|partition\.min_examples)"):
            quantity_skew(y, clients, draw(seed), min_examples=least)
        return
    order, offsets = quantity_skew(y, clients, draw(seed), alpha=law[1], law=law[0], min_examples=least)
    assert np.array_equal(np.sort(order), np.arange(examples))
    assert np.diff(offsets).min() >= least


@given(
    classes=some.integers(1, 12),
    clients=some.integers(1, 40),
    each=some.integers(1, 13),
    least=some.integers(1, 40),
    seed=some.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_pathological_deals_exactly_so_many_classes_or_says_why_not(
    classes: int, clients: int, each: int, least: int, seed: int
) -> None:
    totals = np.random.default_rng(seed).integers(least, least + 20, classes)
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), totals))
    base, extra = divmod(clients * each, classes)
    fits = (np.sort(totals)[::-1] >= base + (np.arange(classes) < extra)).all()
    if each > classes or clients * each < classes or clients > len(y) or not fits:
        with pytest.raises(RequestError, match=r"data\.(clients|partition\.classes_per_client): "):
            pathological(y, clients, draw(seed), classes_per_client=each)
        return
    found = pathological(y, clients, draw(seed), classes_per_client=each)
    counts = mixes(found, y)
    assert np.array_equal(np.sort(found.order), np.arange(len(y)))
    assert set((counts > 0).sum(axis=1)) == {each}
    sharing = (counts > 0).sum(axis=0)
    assert sharing.min() >= 1
    assert np.ptp(sharing) <= 1
    for column in counts.T:
        assert np.ptp(column[column > 0]) <= 1


def test_pathological_sets_are_as_likely_as_each_other() -> None:
    """Of the 10 pairs of 5 classes none comes more often than chance has it (chi-squared, 9 degrees of freedom)."""
    times = np.zeros((5, 5))
    for seed in range(40):
        sets = np.sort(class_sets.deal(np.full(5, 20), 50, draw(seed)), axis=1)
        np.add.at(times, (sets[:, 0], sets[:, 1]), 1)
    seen = times[np.triu_indices(5, 1)]
    assert seen.sum() == 2000
    assert ((seen - 200) ** 2 / 200).sum() < 27.9  # p = 0.001; pairs that are dealt in rows give thousands
    assert len({tuple(class_sets.deal(np.full(5, 20), 50, draw(seed))[0]) for seed in range(40)}) > 8


def test_natural_goes_by_a_column_of_integers_or_strings() -> None:
    hospital = np.array([70, 5, 70, 9, 5, 70])
    speaker = np.array(["di", "al", "di", "bo", "al", "di"])
    y = np.zeros(6, dtype=int)
    for values in (torch.from_numpy(hospital), hospital.astype(np.uint8), speaker, speaker.astype(object)):
        order, offsets = partition("natural", y, 100, 0, by="who", ids=np.arange(6), columns=Named(y=y, who=values))
        assert [order[a:b].tolist() for a, b in pairwise(offsets)] == [[1, 4], [3], [0, 2, 5]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros(6), r"column 'who' is float64 \[6\]; give one of an integer or string"),
        (np.zeros((6, 2), dtype=int), r"column 'who' is int64 \[6, 2\]"),
        (np.array(["a", "b", None, "a", "b", "c"], dtype=object), "column 'who' has no value at example 2"),
        (
            np.array(["a", 1, "a", 2, "b", "c"], dtype=object),
            "column 'who' has values of int, str; give integers alone",
        ),
        (np.array([0.5, 1.5] * 3, dtype=object), "column 'who' has values of float"),
        (None, "the source has no column 'who'; it has y, whose; did you mean 'whose'"),
    ],
)
def test_a_column_that_names_no_clients_is_refused(values: Any, said: str) -> None:
    columns = {"y": np.zeros(6), "whose": np.zeros(6)} if values is None else {"who": values}
    with pytest.raises(RequestError, match=rf"data\.partition\.by: {said}"):
        partition("natural", np.zeros(6, dtype=int), 3, 0, by="who", columns=Named(**columns))


def test_natural_by_a_column_needs_columns() -> None:
    with pytest.raises(RequestError, match=r"data\.partition\.by: the source has no column 'who'; none are at hand"):
        partition("natural", np.zeros(6, dtype=int), 3, 0, by="who")


def test_a_partition_of_ones_own_may_ask_for_the_columns() -> None:
    def by_half(labels: np.ndarray, clients: int, columns: Any, generator: np.random.Generator) -> Any:
        above = columns.column("v").numpy() > 0.5
        return np.argsort(above, kind="stable"), np.array([0, (~above).sum(), len(above)])

    columns = TensorColumns({"v": torch.tensor([0.9, 0.1, 0.8, 0.2])})
    order, offsets = partition(by_half, np.zeros(4), 2, 0, columns=columns)
    assert [order[a:b].tolist() for a, b in pairwise(offsets)] == [[1, 3], [0, 2]]
