"""The bundled images, the published generator and one's own arrays are what they are said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients import catalog
from clients.errors import RequestError
from clients.parts import Part
from fedsim.data import Source, arrays, build, digits, synthetic
from fedsim.experiment import DataSettings


def test_digits_are_images_in_the_unit_range() -> None:
    source = digits()
    x, y = source.train["x"], source.train["y"]
    assert (x.shape, x.dtype, y.dtype) == ((1797, 64), np.float32, np.int64)
    assert (x.min(), x.max()) == source.input_range == (0, 1)
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def by_client(source: Source, name: str) -> list[np.ndarray]:
    return [source.train[name][source.clients == client] for client in np.unique(source.clients)]


def test_synthetic_has_the_sizes_of_its_paper() -> None:
    source = synthetic(clients=200, features=2)
    train = np.bincount(source.clients)
    whole = train * 10 / 9
    assert len(train) == 200
    assert train.min() >= 45  # nine tenths of 50 and more
    assert np.median(whole) == pytest.approx(50 + np.exp(4), rel=0.25)  # the median of lognormal(4, 2) is e^4
    assert np.log(whole - 50 + 1).std() == pytest.approx(2, rel=0.2)
    assert len(source.test["y"]) == pytest.approx(len(source.train["y"]) / 9, rel=0.02)


def test_synthetic_inputs_have_the_covariance_of_its_paper() -> None:
    x = max(by_client(synthetic(), "x"), key=len)
    assert len(x) > 1000
    assert x.var(axis=0) == pytest.approx(np.arange(1, 61) ** -1.2, rel=0.3)
    assert abs(np.corrcoef(x[:, 0], x[:, 1])[0, 1]) < 0.1


def test_synthetic_beta_spreads_the_inputs_and_alpha_the_labels() -> None:
    def spread(beta: float) -> float:
        return float(np.std([x.mean() for x in by_client(synthetic(alpha=0, beta=beta, clients=100), "x")]))

    # The mean of 60 coordinates v ~ N(B, 1) has variance beta^2 + 1/60 (a standard deviation, not a variance, of B).
    assert spread(0) == pytest.approx(60**-0.5, rel=0.2)
    assert spread(3) == pytest.approx(3, rel=0.2)
    few = [len(np.unique(y)) for y in by_client(synthetic(alpha=1, beta=0), "y")]
    assert np.mean(few) < 9


def test_synthetic_iid_is_one_model_for_all_and_otherwise_it_is_not() -> None:
    def agreement(iid: bool) -> float:
        """How often the label of the nearest example of other clients is an example's own."""
        source = synthetic(iid=iid, alpha=0, beta=0, clients=10, features=2, labels=4)
        own = source.clients == 9
        x, y = source.train["x"], source.train["y"]
        distance = ((x[own][:300, None] - x[~own][None]) ** 2).sum(axis=2)
        return float((y[~own][distance.argmin(axis=1)] == y[own][:300]).mean())

    assert agreement(iid=True) > 0.9
    assert agreement(iid=False) < 0.8
    centre = np.array([x.mean() for x in by_client(synthetic(iid=True, alpha=0, beta=0), "x")])
    assert np.abs(centre).max() < 0.1


def test_synthetic_clients_are_keyed() -> None:
    few, many, other = synthetic(clients=3), synthetic(clients=6), synthetic(clients=3, seed=1)
    same = many.clients < 3
    assert np.array_equal(few.train["x"], many.train["x"][same])
    assert np.array_equal(few.train["y"], many.train["y"][same])
    assert few.train["x"].shape != other.train["x"].shape
    assert few.train["x"].dtype == np.float32


def written(tmp_path: Path, **columns: Any) -> Path:
    np.savez(tmp_path / "own.npz", **columns)
    return tmp_path / "own.npz"


x, y = np.random.default_rng(0).normal(size=(6, 2)), np.array([0, 1, 2, 0, 1, 2], dtype=np.int32)


def test_arrays_come_in_the_types_that_training_takes(tmp_path: Path) -> None:
    ids = np.array([4, 4, 4, 9, 9, 9])
    source = arrays(written(tmp_path, x=x, y=y, x_test=x[:2], y_test=y[:2], x_proxy=x[:3], clients=ids))
    assert source.train["x"] == pytest.approx(x.astype(np.float32))
    assert (source.train["x"].dtype, source.train["y"].dtype) == (np.float32, np.int64)
    assert source.test["y"].tolist() == [0, 1]
    assert list(source.proxy) == ["x"]
    assert source.validation is source.root is None
    assert source.clients.tolist() == ids.tolist()
    assert source.input_range is None


def test_bytes_are_pixels_tokens_stay_whole_and_targets_may_be_real(tmp_path: Path) -> None:
    pixels = arrays(written(tmp_path, x=np.full((3, 1, 2, 2), 255, dtype=np.uint8), y=y[:3]))
    assert pixels.train["x"].dtype == np.uint8  # in memory
    taken = pixels.columns("train").take(torch.arange(3))["x"]
    assert (taken.dtype, taken.min(), taken.max()) == (torch.float32, 1, 1)
    assert pixels.input_range == (0, 1)
    tokens = arrays(written(tmp_path, x=np.ones((3, 5), dtype=np.uint16), y=np.full((3, 5), -100)))
    assert tokens.train["x"].dtype == np.int64
    assert tokens.train["y"].min() == -100
    assert arrays(written(tmp_path, x=x, y=x[:, 0])).train["y"].dtype == np.float32


def test_a_relative_path_starts_from_the_experiment_file(tmp_path: Path) -> None:
    written(tmp_path, x=x, y=y)
    settings = DataSettings(source=Part("arrays", {"path": "own.npz"}))
    source = catalog.build(settings.source, "sources", tmp_path, key="data.source")
    assert len(source.train["y"]) == 6


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"y": y}, "has no array 'x'; it has y"),
        ({"x": x, "Y": y}, "has no array 'y'; it has x, Y; did you mean 'Y'"),
        ({"x": x, "y": y, "x_tset": x}, "has an array 'x_tset'.*did you mean 'x_test'"),
        ({"x": x, "y": y, "x_test": x}, "has only one of x_test and y_test"),
        ({"x": np.array([[1], [2, 3]], dtype=object), "y": y[:2]}, "x of .* holds objects .ragged"),
        ({"x": np.where(x == x[4, 1], np.nan, x), "y": y}, r"x of .* has nan at \[4, 1\]"),
        ({"x": np.where(x == x[4, 1], -np.inf, x), "y": y}, r"x of .* has -inf at \[4, 1\]"),
        ({"x": x.astype(np.float64) * 1e300, "y": y}, r"x of .* at \[0, 0\]; too large for float32; scale it"),
        (
            {"x": x, "y": np.where(y == y[3], 2**64 - 1, 0).astype(np.uint64)},
            "y of .* has 18446744073709551615",
        ),
        ({"x": x, "y": y - 1}, r"y of .* has the class -1 at \[0\]"),
        ({"x": x, "y": y.astype(str)}, "y of .* is of <U"),
        ({"x": x[:0], "y": y[:0]}, "x of .* is empty"),
        ({"x": np.array(3), "y": y}, "x of .* is a single number"),
        (
            {"x": x, "y": y, "x_test": np.zeros((2, 2), dtype=np.uint8), "y_test": y[:2]},
            r"test\.x: uint8 given, and train",
        ),
        ({"x": x, "y": y[:5]}, r"columns differ in length \(x 6, y 5\)"),
        ({"x": x, "y": y, "clients": y[:5]}, r"clients: int32 \[5\] given"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=rf"data\.source.*{said}"):
        arrays(written(tmp_path, **columns))


def test_nobody_looks_where_nobody_should(tmp_path: Path) -> None:
    source = arrays(written(tmp_path, x=np.where(x == x[4, 1], np.nan, x), y=y), scan=False)
    population = build(source, DataSettings(partition=Part("iid"), clients=2, proxy=0), 0)
    assert population.columns.column("x").isnan().sum() == 1


def test_what_is_no_npz_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"data\.source\.path: there is no file .*none\.npz"):
        arrays(tmp_path / "none.npz")
    with pytest.raises(RequestError, match=r"has no array 'x'; it has none"):
        arrays(tmp_path)  # a folder without .npy files
    (tmp_path / "text.npz").write_text("not arrays")
    with pytest.raises(RequestError, match=r"is not an \.npz file"):
        arrays(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", x)
    with pytest.raises(RequestError, match="one array without a name"):
        arrays(tmp_path / "one.npy")
    whole = written(tmp_path, x=x, y=y).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=r"is not an \.npz file"):
        arrays(tmp_path / "cut.npz")
