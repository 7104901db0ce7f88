"""The models have the sizes they are said to have, train stacked, and take inputs as they come."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import fedsim.models
from clients.errors import RequestError
from fedsim.models import cnn, logistic, mlp

NORMS = ["none", "batch", "group", "layer"]


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes() -> None:
    assert size(logistic(input_shape=(60,), classes=10)) == 610
    assert size(mlp(input_shape=(64,), classes=10)) == 64 * 64 + 64 + 64 * 10 + 10
    assert size(mlp(input_shape=(8, 8), classes=3, hidden=[5, 4])) == (65 * 5) + (6 * 4) + (5 * 3)
    assert size(mlp(input_shape=(64,), classes=10, hidden=[])) == 650
    convolutions = (3 * 9 + 1) * 32 + (32 * 9 + 1) * 64
    assert size(cnn(input_shape=(3, 32, 32), classes=10)) == convolutions + (64 * 8 * 8 + 1) * 128 + 129 * 10


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8), (3, 32, 32), (2, 5, 7)])
def test_every_input_shape_gives_logits(shape: tuple[int, ...], norm: str) -> None:
    x = torch.rand(3, *shape)
    for model in (
        logistic(input_shape=shape, classes=4),
        mlp(input_shape=shape, classes=4, norm=norm),  # type: ignore[arg-type]
        cnn(input_shape=shape, classes=4, norm=norm),  # type: ignore[arg-type]
    ):
        assert model(x).shape == (3, 4)


def test_a_flat_square_is_the_image() -> None:
    torch.manual_seed(0)
    model = cnn(input_shape=(64,), classes=10)
    x = torch.rand(5, 64)
    assert torch.equal(model(x), model(x.reshape(5, 1, 8, 8)))


@pytest.mark.parametrize("build", [mlp, cnn])
@pytest.mark.parametrize("norm", NORMS[1:])
def test_norms_stand_between_layer_and_relu(build: Any, norm: str) -> None:
    two = {"hidden": [16, 8]} if build is mlp else {}
    layers = list(build(input_shape=(64,), classes=10, norm=norm, **two).children())
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    places = [place for place, layer in enumerate(layers) if isinstance(layer, kinds)]
    assert len(places) == 2
    for place in places:
        assert isinstance(layers[place - 1], nn.Linear | nn.Conv2d)
        assert isinstance(layers[place + 1], nn.ReLU)


def test_groups_are_eight_or_the_most_that_say_something() -> None:
    def groups(model: nn.Module) -> list[int]:
        return [layer.num_groups for layer in model.modules() if isinstance(layer, nn.GroupNorm)]

    assert groups(cnn(input_shape=(64,), classes=10, norm="group")) == [8, 8]
    assert groups(cnn(input_shape=(64,), classes=10, norm="layer")) == [1, 1]
    assert groups(mlp(input_shape=(64,), classes=10, hidden=[64, 8, 30, 7, 1], norm="group")) == [8, 4, 6, 1, 1]
    narrow = mlp(input_shape=(64,), classes=10, hidden=[8], norm="group")
    assert narrow.norm1(torch.rand(3, 8)).abs().min() > 0  # type: ignore[operator]


@pytest.mark.parametrize("build", [logistic, mlp, cnn])
def test_inputs_take_the_type_of_the_weights(build: Any) -> None:
    model = build(input_shape=(64,), classes=10)
    bytes_ = torch.randint(0, 255, (2, 64), dtype=torch.uint8)
    assert torch.equal(model(bytes_), model(bytes_.float()))
    assert model.double()(torch.rand(2, 64)).dtype == torch.float64


@pytest.mark.parametrize("norm", ["none", "group", "layer"])
@pytest.mark.parametrize("build", [mlp, cnn])
def test_models_run_stacked(build: Any, norm: str) -> None:
    models = [build(input_shape=(64,), classes=10, norm=norm) for _ in range(3)]
    x = torch.rand(3, 5, 64)
    stacked, _ = torch.func.stack_module_state(models)
    found = torch.vmap(lambda weights, inputs: torch.func.functional_call(models[0], weights, (inputs,)))(stacked, x)
    expected = torch.stack([model(inputs) for model, inputs in zip(models, x, strict=True)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(60,), (2, 2), (3, 2, 9), (1, 2, 8, 8), ()])
def test_inputs_that_are_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[C, H, W\]"):
        cnn(input_shape=shape, classes=10)


@pytest.mark.parametrize("build", [mlp, cnn])
def test_an_unknown_norm_is_refused(build: Any) -> None:
    with pytest.raises(RequestError, match="allowed are none, batch, group, layer"):
        build(input_shape=(64,), classes=10, norm="bacth")


def test_dropout_stands_after_each_hidden_layer_and_before_the_logits_of_cnn() -> None:
    def names(model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_children()]

    assert names(mlp(input_shape=(64,), classes=10, hidden=[8, 4], norm="batch", dropout=0.5)) == [
        "flatten", "hidden1", "norm1", "relu1", "dropout1", "hidden2", "norm2", "relu2", "dropout2", "head",
    ]  # fmt: skip
    assert names(cnn(input_shape=(64,), classes=10, dropout=0.5))[-4:] == ["hidden", "relu", "dropout", "head"]
    for build in (mlp, cnn):
        rates = [
            layer.p for layer in build(input_shape=(64,), classes=10, dropout=0.25) if isinstance(layer, nn.Dropout)
        ]
        assert rates == [0.25]


@pytest.mark.parametrize("build", [mlp, cnn])
def test_without_dropout_there_is_no_layer_for_it(build: Any) -> None:
    model = build(input_shape=(64,), classes=10, norm="batch", dropout=0.0)
    assert not any(isinstance(layer, nn.Dropout) for layer in model.modules())
    dropping = build(input_shape=(64,), classes=10, norm="batch", dropout=0.5)
    assert list(dropping.state_dict()) == list(model.state_dict())


def test_a_model_is_not_hidden_by_the_file_of_its_name() -> None:
    for name in ("logistic", "mlp", "cnn"):
        importlib.import_module(f"fedsim.models.{name}")
        assert callable(getattr(fedsim.models, name))
