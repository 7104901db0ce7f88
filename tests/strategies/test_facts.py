"""What the catalogue says of a preset is what the preset does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
import strategies.kinds  # noqa: F401  (declares the kind)
from clients import catalog
from clients.parts import Part
from clients.task import Classification
from clients.weights import Layout
from strategies.context import Context

SETTINGS = {"signsgd": {"momentum": 0.9}, "dpfedavg": {"adaptive": True}}


class People:
    clients, trainable, examples = 4, np.arange(4), np.ones(4, dtype=np.int64)


@pytest.mark.parametrize("name", [entry.name for entry in catalog.entries("strategies")])
def test_a_preset_needs_and_keeps_what_it_says(name):
    made = catalog.build(Part(name, SETTINGS.get(name, {})), "strategies")
    layout = Layout(nn.Linear(3, 2))
    ctx = Context(0, layout, torch.zeros(layout.size), People(), Classification())
    assert made.needs == made.aggregator.needs
    kept = {**made.init(ctx), **made.client_state(ctx)}
    assert bool(kept) == (made.keeps != "nothing")
    assert ("client" in made.keeps) == bool(made.client_state(ctx))


OWN = """
from strategies import Aggregator

class Middle(Aggregator):
    needs = "rows"

    def __init__(self, share: float = 1.0):
        self.share = share

    def combine(self, u, state, ctx):
        return self.share * u.rows.mean(0), state, {}
"""


@pytest.mark.parametrize("inner", ['"own.py:Middle"', '{ name = "own.py:Middle", share = 0.5 }'])
def test_a_rule_of_ones_own_inside_another_is_found_from_the_record_too(inner, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "own.py").write_text(OWN)
    text = f'rounds = 1\n[strategy.aggregator]\nname = "bucketing"\ninner = {inner}\n'
    (tmp_path / "here" / "mixed.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    first = fedsim.run(tmp_path / "here" / "mixed.toml", out=tmp_path / "first")
    again = fedsim.run(tmp_path / "first" / "experiment.toml", out=tmp_path / "again")
    assert first.summary["weights_sha256"] == again.summary["weights_sha256"]
