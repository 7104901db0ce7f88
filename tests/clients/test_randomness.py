from __future__ import annotations

import numpy as np
import torch

from clients import randomness


def test_a_clients_draws_do_not_depend_on_who_else_is_drawn():
    many = randomness.uniforms(randomness.keys(3, "cohort", 7, np.arange(1000)), 5)
    one = randomness.uniforms(randomness.keys(3, "cohort", 7, 421), 5)
    assert np.array_equal(many[421], one[0])
    assert np.array_equal(randomness.uniforms(randomness.keys(3, "cohort", 7, 421), 3, start=2)[0], one[0, 2:])


def test_seed_purpose_round_and_client_all_count():
    keys = {
        randomness.key(seed, purpose, round, client)
        for seed in range(5)
        for purpose in ("a", "b", "ab")
        for round in range(20)
        for client in range(50)
    }
    assert len(keys) == 5 * 3 * 20 * 50


def test_draws_are_uniform_and_uncorrelated():
    draws = randomness.uniforms(randomness.keys(0, "x", 1, np.arange(20_000)), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    # Mean and variance of 80,000 uniforms: standard errors 0.00102 and 0.00027.
    assert abs(draws.mean() - 0.5) < 0.004
    assert abs(draws.var() - 1 / 12) < 0.0011
    correlations = np.corrcoef(draws.T)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(20_000)
    counts = np.bincount((draws[:, 0] * 100).astype(int), minlength=100)
    chi = ((counts - 200) ** 2 / 200).sum()
    assert chi < 160  # 99 degrees of freedom: exceeded once in 10,000


def test_values_are_the_same_on_every_machine():
    assert randomness.key(0, "cohort", 1, 2) == 5018047304222635413
    torch_draw = torch.rand(2, generator=randomness.generator(0, "cohort", 1, 2))
    again = torch.rand(2, generator=randomness.generator(0, "cohort", 1, 2))
    assert torch.equal(torch_draw, again)
    assert randomness.numpy_generator(0, "a").random() == randomness.numpy_generator(0, "a").random()
