"""The averaging presets: what must hold of every weighted mean, and FedProx against FedAvg on synthetic data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
from strategies.averaging import FedAvg, FedAvgM, FedProx
from strategies.drift import FedDyn
from strategies.fair import QFedAvg
from strategies.normalized import FedNova
from tests.strategies.quadratics import EXAMPLES, UNIFORM_OPTIMUM, WEIGHTED_OPTIMUM, experiment, last_of, play, updates

#: Strategies whose first round is a mean of the updates, and whether clients count by examples.
MEANS = {
    "fedavg": (FedAvg(), True),
    "fedavg uniform": (FedAvg("uniform"), False),
    "fedavgm": (FedAvgM(), True),
    "fedprox": (FedProx(), True),
    "fednova": (FedNova(), True),
    "qfedavg of 0": (QFedAvg(0.0), False),
}
#: FedDyn's is twice the mean, since its server's half adds the mean once more.
FACTORS = {name: 1.0 for name in MEANS} | {"feddyn": 2.0}
RULES = MEANS | {"feddyn": (FedDyn(), False)}

number = st.floats(-100, 100)
cohorts = st.lists(st.tuples(number, number, st.integers(1, 40)), min_size=1, max_size=8)
X = torch.tensor([0.25, -3.0], dtype=torch.float64)


def moved(strategy, cohort) -> torch.Tensor:
    """How far a first round moves weights, for clients of (two numbers, examples) that all took four steps."""
    rows = torch.tensor([client[:2] for client in cohort], dtype=torch.float64)
    losses = torch.ones(len(cohort), dtype=torch.float64) if isinstance(strategy, QFedAvg) else None
    sends = {} if losses is None else {"loss_before": losses}
    return play(strategy, updates(rows, tuple(client[2] for client in cohort), 4, **sends), X)[0] - X


def near(a, b) -> bool:
    return torch.allclose(a, torch.as_tensor(b, dtype=torch.float64), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("name", RULES)
@given(cohorts, st.floats(-3, 3), number)
@settings(max_examples=20, deadline=None)
def test_order_scale_and_shift(name, cohort, scale, shift):
    strategy, factor = RULES[name][0], FACTORS[name]
    whole = moved(strategy, cohort)
    assert near(moved(strategy, cohort[::-1]), whole)
    turned = [(scale * a + shift, scale * b + shift, n) for a, b, n in cohort]
    assert near(moved(strategy, turned), scale * whole + factor * shift)


@pytest.mark.parametrize("name", RULES)
@given(number, number, st.lists(st.integers(1, 40), min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_clients_that_agree_get_what_they_say(name, a, b, examples):
    assert near(moved(RULES[name][0], [(a, b, n) for n in examples]), [FACTORS[name] * a, FACTORS[name] * b])


@pytest.mark.parametrize("name", RULES)
@given(cohorts)
@settings(max_examples=20, deadline=None)
def test_a_client_of_twice_the_examples_is_two_where_examples_count_and_one_where_they_do_not(name, cohort):
    strategy, by_examples = RULES[name]
    a, b, n = cohort[0]
    doubled = moved(strategy, [(a, b, 2 * n), *cohort[1:]])
    assert near(doubled, moved(strategy, [*cohort, cohort[0]] if by_examples else cohort))


def test_one_full_step_of_all_clients_is_a_step_on_the_weighted_objective():
    """Gradient descent on sum p_k F_k ends at its optimum (McMahan et al. 2017), the uniform mean at its own."""
    for weighting, optimum in (("examples", WEIGHTED_OPTIMUM), ("uniform", UNIFORM_OPTIMUM)):
        said = experiment({"name": "fedavg", "weighting": weighting}, rounds=80, examples=EXAMPLES, steps=1, lr=0.15)
        assert last_of(said).x == pytest.approx(optimum, abs=1e-9)


def test_a_simulation_reaches_fedavgs_own_fixed_point():
    """sum p (1 - rho) e / sum p (1 - rho) with rho = (1 - eta a)^10."""
    assert last_of(experiment({"name": "fedavg", "weighting": "uniform"}, rounds=40)).x == pytest.approx(
        2.629253137501482, abs=1e-12
    )


def losses(mu: float, seed: int, rounds: int = 60, **source: object) -> np.ndarray:
    """Test loss after each round of the paper's protocol."""
    said = fedsim.Experiment(
        rounds=rounds,
        seed=seed,
        data={"source": {"name": "synthetic", **source}, "partition": "natural", "clients": 30},
        model="logistic",
        client={"lr": 0.01, "batch_size": 10, "epochs": 20, "initialization": "xavier_uniform", "execution": "loop"},
        strategy={"name": "fedprox", "mu": mu, "clients_per_round": 10},
        evaluation={"every": 1},
    )
    return np.array([record.metrics["test"]["loss"] for record in fedsim.rounds(said, engine="inline")][1:])


@pytest.mark.slow
def test_a_proximal_term_slows_clients_that_are_alike():
    """As figure 2 of Li et al. 2020 ("Federated optimization in heterogeneous networks") has it for IID data."""
    assert losses(0.0, 1, rounds=30, iid=True)[-10:].mean() < losses(1.0, 1, rounds=30, iid=True)[-10:].mean()


@pytest.mark.slow
def test_a_proximal_term_helps_and_steadies_clients_that_differ():
    """The same figure for Synthetic(0, 0): the last 20 of 60 rounds, means of three seeds."""
    free, held = ([losses(mu, seed, alpha=0.0, beta=0.0)[-20:] for seed in range(3)] for mu in (0.0, 1.0))
    assert np.mean(held) < 0.6 * np.mean(free)
    assert np.mean([last.std() for last in free]) > 3 * np.mean([last.std() for last in held])
