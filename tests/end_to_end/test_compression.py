"""Codecs in whole runs, and payloads read by nothing but their formulas."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fedsim
from clients.weights import Layout
from strategies import FedAvg, SignMajorityRule, Strategy
from strategies.compression import QSGD, Codec, Downlink, ErrorFeedback, Quantize, Sign
from strategies.plugins import Plugin
from tests.strategies.problems import context, updates

SMALL = {"data": {"clients": 6}, "strategy": {"clients_per_round": 4}, "evaluation": {"every": 3}}

STEPS = '''
import numpy as np
import torch
from strategies import Codec


class Steps(Codec):
    """Whole multiples of a step, 2 bytes each."""

    def __init__(self, *, step: float = 0.01):
        self.step = step

    def encode(self, row, generator):
        return (row / self.step).round().clamp(-32768, 32767).numpy().astype("<i2").tobytes()

    def decode(self, payload, size):
        return torch.from_numpy(np.frombuffer(payload, "<i2").astype(np.float32)) * self.step
'''


class Clients(Plugin):
    """Notes what its clients start from and what they send, by round."""

    def __init__(self) -> None:
        self.starts: dict[int, Tensor] = {}
        self.norms: list[float] = []

    def client(self, u, state, ctx):
        self.starts[ctx.round] = ctx.weights.clone()
        self.norms.append(float(u.rows.norm()))
        return u, state


class Server(Plugin):
    """Notes the server's weights at the start of each round."""

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}

    def server_total(self, u, state, ctx):
        self.weights[ctx.round] = ctx.weights.clone()
        return u, state


def codes(payload: bytes, bits: int, size: int) -> list[int]:
    number = int.from_bytes(payload, "little")
    return [number >> i * bits & (1 << bits) - 1 for i in range(size)]


@pytest.mark.parametrize("codec", [Quantize(bits=5), Quantize(bits=4, rounding="nearest"), QSGD(levels=7)], ids=repr)
def test_a_payload_is_a_little_endian_scale_and_codes_of_equally_spaced_levels(codec):
    row = torch.randn(33, generator=torch.Generator().manual_seed(0))
    payload = codec.encode(row, torch.Generator().manual_seed(1))
    bits, intervals = (4, 14) if isinstance(codec, QSGD) else (codec.bits, 2**codec.bits - 1)
    (scale,) = struct.unpack("<f", payload[:4])
    expected = [(2 * code / intervals - 1) * scale for code in codes(payload[4:], bits, 33)]
    assert codec.decode(payload, 33).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_downlink_has_a_scale_for_each_tensor_where_its_codec_has():
    layout = Layout(nn.Linear(30, 10))
    weights = torch.cat([torch.full((300,), 100.0), torch.full((10,), 0.5)])
    ctx = replace(context(weights), layout=layout)
    row, nbytes = FedAvg(plugins=[Downlink(Quantize(bits=4, scale="tensor"))]).down({}, ctx)
    assert nbytes == 2 * 4 + 155
    assert torch.equal(row, weights)


@pytest.mark.parametrize(("flippers", "survives"), [(4, True), (5, False)])
def test_a_majority_of_nine_survives_four_flippers_and_not_five(flippers, survives):
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    rows = signs * (0.1 + torch.rand(9, 5, generator=torch.Generator().manual_seed(1)))
    rows[:flippers] *= -1e6
    strategy, ctx = Strategy(plugins=[Sign(scaled=False)], aggregator=SignMajorityRule()), context(torch.zeros(5))
    u, _ = strategy.contribute(updates(rows), {}, {}, ctx)
    assert torch.equal(strategy.aggregate(u, {}, ctx)[0], signs) == survives


def test_clients_of_a_run_begin_from_the_decoded_weights_and_are_billed_for_them(tmp_path):
    """With a step so small that nothing is learnt, the server's weights stay exact, however coarse what is sent."""
    clients, server = Clients(), Server()
    plugins = [Downlink(Quantize(bits=3)), clients, server]
    experiment = fedsim.Experiment(**SMALL, rounds=3, client={"epochs": 1, "lr": 1e-12}, plugins=plugins)
    result = fedsim.run(experiment, out=tmp_path / "run", engine="inline")
    exact = server.weights[1]
    assert result.history["bytes_down"].tolist()[1:] == [4 * (4 + math.ceil(3 * len(exact) / 8))] * 3
    assert sorted(clients.starts) == [1, 2, 3]
    for start in clients.starts.values():
        places = (start.double() / float(exact.abs().max()) + 1) * 3.5
        assert float((places - places.round()).abs().max()) < 1e-5
        assert float((start - exact).norm()) > 0.01 * float(exact.norm())
    assert max(clients.norms) < 1e-6
    assert float((server.weights[3] - exact).abs().max()) < 1e-7


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a downlink"])
def test_a_codec_by_file_is_a_plug_in_like_any_other_in_a_run(inside, tmp_path):
    (tmp_path / "own.py").write_text(STEPS)
    part = {"name": "own.py:Steps", "step": 0.001}
    plugin = {"name": "downlink", "codec": part} if inside else part
    experiment = fedsim.Experiment(tmp_path, **SMALL, rounds=1, client={"epochs": 1}, plugins=[plugin])
    history = fedsim.run(experiment, out=tmp_path / "run", engine="inline").history
    plain = fedsim.run(fedsim.Experiment(**SMALL, rounds=1, client={"epochs": 1}), out=tmp_path / "plain").history
    down, up = plain["bytes_down"][1], plain["bytes_up"][1] - 4 * 8
    assert history["bytes_down"][1] == (down / 2 if inside else down)
    assert history["bytes_up"][1] - 4 * 8 == (up if inside else up / 2)


def test_a_client_whose_update_breaks_once_keeps_what_it_had(tmp_path):
    class Break(Plugin):
        def client(self, u, state, ctx):
            broken = (u.clients == 2)[:, None] & torch.tensor(ctx.round == 2)
            return u.replace(rows=u.rows.masked_fill(broken, torch.nan)), state

    everyone = {**SMALL, "strategy": {"clients_per_round": 6}}
    plugins = [Break(), ErrorFeedback("top_k")]
    experiment = fedsim.Experiment(**everyone, rounds=4, client={"epochs": 1}, plugins=plugins)
    result = fedsim.run(experiment, out=tmp_path / "run", engine="inline")
    events = fedsim.load(result.out).events
    assert events["round"][events["kind"] == "dropped_update"].tolist() == [2]


def test_the_loop_of_the_base_is_what_the_block_of_all_tensors_gives():
    layout = Layout(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1)))
    rows = torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0))
    ctx = replace(context(torch.zeros(layout.size)), layout=layout)
    codec = Quantize(bits=3, scale="tensor")
    u, _ = codec.client(updates(rows), {}, ctx)
    keyed = [ctx.generator("codec", client) for client in range(3)]
    arrived, nbytes = Codec.transmit(codec, rows, keyed, [slot.slice for slot in layout])
    assert torch.equal(u.rows, arrived)
    assert u.nbytes.tolist() == nbytes.tolist() == [4 * 4 + math.ceil(3 * layout.size / 8)] * 3
