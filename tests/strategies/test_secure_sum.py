"""Masked sums: exact whoever arrives, however the cohort is cut, and nothing but noise before they are added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clients import randomness
from clients.errors import RequestError, RunError
from clients.recipe import Recipe
from clients.updates import Updates
from strategies import Aggregator, Clip, FedAvg, FedBuff, FedDyn, FedNova, Mean, MedianRule, Plugin, QFedAvg, Scaffold
from strategies import masking as masks
from strategies.aggregation import add_sums
from strategies.context import Context
from strategies.masking import MODULUS, Grid
from strategies.secure_sum import SecureSum
from strategies.strategy import Strategy
from tests.strategies.problems import context


@dataclass(frozen=True)
class People:
    examples: np.ndarray

    @property
    def clients(self) -> int:
        return len(self.examples)

    @property
    def trainable(self) -> np.ndarray:
        return np.arange(self.clients)


class Opened(Aggregator):
    """Keeps the sum that a rule is given, as it is."""

    def __init__(self, weighting: str = "examples"):
        self.weighting, self.seen = weighting, []

    def prepare(self, u, ctx):
        return Mean(self.weighting).prepare(u, ctx)

    def combine(self, u, state, ctx):
        self.seen.append(u)
        return u.rows[0], state, {}


def ctx_of(cohort, d: int, examples=None, round: int = 1, seed: int = 0, population: int = 40) -> Context:
    people = People(np.full(population, 10) if examples is None else np.asarray(examples))
    made = context(torch.zeros(d), round=round, seed=seed)
    ids = torch.as_tensor(cohort, dtype=torch.int64)
    return replace(made, population=people, cohort=ids, rounds=10, recipe=Recipe(optimizer="sgd", lr=0.1))


def updates(rows, ctx: Context) -> Updates:
    """What the whole cohort has learnt."""
    assert ctx.cohort is not None
    return Updates(
        rows=torch.as_tensor(rows, dtype=torch.float32),
        clients=ctx.cohort,
        examples=torch.from_numpy(ctx.population.examples)[ctx.cohort],
        steps=torch.arange(len(ctx.cohort)) % 4 + 1,
        weights=torch.ones(len(ctx.cohort), dtype=torch.float64),
    )


def total(strategy: Strategy, u: Updates, ctx: Context, chunks=None) -> Updates:
    """The sum that arrives, of chunks (positions in ``u``) as workers contribute and reduce them."""
    state, found = strategy.broadcast(strategy.init(ctx)), None
    for chunk in [range(len(u))] if chunks is None else chunks:
        part = u.select(torch.as_tensor(list(chunk), dtype=torch.int64))
        kept = {name: torch.zeros(len(part), width) for name, width in strategy.client_state(ctx).items()}
        found = add_sums(found, strategy.reduce(strategy.contribute(part, state, kept, ctx)[0]))
    assert found is not None
    return found


def opened(u: Updates, ctx: Context, chunks=None, plugin: SecureSum | None = None, weighting: str = "examples"):
    """The sum as the rule gets it."""
    rule = Opened(weighting)
    strategy = Strategy(aggregator=rule, plugins=[plugin or SecureSum()])
    strategy.aggregate(total(strategy, u, ctx, chunks), strategy.init(ctx), ctx)
    return rule.seen[0]


def in_clear(u: Updates, clip: float, largest: float, cohort: int):
    """The same sum of whole numbers without a mask, by Python's integers."""
    steps = (2**31 - 1) // cohort
    sums = [0] * u.rows.shape[1]
    for row, weight in zip(u.rows.double().tolist(), u.examples.tolist(), strict=True):
        factor = weight / largest * (steps / clip)
        sums = [s + round(min(max(x, -clip), clip) * factor) for s, x in zip(sums, row, strict=True)]
    return torch.tensor(sums, dtype=torch.float64) * (clip / steps * largest), u.examples.sum().double()


# ------------------------------------------------------------------------------------------------ exactness


@st.composite
def rounds(draw):
    n, d = draw(st.integers(1, 30)), draw(st.integers(1, 7))
    seed = draw(st.integers(0, 2**31))
    random = np.random.default_rng(seed)
    population = draw(st.integers(n, 60))
    cohort = np.sort(random.permutation(population)[:n])
    ctx = ctx_of(cohort, d, random.integers(1, 10**6, population), round=draw(st.integers(1, 99)), seed=seed)
    rows = random.normal(0, draw(st.sampled_from([1e-7, 0.1, 5.0])), (n, d))
    order = random.permutation(n)[: draw(st.integers(1, n))]
    cuts = np.sort(random.integers(0, len(order) + 1, draw(st.integers(0, 4))))
    chunks = [chunk for chunk in np.split(order, cuts) if len(chunk)]
    plugin = SecureSum(clip=draw(st.sampled_from([0.3, 8.0])), neighbors=draw(st.sampled_from([None, 1, 2, 5, 100])))
    return updates(rows, ctx), ctx, chunks, plugin


@given(rounds())
@settings(max_examples=150, deadline=None)
def test_the_sum_is_that_of_the_whole_numbers_to_the_bit_whoever_arrives_and_however_it_is_cut(drawn):
    u, ctx, chunks, plugin = drawn
    found = opened(u, ctx, chunks, plugin)
    arrived = u.select(torch.as_tensor(np.concatenate(chunks)))
    row, weight = in_clear(arrived, plugin.clip, float(ctx.population.examples.max()), len(u))
    assert torch.equal(found.rows[0], row)
    assert found.weights.tolist() == [float(weight)]
    assert found.sends == {}


def test_one_that_answers_alone_is_read_from_under_the_masks_of_all_who_do_not():
    ctx = ctx_of(range(25), 6)
    u = updates(np.random.default_rng(0).normal(size=(25, 6)), ctx)
    assert torch.equal(opened(u, ctx, [[7]]).rows[0], in_clear(u.select(torch.tensor([7])), 8.0, 10.0, 25)[0])


def test_masks_that_nobody_takes_off_leave_no_trace_of_the_sum():
    ctx = ctx_of(range(8), 1000)
    u = updates(np.ones((8, 1000)), ctx)
    strategy = Strategy(aggregator=Opened(), plugins=[SecureSum()])
    partial = total(strategy, u, ctx, [range(7)])
    assert uniform(partial.rows[0].numpy() % MODULUS)


def test_an_update_that_is_not_finite_arrives_as_such_and_costs_the_others_nothing():
    ctx = ctx_of(range(6), 4)
    u = updates(np.random.default_rng(1).normal(size=(6, 4)), ctx)
    broken = u.replace(rows=u.rows.clone())
    broken.rows[2, 1], broken.rows[4, 0] = torch.nan, torch.inf
    strategy = Strategy(aggregator=(rule := Opened()), plugins=[SecureSum()])
    state = strategy.init(ctx)
    sent, _ = strategy.contribute(broken, strategy.broadcast(state), {}, ctx)
    usable = torch.isfinite(sent.rows).all(1)
    assert usable.tolist() == [True, True, False, True, False, True]
    strategy.aggregate(strategy.reduce(sent.select(usable)), state, ctx)
    assert torch.equal(rule.seen[0].rows[0], in_clear(u.select(usable), 8.0, 10.0, 6)[0])


@given(st.integers(1, 50), st.sampled_from([0.01, 1.0, 8.0]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_a_mean_is_off_by_no_more_than_is_said(n, clip, seed):
    random = np.random.default_rng(seed)
    ctx = ctx_of(range(n), 20, random.integers(1, 50, n), population=n)
    u = updates(random.uniform(-clip, clip, (n, 20)), ctx)
    found = opened(u, ctx, plugin=SecureSum(clip=clip))
    weights = u.examples.double()
    exact = (weights[:, None] * u.rows.double()).sum(0) / weights.sum()
    half_step = clip / ((2**31 - 1) // n) / 2
    most = n * float(ctx.population.examples.max()) / float(weights.sum()) * half_step
    assert float((found.rows[0] / found.weights - exact).abs().max()) <= most * (1 + 1e-6)


RULES = {
    "by examples": FedAvg,
    "uniform": lambda **parts: FedAvg("uniform", **parts),
    "capped": lambda **parts: FedAvg(aggregator=Mean("capped", 7), **parts),
    "expected": lambda **parts: FedAvg(aggregator=Mean("uniform", divisor="expected"), **parts),
    "normalised": FedNova,
    "dynamic": FedDyn,
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_give_what_they_give_without_masks(rule):
    ctx, make = ctx_of(range(0, 40, 3), 9, np.arange(1, 41)), RULES[rule]
    u = updates(np.random.default_rng(3).normal(0, 0.1, (14, 9)), ctx)
    plain, masked = make(), make(plugins=[SecureSum()])
    row, other = (s.aggregate(total(s, u, ctx), s.init(ctx), ctx)[0] for s in (plain, masked))
    assert torch.allclose(row, other, rtol=0, atol=2e-7)
    assert float(row.abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------------ what is sent


def uniform(words) -> bool:
    """Whether the bytes of words are uniform by a chi-square test."""
    found = np.bincount(np.asarray(words).astype(np.int64).astype(np.uint32).view(np.uint8), minlength=256)
    low, high = stats.chi2.interval(1 - 1e-6, 255)
    return bool(low < ((found - found.mean()) ** 2 / found.mean()).sum() < high)


def sent(u: Updates, ctx: Context, plugin: SecureSum | None = None) -> Updates:
    strategy = FedAvg(plugins=[plugin or SecureSum()])
    return strategy.contribute(u, strategy.broadcast(strategy.init(ctx)), {}, ctx)[0]


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("cohort", [1, 2, 12])
def test_what_a_client_sends_looks_the_same_whatever_it_is(cohort, value):
    ctx = ctx_of(range(cohort), 20_000)
    words = sent(updates(np.full((cohort, 20_000), value), ctx), ctx).rows.numpy()
    assert ((words >= 0) & (words < MODULUS) & (words % 1 == 0)).all()
    assert all(uniform(row) for row in words)
    assert not uniform(Grid(8.0, 10.0, cohort).words(torch.full((1, 20_000), value), torch.tensor([10.0]).double())[0])


def test_no_two_clients_rows_show_their_sum_or_difference():
    ctx = ctx_of(range(5), 20_000)
    words = sent(updates(np.ones((5, 20_000)), ctx), ctx).rows.numpy()
    for i in range(5):
        for j in range(i):
            assert uniform((words[i] + words[j]) % MODULUS)
            assert uniform((words[i] - words[j]) % MODULUS)
            assert abs(np.corrcoef(words[i], words[j])[0, 1]) < 0.04


def test_masks_are_a_round_s_own():
    u = updates(np.zeros((3, 20_000)), ctx_of(range(3), 20_000))
    one, other, seeded = (
        sent(u, ctx_of(range(3), 20_000, round=t, seed=s)).rows.numpy() for t, s in ((1, 0), (2, 0), (1, 1))
    )
    assert uniform((one - other)[0] % MODULUS)
    assert uniform((one - seeded)[0] % MODULUS)


def test_the_weight_is_masked_too_and_bytes_are_four_a_word():
    ctx = ctx_of(range(3), 50, [10, 20, 30])
    u = sent(updates(np.zeros((3, 50)), ctx), ctx)
    assert u.nbytes.tolist() == [4 * 50 + 4 + 8] * 3  # and how many examples a client holds, as ever
    assert set(u.sends["masked_weight"].tolist()).isdisjoint({10, 20, 30})
    assert u.weights.tolist() == [1, 1, 1]
    assert u.report["weight"].tolist() == [10, 20, 30]


def test_the_record_says_how_much_was_clamped():
    ctx = ctx_of(range(2), 3)
    u = updates([[0.5, -2.0, 3.0], [0.1, 1.0, -1.0]], ctx)
    assert sent(u, ctx, SecureSum(clip=1.0)).report["clamped"].tolist() == [2, 0]
    assert opened(u, ctx, plugin=SecureSum(clip=1.0)).rows[0] / 10 == pytest.approx([0.6, 0.0, 0.0], abs=1e-8)


# ------------------------------------------------------------------------------------------------ its parts


@given(st.integers(1, 2**21), st.floats(1e-6, 1e9), st.floats(1e-6, 1e6))
@settings(max_examples=300, deadline=None)
def test_no_sum_wraps_and_no_finer_step_would_do(n, largest, clip):
    grid = Grid(clip, largest, n)
    rows = torch.tensor([[clip, -clip, 2 * clip]], dtype=torch.float64)
    words = grid.words(rows, torch.tensor([largest], dtype=torch.float64))
    row, weight = (int(words[0, 0]), int(words[0, 3]))
    assert row == grid.steps == floor((2**31 - 1) / n)
    assert words[0, 1] == MODULUS - row
    assert words[0, 2] == row
    assert n * row < 2**31
    assert n * weight < 2**32 <= n * largest * 2.0 ** (grid.bits + 1) + n
    values, total_weight = grid.values(np.array([n * row, MODULUS - n * row, n * weight], dtype=np.uint32))
    assert values[0].tolist() == pytest.approx([n * largest * clip, -n * largest * clip])
    assert float(total_weight) == pytest.approx(n * largest, rel=n / 2**31)


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_neighbours_are_so_many_and_each_other_s(n, degree, seed):
    draws = np.random.default_rng(seed).random(n)
    near = masks.neighbors(draws, degree, np.arange(n))
    linked = np.zeros((n, n), dtype=bool)
    linked[np.arange(n)[:, None], near] = True
    assert (linked == linked.T).all()
    assert not linked.diagonal().any()
    assert (linked.sum(1) == near.shape[1]).all()
    assert near.shape[1] == min(n - 1, degree + degree % 2)
    reached = np.linalg.matrix_power(linked.astype(float) + np.eye(n), n) > 0
    assert reached.all()
    some = np.flatnonzero(draws < 0.5)
    assert (masks.neighbors(draws, degree, some) == near[some]).all()


def test_streams_are_those_of_the_keyed_draws():
    keys = randomness.keys(3, "mask", 2, np.arange(5))
    words = masks.mask(keys[:1], keys[:0], 9_000).view(np.uint64)
    assert np.array_equal((words >> np.uint64(11)) * 2.0**-53, randomness.uniforms(keys[:1], 4_500)[0])


@pytest.mark.parametrize("size", [1, 2, 7, 64, 30_001])
def test_streams_add_up_however_many_there_are(size):
    keys = randomness.keys(0, "mask", 1, np.arange(70))
    each = np.stack([masks.mask(key[None], keys[:0], size) for key in keys])
    expected = each[:50].sum(0, dtype=np.uint32) - each[50:].sum(0, dtype=np.uint32)
    assert np.array_equal(masks.mask(keys[:50], keys[50:], size), expected)
    assert not masks.mask(keys, keys, size).any()


# ------------------------------------------------------------------------------------------------ refusals


class Looks(Plugin):
    def server_each(self, u, state, ctx):
        return u


class Scales(Plugin):
    def client(self, u, state, ctx):
        return u.replace(rows=2 * u.rows), state


class Sums(Plugin):
    def server_sum(self, u, state, ctx):
        return u


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FedAvg(plugins=[SecureSum(), Scales()]), "Scales.* would change what .* put secure_sum last"),
        (lambda: FedAvg(plugins=[SecureSum(), SecureSum()]), "put secure_sum last, once"),
        (lambda: FedAvg(plugins=[SecureSum(), Clip(1.0)]), "put secure_sum last"),
        (lambda: FedAvg(plugins=[Looks(), SecureSum()]), "needs to see each update on arrival.* leave one"),
        (lambda: FedAvg(plugins=[Sums(), SecureSum()]), "before .* has taken the masks off; put secure_sum before it"),
        (lambda: FedAvg(plugins=[SecureSum()], aggregator=MedianRule()), "needs every row; use an aggregator"),
        (lambda: Scaffold(plugins=[SecureSum()]), "sends rows beside the update.* use prox or feddyn"),
        (lambda: QFedAvg(plugins=[SecureSum()]), "max_weight: .*Fair.* give the largest weight"),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_the_mend(make, said):
    with pytest.raises(RequestError, match=said) as refused:
        make()
    assert len(refused.value.problems) == 1
    assert "\n" not in str(refused.value)


def test_what_goes_with_it_is_not():
    FedAvg(plugins=[Clip(1.0), Scales(), SecureSum(), Sums()])
    QFedAvg(plugins=[SecureSum(max_weight=50.0)])


class Nothing(Aggregator):
    def prepare(self, u, ctx):
        return u.replace(weights=0 * u.weights)


class Guesses(Aggregator):
    def prepare(self, u, ctx):
        return u.replace(weights=u.sends["loss"])


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (FedAvg(plugins=[SecureSum(max_weight=9.0)]), "9 is less than the 10 of a client with 10 examples; give at"),
        (Strategy(aggregator=Nothing(), plugins=[SecureSum()]), "not known before they train .*0 for 10 examples"),
        (Strategy(aggregator=Guesses(), plugins=[SecureSum()]), "not known before they train.*give the largest"),
    ],
)
def test_what_only_a_run_can_tell_is_refused_before_its_first_round(strategy, said):
    with pytest.raises(RequestError, match=said):
        strategy.init(ctx_of(range(3), 2))


def test_clients_that_do_not_wait_for_one_another_are_refused():
    with pytest.raises(RequestError, match="do not wait for one another have no cohort"):
        FedBuff(plugins=[SecureSum()])
    with pytest.raises(RequestError, match="do not wait for one another have no cohort"):
        FedBuff().with_parts(plugins=(SecureSum(),))


def test_shared_statistics_of_batch_norm_are_refused():
    ctx = replace(ctx_of(range(3), 2), recipe=Recipe(batch_norm="share_all"))
    with pytest.raises(RequestError, match=r'client.batch_norm: "share_all" sends .* give "share_affine"'):
        FedAvg(plugins=[SecureSum()]).init(ctx)


@pytest.mark.parametrize("weight", [10.5, -1.0, float("nan")])
def test_a_weight_that_would_wrap_ends_the_run_with_the_client(weight):
    class Odd(Opened):
        def prepare(self, u, ctx):
            return u.replace(weights=torch.where(u.clients == 7, weight, 10.0).double())

    ctx = ctx_of([3, 7], 2)
    strategy = Strategy(aggregator=Odd(), plugins=[SecureSum()])
    with pytest.raises(RunError, match=r"round 1, client 7, secure_sum: its weight .* give plugins\.secure_sum"):
        total(strategy, updates(np.zeros((2, 2)), ctx), ctx)


def test_without_a_common_cohort_there_are_no_masks():
    ctx = ctx_of(range(3), 2)
    strategy = FedAvg(plugins=[SecureSum()])
    state, u = strategy.init(ctx), updates(np.zeros((3, 2)), ctx)
    with pytest.raises(RunError, match="needs a cohort of 1 to 2097152 clients that is known to all"):
        strategy.contribute(u, state, {}, replace(ctx, cohort=None))
