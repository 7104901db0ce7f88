from __future__ import annotations

import pytest
import torch

from clients.optimizers import Adagrad, Adam, AdamW, Momentum, Nesterov, RMSprop, Sgd

PAIRS = [
    (Sgd(), lambda p, lr: torch.optim.SGD(p, lr=lr)),
    (Momentum(0.8), lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.8)),
    (Nesterov(0.8), lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.8, nesterov=True)),
    (Adam(), lambda p, lr: torch.optim.Adam(p, lr=lr)),
    (AdamW(weight_decay=0.1), lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1)),
    (RMSprop(), lambda p, lr: torch.optim.RMSprop(p, lr=lr)),
    (Adagrad(), lambda p, lr: torch.optim.Adagrad(p, lr=lr)),
]
every_optimizer = pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=[type(ours).__name__ for ours, _ in PAIRS])


def block(dtype=torch.float64):
    made = torch.Generator().manual_seed(0)
    rows, targets = (0.4 * torch.randn(3, 6, generator=made, dtype=torch.float64) for _ in range(2))
    return rows.to(dtype), targets.to(dtype)


def slope(rows, targets):
    """The gradient of ||w - target||_4^4."""
    return 4 * (rows - targets) ** 3


def torch_steps(make, row, target, rates):
    """Where torch's optimiser takes one row, and its learning rate at each step."""
    parameter = torch.nn.Parameter(row.clone())
    optimizer = make([parameter], rates[0])
    for lr in rates:
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = slope(parameter.detach(), target)
        optimizer.step()
    return parameter.detach()


@every_optimizer
def test_a_block_steps_as_torch_steps_each_row(ours, torchs):
    rows, targets = block()
    expected = [torch_steps(torchs, row, target, [0.05] * 7) for row, target in zip(rows, targets, strict=True)]
    state = ours.init(rows)
    for step in range(7):
        ours.step(rows, slope(rows, targets), state, 0.05, step)
    assert torch.allclose(rows, torch.stack(expected), rtol=0, atol=1e-12)


@every_optimizer
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["64", "32"])
def test_a_rate_and_a_count_for_each_client_are_those_for_all_where_they_are_equal(ours, torchs, dtype, tolerance):
    rows, targets = block(dtype)
    apart = rows.clone()
    state, apart_state = ours.init(rows), ours.init(rows)
    for step in range(7):
        ours.step(rows, slope(rows, targets), state, 0.05, step)
        lr, count = torch.full((3, 1), 0.05, dtype=dtype), torch.full((3, 1), float(step), dtype=dtype)
        ours.step(apart, slope(apart, targets), apart_state, lr, count)
        assert torch.allclose(apart, rows, rtol=0, atol=tolerance)
    assert all(torch.allclose(apart_state[name], state[name], rtol=tolerance, atol=tolerance) for name in state)


@every_optimizer
def test_clients_go_on_from_their_own_counts_at_their_own_rates(ours, torchs):
    """Moments that were kept: clients have taken 0, 2 and 5 steps before, and each follows a schedule of its own."""
    rows, targets = block()
    before = [0, 2, 5]
    rates = [[0.05 / (1 + i + step) for step in range(n + 4)] for i, n in enumerate(before)]
    expected = [torch_steps(torchs, *pair, lrs) for *pair, lrs in zip(rows, targets, rates, strict=True)]
    state = ours.init(rows)
    for i, n in enumerate(before):
        one = slice(i, i + 1)
        for step in range(n):
            mine = {name: value[one] for name, value in state.items()}
            ours.step(rows[one], slope(rows[one], targets[one]), mine, rates[i][step], step)
    count = torch.tensor(before, dtype=torch.float64)[:, None]
    for step in range(4):
        lr = torch.tensor([lrs[n + step] for lrs, n in zip(rates, before, strict=True)], dtype=torch.float64)[:, None]
        ours.step(rows, slope(rows, targets), state, lr, count + step)
    assert torch.allclose(rows, torch.stack(expected), rtol=0, atol=1e-12)


def test_adams_first_steps_in_float32_are_as_exact_for_each_client_as_for_all():
    """1 - 0.999 is 0.001: computed in float32 it would be wrong by 1e-5."""
    rows = torch.zeros(2, 1)
    Adam().step(rows, torch.ones(2, 1), Adam().init(rows), 1.0, torch.zeros(2, 1))
    assert torch.allclose(rows, torch.full((2, 1), -1.0), rtol=0, atol=2e-7)
