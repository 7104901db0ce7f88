"""A mistake in a thing of one's own is said in one line: where it is, and what should be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedsim
from clients import LocalTraining
from clients.errors import RequestError
from fedsim import cli
from tests.contracts.contract import changed, write

BEFORE = [
    ("model", "TooNarrow", "TooNarrow with Classification raises on a batch of x float32 [2, 64], y int64 [2]"),
    ("task", "OtherColumn", "OtherColumn asks for a column 'image', and a batch has x float32 [2, 64], y int64 [2]"),
    ("task", "AveragedLoss", 'give one value an example, [B] (torch\'s losses: reduction="none")'),
    ("task", "AveragedStatistic", "'accuracy' has shape [] for 2 examples"),
    ("task", "MissingMetric", "MissingMetric gives no metric 'f1' from its statistics"),
    ("strategy.aggregator", "UnknownNeed", 'UnknownNeed() needs \'row\'; say "sum" or "rows"'),
    ("strategy.aggregator", "Anybody", "Anybody() is no Aggregator; derive it from strategies.Aggregator"),
    ("client.optimizer", "WeightsAlone", "an optimiser of your own has no default learning rate; give lr"),
    ("model", "TooNarow", "mistakes.py has no TooNarow"),
]
DURING = [
    ("strategy.aggregator", "RowAlone", "round 1, RowAlone.combine: ValueError: too many values to unpack"),
    ("strategy.aggregator", "MatrixForRow", "round 1, MatrixForRow.combine: ValueError: gave a row of shape [5, 4810]"),
    ("strategy.server_optimizer", "WeightsAlone", "round 1, WeightsAlone.step: ValueError"),
    ("strategy.sampling", "Anybody", "Anybody() chose client 0, which cannot be trained"),
    ("strategy.sampling", "Halves", "Halves() chose client 0.5, which cannot be trained"),
    ("plugins", "ForgetfulPlugin", "round 1, ForgetfulPlugin.client: KeyError: 'residual'"),
    ("plugins", "UnknownSize", "state of size 'rows'; say \"row\""),
]


FEW = {"rounds": 2, "data": {"clients": 12, "held_out_clients": 2}, "strategy": {"clients_per_round": 5}}


def said(place: str, name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """How a run with this thing ends, and what it says."""
    thing = f"mistakes.py:{name}"
    section, _, key = place.partition(".")
    value: Any = {key: thing} if key else [{"name": thing}] if place == "plugins" else thing
    file = write(changed(FEW, {section: value}), folder)
    capfd.readouterr()
    code = cli.main(["run", str(file), "--out", str(folder / "run"), "--engine", "inline", "--quiet"])
    return code, capfd.readouterr().err.splitlines()


@pytest.mark.parametrize(("place", "name", "message"), BEFORE)
def test_what_can_be_seen_before_the_run_is_refused_and_nothing_is_written(
    place: str, name: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, lines = said(place, name, tmp_path, capfd)
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("place", "name", "message"), DURING)
def test_what_only_a_round_shows_names_the_round_and_the_thing(
    place: str, name: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, lines = said(place, name, tmp_path, capfd)
    assert code in (1, 2)
    assert len(lines) == 1
    assert message in lines[0]


def test_a_rule_that_makes_no_numbers_moves_nothing_and_is_recorded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _ = said("strategy.aggregator", "NotANumber", tmp_path, capfd)
    assert code == 0
    assert list(fedsim.load(tmp_path / "run").events["kind"]) == ["weights_not_finite"] * 2


def lazy(*, input_shape, classes):
    return torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.ReLU(), torch.nn.Linear(8, classes))


def raising(weight, fan_in, fan_out, generator):
    raise ArithmeticError("no weights today")


class Idle(LocalTraining):
    def train(self, model, data, ctx):
        return {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": lazy}, r"model: Sequential is lazy, '0.weight' has no shape yet"),
        ({"client": {"initialization": raising}}, r"client.initialization: raises ArithmeticError on a weight .*no w"),
        (
            {"client": {"local_training": Idle()}, "strategy": {"name": "fedprox"}},
            r"strategy.correction: Prox.*replaces",
        ),
        ({"client": {"local_training": Idle(), "gradient_clip": 1.0}}, r"client.gradient_clip: client.local_training"),
        ({"client": {"optimizer": {"name": "adam", "b1": 1.5}}}, r"client.optimizer.b1: 1.5"),
    ],
    ids=["lazy model", "initialisation that raises", "correction", "clipping", "decay above 1"],
)
def test_what_cannot_work_is_refused_before_the_first_round(settings, said, tmp_path):
    with pytest.raises(RequestError, match=said):
        fedsim.run(fedsim.Experiment(rounds=1, **settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Rated(LocalTraining):
    """Reports the rate that it is given."""

    def train(self, model, data, ctx):
        return {"loss": ctx.lr, "steps": 1}


def test_own_training_gets_the_schedules_rate():
    client = {"local_training": Rated(), "lr": 0.4, "schedule": {"name": "step", "every": 1, "by": 0.5}}
    records = list(fedsim.rounds(fedsim.Experiment(rounds=3, client=client)))[1:]
    assert [record.clients[0]["loss"] for record in records] == [0.4, 0.2, 0.1]
