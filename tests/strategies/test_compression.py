"""Codecs: what arrives, what it costs to the byte, and what error feedback keeps of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clients import catalog
from clients.errors import RequestError, RunError
from clients.parts import Part
from clients.recipe import Positive
from clients.weights import Layout
from strategies import FedAvg, SignMajorityRule, Strategy, codecs, compression
from strategies.compression import QSGD, Codec, Downlink, ErrorFeedback, Quantize, RandomK, Sign, TopK
from strategies.packing import packed_size
from tests.strategies.problems import context, updates

CODECS = [
    *(Quantize(bits=bits) for bits in (1, 3, 4, 8, 16)),
    Quantize(bits=4, rounding="nearest"),
    Quantize(bits=2, scale="tensor"),
    *(QSGD(levels=levels) for levels in (1, 7, 127)),
    TopK(fraction=0.3),
    TopK(k=1),
    RandomK(fraction=0.3),
    RandomK(k=2, unbiased=False),
    Sign(),
    Sign(scaled=False),
]
UNBIASED = [codec for codec in CODECS if codec.unbiased]
CONTRACTIONS = [codec for codec in CODECS if codec.contraction]
NO_CONTRACTIONS = [codec for codec in CODECS if not codec.contraction]
by_name = pytest.mark.parametrize("codec", CODECS, ids=repr)

SIZES = st.sampled_from([0, 1, 7, 8, 9, 33])
VALUES = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e30]),
)
BROKEN = st.sampled_from([math.nan, math.inf, -math.inf])


@st.composite
def blocks(draw, broken: bool = True) -> Tensor:
    """``[k, d]`` of either dtype, some of them with values that are not finite."""
    k, d = draw(st.integers(1, 4)), draw(SIZES)
    rows = torch.tensor(draw(st.lists(st.lists(VALUES, min_size=d, max_size=d), min_size=k, max_size=k)))
    rows = rows.reshape(k, d).to(draw(st.sampled_from([torch.float32, torch.float64])))
    if broken and d and draw(st.booleans()):
        rows[draw(st.integers(0, k - 1)), draw(st.integers(0, d - 1))] = draw(BROKEN)
    return rows


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generators(k: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(k)]


def sent(codec: Codec, row: Tensor, draws: int, seed: int = 0) -> Tensor:
    """What arrives of one row in so many independent draws, ``float64 [draws, d]``."""
    return codec.transmit(row.repeat(draws, 1), generators(draws, seed))[0].double()


def halves(size: int) -> list[slice]:
    """Two tensors in a row."""
    return [slice(0, size // 2), slice(size // 2, size)]


def bits_of(rows: Tensor) -> tuple[list, list]:
    """Equal for rows that are equal to the bit; any NaN is as good as another."""
    nothing = rows.isnan()
    integers = torch.int32 if rows.dtype == torch.float32 else torch.int64
    return nothing.tolist(), rows.masked_fill(nothing, 0.0).view(integers).tolist()


def formula(codec: Codec, d: int, tensors: int) -> int:
    """Bytes by the formulas in the docstrings."""
    match codec:
        case Quantize():
            return 4 * (tensors if codec.scale == "tensor" else 1) + math.ceil(d * codec.bits / 8)
        case QSGD():
            return 4 + math.ceil(d * math.ceil(math.log2(2 * codec.levels + 1)) / 8)
        case TopK():
            k = codec.kept(d)
            return 4 * k + min(math.ceil(d / 8), math.ceil(k * math.ceil(math.log2(max(d, 1))) / 8))
        case RandomK():
            return 4 * codec.kept(d) + 8
        case Sign():
            return 4 * codec.scaled + math.ceil(d / 8)
    raise AssertionError(codec)


# ------------------------------------------------------------------------------------- blocks, rows and bytes


@given(rows=blocks())
@settings(max_examples=60, deadline=None)
def test_a_block_gives_the_bits_and_bytes_of_encoding_and_decoding_row_by_row(rows):
    before, k, d = rows.clone(), *rows.shape
    for codec in CODECS:
        whole, nbytes = codec.transmit(rows, generators(k), halves(d))
        one_by_one, lengths = Codec.transmit(codec, rows, generators(k), halves(d))
        assert bits_of(whole) == bits_of(one_by_one), codec
        assert whole.dtype == rows.dtype
        assert nbytes.dtype == lengths.dtype == torch.int64
        assert nbytes.tolist() == lengths.tolist() == [formula(codec, d, 2)] * k, codec
        assert bits_of(rows) == bits_of(before), codec


@given(rows=blocks())
@settings(max_examples=60, deadline=None)
def test_a_row_arrives_finite_if_and_only_if_it_is(rows):
    for codec in CODECS:
        for row, generator in zip(rows, generators(len(rows)), strict=True):
            beside = (halves(len(row)),) if codec.by_tensor else ()
            payload = codec.encode(row, generator, *beside)
            arrived = codec.decode(payload, len(row), *beside)
            assert arrived.dtype == torch.float32
            assert arrived.shape == row.shape
            assert bool(arrived.isfinite().all()) == bool(row.isfinite().all()), codec
            if bool(row.isfinite().all()) or codec != Sign(scaled=False):
                assert len(payload) == formula(codec, len(row), 2), codec


def test_a_vote_that_is_not_finite_is_an_empty_payload():
    assert Sign(scaled=False).encode(torch.tensor([1.0, math.nan]), generators(1)[0]) == b""


@by_name
def test_payloads_are_functions_of_the_row_and_the_generator_alone(codec):
    row, state = drawn(0, 33), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].tolist()
    beside = (halves(33),) if codec.by_tensor else ()
    payloads = [codec.encode(row, torch.Generator().manual_seed(7), *beside) for _ in range(2)]
    arrived = [codec.decode(payloads[0], 33, *beside) for _ in range(2)]
    assert payloads[0] == payloads[1]
    assert bits_of(arrived[0]) == bits_of(arrived[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state


@by_name
def test_blocks_that_are_worked_on_in_parts_give_the_same_bits(codec, monkeypatch):
    rows = drawn(0, 9, 101)
    whole, _ = codec.transmit(rows, generators(9), halves(101))
    monkeypatch.setattr(codecs, "_AT_ONCE", 205)
    parts, _ = codec.transmit(rows, generators(9), halves(101))
    assert bits_of(whole) == bits_of(parts)


@by_name
def test_clients_send_the_same_bits_whoever_else_is_in_the_block(codec):
    ctx, u = context(torch.zeros(40), clients=6), updates(drawn(1, 6, 40))
    whole, _ = codec.client(u, {}, ctx)
    some, _ = codec.client(u.select(torch.tensor([1, 4, 5])), {}, ctx)
    assert bits_of(whole.rows[[1, 4, 5]]) == bits_of(some.rows)
    assert some.nbytes.tolist() == whole.nbytes[:3].tolist()


@by_name
def test_a_client_draws_from_its_own_generator_of_the_round(codec):
    ctx, u = replace(context(torch.zeros(40), round=3, seed=5), scope="plugin/0/"), updates(drawn(1, 3, 40))
    sent_by_clients, _ = codec.client(u, {}, ctx)
    keyed = [ctx.generator("codec", client) for client in u.clients.tolist()]
    assert bits_of(sent_by_clients.rows) == bits_of(codec.transmit(u.rows, keyed, [slice(0, 40)])[0])


def test_every_round_and_every_place_among_the_plugins_has_draws_of_its_own():
    ctx, u = context(torch.zeros(40)), updates(drawn(1, 3, 40))
    circumstances = [ctx, replace(ctx, round=2), replace(ctx, scope="plugin/1/"), replace(ctx, seed=1)]
    seen = {str(bits_of(Quantize(bits=2).client(u, {}, there)[0].rows)) for there in circumstances}
    assert len(seen) == len(circumstances)


@by_name
def test_the_zero_row_arrives_as_it_is(codec):
    for d in (1, 8, 33):
        arrived, _ = codec.transmit(torch.zeros(2, d), generators(2), halves(d))
        expected = torch.zeros(2, d) if codec != Sign(scaled=False) else torch.ones(2, d)
        assert bits_of(arrived) == bits_of(expected)


@by_name
def test_what_is_billed_is_the_payload_the_examples_and_what_is_sent_beside(codec):
    u = updates(drawn(2, 3, 40)).send(extra=torch.zeros(3, 2))
    strategy = FedAvg(plugins=[codec])
    ctx = context(torch.zeros(40))
    billed, _ = strategy.contribute(u, strategy.init(ctx), {}, ctx)
    assert billed.nbytes.tolist() == [formula(codec, 40, 1) + 8 + 2 * 4] * 3
    assert strategy.broadcast(strategy.init(ctx)) == {}


def test_a_thousand_and_one_coordinates_take_this_many_bytes():
    rows = drawn(0, 1, 1001)
    sizes = {bits: len(Quantize(bits=bits).encode(rows[0], generators(1)[0])) for bits in (8, 4, 2, 1)}
    assert sizes == {8: 4 + 1001, 4: 4 + 501, 2: 4 + 251, 1: 4 + 126}
    assert len(QSGD(levels=7).encode(rows[0], generators(1)[0])) == 4 + 501
    assert len(Sign(scaled=False).encode(rows[0], generators(1)[0])) == 126


@pytest.mark.parametrize("d", [650, 4810, 1_000_000])
def test_four_bits_are_less_than_a_seventh_of_what_a_model_takes(d):
    rows = drawn(0, 1, d)
    strategy = FedAvg(plugins=[Quantize(bits=4)])
    billed, _ = strategy.contribute(updates(rows), {}, {}, context(rows[0]))
    assert int(billed.nbytes) <= (4 * d + 8) / 7


def test_scales_are_rounded_up_so_that_values_stay_in_range():
    rows = torch.tensor([[1 + 2.0**-40, -(1 + 2.0**-40), 0.3]], dtype=torch.float64)
    for codec in (Quantize(bits=4), QSGD(levels=3)):
        scale = float(np.frombuffer(codec.encode(rows[0], generators(1)[0])[:4], "<f4")[0])
        wanted = float(rows.abs().max() if isinstance(codec, Quantize) else rows.norm())
        assert wanted <= scale <= wanted * (1 + 2.0**-22)


# ----------------------------------------------------------------------------------------------------- rounding


def test_uniform_draws_are_uniform_down_to_the_last_bit():
    many = compression.uniforms(4095, generators(4000))
    assert many.dtype == torch.float32
    assert 0 <= float(many.min()) < 1e-6
    assert 1 - 1e-6 < float(many.max()) < 1
    assert abs(float(many.double().mean()) - 0.5) < 3 * math.sqrt(1 / 12 / many.numel())
    counts = torch.histc(many, 256, 0, 1).double()
    chi_square = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert abs(chi_square - 255) < 3 * math.sqrt(2 * 255)
    # Less than 16 bits can say; drawn once for a row, so that rows and not draws are independent.
    rare = (many < 2.0**-18).sum(dim=1).double()
    assert abs(float(rare.mean()) - 4095 * 2.0**-18) < 3 * float(rare.std()) / math.sqrt(len(rare))


@pytest.mark.parametrize("codec", UNBIASED, ids=repr)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_mean_of_what_arrives_is_what_was_sent(codec, seed):
    """Within three standard errors: of squared z-scores over d coordinates, whose mean is d and variance about 2 d."""
    row, draws = drawn(seed, 50), 4000
    arrived = sent(codec, row, draws, seed)
    z = (arrived.mean(0) - row) / (arrived.std(0) / math.sqrt(draws)).clamp(min=1e-7)
    assert abs(float(z.mean())) < 3 / math.sqrt(50)
    assert float((z**2).sum()) < 50 + 3 * math.sqrt(2 * 50)


@pytest.mark.parametrize("codec", [Quantize(bits=2, rounding="nearest"), TopK(k=10), RandomK(unbiased=False), Sign()])
def test_what_says_that_it_is_biased_is(codec):
    row = drawn(0, 50)
    assert not codec.unbiased
    assert float((sent(codec, row, 2000).mean(0) - row).norm()) > 0.1 * float(row.norm())


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_quantised_values_are_neighbours_among_equally_spaced_levels(bits, rounding):
    rows, codec = drawn(3, 20, 200), Quantize(bits=bits, rounding=rounding)
    arrived = codec.transmit(rows, generators(20))[0].double()
    largest = rows.abs().amax(1, keepdim=True).double()
    step = 2 * largest / (2**bits - 1)
    place = (arrived + largest) / step
    assert float((place - place.round()).abs().max()) < 1e-2
    assert float(arrived.abs().amax(1, keepdim=True).sub(largest).abs().max()) == 0
    reach = 0.5 if rounding == "nearest" else 1.0
    assert bool(((arrived - rows).abs() <= step * reach * (1 + 1e-2)).all())


@pytest.mark.parametrize("codec", [Quantize(bits=bits, rounding="nearest") for bits in (1, 4, 5, 8)], ids=repr)
def test_what_is_quantised_already_is_sent_as_it_is(codec):
    once, _ = codec.transmit(drawn(3, 5, 200), generators(5))
    assert bits_of(codec.transmit(once, generators(5))[0]) == bits_of(once)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_stochastic_rounding_has_the_variance_that_it_says(bits):
    row = drawn(4, 1000).double()
    step = 2 * float(row.abs().max()) / (2**bits - 1)
    f = ((row + row.abs().max()) / step) % 1
    error = ((sent(Quantize(bits=bits), row, 2000) - row) ** 2).sum(1).mean()
    assert float(error) == pytest.approx(float((f * (1 - f)).sum()) * step**2, rel=0.02)


def test_a_scale_for_each_tensor_helps_where_tensors_differ():
    model = nn.Linear(30, 10)
    layout = Layout(model)
    row = torch.cat([100 * drawn(0, 300), drawn(1, 10)])
    ctx = replace(context(torch.zeros(310)), layout=layout)
    error = {}
    for scale in ("row", "tensor"):
        u, _ = Quantize(bits=4, scale=scale).client(updates(row[None]), {}, ctx)
        error[scale] = float((u.rows[0, 300:] - row[300:]).norm())
        assert u.nbytes.tolist() == [4 * (2 if scale == "tensor" else 1) + 155]
    largest = float(row[300:].abs().max())
    assert error["tensor"] <= math.sqrt(10) * 2 * largest / 15 < error["row"] / 5


@pytest.mark.parametrize(("levels", "table"), [(1, 24.132), (16, 0.6628), (127, 0.01044)])
def test_qsgd_has_the_variance_bounds_and_zeros_of_its_paper(levels, table):
    """Alistarh et al. 2017, Lemma 3.1, beside the exact variance; for normal values of norm 1 and d = 1000."""
    d = 1000
    row = drawn(0, d).double()
    row /= row.norm()
    f = (row.abs() * levels) % 1
    exact = float((f * (1 - f)).sum()) / levels**2
    arrived = sent(QSGD(levels=levels), row, 2000)
    assert float(((arrived - row) ** 2).sum(1).mean()) == pytest.approx(exact, rel=0.02)
    assert exact == pytest.approx(table, rel=0.03)
    assert exact <= min(d / levels**2, math.sqrt(d) / levels)
    assert float((arrived != 0).sum(1).double().mean()) <= levels * (levels + math.sqrt(d))
    scaled = arrived * levels
    assert float((scaled - scaled.round()).abs().max()) < 1e-4
    assert bool((arrived * row >= 0).all())


# ------------------------------------------------------------------------------------------ a few coordinates


def test_top_k_keeps_the_largest_and_of_equal_ones_the_first():
    rows = torch.tensor([[1.0, -3.0, 3.0, 2.0, -3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, -1.0]])
    arrived, _ = TopK(k=2).transmit(rows, generators(3))
    assert arrived.tolist() == [[0, -3, 3, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]


@given(rows=blocks(broken=False), k=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_top_k_is_what_a_stable_sort_finds(rows, k):
    arrived, _ = TopK(k=k).transmit(rows, generators(len(rows)))
    expected = torch.zeros_like(rows)
    order = rows.abs().argsort(dim=1, descending=True, stable=True)[:, :k]
    expected.scatter_(1, order, rows.gather(1, order).float().to(rows.dtype))
    assert bits_of(arrived) == bits_of(expected)


@pytest.mark.parametrize("codec", [TopK(k=33), TopK(fraction=1.0), TopK(k=99), RandomK(k=33), RandomK(fraction=1.0)])
def test_all_coordinates_are_the_identity(codec):
    rows = torch.cat([drawn(0, 2, 31), torch.tensor([[0.0, -0.0], [-0.0, 0.0]])], dim=1)
    assert torch.equal(codec.transmit(rows, generators(2))[0], rows)
    if isinstance(codec, TopK):
        assert bits_of(codec.transmit(rows, generators(2))[0]) == bits_of(rows)


@pytest.mark.parametrize(
    ("d", "k", "expected"),
    [(1, 1, 4), (2, 1, 4 + 1), (100, 3, 12 + 3), (1000, 20, 80 + 25), (1000, 100, 400 + 125), (1024, 102, 408 + 128)],
)
def test_places_travel_as_numbers_or_as_a_bitmap_whichever_is_shorter(d, k, expected):
    row = drawn(0, d)
    codec = TopK(k=k)
    payload = codec.encode(row, generators(1)[0])
    assert len(payload) == expected
    assert torch.equal(codec.decode(payload, d), codec.transmit(row[None], generators(1))[0][0])


@pytest.mark.parametrize(("fraction", "kept"), [(0.05, 50), (0.0001, 1), (1.0, 1000), (0.07, 70)])
def test_a_fraction_is_rounded_and_at_least_one_coordinate_is_sent(fraction, kept):
    row = drawn(0, 1000)
    for codec in (TopK(fraction=fraction), RandomK(fraction=fraction)):
        assert int((codec.transmit(row[None], generators(1))[0] != 0).sum()) == kept


@pytest.mark.parametrize("codec", [TopK, RandomK])
def test_a_number_or_a_fraction_is_given_and_not_both(codec):
    with pytest.raises(RequestError, match=f"plugins.{codec.name}: fraction and k both .* one of the two"):
        codec(fraction=0.1, k=3)
    assert codec().fraction == 0.05
    assert codec(k=3).fraction is None


def test_random_coordinates_are_uniform_and_drawn_anew():
    d, k, draws = 20, 5, 4000
    counts = (sent(RandomK(k=k), torch.ones(d), draws) != 0).double().sum(0)
    deviation = math.sqrt(draws * k / d * (1 - k / d))
    assert float((counts - draws * k / d).abs().max()) < 4 * deviation
    error = ((sent(RandomK(k=k), torch.ones(d), 10) - 1) ** 2).sum(1)
    assert error.tolist() == pytest.approx([(d / k - 1) * d] * 10)


# ------------------------------------------------------------------------------------------------------- signs


def test_signs_count_zero_as_positive_and_are_scaled_by_the_mean_size():
    rows = torch.tensor([[2.0, -1.0, 0.0, -0.0, -3.0]])
    assert Sign(scaled=False).transmit(rows, generators(1))[0].tolist() == [[1, -1, 1, 1, -1]]
    assert Sign().transmit(rows, generators(1))[0].tolist() == pytest.approx(torch.tensor([[1, -1, 1, 1, -1]]) * 1.2)


@given(honest=st.integers(2, 7), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_fewer_than_half_of_the_voters_cannot_turn_a_sign_that_the_others_agree_on(honest, seed):
    agreed = drawn(seed, 1, 12)
    rows = agreed * drawn(seed + 1, honest, 12).abs()
    flippers = -1e6 * agreed.repeat(honest - 1, 1)
    strategy = Strategy(aggregator=SignMajorityRule(), plugins=[Sign(scaled=False)])
    ctx = context(torch.zeros(12), clients=2 * honest - 1)
    u, _ = strategy.contribute(updates(torch.cat([rows, flippers])), {}, {}, ctx)
    row, _, _ = strategy.aggregate(u, {}, ctx)
    assert torch.equal(row, agreed[0].sign())


# ------------------------------------------------------------------------------------------------ contractions


def adversarial(d: int) -> dict[str, Tensor]:
    spike = torch.zeros(d)
    spike[d // 3] = -4.0
    return {
        "a spike": spike,
        "equal values": torch.full((d,), 0.5),
        "alternating": torch.tensor([1.0, -1.0]).repeat(d)[:d],
        "falling": 0.5 ** torch.arange(d).clamp(max=60).float(),
        "a spike beside small ones": torch.where(spike != 0, spike, torch.full((d,), 1e-3)),
        "normal": drawn(0, d),
        "tiny": 1e-30 * drawn(1, d),
        "huge": 1e30 * drawn(2, d).clamp(-3, 3),
    }


def shrinkage(codec: Codec, row: Tensor, draws: int) -> float:
    """``E ||v - Q(v)||^2 / ||v||^2``."""
    row = row.double()
    return float(((sent(codec, row, draws) - row) ** 2).sum(1).mean() / (row**2).sum())


@pytest.mark.parametrize("codec", CONTRACTIONS, ids=repr)
@pytest.mark.parametrize("d", [1, 9, 200])
def test_contractions_shrink_every_vector(codec, d):
    delta = 1 / d if isinstance(codec, Sign) else codec.kept(d) / d
    for name, row in adversarial(d).items():
        if isinstance(codec, RandomK):  # in the mean over its draws, whose standard error this is at most
            draws = 1000
            assert shrinkage(codec, row, draws) <= 1 - delta + 3 * math.sqrt(delta * (1 - delta) / draws), name
        else:
            assert shrinkage(codec, row, 1) <= 1 - delta + 1e-6, name


def test_the_sign_s_shrinkage_is_the_one_of_its_paper():
    row = drawn(0, 200).double()
    exact = 1 - float(row.abs().sum() ** 2 / (200 * (row**2).sum()))
    assert shrinkage(Sign(), row, 1) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("codec", [codec for codec in NO_CONTRACTIONS if codec != Quantize(bits=16)], ids=repr)
def test_what_says_that_it_is_no_contraction_makes_some_vector_larger(codec):
    """A spike where there is no level at zero (of 4^bits coordinates: not tried for 16 bits); equal values where the
    norm is the scale, or few are sent; small ones where there is no scale."""
    match codec:
        case Quantize():
            row = torch.zeros(2 * 4**codec.bits)
            row[0] = 1.0
        case QSGD():
            row = torch.ones(8 * codec.levels**2)
        case RandomK():
            row = torch.ones(40)
        case _:
            row = torch.full((9,), 0.01)
    assert shrinkage(codec, row, 5) > 1


# --------------------------------------------------------------------------------------------- error feedback


def trained_on(g: Tensor, clients: list[int], round: int):
    return updates(g).replace(clients=torch.tensor(clients)), context(torch.zeros(g.shape[1]), round=round, clients=9)


@pytest.mark.parametrize("codec", CONTRACTIONS, ids=repr)
def test_what_was_sent_and_what_is_kept_add_up_to_all_updates_however_often_a_client_takes_part(codec):
    d, feedback = 40, ErrorFeedback(codec)
    kept, given_, arrived = (torch.zeros(6, d, dtype=torch.float64) for _ in range(3))
    chance = np.random.default_rng(0)
    for round in range(1, 101):
        cohort = np.flatnonzero(chance.random(6) < 0.5).tolist() or [0]
        g = drawn(round, len(cohort), d).double()
        u, ctx = trained_on(g, cohort, round)
        u, state = feedback.client(u, {"residual": kept[cohort]}, ctx)
        given_[cohort] += g
        arrived[cohort] += u.rows
        kept[cohort] = state["residual"]
    assert float((arrived + kept - given_).abs().max()) < 1e-12


@given(rows=blocks(broken=False), k=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_residual_of_top_k_is_what_the_contraction_leaves(rows, k):
    rows, d = rows.double(), rows.shape[1]
    before = rows.flip(0) / 3
    assume(d > 0)
    u, ctx = trained_on(rows, list(range(len(rows))), 1)
    u, state = ErrorFeedback(TopK(k=k)).client(u, {"residual": before}, ctx)
    owed = ((rows + before) ** 2).sum(1)
    left = (state["residual"] ** 2).sum(1)
    assert bool((left <= (1 - min(k, d) / d) * owed * (1 + 1e-6) + 1e-14 * owed).all())


def test_feedback_repeats_what_its_codec_sends_in_bytes_and_bits_and_nothing_more():
    u, ctx = trained_on(drawn(0, 3, 40), [0, 4, 7], 1)
    zero = {"residual": torch.zeros(3, 40)}
    for codec in CONTRACTIONS:
        plain, _ = codec.client(u, {}, ctx)
        fed, state = ErrorFeedback(codec).client(u, zero, ctx)
        assert bits_of(plain.rows) == bits_of(fed.rows)
        assert plain.nbytes.tolist() == fed.nbytes.tolist()
        assert torch.equal(state["residual"], u.rows - fed.rows)


def test_feedback_reaches_a_coordinate_that_top_k_alone_would_never_send():
    g, feedback = torch.tensor([[1.0, 0.4]]), ErrorFeedback(TopK(k=1))
    state, arrived = {"residual": torch.zeros(1, 2)}, torch.zeros(1, 2)
    for round in range(1, 31):
        u, ctx = trained_on(g, [0], round)
        u, state = feedback.client(u, state, ctx)
        arrived += u.rows
    assert torch.allclose(arrived / 30, g, atol=0.05)


@pytest.mark.parametrize("codec", ["quantize", {"name": "qsgd", "levels": 3}, "random_k", Quantize(bits=4)])
def test_feedback_is_refused_where_it_is_not_needed(codec):
    with pytest.raises(RequestError, match=r"plugins.error_feedback.codec: .*unbiased.*no feedback.*top_k or sign"):
        ErrorFeedback(codec)


@pytest.mark.parametrize("codec", [{"name": "sign", "scaled": False}, {"name": "quantize", "rounding": "nearest"}])
def test_feedback_is_refused_where_it_would_grow_without_end(codec):
    with pytest.raises(RequestError, match=r"plugins.error_feedback.codec: .*without end; give top_k or sign$"):
        ErrorFeedback(codec)


def test_a_codec_is_a_name_a_table_or_an_object():
    expected = ErrorFeedback(TopK(k=3))
    assert ErrorFeedback({"name": "top_k", "k": 3}) == expected
    assert ErrorFeedback(Part("TopK", {"k": 3})) == expected
    assert ErrorFeedback("top_k") == ErrorFeedback(TopK())
    assert repr(Downlink("sign")) == "Downlink(codec=Sign(scaled=True))"


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        ("tip_k", "codec: unknown plug-in 'tip_k'.*did you mean 'top_k'"),
        ({"name": "top_k", "fraction": 2.0}, "codec.fraction: "),
        ({"name": "top_k", "share": 0.1}, "codec.share: "),
        ({"k": 3}, "codec: a table here needs name"),
        ("clip", "codec: Clip.* is no codec"),
        (3, "codec: 3 is not a name"),
    ],
)
@pytest.mark.parametrize("plugin", [ErrorFeedback, Downlink])
def test_what_is_no_codec_is_refused_under_its_key(plugin, codec, said):
    key = "plugins.error_feedback." if plugin is ErrorFeedback else "plugins.downlink."
    with pytest.raises(RequestError, match=f"^{key}{said}"):
        plugin(codec)


# ---------------------------------------------------------------------------------------------------- downlink


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clients_are_sent_decoded_weights_and_the_server_keeps_its_own(dtype):
    weights = drawn(0, 40).to(dtype)
    before = weights.clone()
    strategy = FedAvg(plugins=[Downlink({"name": "quantize", "bits": 8})])
    ctx = context(weights)
    row, nbytes = strategy.down({}, ctx)
    assert nbytes == 4 + 40
    assert row.dtype == dtype
    assert torch.equal(weights, before)
    assert 0 < float((row - weights).abs().max()) <= 2 * float(weights.abs().max()) / 255 * (1 + 1e-5)
    assert torch.equal(row, strategy.down({}, ctx)[0])
    assert not torch.equal(row, strategy.down({}, replace(ctx, round=2))[0])
    moved, _, _ = strategy.aggregate(strategy.reduce(updates(torch.ones(3, 40, dtype=dtype))), {}, ctx)
    assert torch.equal(moved, before + 1)


def test_a_downlink_leaves_updates_as_they_are():
    ctx, u = context(torch.zeros(4)), updates(drawn(0, 3, 4))
    strategy = FedAvg(plugins=[Downlink("quantize")])
    sent_up, _ = strategy.contribute(u, {}, {}, ctx)
    assert torch.equal(sent_up.rows, u.rows)
    assert sent_up.nbytes.tolist() == [4 * 4 + 8] * 3


# ------------------------------------------------------------------------------------------- a codec of one's own


@dataclass(frozen=True)
class Halves(Codec):
    """Half precision: 2 bytes a coordinate."""

    unit: Positive = 1.0
    contraction = True

    def encode(self, row: Tensor, generator: torch.Generator) -> bytes:
        assert bool(row.isfinite().all())
        return (row / self.unit).to(torch.float16).numpy().tobytes()

    def decode(self, payload: bytes, size: int) -> Tensor:
        return torch.frombuffer(bytearray(payload), dtype=torch.float16).to(torch.float32) * self.unit


def test_a_codec_of_ones_own_needs_two_methods():
    rows = drawn(0, 3, 5)
    rows[1, 2] = math.nan
    ctx, u = context(torch.zeros(5)), updates(rows)
    sent_up, _ = Halves().client(u, {}, ctx)
    assert torch.equal(sent_up.rows[[0, 2]], rows[[0, 2]].half().float())
    assert bool(sent_up.rows[1].isnan().all())
    assert sent_up.nbytes.tolist() == [10] * 3
    fed, state = ErrorFeedback(Halves()).client(u, {"residual": torch.zeros(3, 5)}, ctx)
    assert torch.equal(fed.rows[0], sent_up.rows[0])
    assert torch.equal(state["residual"][0], rows[0] - rows[0].half().float())
    assert FedAvg(plugins=[Downlink(Halves())]).down({}, context(drawn(1, 5)))[1] == 10


def test_a_codec_in_a_file_of_ones_own_goes_by_the_folder_of_the_experiment(tmp_path):
    (tmp_path / "halves.py").write_text(
        "import torch\n"
        "from strategies.compression import Codec\n\n\n"
        "class Halves(Codec):\n"
        "    contraction = True\n\n"
        "    def encode(self, row, generator):\n"
        "        return row.half().numpy().tobytes()\n\n"
        "    def decode(self, payload, size):\n"
        "        return torch.frombuffer(bytearray(payload), dtype=torch.float16).float()\n"
    )
    made = catalog.build(Part("error_feedback", {"codec": "halves.py:Halves"}), "plugins", tmp_path)
    u, ctx = trained_on(drawn(0, 2, 5), [0, 1], 1)
    assert made.client(u, {"residual": torch.zeros(2, 5)}, ctx)[0].nbytes.tolist() == [10, 10]


def test_a_codec_that_decodes_to_another_shape_fails_with_its_name():
    class Short(Halves):
        def decode(self, payload: bytes, size: int) -> Tensor:
            return super().decode(payload, size)[:-1]

    strategy = FedAvg(plugins=[Short()])
    with pytest.raises(RunError, match=r"round 1, Short.client: .* decodes to a row of shape \[4\]; give \[5\]"):
        strategy.contribute(updates(drawn(0, 3, 5)), {}, {}, context(torch.zeros(5)))


def test_a_codec_without_its_methods_cannot_be_made():
    class Nothing(Codec):
        pass

    with pytest.raises(TypeError, match="encode"):
        Nothing()


def test_codecs_go_by_these_names_with_these_settings():
    listed = {entry.name: list(entry.settings) for entry in catalog.entries("plugins")}
    expected = {
        "quantize": ["bits", "scale", "rounding"],
        "qsgd": ["levels"],
        "top_k": ["fraction", "k"],
        "random_k": ["fraction", "k", "unbiased"],
        "sign": ["scaled"],
        "error_feedback": ["codec"],
        "downlink": ["codec"],
    }
    assert {name: listed.get(name) for name in expected} == expected
    assert "codec" not in listed


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("quantize", {"bits": 0}),
        ("quantize", {"bits": 17}),
        ("quantize", {"bits": True}),
        ("quantize", {"scale": "layer"}),
        ("quantize", {"rounding": "up"}),
        ("qsgd", {"levels": 0}),
        ("top_k", {"fraction": 0.0}),
        ("top_k", {"fraction": 1.5}),
        ("top_k", {"k": 0}),
        ("random_k", {"unbiased": 1}),
        ("sign", {"scaled": "yes"}),
    ],
)
def test_settings_out_of_range_are_refused_under_their_key(name, wrong):
    with pytest.raises(RequestError, match=f"^plugins.{name}.{next(iter(wrong))}: "):
        catalog.build(Part(name, wrong), "plugins", key=f"plugins.{name}")


def test_packed_sizes_are_what_payload_sizes_are_made_of():
    assert Quantize(bits=3).payload_size(9) == 4 + packed_size(9, 3) == 8
