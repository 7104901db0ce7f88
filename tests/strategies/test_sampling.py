from __future__ import annotations

import numpy as np
import pytest

from clients.errors import RequestError
from strategies import All, Fixed, Poisson
from tests.strategies.problems import context


def cohorts(sampling, rounds=2000, clients=50, seed=0):
    return [sampling.cohort(context(round=r, clients=clients, seed=seed)) for r in range(1, rounds + 1)]


def test_fixed_is_without_replacement_ascending_and_fair():
    drawn = cohorts(Fixed(10))
    assert all(len(np.unique(c)) == 10 and (np.diff(c) > 0).all() for c in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=50)
    # Each client: Binomial(2000, 0.2), standard deviation 17.9.
    assert np.abs(counts - 400).max() < 5 * 17.9
    together = sum(0 in c and 1 in c for c in drawn)
    assert abs(together - 2000 * 10 * 9 / (50 * 49)) < 5 * 8.4


def test_poisson_sizes_are_binomial_and_may_be_zero():
    drawn = cohorts(Poisson(fraction=0.1))
    sizes = np.array([len(c) for c in drawn])
    assert abs(sizes.mean() - 5) < 5 * np.sqrt(4.5 / 2000)
    assert abs(sizes.var() - 4.5) < 0.8
    assert (sizes == 0).any()
    assert Poisson.amplifies
    assert not Fixed.amplifies


def test_samplers_are_coupled_by_one_uniform():
    """The Poisson cohort and the fixed one of that size are the same clients."""
    for r in range(1, 60):
        ctx = context(round=r, clients=80)
        poisson = Poisson(clients_per_round=8).cohort(ctx)
        if len(poisson):
            assert np.array_equal(Fixed(len(poisson)).cohort(ctx), poisson)


def test_all_and_more_than_there_are():
    assert np.array_equal(All().cohort(context(clients=7)), np.arange(7))
    assert np.array_equal(Fixed(fraction=1.0).cohort(context(clients=7)), np.arange(7))


def test_rounds_and_seeds_differ_and_repeat():
    a, b = cohorts(Fixed(5), rounds=20), cohorts(Fixed(5), rounds=20, seed=1)
    assert sum(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) < 3
    assert all(np.array_equal(x, y) for x, y in zip(a, cohorts(Fixed(5), rounds=20), strict=True))


def test_nonsense_is_refused():
    for kind in (Fixed, Poisson):
        with pytest.raises(RequestError, match="one of the two"):
            kind()
        with pytest.raises(RequestError, match="one of the two"):
            kind(5, 0.1)
        with pytest.raises(RequestError, match="0 clients cannot train"):
            kind(0)
        with pytest.raises(RequestError, match="not above 0 and at most 1"):
            kind(fraction=1.5)
