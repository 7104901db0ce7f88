from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clients.errors import RequestError
from clients.weights import Layout, share_all_but


def test_a_row_is_the_named_parameters_in_order():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    layout = Layout(model)
    assert layout.names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert layout.size == 3 * 2 + 2 + 2 + 1
    row = layout.flatten(model)
    assert torch.equal(row, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    for name, tensor in layout.unflatten(row).items():
        assert torch.equal(tensor, model.get_parameter(name))


def test_unflatten_gives_views_of_a_row_and_of_a_block():
    layout = Layout(nn.Linear(3, 2))
    row, block = torch.zeros(layout.size), torch.zeros(5, layout.size)
    layout.unflatten(row)["bias"].fill_(1)
    assert row.sum() == 2
    stacked = layout.unflatten(block)["weight"]
    assert stacked.shape == (5, 2, 3)
    stacked[4].fill_(1)
    assert block[4].sum() == 6
    assert block[:4].sum() == 0


def test_buffers_and_frozen_parameters_have_no_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].bias.requires_grad_(False)
    names = Layout(model).names
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]


def test_tied_parameters_appear_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert Layout(model).names == ["embedding.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_round_trips(dtype):
    model = nn.Linear(7, 5).to(dtype)
    layout = Layout(model)
    assert layout.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.weight)
    layout.load(other, layout.flatten(model))
    assert torch.equal(other.weight, model.weight)
    assert other.weight.dtype == dtype


def test_personal_parameters_stay_out_of_the_shared_row():
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    layout = Layout(model, share_all_but(["head.*"], model))
    assert layout.names == ["body.weight", "body.bias"]
    assert layout.personal.names == ["head.weight", "head.bias"]
    assert layout.all.names == [*layout.names, *layout.personal.names]
    whole = layout.all.flatten(model)
    assert torch.equal(whole[: layout.size], layout.flatten(model))
    assert torch.equal(whole[layout.size :], layout.personal.flatten(model))


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(RequestError, match=r"client\.personal: 'tail\.\*' matches no trainable parameter"):
        share_all_but(["tail.*"], nn.Linear(2, 2))


def test_what_does_not_fit_is_refused_by_name():
    layout = Layout(nn.Linear(3, 2))
    with pytest.raises(RequestError, match="'bias' is missing"):
        layout.flatten({"weight": torch.zeros(2, 3)})
    with pytest.raises(RequestError, match=r"'weight' has shape \(3, 2\) where the model has \(2, 3\)"):
        layout.flatten({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})
    with pytest.raises(RequestError, match="length 7 does not fit a layout of size 8"):
        layout.unflatten(torch.zeros(7))
    with pytest.raises(RequestError, match="nothing to federate"):
        Layout(nn.Linear(2, 2).requires_grad_(False))
