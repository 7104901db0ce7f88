"""Torchvision's networks: any norm, small images, any number of channels, and nothing that does not train."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models import resnet18 as reference

from clients.errors import RequestError
from clients.normalization import batch_norms
from clients.randomness import generator
from fedsim.models import mobilenet, resnet18, resnet34, resnet50, shufflenet

MODELS = {"resnet18": resnet18, "mobilenet": mobilenet, "shufflenet": shufflenet}
SHAPES = {"colour": (3, 32, 32), "grey": (1, 28, 28), "flat": (64,), "tiny": (2, 4, 5)}
NORMS = ["batch", "group", "layer", "none"]
Build = Callable[..., nn.Module]


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(shape: tuple[int, ...], number: int = 4) -> Tensor:
    return torch.rand(number, *shape, generator=generator(0, "images"))


def resolution(model: nn.Module, layer: str, x: Tensor) -> tuple[int, ...]:
    """Height and width of what a layer gives."""
    found = []
    model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: found.append(output.shape[2:]))
    model.eval()(x)
    return tuple(found[0])


def test_sizes_are_the_published_ones() -> None:
    """The CIFAR-10 variants': https://github.com/kuangliu/pytorch-cifar has 11,173,962 and 21,282,122 for ResNets."""
    assert size(resnet18(input_shape=(3, 32, 32), classes=10)) == 11_173_962
    assert size(resnet34(input_shape=(3, 32, 32), classes=10)) == 21_282_122
    assert size(resnet50(input_shape=(3, 32, 32), classes=10)) == 23_520_842
    # ImageNet's, as torchvision publishes them.
    assert size(resnet18(input_shape=(3, 224, 224), classes=1000)) == 11_689_512
    assert size(mobilenet(input_shape=(3, 224, 224), classes=1000)) == 3_504_872
    assert size(shufflenet(input_shape=(3, 224, 224), classes=1000)) == 2_278_604


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_norm_and_input_shape_gives_logits(build: Build, shape: tuple[int, ...], norm: str) -> None:
    model = build(input_shape=shape, classes=7, norm=norm)
    assert model(images(shape)).shape == (4, 7)
    assert bool(batch_norms(model)) == (norm == "batch")
    groups = [layer.num_groups for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    assert bool(groups) == (norm in ("group", "layer"))
    assert (max(groups, default=1) > 1) == (norm == "group")


@pytest.mark.parametrize("norm", NORMS[:3])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_one_step_changes_every_parameter(build: Build, norm: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(input_shape=(3, 32, 32), classes=10, norm=norm)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        nn.functional.cross_entropy(model(images((3, 32, 32))), torch.arange(4)).backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_a_small_stem_keeps_the_resolution() -> None:
    x = images((3, 32, 32))
    small = resnet18(input_shape=(3, 32, 32), classes=10)
    assert resolution(small, "layer1", x) == (32, 32)
    assert resolution(small, "layer4", x) == (4, 4)
    large = resnet18(input_shape=(3, 32, 32), classes=10, stem="large")
    assert resolution(large, "layer1", x) == (8, 8)
    assert resolution(large, "layer4", x) == (1, 1)


@pytest.mark.parametrize(("build", "last"), [(mobilenet, "features"), (shufflenet, "conv5"), (resnet50, "layer4")])
def test_a_small_stem_leaves_out_two_of_five_halvings(build: Build, last: str) -> None:
    x = images((3, 64, 64), 2)
    for stem, side in (("auto", 8), ("small", 8), ("large", 2)):
        assert resolution(build(input_shape=(3, 64, 64), classes=10, stem=stem), last, x) == (side, side)


def test_auto_is_small_up_to_64() -> None:
    for side, kernel in ((64, 3), (65, 7)):
        assert resnet18(input_shape=(3, 32, side), classes=10).conv1.kernel_size == (kernel, kernel)


@pytest.mark.parametrize(
    ("build", "original"), [(resnet18, reference), (mobilenet, mobilenet_v2)], ids=["resnet18", "mobilenet"]
)
def test_a_large_stem_is_torchvisions_own(build: Build, original: Any) -> None:
    """Weights of the one load into the other, and give the same logits."""
    theirs, ours = original(num_classes=10).eval(), build(input_shape=(3, 96, 96), classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images((3, 96, 96), 2)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_parameters_have_the_same_names_under_every_norm(norm: str) -> None:
    def shapes(norm: str) -> dict[str, torch.Size]:
        model = resnet18(input_shape=(3, 32, 32), classes=10, norm=norm)  # type: ignore[arg-type]
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    assert shapes(norm) == shapes("batch")


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_inputs_take_the_shape_and_type_of_the_model(build: Build) -> None:
    model = build(input_shape=(64,), classes=10).eval()
    bytes_ = torch.randint(0, 255, (2, 64), dtype=torch.uint8, generator=generator(0, "bytes"))
    expected = model(bytes_.float().reshape(2, 1, 8, 8))
    assert torch.equal(model(bytes_), expected)
    assert torch.equal(copy.deepcopy(model)(bytes_), expected)
    assert model.double()(bytes_).dtype == torch.float64


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_gradients_stack(build: Build) -> None:
    """Two clients' gradients at once are those of each alone."""
    models = [build(input_shape=(64,), classes=10, norm="group").double().eval() for _ in range(2)]
    weights, _ = torch.func.stack_module_state(models)
    weights = {name: weight.detach() for name, weight in weights.items()}
    x = images((2, 64), 2).double()

    def loss(weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], weights, (inputs,)).logsumexp(1).mean()

    stacked = torch.vmap(torch.func.grad(loss))(weights, x)
    for place, (model, inputs) in enumerate(zip(models, x, strict=True)):
        alone = torch.autograd.grad(model(inputs).logsumexp(1).mean(), list(model.parameters()))
        torch.testing.assert_close([gradient[place] for gradient in stacked.values()], list(alone))


def test_mobilenet_has_dropout() -> None:
    def rates(**settings: Any) -> list[float]:
        model = mobilenet(input_shape=(64,), classes=10, **settings)
        return [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)]

    assert rates() == [0.2]
    assert rates(dropout=0.5) == [0.5]


def test_what_is_no_image_norm_or_stem_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[C, H, W\]"):
        resnet18(input_shape=(60,), classes=10)
    with pytest.raises(RequestError, match="allowed are none, batch, group, layer"):
        resnet18(input_shape=(64,), classes=10, norm="bacth")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed are auto, small, large"):
        resnet18(input_shape=(64,), classes=10, stem="tiny")  # type: ignore[arg-type]


def test_torchvision_waits_until_a_network_is_built() -> None:
    code = """
import sys
from fedsim.models import mlp, resnet18
mlp(input_shape=(64,), classes=10)
before = "torchvision" in sys.modules
resnet18(input_shape=(64,), classes=10)
print(before, "torchvision" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "True"]
