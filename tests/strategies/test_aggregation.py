from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies
from clients.errors import RunError
from strategies.aggregation import add_sums, mean, weighted_sum
from tests.strategies.problems import ETA, A, E, context, descend, play, updates


def random_rows(seed, n, d, dtype=torch.float64):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=made, dtype=torch.float64).to(dtype), torch.randint(1, 50, (n,), generator=made)


problems = given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 9))


@problems
@settings(max_examples=60, deadline=None)
def test_the_mean_is_the_weighted_average(seed, n, d):
    rows, weights = random_rows(seed, n, d)
    expected = (rows * weights[:, None]).sum(0) / weights.sum()
    assert torch.allclose(mean(rows, weights), expected, rtol=0, atol=1e-12)
    assert torch.allclose(mean(rows), rows.mean(0), rtol=0, atol=1e-12)


@problems
@settings(max_examples=60, deadline=None)
def test_order_scale_and_shift(seed, n, d):
    rows, weights = random_rows(seed, n, d)
    whole = mean(rows, weights)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(mean(rows[order], weights[order]), whole, rtol=0, atol=1e-12)
    shift = torch.arange(d, dtype=torch.float64)
    assert torch.allclose(mean(3 * rows + shift, weights), 3 * whole + shift, rtol=0, atol=1e-12)
    assert torch.allclose(mean(rows, 7 * weights), whole, rtol=0, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_equal_rows_give_that_row_and_a_single_client_itself(seed, n, dtype):
    rows, weights = random_rows(seed, n, 5, dtype)
    result = mean(rows[:1].expand(n, 5), weights)
    assert result.dtype == dtype
    assert torch.equal(result, rows[0])
    assert torch.equal(mean(rows[:1], weights[:1]), rows[0])


@problems
@settings(max_examples=40, deadline=None)
def test_a_client_of_twice_the_weight_is_two_clients(seed, n, d):
    rows, weights = random_rows(seed, n, d)
    doubled = weights.clone()
    doubled[0] *= 2
    twice = mean(torch.cat([rows, rows[:1]]), torch.cat([weights, weights[:1]]))
    assert torch.allclose(mean(rows, doubled), twice, rtol=0, atol=1e-12)


@problems
@settings(max_examples=40, deadline=None)
def test_inputs_are_not_changed(seed, n, d):
    rows, weights = random_rows(seed, n, d)
    kept = rows.clone(), weights.clone()
    mean(rows, weights)
    weighted_sum(updates(rows, weights))
    assert torch.equal(rows, kept[0])
    assert torch.equal(weights, kept[1])


def test_accumulation_is_in_float64():
    rows = torch.full((10_001, 1), 1e-4)
    rows[0] = 1e4
    expected = rows.double().mean()
    assert abs(float(mean(rows)) - float(expected)) <= float(expected) * 2**-24


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(RunError, match="total weight is zero"):
        mean(torch.ones(2, 3), torch.zeros(2))
    with pytest.raises(RunError, match="do not fit 3 rows"):
        mean(torch.ones(3, 3), torch.ones(2))
    with pytest.raises(RunError, match="n above 0"):
        mean(torch.ones(0, 3))
    with pytest.raises(RunError, match="finite and not negative"):
        mean(torch.ones(2, 3), torch.tensor([1.0, -1.0]))


@problems
@settings(max_examples=40, deadline=None)
def test_sums_of_chunks_are_the_sum_of_the_cohort(seed, n, d):
    rows, examples = random_rows(seed, n, d)
    u = strategies.Mean().prepare(updates(rows, examples), context()).send(extra=rows[:, :1])
    total = None
    for start in range(0, n, 3):
        total = add_sums(total, weighted_sum(u.select(torch.arange(start, min(start + 3, n)))))
    assert torch.allclose(total.rows[0], (rows * examples[:, None]).sum(0), rtol=0, atol=1e-9)
    assert float(total.weights) == float(examples.sum())
    assert torch.allclose(total.sends["extra"], rows[:, :1].sum(0, keepdim=True), rtol=0, atol=1e-12)
    combined, _, _ = strategies.Mean().combine(total, {}, context())
    assert torch.allclose(combined, mean(rows, examples), rtol=0, atol=1e-12)


def test_fedavg_with_one_full_step_is_gradient_descent():
    """With one local step, a round is a centralised step on sum_k p_k F_k (McMahan et al. 2017)."""
    n = torch.tensor([5, 3, 2])
    p = n.double() / n.sum()
    x = torch.tensor([0.7], dtype=torch.float64)
    rows = descend(x, torch.tensor([1, 1, 1])) - x
    row, _ = play(strategies.FedAvg(), rows, strategies.FedAvg().init(context(x)), context(x), n)
    assert abs(float(row - (x - ETA * (p * A * (x - E)).sum()))) < 1e-12


def test_fedavg_reaches_its_own_fixed_point_and_not_the_optimum():
    """x = sum p (1 - rho) e / sum p (1 - rho), rho = (1 - eta a)^tau: objective inconsistency (Wang et al. 2020)."""
    n, tau = torch.tensor([5, 3, 2]), torch.tensor([2, 5, 10])
    strategy = strategies.FedAvg()
    x = torch.zeros(1, dtype=torch.float64)
    state = strategy.init(context(x))
    for _ in range(400):
        x, state = play(strategy, descend(x, tau) - x, state, context(x), n)
    assert abs(float(x) - 2.900306011921243) < 1e-9
    assert abs(float((n * A * E).sum() / (n * A).sum()) - 2.421052631578947) < 1e-12


def test_uniform_weighting_counts_clients_alike():
    rows, examples = random_rows(0, 5, 3)
    strategy = strategies.FedAvg(weighting="uniform")
    weights = torch.zeros(3, dtype=torch.float64)
    row, _ = play(strategy, rows, strategy.init(context(weights)), context(weights), examples)
    assert torch.allclose(row, rows.mean(0), rtol=0, atol=1e-12)


def test_what_is_unbiased_over_cohorts_and_what_is_not():
    """All cohorts of 2 of 5: a cohort's uniform mean is unbiased for the uniform mean of all; the ratio estimator of
    FedAvg, weighted by examples, is not for the weighted mean, and its docstring says so."""
    rows, examples = random_rows(1, 5, 1)
    cohorts = [list(pair) for pair in combinations(range(5), 2)]
    uniform = torch.stack([mean(rows[c]) for c in cohorts]).mean(0)
    assert torch.allclose(uniform, rows.mean(0), rtol=0, atol=1e-12)
    ratio = torch.stack([mean(rows[c], examples[c]) for c in cohorts]).mean(0)
    assert float((ratio - mean(rows, examples)).abs()) > 1e-3
    assert "ratio estimator" in strategies.Mean.__doc__
