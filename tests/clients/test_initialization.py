from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clients.errors import RequestError
from clients.initialization import fans, initialize

VARIANCE = {
    "xavier_uniform": lambda i, o: 2 / (i + o),
    "xavier_normal": lambda i, o: 2 / (i + o),
    "he_uniform": lambda i, o: 2 / i,
    "he_normal": lambda i, o: 2 / i,
    "lecun_uniform": lambda i, o: 1 / i,
    "lecun_normal": lambda i, o: 1 / i,
}


@pytest.mark.parametrize("name", VARIANCE)
@pytest.mark.parametrize(
    ("layer", "fan_in", "fan_out"),
    [
        (nn.Linear(200, 150), 200, 150),
        (nn.Conv2d(32, 64, 3, groups=4), 8 * 9, 16 * 9),
        (nn.ConvTranspose2d(32, 64, 3), 32 * 9, 64 * 9),
    ],
)
def test_the_empirical_spread_is_the_papers(name, layer, fan_in, fan_out):
    assert fans(layer) == (fan_in, fan_out)
    weight = initialize(layer, name, seed=0).weight.detach()
    expected = math.sqrt(VARIANCE[name](fan_in, fan_out))
    # The standard deviation of N normal draws has standard error expected / sqrt(2 N).
    assert abs(float(weight.std()) - expected) < 3 * expected / math.sqrt(2 * weight.numel())
    if name.endswith("uniform"):
        assert float(weight.abs().max()) <= math.sqrt(3) * expected
    assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def test_fans_where_torch_has_them_wrong():
    assert fans(nn.Conv2d(8, 16, 3, groups=4)) == (18, 36)
    assert fans(nn.ConvTranspose2d(8, 16, 3)) == (72, 144)


def test_he_keeps_the_variance_through_twenty_relu_layers():
    net = nn.Sequential(*[part for _ in range(20) for part in (nn.Linear(256, 256), nn.ReLU())])
    initialize(net, "he_normal", seed=1)
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ratio = float(net(x).square().mean() / x.square().mean())
    # Wide enough for a width of 256; the default initialisation ends below 1e-6.
    assert 0.25 < ratio < 4


def test_orthogonal_zeros_and_truncated_normal():
    weight = initialize(nn.Linear(40, 30), "orthogonal", seed=0).weight.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(30), atol=1e-5)
    assert initialize(nn.Linear(4, 3), "zeros", seed=0).weight.abs().sum() == 0
    weight = initialize(nn.Linear(400, 300), {"name": "truncated_normal", "std": 0.1}, seed=0).weight.detach()
    assert float(weight.abs().max()) <= 0.2


def test_norm_layers_start_at_identity_and_others_by_their_own_rule():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Embedding(100, 8))
    model[1].weight.data.fill_(5)
    initialize(model, "he_normal", seed=0)
    assert model[1].weight.eq(1).all()
    assert model[1].bias.eq(0).all()
    assert abs(float(model[3].weight.detach().std()) - 1) < 0.1


def test_the_same_seed_gives_the_same_weights_and_another_gives_others():
    def made(name, seed):
        return [
            p.detach().clone()
            for p in initialize(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), name, seed).parameters()
        ]

    for name in ("he_normal", "default"):
        assert all(map(torch.equal, made(name, 0), made(name, 0)))
        assert not all(map(torch.equal, made(name, 0), made(name, 1)))
    # Layers draw from streams of their own: the two differ even where shapes agree.
    twins = initialize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "he_normal", 0)
    assert not torch.equal(twins[0].weight, twins[1].weight)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(RequestError, match="he_normal"):
        initialize(nn.Linear(2, 2), "he_norml", seed=0)
