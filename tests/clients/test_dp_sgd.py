"""DP-SGD on clients: clipping, noise and accounting are Opacus' own, and the loop around them is the plain one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

import fedsim
from clients import randomness
from clients.batches import Work, schedule
from clients.dp_sgd import check_private, releases, spent
from clients.errors import RequestError
from clients.local_state import RELEASES
from clients.optimizers import Adam, Sgd
from clients.recipe import DpSgd, Recipe
from fedsim.assembly import assemble
from tests.clients.problems import SIZES, apart, digits_like, members, mlp, trainer
from tests.end_to_end.commands import run

CLIENTS = np.arange(len(SIZES))


def private(model=None, optimizer=None, clients=CLIENTS, pool=None, **dp):
    """One round of private training, and the trainer that did it."""
    recipe = Recipe(batch_size=10, epochs=2, lr=0.1, dp_sgd={"noise_multiplier": 1.0, **dp})
    model = model or mlp()
    training = trainer(model, pool or digits_like(), stacked=False, recipe=recipe, optimizer=optimizer)
    trained = training.train(clients, training.layout.flatten(model), 1)
    assert not trained.failures, trained.failures[0].traceback
    return trained, training


@pytest.mark.parametrize("optimizer", [Sgd(), Adam()], ids=lambda o: type(o).__name__)
def test_without_noise_and_clipping_it_is_plain_training(optimizer):
    dp, _ = private(optimizer=optimizer, noise_multiplier=0.0, max_grad_norm=1e9, sampling="shuffle")
    recipe = Recipe(batch_size=10, epochs=2, lr=0.1)
    plain = trainer(mlp(), digits_like(), stacked=False, recipe=recipe, optimizer=optimizer)
    expected = plain.train(CLIENTS, plain.layout.flatten(mlp()), 1)
    assert float((dp.updates.rows - expected.updates.rows).abs().max()) < (1e-6 if isinstance(optimizer, Sgd) else 1e-4)
    assert torch.allclose(dp.loss, expected.loss, atol=1e-5)


def test_a_step_is_opacus_own_on_the_same_batches_and_noise():
    trained, _ = private(max_grad_norm=0.3, sampling="poisson")
    client, model = 3, mlp()
    recipe = Recipe(batch_size=10, epochs=2, lr=0.1)
    done = trainer(model, digits_like(), stacked=False, recipe=recipe).work(np.array([client]), 1)
    plan = schedule(done, [members()(client)], np.array([client]), 10, 0, 1, poisson=True)
    start = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=0.3,
        expected_batch_size=10,
        generator=randomness.generator(0, "dp_sgd", 1, client),
    )
    for step in range(len(plan.count)):
        batch = digits_like().take(plan.index[step, 0, : plan.count[step, 0]])
        optimizer.zero_grad()
        F.cross_entropy(wrapped(batch["x"]), batch["y"]).backward()
        optimizer.step()
    end = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.allclose(trained.updates.rows[client], end - start, atol=1e-6)


def test_one_examples_influence_is_bounded_by_the_clipping_norm():
    """Without noise, a full batch: another example in one's place moves the gradient by at most 2 C / L, lr 1 of it."""
    moved = []
    for scale in (1.0, 1e4):
        pool = digits_like()
        pool.columns["x"][members()(1)[5]] *= scale
        recipe = Recipe(
            batch_size=40,
            epochs=1,
            lr=1.0,
            dp_sgd={"noise_multiplier": 0.0, "max_grad_norm": 0.5, "sampling": "shuffle"},
        )
        training = trainer(mlp(), pool, stacked=False, recipe=recipe)
        moved.append(training.train(np.array([1]), training.layout.flatten(mlp()), 1).updates.rows[0])
    assert 0 < float((moved[0] - moved[1]).norm()) <= 2 * 0.5 / 40 + 1e-6
    assert float(moved[0].norm()) <= 0.5 + 1e-6


class Silent(nn.Module):
    """Its loss does not depend on its many parameters, so that their gradients are noise alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.idle = nn.Linear(200, 100)

    def forward(self, x):
        return self.linear(x) + 0 * self.idle(x.new_zeros(len(x), 200)).sum(-1, keepdim=True)


def test_the_noise_has_the_stated_spread_and_is_keyed():
    model = Silent()
    recipe = Recipe(batch_size=40, epochs=1, lr=1.0, dp_sgd={"noise_multiplier": 2.0, "max_grad_norm": 0.5})
    training = trainer(model, digits_like(), stacked=False, recipe=recipe)
    weights = training.layout.flatten(model)
    first = training.train(np.array([1]), weights, 1).updates.rows[0]
    noise = first[training.layout.slots[2].slice]
    expected = 2.0 * 0.5 / 40
    assert abs(float(noise.std()) - expected) < 4 * expected / math.sqrt(2 * len(noise))
    assert torch.equal(first, training.train(np.array([1]), weights, 1).updates.rows[0])
    for other in (training.train(np.array([1]), weights, 2), training.train(np.array([4]), weights, 1)):
        assert apart(other.updates.rows[0][training.layout.slots[2].slice], noise) > 1


def test_empty_batches_are_steps_of_noise_alone():
    recipe = Recipe(batch_size=1, steps=40, lr=0.1, dp_sgd={"noise_multiplier": 1.0})
    training = trainer(mlp(), digits_like(), stacked=False, recipe=recipe)
    done = training.work(np.array([0]), 1)
    plan = schedule(done, [members()(0)], np.array([0]), 1, 0, 1, poisson=True)
    assert (plan.count[:, 0] == 0).any()
    trained = training.train(np.array([0]), training.layout.flatten(mlp()), 1)
    assert not trained.failures
    assert bool(torch.isfinite(trained.loss).all())
    assert int(trained.updates.steps[0]) == 40


@pytest.mark.parametrize(
    ("rate", "noise", "count", "delta", "rdp", "prv"),
    [
        (0.01, 1.0, 1000, 1e-5, 2.101365, 1.8384),
        (0.01, 1.1, 10000, 1e-5, 5.631992, 5.2029),
        (0.01, 4.0, 10000, 1e-5, 1.035490, 0.9569),
        (0.1, 2.0, 100, 1e-3, 1.799003, 1.5541),
        (1.0, 1.0, 1, 1e-5, 4.728507, 4.3874),
        (1.0, 10.0, 100, 1e-5, 4.728507, 4.3874),
    ],
)
def test_the_accountants_give_known_values(rate, noise, count, delta, rdp, prv):
    found = spent(DpSgd(noise_multiplier=noise, delta=delta), rate, count)
    tight = spent(DpSgd(noise_multiplier=noise, delta=delta, accountant="prv"), rate, count)
    assert abs(found - rdp) < 3e-3 * rdp
    assert abs(tight - prv) < 1.5e-2
    assert tight <= found + 0.01


def test_releases_and_no_noise():
    dp = DpSgd(noise_multiplier=1.0)

    def work_of(examples, per_epoch, steps):
        return Work(*(np.array([number]) for number in (examples, per_epoch, steps)))

    assert releases(dp, work_of(40, 4, 9), 10) == (0.25, 9)
    assert releases(dp, work_of(4, 1, 3), 10) == (1.0, 3)
    assert releases(dp.model_copy(update={"sampling": "shuffle"}), work_of(40, 4, 9), 10) == (1.0, 3)
    assert spent(DpSgd(noise_multiplier=0.0), 0.1, 5) == math.inf
    assert spent(dp, 0.1, 0) == 0.0


def test_a_clients_accountant_goes_on_from_round_to_round():
    trained, training = private(clients=np.array([3]))
    assert float(trained.state[RELEASES]) == 8
    again = training.train(np.array([3]), training.layout.flatten(mlp()), 2, trained.state)
    assert float(again.state[RELEASES]) == 16
    dp, rate = training.recipe.dp_sgd, 10 / 31
    assert float(trained.report["epsilon"]) == spent(dp, rate, 8)
    assert float(again.report["epsilon"]) == spent(dp, rate, 16)


MODELS = {
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)
    ),
    "layer norm": lambda: nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)),
    "no rule of Opacus": lambda: nn.Sequential(nn.Linear(12, 8), nn.PReLU(), nn.Linear(8, 4)),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_per_example_gradients_are_those_of_one_example_at_a_time(model):
    """Clipped by hand, example by example, against one private step without noise."""
    model = model()
    recipe = Recipe(
        batch_size=7, epochs=1, lr=1.0, dp_sgd={"noise_multiplier": 0.0, "max_grad_norm": 0.1, "sampling": "shuffle"}
    )
    training = trainer(model, digits_like(), stacked=False, recipe=recipe)
    row = training.train(np.array([2]), training.layout.flatten(model), 1).updates.rows[0]
    batch, total = digits_like().take(torch.from_numpy(members()(2))), 0
    for i in range(7):
        model.zero_grad()
        F.cross_entropy(model(batch["x"][i : i + 1]), batch["y"][i : i + 1]).backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        total = total + gradient * min(1.0, 0.1 / (float(gradient.norm()) + 1e-6))
    assert torch.allclose(row, -total / 7, atol=1e-6)


def test_what_mixes_examples_is_refused_with_the_mend():
    lines = check_private(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert len(lines) == 1
    assert "'1'" in lines[0]
    assert 'model.norm = "group"' in lines[0]
    assert "ModuleValidator.fix" in check_private(nn.LSTM(3, 3))[0]
    made = {"client": {"dp_sgd": {"noise_multiplier": 1.0}}}
    with pytest.raises(RequestError, match="replace_batch_norm"):
        assemble(fedsim.Experiment(model={"name": "mlp", "norm": "batch"}, **made))
    for settings, said in [
        ({"execution": "stacked"}, "client by client"),
        ({"precision": "bfloat16"}, "bfloat16"),
        ({"early_stopping": {}}, "validation examples without noise"),
    ]:
        with pytest.raises(RequestError, match=said):
            fedsim.Experiment(
                client={"dp_sgd": {"noise_multiplier": 1.0}, **settings}, data={"client_validation_fraction": 0.2}
            )
    with pytest.raises(RequestError, match="delta"):
        assemble(fedsim.Experiment(client={"dp_sgd": {"noise_multiplier": 1.0, "delta": 0.5}}))


def test_a_runs_ledger_has_every_clients_epsilon_and_the_largest(tmp_path):
    given = ["--set", "rounds=3", "--set", "client.epochs=1", "--set", "client.dp_sgd.noise_multiplier=1.0"]
    found = run(tmp_path, *given, "--out", "run")
    clients = fedsim.load(tmp_path / "run").clients
    assert clients["epsilon"].notna().all()
    assert found["epsilon"] == pytest.approx(clients["epsilon"].max())
    assert any("by example" in note and "local trust" in note for note in found["notes"])
    both = run(tmp_path, *given, "--out", "two", "--engine", "processes", "--workers", "2")
    assert (both["weights_sha256"], both["epsilon"]) == (found["weights_sha256"], found["epsilon"])
    none = run(tmp_path, *given[:4], "--set", "client.dp_sgd.noise_multiplier=0", "--out", "none")
    assert none["epsilon"] is None
    assert any("there is no privacy" in note for note in none["notes"])
