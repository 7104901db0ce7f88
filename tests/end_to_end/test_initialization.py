"""Where a run's first weights come from: told on the command line, by files, by earlier runs, by code of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedsim
from clients.errors import RequestError
from tests.end_to_end.commands import run

OWN = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, input_shape, classes):
        super().__init__(nn.Linear(input_shape[0], 8), nn.ReLU(), nn.Linear(8, classes))
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.25)

def ramp(weight, fan_in, fan_out, generator, *, top=1.0):
    return weight.copy_(torch.linspace(0, top, weight.numel()).view_as(weight))

def halves(model, generator, *, value=0.5):
    for parameter in model.parameters():
        parameter.fill_(value)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def still(folder: Path, out: str, model: str = "mlp", **client) -> dict[str, torch.Tensor]:
    """What a run starts from: with steps that are smaller than any float32 number it also ends with that."""
    experiment = fedsim.Experiment(folder, rounds=1, model=model, client={"lr": 1e-300, "epochs": 1, **client})
    return fedsim.run(experiment, out=folder / out, engine="inline").weights


def test_patterns_on_the_command_line_are_written_down_in_their_order(tmp_path):
    """TOML has names before tables, yet of the patterns that match a layer the last one counts."""
    patterns = 'client.layer_initialization={"h*" = {name = "orthogonal", gain = 2.0}, "head" = "zeros"}'
    told = run(tmp_path, "--set", "rounds=1", "--set", patterns, "--out", "told")
    resolved = fedsim.load(tmp_path / "told").experiment["client"]["layer_initialization"]
    assert list(resolved) == ["h*", "head"]
    again = run(tmp_path, "told/experiment.toml", "--out", "again")
    assert again["weights_sha256"] == told["weights_sha256"]


def test_an_earlier_run_gives_the_same_start_on_every_engine(folder):
    first = fedsim.run(
        fedsim.Experiment(folder, rounds=2, model={"name": "mlp", "norm": "batch"}), out=folder / "first"
    )
    newest = max((folder / "first" / "checkpoints").iterdir())
    ends = set()
    for path, engine, workers in [("first", "inline", None), (str(newest), "processes", 2)]:
        second = fedsim.Experiment(
            folder,
            rounds=2,
            model={"name": "mlp", "norm": "batch"},
            client={"initialization": {"name": "file", "path": path}},
        )
        result = fedsim.run(second, out=folder / engine, engine=engine, workers=workers)
        start = fedsim.load(folder / engine).history.iloc[0]
        assert start["test_accuracy"] == first.metrics["test"]["accuracy"]
        ends.add(result.summary["weights_sha256"])
    assert len(ends) == 1


def test_a_model_of_ones_own_keeps_its_weights_unless_told_otherwise(folder):
    as_made = still(folder, "made", "own.py:Net")
    assert all(tensor.eq(0.25).all() for tensor in as_made.values())
    headless = still(folder, "headless", "own.py:Net", layer_initialization={"2": "zeros"})
    assert [bool(tensor.eq(0.25).all()) for tensor in headless.values()] == [True, True, False, False]
    drawn = still(folder, "drawn", "own.py:Net", initialization="he_normal")
    assert float(drawn["0.weight"].std()) > 0.1
    assert drawn["0.bias"].eq(0).all()


def test_functions_of_ones_own_fill_layers_and_models(folder):
    ramp = {"name": "own.py:ramp", "top": 2.0}
    model = still(folder, "run", initialization="own.py:halves", layer_initialization={"head": ramp})
    assert model["hidden1.weight"].eq(0.5).all()
    assert torch.equal(model["head.weight"], torch.linspace(0, 2, model["head.weight"].numel()).view(10, -1))
    sources = fedsim.load(folder / "run").manifest["sources"]
    assert set(sources) == {"client.initialization", "client.layer_initialization.head"}
    (folder / "own.py").write_text(OWN + "\n# changed\n")
    same = fedsim.Experiment(folder, **fedsim.load(folder / "run").experiment)
    with pytest.raises(RequestError, match=r"client\.layer_initialization\.head: its file has changed"):
        fedsim.run(same, out=folder / "run", resume=True)
