"""Bytes stay bytes until they are taken, and derived columns are what their change makes of them, held or not."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.errors import RequestError, RunError
from clients.parts import Part
from fedsim.data import Columns, DatasetColumns, Source, TensorColumns, build, derive
from fedsim.data.columns import Derived, View
from fedsim.experiment import DataSettings


def every_byte() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).reshape(64, 1, 2, 2)


class Images(torch.utils.data.Dataset):
    """The same images, an example at a time."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": every_byte()[index], "y": index % 3}


def images(lazy: bool = False) -> Source:
    given: Any = Images() if lazy else {"x": every_byte(), "y": torch.arange(64) % 3}
    return Source(train=given, input_range=(0.0, 1.0))


@pytest.mark.parametrize("lazy", [False, True])
def test_bytes_are_taken_as_the_correctly_rounded_quotient_by_255(lazy: bool) -> None:
    columns = images(lazy).columns("train")
    assert columns is not None
    taken = columns.take(torch.arange(64).reshape(8, 8))["x"]
    assert (taken.dtype, tuple(taken.shape)) == (torch.float32, (8, 8, 1, 2, 2))
    expected = np.arange(256, dtype=np.float32) / np.float32(255)
    assert np.array_equal(taken.numpy().reshape(-1), expected)
    assert columns.dtype("x") == torch.float32
    assert torch.equal(columns.column("x").reshape(-1), torch.from_numpy(expected))


def test_bytes_stay_bytes_in_memory_wherever_they_go() -> None:
    population = build(images(), DataSettings(partition=Part("iid"), clients=4, proxy=5), 0)
    moved: list[Tensor] = []
    shared = population.map_tensors(lambda tensor: moved.append(tensor) or tensor.clone())
    of_bytes = [tensor for tensor in moved if tensor.dtype == torch.uint8]
    assert [len(tensor) for tensor in of_bytes] == [64, 13, 5]  # the pool, the server's test and proxy splits
    assert not any(tensor.is_floating_point() for tensor in moved)
    for columns in (shared.columns, *shared.server.values()):
        assert columns.take(torch.arange(2))["x"].dtype == torch.float32
    assert population.input_shape == (1, 2, 2)


@pytest.mark.parametrize("given", [None, (0.0, 255.0), (0, 1)])
@pytest.mark.parametrize("lazy", [False, True])
def test_bytes_are_pixels_by_whatever_range_pixels_have(given: Any, lazy: bool) -> None:
    source = Source(train=Images() if lazy else {"x": every_byte()}, input_range=given)
    columns = source.columns("train")
    assert columns is not None
    assert source.input_range == (0, 1)
    taken = columns.take(torch.arange(64))["x"]
    assert (taken.dtype, float(taken.min()), float(taken.max())) == (torch.float32, 0, 1)


def test_bytes_of_another_range_are_left_alone() -> None:
    source = Source(train={"x": every_byte()}, input_range=(0, 16))
    columns = source.columns("train")
    assert columns is not None
    assert source.input_range == (0, 16)
    assert columns.take(torch.arange(3))["x"].dtype == torch.uint8


def test_labels_that_are_bytes_are_no_pixels() -> None:
    source = Source(train={"x": torch.rand(4, 2), "y": torch.arange(4, dtype=torch.uint8)}, input_range=(0, 1))
    columns = source.columns("train")
    assert columns is not None
    assert columns.take(torch.arange(4))["y"].tolist() == [0, 1, 2, 3]


def test_bytes_in_one_split_and_numbers_in_another_are_refused() -> None:
    with pytest.raises(RequestError, match=r"data\.source\.test\.x: float32 given, and train has uint8; give bytes in"):
        Source(train={"x": every_byte()}, test={"x": torch.rand(3, 1, 2, 2)}, input_range=(0.0, 1.0))


# ------------------------------------------------------------------------------------------------------ derived columns


@dataclass
class Numbered:
    """Adds its position, over ten thousand, to an example."""

    seen: int = 0

    def __call__(self, batch: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        assert batch["x"].is_floating_point()
        self.seen += len(index)
        return {"x": batch["x"] + index.reshape(-1, 1, 1, 1) / 10_000}


class Written(Numbered):
    """The same, written into what it is given."""

    def __call__(self, batch: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        batch["x"] += index.reshape(-1, 1, 1, 1) / 10_000
        return batch


def bases() -> dict[str, Columns]:
    x, y = torch.rand(64, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    whole = TensorColumns({"x": x, "y": y})
    pixels, lazy = images().columns("train"), images(lazy=True).columns("train")
    assert pixels is not None
    assert lazy is not None
    return {"tensors": whole, "bytes": pixels, "a data set": lazy, "a view": View(whole, torch.arange(63, -1, -1))}


@pytest.mark.parametrize("change", [Numbered(), Written()], ids=["returned", "written into"])
@pytest.mark.parametrize("which", [None, torch.tensor([60, 3, 3, 17]), torch.tensor([], dtype=torch.int64)])
@pytest.mark.parametrize("name", ["tensors", "bytes", "a data set", "a view"])
def test_derived_columns_hold_the_change_of_those_examples_and_of_no_other(
    name: str, which: Tensor | None, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.data.columns._BLOCK", 300)  # a dozen examples at a time
    base = bases()[name]
    before = base.take(torch.arange(64))
    found = pickle.loads(pickle.dumps(derive(base, change, which)))
    expected = before["x"].clone()
    rows = torch.arange(64) if which is None else which.unique()
    expected[rows] += rows.reshape(-1, 1, 1, 1) / 10_000
    for index in (torch.arange(64), torch.tensor([[17, 3], [2, 17]]), torch.zeros(2, 0, dtype=torch.int64)):
        taken = found.take(index)
        assert torch.equal(taken["x"], expected[index])
        assert torch.equal(taken["y"], before["y"][index])
    some = found.subset(torch.tensor([17, 5])).without("y")
    assert some.names == ("x",)
    assert torch.equal(some.take(torch.arange(2))["x"], expected[[17, 5]])
    assert torch.equal(base.take(torch.arange(64))["x"], before["x"])  # what they come from stays as it is


def test_only_columns_that_change_are_copied_and_each_example_is_changed_once() -> None:
    base, change = bases()["tensors"], Numbered()
    assert isinstance(base, TensorColumns)
    found = derive(base, change, torch.tensor([1, 2, 2]))
    assert isinstance(found, TensorColumns)
    assert change.seen == 2
    assert found.tensors["y"] is base.tensors["y"]
    assert derive(base, change, torch.tensor([], dtype=torch.int64)) is base


def test_bytes_become_numbers_only_where_an_example_changes() -> None:
    pixels = bases()["bytes"]
    flipped = derive(pixels, lambda batch, index: {"y": 2 - batch["y"]}, torch.tensor([4]))
    assert isinstance(flipped, TensorColumns)
    assert flipped.tensors["x"].dtype == torch.uint8
    assert flipped.take(torch.tensor([4, 5]))["y"].tolist() == [2 - 4 % 3, 5 % 3]
    shifted = derive(pixels, Numbered(), torch.tensor([4]))
    assert isinstance(shifted, TensorColumns)
    assert shifted.tensors["x"].dtype == torch.float32


@pytest.mark.parametrize("name", ["tensors", "a data set"])
def test_all_examples_together_may_change_their_shape(name: str) -> None:
    base = bases()[name]
    found = derive(base, lambda batch, index: {"x": batch["x"].flatten(1)[:, :3].double()})
    assert found.shape("x") == (3,)
    assert found.dtype("x") == torch.float64
    assert torch.equal(found.take(torch.arange(64))["x"], base.column("x").flatten(1)[:, :3].double())


def test_a_block_without_a_change_keeps_its_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(batch: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        return {"x": -batch["x"]} if 20 <= int(index[0]) < 40 else {}

    monkeypatch.setattr("fedsim.data.columns._BLOCK", 16 * 4)
    base = bases()["tensors"]
    found = derive(base, late).column("x")
    changed = (found != base.column("x")).flatten(1).any(1)
    assert changed.any()
    assert not changed.all()
    assert torch.equal(torch.where(changed[:, None, None, None], -found, found), base.column("x"))


def test_labels_in_memory_are_seen_through_a_change_of_the_inputs() -> None:
    whole = bases()["tensors"]
    over = Derived(View(whole, torch.arange(10)), Numbered(), changes=frozenset({"x"}))
    held = over.held("y")
    assert held is not None
    assert held.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert over.held("x") is None
    assert Derived(whole, Numbered()).held("y") is None  # who knows what it changes


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda batch, index: {"z": batch["x"]}, r"gave a column 'z'; there are x, y"),
        (lambda batch, index: {"x": batch["x"][:1]}, r"gave \[1, 1, 2, 2\] for 2 examples of 'x'"),
        (lambda batch, index: {"y": 3}, r"gave int for 2 examples of 'y'"),
        (lambda batch, index: batch["x"], r"gave Tensor, not a dict of columns"),
        (lambda batch, index: {"x": batch["x"].flatten(1)}, r"examples of 'x' became torch.float32 \[4\]"),
        (lambda batch, index: {"y": batch["y"] / 2}, r"examples of 'y' became torch.float32 \[\] and others are"),
    ],
)
@pytest.mark.parametrize("name", ["tensors", "a data set"])
def test_a_change_that_does_not_fit_is_refused(name: str, gives: Any, said: str) -> None:
    with pytest.raises(RunError, match=said):
        derive(bases()[name], gives, torch.tensor([3, 5])).take(torch.tensor([3, 5]))


def test_a_feature_shift_reaches_the_clients_and_not_the_server() -> None:
    x = torch.full((400, 3), 0.5)
    source = Source(train={"x": x, "y": torch.arange(400) % 2}, input_range=(0.0, 1.0))
    shift = Part("feature_shift", {"kind": "brightness", "amount": 0.5})
    settings = DataSettings(partition=shift, clients=3, proxy=10, client_test_fraction=0.2)
    population = build(source, settings, 0)
    for split in ("train", "test"):
        for client, gain in enumerate((0.5, 1.0, 1.5)):
            held = torch.from_numpy(population.splits[split].of(client))
            assert population.columns_of(split).take(held)["x"] == pytest.approx(0.5 * gain)
    assert all((columns.column("x") == 0.5).all() for columns in population.server.values())
    assert (x == 0.5).all()


def test_a_feature_shift_of_a_data_set_is_that_of_its_tensors() -> None:
    shift = Part("feature_shift", {"kind": "noise", "amount": 0.1})
    settings = DataSettings(partition=shift, clients=3, proxy=5)
    held, lazy = (build(images(lazy), settings, 0) for lazy in (False, True))
    assert isinstance(held.columns, TensorColumns)
    assert not isinstance(lazy.columns, TensorColumns | DatasetColumns)
    index = torch.from_numpy(held.splits["train"].order)
    assert torch.equal(held.columns.take(index)["x"], lazy.columns.take(index)["x"])
