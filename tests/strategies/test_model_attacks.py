"""Crafted updates keep their exact thresholds, hold their bounds tightly, and do not depend on the cohort's order."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.errors import RequestError, RunError
from strategies import columns, selection
from strategies.aggregation import mean
from strategies.crafting import (
    alie,
    alie_z,
    gaussian,
    ipm,
    mimic,
    min_max,
    min_sum,
    model_replacement,
    scaled,
    sign_flip,
    standing_out,
)
from strategies.model_attacks import (
    Alie,
    CraftContext,
    Gaussian,
    Ipm,
    Mimic,
    MinMax,
    MinSum,
    ModelAttack,
    ModelReplacement,
    Scaled,
    SignFlip,
)

DIRECTIONS = ["std", "sign", "unit"]

OWN = [SignFlip(), Scaled(3.0), Gaussian(0.5), ModelReplacement(), ModelReplacement("examples")]
OTHERS = [SignFlip("mean"), Alie(), Alie(1.5), Alie(variant="paper"), Ipm(), Mimic(), Mimic(5)]
OTHERS += [MinMax(direction) for direction in DIRECTIONS] + [MinSum("unit"), MinSum(score="min")]

FROM_HONEST = {
    "alie": alie,
    "ipm": ipm,
    "min_max": min_max,
    "min_sum": min_sum,
    "mimic": mimic,
    "sign_flip": sign_flip,
}

problems = given(seed=st.integers(0, 10**6), n=st.integers(2, 12), d=st.integers(1, 9))


def normals(seed: int, n: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=made, dtype=torch.float64).to(dtype)


def leaving(rows: Tensor, direction: str) -> Tensor:
    mu = rows.mean(0)
    return {"std": -rows.std(0, correction=1), "sign": -mu.sign(), "unit": -mu / mu.norm()}[direction]


def context(n: int, d: int = 4, **changes: object) -> CraftContext:
    generator = torch.Generator().manual_seed(7)
    return dataclasses.replace(
        CraftContext(1, torch.zeros(d), torch.arange(10, 10 + n), torch.arange(n), generator), **changes
    )


def cohort(seed: int = 0, n: int = 11, d: int = 4, attackers: tuple[int, ...] = (1, 4, 7)) -> tuple[Tensor, Tensor]:
    malicious = torch.zeros(n, dtype=torch.bool)
    malicious[list(attackers)] = True
    return normals(seed, n, d), malicious


def brute_force_krum(rows: Tensor, num_malicious: int) -> int:
    """The row with the smallest sum of squared distances to its n - f - 2 nearest others, one by one."""
    scores = []
    for i in range(len(rows)):
        apart = sorted(float((rows[i] - rows[j]) @ (rows[i] - rows[j])) for j in range(len(rows)) if j != i)
        scores.append(sum(apart[: len(rows) - num_malicious - 2]))
    return scores.index(min(scores))


# Exact values and thresholds.


@pytest.mark.parametrize(
    ("clients", "num_malicious", "arxiv", "paper"),
    [
        (50, 24, 1.4261, 1.7507),
        (50, 10, 0.2533, 0.4677),
        (25, 5, 0.2533, 0.4677),
        (20, 4, 0.1573, 0.3853),
        (10, 2, 0.0, 0.2533),
        (20, 8, 0.6745, 1.0364),
    ],
)
def test_the_z_of_a_little_is_enough(clients, num_malicious, arxiv, paper):
    assert alie_z(clients, num_malicious) == pytest.approx(arxiv, abs=5e-5)
    assert alie_z(clients, num_malicious, "paper") == pytest.approx(paper, abs=5e-5)


@given(n=st.integers(1, 60), m=st.integers(0, 59), variant=st.sampled_from(["arxiv", "paper"]))
@settings(max_examples=80, deadline=None)
def test_z_is_finite_for_every_number_of_clients_and_grows_with_the_attackers(n, m, variant):
    if m >= n:
        with pytest.raises(RunError, match="no honest one"):
            alie_z(n, m, variant)
        return
    z = alie_z(n, m, variant)
    assert abs(z) < 4
    if 2 * (m + 1) < n:
        assert alie_z(n, m + 1, variant) > z


@problems
@settings(max_examples=40, deadline=None)
def test_alie_is_the_mean_less_z_sample_standard_deviations(seed, n, d):
    rows = normals(seed, n, d)
    expected = rows.mean(0) - 1.5 * rows.std(0, correction=1)
    assert torch.allclose(alie(rows, 2, z=1.5), expected.expand(2, d), rtol=0, atol=1e-12)
    own_z = rows.mean(0) - alie_z(n + 2, 2, "paper") * rows.std(0, correction=1)
    assert torch.allclose(alie(rows, 2, variant="paper")[0], own_z, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("eps", "along"), [(2.3, 0.010), (2.343, -0.0029)])
def test_ipm_turns_the_mean_beyond_its_threshold(eps, along):
    rows = normals(0, 7, 20)
    mu = rows.mean(0)
    whole = mean(torch.cat([rows, ipm(rows, 3, eps=eps)]))
    assert float(whole @ mu / (mu @ mu)) == pytest.approx(along, abs=1e-12)


@given(seed=st.integers(0, 10**6), honest=st.integers(1, 20), m=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_the_threshold_of_ipm_is_honest_per_malicious(seed, honest, m):
    rows = normals(seed, honest, 6)
    mu, threshold = rows.mean(0), honest / m
    below, above = (mean(torch.cat([rows, ipm(rows, m, eps=threshold * near)])) @ mu for near in (1 - 1e-6, 1 + 1e-6))
    assert float(below) > 0 > float(above)


@pytest.mark.parametrize("seed", range(8))
def test_krum_picks_a_little_is_enough(seed):
    honest, m = normals(seed, 16, 100) + 1, 4
    sent = alie(honest, m)
    assert brute_force_krum(torch.cat([honest, sent]), m) >= len(honest)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(selection.krum(torch.cat([honest, sent])[order], m), sent[0])


def test_krum_does_not_pick_what_is_scaled():
    honest, m = normals(0, 16, 100) + 1, 4
    whole = torch.cat([honest, scaled(honest[:m])])
    assert brute_force_krum(whole, m) < len(honest)
    assert torch.equal(selection.krum(whole, m), whole[brute_force_krum(whole, m)])


# Bounds on distances.


def min_max_holds(rows: Tensor, sent: Tensor) -> Tensor:
    """How much of the bound is left, relative to it."""
    bound = torch.stack([(rows - row).norm(dim=1) for row in rows]).max()
    return 1 - (rows - sent).norm(dim=1).max() / bound


def min_sum_holds(rows: Tensor, sent: Tensor, score: str) -> Tensor:
    sums = torch.stack([(rows - row).square().sum() for row in rows])
    return 1 - (rows - sent).square().sum() / (sums.max() if score == "max" else sums.min())


@pytest.mark.parametrize("attack", ["min_max", "min_sum max", "min_sum min"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 12), d=st.integers(1, 9), far=st.sampled_from([0.0, 1.0, 1e4]))
def test_the_bound_is_met_and_any_step_beyond_breaks_it(attack, direction, seed, n, d, far):
    rows, name = normals(seed, n, d) + far, attack.split()
    left = min_max_holds if name[0] == "min_max" else lambda rows, sent: min_sum_holds(rows, sent, name[1])
    sent = (
        min_max(rows, 1, direction=direction)[0]
        if name[0] == "min_max"
        else min_sum(rows, 1, direction=direction, score=name[1])[0]
    )
    mu, p = rows.mean(0), leaving(rows, direction)
    gamma = float((sent - mu) @ p / (p @ p))
    assert torch.allclose(sent, mu + gamma * p, rtol=1e-9, atol=1e-9)
    assert gamma >= 0
    assert abs(float(left(rows, sent))) < 1e-6
    assert float(left(rows, mu + 1.001 * gamma * p)) < 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gamma_is_that_of_a_bisection(direction):
    rows = normals(3, 9, 30) + 0.3
    mu, p = rows.mean(0), leaving(rows, direction)
    bounds = {
        "max": (min_max, min_max_holds, {}),
        "sum": (min_sum, lambda rows, sent: min_sum_holds(rows, sent, "max"), {"score": "max"}),
        "least": (min_sum, lambda rows, sent: min_sum_holds(rows, sent, "min"), {"score": "min"}),
    }
    for attack, left, rest in bounds.values():
        low, high = 0.0, 1e3
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if left(rows, mu + middle * p) >= 0 else (low, middle)
        assert torch.allclose(attack(rows, 1, direction=direction, **rest)[0], mu + low * p, rtol=0, atol=1e-9)


def test_a_sum_bounded_by_the_smallest_is_no_farther_than_one_bounded_by_the_largest():
    rows = normals(1, 10, 50)
    mu = rows.mean(0)
    near, far = ((min_sum(rows, 1, score=score)[0] - mu).norm() for score in ("min", "max"))
    apart = (rows - mu).norm(dim=1)
    assert float(near) == pytest.approx(float(apart.min()), rel=1e-12)
    assert float(far) == pytest.approx(float(apart.max()), rel=1e-12)


def test_small_differences_of_large_updates_are_seen_in_float32():
    rows = (1.0 + 1e-4 * normals(2, 8, 200)).float()
    apart = max((a.double() - b.double()).norm() for a in rows for b in rows)
    sent = min_max(rows, 1)[0].double()
    assert float(max((sent - row.double()).norm() for row in rows)) == pytest.approx(float(apart), rel=1e-3)


@pytest.mark.parametrize("attack", [alie, min_max, min_sum, mimic])
def test_equal_honest_updates_leave_no_room(attack):
    rows = normals(0, 1, 6).expand(5, 6)
    assert torch.equal(attack(rows, 2), rows[:2])
    assert torch.equal(attack(rows[:1], 2), rows[:2])


@pytest.mark.parametrize("direction", ["sign", "unit"])
def test_a_mean_of_zero_has_no_direction(direction):
    rows = torch.tensor([[1.0, -2.0], [-1.0, 2.0]])
    for attack in (min_max, min_sum):
        assert torch.equal(attack(rows, 1, direction=direction), torch.zeros(1, 2))


# Attacks by one client on its own.


def test_sign_flips_of_both_kinds():
    rows, own = normals(0, 5, 3), normals(1, 2, 3)
    assert torch.equal(sign_flip(rows, 2, own=own), -own)
    assert torch.allclose(sign_flip(rows, 2), -rows.mean(0).expand(2, 3), rtol=0, atol=1e-15)
    assert torch.allclose(scaled(own, kappa=4.0), -4 * own, rtol=1e-15, atol=0)


def test_gaussian_noise_has_its_standard_deviation_and_comes_from_the_generator():
    own = torch.ones(4, 50_000)
    sent = gaussian(own, std=0.3, generator=torch.Generator().manual_seed(1))
    assert float(sent.std()) == pytest.approx(0.3, rel=0.01)
    assert abs(float(sent.mean())) < 5 * 0.3 / 200_000**0.5
    assert not torch.equal(sent[0], sent[1])
    assert torch.equal(sent, gaussian(own, std=0.3, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("server_lr", [1.0, 0.25])
@pytest.mark.parametrize("attackers", [(2,), (0, 3, 5)])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_where_others_have_converged_the_attackers_replace_the_model(server_lr, attackers, weighting):
    rows, malicious = cohort(n=6, attackers=attackers)
    rows[~malicious] = 0
    ctx = context(6, server_lr=server_lr)
    sent = ModelReplacement(weighting).craft(rows, malicious, ctx)
    trained = rows[malicious].clone()
    rows[malicious] = sent
    weights = ctx.examples if weighting == "examples" else None
    wanted = mean(trained, None if weights is None else weights[malicious])
    assert torch.allclose(server_lr * mean(rows, weights), wanted, rtol=0, atol=1e-12)


def test_one_attacker_sends_n_per_learning_rate_times_its_update():
    rows, malicious = cohort(n=8, attackers=(3,))
    sent = ModelReplacement().craft(rows, malicious, context(8, server_lr=0.5))
    assert torch.allclose(sent, 16 * rows[3:4], rtol=1e-15, atol=0)
    assert torch.allclose(model_replacement(rows[3:4], share=1 / 8, server_lr=0.5), sent, rtol=1e-15, atol=0)


# The client that is copied.


def test_the_copied_row_is_the_farthest_along_the_direction_of_most_variance():
    for seed in range(10):
        rows = normals(seed, 9, 5) + 3
        centred = rows - rows.mean(0)
        along = centred @ torch.linalg.svd(centred).Vh[0]
        assert standing_out(rows) == int(along.abs().argmax())
        assert torch.equal(mimic(rows, 2), rows[[standing_out(rows)] * 2])


def test_of_two_rows_the_first_stands_out():
    rows = normals(0, 2, 40)
    assert standing_out(rows) == standing_out(rows.flip(0)) == 0
    assert standing_out(rows[:1].expand(4, 40)) == 0


def test_the_same_client_is_copied_in_every_round_while_it_takes_part():
    attack, malicious = Mimic(), cohort()[1]
    rows = normals(0, 11, 4)
    rows[9] += 50
    ctx = context(11)
    assert torch.equal(attack.craft(rows, malicious, ctx), rows[[9] * 3])
    state = attack.remember(rows, malicious, ctx)
    assert state["copied"].tolist() == [9]

    later = normals(1, 11, 4)
    later[2] += 50
    ctx = context(11, state=state)
    assert torch.equal(attack.craft(later, malicious, ctx), later[[9] * 3])
    assert attack.remember(later, malicious, ctx) is state

    there = torch.arange(11) != 9
    without = context(10, clients=torch.arange(11)[there], state=state)
    assert torch.equal(attack.craft(later[there], malicious[there], without), later[[2] * 3])
    assert attack.remember(later[there], malicious[there], without)["copied"].tolist() == [9, 2]


def test_a_client_can_be_named():
    rows, malicious = cohort()
    assert torch.equal(Mimic(5).craft(rows, malicious, context(11)), rows[[5] * 3])
    absent = Mimic(50).craft(rows, malicious, context(11))
    assert torch.equal(absent, Mimic().craft(rows, malicious, context(11)))


# All of them.


@pytest.mark.parametrize("name", FROM_HONEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype_are_kept_and_inputs_are_not_changed(name, dtype):
    rows = normals(0, 6, 5, dtype)
    before = rows.clone()
    for m in (0, 1, 4):
        sent = FROM_HONEST[name](rows, m)
        assert (sent.shape, sent.dtype) == ((m, 5), dtype)
        sent.zero_()
    assert torch.equal(rows, before)


@pytest.mark.parametrize("name", FROM_HONEST)
def test_what_is_no_cohort_is_refused(name):
    with pytest.raises(RequestError, match="n above 0"):
        FROM_HONEST[name](torch.zeros(0, 3), 2)
    with pytest.raises(RequestError, match="-1 is not a whole number"):
        FROM_HONEST[name](torch.zeros(4, 3), -1)


def test_a_share_of_nothing_replaces_no_model():
    with pytest.raises(RunError, match="moves no weights"):
        model_replacement(torch.zeros(1, 3), share=0.0)


@pytest.mark.parametrize("name", FROM_HONEST)
@problems
@settings(max_examples=25, deadline=None)
def test_scale_carries_over(name, seed, n, d):
    rows = normals(seed, n, d)
    assert torch.allclose(FROM_HONEST[name](8 * rows, 2), 8 * FROM_HONEST[name](rows, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["alie", "min_max", "min_sum", "mimic"])
@problems
@settings(max_examples=25, deadline=None)
def test_a_shift_of_all_rows_shifts_what_leaves_their_mean_by_their_spread(name, seed, n, d):
    rows, shift = normals(seed, n, d), torch.arange(d, dtype=torch.float64) - 2
    assert torch.allclose(FROM_HONEST[name](rows + shift, 2), FROM_HONEST[name](rows, 2) + shift, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FROM_HONEST)
def test_many_columns_are_treated_in_blocks_as_they_are_at_once(name, monkeypatch):
    rows = normals(0, 7, 23)
    whole = FROM_HONEST[name](rows, 2)
    monkeypatch.setattr(columns, "_WIDEST", 5)
    assert torch.allclose(FROM_HONEST[name](rows, 2), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attack", OWN + OTHERS, ids=repr)
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(11)))
def test_the_order_of_the_cohort_only_orders_what_is_sent(attack, order):
    rows, malicious = cohort()
    examples = torch.arange(10, 21)
    places = torch.tensor(order)
    sent = torch.zeros_like(rows)
    sent[malicious] = attack.craft(rows, malicious, context(11))
    moved = context(11, clients=places, examples=examples[places])
    assert torch.equal(attack.craft(rows[places], malicious[places], moved), sent[places][malicious[places]])
    kept = attack.remember(rows, malicious, context(11))
    assert str(attack.remember(rows[places], malicious[places], moved)) == str(kept)


@pytest.mark.parametrize("attack", OWN + OTHERS, ids=repr)
def test_an_attack_changes_no_input_and_sends_something_else(attack):
    rows, malicious = cohort()
    before = rows.clone()
    ctx = context(11)
    sent = attack.craft(rows, malicious, ctx)
    sent_again = attack.craft(rows.float(), malicious, context(11))
    assert sent_again.dtype == torch.float32
    assert not torch.equal(sent, rows[malicious])
    sent.zero_()
    assert torch.equal(rows, before)
    assert ctx.clients.tolist() == list(range(11))
    assert ctx.examples.tolist() == list(range(10, 21))
    assert pickle.loads(pickle.dumps(attack)) == attack


@pytest.mark.parametrize("attack", OWN + OTHERS, ids=repr)
def test_no_attacker_sends_nothing(attack):
    rows, malicious = cohort(attackers=())
    assert attack.craft(rows, malicious, context(11)).shape == (0, 4)
    assert attack.remember(rows, malicious, context(11)) == {}


@pytest.mark.parametrize("attack", OTHERS, ids=repr)
def test_without_an_honest_client_attackers_send_what_they_honestly_would(attack):
    rows, malicious = cohort(n=3, attackers=(0, 1, 2))
    assert torch.equal(attack.craft(rows, malicious, context(3)), rows)
    assert attack.remember(rows, malicious, context(3)) == {}


@pytest.mark.parametrize("attack", OWN[:3], ids=repr)
def test_attackers_that_need_nobody_attack_alone(attack):
    rows, malicious = cohort(n=3, attackers=(0, 1, 2))
    assert not torch.equal(attack.craft(rows, malicious, context(3)), rows)


@pytest.mark.parametrize("attack", OWN[:2], ids=repr)
def test_who_knows_its_own_update_alone_does_not_look_at_others(attack):
    rows, malicious = cohort()
    sent = attack.craft(rows, malicious, context(11))
    rows[~malicious] = float("nan")
    assert torch.equal(attack.craft(rows, malicious, context(11)), sent)
    assert (attack.knows, attack.colludes) == ("its own update", False)


@pytest.mark.parametrize("attack", OTHERS, ids=repr)
def test_who_knows_all_updates_says_so(attack):
    assert (attack.knows, attack.colludes) == ("all honest updates of the round", True)
    assert attack.acts_on == "model"


def test_what_an_attack_knows_stands_on_its_class():
    assert {kind.knows for kind in (Alie, Ipm, MinMax, MinSum, Mimic)} == {ModelAttack.knows}
    assert (SignFlip.knows, SignFlip("mean").knows, SignFlip().knows) == (Scaled.knows, ModelAttack.knows, Scaled.knows)
    assert Gaussian.knows == "the size of the model"
    assert "learning rate" in ModelReplacement.knows
    assert ModelReplacement.colludes
    assert not Gaussian.colludes
