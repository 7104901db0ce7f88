from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from clients.hooks import Correction
from clients.optimizers import Adagrad, Adam, AdamW, Momentum, Nesterov, RMSprop, Sgd
from clients.recipe import Recipe
from clients.task import Classification
from clients.weights import Layout
from tests.clients.problems import SIZES, Pool, apart, digits_like, members, mlp, trainer

CLIENTS = np.arange(len(SIZES))
OPTIMIZERS = [Sgd(), Momentum(), Nesterov(), Adam(), AdamW(), RMSprop(), Adagrad()]


def both(model, pool, clients=CLIENTS, rounds=5, **settings):
    """The weights after some rounds of uniform averaging, trained stacked and in a loop."""
    found = []
    for stacked in (True, False):
        training = trainer(model, pool, stacked=stacked, **settings)
        weights = training.layout.flatten(model)
        for number in range(1, rounds + 1):
            trained = training.train(clients, weights, number)
            assert not trained.failures
            weights = weights + trained.updates.rows.mean(0)
        found.append(weights)
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_stacked_and_loop_agree_with_ragged_clients(optimizer):
    lr = 0.1 if isinstance(optimizer, Sgd) else 0.005
    recipe = Recipe(batch_size=10, epochs=3, lr=lr, regularization={"l2": 1e-3})
    stacked, loop = both(mlp(), digits_like(), recipe=recipe, optimizer=optimizer)
    assert apart(stacked, loop) < 1e-5


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_they_agree_to_1e10_with_float64_rows(optimizer):
    recipe = Recipe(batch_size=10, epochs=3, lr=0.01, regularization={"l2": 1e-3}, precision="float64")
    stacked, loop = both(mlp().double(), digits_like(), recipe=recipe, optimizer=optimizer)
    assert stacked.dtype == torch.float64
    assert apart(stacked, loop) < 1e-10


def test_they_agree_under_batch_norm_with_short_last_batches():
    sizes = tuple(size for size in SIZES if size > 1)
    clients = np.arange(len(sizes))
    stacked, loop = both(mlp(norm=True), digits_like(sizes), clients, sizes=sizes)
    assert apart(stacked, loop) < 1e-5


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(
            nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 5, 2), nn.GroupNorm(1, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 4)
        ),
        nn.Sequential(nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(30, 4)),
        nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 4)),
    ],
    ids=["conv1d", "conv2d", "layer_norm"],
)
def test_they_agree_for_other_layers(model):
    stacked, loop = both(model, digits_like(), rounds=2)
    assert apart(stacked, loop) < 1e-5


def test_a_client_trains_the_same_whoever_is_in_its_chunk():
    training = trainer(mlp(), digits_like(), stacked=False)
    weights = training.layout.flatten(mlp())
    whole = training.train(CLIENTS, weights, 1).updates
    for client in CLIENTS:
        alone = training.train(np.array([client]), weights, 1).updates
        assert torch.equal(alone.rows[0], whole.rows[client])


@pytest.mark.parametrize("stacked", [True, False])
def test_one_full_batch_step_of_all_is_one_step_of_centralised_descent(stacked):
    pool, model = digits_like(), mlp()
    recipe = Recipe(batch_size=max(SIZES), epochs=1, lr=0.5)
    training = trainer(model, pool, stacked=stacked, recipe=recipe)
    weights = training.layout.flatten(model)
    u = training.train(CLIENTS, weights, 1).updates
    assert u.steps.tolist() == [1] * len(SIZES)
    federated = weights + (u.rows * u.examples[:, None]).sum(0) / u.examples.sum()

    loss = nn.functional.cross_entropy(model(pool.columns["x"]), pool.columns["y"])
    loss.backward()
    central = weights - 0.5 * torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert torch.allclose(federated, central, rtol=0, atol=1e-6)


def test_training_is_plain_pytorch():
    """One client against a loop written out with torch.optim, on the same batches."""
    pool, model = digits_like(), mlp()
    recipe = Recipe(batch_size=10, epochs=2, lr=0.02, regularization={"l2": 0.01})
    training = trainer(model, pool, stacked=False, recipe=recipe, optimizer=Momentum())
    weights = training.layout.flatten(model)
    trained = training.train(np.array([3]), weights, 4)

    from clients.batches import schedule, work

    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
    done = work(recipe, np.array([SIZES[3]]), np.array([3]), 0, 4)
    plan = schedule(done, [members()(3)], np.array([3]), 10, 0, 4)
    losses = []
    for step in range(len(plan.count)):
        batch = pool.take(plan.index[step, 0, : plan.count[step, 0]])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()) * len(batch["y"]))
    update = Layout(model).flatten(model) - weights
    assert torch.allclose(trained.updates.rows[0], update, rtol=0, atol=1e-6)
    assert abs(float(trained.loss[0]) - sum(losses) / (2 * SIZES[3])) < 1e-5


def test_the_global_weights_and_the_users_model_are_left_alone():
    model = mlp()
    before = Layout(model).flatten(model)
    for stacked in (True, False):
        training = trainer(model, digits_like(), stacked=stacked)
        weights = before.clone()
        training.train(CLIENTS, weights, 1)
        assert torch.equal(weights, before)
        assert torch.equal(Layout(model).flatten(model), before)


def test_batch_norm_statistics_never_leave_and_never_pass_between_clients():
    sizes = tuple(size for size in SIZES if size > 1)
    model, pool = mlp(norm=True), digits_like(sizes)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = trainer(model, pool, stacked=False, sizes=sizes)
    weights = training.layout.flatten(model)
    whole = training.train(np.arange(len(sizes)), weights, 1).updates
    assert whole.rows.shape[1] == sum(p.numel() for p in model.parameters())
    assert not [name for name in training.layout.names if "running" in name or "num_batches" in name]
    alone = training.train(np.array([4]), weights, 1).updates
    assert torch.equal(alone.rows[0], whole.rows[4])
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())


class Counting(nn.Module):
    """A model whose buffer counts calls and enters the outputs: state must not pass from client to client."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * (1 + self.calls)


def test_buffers_start_anew_for_every_client():
    training = trainer(Counting(), digits_like(), stacked=False)
    weights = training.layout.flatten(training.model)
    whole = training.train(CLIENTS, weights, 1).updates
    alone = training.train(np.array([5]), weights, 1).updates
    assert torch.equal(alone.rows[0], whole.rows[5])


class Spiteful(Classification):
    """Raises on, or poisons, the batches of clients that hold an example of class 9 or 8."""

    def loss(self, outputs, batch):
        if not torch._C._functorch.is_batchedtensor(batch["y"]) and bool((batch["y"] == 9).any()):
            raise RuntimeError("nine")
        values = super().loss(outputs, {"y": batch["y"].clamp(max=3)})
        return values * torch.where(batch["y"] == 8, torch.nan, 1.0)


def test_a_client_that_raises_and_one_that_sends_nan_are_left_out_and_named():
    pool = digits_like()
    pool.columns["y"][members()(1)[0]] = 9
    pool.columns["y"][members()(3)[:3]] = 8
    training = trainer(mlp(), pool, stacked=False, task=Spiteful())
    weights = training.layout.flatten(training.model)
    trained = training.train(CLIENTS, weights, 1)
    assert trained.updates.clients.tolist() == [0, 2, 4, 5]
    assert [(f.client, f.kind) for f in trained.failures] == [(1, "client_failed"), (3, "dropped_update")]
    assert "RuntimeError: nine" in trained.failures[0].message
    assert "in loss" in trained.failures[0].traceback
    honest = trainer(mlp(), digits_like(), stacked=False).train(CLIENTS, weights, 1)
    assert torch.equal(trained.updates.rows[0], honest.updates.rows[0])


class Prox(Correction):
    """mu/2 ||w - w_global||^2 as a gradient, for the test."""

    def __init__(self, mu):
        self.mu = mu

    def gradient(self, grad, row, v, step):
        return grad + self.mu * (row - v.weights)


class ProxLoss(Correction):
    """The same as a loss, through another forward pass of the global model."""

    def __init__(self, mu):
        self.mu = mu

    def loss(self, call, batch, outputs, v):
        return self.mu * (outputs - call(v.weights, batch)).square().sum(-1)


@pytest.mark.parametrize("correction", [Prox(0.3), ProxLoss(0.3)], ids=["gradient", "loss"])
def test_corrections_act_alike_in_both_executions(correction):
    stacked, loop = both(mlp(), digits_like(), correction=correction)
    plain, _ = both(mlp(), digits_like())
    assert apart(stacked, loop) < 1e-5
    assert apart(stacked, plain) > 1e-3


def test_a_correction_of_nothing_changes_no_bit():
    stacked, loop = both(mlp(), digits_like(), correction=Prox(0.0))
    plain_stacked, plain_loop = both(mlp(), digits_like())
    assert torch.equal(stacked, plain_stacked)
    assert torch.equal(loop, plain_loop)


def test_dropout_is_reproducible_and_differs_between_clients():
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    pool = digits_like((20, 20))
    pool.columns["x"][20:], pool.columns["y"][20:] = pool.columns["x"][:20], pool.columns["y"][:20]
    recipe = Recipe(batch_size=20, epochs=1, lr=0.1)
    for stacked in (True, False):
        training = trainer(model, pool, stacked=stacked, sizes=(20, 20), recipe=recipe)
        weights = training.layout.flatten(model)
        torch.manual_seed(0)
        first = training.train(np.arange(2), weights, 1).updates.rows
        torch.manual_seed(1)
        state = torch.get_rng_state()
        again = training.train(np.arange(2), weights, 1).updates.rows
        assert torch.equal(first, again)
        assert torch.equal(torch.get_rng_state(), state)
        assert apart(first[0], first[1]) > 1e-2


def test_bfloat16_parameters_train_in_float32_rows():
    model = mlp().to(torch.bfloat16)

    class Low(Classification):
        def forward(self, model, batch):
            return model(batch["x"].to(torch.bfloat16)).float()

    for stacked in (True, False):
        training = trainer(model, digits_like(), stacked=stacked, task=Low())
        weights = training.layout.flatten(model)
        trained = training.train(CLIENTS, weights, 1)
        assert not trained.failures
        assert trained.updates.rows.dtype == torch.float32
        assert float(trained.updates.rows.norm(dim=1).min()) > 1e-4


def test_padded_examples_never_reach_the_loss():
    """Weighted values: a batch of zero weight has no gradient, and weights average as they should."""

    class Weighted(Classification):
        def loss(self, outputs, batch):
            return super().loss(outputs, batch), batch["w"]

    pool = digits_like()
    pool.columns["w"] = (torch.arange(len(pool.columns["y"])) % 3 != 0).float()
    stacked, loop = both(mlp(), pool, task=Weighted())
    assert apart(stacked, loop) < 1e-5
    pool = Pool(**pool.columns)
    pool.columns["w"] = torch.zeros(len(pool.columns["y"]))
    training = trainer(mlp(), pool, stacked=True, task=Weighted())
    assert training.train(CLIENTS, training.layout.flatten(training.model), 1).updates.rows.abs().max() == 0
