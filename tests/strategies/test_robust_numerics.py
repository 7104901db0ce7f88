"""Robust rules where arithmetic is hard: in float32 far from the origin, beside far outliers, on several threads."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import optimize

from clients.errors import RequestError
from strategies import columns
from strategies.centres import centered_clipping, fltrust, geometric_median, norm_bounding
from strategies.coordinates import median, sign_majority, trimmed_mean
from strategies.distances import squared_distances
from strategies.mixing import bucketing, nearest_neighbor_mixing
from strategies.selection import bulyan, dnc, krum, krum_selection, multi_krum


def drawn(seed, n, d):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_differences(rows):
    """Squared distances by their definition, in float64."""
    rows = rows.double()
    return np.array([[float(((x - y) ** 2).sum()) for y in rows] for x in rows])


def krum_by_differences(rows, f):
    square = by_differences(rows)
    return int(np.sort(square, axis=1)[:, 1 : len(rows) - f - 1].sum(1).argmin())


# ------------------------------------------------------------------------------------------------- cancellation


@pytest.mark.parametrize("outlier", [None, 1e6, 1e15])
@pytest.mark.parametrize("place", [0, 7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_krum_finds_the_true_minimiser_of_rows_that_nearly_agree(seed, outlier, place):
    """|w| about 1 and differences of 1e-4 in float32, where |x|^2 + |y|^2 - 2 x.y has no digit left."""
    rows = (drawn(seed, 1, 20_000) + 1e-4 * drawn(seed + 10, 12, 20_000)).float()
    if outlier is not None:
        rows[place] = outlier
    best = krum_by_differences(rows, 2)
    assert torch.equal(krum(rows, 2), rows[best])
    norms = (rows * rows).sum(1)
    naive = norms[:, None] + norms[None] - 2 * rows @ rows.T
    honest = torch.arange(12) != place
    expected = torch.from_numpy(by_differences(rows))
    error = (naive.double() - expected)[honest][:, honest].abs().max() / expected[honest][:, honest].max()
    assert error > 0.1  # the rows are as hard as they should be


def test_distances_are_right_within_every_group_however_far_apart_the_groups_are():
    """Two malicious groups, each nearly of one mind: their own distances must not come out as rounding errors."""
    center, spread = drawn(0, 1, 3_000), drawn(1, 14, 3_000)
    rows = center + 1e-4 * spread
    rows[5:8] += 1e6
    rows[8:10] -= 1e9
    rows[10:12] = rows[11] + 1e-3 * spread[10:12]
    rows[13] = rows[12]
    for given in (rows, rows.float()):
        found, expected = squared_distances("test", given.numpy()), by_differences(given)
        known = expected > 0
        assert np.abs(found[known] / expected[known] - 1).max() < 1e-9
        assert (found[~known] == 0).all()
        assert (found == found.T).all()


def test_the_outlier_itself_may_be_anything_finite():
    rows = drawn(0, 15, 50).float()
    rows[4] = torch.finfo(torch.float32).max
    honest = rows[torch.arange(15) != 4].double()
    for result in (
        krum(rows, 3),
        multi_krum(rows, 3),
        bulyan(rows, 3),
        median(rows),
        trimmed_mean(rows, 3),
        geometric_median(rows),
        dnc(rows, 3),
    ):
        assert float((result.double() - honest.mean(0)).norm()) < 12  # sqrt(d) is 7, the outlier 1e39 away
    with pytest.raises(RequestError, match="overflow float64; scale the rows down"):
        krum(torch.full((5, 2), 1e200, dtype=torch.float64) * torch.arange(5)[:, None], 1)


def test_the_geometric_median_beside_a_far_outlier_is_still_exact():
    """The limit of an outlier going to infinity along a direction u pulls by u, no more."""
    rows = drawn(3, 9, 4)
    rows[8] = 1e9 * torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    points = rows[:8].numpy()

    def gradient(z):
        away = z - points
        return (away / np.linalg.norm(away, axis=1, keepdims=True)).sum(0) - np.array([1.0, 0, 0, 0])

    found = optimize.root(gradient, points.mean(0), tol=1e-12)
    assert np.abs(geometric_median(rows).numpy() - found.x).max() < 1e-6


@pytest.mark.parametrize("n", [10, 50])
def test_the_geometric_median_converges_to_1e_8(n):
    rows = drawn(n, n, 8)
    points = rows.numpy()

    def gradient(z):
        away = z - points
        return (away / np.linalg.norm(away, axis=1, keepdims=True)).sum(0)

    found = optimize.root(gradient, points.mean(0), tol=1e-13)
    assert np.abs(geometric_median(rows).numpy() - found.x).max() < 1e-8
    bfgs = optimize.minimize(lambda z: np.linalg.norm(z - points, axis=1).sum(), points.mean(0), method="BFGS")
    assert np.abs(geometric_median(rows).numpy() - bfgs.x).max() < 1e-4


# ------------------------------------------------------------------------------------------------- estimation

MALICIOUS, CLIENTS, DIMENSIONS, DRAWS = 4, 20, 100, 30


def mean_error(rule, attack=None):
    """Mean of ||result - 1|| over 30 draws of honest rows N(1, I), the first f replaced by what an attack makes."""
    errors = []
    for draw in range(DRAWS):
        rows = 1 + drawn(1_000 + draw, CLIENTS, DIMENSIONS)
        if attack is not None:
            rows[:MALICIOUS] = attack(rows[:MALICIOUS], rows[MALICIOUS:])
        errors.append(float((rule(rows) - 1).norm()))
    return sum(errors) / DRAWS


def flipped(own, honest):
    return -own


def a_little_is_enough(own, honest):
    """z = ppf((n - s) / n) with s = n // 2 + 1 - f."""
    return (honest.mean(0) - 0.3853 * honest.std(0)).expand_as(own)


def test_estimation_errors_are_what_theory_says():
    """sqrt(d / n) for the mean, sqrt(pi d / 2 n) for the median, bias and noise of a mean with flipped signs."""
    n, d, f = CLIENTS, DIMENSIONS, MALICIOUS
    assert mean_error(lambda rows: trimmed_mean(rows, 0)) == pytest.approx(math.sqrt(d / n), rel=0.1)
    assert mean_error(median) == pytest.approx(math.sqrt(math.pi * d / (2 * n)), rel=0.1)
    bias = (1 - (n - 2 * f) / n) * math.sqrt(d)
    assert mean_error(lambda rows: trimmed_mean(rows, 0), flipped) == pytest.approx(math.sqrt(bias**2 + d / n), rel=0.1)
    assert mean_error(lambda rows: krum(rows, f)) < math.sqrt(d)


@pytest.mark.parametrize(
    "rule",
    [
        median,
        geometric_median,
        lambda rows: trimmed_mean(rows, MALICIOUS),
        lambda rows: multi_krum(rows, MALICIOUS),
        lambda rows: bulyan(rows, MALICIOUS),
        lambda rows: dnc(rows, MALICIOUS),
        lambda rows: centered_clipping(rows, torch.ones(DIMENSIONS, dtype=torch.float64), 10.0),
        lambda rows: fltrust(rows, torch.ones(DIMENSIONS, dtype=torch.float64)),
        lambda rows: trimmed_mean(nearest_neighbor_mixing(rows, MALICIOUS), MALICIOUS),
        lambda rows: geometric_median(bucketing(rows, 2)),
    ],
)
def test_every_rule_does_better_than_the_mean_under_flipped_signs(rule):
    assert mean_error(rule, flipped) < mean_error(lambda rows: rows.mean(0), flipped) - 0.4


def test_krum_falls_for_a_little_is_enough():
    """Baruch et al. 2019: the malicious rows are one and the same, close to many honest ones, and so the nearest."""
    for draw in range(DRAWS):
        rows = 1 + drawn(1_000 + draw, CLIENTS, DIMENSIONS)
        rows[:MALICIOUS] = a_little_is_enough(rows[:MALICIOUS], rows[MALICIOUS:])
        assert int(krum_selection(rows, MALICIOUS)[1].nonzero()) < MALICIOUS


# ------------------------------------------------------------------------------------------------- threads


def digest():
    rows = drawn(0, 23, 40_000).float()
    center = torch.zeros(40_000)
    results = [
        median(rows),
        trimmed_mean(rows, 4),
        krum(rows, 4),
        multi_krum(rows, 4),
        bulyan(rows, 4),
        geometric_median(rows),
        dnc(rows, 4),
        norm_bounding(rows),
        centered_clipping(rows, center, iterations=3),
        fltrust(rows, rows[0]),
        sign_majority(rows),
        nearest_neighbor_mixing(rows, 4),
        bucketing(rows, 3),
    ]
    return hashlib.sha256(b"".join(result.numpy().tobytes() for result in results)).hexdigest()


@pytest.mark.parametrize("cores", [1, 3, 8])
def test_results_have_the_same_bits_whatever_the_number_of_threads(cores, monkeypatch):
    import threadpoolctl

    before = digest()
    monkeypatch.setattr(columns, "_cores", lambda: cores)
    with threadpoolctl.threadpool_limits(cores):
        assert digest() == before


def test_the_callers_threads_are_left_alone():
    import threadpoolctl

    before = [library["num_threads"] for library in threadpoolctl.threadpool_info()]
    digest()
    assert [library["num_threads"] for library in threadpoolctl.threadpool_info()] == before
