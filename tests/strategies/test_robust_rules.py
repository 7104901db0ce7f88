"""Every robust rule against its definition by brute force in float64, and the invariances that it has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from clients.errors import RequestError
from strategies.centres import (
    centered_clipping,
    centered_clipping_shares,
    fltrust,
    fltrust_shares,
    geometric_median,
    geometric_median_shares,
    norm_bounding,
    norm_bounding_shares,
)
from strategies.coordinates import mean_around_median, median, sign_majority, trimmed_mean
from strategies.mixing import bucketing, nearest_neighbor_mixing
from strategies.selection import (
    bulyan,
    bulyan_selection,
    dnc,
    dnc_selection,
    krum,
    krum_selection,
    multi_krum,
    multi_krum_selection,
)

#: Each rule as a function of rows alone, for n = 15 and f = 3. Bulyan with a smaller f is left out of the
#: invariances: its last choices have one neighbour, so that the nearest two tie and the first of them is taken.
RULES = {
    "median": median,
    "trimmed_mean": lambda rows: trimmed_mean(rows, 3),
    "krum": lambda rows: krum(rows, 3),
    "multi_krum": lambda rows: multi_krum(rows, 3),
    "bulyan": lambda rows: bulyan(rows, 3),
    "geometric_median": geometric_median,
    "dnc": lambda rows: dnc(rows, 3),
    "norm_bounding": norm_bounding,
    "centered_clipping": lambda rows: centered_clipping(rows, torch.zeros_like(rows[0]), 1.0, iterations=2),
    "fltrust": lambda rows: fltrust(rows, torch.linspace(-1, 2, rows.shape[1], dtype=rows.dtype)),
    "sign_majority": sign_majority,
}
#: A shift changes what a norm, an angle to the root and a sign are, and clipping moves with its center.
SHIFT = [name for name in RULES if name not in ("norm_bounding", "centered_clipping", "fltrust", "sign_majority")]
#: Clipping to a given radius has a length of its own, FLTrust gives the root's length, signs have none.
SCALE = [name for name in RULES if name not in ("centered_clipping", "fltrust", "sign_majority")]
#: Equal rows are clipped, get the root's length, or vote with their signs.
IDENTITY = [*SHIFT, "norm_bounding"]

seeds = st.integers(0, 10**6)


def drawn(seed, n=15, d=7, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(row, expected, atol=1e-9):
    return torch.allclose(row.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("name", RULES)
@given(seeds, seeds)
@settings(max_examples=15, deadline=None)
def test_the_order_of_clients_does_not_matter(name, seed, order):
    rows = drawn(seed)
    permuted = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(order))]
    assert close(RULES[name](permuted), RULES[name](rows))


@pytest.mark.parametrize("name", SHIFT)
@given(seeds, st.floats(-10, 10))
@settings(max_examples=15, deadline=None)
def test_a_shift_of_all_rows_shifts_the_result(name, seed, size):
    rows = drawn(seed)
    shift = size * torch.arange(rows.shape[1], dtype=torch.float64)
    assert close(RULES[name](rows + shift), RULES[name](rows) + shift, atol=1e-7)


@pytest.mark.parametrize("name", SCALE)
@given(seeds, st.sampled_from([1e-6, 0.3, 7.0, 1e5]))
@settings(max_examples=15, deadline=None)
def test_a_scale_of_all_rows_scales_the_result(name, seed, scale):
    rows = drawn(seed)
    assert close(RULES[name](rows * scale) / scale, RULES[name](rows), atol=1e-7)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_centred_clipping_is_equivariant_to_shifts_together_with_its_center(seed):
    rows, shift = drawn(seed), drawn(seed + 1, 1)[0]
    center = drawn(seed + 2, 1)[0]
    moved = centered_clipping(rows + shift, center + shift, 0.8, iterations=3)
    assert close(moved, centered_clipping(rows, center, 0.8, iterations=3) + shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", IDENTITY)
def test_equal_rows_give_that_very_row(name, dtype):
    row = drawn(5, 1, 40, dtype)
    result = RULES[name](row.expand(15, 40))
    assert result.dtype == dtype
    assert torch.equal(result, row[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_client_is_the_result_where_the_rule_takes_one(dtype):
    row = drawn(6, 1, 9, dtype)
    for rule in (median, geometric_median, norm_bounding):
        assert torch.equal(rule(row), row[0])
    assert torch.equal(trimmed_mean(row, 0), row[0])
    assert torch.equal(dnc(row, 0), row[0])
    assert torch.equal(centered_clipping(row, torch.zeros(9), math.inf), row[0])
    assert close(fltrust(row, row[0]), row[0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_inputs_are_not_changed_and_the_dtype_is_kept(name, dtype):
    rows = drawn(7, dtype=dtype)
    before = rows.clone()
    first = RULES[name](rows)
    assert first.dtype == dtype
    assert first.shape == rows.shape[1:]
    first.fill_(9)  # nor is the result a view of them
    assert torch.equal(rows, before)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_refused(name, value):
    rows = drawn(8)
    rows[3, 5] = value
    with pytest.raises(RequestError, match=r"row 3 is .* at column 5; leave out"):
        RULES[name](rows)


@pytest.mark.parametrize("name", RULES)
def test_what_is_no_matrix_of_rows_is_refused(name):
    for wrong in (torch.zeros(0, 3), torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64), [[1.0]]):
        with pytest.raises((RequestError, TypeError, AttributeError, IndexError)):
            RULES[name](wrong)


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        (trimmed_mean, lambda f: 2 * f + 1),
        (krum, lambda f: 2 * f + 3),
        (multi_krum, lambda f: 2 * f + 3),
        (bulyan, lambda f: 4 * f + 3),
        (dnc, lambda f: 2 * f + 1),
        (nearest_neighbor_mixing, lambda f: 2 * f + 1),
    ],
)
@pytest.mark.parametrize("f", [0, 1, 3])
def test_too_few_rows_for_f_are_refused(rule, least, f):
    rows = drawn(9, least(f))
    rule(rows, f)
    if least(f) > 1:
        with pytest.raises(RequestError, match=f"{least(f) - 1} rows are too few for num_malicious = {f}"):
            rule(rows[1:], f)
    for wrong in (-1, 1.0, True):
        with pytest.raises(RequestError, match=r"num_malicious: .* is not a whole number"):
            rule(rows, wrong)


# ------------------------------------------------------------------------------------------------- definitions


@given(seeds, st.integers(1, 12), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=40, deadline=None)
def test_the_median_is_numpys(seed, n, dtype):
    rows = drawn(seed, n, dtype=dtype)
    assert torch.equal(median(rows), torch.from_numpy(np.median(rows.numpy(), axis=0)))


@given(seeds, st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_trimmed_mean_is_scipys(seed, n, f):
    assume(2 * f < n)
    rows = drawn(seed, n)
    # Half a row more, since SciPy rounds a fraction down.
    assert close(trimmed_mean(rows, f), stats.trim_mean(rows.numpy(), (f + 0.5) / n if f else 0), 1e-12)
    assert close(trimmed_mean(rows, 0), rows.mean(0), 1e-12)


def test_values_are_trimmed_by_count():
    rows = torch.arange(100.0).repeat(2, 1).T
    rows[71:] = 1e9
    rows[:29] = -1e9
    assert close(trimmed_mean(rows, 29), [49.5, 49.5], 1e-6)  # int(0.29 * 100) is 28


def krum_order(rows, f):
    """Scores by the definition, best first; ties by index."""
    n = len(rows)
    scores = []
    for i in range(n):
        others = sorted(float(((rows[i] - rows[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(others[: max(1, n - f - 2)]))
    return sorted(range(n), key=lambda i: scores[i])


@given(seeds, st.integers(0, 3), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_krum_and_multi_krum_choose_as_by_brute_force(seed, f, more):
    rows = drawn(seed, 2 * f + 3 + more, 3)
    order = krum_order(rows, f)
    row, kept = krum_selection(rows, f)
    assert torch.equal(row, rows[order[0]])
    assert kept.nonzero().flatten().tolist() == order[:1]
    for m in (1, 2, len(rows) - f):
        row, kept = multi_krum_selection(rows, f, m)
        assert close(row, rows[order[:m]].mean(0), 1e-12)
        assert kept.nonzero().flatten().tolist() == sorted(order[:m])
    assert torch.equal(multi_krum(rows, f), multi_krum(rows, f, len(rows) - f))


def test_other_arguments_out_of_range_are_refused():
    rows, center = drawn(0), torch.zeros(7)
    for call in (
        lambda: centered_clipping(rows, center, 0.0),
        lambda: centered_clipping(rows, center, math.nan),
        lambda: centered_clipping(rows, center, iterations=0),
        lambda: centered_clipping(rows, center[:6]),
        lambda: centered_clipping(rows, center / 0),
        lambda: fltrust(rows, center[:1]),
        lambda: norm_bounding(rows, -1.0),
        lambda: norm_bounding(rows, weights=torch.ones(3)),
        lambda: geometric_median(rows, torch.zeros(15)),
        lambda: geometric_median(rows, torch.arange(-1.0, 14.0)),
        lambda: dnc(rows, 1, iterations=0),
        lambda: dnc(rows, 1, columns=0),
        lambda: bucketing(rows, 0),
        lambda: mean_around_median(rows, 16),
        lambda: mean_around_median(rows, 0),
    ):
        with pytest.raises(RequestError):
            call()
    assert torch.equal(krum(rows, np.int64(3)), krum(rows, 3))


def test_multi_krum_selects_from_1_to_n_less_f():
    for wrong in (0, 6):
        with pytest.raises(RequestError, match=f"num_selected: {wrong} is not from 1 to n - f = 5"):
            multi_krum(drawn(0, 7), 2, wrong)


def test_krums_ties_go_to_the_first():
    rows = torch.tensor([[9.0], [1.0], [0.0], [1.0], [0.0]])
    assert krum_selection(rows, 0)[1].tolist() == [False, True, False, False, False]
    assert krum_selection(torch.zeros(7, 2), 2)[1].tolist() == [True] + [False] * 6


@given(seeds, st.integers(0, 2), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_bulyan_is_iterated_krum_and_a_mean_around_the_median(seed, f, more):
    rows = drawn(seed, 4 * f + 3 + more, 5)
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        best = krum_order(rows[left], f)[0] if len(left) > 1 else 0
        chosen.append(left.pop(best))
    selected = rows[sorted(chosen)].numpy()
    away = np.abs(selected - np.median(selected, axis=0))
    nearest = np.argsort(away, axis=0, kind="stable")[: len(rows) - 4 * f]
    row, kept = bulyan_selection(rows, f)
    assert kept.nonzero().flatten().tolist() == sorted(chosen)
    assert close(row, np.take_along_axis(selected, nearest, axis=0).mean(0), 1e-12)


def test_bulyan_by_hand():
    """n = 7, f = 1: five choices, then the mean of the three values closest to their median.

    Of 7, with 4 neighbours, 3 and 2 score 1+1+4+4 and 3 comes first. Of 6, with 3, 2 scores 1+4+4. Of 5 (0, 1, 4, 5,
    100), with 2, both 1 and 4 score 1+9. Of 4 (0, 4, 5, 100), with 1, both 5 and 4 score 1. Of 3, 0 and 4 score 16.
    The median of 0, 1, 2, 3, 5 is 2, and 1, 2, 3 are closest.
    """
    rows = torch.tensor([[5.0], [0.0], [1.0], [3.0], [2.0], [4.0], [100.0]])
    row, kept = bulyan_selection(rows, 1)
    assert rows[kept].flatten().tolist() == [5.0, 0.0, 1.0, 3.0, 2.0]
    assert row.tolist() == [2.0]
    # 2, 1, 0.5, then 0.25 and 9, each the first of two that tie; 0.25, 0.5 and 1 are closest to 1.
    assert close(bulyan(torch.tensor([[0.25], [0.5], [1.0], [2.0], [9.0], [100.0], [400.0]]), 1), [1.75 / 3], 1e-7)


def test_of_two_values_as_close_to_the_median_the_smaller_counts():
    assert mean_around_median(torch.tensor([[0.0], [4.0], [6.0], [8.0], [30.0]]), 2).tolist() == [5.0]


@given(seeds, st.integers(3, 9), st.integers(2, 5))
@settings(max_examples=25, deadline=None)
@example(seed=91769, n=3, d=5)
def test_the_geometric_median_is_what_bfgs_finds(seed, n, d):
    rows, alpha = drawn(seed, n, d), torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.1
    points, weights = rows.numpy(), alpha.double().numpy()

    def objective(z):
        return float(weights @ np.linalg.norm(z - points, axis=1))

    def slope(z):
        return (weights / np.linalg.norm(z - points, axis=1)) @ (z - points)

    result = geometric_median(rows, alpha).numpy()
    found = optimize.minimize(objective, points.mean(0), jac=slope, method="BFGS", options={"gtol": 1e-11})
    assert objective(result) <= found.fun + 1e-9
    away = np.linalg.norm(result - points, axis=1)
    if away.min() > 1e-3:
        assert np.abs(result - found.x).max() < 1e-5
        assert np.abs(slope(result)).max() < 1e-7 * weights.sum() / away.min()


@given(seeds, st.integers(1, 9), st.booleans())
@settings(max_examples=40, deadline=None)
def test_on_a_line_the_geometric_median_is_the_median(seed, n, slanted):
    steps = drawn(seed, n, 1)
    rows = steps @ torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64) if slanted else steps
    assert close(geometric_median(rows), np.median(rows.numpy(), axis=0), 1e-8)


def test_the_geometric_median_at_a_row_is_that_row():
    """Three corners whose angle at the third is above 120 degrees: Fermat's point is that corner."""
    rows = torch.tensor([[-10.0, 1.0], [10.0, 1.0], [0.1, 0.2]])
    row, shares = geometric_median_shares(rows)
    assert torch.equal(row, rows[2])
    assert shares.tolist() == [0, 0, 1]


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_a_weight_of_two_is_two_rows(seed):
    rows = drawn(seed, 6, 4)
    weights = torch.tensor([2.0, 1, 1, 1, 1, 1])
    twice = torch.cat([rows[:1], rows])
    assert close(geometric_median(rows, weights), geometric_median(twice), 1e-7)
    assert close(norm_bounding(rows, 0.7, weights), norm_bounding(twice, 0.7), 1e-12)


@given(seeds, st.integers(1, 4), st.one_of(st.none(), st.floats(0.1, 5)))
@settings(max_examples=40, deadline=None)
def test_centred_clipping_by_its_definition(seed, iterations, radius):
    rows, center = drawn(seed, 6), drawn(seed + 1, 1)[0]
    v = center
    for _ in range(iterations):
        norms = (rows - v).norm(dim=1)
        tau = np.median(norms.numpy()) if radius is None else radius
        v = v + ((rows - v) * (tau / norms).clamp(max=1)[:, None]).mean(0)
    row, shares = centered_clipping_shares(rows, center, radius, iterations=iterations)
    assert close(row, v)
    assert close(center + shares @ (rows - center), v)
    if radius is not None and iterations == 1:
        assert float((row - center).norm()) <= radius * (1 + 1e-12)


def test_centred_clipping_without_a_bound_is_the_mean():
    rows = drawn(0)
    assert close(centered_clipping(rows, drawn(1, 1)[0], math.inf), rows.mean(0))
    at_center = centered_clipping(rows[:1].expand(3, 7), rows[0], 1e-3)
    assert torch.equal(at_center, rows[0])  # no row is 0 / 0 away


@given(seeds, st.one_of(st.none(), st.floats(0.1, 5)))
@settings(max_examples=30, deadline=None)
def test_norm_bounding_by_its_definition(seed, radius):
    rows, weights = drawn(seed, 6), torch.arange(1.0, 7.0, dtype=torch.float64)
    norms = rows.norm(dim=1)
    bound = np.median(norms.numpy()) if radius is None else radius
    factor = (bound / norms).clamp(max=1) * weights / weights.sum()
    row, shares = norm_bounding_shares(rows, radius, weights)
    assert close(shares, factor)
    assert close(row, factor @ rows)
    zeros = torch.zeros(3, 2)
    assert torch.equal(norm_bounding(zeros), zeros[0])


def test_f_rows_move_a_bounded_mean_by_f_m_over_n_at_most():
    rows = drawn(3, 10, 5)
    attacked = rows.clone()
    attacked[:3] = 1e6
    honest_only = rows.clone()
    honest_only[:3] = 0
    moved = norm_bounding(attacked, 0.5) - norm_bounding(honest_only, 0.5)
    assert float(moved.norm()) <= 3 * 0.5 / 10 + 1e-12


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_fltrust_by_its_definition(seed):
    rows, root = drawn(seed, 6, 3), drawn(seed + 1, 1, 3)[0]
    trust = (rows @ root / rows.norm(dim=1) / root.norm()).clamp(min=0)
    assume(float(trust.sum()) > 1e-6)
    expected = (trust / rows.norm(dim=1) * root.norm()) @ rows / trust.sum()
    row, shares = fltrust_shares(rows, root)
    assert close(row, expected)
    assert close(shares, trust / trust.sum())
    lengths = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 100 + 0.01
    assert close(fltrust(rows * lengths[:, None], root), expected)


def test_fltrust_trusts_what_points_where_the_root_does():
    root = torch.tensor([3.0, 4.0])
    assert close(fltrust(torch.tensor([[30.0, 40.0], [-1.0, -1.0]]), root), [3.0, 4.0], 1e-6)
    assert torch.equal(fltrust(torch.tensor([[-3.0, -4.0], [0.0, 0.0]]), root), torch.zeros(2))
    assert torch.equal(fltrust(torch.ones(2, 2), torch.zeros(2)), torch.zeros(2))


@given(seeds, st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_dnc_with_all_coordinates_drops_the_largest_projections(seed, f):
    rows = drawn(seed, 9, 5)
    centred = (rows - rows.mean(0)).numpy()
    along = (centred @ np.linalg.svd(centred)[2][0]) ** 2
    expected = np.sort(np.argsort(along)[: 9 - f])
    row, kept = dnc_selection(rows, f)
    assert kept.nonzero().flatten().tolist() == expected.tolist()
    assert close(row, rows[expected].mean(0))


def test_dnc_removes_a_planted_direction_and_intersects_its_iterations():
    rows = drawn(1, 20, 300, torch.float32)
    rows[[2, 5, 11]] += 6 * drawn(2, 1, 300, torch.float32)

    def kept(iterations, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return dnc_selection(rows, 3, generator, iterations=iterations, columns=100)[1]

    assert (~kept(5)).nonzero().flatten().tolist() == [2, 5, 11]
    honest = drawn(1, 20, 300, torch.float32)
    counts = [
        int(dnc_selection(honest, 3, torch.Generator().manual_seed(0), iterations=i, columns=20)[1].sum())
        for i in (1, 2, 3)
    ]
    assert counts[0] == 17
    assert counts[0] > counts[1] > counts[2]  # other coordinates drop other rows


def test_dnc_without_a_row_that_is_always_kept_takes_those_kept_most_often():
    rows = drawn(4, 5, 200)
    row, kept = dnc_selection(rows, 2, torch.Generator().manual_seed(0), iterations=40, columns=3)
    assert 1 <= int(kept.sum()) < 5
    assert close(row, rows[kept].mean(0))
    with pytest.raises(RequestError, match="drops all 5 rows"):
        dnc(rows, 2, fraction=2.5)


def test_the_majority_of_signs_with_ties_at_zero():
    rows = torch.tensor([[5.0, -1e9, 0.0, 1.0], [0.1, 1.0, 0.0, -1.0], [-9e9, 1.0, -1.0, 0.0]])
    assert sign_majority(rows).tolist() == [1, 1, -1, 0]


@given(seeds, st.integers(1, 9), st.integers(1, 10))
@settings(max_examples=30, deadline=None)
def test_buckets_are_means_of_a_partition(seed, n, size):
    rows = drawn(seed, n, 4)
    generator = torch.Generator().manual_seed(seed)
    means = bucketing(rows, size, generator)
    assert len(means) == math.ceil(n / size)
    sizes = torch.tensor([min(size, n - start) for start in range(0, n, size)], dtype=torch.float64)
    assert close(sizes @ means, rows.sum(0))
    if size == 1:
        assert torch.equal(means.sort(dim=0).values, rows.sort(dim=0).values)
    if size >= n:
        assert close(means[0], rows.mean(0))


@given(seeds, st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_mixing_averages_each_row_with_its_nearest(seed, f):
    rows = drawn(seed, 9, 4)
    nearest = torch.cdist(rows, rows).argsort(dim=1)[:, : 9 - f]
    assert close(nearest_neighbor_mixing(rows, f), rows[nearest].mean(1))
    assert torch.equal(nearest_neighbor_mixing(rows[:1].expand(9, 4), f), rows[:1].expand(9, 4))
