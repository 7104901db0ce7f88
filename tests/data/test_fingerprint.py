"""A fingerprint tells data that have changed, or are dealt otherwise, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clients.parts import Part
from fedsim.data import ClientColumns, Population, Source, build, fingerprint
from fedsim.experiment import DataSettings

x, y = torch.arange(600.0).reshape(200, 3), torch.arange(200) % 4


def population(train: Any = None, seed: int = 0, **settings: Any) -> Population:
    given: Any = {"x": x, "y": y} if train is None else train
    return build(Source(train=given), DataSettings(**{"clients": 5, "proxy": 7, **settings}), seed)


def test_the_same_data_have_the_same_fingerprint_wherever_they_lie() -> None:
    found = fingerprint.fingerprint(population())
    assert len(found) == 64
    assert found == fingerprint.fingerprint(population({"x": x.clone(), "y": y.numpy()}))
    assert found == fingerprint.fingerprint(population().map_tensors(lambda tensor: tensor.clone()))
    spread = torch.stack([x, x], dim=-1)[..., 0]  # the same numbers with others between
    assert found == fingerprint.fingerprint(population({"x": spread, "y": y}))


@pytest.mark.parametrize("place", [0, 77, 199])
def test_one_example_that_changes_is_told(place: int) -> None:
    changed = x.clone()
    changed[place, 1] += 1
    assert fingerprint.fingerprint(population({"x": changed, "y": y})) != fingerprint.fingerprint(population())


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"clients": 6},
        {"proxy": 8},
        {"held_out_clients": 1},
        {"client_test_fraction": 0.2},
        {"partition": Part("iid")},
    ],
)
def test_other_dealing_is_told(changes: dict[str, Any]) -> None:
    assert fingerprint.fingerprint(population(**changes)) != fingerprint.fingerprint(population())


@pytest.mark.parametrize("given", [{"x": x.double(), "y": y}, {"a": x, "y": y}, {"x": x[:, None], "y": y}])
def test_another_type_name_or_shape_is_told(given: dict[str, Any]) -> None:
    assert fingerprint.fingerprint(population(given)) != fingerprint.fingerprint(population())


def test_of_large_data_a_few_examples_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "_SOME", 3)
    settings = {"test_fraction": 0.0, "proxy": 0}
    found = fingerprint.fingerprint(population(**settings))
    for place, told in ((0, True), (99, True), (199, True), (100, False)):
        changed = x.clone()
        changed[place, 1] += 1
        other = fingerprint.fingerprint(population({"x": changed, "y": y}, **settings))
        assert (other != found) == told


def test_clients_that_are_loaded_are_looked_at_too() -> None:
    def of(changed: bool) -> Population:
        first = {"x": np.ones((2, 3), np.float32), "y": np.array([0, 1])}
        last = {**first, "x": first["x"] + changed}
        return population(
            ClientColumns(lambda client: last if client == 4 else first, [2] * 5), partition=Part("natural"), proxy=0
        )

    assert fingerprint.fingerprint(of(False)) == fingerprint.fingerprint(of(False))
    assert fingerprint.fingerprint(of(False)) != fingerprint.fingerprint(of(True))
