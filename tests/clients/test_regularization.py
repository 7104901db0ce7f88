"""Penalties against their definitions, torch's optimisers and scikit-learn's estimators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize, minimize_scalar
from sklearn.linear_model import ElasticNet, Lasso
from torch import nn

from clients.batches import schedule
from clients.optimizers import Adam, AdamW, Momentum, Sgd
from clients.recipe import Recipe, Regularization
from clients.regularization import (
    Penalties,
    clip_norm,
    describe,
    elastic_net,
    group_shrink,
    soft_threshold,
)
from clients.task import Regression
from clients.weights import Layout
from tests.clients.problems import SIZES, Pool, digits_like, members, mlp, trainer

DOUBLE = torch.float64
numbers = st.floats(-10, 10)
amounts = st.floats(0, 5)
EVERY = {
    "l1": 0.3,
    "l2": 0.3,
    "weight_decay": 0.3,
    "elastic_net": {"l1": 0.3, "l2": 0.3},
    "group_lasso": 0.3,
    "proximal": 0.3,
}


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=DOUBLE)


def penalties(model: nn.Module, **said: object) -> Penalties:
    return Penalties(Regularization(**said), model, Layout(model).all)  # type: ignore[arg-type]


def block(model: nn.Module, k: int = 3, seed: int = 0) -> torch.Tensor:
    layout = Layout(model).all
    return torch.randn(k, layout.size, generator=torch.Generator().manual_seed(seed), dtype=layout.dtype)


# The proximal maps.


@settings(deadline=None)
@given(numbers, amounts, numbers)
def test_no_weight_is_better_than_the_soft_threshold(b, amount, other):
    def loss(w):
        return 0.5 * (w - b) ** 2 + amount * abs(w)

    assert loss(float(soft_threshold(scalar(b), amount))) <= loss(other) + 1e-9


@settings(deadline=None)
@given(numbers, amounts, amounts)
def test_the_elastic_nets_map_is_the_minimum_found_numerically(b, l1, l2):
    def loss(w):
        return 0.5 * (w - b) ** 2 + l1 * abs(w) + l2 / 2 * w**2

    found = minimize_scalar(loss, bounds=(-11, 11), method="bounded", options={"xatol": 1e-10})
    assert float(elastic_net(scalar(b), l1, l2)) == pytest.approx(found.x, abs=1e-6)


@settings(deadline=None)
@given(arrays(np.float64, 3, elements=numbers), st.floats(0.01, 5), arrays(np.float64, 3, elements=numbers))
def test_the_group_lassos_map_is_the_minimum_found_numerically(b, amount, other):
    def loss(w):
        return 0.5 * np.sum((w - b) ** 2) + amount * 3**0.5 * np.linalg.norm(w)

    least = loss(group_shrink(torch.from_numpy(b), amount).numpy())
    found = minimize(loss, b, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    assert least <= min(found.fun, loss(other)) + 1e-9


def test_golden_values():
    row = torch.tensor([3.0, -2.0, 0.5, -0.5, 0.0], dtype=DOUBLE)
    assert soft_threshold(row, 0.5).tolist() == [2.5, -1.5, 0.0, 0.0, 0.0]
    assert elastic_net(row, 0.5, 0.25).tolist() == [2.0, -1.2, 0.0, 0.0, 0.0]
    groups = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=DOUBLE)
    shrunk = torch.tensor([[2.4, 3.2, 0.0, 0.0], [0.0] * 4, [0.0] * 4], dtype=DOUBLE)  # by 0.5 sqrt(4) / 5
    assert torch.allclose(group_shrink(groups, 0.5), shrunk, rtol=0, atol=1e-15)
    by_group = group_shrink(groups, torch.tensor([[0.5], [0.05], [1.0]], dtype=DOUBLE))
    shrunk[1] = torch.tensor([0.24, 0.32, 0.0, 0.0], dtype=DOUBLE)
    assert torch.allclose(by_group, shrunk, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_group_of_zeros_stays_one_and_nan_is_not_hidden(dtype):
    zeros = torch.zeros(2, 3, dtype=dtype)
    assert torch.equal(group_shrink(zeros, 0.0), zeros)
    assert torch.equal(group_shrink(zeros, 1.0), zeros)
    broken = torch.tensor([[torch.nan, 0.1, 2.0]], dtype=dtype)
    for mapped in (soft_threshold(broken, 0.5), elastic_net(broken, 0.5, 0.5), group_shrink(broken, 0.5)):
        assert bool(mapped[0, 0].isnan())


def test_the_proximal_map_reaches_zero_where_the_subgradient_only_jumps_about_it():
    target, amount, lr = torch.tensor([0.3, -0.2, 2.0], dtype=DOUBLE), 0.5, 0.1
    by_map, by_slope = torch.ones(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    for _ in range(500):
        by_map = soft_threshold(by_map - lr * (by_map - target), lr * amount)
        by_slope = by_slope - lr * (by_slope - target + amount * by_slope.sign())
    assert by_map[:2].tolist() == [0.0, 0.0]
    assert float(by_map[2]) == pytest.approx(1.5, abs=1e-12)
    assert bool((by_slope != 0).all())


# Gradient clipping.


def test_each_row_is_clipped_as_torch_clips():
    grads = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [1.0], [5.0], [0.0]])
    expected = []
    for row in grads:
        parameter = nn.Parameter(torch.zeros(7))
        parameter.grad = row.clone()
        nn.utils.clip_grad_norm_([parameter], 0.5)
        expected.append(parameter.grad)
    before = grads.clone()
    assert clip_norm(grads, 0.5) is grads
    assert torch.allclose(grads, torch.stack(expected), rtol=0, atol=1e-7)
    assert torch.equal(grads[[0, 3]], before[[0, 3]])


def test_a_gradient_whose_squares_overflow_is_clipped_and_one_that_is_not_finite_is_left_to_be_found():
    grads = torch.tensor([[3e30, 4e30], [torch.nan, 1.0], [torch.inf, 1.0], [3.0, 4.0]])
    clip_norm(grads, 1.0)
    assert torch.allclose(grads[[0, 3]], torch.tensor([[0.6, 0.8], [0.6, 0.8]]), atol=1e-6)
    assert bool(grads[1, 0].isnan())
    assert grads[1:3, 1].tolist() == [1.0, 1.0]
    assert grads[2, 0] == torch.inf


# L2 and decay, against torch's optimisers.


def descend(optimizer, held_back: Penalties, rows: torch.Tensor, lr: float, steps: int = 6) -> list[torch.Tensor]:
    """Steps in place on gradients that are drawn; returns the gradients."""
    made, state, drawn = torch.Generator().manual_seed(1), optimizer.init(rows), []
    for step in range(steps):
        grads = torch.randn(rows.shape, generator=made, dtype=rows.dtype)
        drawn.append(grads.clone())
        held_back.gradient(grads, rows, rows[0], 0)
        held_back.before(rows, lr)
        optimizer.step(rows, grads, state, lr, step)
        held_back.after(rows, lr)
    return drawn


def torch_end(make, start: torch.Tensor, drawn: list[torch.Tensor]) -> torch.Tensor:
    parameter = nn.Parameter(start.clone())
    optimizer = make([parameter])
    for grads in drawn:
        parameter.grad = grads.clone()
        optimizer.step()
    return parameter.detach()


def test_l2_by_hand():
    """w = 2, g = 1, lambda = 0.1, lr = 0.5: w - 0.5 (1 + 0.1 * 2)."""
    model = nn.Linear(1, 1, bias=False).double()
    grads, rows = torch.ones(1, 1, dtype=DOUBLE), torch.full((1, 1), 2.0, dtype=DOUBLE)
    penalties(model, l2=0.1).gradient(grads, rows, rows[0], 1)
    Sgd().step(rows, grads, {}, 0.5, 0)
    assert float(rows) == pytest.approx(1.4, abs=1e-15)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_l2_is_the_weight_decay_of_torchs_sgd(momentum):
    model = mlp().double()
    rows = block(model)
    start = rows.clone()
    drawn = descend(Momentum(momentum) if momentum else Sgd(), penalties(model, l2=0.05), rows, 0.1)
    expected = torch_end(lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum, weight_decay=0.05), start, drawn)
    assert torch.allclose(rows, expected, rtol=0, atol=1e-12)


def test_l2_in_adam_is_torchs_adam_and_not_decoupled():
    model = mlp().double()
    rows = block(model)
    start = rows.clone()
    drawn = descend(Adam(), penalties(model, l2=0.05), rows, 0.1)
    coupled = torch_end(lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.05), start, drawn)
    decoupled = torch_end(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.05), start, drawn)
    assert torch.allclose(rows, coupled, rtol=0, atol=1e-12)
    assert float((rows - decoupled).abs().max()) > 1e-2


def test_weight_decay_in_adam_is_adamw_to_the_bit_and_torchs():
    model = mlp().double()
    ours, preset = block(model), block(model)
    start = ours.clone()
    drawn = descend(Adam(), penalties(model, weight_decay=0.05), ours, 0.1)
    descend(AdamW(weight_decay=0.05), penalties(model), preset, 0.1)
    assert torch.equal(ours, preset)
    torchs = torch_end(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.05), start, drawn)
    assert torch.allclose(ours, torchs, rtol=0, atol=1e-12)


def test_l2_alone_is_one_fused_addition_to_the_bit():
    model = mlp()
    rows, grads = block(model), block(model, seed=1)
    expected = grads.clone().add_(rows, alpha=1e-4)
    penalties(model, l2=1e-4).gradient(grads, rows, rows[0], rows.shape[1])
    assert torch.equal(grads, expected)


# The proximal term.


def test_the_proximal_term_holds_shared_weights_and_leaves_personal_ones_free():
    model = mlp()
    layout = Layout(model, lambda name, _: name.startswith("0."))
    shared = layout.size
    rows, start = block(model), block(model, 1, seed=2)[0, :shared]
    for flags in ({}, {"penalize_biases": False, "penalize_norms": False}):
        grads = torch.zeros_like(rows)
        Penalties(Regularization(proximal=0.3, **flags), model, layout.all).gradient(grads, rows, start, shared)
        assert torch.equal(grads[:, :shared], 0.3 * (rows[:, :shared] - start))
        assert not bool(grads[:, shared:].any())


# What penalties fall on.


class EveryLayer(nn.Module):
    """Never run: its parameters are what matters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.convolution = nn.Conv2d(4, 6, 3, groups=2)
        self.transposed = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.embedding = nn.Embedding(5, 3)
        self.recurrent = nn.LSTM(3, 2, bidirectional=True)
        self.attention = nn.MultiheadAttention(4, 2)
        self.batch = nn.BatchNorm2d(3)
        self.instance = nn.InstanceNorm2d(3, affine=True)
        self.group = nn.GroupNorm(1, 3)
        self.layer = nn.LayerNorm((2, 3))
        self.root = nn.RMSNorm(3)
        self.unbiased_scale = nn.Parameter(torch.ones(3))


NORMS = {"batch", "instance", "group", "layer", "root"}
BIASES = {
    "linear.bias",
    "convolution.bias",
    "transposed.bias",
    "recurrent.bias_ih_l0",
    "recurrent.bias_hh_l0",
    "recurrent.bias_ih_l0_reverse",
    "recurrent.bias_hh_l0_reverse",
    "attention.in_proj_bias",
    "attention.out_proj.bias",
}


@pytest.mark.parametrize("penalty", ["l1", "l2", "weight_decay", "elastic_net"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("norms", [True, False])
def test_flags_leave_biases_and_norms_out(penalty, biases, norms):
    model = EveryLayer()
    layout = Layout(model)
    said = {penalty: EVERY[penalty], "penalize_biases": biases, "penalize_norms": norms}
    held_back, rows = penalties(model, **said), block(model)
    before, grads = rows.clone(), torch.zeros_like(rows)
    held_back.gradient(grads, rows, rows[0], 0)
    held_back.before(rows, 0.5)
    held_back.after(rows, 0.5)
    found = {
        name: bool((grads[:, slot.slice] != 0).any() or (rows != before)[:, slot.slice].any())
        for slot, name in zip(layout, layout.names, strict=True)
    }
    of_norms = {name for name in layout.names if name.split(".")[0] in NORMS}
    assert len(of_norms) == 9
    expected = {name: norms if name in of_norms else biases if name in BIASES else True for name in layout.names}
    assert found == expected


@pytest.mark.parametrize("flags", [{}, {"penalize_biases": False}])
def test_the_amounts_of_what_is_left_in_do_not_depend_on_what_is_left_out(flags):
    model = mlp().double()
    layout, rows = Layout(model), block(model)
    expected = rows.clone()
    said = {name: amount for name, amount in EVERY.items() if name not in ("proximal", "group_lasso")}
    held_back = penalties(model, **said, **flags)
    grads = torch.zeros_like(rows)
    held_back.gradient(grads, rows, rows[0], 0)
    held_back.before(rows, 0.5)
    held_back.after(rows, 0.5)
    for slot in layout:
        w = expected[:, slot.slice]
        if flags and slot.name.endswith("bias"):
            assert torch.equal(rows[:, slot.slice], w)
            continue
        assert torch.allclose(grads[:, slot.slice], 0.3 * w, rtol=0, atol=1e-15)
        w = soft_threshold(w - 0.5 * 0.3 * w, 0.5 * 0.3)
        assert torch.allclose(rows[:, slot.slice], elastic_net(w, 0.15, 0.15), rtol=0, atol=1e-15)


@pytest.mark.parametrize("flags", [{}, {"penalize_biases": False}])
def test_each_client_has_its_own_rate(flags):
    model = mlp().double()
    held_back, together = penalties(model, **EVERY, **flags), block(model)
    apart = together.clone()
    rates = [0.1, 0.5, 0.0]
    lr = torch.tensor(rates, dtype=DOUBLE)[:, None]
    held_back.before(together, lr)
    held_back.after(together, lr)
    for i, rate in enumerate(rates):
        held_back.before(apart[i : i + 1], rate)
        held_back.after(apart[i : i + 1], rate)
    assert torch.allclose(together, apart, rtol=0, atol=1e-15)
    assert torch.equal(together[2], block(model)[2])


def test_no_penalty_changes_no_bit():
    model = EveryLayer()
    nothing, rows = penalties(model, penalize_biases=False, penalize_norms=False), block(model)
    before, grads = rows.clone(), block(model, seed=1)
    slopes = grads.clone()
    nothing.gradient(grads, rows, rows[0], rows.shape[1])
    nothing.before(rows, 0.5)
    nothing.after(rows, 0.5)
    assert torch.equal(rows, before)
    assert torch.equal(grads, slopes)
    assert nothing.active == (False, False, False)


@pytest.mark.parametrize(
    ("penalty", "active"),
    [
        ("l1", (False, False, True)),
        ("l2", (True, False, False)),
        ("weight_decay", (False, True, False)),
        ("elastic_net", (False, False, True)),
        ("group_lasso", (False, False, True)),
        ("proximal", (True, False, False)),
    ],
)
def test_a_penalty_says_where_it_acts(penalty, active):
    assert penalties(mlp(), **{penalty: EVERY[penalty]}).active == active


# The group lasso's groups.

LAYERS = {
    "linear": (nn.Linear(4, 6, bias=False), (2, 4)),
    "convolution": (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 5, 5)),
    "grouped convolution": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "depthwise convolution": (nn.Conv1d(4, 4, 3, groups=4, bias=False), (2, 4, 5)),
    "transposed convolution": (nn.ConvTranspose2d(4, 6, 3, bias=False), (2, 4, 5, 5)),
    "grouped transposed convolution": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "transposed convolution in one dimension": (nn.ConvTranspose1d(6, 4, 3, groups=2, bias=False), (2, 6, 5)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_a_group_is_all_that_an_output_channel_depends_on(layer, shape):
    layer = layer.double()
    outputs = layer(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE))
    rows, covered, groups, amount = block(layer, k=2), torch.zeros(layer.weight.numel()), [], 0.2
    for channel in range(outputs.shape[1]):
        (slopes,) = torch.autograd.grad(outputs[:, channel].sum(), layer.weight, retain_graph=True)
        groups.append(slopes.reshape(-1) != 0)
        covered += groups[-1]
        if channel % 2:
            rows[:, groups[-1]] *= 0.05
    assert bool((covered == 1).all())
    expected = rows.clone()
    for channel, group in enumerate(groups):
        for row in expected:
            row[group] *= max(0.0, 1 - amount * float(group.sum()) ** 0.5 / float(row[group].norm()))
            assert bool(row[group].any()) != bool(channel % 2)
    penalties(layer, group_lasso=0.4).after(rows, 0.5)
    assert torch.allclose(rows, expected, rtol=0, atol=1e-12)
    assert torch.equal(rows == 0, expected == 0)


def test_an_embeddings_group_is_a_row():
    layer = nn.Embedding(4, 3).double()
    rows = block(layer, k=1)
    expected = group_shrink(rows.view(4, 3).clone(), 0.2).reshape(1, -1)
    penalties(layer, group_lasso=0.4).after(rows, 0.5)
    assert torch.equal(rows, expected)


def test_the_group_lasso_leaves_biases_and_norms_of_any_shape_alone():
    model = EveryLayer()
    rows = block(model)
    before = rows.clone()
    penalties(model, group_lasso=100.0).after(rows, 1.0)
    alone = {slot.name for slot in Layout(model) if torch.equal(rows[:, slot.slice], before[:, slot.slice])}
    shrunk = {slot.name for slot in Layout(model) if not bool(rows[:, slot.slice].any())}
    assert alone == {*BIASES, "unbiased_scale"} | {name for name in Layout(model).names if name.split(".")[0] in NORMS}
    assert alone | shrunk == set(Layout(model).names)


# Through training.


def linear_problem(n: int = 60, features: int = 12, useful: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features, of which a few matter."""
    made = np.random.default_rng(0)
    x = made.normal(size=(n, features)) @ (np.eye(features) + 0.3 * made.normal(size=(features, features)))
    weights = np.concatenate([made.uniform(1, 3, useful), np.zeros(features - useful)])
    y = x @ weights + 1.5 + 0.5 * made.normal(size=n)
    return x, y


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("said", "theirs"),
    [
        ({"l1": 0.6}, Lasso(alpha=0.3, tol=1e-12, max_iter=100_000)),
        ({"elastic_net": {"l1": 0.6, "l2": 0.4}}, ElasticNet(alpha=0.5, l1_ratio=0.6, tol=1e-12, max_iter=100_000)),
    ],
    ids=["lasso", "elastic net"],
)
def test_training_ends_at_scikit_learns_coefficients(said, theirs, stacked):
    """Theirs is half of ours: 1/(2n) ||y - Xw||^2 + alpha (rho ||w||_1 + (1 - rho)/2 ||w||^2), the intercept spared."""
    x, y = linear_problem()
    theirs.fit(x, y)
    n, features = x.shape
    design = np.column_stack([x, np.ones(n)])
    steepest = 2 * np.linalg.eigvalsh(design.T @ design / n)[-1]
    model = nn.Linear(features, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    recipe = Recipe(
        batch_size=n,
        steps=4000,
        lr=1 / steepest,
        precision="float64",
        regularization={**said, "penalize_biases": False},
    )
    pool = Pool(x=torch.from_numpy(x), y=torch.from_numpy(y))
    training = trainer(model, pool, stacked=stacked, recipe=recipe, sizes=(n,), task=Regression())
    trained = training.train(np.arange(1), torch.zeros(features + 1, dtype=DOUBLE), 1)
    assert not trained.failures
    found = trained.updates.rows[0].numpy()
    assert 0 < (theirs.coef_ == 0).sum() < features
    assert ((found[:-1] == 0) == (theirs.coef_ == 0)).all()
    assert np.allclose(found[:-1], theirs.coef_, rtol=0, atol=1e-8)
    assert abs(found[-1] - theirs.intercept_) < 1e-8


@pytest.mark.parametrize("stacked", [True, False])
def test_penalties_act_alike_in_both_executions_and_once_a_step(stacked):
    """Ragged clients in mini-batches, all penalties at once, against plain steps on each client's own batches."""
    gentle = {"l1": 0.02, "l2": 0.3, "weight_decay": 0.3, "group_lasso": 0.02, "proximal": 0.3}
    gentle["elastic_net"] = {"l1": 0.02, "l2": 0.3}
    recipe = Recipe(batch_size=10, epochs=2, lr=0.1, regularization=gentle)
    model, pool, client = mlp(), digits_like(), 3
    training = trainer(model, pool, stacked=stacked, recipe=recipe)
    start = training.layout.flatten(model)
    trained = training.train(np.arange(len(SIZES)), start, 1)
    held_back = Penalties(recipe.regularization, model, training.layout.all)
    done = training.work(np.array([client]), 1)
    plan = schedule(done, [members()(client)], np.array([client]), 10, 0, 1)
    row = start.clone()[None]
    for step in range(len(plan.count)):
        training.layout.load(model, row[0])
        batch = pool.take(plan.index[step, 0, : plan.count[step, 0]])
        model.zero_grad()
        nn.functional.cross_entropy(model(batch["x"]), batch["y"]).backward()
        grads = torch.cat([p.grad.reshape(-1) for p in model.parameters()])[None]
        held_back.gradient(grads, row, start, len(start))
        held_back.before(row, 0.1)
        row -= 0.1 * grads
        held_back.after(row, 0.1)
    assert torch.allclose(trained.updates.rows[client], row[0] - start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stacked", [True, False])
def test_the_reported_loss_has_no_penalty_in_it(stacked):
    """At the first step the weights are the same, so the losses must be."""
    found = []
    for said in ({}, {**EVERY, "l2": 100.0, "label_smoothing": 0.3}):
        recipe = Recipe(batch_size=10, steps=1, lr=0.1, regularization=said)
        training = trainer(mlp(), digits_like(), stacked=stacked, recipe=recipe)
        found.append(training.train(np.arange(len(SIZES)), training.layout.flatten(mlp()), 1))
    assert torch.equal(found[0].loss, found[1].loss)
    assert not torch.allclose(found[0].updates.rows, found[1].updates.rows)


# The record.


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({}, ""),
        ({"dropout": 0.2, "penalize_biases": False}, ""),
        ({"l2": 1e-4}, "The reported training loss is the task's own: l2 0.0001 is not part of it."),
        (
            {"l2": 1e-4, "label_smoothing": 0.1},
            "The reported training loss is the task's own: l2 0.0001 and label smoothing 0.1 are not part of it.",
        ),
        (
            {"l1": 0.5, "elastic_net": {"l1": 0.1, "l2": 0.2}, "proximal": 1.0},
            "The reported training loss is the task's own: l1 0.5, elastic net l1 0.1, elastic net l2 0.2 and"
            " proximal 1 are not part of it.",
        ),
    ],
)
def test_the_record_says_what_the_training_loss_leaves_out(said, line):
    assert describe(Regularization(**said)) == line


@pytest.mark.parametrize("amount", [-1.0, float("nan")])
def test_a_threshold_that_is_none_is_refused(amount):
    with pytest.raises(ValueError, match="0 or more"):
        soft_threshold(torch.ones(3), amount)
