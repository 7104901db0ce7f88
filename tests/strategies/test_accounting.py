"""Epsilon from noise and back, against the published figures and two libraries."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clients.errors import RequestError
from strategies import accounting
from strategies.accounting import (
    epsilon,
    gaussian_epsilon,
    gaussian_noise,
    noise_multiplier,
    noise_on_updates,
    relation,
)
from strategies.guarantees import Guarantee

# q, z, T, delta; epsilon by Renyi divergences, by PRV (an upper estimate within 0.01), by privacy loss distributions.
TABLE = [
    (0.01, 1.0, 1000, 1e-5, 2.101367, 1.8384, 1.8289),
    (0.01, 1.1, 10000, 1e-5, 5.632011, 5.2029, 5.1963),
    (0.01, 4.0, 10000, 1e-5, 1.035490, 0.9569, 0.9600),
    (0.1, 2.0, 100, 1e-3, 1.799004, 1.5541, 1.5439),
    (1.0, 1.0, 1, 1e-5, 4.728507, 4.3874, 4.37718),
    (1.0, 10.0, 100, 1e-5, 4.728507, 4.3874, 4.37722),
]


def opacus_rdp(q, z, steps, delta, orders=(*(1 + x / 10 for x in range(1, 100)), *range(11, 64))):
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rdp = compute_rdp(q=q, noise_multiplier=z, steps=steps, orders=list(orders))
        return get_privacy_spent(orders=list(orders), rdp=rdp, delta=delta)[0]


def opacus_prv(q, z, steps, delta):
    from opacus.accountants import create_accountant

    accountant = create_accountant(mechanism="prv")
    accountant.history = [(z, q, steps)]
    with np.errstate(divide="ignore"):
        return accountant.get_epsilon(delta)


def first_conversion(q, z, steps, delta):
    """Epsilon as papers had it before 2020: integer orders, ``rdp + log(1 / delta) / (order - 1)``."""
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = np.arange(2, 257)
    rdp = compute_rdp(q=q, noise_multiplier=z, steps=steps, orders=orders)
    return float(np.min(rdp + math.log(1 / delta) / (orders - 1)))


def both(q, z, steps, delta):
    given = {"noise_multiplier": z, "sampling_rate": q, "rounds": steps, "delta": delta}
    return epsilon(**given, accountant="pld"), epsilon(**given, accountant="rdp")


@pytest.mark.parametrize(("q", "z", "steps", "delta", "rdp", "prv", "pld"), TABLE)
def test_the_table_by_both_accountants_and_both_libraries(q, z, steps, delta, rdp, prv, pld):
    by_losses, by_divergences = both(q, z, steps, delta)
    assert by_divergences == pytest.approx(rdp, rel=1e-4)
    assert by_losses == pytest.approx(pld, abs=1.5e-2)
    assert opacus_rdp(q, z, steps, delta) == pytest.approx(by_divergences, rel=3e-3)
    upper = opacus_prv(q, z, steps, delta)
    assert upper == pytest.approx(prv, abs=1e-3)
    assert by_losses <= upper + 0.01 <= by_divergences


def test_without_sampling_it_is_exact_and_rounds_only_scale_the_noise():
    assert both(1.0, 1.0, 1, 1e-5)[0] == pytest.approx(4.377178095681137, rel=1e-12)
    assert both(1.0, 10.0, 100, 1e-5)[0] == pytest.approx(4.377178095681137, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")
@pytest.mark.parametrize(
    ("q", "z", "steps", "delta"), [(0.02, 0.8, 300, 1e-5), (0.3, 5.0, 40, 1e-4), (0.05, 20, 9, 1e-6)]
)
def test_other_rows_stand_between_what_opacus_says(q, z, steps, delta):
    by_losses, by_divergences = both(q, z, steps, delta)
    upper = opacus_prv(q, z, steps, delta)
    assert upper - 0.021 <= by_losses <= upper + 1e-3
    assert by_divergences == pytest.approx(opacus_rdp(q, z, steps, delta, accounting._ORDERS), rel=3e-3)


def test_the_published_anchors_are_ours_by_the_conversion_of_their_time():
    assert first_conversion(0.01, 4.0, 10_000, 1e-5) == pytest.approx(1.2586, abs=5e-3)  # Abadi et al. 2016: 1.26
    mcmahan = (5000 / 763_430, 1.0, 5000, 1e-9)
    assert first_conversion(*mcmahan) == pytest.approx(4.6338, abs=5e-3)  # McMahan et al. 2018: 4.634
    for row, old in (((0.01, 4.0, 10_000, 1e-5), 1.2586), (mcmahan, 4.6338)):
        by_losses, by_divergences = both(*row)
        assert 0.6 * old < by_losses < by_divergences < old


def test_a_population_of_digits_costs_what_it_did():
    """DP-FedAvg with q = 0.2 and 50 rounds at delta 1e-3, to 1 %."""
    for z, expected in ((0.5, 28.56), (1.0, 7.07), (2.0, 2.36), (4.0, 0.94)):
        assert both(0.2, z, 50, 1e-3)[0] == pytest.approx(expected, rel=1e-2)


# Cohorts of a fixed size.

FIXED = {"sampling_rate": 0.1, "rounds": 100, "delta": 1e-3, "clients": 100}


@pytest.mark.parametrize(("z", "amplified", "plain"), [(1.0, 79.33, 80.03), (2.0, 10.815, 27.18)])
def test_a_fixed_cohort_costs_the_lesser_of_two_bounds_and_says_which(z, amplified, plain):
    given = {"noise_multiplier": z, **FIXED}
    assert epsilon(**given, relation="replace one") == pytest.approx(amplified, rel=1e-3)
    assert epsilon(**given, relation="replace one by nothing") == pytest.approx(plain, rel=1e-3)
    assert epsilon(**given) == epsilon(**given, relation="replace one")
    assert relation(**given) == "replace one"
    # Poisson sampling at the same rate is much cheaper, which is why it is what private strategies draw by.
    poisson = epsilon(**{**given, "clients": None})
    assert poisson < 0.2 * epsilon(**given)


def test_a_large_fixed_cohort_earns_nothing():
    given = {"noise_multiplier": 1.0, "sampling_rate": 0.9, "rounds": 10, "delta": 1e-3, "clients": 100}
    assert relation(**given) == "replace one by nothing"
    plain = gaussian_epsilon(1 / math.sqrt(10), 1e-3)
    assert epsilon(**given) == plain
    assert epsilon(**given, accountant="rdp") > plain
    assert epsilon(**{**given, "sampling_rate": 1.0}) == plain


def test_the_sum_moves_by_twice_the_norm_when_a_client_is_replaced():
    """At rate 1 nothing is left but that: the Renyi bound is that of half the noise multiplier."""
    given = {"sampling_rate": 1.0, "rounds": 3, "delta": 1e-4}
    replaced = epsilon(noise_multiplier=2.0, **given, clients=50, relation="replace one")
    assert replaced == pytest.approx(epsilon(noise_multiplier=1.0, **given, accountant="rdp"), rel=1e-2)


# What holds for any numbers.

Z = st.floats(0.3, 20)
Q = st.sampled_from([1e-3, 0.02, 0.1, 0.5, 1.0])
T = st.integers(1, 300)
DELTA = st.sampled_from([1e-9, 1e-5, 1e-3])


@settings(max_examples=6, deadline=None)
@given(z=Z, q=Q, steps=T, delta=DELTA, factor=st.floats(1.05, 3), accountant=st.sampled_from(["pld", "rdp"]))
def test_less_noise_more_sampling_more_rounds_and_less_delta_never_cost_less(z, q, steps, delta, factor, accountant):
    def spent(z=z, q=q, steps=steps, delta=delta):
        return epsilon(noise_multiplier=z, sampling_rate=q, rounds=steps, delta=delta, accountant=accountant)

    least = spent() * (1 - 1e-6)
    assert spent(z=z / factor) >= least
    assert spent(q=min(1.0, q * factor)) >= least
    assert spent(steps=math.ceil(steps * factor)) >= least
    assert spent(delta=delta / factor) >= least
    # No sampling and Renyi divergences are bounds of it, too.
    assert both(q, z, steps, delta)[0] <= min(both(q, z, steps, delta)[1], gaussian_epsilon(z / steps**0.5, delta))


def calibrates(budget, **given):
    z = noise_multiplier(epsilon=budget, **given)
    assert epsilon(noise_multiplier=z, **given) <= budget
    assert epsilon(noise_multiplier=z * (1 - 1.1e-4), **given) > budget


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_calibration_gives_the_least_noise_and_never_too_little(accountant):
    calibrates(1.0, sampling_rate=0.1, rounds=100, delta=1e-3, accountant=accountant)
    calibrates(0.3, sampling_rate=1.0, rounds=7, delta=1e-6, accountant=accountant)
    calibrates(5.0, **FIXED, accountant=accountant)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(budget=st.floats(0.05, 30), q=Q, steps=T, delta=DELTA, accountant=st.sampled_from(["pld", "rdp"]))
def test_calibration_of_any_budget(budget, q, steps, delta, accountant):
    given = {"sampling_rate": q, "rounds": steps, "delta": delta, "accountant": accountant}
    # Where delta is the chance of being drawn at all, no noise is the least, and it is refused.
    assume(epsilon(noise_multiplier=1e-3, **given) > budget)
    calibrates(budget, **given)


def test_more_rounds_cost_more_at_every_one_of_them():
    guarantee = Guarantee("central", 1e-5, 0.6, rounds=400, sampling_rate=0.05)
    spent = [guarantee.spent(count) for count in (*range(6), 20, 21, 100, 101, 399, 400)]
    assert spent[0] == 0
    assert all(a < b for a, b in itertools.pairwise(spent))
    assert guarantee.epsilon == spent[-1]


def test_finer_grids_lie_in_coarser_ones():
    """Grids are powers of two apart, and a run's grid only gets coarser with its rounds."""
    steps = [accounting._interval(0.5, 0.1, bound) for bound in (1.0, 10.0, 100.0, 1e3, 1e4)]
    assert steps == sorted(steps)
    assert all(math.log2(step / 1e-3).is_integer() for step in steps)
    assert accounting._interval(30.0, 1e-3, 0.01) < 1e-3 / 64


# What is extreme.


def test_a_tiny_delta_is_not_left_to_rounding_errors_of_the_grid():
    """Without a correction, ten thousand convolutions give less than the exact value at 1e-10 and below."""
    from dp_accounting.pld import privacy_loss_distribution

    losses = privacy_loss_distribution.from_gaussian_mechanism(100.0, value_discretization_interval=1e-4)
    uncorrected = losses.self_compose(10_000)
    assert uncorrected.get_epsilon_for_delta(1e-12) < gaussian_epsilon(1.0, 1e-12)
    for delta in (2e-9, 1e-10, 1e-12, 1e-30):
        # A rate of nearly 1 goes through the grid; the truth is next to that without sampling.
        ours = epsilon(noise_multiplier=100.0, sampling_rate=1 - 1e-12, rounds=10_000, delta=delta)
        assert ours == pytest.approx(gaussian_epsilon(1.0, delta), rel=2e-2)
        assert ours >= gaussian_epsilon(1.0, delta) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("q", "z", "steps", "delta", "low", "high"),
    [
        (1.0, 0.2, 10_000, 1e-5, 127_000, 128_000),  # exact: 5 sqrt(T) standard deviations and half their square
        (0.1, 0.2, 10_000, 1e-5, 10_800, 10_950),  # by a grid of 1e-3, six million points large, 10,860
        (0.5, 0.3, 1000, 1e-5, 2690, 2700),  # likewise 2,696.3
        (0.1, 1e-3, 10, 1e-5, 1e6, 5.1e6),
        (1e-6, 0.2, 1000, 1e-5, 9.4, 9.6),
        (1e-6, 0.2, 1, 1e-5, 0, 0),  # nobody is in the round but with a chance below delta
        (0.01, 50.0, 10_000, 1e-5, 0.0585, 0.0595),  # in the limit a Gaussian of z / (q sqrt(T)) = 50: 0.05863
        (0.3, 1.0, 10**9, 1e-5, 1e8, 2e8),
        (0.3, 1e-60, 1, 1e-5, math.inf, math.inf),
    ],
)
def test_extreme_settings_stay_right(q, z, steps, delta, low, high):
    assert low <= both(q, z, steps, delta)[0] <= high


def test_orders_serve_little_noise_and_much():
    """Renyi divergences of one Gaussian are known at every order, so the best of all orders is."""
    for z in (0.05, 0.3, 1.0, 10.0, 60.0, 150.0):
        orders = 1 + np.logspace(-1.9, 4, 4000)
        best = orders / (2 * z**2) + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)
        found = epsilon(noise_multiplier=z, rounds=1, delta=1e-5, accountant="rdp")
        assert best.min() * (1 - 1e-6) <= found <= best.min() * 1.01


def test_no_release_costs_nothing_and_no_noise_everything():
    for accountant in ("pld", "rdp"):
        for clients in (None, 10):
            given = {"sampling_rate": 0.5, "delta": 1e-3, "accountant": accountant, "clients": clients}
            assert epsilon(noise_multiplier=1.0, rounds=0, **given) == 0
            assert epsilon(noise_multiplier=0.0, rounds=0, **given) == 0
            assert epsilon(noise_multiplier=0.0, rounds=1, **given) == math.inf


# The Gaussian mechanism by itself.


def test_the_analytic_gaussian_mechanism_and_back():
    assert gaussian_noise(1.0, 1e-5) == pytest.approx(3.730632, abs=1e-6)
    assert gaussian_noise(8.0, 1e-5) == pytest.approx(0.600229, abs=1e-6)
    for budget in (1e-3, 0.3, 2.0, 50.0):
        assert gaussian_epsilon(gaussian_noise(budget, 1e-6), 1e-6) == pytest.approx(budget, rel=1e-6)


def test_the_classical_noise_is_too_little_where_epsilon_is_large():
    classical = math.sqrt(2 * math.log(1.25 / 1e-5)) / 50
    assert gaussian_epsilon(classical, 1e-5) == pytest.approx(96.4, abs=0.1)


def test_a_noisy_count_and_noisy_updates_cost_what_they_shall_together():
    z = noise_on_updates(1.0, 5.0)
    assert z == pytest.approx(1.005038, abs=1e-6)
    # Two Gaussians are one whose noise multiplier is the harmonic sum, of squares; and by privacy losses, too.
    assert gaussian_epsilon((z**-2 + 10.0**-2) ** -0.5, 1e-5) == pytest.approx(4.3771781, abs=1e-7)
    from dp_accounting.pld import privacy_loss_distribution

    losses = [
        privacy_loss_distribution.from_gaussian_mechanism(each, value_discretization_interval=1e-3) for each in (z, 10)
    ]
    composed = losses[0].compose(losses[1]).get_epsilon_for_delta(1e-5)
    assert composed == pytest.approx(4.3771781, abs=1e-5)
    assert noise_on_updates(0.0, 5.0) == 0
    for infeasible in (10.0, 12.0):
        with pytest.raises(RequestError, match=r"infeasible.*go below 10"):
            noise_on_updates(infeasible, 5.0)


# What a run guarantees.


def test_a_guarantee_says_what_it_is_of():
    guarantee = Guarantee("central", 1e-3, 1.0, rounds=100, sampling_rate=0.1)
    assert guarantee.spent(0) == 0
    assert guarantee.epsilon == pytest.approx(4.784, abs=1e-3)
    assert guarantee.note == (
        "Epsilon is by client, add or remove one, central trust, delta 0.001, PLD accountant, Poisson sampling at 0.1;"
        " it covers the released weights only: not metrics, not the trials of tune."
    )
    told = guarantee.described()
    assert (told["unit"], told["relation"], told["trust"]) == ("client", "add or remove one", "central")
    assert (told["delta"], told["accountant"], told["sampling"]) == (1e-3, "pld", "poisson")
    assert "released weights only" in told["covers"]
    assert "no privacy" in Guarantee("central", 1e-3, 0.0, rounds=5).note
    assert Guarantee("central", 1e-3, 0.0, rounds=5).epsilon == math.inf


def test_a_fixed_cohorts_relation_is_chosen_once_for_all_rounds():
    """At z = 1, no amplification is the lesser bound for the first round and the greater for a hundred."""
    kind = {"sampling_rate": 0.1, "clients": 100}
    guarantee = Guarantee("central", 1e-3, 1.0, rounds=100, **kind)
    assert guarantee.relation == "replace one"
    assert "10 of 100 clients without replacement" in guarantee.note
    first = epsilon(noise_multiplier=1.0, rounds=1, delta=1e-3, **kind, relation="replace one")
    assert guarantee.spent(1) == first
    assert Guarantee("central", 1e-3, 1.0, rounds=1, **kind).relation == "replace one by nothing"
    assert Guarantee("central", 1e-3, 1.0, rounds=1, **kind).epsilon < first
    assert "no amplification" in Guarantee("central", 1e-3, 1.0, rounds=1, **kind).note


def test_local_trust_counts_a_clients_own_releases():
    z = gaussian_noise(1.0, 1e-5)
    guarantee = Guarantee("local", 1e-5, z, rounds=50)
    assert guarantee.spent(0) == 0
    assert guarantee.spent(1) == pytest.approx(1.0, rel=1e-9)
    assert guarantee.spent(4) == gaussian_epsilon(z / 2, 1e-5)
    assert guarantee.relation == "replace one"
    assert "largest that a client has spent" in guarantee.note
    assert guarantee.described()["accountant"] == "analytic"


# What is refused, in one line.

GOOD = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "rounds": 10, "delta": 1e-5}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("noise_multiplier", value) for value in (-1.0, math.nan, math.inf, "1")),
        *(("sampling_rate", value) for value in (0.0, -0.1, 1.1, math.nan)),
        *(("delta", value) for value in (0.0, 1.0, -1e-5, math.nan)),
        *(("rounds", value) for value in (-1, 1.5, True)),
        *(("accountant", value) for value in ("prv", "gdp", 3)),
        ("clients", 0),
    ],
)
def test_nonsense_is_refused_by_its_key(key, value):
    with pytest.raises(RequestError, match=f"^{key}: ") as refused:
        epsilon(**{**GOOD, key: value})
    assert len(refused.value.problems) == 1
    assert "\n" not in str(refused.value)


def test_what_is_no_number_of_clients_is_refused():
    with pytest.raises(RequestError, match=r"10\.5, which is no number of clients"):
        epsilon(**GOOD, clients=105)
    with pytest.raises(RequestError, match="no number of clients"):
        relation(**{**GOOD, "sampling_rate": 1e-3}, clients=100)
    with pytest.raises(RequestError, match="relation: 'replace one' does not go with Poisson"):
        epsilon(**GOOD, relation="replace one")
    with pytest.raises(RequestError, match="relation: 'add or remove one' does not go with cohorts of a fixed size"):
        epsilon(**GOOD, clients=100, relation="add or remove one")


def test_budgets_that_cannot_be_met_are_refused():
    given = {"sampling_rate": 0.1, "rounds": 10, "delta": 1e-5}
    for nonsense in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(RequestError, match=r"^epsilon: "):
            noise_multiplier(epsilon=nonsense, **given)
    with pytest.raises(RequestError, match="rounds: no release costs nothing"):
        noise_multiplier(epsilon=1.0, **{**given, "rounds": 0})
    with pytest.raises(RequestError, match=r"noise_multiplier of 0\.001 already"):
        noise_multiplier(epsilon=1e9, **given)
    with pytest.raises(RequestError, match=r"noise_multiplier above 1e\+06"):
        noise_multiplier(epsilon=1e-9, **{**given, "delta": 1e-9})


def test_the_accountants_library_is_imported_only_by_those_who_use_it():
    code = (
        "import sys, strategies, strategies.accounting as a;"
        "assert 'dp_accounting' not in sys.modules; assert 'scipy' not in sys.modules;"
        "a.epsilon(noise_multiplier=1.0, rounds=1, delta=1e-5); assert 'dp_accounting' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
