"""A source is cut up without loss or overlap, by the seed alone, and cheaply."""

from __future__ import annotations

import itertools
import pickle
import time
from typing import Any

import numpy as np
import pytest
import torch

from clients.errors import RequestError
from clients.parts import Part
from fedsim.data import CSR, Population, Source, TensorColumns, build, digits
from fedsim.experiment import DataSettings


def numbered(examples: int, **columns: Any) -> Source:
    """A source whose ``x`` is the example's own position."""
    position = torch.arange(examples)
    return Source(train={"x": position[:, None].float(), "y": position % 7, **columns})


def positions(population: Population) -> dict[str, list[int]]:
    """Where each example of a numbered source went."""
    found = {f"client {name}": csr.order.tolist() for name, csr in population.splits.items()}
    for name, columns in population.server.items():
        found[name] = columns.column("x")[:, 0].long().tolist()
    return found


def test_the_digits_experiment() -> None:
    population = build(digits(), DataSettings(), 0)
    assert population.clients == 100
    assert population.classes == 10
    assert population.input_shape == (64,)
    assert population.input_range == (0, 1)
    assert {name: len(columns) for name, columns in population.server.items()} == {"test": 359, "proxy": 120}
    assert population.splits.keys() == {"train"}
    assert population.splits["train"].examples == 1797 - 359 - 120
    assert population.trainable.tolist() == list(range(100))


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
def test_every_example_is_in_one_split(name: str) -> None:
    settings = DataSettings(
        partition=Part(name),
        clients=13,
        proxy=20,
        root=10,
        validation_fraction=0.1,
        client_test_fraction=0.3,
        client_validation_fraction=0.2,
    )
    found = positions(build(numbered(500), settings, 0))
    assert {name: len(found[name]) for name in ("test", "validation", "proxy", "root")} == {
        "test": 100,
        "validation": 50,
        "proxy": 20,
        "root": 10,
    }
    assert sorted(itertools.chain(*found.values())) == list(range(500))


def test_all_follows_from_the_seed_and_data_seed_goes_before_it() -> None:
    settings: dict[str, Any] = {"client_test_fraction": 0.2, "held_out_clients": 5}

    def all_of(seed: int, own: int | None = None) -> tuple[Any, ...]:
        population = build(numbered(1500), DataSettings(**settings, seed=own), seed)
        return positions(population), population.held_out.tolist()

    assert all_of(0) == all_of(0) != all_of(1)
    assert all_of(5, own=1) == all_of(1)
    assert all_of(0)[1] != all_of(1)[1]


def test_the_servers_splits_do_not_depend_on_the_partition() -> None:
    one, two = (
        build(numbered(900), DataSettings(partition=Part(name), clients=c), 0)
        for name, c in (("iid", 9), ("shards", 30))
    )
    assert positions(one)["test"] == positions(two)["test"]


def test_the_proxy_has_no_labels_and_root_has() -> None:
    population = build(numbered(900), DataSettings(root=30, clients=10), 0)
    assert population.server["proxy"].names == ("x",)
    assert population.server["root"].names == ("x", "y")


def test_splits_that_the_source_brings_are_taken() -> None:
    given = {"x": torch.zeros(4, 1), "y": torch.tensor([0, 1, 2, 11])}
    source = Source(train=numbered(200).train, test=given, validation=given, proxy=given, root=given)
    population = build(source, DataSettings(clients=10, validation_fraction=0.1, root=7), 0)
    assert {len(columns) for columns in population.server.values()} == {4}
    assert population.splits["train"].examples == 200
    assert population.server["proxy"].names == ("x",)
    assert population.classes == 12  # the largest label is in a split of the server's


def test_nothing_is_drawn_where_nothing_is_asked() -> None:
    population = build(numbered(50), DataSettings(test_fraction=0.0, proxy=0, clients=10), 0)
    assert population.server == {}
    assert population.splits["train"].examples == 50


def test_each_client_keeps_a_share_and_something_to_train_on() -> None:
    settings = DataSettings(
        clients=60, test_fraction=0.0, proxy=0, client_test_fraction=0.5, client_validation_fraction=0.4,
        partition=Part("dirichlet", {"alpha": 0.2}),
    )  # fmt: skip
    splits = build(numbered(600), settings, 0).splits
    train, validation, test = (splits[name].sizes for name in ("train", "validation", "test"))
    whole = train + validation + test
    assert train.min() >= 1
    assert whole.min() == 1  # which a client with one example shows
    large = whole >= 10
    assert np.abs(test - 0.5 * whole)[large].max() <= 0.5
    assert np.abs(validation - 0.4 * whole)[large].max() <= 0.5
    owned = [np.concatenate([splits[name].of(client) for name in splits]) for client in range(60)]
    assert [len(examples) for examples in owned] == whole.tolist()


def test_client_splits_are_drawn_at_random() -> None:
    splits = build(numbered(4000), DataSettings(clients=10, client_test_fraction=0.5), 0).splits
    means = [splits["test"].of(client).mean() for client in range(10)]
    assert np.mean(means) == pytest.approx(2000, rel=0.1)


def test_held_out_clients_are_never_trainable() -> None:
    population = build(numbered(900), DataSettings(held_out_clients=40), 0)
    assert len(population.held_out) == 40
    assert sorted([*population.held_out, *population.trainable]) == list(range(100))
    assert population.splits["train"].sizes[population.held_out].min() >= 1  # they keep their examples to be judged on


def test_the_natural_partition_counts_its_own_clients() -> None:
    source = Source(train=numbered(90).train, clients=np.arange(90) // 30 * 5)
    population = build(source, DataSettings(partition=Part("natural"), proxy=0), 0)
    assert population.clients == 3
    assert (population.splits["train"].of(1) // 30 == 1).all()


class Pairs(torch.utils.data.Dataset):
    """A data set of the user's own: two inputs and a mask."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        left, right = torch.full((3,), float(index)), np.zeros((2, 2))
        return {"left": left, "right": right, "mask": torch.full((4, 4), index % 5)}


def test_a_data_set_of_ones_own() -> None:
    settings = DataSettings(partition=Part("iid"), clients=4, proxy=5)
    population = build(Source(train=Pairs(), label="mask"), settings, 0)
    assert population.input_shape == (3,)
    assert population.classes == 5
    assert population.server["proxy"].names == ("left", "right")
    batch = population.columns.take(torch.from_numpy(population.splits["train"].of(2))[None])
    assert batch["left"][0, :, 0].long().tolist() == population.splits["train"].of(2).tolist()


def test_real_targets_and_missing_labels_have_no_classes() -> None:
    settings = DataSettings(partition=Part("iid"), clients=4, proxy=5)
    assert build(numbered(40, y=torch.rand(40)), settings, 0).classes is None
    unlabelled = build(Source(train={"x": torch.rand(40, 3)}), settings, 0)
    assert unlabelled.classes is None
    assert unlabelled.server["proxy"].names == ("x",)


def test_text_that_is_its_own_label_stays_in_the_proxy() -> None:
    source = Source(train={"text": torch.randint(0, 20, (40, 6))}, label="text")
    population = build(source, DataSettings(partition=Part("iid"), clients=4, proxy=5), 0)
    assert population.server["proxy"].names == ("text",)
    assert population.input_shape == (6,)


def test_map_tensors_reaches_everything_and_can_be_undone() -> None:
    population = build(numbered(300), DataSettings(client_test_fraction=0.2, held_out_clients=2, clients=10), 0)
    store: list[torch.Tensor] = []

    def put(tensor: torch.Tensor) -> int:
        store.append(tensor.clone())
        return len(store) - 1

    handles = population.map_tensors(put)
    assert len(pickle.dumps(handles)) < 3000  # no tensor is left inside
    again = pickle.loads(pickle.dumps(handles)).map_tensors(store.__getitem__)
    assert positions(again) == positions(population)
    assert np.array_equal(again.trainable, population.trainable)
    assert np.shares_memory(again.splits["train"].order, store[2].numpy())
    assert isinstance(again.columns, TensorColumns)


def test_a_population_is_picklable() -> None:
    population = build(numbered(300), DataSettings(clients=10), 0)
    assert positions(pickle.loads(pickle.dumps(population))) == positions(population)


def test_csr_gives_views() -> None:
    csr = CSR(np.array([4, 2, 0, 1, 3]), np.array([0, 2, 2, 5]))
    assert (csr.clients, csr.examples, csr.sizes.tolist()) == (3, 5, [2, 0, 3])
    assert [csr.of(client).tolist() for client in range(3)] == [[4, 2], [], [0, 1, 3]]
    assert np.shares_memory(csr.of(2), csr.order)
    assert csr.owners.tolist() == [0, 0, 2, 2, 2]
    kept = csr.only(np.array([True, False, False, True, True]))
    assert [kept.of(client).tolist() for client in range(3)] == [[4], [], [1, 3]]


def broken(values: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    values = values.clone()
    values[place] = value
    return values


good = {"x": torch.zeros(90, 2, dtype=torch.float64), "y": torch.arange(90) % 3}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train": {**good, "x": broken(good["x"], (17, 1), torch.nan)}}, r"train\.x: nan at \[17, 1\]; every number"),
        ({"train": {**good, "x": broken(good["x"], (0, 0), -torch.inf).half()}}, r"train\.x: -inf at \[0, 0\]"),
        ({"train": good, "test": {**good, "x": broken(good["x"], (89, 0), torch.inf)}}, r"test\.x: inf at \[89, 0\]"),
        (
            {"train": {**good, "x": broken(good["x"], (3, 1), 1e300)}},
            r"train\.x: 1e\+300 at \[3, 1\]; too large",
        ),
        (
            {"train": {**good, "y": broken(good["y"], (8,), 1000)}},
            r"train\.y: class 1000 at \[8\] would make 1,001",
        ),
        (
            {"train": good, "test": {**good, "y": broken(good["y"], (2,), 10**12)}},
            r"test\.y: class 10{12} at \[2\]",
        ),
        ({"train": {**good, "y": torch.full((90, 2), 2**20)}}, r"train\.y: class 1048576 at \[0, 0\] would make"),
        ({"train": {**good, "y": torch.full((90,), torch.nan)}}, r"train\.y: nan at \[0\]"),
        ({"train": {**good, "y": good["y"] - 1}}, r"train\.y: class -1 at \[0\]; classes count from 0"),
        ({"train": good, "root": {**good, "y": broken(good["y"], (5,), -9)}}, r"root\.y: class -9 at \[5\]"),
        ({"train": good, "classes": 2}, r"train\.y: class 2 at \[2\]; the source says that there are 2 classes"),
        ({"train": good, "test": {**good, "y": good["y"] + 1}, "classes": 3}, r"test\.y: class 3 at \[2\]"),
        (
            {
                "train": {**good, "y": good["x"].long()},
                "test": {**good, "y": broken(good["x"].long(), (4, 1), 5)},
                "classes": 5,
            },
            r"test\.y: class 5 at \[4, 1\]",
        ),
    ],
)
def test_numbers_that_cannot_be_used_are_named_by_their_place(given: dict[str, Any], said: str) -> None:
    settings = DataSettings(partition=Part("iid"), clients=3, proxy=5)
    with pytest.raises(RequestError, match=rf"data\.source\.{said}") as caught:
        build(Source(**given), settings, 0)
    assert "\n" not in str(caught.value)


def test_numbers_too_large_for_float32_are_fine_where_training_computes_in_float64() -> None:
    settings = DataSettings(partition=Part("iid"), clients=3, proxy=5)
    large = Source(train={**good, "x": broken(good["x"], (3, 1), 1e300)})
    population = build(large, settings, 0, dtype=torch.float64)
    assert population.columns.column("x")[3, 1] == 1e300


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64", "bool", ">i8"])
def test_whole_labels_of_every_type_are_classes(kind: str) -> None:
    labels = (np.arange(90) % 2).astype(kind)
    source = Source(train={"x": np.zeros((90, 2), ">f4"), "y": labels})
    population = build(source, DataSettings(clients=3, proxy=5), 0)
    assert population.classes == 2
    assert population.columns.take(torch.arange(2))["y"].dtype == torch.int64
    assert population.columns.take(torch.arange(2))["x"].dtype == torch.float32


def test_many_classes_that_a_source_names_are_taken() -> None:
    settings = DataSettings(partition=Part("iid"), clients=3, proxy=5)
    named = Source(train={**good, "y": broken(good["y"], (8,), 5000)}, classes=6000)
    assert build(named, settings, 0).classes == 6000
    assert build(Source(train={**good, "y": broken(good["y"], (8,), 999)}), settings, 0).classes == 1000


def test_classes_are_those_that_the_source_says() -> None:
    settings = DataSettings(partition=Part("iid"), clients=3, proxy=5)
    assert build(Source(train=good, classes=7), settings, 0).classes == 7
    ignored = {"x": good["x"], "y": torch.tensor([[0, -100]]).expand(90, 2)}  # a mark of what does not count
    assert build(Source(train=ignored), settings, 0).classes == 1
    real = Source(train={"x": good["x"], "y": good["x"][:, 0]}, classes=7)
    assert build(real, settings, 0).classes is None


def test_labels_of_a_data_set_are_not_read_where_classes_are_named_and_nobody_deals_by_them() -> None:
    read = []

    class Counted(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            read.append(index)
            return super().__getitem__(index) | {"mask": torch.tensor(index % 5)}

    settings = DataSettings(partition=Part("iid"), clients=3, proxy=5)
    population = build(Source(train=Counted(), label="mask", classes=5), settings, 0)
    assert population.classes == 5
    assert set(read) == {0}
    assert population.label_table("train", np.arange(3)) is None
    assert build(Source(train=Counted(), label="mask"), settings, 0).classes == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clients": 200}, r"data\.clients: 200 clients but only 120 examples to train on"),
        ({"proxy": 240}, r"data\.proxy: 240 asks for 240 examples, but 240 remain"),
        ({"root": 500}, r"data\.root: 500 asks for 500 examples, but 120 remain"),
        ({"test_fraction": 0.999}, r"data\.test_fraction: 0\.999 asks for 300 examples, but 300 remain"),
        ({"validation_fraction": 0.9}, r"data\.validation_fraction: 0\.9 asks for 270 examples, but 240 remain"),
        ({"client_test_fraction": 0.6, "client_validation_fraction": 0.4}, r"data\.client_test_fraction: 0\.6"),
        ({"held_out_clients": 10}, r"data\.held_out_clients: 10 of 10 clients"),
        ({"partition": Part("natural")}, r"data\.partition: natural needs"),
    ],
)
def test_more_than_there_is_is_refused_by_its_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        build(numbered(300), DataSettings(**{"clients": 10, **changes}), 0)
    assert "\n" not in str(caught.value)


def test_a_million_clients_are_cheap() -> None:
    source = numbered(2_000_000)
    start = time.perf_counter()
    settings = DataSettings(clients=1_000_000, partition=Part("iid"), client_test_fraction=0.3, held_out_clients=1000)
    population = build(source, settings, 0)
    assert len(population.trainable) == 999_000
    assert time.perf_counter() - start < 10
