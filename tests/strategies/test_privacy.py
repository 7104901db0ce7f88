"""Clipping, noise and what they may stand beside."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clients.errors import RequestError, RunError
from clients.hooks import Correction
from strategies import (
    AdaptiveClip,
    Clip,
    DPFedAvg,
    ErrorFeedback,
    FedAvg,
    LocalNoise,
    Mean,
    MedianRule,
    Noise,
    Plugin,
    QFedAvg,
    Scaffold,
    Strategy,
    accounting,
    clip,
    compression,
    server_optimizers,
)
from strategies.sampling import All, Fixed, Poisson
from tests.strategies.problems import context, updates

UNIFORM = Mean("uniform", divisor="expected")
CODECS = {
    "none": [],
    "quantize 1": [compression.Quantize(bits=1)],
    "quantize 4": [compression.Quantize(bits=4, scale="tensor")],
    "qsgd": [compression.QSGD(levels=1)],
    "top-k": [compression.TopK(fraction=0.4)],
    "random-k": [compression.RandomK(fraction=0.4)],
    "sign": [compression.Sign()],
}


def composed(*plugins: Plugin, cap: int | None = None, **parts) -> Strategy:
    aggregator = Mean("uniform" if cap is None else "capped", cap, "expected")
    return Strategy(**{"sampling": Poisson(2), "aggregator": aggregator, "plugins": plugins, **parts})


def ctx_of(d: int, clients: int = 4, round: int = 1, seed: int = 0):
    return replace(context(torch.zeros(d), clients=clients, round=round, seed=seed), rounds=10)


# ------------------------------------------------------------------------------------------------ clipping


@given(
    rows=st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3), min_size=1, max_size=5),
    norm=st.floats(1e-3, 1e3),
)
@settings(max_examples=100, deadline=None)
def test_a_row_is_clipped_to_the_norm_or_is_left_as_it_is_to_the_bit(rows, norm):
    rows = torch.tensor(rows, dtype=torch.float32)
    before = rows.clone()
    clipped = clip(rows, norm)
    assert torch.equal(rows, before)
    lengths = rows.double().norm(dim=1)
    assert bool((clipped.double().norm(dim=1) <= norm * (1 + 1e-6)).all())
    assert torch.equal(clipped[lengths <= norm], rows[lengths <= norm])
    far = lengths > norm * (1 + 1e-6)
    assert torch.allclose(clipped[far].double().norm(dim=1), torch.full_like(lengths[far], norm), rtol=1e-5)


def test_all_tensors_are_clipped_jointly():
    rows = torch.tensor([[3.0, 0.0, 4.0]])
    assert torch.allclose(clip(rows, 1.0), torch.tensor([[0.6, 0.0, 0.8]]))


# ------------------------------------------------------------------------------------------------ sensitivity

ANYTHING = st.lists(
    st.lists(st.one_of(st.floats(-3, 3, width=32), st.sampled_from([1e30, -1e30, 1e-30, 0.0])), min_size=6, max_size=6),
    min_size=2,
    max_size=5,
)


@pytest.mark.parametrize("cap", [None, 7])
@pytest.mark.parametrize("codec", CODECS)
@given(
    rows=ANYTHING, examples=st.lists(st.integers(0, 10**6), min_size=5, max_size=5), norm=st.sampled_from([0.1, 1.0])
)
@settings(max_examples=15, deadline=None)
def test_one_client_whatever_it_sends_moves_the_sum_by_at_most_the_norm(codec, cap, rows, examples, norm):
    """Both of what an honest client sends and of rows that come as no client's half would make them."""
    strategy = composed(Clip(norm), *CODECS[codec], Noise(1.0), cap=cap)
    rows = torch.tensor(rows, dtype=torch.float32)
    ctx = ctx_of(6, clients=5)
    u = updates(rows, torch.tensor(examples[: len(rows)]))
    honest, _ = strategy.contribute(u, {}, {}, ctx)
    lying = strategy.receive(strategy.aggregator.prepare(u, ctx), {}, ctx)
    for arrived in (honest, lying):
        with_all = strategy.reduce(arrived).rows
        without = strategy.reduce(arrived.select(torch.arange(1, len(rows)))).rows
        assert float((with_all - without).norm()) <= norm * (cap or 1) * (1 + 1e-6)


@given(rows=ANYTHING, seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_aggregate_moves_by_the_sensitivity_that_noise_is_measured_by(rows, seed):
    seen = []

    class Look(Plugin):
        private = True

        def server_total(self, u, state, ctx):
            seen.append((u.rows.clone(), ctx.sensitivity))
            return u, state

    strategy = composed(Clip(0.5), Look(), Noise(1.0))
    rows, ctx = torch.tensor(rows, dtype=torch.float32), ctx_of(6, seed=seed)
    for kept in (rows, rows[:-1]):
        u, _ = strategy.contribute(updates(kept), {}, {}, ctx)
        strategy.aggregate(strategy.reduce(u), strategy.init(ctx), ctx)
    (one, sensitivity), (other, _) = seen
    assert sensitivity == 0.5 / 2
    assert float((one - other).norm()) <= sensitivity * (1 + 1e-6)


# ------------------------------------------------------------------------------------------------ noise


def total(strategy, rows, ctx):
    u, _ = strategy.contribute(updates(rows), strategy.broadcast(strategy.init(ctx)), {}, ctx)
    return strategy.aggregate(strategy.reduce(u), strategy.init(ctx), ctx)[0]


@pytest.mark.parametrize("sampling", [Poisson(2), Poisson(fraction=0.5), Fixed(2), All()])
def test_the_noise_s_deviation_is_z_c_over_the_expected_cohort(sampling):
    strategy = composed(Clip(0.5), Noise(1.5), sampling=sampling)
    rows = torch.zeros(2, 100)
    drawn = torch.stack([total(strategy, rows, ctx_of(100, round=t)) for t in range(1, 21)])
    std = 1.5 * 0.5 / sampling.expected(4)
    spread = float((drawn.double() / std).pow(2).sum())
    low, high = stats.chi2.interval(0.999, drawn.numel())
    assert low < spread < high
    assert abs(float(drawn.std()) / std - 1) < 0.05
    assert len({tuple(row.tolist()) for row in drawn}) == 20  # every round's own


def test_without_noise_and_with_a_wide_clip_it_is_uniform_fedavg():
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    ctx = ctx_of(8, clients=3)
    private = composed(Clip(1e9), Noise(0.0), sampling=All())
    plain = Strategy(sampling=All(), aggregator=Mean("uniform"))
    assert torch.equal(total(private, rows, ctx), total(plain, rows, ctx))


def test_a_round_without_clients_is_a_release_of_noise_alone():
    strategy, ctx = composed(Clip(1.0), Noise(1.0)), ctx_of(50)
    row, _, _ = strategy.aggregate(strategy.nothing(ctx), strategy.init(ctx), ctx)
    assert 0.3 < float(row.std()) < 0.7  # z C / 2


def test_zero_updates_are_nothing_special():
    assert bool(torch.isfinite(total(composed(Clip(1.0), Noise(1.0)), torch.zeros(3, 4), ctx_of(4))).all())


def test_the_server_optimiser_sees_the_noised_mean():
    ctx, rows = ctx_of(5), torch.ones(2, 5)
    plain = total(composed(Clip(1.0), Noise(1.0)), rows, ctx)
    slowed = total(composed(Clip(1.0), Noise(1.0), server_optimizer=server_optimizers.SGD(0.25)), rows, ctx)
    assert torch.allclose(slowed, 0.25 * plain)


# ------------------------------------------------------------------------------------------------ adaptive clipping


def adapted(norms_of, rounds: int, plugin: AdaptiveClip, *others: Plugin, m: int = 100):
    """C after every round in which m clients send updates of these norms."""
    strategy = composed(plugin, *others, sampling=Fixed(m))
    ctx = ctx_of(1, clients=2 * m)
    state, found = strategy.init(ctx), []
    for t in range(1, rounds + 1):
        here = replace(ctx, round=t)
        u, _ = strategy.contribute(updates(norms_of(t)[:, None]), strategy.broadcast(state), {}, here)
        _, state, _ = strategy.aggregate(strategy.reduce(u), state, here)
        found.append(float(state["plugin/0-AdaptiveClip/norm"]))
    return np.array(found)


@pytest.mark.parametrize("first", [0.01, 100.0])
@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
def test_the_norm_settles_at_the_quantile_of_lognormal_norms(first, quantile):
    def norms(t):
        return torch.from_numpy(np.random.default_rng(t).lognormal(1.0, 0.5, 100)).float()

    found = adapted(norms, 300, AdaptiveClip(first, quantile))[-150:]
    share = stats.lognorm(0.5, scale=math.e).cdf(np.exp(np.log(found).mean()))
    assert abs(share - quantile) < 0.05


def test_it_still_does_under_its_own_noise():
    def norms(t):
        return torch.from_numpy(np.random.default_rng(t).lognormal(1.0, 0.5, 100)).float()

    found = adapted(norms, 300, AdaptiveClip(0.1), Noise(1.0))[-200:]
    share = stats.lognorm(0.5, scale=math.e).cdf(np.exp(np.log(found).mean()))
    assert abs(share - 0.5) < 0.05


def test_at_equal_norms_it_oscillates_no_farther_than_one_step():
    found = adapted(lambda t: torch.full((100,), 2.0), 100, AdaptiveClip(0.1, 0.3))[50:]
    assert found.min() >= 2 * math.exp(-0.2 * 0.7) - 1e-9
    assert found.max() <= 2 * math.exp(0.2 * 0.7) + 1e-9


def test_it_moves_up_where_most_are_clipped_and_down_where_few_are():
    up = adapted(lambda t: torch.full((100,), 5.0), 1, AdaptiveClip(1.0))
    down = adapted(lambda t: torch.full((100,), 0.5), 1, AdaptiveClip(1.0))
    assert up[0] == pytest.approx(math.exp(0.2 * 0.5))
    assert down[0] == pytest.approx(math.exp(-0.2 * 0.5))


def test_noise_is_that_of_the_norm_that_clipped_and_leaves_room_for_the_count():
    seen = []

    class Look(Plugin):
        private = True

        def server_total(self, u, state, ctx):
            seen.append(ctx.sensitivity)
            return u, state

    adapted(lambda t: torch.full((100,), 5.0), 3, AdaptiveClip(1.0, count_noise=0.0), Look())
    assert seen[0] == 1.0 / 100
    assert seen[1] == pytest.approx(math.exp(0.1) / 100)
    strategy = composed(AdaptiveClip(1.0), Noise(1.0), sampling=Fixed(100))
    ctx = ctx_of(2000, clients=200)
    drawn = total(strategy, torch.zeros(2, 2000), ctx)
    assert float(drawn.std()) == pytest.approx(1.005038 / 100, rel=0.05)
    assert accounting.noise_on_updates(1.0, strategy.plugins[0].deviation(strategy, 100)) == pytest.approx(1.005038)


def test_a_client_s_word_on_whether_it_was_clipped_is_one_or_nothing():
    strategy, ctx = composed(AdaptiveClip(1.0), Noise(1.0), sampling=Fixed(100)), ctx_of(1, clients=200)
    state = strategy.init(ctx)
    u = updates(torch.ones(2, 1)).send(below=torch.tensor([1e9, float("nan")]))
    assert strategy.receive(u, strategy.broadcast(state), ctx).sends["below"].tolist() == [1, 0]


def test_a_count_too_noisy_for_its_cohort_is_refused():
    strategy = composed(AdaptiveClip(1.0), Noise(1.0), sampling=Poisson(10))
    with pytest.raises(RequestError, match="infeasible"):
        strategy.guarantee(100, 10)


# ------------------------------------------------------------------------------------------------ guarantees


def test_poisson_sampling_amplifies_and_what_is_left_out_is_found():
    told = composed(Clip(1.0), Noise(2.0, delta=1e-3), sampling=Poisson(10)).guarantee(100, 100)
    assert told.epsilon == pytest.approx(1.5439, abs=2e-3)
    assert told.relation == "add or remove one"
    left_out = composed(Clip(1.0), Noise(2.0), sampling=Poisson(10)).guarantee(100, 100)
    assert left_out.delta == pytest.approx(100**-1.1)


def test_a_fixed_cohort_is_accounted_as_replacing_one():
    told = composed(Clip(1.0), Noise(2.0, delta=1e-3, accountant="rdp"), sampling=Fixed(10)).guarantee(100, 100)
    assert told.epsilon == pytest.approx(10.815, rel=1e-4)
    assert told.relation == "replace one"


@pytest.mark.parametrize("sampling", [Poisson(10), Fixed(10), All()])
def test_without_amplification_only_the_rounds_count(sampling):
    told = composed(Clip(1.0), Noise(2.0, delta=1e-3, amplification=False), sampling=sampling).guarantee(100, 100)
    assert told.epsilon == pytest.approx(accounting.gaussian_epsilon(2.0 / 10, 1e-3))
    assert told.relation == ("add or remove one" if isinstance(sampling, All) else "replace one by nothing")


def test_a_fraction_that_is_no_whole_cohort_is_accounted_at_the_cohort_that_is_drawn():
    told = composed(Clip(1.0), Noise(2.0), sampling=Fixed(fraction=0.15)).guarantee(37, 100)
    assert told.sampling_rate == 6 / 37


def test_the_budget_finds_the_noise():
    told = composed(Clip(1.0), Noise(target_epsilon=3.0), sampling=Poisson(10)).guarantee(100, 100)
    assert 2.99 < told.epsilon <= 3.0


def test_a_budget_that_a_round_exceeds_is_refused():
    with pytest.raises(RequestError, match=r"first round alone spends .* more noise"):
        composed(Clip(1.0), Noise(0.5, target_epsilon=0.1), sampling=Poisson(50)).guarantee(100, 100)


@pytest.mark.parametrize("noise", [Noise(1.0, delta=0.01), LocalNoise(epsilon=1.0, delta=0.02)])
def test_a_delta_that_would_give_one_client_away_is_refused(noise):
    plugins = (Clip(1.0), noise) if isinstance(noise, Noise) else (noise,)
    with pytest.raises(RequestError, match=r"delta: 0.0[12] is no less than 1 / 100 clients.* give less"):
        composed(*plugins).guarantee(100, 10)


def test_noise_without_an_amount_is_refused():
    with pytest.raises(RequestError, match="give noise_multiplier, or target_epsilon"):
        Noise()


# ------------------------------------------------------------------------------------------------ local noise


def test_local_noise_is_that_of_the_analytic_mechanism_and_every_client_s_own():
    d = 4000
    strategy = FedAvg(plugins=[LocalNoise(norm=0.5, epsilon=1.0, delta=1e-5)])
    ctx = ctx_of(d, clients=4)
    kept = {name: torch.zeros(2, 1) for name in strategy.client_state(ctx)}
    u, fresh = strategy.contribute(updates(torch.zeros(2, d)), {}, kept, ctx)
    assert float(u.rows.std()) == pytest.approx(3.730632 * 2 * 0.5, rel=0.03)
    assert abs(float(torch.corrcoef(u.rows)[0, 1])) < 0.06
    assert fresh["plugin/0-LocalNoise/releases"].tolist() == [[1.0], [1.0]]
    assert u.report["epsilon"].tolist() == pytest.approx([1.0, 1.0], rel=1e-4)


def test_a_client_s_releases_compose():
    strategy, ctx = FedAvg(plugins=[LocalNoise(noise_multiplier=2.0, delta=1e-5)]), ctx_of(3)
    kept = {name: torch.tensor([[0.0], [3.0]]) for name in strategy.client_state(ctx)}
    u, _ = strategy.contribute(updates(torch.zeros(2, 3)), {}, kept, ctx)
    expected = [accounting.gaussian_epsilon(2.0 / math.sqrt(k), 1e-5) for k in (1, 4)]
    assert u.report["epsilon"].tolist() == pytest.approx(expected)


def test_the_same_client_has_the_same_noise_whoever_else_is_there():
    strategy, ctx = FedAvg(plugins=[LocalNoise(epsilon=1.0)]), ctx_of(6, clients=5)
    u = updates(torch.randn(5, 6))
    kept = {name: torch.zeros(5, 1) for name in strategy.client_state(ctx)}
    together = strategy.contribute(u, {}, kept, ctx)[0].rows
    alone = strategy.contribute(u.select(torch.tensor([3])), {}, {n: v[:1] for n, v in kept.items()}, ctx)[0].rows
    assert torch.equal(together[3], alone[0])


# ------------------------------------------------------------------------------------------------ refusals


class Beside(Plugin):
    """A third party's, of which nobody knows what its server half releases."""

    def server_total(self, u, state, ctx):
        return u.replace(rows=u.rows + u.examples.sum()), state


class After(Plugin):
    def server_each(self, u, state, ctx):
        return u.replace(rows=10 * u.rows)


class Telling(Correction):
    def finish(self, u, v):
        return u.send(mean=u.rows.mean(1)), {}


def secure():
    from strategies.secure_sum import SecureSum

    return SecureSum()


REFUSED = {
    "unclipped": (lambda: composed(Noise(1.0)), "nothing bounds what a client sends.*put clip before it"),
    "weights by examples": (
        lambda: FedAvg(plugins=[Clip(1.0), Noise(1.0)]),
        'weights by examples have no largest one. .* weighting = "uniform", divisor = "expected"',
    ),
    "divided by who came": (
        lambda: Strategy(aggregator=Mean("uniform"), plugins=[Clip(1.0), Noise(1.0)]),
        'divides by who took part.*divisor = "expected"',
    ),
    "a rule of unknown sensitivity": (
        lambda: composed(Clip(1.0), Noise(1.0), aggregator=MedianRule()),
        "MedianRule.*how far one client moves the result is not known.*dpfedavg",
    ),
    "decoded after the clip": (
        lambda: composed(After(), Clip(1.0), Noise(1.0)),
        "stands before Clip.*put the clip first",
    ),
    "error feedback": (
        lambda: composed(Clip(1.0), ErrorFeedback("top_k"), Noise(1.0)),
        "error_feedback.*leave it out, and compress by quantize",
    ),
    "error feedback with local noise": (
        lambda: FedAvg(plugins=[LocalNoise(epsilon=1.0), ErrorFeedback("top_k")]),
        "error_feedback.*leave it out",
    ),
    "secure sum": (lambda: composed(Clip(1.0), Noise(1.0), secure()), "leave secure_sum out, or use local_noise"),
    "control variates": (
        lambda: Scaffold(aggregator=UNIFORM, plugins=[Clip(1.0), Noise(1.0)]),
        "sends values beside the update, which no noise covers; leave it out",
    ),
    "fair averaging": (lambda: QFedAvg(plugins=[Clip(1.0), Noise(1.0)]), "losses beside the update.*use mean"),
    "a correction that tells": (lambda: composed(Clip(1.0), Noise(1.0), correction=Telling()), "sends values beside"),
    "telling beside local noise": (
        lambda: FedAvg(plugins=[LocalNoise(epsilon=1.0)], correction=Telling()),
        "sends values beside",
    ),
    "an unknown server half": (lambda: composed(Clip(1.0), Noise(1.0), Beside()), "not known to be noised.*private"),
    "one before the noise": (lambda: composed(Clip(1.0), Beside(), Noise(1.0)), "not known to be noised"),
    "two noises": (lambda: composed(Clip(1.0), Noise(1.0), Noise(2.0)), "each count for themselves; give one"),
    "noise of both trusts": (lambda: composed(Clip(1.0), Noise(1.0), LocalNoise(epsilon=1.0)), "give one of them"),
    "amplified at a fixed size": (
        lambda: composed(Clip(1.0), Noise(1.0, amplification=True), sampling=Fixed(2)),
        'no such bound by pld; give strategy.sampling = "poisson", or leave amplification out',
    ),
    "a clip that cuts local noise off": (
        lambda: FedAvg(plugins=[LocalNoise(epsilon=1.0), Clip(1.0)]),
        "cut the noise of local_noise off on arrival; local_noise clips by itself",
    ),
    "a count without noise": (
        lambda: FedAvg(plugins=[AdaptiveClip(), LocalNoise(epsilon=1.0)]),
        "whether they were clipped without noise",
    ),
    "a preset's rule replaced": (lambda: DPFedAvg(aggregator=Mean()), "weights by examples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_hold_is_refused_with_the_mend(case):
    make, said = REFUSED[case]
    with pytest.raises(RequestError, match=said) as refused:
        make()
    assert all("\n" not in line for line in refused.value.problems)


def test_what_holds_is_not():
    composed(Clip(1.0), compression.Quantize(bits=4), Noise(1.0), server_optimizer=server_optimizers.Adam(lr=0.1))
    composed(Clip(1.0), Noise(1.0, amplification=True, accountant="rdp"), sampling=Fixed(2))
    FedAvg(plugins=[LocalNoise(epsilon=1.0), compression.Quantize(bits=8)], aggregator=MedianRule())


# ------------------------------------------------------------------------------------------------ parts of one's own


class Heavier(Plugin):
    """A third party's that counts a client a thousand times."""

    def __init__(self, half: str):
        self.half = half

    def client(self, u, state, ctx):
        return (u.replace(weights=1000 * u.weights), state) if self.half == "client" else (u, state)

    def server_each(self, u, state, ctx):
        return u.replace(weights=float("nan") * u.weights) if self.half == "server" else u


class Unheld(Clip):
    """A clip that forgets to clip on arrival."""

    def server_each(self, u, state, ctx):
        return u


@pytest.mark.parametrize("plugins", [[Clip(0.5), Heavier("client")], [Clip(0.5), Heavier("server")], [Unheld(0.5)]])
def test_the_server_holds_every_client_to_its_bound_whatever_plug_ins_do(plugins):
    strategy, ctx = composed(*plugins, Noise(1.0)), ctx_of(4)
    arrived = strategy.receive(strategy.aggregator.prepare(updates(torch.full((2, 4), 9.0)), ctx), {}, ctx)
    honest, _ = strategy.contribute(updates(torch.full((2, 4), 9.0)), {}, {}, ctx)
    for u in (arrived, honest):
        assert float((u.rows.norm(dim=1) * u.weights.abs()).max()) <= 0.5 * (1 + 1e-6)


def test_a_mean_s_claim_does_not_hold_for_a_combine_of_one_s_own():
    class Realised(Mean):
        def combine(self, u, state, ctx):
            return u.rows[0] / u.weights.sum(), state, {}

    with pytest.raises(RequestError, match=r"its own combine is not what unbounded.* speaks of"):
        composed(Clip(1.0), Noise(1.0), aggregator=Realised("uniform", divisor="expected"))


@pytest.mark.parametrize("base", [Poisson, Fixed])
def test_a_cohort_of_one_s_own_is_not_amplified_by_the_name_of_its_base(base):
    class Largest(base):
        def cohort(self, ctx):
            return ctx.population.trainable[: self.clients_per_round]

    told = composed(Clip(1.0), Noise(2.0), sampling=Largest(10)).guarantee(100, 100)
    assert told.sampling_rate == 1.0
    assert told.relation == "replace one by nothing"


def test_two_counts_of_clipped_clients_are_refused():
    with pytest.raises(RequestError, match="adaptive_clip: two of them"):
        Strategy(plugins=[AdaptiveClip(), AdaptiveClip()])


def test_a_huge_row_is_clipped_to_the_norm_too():
    assert float(clip(torch.full((1, 1000), 3e38), 1e-3).double().norm()) == pytest.approx(1e-3, rel=1e-5)


class Sends(Plugin):
    def client(self, u, state, ctx):
        return u.send(first=u.rows[:, 0]), state


def test_local_noise_hides_all_that_is_sent_or_nothing_is():
    ctx = ctx_of(3)
    strategy = FedAvg(plugins=[Sends(), LocalNoise(epsilon=1.0)])
    kept = {name: torch.zeros(2, 1) for name in strategy.client_state(ctx)}
    with pytest.raises(RunError, match="first would be sent beside the update without noise"):
        strategy.contribute(updates(torch.randn(2, 3)), {}, kept, ctx)

    class ByNorm(Mean):
        def prepare(self, u, ctx):
            return u.replace(weights=u.rows.double().norm(dim=1))

    with pytest.raises(RequestError, match="makes weights or values of the updates themselves"):
        FedAvg(aggregator=ByNorm(), plugins=[LocalNoise(epsilon=1.0)]).init(ctx)


def test_a_single_client_cannot_be_hidden():
    with pytest.raises(RequestError, match="a single client cannot be hidden among others"):
        composed(Clip(1.0), Noise(1.0)).guarantee(1, 10)
