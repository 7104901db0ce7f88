"""FedProx (Li et al. 2020): the gradient, the fixed points of F_k(x) = a_k/2 (x - e_k)^2, and what is left free."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import clients.catalog
import fedsim
import strategies
from clients.hooks import Correction, Variables
from clients.parts import Part
from clients.recipe import Recipe
from clients.statistics import STATISTICS, Statistics
from clients.task import Task
from clients.weights import Layout
from strategies import FedAvg, FedProx, Prox
from tests.clients.problems import SIZES, Pool, digits_like, mlp, trainer
from tests.strategies.problems import ETA, A, E, context, play

TAU = (2, 5, 10)
EXAMPLES = torch.tensor([5, 3, 2])  # p = (0.5, 0.3, 0.2)


class Quadratics(Task):
    """Parameters x ``[m]``; client k's loss is a_k/2 ||x - e_k||^2 for its one example."""

    def forward(self, model, batch):
        return torch.stack([parameter.reshape(()) for parameter in model.parameters()]).expand(len(batch["a"]), -1)

    def loss(self, outputs, batch):
        return batch["a"] / 2 * (outputs - batch["e"][:, None]).square().sum(-1)


class Point(nn.Module):
    """Named numbers, from zero."""

    def __init__(self, *names: str):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros((), dtype=torch.float64)))


def locals_after(x, steps, *, lr=ETA, a=A, e=E, stacked=False, correction=None, proximal=0.0):
    """Each client's weights ``[k, 1]`` after so many of its own steps from ``x`` ``[1]``, through the trainer."""
    rows = []
    for client, count in enumerate(steps):
        recipe = Recipe(batch_size=1, steps=count, lr=lr, precision="float64", regularization={"proximal": proximal})
        training = trainer(
            Point("x"),
            Pool(a=a, e=e),
            stacked=stacked,
            recipe=recipe,
            sizes=(1,) * len(a),
            task=Quadratics(),
            correction=correction,
        )
        trained = training.train(np.array([client]), x, 1)
        assert not trained.failures
        rows.append(x + trained.updates.rows[0])
    return torch.stack(rows)


def fixed_point(strategy, steps, lr=ETA, proximal=0.0, rounds=100):
    x = torch.zeros(1, dtype=torch.float64)
    state = strategy.init(context(x))
    for _ in range(rounds):
        rows = locals_after(x, steps, lr=lr, correction=strategy.correction, proximal=proximal) - x
        x, state = play(strategy, rows, state, context(x), EXAMPLES)
    return float(x)


def test_the_gradient_gets_mu_times_the_way_from_the_global_weights():
    made = torch.Generator().manual_seed(0)
    grad, row = torch.randn(3, 5, generator=made), torch.randn(3, 5, generator=made)
    v = Variables(torch.randn(5, generator=made))
    kept = grad.clone(), row.clone(), v.weights.clone()
    assert torch.equal(Prox(0.3).gradient(grad, row, v, 0), grad + 0.3 * (row - v.weights))
    assert torch.equal(Prox(0.3).gradient(grad, v.weights.expand(3, -1), v, 0), grad)
    assert Prox(0.0).gradient(grad, row, v, 0) is grad
    assert all(torch.equal(a, b) for a, b in zip((grad, row, v.weights), kept, strict=True))


@pytest.mark.parametrize("stacked", [True, False])
def test_three_steps_by_hand(stacked):
    """x <- x - eta (a (x - e) + mu (x - x_t)) from x_t = 0.5, where the anchor stays x_t."""
    anchor = torch.tensor([0.5], dtype=torch.float64)
    expected = []
    for a, e in zip(A.tolist(), E.tolist(), strict=True):
        x = 0.5
        for _ in range(3):
            x = x - ETA * (a * (x - e) + 0.7 * (x - 0.5))
        expected.append([x])
    found = locals_after(anchor, (3, 3, 3), stacked=stacked, correction=Prox(0.7))
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


def test_the_fixed_point_of_uneven_work():
    """x = sum p (1 - rho) a/(a + mu) e / sum p (1 - rho) a/(a + mu) with rho = (1 - eta (a + mu))^tau."""
    assert fixed_point(FedProx(mu=1.0), TAU) == pytest.approx(2.796486040413818, abs=1e-12)


def test_the_fixed_point_of_uneven_work_by_the_recipes_term():
    assert fixed_point(FedAvg(), TAU, proximal=1.0) == pytest.approx(2.796486040413818, abs=1e-12)


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(mu=0.0)])
def test_without_a_term_it_is_fedavgs(strategy):
    assert fixed_point(strategy, TAU) == pytest.approx(2.900306011921243, abs=1e-12)


def test_the_fixed_point_of_exact_solutions():
    """x = sum p a/(a + mu) e / sum p a/(a + mu); at a rate of 0.2, 70 steps solve every client's problem."""
    assert fixed_point(FedProx(mu=1.0), (70, 70, 70), lr=0.2, rounds=40) == pytest.approx(1.639344262295082, abs=1e-12)


numbers = st.floats(-5, 5)


@settings(deadline=None, max_examples=25)
@given(
    st.floats(0.1, 4),
    numbers,
    numbers,
    st.lists(st.floats(0, 6), min_size=2, max_size=4).map(sorted),
    st.integers(1, 12),
)
def test_a_client_stays_the_closer_the_larger_mu(a, e, start, mus, steps):
    x = torch.tensor([start], dtype=torch.float64)
    problem = {"a": torch.tensor([a], dtype=torch.float64), "e": torch.tensor([e], dtype=torch.float64)}
    moved = [float((locals_after(x, (steps,), correction=Prox(mu), **problem) - x).abs()) for mu in mus]
    assert all(further >= nearer - 1e-12 for further, nearer in itertools.pairwise(moved))


@pytest.mark.parametrize("stacked", [True, False])
def test_clients_of_a_network_stay_the_closer_the_larger_mu(stacked):
    moved = []
    for mu in (0.0, 0.1, 1.0, 5.0):
        training = trainer(mlp(), digits_like(), stacked=stacked, correction=Prox(mu))
        trained = training.train(np.arange(len(SIZES)), training.layout.flatten(mlp()), 1)
        moved.append(trained.updates.rows.norm(dim=1))
    assert all(bool((further > nearer).all()) for further, nearer in itertools.pairwise(moved))


TERMS = {
    "correction": {"correction": Prox(2.0)},
    "recipe": {"proximal": 2.0},
}


def four_steps(model, layout, pool, sizes, correction=None, proximal=0.0, batch_norm="share_affine", **rest):
    """A trainer of four local steps under a term, if any."""
    recipe = Recipe(
        batch_size=10,
        steps=4,
        lr=0.1,
        precision="float64",
        batch_norm=batch_norm,
        regularization={"proximal": proximal},
    )
    settings = {"recipe": recipe, "layout": layout, "sizes": sizes, "correction": correction}
    return trainer(model, pool, stacked=True, **settings, **rest)


@pytest.mark.parametrize("said", TERMS.values(), ids=TERMS)
def test_personal_parameters_are_free(said):
    """Two numbers with the same loss: the shared one is held to the global weights, the personal one is not."""
    model = Point("shared", "personal")
    layout = Layout(model, lambda name, _: name == "shared")
    training = four_steps(model, layout, Pool(a=A, e=E), (1, 1, 1), task=Quadratics(), **said)
    start = torch.tensor([[0.5], [1.5], [-1.0]], dtype=torch.float64)
    trained = training.train(np.arange(3), torch.zeros(1, dtype=torch.float64), 1, {"personal": start})
    held, free = torch.zeros(3, dtype=torch.float64), start[:, 0].clone()
    for _ in range(4):
        held = held - 0.1 * (A * (held - E) + 2.0 * held)
        free = free - 0.1 * A * (free - E)
    assert torch.allclose(trained.updates.rows[:, 0], held, rtol=0, atol=1e-14)
    assert torch.allclose(trained.state["personal"][:, 0], free, rtol=0, atol=1e-14)


@pytest.mark.parametrize("said", TERMS.values(), ids=TERMS)
def test_batch_norms_running_statistics_are_free(said):
    """They come before every weight here, so they depend on the inputs alone, and the term must not show in them."""
    found = []
    pool, shared = digits_like((20, 30)), {"batch_norm": "share_all"}
    for term in (said, {}):
        model = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 4)).double()
        training = four_steps(model, Layout(model), pool, (20, 30), statistics=Statistics(model), **shared, **term)
        found.append(training.train(np.arange(2), training.layout.flatten(model), 1).updates)
    assert found[0].rows.shape[1] == 12 + 12 + 12 * 4 + 4
    assert torch.equal(found[0].sends[STATISTICS], found[1].sends[STATISTICS])
    assert not torch.allclose(found[0].rows, found[1].rows, rtol=1e-3)


@pytest.mark.parametrize("execution", ["stacked", "loop"])
@pytest.mark.parametrize("regularization", [{}, {"l2": 1e-3}], ids=["plain", "with l2"])
def test_a_run_without_a_term_is_fedavgs_to_the_bit_and_the_recipes_term_is_the_same(
    execution, regularization, tmp_path
):
    def sha(name, strategy, **more):
        client = {"execution": execution, "epochs": 2, "regularization": {**regularization, **more}}
        experiment = fedsim.Experiment(rounds=2, client=client, strategy=strategy)
        return fedsim.run(experiment, out=tmp_path / name, engine="inline").summary["weights_sha256"]

    plain = sha("fedavg", "fedavg")
    assert sha("zero", {"name": "fedprox", "mu": 0.0}) == plain
    held = sha("fedprox", {"name": "fedprox", "mu": 0.5})
    assert held != plain
    assert sha("composed", {"name": "fedavg", "correction": {"name": "prox", "mu": 0.5}}) == held
    assert sha("recipe", "fedavg", proximal=0.5) == held


def test_the_preset_is_its_composition():
    assert FedProx(mu=0.3) == FedAvg(correction=Prox(0.3))
    assert FedProx(mu=0.3) != FedProx(mu=0.4)
    assert FedProx(weighting="uniform").aggregator == strategies.Mean("uniform")
    assert FedProx().correction == Prox(0.01)
    assert repr(Prox(0.3)) == "Prox(mu=0.3)"
    assert isinstance(Prox(), Correction)


@pytest.mark.parametrize(("kind", "name"), [("strategies", "fedprox"), ("corrections", "prox")])
@pytest.mark.parametrize("mu", [-0.1, float("inf"), "0.1"])
def test_a_mu_that_makes_no_sense_is_refused(kind, name, mu):
    (line,) = clients.catalog.check(Part.of({"name": name, "mu": mu}), kind, key="strategy")
    assert line.startswith("strategy.mu: ")
    assert "of at least 0" in line
