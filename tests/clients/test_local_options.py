"""What a recipe asks of local training beside the optimiser: clipping, smoothing, precision, kept state, stopping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clients.batches import schedule
from clients.local_state import STEPS
from clients.optimizers import Adam, Momentum
from clients.recipe import Recipe
from clients.schedules import Cosine
from clients.task import Classification, Regression, Segmentation, Tokens
from tests.clients.problems import SIZES, Pool, apart, digits_like, members, mlp, trainer

CLIENTS = np.arange(len(SIZES))


def both(model=None, **settings):
    """One round of all clients, stacked and in a loop."""
    pool = settings.pop("pool", None) or digits_like()
    model, found = model or mlp(), []
    for stacked in (True, False):
        training = trainer(model, pool, stacked=stacked, **settings)
        trained = training.train(CLIENTS, training.layout.flatten(model), 1)
        assert not trained.failures
        found.append(trained)
    return found


def plain_steps(model, client, recipe, step, rounds=(1,)):
    """Calls ``step(batch, step of all)`` on the batches that a client would see in these rounds."""
    training, pool, count = trainer(model, digits_like(), stacked=False, recipe=recipe), digits_like(), 0
    for number in rounds:
        done = training.work(np.array([client]), number)
        plan = schedule(done, [members()(client)], np.array([client]), recipe.batch_size, 0, number)
        for i in range(len(plan.count)):
            step(pool.take(plan.index[i, 0, : plan.count[i, 0]]), count)
            count += 1


def test_gradient_clipping_is_torchs_for_every_client_of_a_stack():
    recipe = Recipe(batch_size=10, epochs=2, lr=0.5, gradient_clip=0.2, regularization={"l2": 0.01})
    stacked, loop = both(recipe=recipe)
    assert apart(stacked.updates.rows, loop.updates.rows) < 1e-5
    model = mlp()
    start = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.01)

    def step(batch, _):
        optimizer.zero_grad()
        F.cross_entropy(model(batch["x"]), batch["y"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()

    plain_steps(mlp(), 3, recipe, step)
    end = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.allclose(loop.updates.rows[3], end - start, atol=1e-5)


def test_label_smoothing_trains_on_smooth_labels_and_reports_the_plain_loss():
    recipe = Recipe(batch_size=50, epochs=1, lr=0.5, regularization={"label_smoothing": 0.2})
    stacked, loop = both(recipe=recipe)
    assert apart(stacked.updates.rows, loop.updates.rows) < 1e-5
    model, pool, client = mlp(), digits_like(), 0
    batch = pool.take(torch.from_numpy(members()(client)))
    outputs = model(batch["x"])
    assert abs(float(loop.loss[client]) - float(F.cross_entropy(outputs, batch["y"]).detach())) < 1e-6
    F.cross_entropy(outputs, batch["y"], label_smoothing=0.2).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert torch.allclose(loop.updates.rows[client], -0.5 * gradient, atol=1e-6)


def test_a_task_smooths_only_where_its_smoothed_loss_goes_with_its_loss():
    class Own(Classification):
        def loss(self, outputs, batch):
            return super().loss(outputs, batch) * 2

    class Both(Own):
        def smoothed_loss(self, outputs, batch, smoothing):
            return super().smoothed_loss(outputs, batch, smoothing) * 2

    assert [t.can_smooth for t in (Classification(), Segmentation(), Tokens(), Both())] == [True] * 4
    assert [t.can_smooth for t in (Regression(), Own())] == [False] * 2


def test_bfloat16_runs_the_model_low_and_keeps_rows_and_loss_in_float32():
    seen = []

    class Watching(Classification):
        def forward(self, model, batch):
            outputs = model(batch["x"])
            seen.append(outputs.dtype)
            return outputs

        def loss(self, outputs, batch):
            seen.append(outputs.dtype)
            return super().loss(outputs, batch)

    recipe = Recipe(batch_size=10, epochs=2, lr=0.1, precision="bfloat16")
    low = both(recipe=recipe, task=Watching())
    full = both(recipe=recipe.model_copy(update={"precision": "float32"}))
    assert set(seen[::2]) == {torch.bfloat16}
    assert set(seen[1::2]) == {torch.float32}
    for a, b in zip(low, full, strict=True):
        assert a.updates.rows.dtype == torch.float32
        assert 1e-5 < apart(a.updates.rows, b.updates.rows) < 0.05


@pytest.mark.parametrize("optimizer", [Momentum(), Adam()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("stacked", [True, False])
def test_a_kept_optimiser_state_goes_on_where_the_last_round_ended(optimizer, stacked):
    """Two rounds from each other's end are one long run of torch's optimiser; reset ones are not."""
    lr = 0.01
    recipe = Recipe(batch_size=10, epochs=2, lr=lr, optimizer_state="keep")
    model = mlp()
    training = trainer(model, digits_like(), stacked=stacked, recipe=recipe, optimizer=optimizer)
    weights, state = training.layout.flatten(model), {}
    start = weights
    for number in (1, 2):
        trained = training.train(np.array([3]), weights, number, state)
        weights, state = weights + trained.updates.rows[0], trained.state
    assert float(state[STEPS]) == 16
    plain = mlp()
    made = torch.optim.Adam if isinstance(optimizer, Adam) else lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)
    torchs = made(plain.parameters(), lr=lr)

    def step(batch, _):
        torchs.zero_grad()
        F.cross_entropy(plain(batch["x"]), batch["y"]).backward()
        torchs.step()

    plain_steps(model, 3, recipe, step, rounds=(1, 2))
    assert apart(weights - start, training.layout.flatten(plain) - start) < 1e-4
    reset = trainer(model, digits_like(), stacked=stacked, recipe=recipe, optimizer=optimizer)
    again = reset.train(np.array([3]), training.layout.flatten(model), 2).updates.rows[0]
    assert apart(again, trained.updates.rows[0]) > 1e-2


def test_schedules_by_round_and_by_local_step_multiply():
    model = mlp()
    recipe = Recipe(batch_size=10, epochs=3, lr=0.2)
    settings = {"schedule": Cosine(), "step_schedule": Cosine(floor=0.1), "rounds": 4, "recipe": recipe}
    stacked, loop = [], []
    for kind, found in ((True, stacked), (False, loop)):
        training = trainer(model, digits_like(), stacked=kind, **settings)
        found.append(training.train(CLIENTS, training.layout.flatten(model), 3).updates.rows)
    assert apart(stacked[0], loop[0]) < 1e-5

    total = 3 * 4  # client 3 holds 31 examples
    plain, start = mlp(), training.layout.flatten(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.2)

    def step(batch, at):
        by_round = (1 + np.cos(np.pi * 2 / 4)) / 2
        optimizer.param_groups[0]["lr"] = 0.2 * by_round * (0.1 + 0.9 * (1 + np.cos(np.pi * at / total)) / 2)
        optimizer.zero_grad()
        F.cross_entropy(plain(batch["x"]), batch["y"]).backward()
        optimizer.step()

    plain_steps(model, 3, recipe, step, rounds=(3,))
    assert torch.allclose(loop[0][3], training.layout.flatten(plain) - start, atol=1e-5)


class Overfitting:
    """A pool whose training labels are noise, so that validation soon gets worse."""

    def __init__(self, sizes, held=20):
        made = torch.Generator().manual_seed(3)
        self.sizes, self.held = sizes, held
        total = sum(sizes) + held * len(sizes)
        x = torch.randn(total, 12, generator=made)
        y = (x[:, 0] > 0).long()
        noisy = torch.rand(sum(sizes), generator=made) < 0.4
        y[: sum(sizes)][noisy] = torch.randint(4, (int(noisy.sum()),), generator=made)
        self.pool = Pool(x=x, y=y)

    def validation(self, client):
        begin = sum(self.sizes) + client * self.held
        return np.arange(begin, begin + self.held)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_client_stops_when_its_validation_loss_rises_and_sends_its_best(stacked):
    sizes = (30, 45, 20)
    data, clients = Overfitting(sizes), np.arange(3)
    recipe = Recipe(batch_size=10, epochs=40, lr=0.3, early_stopping={"patience": 2})
    model = mlp()
    settings = {"sizes": sizes, "recipe": recipe, "validation": data.validation}
    training = trainer(model, data.pool, stacked=stacked, **settings)
    weights = training.layout.flatten(model)
    trained = training.train(clients, weights, 1)
    per_epoch = np.array([3, 5, 2])
    epochs = trained.updates.steps.numpy() / per_epoch
    assert (epochs < 40).all()
    assert (epochs % 1 == 0).all()

    # The weights that it sends are those of its best epoch: training for just so long without stopping gives them.
    for client in clients.tolist():
        best = int(epochs[client]) - 2
        exact = recipe.model_copy(update={"epochs": best, "early_stopping": None})
        plain = trainer(model, data.pool, stacked=stacked, sizes=sizes, recipe=exact)
        alone = plain.train(np.array([client]), weights, 1).updates.rows[0]
        assert apart(trained.updates.rows[client], alone) < 1e-4
        members = torch.from_numpy(data.validation(client))
        training.layout.load(model, weights + alone)
        batch = data.pool.take(members)
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        assert abs(float(trained.report["validation_loss"][client]) - float(loss.detach())) < 1e-4
        training.layout.load(model, weights)


def test_whoever_stops_changes_nothing_for_the_rest_of_the_stack():
    sizes = (30, 45, 20)
    data = Overfitting(sizes)
    recipe = Recipe(batch_size=10, epochs=20, lr=0.3, early_stopping={"patience": 1})
    made = [
        trainer(mlp(), data.pool, stacked=stacked, sizes=sizes, recipe=recipe, validation=data.validation)
        for stacked in (True, False)
    ]
    stacked, loop = (t.train(np.arange(3), t.layout.flatten(mlp()), 1) for t in made)
    assert stacked.updates.steps.tolist() == loop.updates.steps.tolist()
    assert apart(stacked.updates.rows, loop.updates.rows) < 1e-4
    assert torch.allclose(stacked.loss, loop.loss, atol=1e-4)


def test_a_client_without_validation_examples_trains_to_the_end():
    recipe = Recipe(batch_size=10, epochs=3, lr=0.1, early_stopping={})
    training = trainer(mlp(), digits_like(), stacked=True, recipe=recipe, validation=lambda client: np.arange(0))
    plain = trainer(mlp(), digits_like(), stacked=True, recipe=recipe.model_copy(update={"early_stopping": None}))
    weights = training.layout.flatten(mlp())
    stopped, whole = (t.train(CLIENTS, weights, 1).updates for t in (training, plain))
    assert torch.equal(stopped.rows, whole.rows)
    assert torch.equal(stopped.steps, whole.steps)
