"""Every example has one owner; partitions are what their papers say, keyed, and cheap for a million clients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as some_given
from hypothesis import settings
from hypothesis import strategies as some

from clients import randomness
from clients.errors import RequestError
from fedsim.data import Partition, TensorColumns, dirichlet, dirichlet_shares, iid, partition, partitions, shards

NAMES: list[tuple[str, dict[str, Any]]] = [
    ("iid", {}),
    ("dirichlet", {}),
    ("dirichlet", {"alpha": 0.05}),
    ("dirichlet", {"alpha": 100.0, "min_examples": 3}),
    ("dirichlet", {"variant": "per_client"}),
    ("shards", {}),
    ("pathological", {}),
    ("quantity_skew", {}),
    ("quantity_skew", {"alpha": 0.05, "min_examples": 3}),
    ("quantity_skew", {"alpha": 2.0, "law": "lognormal"}),
    ("quantity_skew", {"alpha": 2.0, "law": "power"}),
    ("feature_shift", {"amount": 0.1}),
    ("natural", {}),
    ("natural", {"by": "hospital"}),
]


def draw(seed: int = 0) -> np.random.Generator:
    return randomness.numpy_generator(seed, "partition")


def labels(examples: int, classes: int = 10) -> np.ndarray:
    return np.random.default_rng(examples).integers(0, classes, examples)


def sizes(found: Any) -> np.ndarray:
    return np.diff(found[1])


#: Examples, clients and classes that every partition here can deal.
shapes = some.tuples(some.integers(0, 300), some.integers(3, 40), some.integers(2, 6)).map(
    lambda drawn: (drawn[0] + 4 * drawn[1] + 2 * drawn[2], drawn[1], drawn[2])
)


def mixes(found: Any, y: np.ndarray) -> np.ndarray:
    """Label counts ``[clients, classes]``."""
    owner = np.repeat(np.arange(len(found[1]) - 1), sizes(found))
    counts = np.zeros((len(found[1]) - 1, y.max() + 1), dtype=int)
    np.add.at(counts, (owner, y[found[0]]), 1)
    return counts


@pytest.mark.parametrize(("name", "given"), NAMES)
@some_given(shape=shapes, seed=some.integers(0, 2**40))
@settings(max_examples=8, deadline=None)
def test_every_example_has_one_owner_and_a_partition_follows_from_the_seed(
    name: str, given: dict[str, Any], shape: tuple[int, int, int], seed: int
) -> None:
    examples, clients, classes = shape
    y = np.random.default_rng(seed).permutation(np.arange(examples) % classes)
    of = np.random.default_rng(examples).integers(0, clients, examples)
    here: dict[str, Any] = {"ids": of, "columns": TensorColumns({"hospital": torch.from_numpy(of)}), **given}
    first, again, other = (partition(name, y, clients, drawn, **here) for drawn in (seed, seed, seed + 1))
    order, offsets = first
    assert order.dtype == offsets.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(examples))
    assert offsets[0] == 0
    assert offsets[-1] == examples
    assert np.diff(offsets).min() >= given.get("min_examples", 1)
    assert len(offsets) == (len(np.unique(of)) if name == "natural" else clients) + 1
    assert np.array_equal(order, again[0])
    assert np.array_equal(offsets, again[1])
    assert np.array_equal(order, other[0]) == (name == "natural")


def test_iid_sizes_differ_by_at_most_one() -> None:
    found = iid(labels(1318), 100, draw())
    assert set(sizes(found)) == {13, 14}


def test_dirichlet_shares_have_the_moments_of_their_distribution() -> None:
    """A client's share of a class ~ Beta(alpha, alpha (clients - 1)): mean 1/clients and its variance, both checked."""
    y, clients, alpha = labels(200_000, 400), 10, 0.5
    counts = mixes(dirichlet(y, clients, draw(), alpha=alpha), y)
    shares = counts / counts.sum(axis=0)
    mean = 1 / clients
    variance = mean * (1 - mean) / (clients * alpha + 1)
    assert shares.mean(axis=1) == pytest.approx(mean, abs=4 * np.sqrt(variance / 400))
    assert shares.var() == pytest.approx(variance, rel=0.1)


def test_dirichlet_per_client_has_equal_sizes_and_mixes_of_its_distribution() -> None:
    y, clients, alpha = np.arange(200_000) % 10, 1000, 0.5
    found = dirichlet(y, clients, draw(), alpha=alpha, variant="per_client")
    assert set(sizes(found)) == {200}
    shares = mixes(found, y) / 200
    variance = 0.1 * 0.9 / (10 * alpha + 1)
    assert shares.var() == pytest.approx(variance + (0.09 - variance) / 200, rel=0.1)


def test_dirichlet_per_client_takes_unequal_classes_as_they_are() -> None:
    y = np.repeat([0, 1, 2], [900, 90, 10])
    counts = mixes(dirichlet(y, 50, draw(), alpha=1000.0, variant="per_client"), y)
    assert counts.sum(axis=1).tolist() == [20] * 50
    assert counts[:, 0] == pytest.approx(18, abs=6)


def test_a_smaller_alpha_is_more_skewed() -> None:
    y = labels(5000)
    for variant in ("per_class", "per_client"):
        largest = [
            (counts.max(axis=1) / counts.sum(axis=1)).mean()
            for counts in (
                mixes(partition("dirichlet", y, 50, 0, alpha=a, variant=variant), y) for a in (0.1, 1.0, 100.0)
            )
        ]
        assert largest[0] - 0.15 > largest[1] > largest[2] + 0.1


def test_dirichlet_draws_anew_before_it_moves_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    class MovedError(Exception):
        pass

    def moves(*_: Any) -> None:
        raise MovedError

    y = labels(1318)
    monkeypatch.setattr(dirichlet_shares, "_mend", moves)
    for seed in range(5):
        found = dirichlet(y, 100, draw(seed))
        assert sizes(found).min() >= 1
        assert sizes(found).max() > 26  # twice the mean: unequal as Dirichlet shares are
    monkeypatch.setattr(dirichlet_shares, "_TRIES", 1)
    with pytest.raises(MovedError):  # a single draw often leaves a client without
        list(map(dirichlet, [y] * 5, [100] * 5, map(draw, range(5))))


@pytest.mark.parametrize("least", [1, 5, 13])
def test_dirichlet_keeps_min_examples_where_no_draw_would(least: int) -> None:
    y = labels(1318)
    found = dirichlet(y, 100, draw(), alpha=0.01, min_examples=least)
    assert sizes(found).min() >= least
    assert np.array_equal(np.sort(found.order), np.arange(1318))


@some_given(
    examples=some.integers(1, 200), clients=some.integers(1, 60), least=some.integers(1, 4), seed=some.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_dirichlet_holds_whatever_the_sizes(examples: int, clients: int, least: int, seed: int) -> None:
    y = labels(examples, 3)
    if examples < clients * least:
        with pytest.raises(RequestError, match=r"data\.(clients|partition\.min_examples)"):
            dirichlet(y, clients, draw(seed), alpha=0.1, min_examples=least)
        return
    found = dirichlet(y, clients, draw(seed), alpha=0.02, min_examples=least)
    assert np.array_equal(np.sort(found.order), np.arange(examples))
    assert sizes(found).min() >= least


def test_shards_give_a_client_as_many_labels_as_shards() -> None:
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))
    for per_client in (1, 2, 3):
        found = shards(y, 100, draw(), per_client=per_client)
        kinds = (mixes(found, y) > 0).sum(axis=1)
        assert set(sizes(found)) == {60}
        assert kinds.max() <= per_client + 1  # a shard may lie across two labels
        assert kinds.mean() > 0.85 * per_client


def test_natural_keeps_the_sources_clients() -> None:
    ids = np.array([70, 5, 70, 9, 5, 70])
    order, offsets = partition("natural", np.zeros(6, dtype=int), 100, 0, ids=ids)
    assert [order[a:b].tolist() for a, b in pairwise(offsets)] == [[1, 4], [3], [0, 2, 5]]


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("iid", {"clients": 61}, r"data\.clients: 61 clients but only 60 examples"),
        ("dirichlet", {"clients": 61}, r"data\.clients: 61 clients but only 60 examples"),
        ("dirichlet", {"min_examples": 7}, r"data\.partition\.min_examples: 7 for each of 10 clients are 70"),
        ("dirichlet", {"alpha": 0}, r"data\.partition\.alpha"),
        ("dirichlet", {"alpha": -1.0}, r"data\.partition\.alpha"),
        ("dirichlet", {"alpha": "x"}, r"data\.partition\.alpha"),
        ("dirichlet", {"variant": "per_clas"}, r"data\.partition\.variant.*per_class"),
        ("dirichlet", {"alhpa": 1}, r"data\.partition\.alhpa.*alpha"),
        ("shards", {"per_client": 7}, r"data\.partition\.per_client: 7 shards for each of 10 clients are 70"),
        ("shards", {"per_client": 0}, r"data\.partition\.per_client"),
        ("shards", {"clients": 61}, r"data\.clients: 61 clients but only 60 examples"),
        ("natural", {}, r"data\.partition: natural needs a source that says whose"),
        ("natural", {"by": 3}, r"data\.partition\.by"),
        ("quantity_skew", {"clients": 61}, r"data\.clients: 61 clients but only 60 examples"),
        ("quantity_skew", {"clients": 0}, r"data\.clients: 0 given"),
        ("quantity_skew", {"min_examples": 7}, r"data\.partition\.min_examples: 7 for each of 10 clients are 70"),
        ("quantity_skew", {"alpha": -1.0}, r"data\.partition\.alpha"),
        ("quantity_skew", {"law": "powr"}, r"data\.partition\.law.*power"),
        ("pathological", {"clients": 61}, r"data\.clients: 61 clients but only 60 examples"),
        ("pathological", {"classes_per_client": 11}, r"classes_per_client: 11 asked for, but the labels are of 10"),
        (
            "pathological",
            {"clients": 4},
            r"classes_per_client: 2 for each of 4 clients are 8, but there are 10 classes",
        ),
        (
            "pathological",
            {"classes_per_client": 10},
            r"classes_per_client: class \d has \d examples and would be shared",
        ),
        ("feature_shift", {}, r"data\.partition\.amount: missing"),
        ("feature_shift", {"amount": 0.0}, r"data\.partition\.amount"),
        ("feature_shift", {"amount": 0.1, "kind": "nois"}, r"data\.partition\.kind.*noise"),
        ("feature_shift", {"amount": 181.0, "kind": "rotation"}, r"data\.partition\.amount: 181 degrees"),
        ("feature_shift", {"amount": 1.0, "kind": "brightness"}, r"data\.partition\.amount: 1 would"),
        ("dirichelt", {}, r"data\.partition.*dirichelt.*dirichlet"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_name(name: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        partition(name, labels(60), given.pop("clients", 10), 0, **given)


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "pathological", "quantity_skew"])
def test_there_must_be_an_example(name: str) -> None:
    with pytest.raises(RequestError, match=r"data\.source: no example is left for the clients"):
        partition(name, np.empty(0, dtype=int), 1, 0)


@pytest.mark.parametrize("name", ["dirichlet", "quantity_skew", "feature_shift"])
def test_a_function_called_by_itself_refuses_what_is_not_positive(name: str) -> None:
    setting = "amount" if name == "feature_shift" else "alpha"
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(RequestError, match=rf"data\.partition\.{setting}: "):
            getattr(partitions, name)(labels(60), 10, draw(), **{setting: bad})


@pytest.mark.parametrize("name", ["dirichlet", "shards", "pathological"])
def test_partitions_by_label_need_one_class_an_example(name: str) -> None:
    for bad in (np.zeros(60), np.zeros((60, 2), dtype=int), np.empty((60, 0))):
        with pytest.raises(RequestError, match=rf"data\.partition: {name} goes by labels"):
            partition(name, bad, 10, 0)
    for free, given in (("iid", {}), ("quantity_skew", {}), ("feature_shift", {"amount": 0.1})):
        assert len(partition(free, np.empty((60, 0)), 10, 0, **given)[0]) == 60


def odd_and_even(labels: np.ndarray, clients: int, generator: np.random.Generator, *, first: int = 0) -> Partition:
    """A partition of one's own: two clients."""
    owner = (np.arange(len(labels)) + first) % 2
    return Partition(np.argsort(owner, kind="stable"), np.array([0, np.sum(owner == 0), len(labels)]))


def test_a_function_of_ones_own_is_a_partition() -> None:
    order, offsets = partition(odd_and_even, np.zeros(5), 2, 0, first=1)
    assert [order[: offsets[1]].tolist(), order[offsets[1] :].tolist()] == [[1, 3], [0, 2, 4]]


@pytest.mark.parametrize(
    ("order", "offsets", "said"),
    [
        ([0, 1, 1], [0, 1, 3], "example 1 to 2 clients"),
        ([0, 1], [0, 1, 2], "example 2 to 0 clients"),
        ([0, 1, 3], [0, 1, 3], r"outside 0\.\.2"),
        ([0, 1, 2], [0, 2, 2], "offsets that do not rise from 0 to 3"),
        ([0, 1, 2], [0, 2, 1, 3], "offsets that do not rise"),
        (None, [0, 3], r"not \(order, offsets\)"),
    ],
)
def test_a_partition_that_loses_or_repeats_examples_is_refused(order: Any, offsets: Any, said: str) -> None:
    def own(labels: np.ndarray, clients: int, generator: np.random.Generator) -> Any:
        return None if order is None else (np.array(order), np.array(offsets))

    with pytest.raises(RequestError, match=rf"data\.partition.*{said}"):
        partition(own, np.zeros(3), 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given"), NAMES)
def test_a_million_clients_hold_every_example_once(name: str, given: dict[str, Any]) -> None:
    clients, examples = 1_000_000, 3_000_000
    y = labels(examples)
    ids = np.random.default_rng(1).permutation(examples) % clients
    columns = TensorColumns({"hospital": torch.from_numpy(ids)})
    order, offsets = partition(name, y, clients, 0, ids=ids, columns=columns, **given)
    assert np.array_equal(np.bincount(order), np.ones(examples))
    assert order.nbytes + offsets.nbytes < 33e6
    assert len(offsets) == clients + 1
    assert np.diff(offsets).min() >= given.get("min_examples", 1)


@pytest.mark.parametrize("make", [list, torch.from_numpy, np.asarray])
def test_labels_and_ids_may_be_lists_and_tensors(make: Any) -> None:
    y = labels(60)
    for name, given in (("dirichlet", {}), ("natural", {"ids": np.arange(60) % 4})):
        found = partition(name, make(y), 4, 0, **{key: make(value) for key, value in given.items()})
        expected = partition(name, y, 4, 0, **given)
        assert np.array_equal(found.order, expected.order)
        assert np.array_equal(found.offsets, expected.offsets)
    with pytest.raises(RequestError, match=r"data\.partition: ragged labels given"):
        partition("iid", [[1], [2, 3]], 2, 0)


@pytest.mark.parametrize("clients", [0, -3, 2.5, True, "3", None])
def test_clients_are_a_whole_number(clients: Any) -> None:
    with pytest.raises(RequestError, match=r"data\.clients: .* given; give a whole number of at least 1"):
        partition("iid", labels(60), clients, 0)


@pytest.mark.parametrize(
    ("name", "given"),
    [("quantity_skew", {"law": "dirichlet"}), ("dirichlet", {"variant": "per_client"}), ("dirichlet", {})],
)
def test_an_alpha_without_bounds_is_even(name: str, given: dict[str, Any]) -> None:
    with np.errstate(all="raise"):
        sizes = np.diff(partition(name, labels(600), 6, 0, alpha=1e308, **given).offsets)
    assert abs(sizes - 100).max() <= 10  # ten classes, each rounded


def test_lognormal_sizes_of_an_alpha_without_bounds_do_not_overflow() -> None:
    with np.errstate(over="raise", invalid="raise"):
        sizes = np.diff(partition("quantity_skew", labels(60), 6, 0, alpha=1e308, law="lognormal").offsets)
    assert sorted(sizes.tolist()) == [1, 1, 1, 1, 1, 55]
