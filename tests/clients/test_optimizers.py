from __future__ import annotations

import pytest
import torch

from clients.optimizers import Adagrad, Adam, AdamW, Momentum, Nesterov, RMSprop, Sgd

PAIRS = [
    (Sgd(), lambda p: torch.optim.SGD(p, lr=0.05)),
    (Momentum(0.8), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8)),
    (Nesterov(0.8), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True)),
    (Adam(), lambda p: torch.optim.Adam(p, lr=0.05)),
    (AdamW(weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
    (RMSprop(), lambda p: torch.optim.RMSprop(p, lr=0.05)),
    (Adagrad(), lambda p: torch.optim.Adagrad(p, lr=0.05)),
]


@pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=[type(ours).__name__ for ours, _ in PAIRS])
def test_a_block_steps_as_torch_steps_each_row(ours, torchs):
    made = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 6, generator=made, dtype=torch.float64)
    targets = torch.randn(3, 6, generator=made, dtype=torch.float64)
    parameters = [torch.nn.Parameter(row.clone()) for row in rows]
    optimizers = [torchs([parameter]) for parameter in parameters]
    state = ours.init(rows)
    for step in range(7):
        for parameter, target, optimizer in zip(parameters, targets, optimizers, strict=True):
            optimizer.zero_grad()
            (parameter - target).pow(4).sum().backward()
            optimizer.step()
        ours.step(rows, 4 * (rows - targets) ** 3, state, 0.05, step)
    assert torch.allclose(rows, torch.stack([p.detach() for p in parameters]), rtol=0, atol=1e-12)
