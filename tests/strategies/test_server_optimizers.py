from __future__ import annotations

import pytest
import torch

import strategies
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
