"""Flower's example apps, in their own style but for loaders that need no network, under ``fedsim simulate``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim import cli
from fedsim.flower import command
from tests.flower.conftest import APPS

NAMES = sorted(path.parent.name for path in APPS.glob("*/pyproject.toml"))

#: Those whose workers load torch or pandas, which takes seconds.
HEAVY = {"quickstart-pytorch", "advanced-pytorch", "legacy", "federated-analytics"}

Played = Callable[..., tuple[dict[str, Any], fedsim.Run]]


@pytest.fixture
def play(folder: Path) -> Played:
    """Simulates an app of ``tests/flower/apps`` in an empty folder; returns what it came to and its record."""

    def played(
        name: str, engine: str = "inline", workers: str | None = None, config: str = "", out: str = "run"
    ) -> tuple[dict[str, Any], fedsim.Run]:
        overrides = [config] if config else []
        request = command.read(APPS / name, overrides, engine=engine, workers=workers, out=folder / out)
        return command.simulate(request, quiet=True), fedsim.load(folder / out)

    return played


def said(run: fedsim.Run) -> dict[str, Any]:
    """All that a record says but for the time that it took."""
    timed = ("seconds", "train_seconds", "committed_at", "seconds_total", "simulated_seconds")
    return {
        "rounds": [{key: value for key, value in row.items() if key not in timed} for row in run.rounds()],
        "clients": run.query("SELECT * FROM clients ORDER BY round, client"),
        "client_metrics": run.query("SELECT * FROM client_metrics ORDER BY round, client, name"),
        "events": run.query("SELECT round, kind, client, message FROM events ORDER BY id"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_an_app_gives_the_same_twice(name: str, play: Played) -> None:
    first, again = play(name, out="first"), play(name, out="again")
    assert first[0]["weights_sha256"] == again[0]["weights_sha256"]
    assert said(first[1]) == said(again[1])
    assert first[0]["events"] == 0


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in HEAVY else ()) for n in NAMES])
def test_an_app_gives_the_same_on_every_engine(name: str, play: Played) -> None:
    inline, processes = play(name, out="inline"), play(name, "processes", "2", out="processes")
    assert inline[0]["weights_sha256"] == processes[0]["weights_sha256"]
    assert said(inline[1]) == said(processes[1])
    assert processes[1].chunks["pid"].nunique() == 2
    assert inline[1].chunks["pid"].nunique() == 1


def test_quickstart_pytorch_learns_and_saves_its_model(play: Played, folder: Path) -> None:
    import torch

    summary, run = play("quickstart-pytorch", config="num-server-rounds=5 local-epochs=3")
    assert summary["split"] == "test"
    assert summary["accuracy"] > 0.6
    assert run.history["test_accuracy"].iloc[0] < 0.3
    saved = torch.load(folder / "final_model.pt")
    assert {name: value.tolist() for name, value in run.weights.items()} == {
        name: value.tolist() for name, value in saved.items()
    }


def test_advanced_pytorch_keeps_its_clients_state_and_its_own_strategy(play: Played, folder: Path) -> None:
    _, run = play("advanced-pytorch")
    assert run.experiment["strategy"] == "CustomFedAdagrad"
    # A client counts in its state how often it was asked.
    asked = run.clients.groupby("client")["fits"].apply(list)
    assert all(fits == list(range(1, len(fits) + 1)) for fits in asked)
    assert max(map(len, asked)) > 1
    assert list((folder / "outputs").glob("model_state_round_*.pt"))
    # What the strategy's own aggregation adds is in the record too.
    assert "train_converged" in run.history


def test_custom_mods_see_every_message_and_may_change_the_reply(play: Played, folder: Path) -> None:
    _, run = play("custom-mods", config=f"logdir='{folder}'")
    assert run.clients.groupby("round")["messages"].unique().map(list).to_dict() == {1: [1], 2: [3]}
    assert (folder / "custom-mods-0.txt").read_text().split() == ["train", "True", "evaluate", "True"] * 2
    # The clipping mod keeps each client within 0.5; Flower's wrapper adds noise of 0.1 * 0.5 / 5 to their mean.
    norm = float(np.sqrt(sum(float((value**2).sum()) for value in run.weights.values())))
    assert norm < 2 * (0.5 + 0.1)


def test_quickstart_numpy_draws_from_the_seed(play: Played, folder: Path) -> None:
    weights = {}
    for seed in ("0", "1"):
        request = command.read(APPS / "quickstart-numpy", seed=seed, engine="inline", out=folder / seed)
        weights[seed] = command.simulate(request, quiet=True)["weights_sha256"]
    assert weights["0"] != weights["1"]


def test_federated_analytics_counts_what_the_sampled_clients_hold(play: Played, folder: Path) -> None:
    summary, run = play("federated-analytics")
    histograms = json.loads((folder / "histograms.json").read_text())
    counted = run.clients.groupby("round")["count"].sum()
    assert summary["rounds"] == len(histograms) == len(counted) == 3
    for number, histogram in enumerate(histograms, 1):
        assert histogram.keys() == {"sepal length (cm)", "sepal width (cm)"}
        assert {sum(bins) for bins in histogram.values()} == {counted[number]}
    assert summary["weights_sha256"] is None


def test_a_legacy_app_is_recorded_like_any(play: Played) -> None:
    summary, run = play("legacy")
    assert (summary["rounds"], summary["split"]) == (2, "client_test")
    assert summary["accuracy"] > 0.3
    assert run.history["cohort"].tolist() == [3, 3]
    assert run.clients["examples"].tolist() == [250] * 6
    assert run.clients["loss"].notna().all()


def test_secure_aggregation_adds_what_no_client_shows(play: Played) -> None:
    summary, run = play("secure-aggregation")
    # Client i moves by (i + 1) / 10 with the weight 10 (i + 1): by 0.3 on average, each round, to the quantisation.
    weights = run.tensors if "row" not in run.tensors else run.weights
    for value in weights.values():
        np.testing.assert_allclose(np.asarray(value), 0.6, atol=1e-4)
    assert summary["rounds"] == 2
    # Four exchanges to add, one to evaluate.
    assert summary["messages"] == 2 * 5 * 4


def test_the_command_prints_one_object_and_keeps_the_apps_own_words_off_stdout(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    code = cli.main(["simulate", str(APPS / "quickstart-numpy"), "--engine", "inline", "--json", "--quiet"])
    out, err = capfd.readouterr()
    assert code == 0
    summary = json.loads(out)
    assert summary["out"] == "runs/quickstart-numpy"
    assert summary.keys() >= {
        "out", "rounds", "metric_name", "metric", "split", "accuracy", "loss", "weights_sha256", "bytes_up",
        "bytes_down", "epsilon", "seconds",
    }  # fmt: skip
    assert caplog.text == ""
    assert err.splitlines() == [line for line in err.splitlines() if line.startswith("Final model:")]
    assert (folder / "runs" / "quickstart-numpy" / "report.html").exists()


def test_the_command_shows_rounds_and_flowers_log_where_it_is_not_quiet(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert cli.main(["simulate", str(APPS / "quickstart-numpy"), "--engine", "inline"]) == 0
    out, err = capfd.readouterr()
    result, where = out.splitlines()[-2:]
    assert result.startswith("client test metric ")
    assert where == f"report: {Path('runs') / 'quickstart-numpy' / 'report.html'}"
    assert "quickstart-numpy: 6 clients" in err.splitlines()
    assert any(line.startswith("round 3  client test metric ") for line in err.splitlines())
    assert "Starting FedAvg strategy" in caplog.text


def test_an_app_that_waits_for_more_clients_than_there_are_is_refused_and_leaves_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    app = str(APPS / "quickstart-numpy")
    assert cli.main(["simulate", app, "--num-supernodes", "1", "--engine", "inline", "--quiet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "min_available_nodes" in line
    assert not list((folder / "runs").iterdir())


def test_clients_that_drop_out_are_recorded(folder: Path) -> None:
    request = command.read(APPS / "quickstart-numpy", dropout="0.4", engine="inline", out=folder / "run")
    summary = command.simulate(request, quiet=True)
    rows = fedsim.load(folder / "run").rounds()
    assert sum(row["completed"] for row in rows) < sum(row["cohort"] for row in rows) == 9
    assert 0 < summary["events"] < summary["messages"]


EXAMPLE = APPS.parents[2] / "examples" / "flower_app"


def test_the_example_app_learns(folder: Path) -> None:
    summary = command.simulate(command.read(EXAMPLE, engine="inline", out=folder / "run"), quiet=True)
    run = fedsim.load(folder / "run")
    assert summary["accuracy"] > 0.85
    assert run.experiment["strategy"] == "Scaffold"
    # The clients are asked who they are before the first round; only those that train are its cohort.
    assert run.history["cohort"].tolist() == [0, *[10] * 10]


@pytest.mark.slow
def test_the_example_app_gives_the_same_on_every_engine(folder: Path) -> None:
    requests = [command.read(EXAMPLE, engine=engine, out=folder / engine) for engine in ("inline", "processes")]
    inline, processes = (command.simulate(request, quiet=True)["weights_sha256"] for request in requests)
    assert inline == processes


def test_a_client_that_raises_and_a_server_that_does_are_told_apart(
    app: Callable[..., Path], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = app("quickstart-numpy", ("numpyexample", "failingexample"))
    (there / "numpyexample").rename(there / "failingexample")
    for file in (there / "failingexample").glob("*.py"):
        file.write_text(file.read_text().replace("numpyexample", "failingexample"))
    client, server = there / "failingexample" / "client_app.py", there / "failingexample" / "server_app.py"
    client.write_text(
        client.read_text().replace(
            "    # Simulate local training\n",
            "    if context.node_config['partition-id'] == 2:\n        raise ValueError('no such file')\n",
        )
    )
    server.write_text(server.read_text().replace("    print(", "    raise KeyError('nothing')\n    print("))
    arguments = ["simulate", str(there), "--engine", "inline", "-c", "fraction-train=1.0", "--out", "run", "--json"]
    assert cli.main(arguments) == 1
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert any("client 2" in line and "ValueError: no such file" in line for line in lines)
    assert lines[-1] == "failingexample.server_app:app: KeyError: 'nothing'; run has the record"
    assert [line for line in lines if "server_app.py" in line and "line" in line]
    run = fedsim.load(folder / "run")
    assert run.summary is None
    assert run.events[["round", "kind"]].to_numpy().tolist() == [
        [1, "client_failed"],
        [2, "client_failed"],
        [3, "client_failed"],
        [3, "server_failed"],
    ]
    assert "raise ValueError('no such file')" in run.events["traceback"][0]
    assert [row["completed"] for row in run.rounds()] == [5, 5, 5]


def _with_server_end(app: Callable[..., Path], name: str, ending: str) -> Path:
    """An app of its own package name whose server does something after its last round."""
    there = app("quickstart-numpy", ("numpyexample", name))
    (there / "numpyexample").rename(there / name)
    for file in (there / name).glob("*.py"):
        file.write_text(file.read_text().replace("numpyexample", name))
    server = there / name / "server_app.py"
    server.write_text(server.read_text().replace("    print(", f"    {ending}\n    print("))
    return there


@pytest.mark.parametrize("ending", ["raise SystemExit", "exit(0)"])
def test_a_server_that_exits_well_has_finished(app: Callable[..., Path], folder: Path, ending: str) -> None:
    there = _with_server_end(app, f"exits{len(ending)}", ending)
    summary = command.simulate(command.read(there, engine="inline", out=folder / "run"), quiet=True)
    run = fedsim.load(folder / "run")
    assert summary["rounds"] == len(run.rounds()) == 3
    assert run.summary is not None
    assert (folder / "run" / "report.html").exists()


def test_a_server_that_exits_with_a_code_has_failed(
    app: Callable[..., Path], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = _with_server_end(app, "exitscode", "exit(4)")
    assert cli.main(["simulate", str(there), "--engine", "inline", "--out", "run", "--quiet"]) == 1
    assert capfd.readouterr().err.splitlines()[-1] == ("exitscode.server_app:app: SystemExit: 4; run has the record")
    run = fedsim.load(folder / "run")
    assert run.summary is None
    assert run.events["kind"].tolist() == ["server_failed"]
    assert len(run.rounds()) == 3


def test_a_server_that_changes_the_folder_does_not_split_its_record(app: Callable[..., Path], folder: Path) -> None:
    there = _with_server_end(app, "movesaway", "import os; os.chdir('/')")
    client = there / "movesaway" / "client_app.py"
    client.write_text(client.read_text().replace("    # Simulate local training\n", "    import os; os.chdir('/')\n"))
    summary = command.simulate(command.read(there, engine="inline"), quiet=True)
    assert Path.cwd() == folder
    assert summary["out"] == "runs/quickstart-numpy"
    assert len(fedsim.load(folder / "runs" / "quickstart-numpy").rounds()) == 3
    assert (folder / "runs" / "quickstart-numpy" / "report.html").exists()
