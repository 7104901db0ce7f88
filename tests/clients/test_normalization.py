"""Recalibration is one full-batch pass however its inputs are cut; a batch norm is replaced wherever it stands."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clients.errors import RequestError
from clients.normalization import batch_norms, group_count, recalibrate, replace_batch_norm, without_running_statistics
from clients.objective import TaskModule
from clients.randomness import generator
from clients.task import Classification


def linear() -> nn.Module:
    layers: list[nn.Module] = []
    for width in (6, 8, 8):
        layers += [nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.Flatten(),
        nn.BatchNorm1d(30),
    )


class Repeated(nn.Module):
    """One batch norm called twice in a forward pass, the second time on what the first made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.norm(self.layer(self.norm(x)).relu())))


class Scaled(nn.Module):
    """A model that changes its inputs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(0.5))


MODELS = {"linear": linear, "convolutional": convolutional, "repeated": Repeated, "in place": Scaled}
Build = Callable[[], nn.Module]


def built(build: Build) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = build().double()
        for norm in batch_norms(model):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)
    return model


def inputs(size: int = 40) -> Tensor:
    return torch.randn(size, 6, dtype=torch.float64, generator=generator(0, "inputs")) * 3 + 7


def statistics(model: nn.Module) -> list[Tensor]:
    return [value for norm in batch_norms(model) for value in (norm.running_mean, norm.running_var)]  # type: ignore[misc]


def full_batch(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What one pass in training mode leaves in fresh buffers that average cumulatively."""
    model = copy.deepcopy(model)
    for norm in batch_norms(model):
        norm.reset_running_stats()
        norm.momentum = None
    model.train()(x.clone())
    return statistics(model)


def test_the_first_layers_statistics_are_the_mean_and_unbiased_variance() -> None:
    x = inputs(300).float() / 8
    norm = nn.BatchNorm1d(6)
    recalibrate(norm, [x])
    torch.testing.assert_close(norm.running_mean, x.mean(0), atol=1.5e-7, rtol=0)
    torch.testing.assert_close(norm.running_var, x.var(0), atol=6e-8, rtol=0)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_one_batch_is_a_pass_in_training_mode(build: Build) -> None:
    model = built(build)
    expected = full_batch(model, inputs())
    torch.testing.assert_close(statistics(recalibrate(model, [inputs()])), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@given(cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_neither_cut_nor_order_matters(build: Build, cuts: list[int], seed: int) -> None:
    """Unequal batches, some of one example and some empty, in any order: every layer has the whole's statistics."""
    model = built(build)
    order = torch.randperm(40, generator=generator(seed, "order"))
    batches = inputs()[order].tensor_split(sorted(cuts))
    found = statistics(recalibrate(copy.deepcopy(model), iter(batches)))
    torch.testing.assert_close(found, full_batch(model, inputs()), atol=1e-10, rtol=1e-10)


def test_moments_are_pooled_in_double_precision() -> None:
    """Means that are large beside the deviations: float32 inputs, and the variance is right all the same."""
    x = (inputs(4000) * 0.01 + 1000).float()
    norm = nn.BatchNorm1d(6)
    recalibrate(norm, x.split(7))
    torch.testing.assert_close(norm.running_var, x.double().var(0).float())


def test_a_mapping_of_columns_is_passed_as_one() -> None:
    model = built(linear)
    expected = full_batch(model, inputs())
    batches = ({"x": part, "y": torch.zeros(len(part))} for part in inputs().split(16))
    recalibrate(TaskModule(model, Classification()), batches)
    torch.testing.assert_close(statistics(model), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("size", [40, 7])
def test_modes_momentum_and_counters_are_as_before(size: int) -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.5), nn.BatchNorm1d(3, momentum=0.3), nn.Sequential(nn.ReLU())).double()
    model.train()
    model[0][1].eval()  # type: ignore[index]
    model[3].eval()
    before = {name: module.training for name, module in model.named_modules()}
    recalibrate(model, inputs().split(size))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert [norm.momentum for norm in batch_norms(model)] == [0.1, 0.1, 0.1, 0.3]
    assert all(norm.track_running_stats for norm in batch_norms(model))
    assert [int(norm.num_batches_tracked) for norm in batch_norms(model)] == [1, 1, 1, 1]  # type: ignore[arg-type]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(6)).double().train()
    recalibrate(model, inputs().split(16))
    torch.testing.assert_close(model[1].running_mean, inputs().mean(0))


def test_recalibrating_again_starts_afresh() -> None:
    model = built(linear)
    once = [value.clone() for value in statistics(recalibrate(model, [inputs()]))]
    recalibrate(model, [inputs() * 5])
    assert not torch.allclose(statistics(model)[0], once[0])
    assert all(map(torch.equal, statistics(recalibrate(model, [inputs()])), once))


def test_norms_without_running_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
    expected = full_batch(model[1:], torch.nn.functional.batch_norm(inputs(), None, None, training=True))
    recalibrate(model, [inputs()])
    assert model[0].running_mean is None
    torch.testing.assert_close(statistics(model[1:]), expected)
    plain = without_running_statistics(built(linear))
    assert recalibrate(plain, [inputs()]) is plain


def test_a_layer_that_is_never_called_is_as_it_was_made() -> None:
    model = built(linear)
    model.unused = nn.BatchNorm1d(2)
    model.unused.running_mean.fill_(3)  # type: ignore[union-attr]
    model.forward = lambda x: model[:-1](x)  # type: ignore[method-assign, index]
    recalibrate(model, inputs().split(16))
    assert model.unused.running_mean.tolist() == [0, 0]  # type: ignore[union-attr]
    assert model.unused.running_var.tolist() == [1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("batches", [[], [inputs(1)], [inputs(1), inputs(0)]], ids=["none", "one", "one and none"])
def test_fewer_than_two_examples_are_refused(batches: list[Tensor]) -> None:
    model = built(linear)
    before = [value.clone() for value in statistics(model)]
    with pytest.raises(RequestError, match="at least 2 unlabelled examples"):
        recalibrate(model, batches)
    assert all(map(torch.equal, statistics(model), before))


def test_a_layer_that_sees_one_value_is_refused_and_modes_are_restored() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Unflatten(0, (1, -1)), nn.Flatten(), nn.BatchNorm1d(9)).double().train()
    with pytest.raises(RequestError, match="a single value a channel"):
        recalibrate(model, [inputs(3)])
    assert all(module.training for module in model.modules())


def test_modes_are_restored_where_the_model_raises() -> None:
    model = built(linear).train()
    with pytest.raises(RuntimeError, match="shapes"):
        recalibrate(model, [torch.ones(4, 5, dtype=torch.float64)])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Block(nn.Module):
    """Batch norms whose names say nothing, nested, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12, eps=1e-3))
        self.shared = nn.BatchNorm2d(12)
        self.body = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), self.shared), "b": self.shared})
        self.sync, self.flat, self.deep = nn.SyncBatchNorm(12), nn.BatchNorm1d(12), nn.BatchNorm3d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["b"](self.body["a"](self.downsample(x)))
        return self.flat(self.sync(x).mean((2, 3)))


PLACES = ["downsample.1", "shared", "body.a.1", "body.b", "sync", "flat", "deep"]


@pytest.mark.parametrize(
    ("kind", "type_", "groups"), [("group", nn.GroupNorm, 6), ("layer", nn.GroupNorm, 1), ("none", nn.Identity, None)]
)
def test_every_batch_norm_is_replaced_wherever_it_stands(kind: str, type_: type, groups: int | None) -> None:
    model = Block()
    assert replace_batch_norm(model, kind) is model  # type: ignore[arg-type]
    assert not batch_norms(model)
    for place in PLACES:
        made = model.get_submodule(place)
        assert type(made) is type_
        if groups:
            assert made.num_groups == (1 if place == "deep" else groups)
    assert model.shared is model.body["b"] is model.body["a"][1]  # type: ignore[index]
    assert model(torch.rand(2, 3, 4, 4)).shape == (2, 12)


def test_scale_shift_epsilon_and_mode_are_carried_over() -> None:
    model = Block().double().eval()
    scale, shift = model.downsample[1].weight, model.downsample[1].bias
    scale.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    replace_batch_norm(model, "group", groups=4)
    made = model.downsample[1]
    assert made.weight is scale
    assert made.bias is shift
    assert (made.eps, made.training, made.num_groups) == (1e-3, False, 4)
    assert model.deep.weight is None
    assert [name for name, _ in model.named_parameters()] == names
    assert made(torch.rand(2, 12, 3, 3, dtype=torch.float64)).dtype == torch.float64


def test_layer_is_over_all_of_an_example_and_scales_by_channel() -> None:
    norm = nn.BatchNorm2d(3)
    nn.init.uniform_(norm.weight)
    x = torch.rand(4, 3, 5, 5)
    whole = nn.functional.layer_norm(x, (3, 5, 5))
    found = replace_batch_norm(norm, "layer")(x)
    torch.testing.assert_close(found, whole * norm.weight[:, None, None] + norm.bias[:, None, None])


def test_a_model_that_is_a_batch_norm_gives_what_replaces_it() -> None:
    norm = nn.BatchNorm1d(16)
    assert isinstance(replace_batch_norm(norm, "group"), nn.GroupNorm)
    assert isinstance(replace_batch_norm(norm, "none"), nn.Identity)
    assert replace_batch_norm(norm, "batch") is norm


def test_instance_norms_stay() -> None:
    model = nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.LayerNorm(4))
    assert [type(layer) for layer in replace_batch_norm(model, "none")] == [nn.InstanceNorm2d, nn.LayerNorm]  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (30, 6), (12, 6), (8, 4), (7, 1), (3, 1), (2, 1), (1, 1)])
def test_groups_divide_the_channels_with_two_in_each(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


def test_at_most_so_many_groups() -> None:
    assert [group_count(64, most) for most in (1, 2, 4, 7, 16, 32, 64)] == [1, 2, 4, 4, 16, 32, 32]


def test_a_lazy_batch_norm_is_refused_until_it_knows_its_channels() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.LazyBatchNorm1d())
    with pytest.raises(RequestError, match="run one batch through the model first"):
        replace_batch_norm(model, "group")
    assert len(batch_norms(model)) == 2
    model(torch.rand(2, 6))
    replace_batch_norm(model, "group")
    assert not batch_norms(model)


class WithActivation(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_a_batch_norm_that_does_more_is_refused() -> None:
    with pytest.raises(RequestError, match="WithActivation has a forward of its own"):
        replace_batch_norm(nn.Sequential(WithActivation(4)), "group")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown kind 'instance'; allowed are none, batch, group, layer"):
        replace_batch_norm(linear(), "instance")  # type: ignore[arg-type]


def test_batches_as_data_loaders_and_arrays_give_them():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval()
    whole = recalibrate(copy.deepcopy(model), [x])[1].running_var
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=7)
    for batches in (loader, [x.numpy()], x):
        assert torch.allclose(recalibrate(copy.deepcopy(model), batches)[1].running_var, whole, atol=1e-6)
    with pytest.raises(RequestError, match="NaN"):
        recalibrate(model, [torch.full((4, 5), torch.nan)])
