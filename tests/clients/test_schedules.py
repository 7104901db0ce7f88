from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import clients.catalog
from clients.parts import Part
from clients.schedules import Constant, Cosine, Schedule, Step, Warmup
from tests.clients.problems import SIZES, apart, digits_like, mlp, trainer

TOTAL = 50


def ours(schedule: Schedule, total: int = TOTAL) -> list[float]:
    return [schedule.factor(at, total) for at in range(total)]


def torchs(make, total: int = TOTAL) -> list[float]:
    """The rates of torch's scheduler on a base rate of 1, at each position."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def after_warm_up(shape, warmup: int):
    def make(optimizer):
        rising = lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
        return lr_scheduler.SequentialLR(optimizer, [rising, shape(optimizer)], [warmup])

    return make


PAIRS = {
    "constant": (Constant(), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "step": (Step(7, 0.3), lambda o: lr_scheduler.StepLR(o, 7, 0.3)),
    "cosine": (Cosine(), lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL)),
    "cosine to a floor": (Cosine(0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.1)),
    "warm-up": (Warmup(8), lambda o: lr_scheduler.LinearLR(o, 1 / 8, 1.0, total_iters=7)),
    "step after a warm-up": (Step(7, 0.3, warmup=5), after_warm_up(lambda o: lr_scheduler.StepLR(o, 7, 0.3), 5)),
    "cosine after a warm-up": (
        Cosine(0.1, warmup=6),
        after_warm_up(lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL - 6, eta_min=0.1), 6),
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize(("schedule", "make"), PAIRS.values(), ids=PAIRS)
def test_the_factors_are_torchs(schedule, make):
    assert ours(schedule) == pytest.approx(torchs(make), rel=0, abs=1e-12)


def test_the_cosine_by_hand():
    assert ours(Cosine(0.2), 4) == pytest.approx([1.0, 0.2 + 0.4 * (1 + 2**-0.5), 0.6, 0.2 + 0.4 * (1 - 2**-0.5)])


lengths = st.integers(1, 40)
schedules = st.one_of(
    st.builds(Constant, warmup=st.integers(0, 10)),
    st.builds(Step, lengths, st.floats(0.05, 1), warmup=st.integers(0, 10)),
    st.builds(Cosine, st.floats(0, 1), warmup=st.integers(0, 10)),
    st.builds(Warmup, lengths),
)


@settings(deadline=None)
@given(schedules, lengths)
def test_a_factor_is_above_zero_and_at_most_one(schedule, total):
    assert all(0 < factor <= 1 for factor in ours(schedule, total))


@settings(deadline=None)
@given(schedules, lengths)
def test_a_factor_rises_in_the_warm_up_and_never_after(schedule, total):
    factors = ours(schedule, total)
    first = schedule.length if isinstance(schedule, Warmup) else schedule.warmup
    rising, falling = factors[:first], factors[first:]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(a >= b for a, b in itertools.pairwise(falling))


@pytest.mark.parametrize("schedule", [Constant(warmup=8), Step(2, warmup=8), Cosine(warmup=8), Warmup(8)])
def test_a_run_shorter_than_the_warm_up_only_rises(schedule):
    assert ours(schedule, 5) == [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8]


@settings(deadline=None)
@given(schedules, st.lists(st.tuples(st.integers(0, 39), lengths), min_size=1, max_size=5))
def test_clients_of_different_lengths_each_have_their_own_factor(schedule, pairs):
    pairs = [(at % total, total) for at, total in pairs]
    at, total = torch.tensor(pairs).T
    together = schedule.factor(at, total)
    assert together.dtype == torch.float64
    assert together.tolist() == [schedule.factor(*pair) for pair in pairs]
    at_once = schedule.factor(0, total)
    assert at_once.tolist() == [schedule.factor(0, each) for each in total.tolist()]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "constant"}, Constant()),
        ({"name": "step", "every": 30}, Step(30, 0.1)),
        ({"name": "cosine", "floor": 0.1, "warmup": 5}, Cosine(0.1, warmup=5)),
        ({"name": "warmup", "length": 5}, Warmup(5)),
    ],
)
def test_schedules_go_by_name(settings, expected):
    assert clients.catalog.build(Part.of(settings), "schedules") == expected


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"name": "step"}, "client.schedule.every: missing; give a whole number of at least 1"),
        ({"name": "step", "every": 0}, "client.schedule.every: 0 is out of range"),
        ({"name": "cosine", "floor": 1.5}, "client.schedule.floor: 1.5 is out of range"),
        ({"name": "cosine", "warmup": -1}, "client.schedule.warmup: -1 is out of range"),
        ({"name": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_a_wrong_setting_is_named(settings, line):
    assert line in "\n".join(clients.catalog.check(Part.of(settings), "schedules", key="client.schedule"))


def test_no_more_goes_by_name_than_the_schedules():
    assert [entry.name for entry in clients.catalog.entries("schedules")] == ["constant", "step", "cosine", "warmup"]


class Halving(Schedule):
    """One of a user's own, of plain numbers."""

    def factor(self, at, total):
        return 0.5**at


@pytest.mark.parametrize("stacked", [True, False])
def test_a_schedule_of_ones_own_is_one_method(stacked):
    found = []
    for schedule in (Halving(), Step(1, 0.5), Constant()):
        training = trainer(mlp(), digits_like(), stacked=stacked, step_schedule=schedule)
        found.append(training.train(np.arange(len(SIZES)), training.layout.flatten(mlp()), 1).updates.rows)
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-7)
    assert apart(found[2], found[1]) > 0.1
    assert repr(Halving()) == "Halving()"
