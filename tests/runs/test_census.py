"""A population is counted right, quickly, and once."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.errors import RunError
from clients.parts import Part
from fedsim.census import Census, census, in_words
from fedsim.runs import RunStore, load
from tests.runs.holding import Holding, skewed
from tests.runs.making import EXPERIMENT, LAYOUT, MANIFEST, commit


def counted(holding: Holding, *args: Any, **settings: Any) -> Census:
    return census(holding, *args, **settings)  # type: ignore[arg-type]


def test_the_figures_of_four_clients() -> None:
    holding = Holding(
        np.array([[6, 0, 0], [2, 2, 2], [0, 0, 0], [0, 0, 8]]),
        {"test": np.array([1, 2, 0, 3])},
        held_out=np.array([3]),
    )
    found = counted(holding, Part("dirichlet", {"alpha": 0.3}), {0: "label_flip", 1: "label_flip"})
    assert found.summary == {
        "clients": 4,
        "examples": 20,
        "test": 6,
        "sizes": {"min": 0, "q1": 0, "median": 6, "q3": 6, "max": 8, "mean": 5.0},
        "empty": 1,
        "held_out": 1,
        "attacks": {"label_flip": 2},
        "server": {"test": 40, "proxy": 12},
        "matched": False,
        "partition": "dirichlet (alpha 0.3)",
        "classes": 3,
        "recorded": 4,
        # All have 0.4, 0.1, 0.5 of the classes: half of .6 + .1 + .5; of |1/3 - .4| + |1/3 - .1| + |1/3 - .5|; of
        # .4 + .1 + .5.
        "labels": {"clients": 3, "mean_classes": 5 / 3, "distance": pytest.approx((0.6 + 7 / 30 + 0.5) / 3)},
    }
    assert found.rows[1] == {
        "client": 1, "train": 6, "validation": None, "test": 2, "held_out": False, "attack": "label_flip",
        "labels": [2, 2, 2],
    }  # fmt: skip
    assert [row["held_out"] for row in found.rows] == [False, False, False, True]


def test_labels_that_are_no_classes() -> None:
    found = counted(Holding(skewed(5), labelled=False))
    assert found.summary["labels"] is found.summary["classes"] is None
    assert all(row["labels"] is None for row in found.rows)
    assert found.summary["examples"] == skewed(5).sum()


@given(st.integers(1, 40), st.integers(1, 8), st.floats(0.05, 5.0), st.integers(0, 1000))
def test_the_distance_is_a_distance(clients: int, classes: int, alpha: float, seed: int) -> None:
    """Between 0 and 1; the same for clients and classes in any order, and for a population laid beside itself."""
    counts = skewed(clients, classes, alpha, seed)
    skew = counted(Holding(counts)).summary["labels"]
    if skew is None:
        assert not counts.sum()
        return
    assert 0 <= skew["distance"] <= 1
    assert 1 <= skew["mean_classes"] <= classes
    draws = np.random.Generator(np.random.Philox(seed))
    mixed = counts[draws.permutation(clients)][:, draws.permutation(classes)]
    for same in (mixed, np.concatenate([counts, counts])):
        again = counted(Holding(same)).summary["labels"]
        assert again["distance"] == pytest.approx(skew["distance"])
        assert again["mean_classes"] == pytest.approx(skew["mean_classes"])


def test_the_distance_at_its_ends() -> None:
    alike = counted(Holding(np.array([[1, 3], [10, 30]]))).summary["labels"]
    apart = counted(Holding(np.eye(1000, dtype=np.int64) * 5)).summary["labels"]
    assert alike["distance"] == 0
    assert apart["distance"] == pytest.approx(1 - 1 / 1000)
    assert apart["mean_classes"] == 1


def test_a_million_clients_are_counted_in_little_time_and_few_rows() -> None:
    counts = np.random.Generator(np.random.Philox(0)).poisson(2, (1_000_000, 3))
    holding = Holding(counts)
    begun = time.perf_counter()
    found = counted(holding, attacks={5: "noise"})
    assert time.perf_counter() - begun < 3
    sizes = counts.sum(1)
    assert found.summary["clients"] == 1_000_000
    assert found.summary["examples"] == sizes.sum()
    assert found.summary["empty"] == (sizes == 0).sum()
    assert found.summary["attacks"] == {"noise": 1}
    assert found.summary["recorded"] == len(found.rows) == len(holding.asked) == 4096
    recorded = np.array([row["train"] for row in found.rows])
    assert (recorded.min(), recorded.max()) == (sizes.min(), sizes.max())
    assert recorded.mean() == pytest.approx(sizes.mean(), rel=0.01)
    ids = [row["client"] for row in found.rows]
    assert ids == sorted(set(ids))
    assert [row["labels"] for row in found.rows] == counts[ids].tolist()
    assert counted(holding).rows == counted(holding).rows


def test_many_classes_leave_room_for_fewer_clients() -> None:
    assert counted(Holding(np.ones((3000, 2000), np.int64))).summary["recorded"] == 500
    vocabulary = Holding(np.ones((20, 20_000), np.int64))
    assert counted(vocabulary).summary["labels"] is None
    assert len(vocabulary.asked) == 0


def test_a_part_in_words() -> None:
    assert in_words(Part("iid")) == in_words("iid") == "iid"
    assert in_words(Part("shards", {"per_client": 2, "x": "y"})) == "shards (per_client 2, x y)"


# ------------------------------------------------------------------------------------------------ in the record


@pytest.fixture
def found() -> Census:
    return counted(Holding(skewed(6, 3), held_out=np.array([2])), "iid", {4: "label_flip \udcff"})


def test_a_census_is_recorded_with_the_run_and_read_again(tmp_path: Path, found: Census) -> None:
    with RunStore.create(tmp_path, EXPERIMENT, MANIFEST, LAYOUT, found) as store:
        assert store.census == found.summary | {"attacks": {"label_flip \udcff": 1}}
        run = load(tmp_path)  # before any round
    assert run.census == store.census
    assert run.holdings() == [row | {"attack": row["attack"] and "label_flip ?"} for row in found.rows]
    assert [row["client"] for row in run.holdings([5, 0])] == [0, 5]
    frame = run.population
    assert frame.columns.tolist() == ["client", "train", "validation", "test", "held_out", "attack", "labels"]
    assert frame["held_out"].dtype == bool
    assert frame["labels"].tolist() == [row["labels"] for row in found.rows]


def test_no_resume_changes_it(tmp_path: Path, found: Census) -> None:
    rows = "SELECT * FROM population"
    with RunStore.create(tmp_path, EXPERIMENT, MANIFEST, LAYOUT, found) as store:
        commit(store, 1, 2)
    with sqlite3.connect(tmp_path / "run.db") as database:
        before = database.execute(rows).fetchall()
    assert len(before) == 6
    for file in (tmp_path / "checkpoints").iterdir():
        file.unlink()
    with RunStore.open(tmp_path) as store:
        assert store.resume() is None  # starts anew
        assert store.census is not None
        commit(store, 1)
    with sqlite3.connect(tmp_path / "run.db") as database:
        assert database.execute(rows).fetchall() == before


def test_a_run_whose_clients_were_not_counted(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, EXPERIMENT, MANIFEST, LAYOUT) as store:
        assert store.census is None
    run = load(tmp_path)
    assert run.census is None
    assert run.holdings() == []
    assert len(run.population) == 0


def test_a_census_that_cannot_be_stored_leaves_no_run(tmp_path: Path, found: Census) -> None:
    twice = Census(found.summary, found.rows * 2)
    with pytest.raises(RunError, match=r"creating run\.db failed: UNIQUE"):
        RunStore.create(tmp_path, EXPERIMENT, MANIFEST, LAYOUT, twice)
    assert not (tmp_path / "run.db").exists()
    with RunStore.create(tmp_path, EXPERIMENT, MANIFEST, LAYOUT, found) as store:
        assert store.census is not None
