from __future__ import annotations

import pytest
import torch

import clients.catalog
import strategies
from clients.errors import RequestError
from clients.parts import Part
from strategies import server_optimizers
from tests.strategies.problems import context, play

D = (0.5, -0.2, 0.1)


def third(optimizer) -> float:
    row = torch.zeros(1, dtype=torch.float64)
    state = optimizer.init(row)
    for update in D:
        row, state = optimizer.step(row, torch.tensor([update], dtype=torch.float64), state)
    return float(row)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (server_optimizers.Adam(lr=0.1, b1=0.9, b2=0.99, tau=1e-3), 0.202603087905704),
        (server_optimizers.Yogi(lr=0.1, b1=0.9, b2=0.99, tau=1e-3), 0.201889398934932),
        (server_optimizers.Adagrad(lr=0.1, b1=0.0, tau=1e-3), 0.0809543152523742),
        (server_optimizers.Adam(lr=0.1, b1=0.9, b2=0.99, tau=1e-3, bias_correction=True), 0.172283597171354),
        (server_optimizers.SGD(lr=1.0, momentum=0.9), 1.075),
    ],
)
def test_the_third_iterate_is_algorithm_2s(optimizer, expected):
    assert abs(third(optimizer) - expected) < 1e-12


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (server_optimizers.SGD(lr=0.3, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)),
        (
            server_optimizers.SGD(lr=0.3, momentum=0.9, nesterov=True),
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True),
        ),
        (
            server_optimizers.Adam(lr=0.1, b2=0.99, bias_correction=True),
            lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), eps=1e-3),
        ),
        (server_optimizers.Adagrad(lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-3)),
    ],
)
def test_the_same_as_torch_on_the_pseudo_gradient(ours, torchs):
    made = torch.Generator().manual_seed(0)
    row = torch.randn(5, generator=made, dtype=torch.float64)
    parameter = torch.nn.Parameter(row.clone())
    optimizer, state = torchs([parameter]), ours.init(row)
    for _ in range(9):
        update = torch.randn(5, generator=made, dtype=torch.float64)
        row, state = ours.step(row, update, state)
        parameter.grad = -update
        optimizer.step()
    assert torch.allclose(row, parameter.detach(), rtol=0, atol=1e-12)


def test_limits_of_the_adaptive_rules():
    update = torch.tensor([0.3, -2.0], dtype=torch.float64)
    row = torch.zeros(2, dtype=torch.float64)
    sign = server_optimizers.Adam(lr=0.1, b1=0.0, b2=0.0, tau=1e-300)
    assert torch.allclose(sign.step(row, update, sign.init(row))[0], 0.1 * update.sign(), rtol=0, atol=1e-12)
    adam, yogi = server_optimizers.Adam(), server_optimizers.Yogi()
    assert torch.equal(adam.step(row, update, adam.init(row))[0], yogi.step(row, update, yogi.init(row))[0])
    started = server_optimizers.Adam(initial_accumulator=1e-6).init(row)["v"]
    assert torch.equal(started, torch.full((2,), 1e-6, dtype=torch.float64))


def test_arguments_are_left_alone():
    for optimizer in (server_optimizers.SGD(momentum=0.9), server_optimizers.Adam(), server_optimizers.Adagrad()):
        row, update = torch.ones(3), torch.ones(3)
        state = optimizer.init(row)
        kept = {name: value.clone() for name, value in state.items()}
        optimizer.step(row, update, state)
        assert torch.equal(row, torch.ones(3))
        assert torch.equal(update, torch.ones(3))
        assert all(torch.equal(value, kept[name]) for name, value in state.items())


def test_fedavgm_without_momentum_is_fedavg_to_the_bit():
    made = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(4, 6, generator=made), torch.randn(6, generator=made)
    plain, momentum = strategies.FedAvg(), strategies.FedAvgM(lr=1.0, momentum=0.0)
    ctx = context(weights)
    assert torch.equal(play(plain, rows, plain.init(ctx), ctx)[0], play(momentum, rows, momentum.init(ctx), ctx)[0])


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"])
def test_presets_carry_their_state_from_round_to_round(name):
    strategy = getattr(strategies, name)(lr=0.1)
    optimizer = strategy.server_optimizer
    x = torch.zeros(1, dtype=torch.float64)
    expected, plain = x, optimizer.init(x)
    state = strategy.init(context(x))
    for update in D:
        step = torch.tensor([update], dtype=torch.float64)
        expected, plain = optimizer.step(expected, step, plain)
        x, state = play(strategy, step[None], state, context(x))
    assert torch.allclose(x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["Adam", "Yogi"])
@pytest.mark.parametrize("name", ["b1", "b2"])
@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, float("nan")])
def test_decays_outside_0_to_1_are_refused(rule, name, value):
    with pytest.raises(RequestError, match=rf"server_optimizer\.{name}: .* given; give at least 0 and below 1"):
        getattr(server_optimizers, rule)(**{name: value})
    with pytest.raises(RequestError, match=rf"server_optimizer\.{name}: "):
        getattr(strategies, f"Fed{rule}")(**{name: value})
    for kind, named in (("server_optimizers", rule), ("strategies", f"Fed{rule}")):
        (line,) = clients.catalog.check(Part(named, {name: value}), kind, key="strategy")
        assert line.startswith(f"strategy.{name}: ")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: server_optimizers.SGD(momentum=1.0),
            "server_optimizer.momentum: 1.0 given; give at least 0 and below 1",
        ),
        (lambda: server_optimizers.SGD(lr=0.0), "server_optimizer.lr: 0.0 given; give a finite number above 0"),
        (lambda: server_optimizers.Adagrad(b1=1.0), "server_optimizer.b1: 1.0 given; give at least 0 and below 1"),
        (lambda: server_optimizers.Adam(tau=0.0), "server_optimizer.tau: 0.0 given; give a finite number above 0"),
        (
            lambda: server_optimizers.Adam(initial_accumulator=-1e-6),
            "server_optimizer.initial_accumulator: -1e-06 given; give a finite number of at least 0",
        ),
    ],
)
def test_numbers_without_a_meaning_are_refused(make, said):
    with pytest.raises(RequestError) as refused:
        make()
    assert refused.value.problems == [said]


def test_all_wrong_numbers_are_named_at_once():
    with pytest.raises(RequestError) as refused:
        server_optimizers.Yogi(lr=float("inf"), b1=1.0, b2=-0.5)
    assert len(refused.value.problems) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("FedAdam", 0.202603087905704), ("FedYogi", 0.201889398934932), ("FedAdagrad", 0.0809543152523742)],
)
def test_presets_give_the_third_iterate_of_algorithm_2(name, expected):
    strategy = getattr(strategies, name)(lr=0.1)
    x = torch.zeros(1, dtype=torch.float64)
    state = strategy.init(context(x))
    for update in D:
        x, state = play(strategy, torch.tensor([[update]], dtype=torch.float64), state, context(x))
    assert abs(float(x) - expected) < 1e-12


def test_a_first_accumulator_holds_the_first_step_back():
    """x_1 = lr (1 - b1) D / (sqrt(b2 v_0 + (1 - b2) D^2) + tau), and Adagrad's sqrt(v_0 + D^2)."""
    d, v = 0.5, 0.04
    row, update = torch.zeros(1, dtype=torch.float64), torch.tensor([d], dtype=torch.float64)
    adam = server_optimizers.Adam(lr=0.1, initial_accumulator=v)
    expected = 0.1 * 0.1 * d / ((0.99 * v + 0.01 * d * d) ** 0.5 + 1e-3)
    assert abs(float(adam.step(row, update, adam.init(row))[0]) - expected) < 1e-15
    adagrad = server_optimizers.Adagrad(lr=0.1, initial_accumulator=v)
    expected = 0.1 * d / ((v + d * d) ** 0.5 + 1e-3)
    assert abs(float(adagrad.step(row, update, adagrad.init(row))[0]) - expected) < 1e-15
