"""A lower bound of epsilon from what is released, and what it finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from clients.errors import RequestError, RunError
from strategies import FedAvg, Fixed, Poisson, Strategy
from strategies.accounting import gaussian_epsilon
from strategies.aggregation import Mean
from strategies.auditing import audit, epsilon_lower_bound, provable
from strategies.checks.canary_audit import CanaryAudit
from strategies.checks.check import CheckContext
from strategies.privacy import Clip, LocalNoise, Noise
from strategies.private import DPFedAvg
from tests.strategies.problems import context

CLIENTS = 30


def gaussians(z, trials, seed=0):
    """Scores of one release of a sum that the canary moves by 1, with noise z."""
    draws = np.random.default_rng(seed).normal(size=(2, trials)) * z
    return draws[0] + 1, draws[1]


# The bound by itself.


def test_what_is_told_apart_without_error_proves_what_clopper_and_pearson_allow():
    """All of the 500 that are held out on one side and none on the other: 1 - x^500 = 0.975 at both ends."""
    least = 0.025 ** (1 / 500)
    expected = math.log((least - 1e-3) / (1 - least))
    assert epsilon_lower_bound(np.ones(1000), np.zeros(1000), 1e-3) == pytest.approx(expected, rel=1e-9)
    assert provable(1000, 1e-3) == pytest.approx(expected, rel=1e-9)


def test_half_as_many_events_by_hand():
    """Held out: 60 of 100 reach the threshold with the canary, 5 of 100 without, as of the halves that chose it."""
    from scipy.stats import binomtest

    with_canary, without = [1.0] * 60 + [0.0] * 40, [1.0] * 5 + [0.0] * 95
    p = binomtest(60, 100).proportion_ci(0.95, "exact").low
    q = binomtest(5, 100).proportion_ci(0.95, "exact").high
    expected = max(math.log((p - 0.01) / q), math.log((1 - q - 0.01) / (1 - p)))
    assert epsilon_lower_bound(with_canary * 2, without * 2, 0.01) == pytest.approx(expected, rel=1e-9)


def test_both_directions_count():
    """Rarely missed is as telling as rarely reached."""
    often, always = [1.0] * 50 + [0.0] * 50, [1.0] * 100
    often, always = often * 4, always * 4
    bound = epsilon_lower_bound(often, always, 1e-3)
    assert bound > 1.5
    assert epsilon_lower_bound(always, often, 1e-3) == pytest.approx(bound)
    assert epsilon_lower_bound(-np.array(often), -np.array(always), 1e-3) == pytest.approx(bound)


def test_nothing_is_proven_by_equal_scores_or_few():
    assert epsilon_lower_bound(np.zeros(1000), np.zeros(1000), 1e-3) == 0
    assert epsilon_lower_bound([1.0, 1.0], [0.0, 0.0], 1e-3) == 0


def test_more_delta_or_confidence_proves_less_and_more_trials_prove_more():
    scores = gaussians(0.5, 2000)
    bounds = [epsilon_lower_bound(*scores, delta) for delta in (0.0, 1e-3, 0.1, 0.9)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 0 == bounds[-1]
    sure = [epsilon_lower_bound(*scores, 1e-3, confidence) for confidence in (0.5, 0.9, 0.999)]
    assert sure == sorted(sure, reverse=True)
    assert [provable(n, 1e-3) for n in (10, 100, 1000)] == sorted(provable(n, 1e-3) for n in (10, 100, 1000))


def test_the_gaussian_mechanism_is_caught_for_less_than_it_is_and_not_for_much_less():
    """At z = 0.5, epsilon is 7.0 at 1e-3; a threshold at the best place proves above 3 with 20,000 trials."""
    truth = gaussian_epsilon(0.5, 1e-3)
    bound = epsilon_lower_bound(*gaussians(0.5, 20_000), 1e-3)
    assert 3 < bound < truth


def test_the_bound_is_wrong_as_rarely_as_it_says():
    """Randomised response that keeps its bit with chance e / (1 + e) has epsilon 1, and one event shows all of it."""
    draws = np.random.default_rng(0)
    keeps = math.e / (1 + math.e)
    for confidence in (0.5, 0.95):
        wrong = 0
        for _ in range(200):
            with_canary, without = draws.random(400) < keeps, draws.random(400) > keeps
            wrong += epsilon_lower_bound(with_canary, without, 0.0, confidence) > 1
        # Binomial(200, 1 - confidence) at most; three standard deviations above its mean.
        allowed = 200 * (1 - confidence)
        assert wrong <= allowed + 3 * math.sqrt(allowed * confidence)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"with_canary": [1.0]}, "with_canary: .* at least 2"),
        ({"without": [1.0, math.nan]}, "without: .* finite"),
        ({"without": np.zeros((2, 2))}, "without"),
        ({"delta": 1.0}, "delta: 1.0 is out of range"),
        ({"delta": math.nan}, "delta"),
        ({"confidence": 1.0}, "confidence"),
    ],
)
def test_nonsense_is_refused(given, said):
    with pytest.raises(RequestError, match=said):
        epsilon_lower_bound(**{"with_canary": [1.0, 2.0], "without": [0.0, 1.0], "delta": 1e-3, **given})


# Whole strategies.


@dataclass(frozen=True)
class TenTimesTooLittle(Noise):
    def server_total(self, u, state, ctx):
        noised, state = super().server_total(u, state, ctx)
        return u.replace(rows=u.rows + (noised.rows - u.rows) / 10), state


@dataclass(frozen=True)
class OnlySaysSo(Clip):
    """Says that it clips, and does not."""

    def client(self, u, state, ctx):
        return u, state

    def server_each(self, u, state, ctx):
        return u


class Trusting(DPFedAvg):
    """Does not hold clients to their bound at last."""

    def _held(self, u, state):
        return u


class CountsWhoCame(Mean):
    """Says that it divides by the expected cohort, and divides by a quarter of it."""

    def unbounded(self):
        return super().unbounded()

    def combine(self, u, state, ctx):
        row, state, info = super().combine(u, state, ctx)
        return row * 4, state, info


def checked(strategy: Strategy, lasted=2, planned=None, seed=0, **settings):
    ctx = replace(
        context(torch.zeros(3), round=lasted, clients=CLIENTS, seed=seed), strategy=strategy, rounds=planned or lasted
    )
    return CanaryAudit(**{"canaries": 200, **settings}).run(CheckContext(**vars(ctx)))


HALF = Poisson(fraction=0.5)


def test_a_correct_strategy_passes_with_a_bound_between_nothing_and_its_epsilon():
    metrics, tables, figures = checked(DPFedAvg(0.5, sampling=HALF))
    told = DPFedAvg(0.5, sampling=HALF).guarantee(CLIENTS, 2)
    assert metrics["epsilon"] == told.epsilon
    assert 0 < metrics["epsilon_lower_bound"] < metrics["epsilon"]
    assert (metrics["confidence"], metrics["canaries"]) == (0.95, 200)
    assert metrics["provable"] == provable(200, told.delta)
    assert len(tables["scores"]) == 200
    assert {trace["name"] for trace in figures["scores"]["data"]} == {"with the canary", "without"}


@pytest.mark.parametrize(
    ("made", "parts"),
    [
        (DPFedAvg, {"plugins": (Clip(), TenTimesTooLittle(3.0))}),
        (Trusting, {"plugins": (OnlySaysSo(), Noise(3.0))}),
        (DPFedAvg, {"aggregator": CountsWhoCame("uniform", None, "expected"), "plugins": (Clip(), Noise(3.0))}),
    ],
    ids=["noise", "clip", "divisor"],
)
def test_what_is_broken_is_caught(made, parts):
    correct = DPFedAvg(3.0, sampling=HALF)
    assert checked(correct)[0]["epsilon"] < 1
    with pytest.raises(RunError, match=r"epsilon to be at least .* more than the 0\.\d+ that 2 rounds claim") as caught:
        checked(made(sampling=HALF, **parts))
    assert "\n" not in str(caught.value)


def test_scores_are_what_the_release_says_of_the_canary():
    """All take part, so with it they are 1 a round and without it 0, and z of noise a round."""
    strategy = DPFedAvg(0.5, sampling=Fixed(CLIENTS), clipping_norm=7.0, lr=1.0)
    ctx = context(torch.zeros(3), clients=CLIENTS)
    scores = audit(strategy, ctx, relation="add or remove one", rounds=3, trials=150)
    error = 0.5 * math.sqrt(3 / 150)
    assert scores.with_canary.mean() == pytest.approx(3, abs=4 * error)
    assert scores.without.mean() == pytest.approx(0, abs=4 * error)
    assert np.std(scores.without) == pytest.approx(0.5 * math.sqrt(3), rel=0.25)
    replaced = audit(strategy, ctx, relation="replace one", rounds=3, trials=30)
    assert replaced.without.mean() == pytest.approx(-3, abs=4 * 0.5 * math.sqrt(3 / 30))


def test_an_adaptive_norm_is_audited_as_it_stands_in_each_round():
    strategy = DPFedAvg(1.0, sampling=HALF, adaptive=True, clipping_norm=5.0)
    ctx = context(torch.zeros(3), clients=300)
    scores = audit(strategy, ctx, relation="add or remove one", rounds=8, trials=60)
    assert scores.with_canary.mean() == pytest.approx(4, abs=4 * math.sqrt((8 + 2) / 60))
    assert np.std(scores.without) == pytest.approx(math.sqrt(8), rel=0.35)


def test_an_audit_repeats_and_follows_the_seed():
    strategy = DPFedAvg(1.0, sampling=HALF)
    one, again, other = (checked(strategy, canaries=20, seed=seed)[1]["scores"] for seed in (0, 0, 1))
    assert one == again != other
    assert len({row["with_canary"] for row in one} | {row["without"] for row in one}) == 40


def test_fewer_rounds_are_held_against_what_fewer_rounds_claim():
    """A budget is for all the rounds that were planned, however many are played or took place."""
    strategy = DPFedAvg(target_epsilon=2.0, sampling=HALF)
    told = strategy.guarantee(CLIENTS, 50)
    asked, tables, _ = checked(strategy, lasted=5, planned=50, canaries=60, rounds=3)
    assert asked["epsilon"] == told.spent(3)
    spread = np.std([row["without"] for row in tables["scores"]])
    assert spread == pytest.approx(told.noise_multiplier * math.sqrt(3), rel=0.35)
    assert checked(strategy, lasted=4, planned=50, canaries=4)[0]["epsilon"] == told.spent(4)
    assert checked(strategy, lasted=2, planned=50, canaries=4, rounds=9)[0]["epsilon"] == told.spent(2)


def test_a_strategy_without_central_noise_has_nothing_to_audit():
    for strategy in (FedAvg(), FedAvg(plugins=[LocalNoise(epsilon=1.0)])):
        with pytest.raises(RequestError, match=r"^checks\.canary_audit: the strategy adds no noise on the server"):
            checked(strategy)
    with pytest.raises(RequestError, match=r"checks\.canary_audit\.canaries: 3 are too few"):
        CanaryAudit(canaries=3)


def test_it_goes_by_its_name():
    from clients import catalog
    from clients.parts import Part

    built = catalog.build(Part("canary_audit", {"canaries": 20, "confidence": 0.9}), "checks", None, key="checks")
    assert repr(built) == "CanaryAudit(canaries=20, confidence=0.9, rounds=None)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "rounds"),
    [
        (DPFedAvg(0.5, sampling=HALF), 10),
        (DPFedAvg(1.0, sampling=Poisson(fraction=0.2)), 50),
        (DPFedAvg(0.4, sampling=Fixed(10)), 5),
        (DPFedAvg(0.4, sampling=HALF, adaptive=True, clipping_norm=3.0), 5),
        (DPFedAvg(0.4, sampling=HALF, cap=20), 5),
    ],
    ids=["half", "many rounds", "fixed", "adaptive", "capped"],
)
def test_audits_of_correct_strategies_stay_below_epsilon(strategy, rounds):
    metrics, _, _ = checked(strategy, lasted=rounds, canaries=1500)
    assert 0 < metrics["epsilon_lower_bound"] < metrics["epsilon"]
