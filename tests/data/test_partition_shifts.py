"""Feature shift: equal shares, and inputs that each client sees in a way of its own, the same in every batch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from clients.errors import RequestError
from fedsim.data import partition
from fedsim.data.shifts import FeatureShift

KINDS: list[tuple[Any, float]] = [("noise", 0.5), ("rotation", 40.0), ("brightness", 0.5)]


def images(count: int, *shape: int) -> Tensor:
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(0))


def shifted(kind: Any, amount: float, x: Tensor, clients: list[int], of: int, **more: Any) -> Tensor:
    given: dict[str, Any] = {"examples": torch.arange(len(x)), "seed": 0, **more}
    return FeatureShift(kind, amount, of).apply(x, torch.tensor(clients), **given)


@pytest.mark.parametrize(("kind", "amount"), KINDS)
def test_a_feature_shift_is_an_iid_partition_with_a_shift(kind: Any, amount: float) -> None:
    found = partition("feature_shift", np.empty((1318, 0)), 100, 3, kind=kind, amount=amount)
    order, offsets = found
    assert np.array_equal(order, partition("iid", np.empty((1318, 0)), 100, 3).order)
    assert set(np.diff(offsets)) == {13, 14}
    assert found.shift == FeatureShift(kind, amount, 100)
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert again.shift == found.shift
        assert np.array_equal(again[0], order)
        assert np.array_equal(again[1], offsets)


def test_client_k_of_n_has_its_own_amount() -> None:
    assert FeatureShift("noise", 0.4, 4).of(range(4)).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert FeatureShift("rotation", 30.0, 5).of(range(5)).tolist() == pytest.approx([-30, -15, 0, 15, 30])
    assert FeatureShift("brightness", 0.2, 3).of(range(3)).tolist() == pytest.approx([0.8, 1.0, 1.2])
    assert [FeatureShift(kind, 0.5, 1).of(0).item() for kind, _ in KINDS] == [0.5, 0.0, 1.0]


@pytest.mark.parametrize(("kind", "amount"), KINDS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (8, 8), (64,)])
def test_an_example_is_shifted_alike_whatever_batch_it_is_in(kind: Any, amount: float, shape: tuple[int, ...]) -> None:
    shift, x = FeatureShift(kind, amount, 5), images(30, *shape)
    clients, examples = torch.arange(30) % 5, torch.arange(30) * 7
    whole = shift.apply(x, clients, examples, 0, (0.0, 1.0))
    for batch in (torch.tensor([3]), torch.randperm(30, generator=torch.Generator().manual_seed(1))[:11]):
        assert torch.equal(shift.apply(x[batch], clients[batch], examples[batch], 0, (0.0, 1.0)), whole[batch])
    assert torch.equal(x, images(30, *shape))
    assert whole.dtype == x.dtype
    assert whole.shape == x.shape
    assert shift.apply(x[:0], clients[:0], examples[:0], 0, None).shape == (0, *shape)


def test_noise_is_standard_normal_times_the_clients_deviation() -> None:
    noise = shifted("noise", 0.6, torch.zeros(2000, 25, dtype=torch.float64), [0, 1, 2] * 666 + [0, 1], of=3)
    for client, deviation in enumerate([0.2, 0.4, 0.6]):
        drawn = noise[client::3].flatten().numpy()
        assert stats.kstest(drawn / deviation, "norm").pvalue > 0.01
        assert stats.kstest(drawn / (1.1 * deviation), "norm").pvalue < 0.01
    assert abs(np.corrcoef(noise.numpy(), rowvar=False) - np.eye(25)).max() < 5 / np.sqrt(2000)


def test_noise_belongs_to_the_example_and_the_seed() -> None:
    x = torch.zeros(3, 5, dtype=torch.float64)
    first = shifted("noise", 1.0, x, [1, 1, 1], of=2, examples=torch.tensor([4, 4, 9]))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert torch.equal(first, 2 * shifted("noise", 1.0, x, [0, 0, 0], of=2, examples=torch.tensor([4, 4, 9])))
    assert not torch.equal(first, shifted("noise", 1.0, x, [1, 1, 1], of=2, examples=torch.tensor([4, 4, 9]), seed=1))


def test_noise_for_many_examples_is_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shifted("noise", 1.0, torch.zeros(10, 3), [0] * 10, of=1)
    monkeypatch.setattr("fedsim.data.shifts._BLOCK", 7)
    assert torch.equal(shifted("noise", 1.0, torch.zeros(10, 3), [0] * 10, of=1), whole)


def test_a_quarter_turn_is_a_quarter_turn() -> None:
    x = images(2, 3, 6, 6)
    turned = shifted("rotation", 90.0, x, [0, 1], of=2)
    assert turned[0] == pytest.approx(torch.rot90(x[0], -1, (1, 2)), abs=1e-5)
    assert turned[1] == pytest.approx(torch.rot90(x[1], 1, (1, 2)), abs=1e-5)


@pytest.mark.parametrize("shape", [(3, 9, 9), (1, 8, 14), (8, 14), (64,)])
def test_rotation_is_torchvisions(shape: tuple[int, ...]) -> None:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import rotate

    x = images(5, *shape)
    turned = shifted("rotation", 30.0, x, [0, 1, 2, 3, 4], of=5)
    for image, found, angle in zip(x, turned, [-30.0, -15.0, 0.0, 15.0, 30.0], strict=True):
        square = image.reshape(1, 8, 8) if len(shape) == 1 else image.reshape(-1, *shape[-2:])
        expected = rotate(square, angle, InterpolationMode.BILINEAR)
        assert found == pytest.approx(expected.reshape(shape), abs=1e-4)


def test_a_rotation_brings_in_the_lowest_value() -> None:
    corner = shifted("rotation", 45.0, torch.ones(1, 8, 8), [1], of=2, input_range=(-1.0, 1.0))[0, 0, 0]
    assert corner == -1
    assert shifted("rotation", 45.0, torch.ones(1, 8, 8), [1], of=2)[0, 0, 0] == 0


@pytest.mark.parametrize(("kind", "amount"), KINDS)
def test_inputs_stay_in_their_range_where_there_is_one(kind: Any, amount: float) -> None:
    x = torch.cat([torch.zeros(20, 4, 4), torch.ones(20, 4, 4)])
    held = shifted(kind, amount, x, list(range(40)), of=40, input_range=(0.0, 1.0))
    assert held.min() >= 0
    assert held.max() <= 1
    if kind != "rotation":
        assert shifted(kind, amount, x, list(range(40)), of=40).max() > 1


@pytest.mark.parametrize("shape", [(65,), (), (2, 3, 8, 8), (1,)])
def test_what_is_no_image_is_not_rotated(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"data\.partition\.kind: rotation turns images"):
        shifted("rotation", 30.0, torch.zeros(4, *shape), [0, 1, 2, 3], of=4)
    assert shifted("noise", 1.0, torch.zeros(4, *shape), [0, 1, 2, 3], of=4).shape == (4, *shape)


@pytest.mark.parametrize(("kind", "amount"), KINDS)
def test_whole_numbers_are_not_shifted(kind: Any, amount: float) -> None:
    with pytest.raises(RequestError, match=rf"data\.partition\.kind: {kind} changes floating-point inputs; .*int64"):
        shifted(kind, amount, torch.zeros(4, 8, 8, dtype=torch.int64), [0, 1, 2, 3], of=4)
