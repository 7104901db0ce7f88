"""A mistake in a thing of one's own is said in one line: where it is, and what should be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim import cli
from tests.contracts.contract import changed, write

BEFORE = [
    ("model", "TooNarrow", "TooNarrow with Classification raises on a batch of x float32 [2, 64], y int64 [2]"),
    ("task", "OtherColumn", "OtherColumn raises on a batch of x float32 [2, 64], y int64 [2]: KeyError: 'image'"),
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
