"""A wrong request ends with exit code 2, one line for each wrong key, all at once, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command, sets

ONE_KEY = {
    "client.lr=abc": "client.lr: 'abc' is not a number; give a number above 0",
    "client.lr=0": "client.lr: 0 is out of range; give a number above 0",
    "client.lr=nan": "client.lr: nan is out of range; give a number above 0",
    "rounds=2.5": "rounds: 2.5 is not a whole number; give a whole number of at least 1",
    "rounds=true": "rounds: true is not a whole number; give a whole number of at least 1",
    "seed=-1": "seed: -1 is out of range; give a whole number of at least 0",
    'data.clients="100"': "data.clients: '100' is not a whole number; give a whole number of at least 1",
    "data.test_fraction=1": "data.test_fraction: 1 is out of range; give a number of at least 0 and below 1",
    "model=5": "model: 5 is not a name, a table with a name, or an object",
    "model.hidden=[8, 'a']": "model.hidden[1]: 'a' is not a whole number; give a whole number of at least 1",
    "model.norm=bach": "model.norm: 'bach' is not 'none', 'batch', 'group' or 'layer'; did you mean 'batch'?",
    "client.epochs=abc": "client.epochs: 'abc' is not a whole number or a table with uniform; "
    "give a whole number of at least 1 or a table with uniform",
    "client.epochs={uniform=[9, 1]}": "client.epochs: uniform = [9, 1] has its ends the wrong way round; give",
    "client.epochs={unifrm=[1, 9], uniform=[1, 2]}": "client.epochs.unifrm: unknown key; client.epochs has uniform; "
    "did you mean 'uniform'?",
    "client.steps=3": "client: epochs and steps are both given; give one of them",
    "data.partition.alpha=0": "data.partition.alpha: 0 is out of range; give a number above 0",
    "data.source={name='arrays'}": "data.source.path: missing; give a path",
    "data.source={name='arrays', path='nope.npz'}": "data.source.path: no such file: ",
    "strategy.clients_per_round=0": "strategy.clients_per_round: 0 is out of range; give a whole number of at least 1",
    "strategy.clients_per_round=101": "strategy.clients_per_round: 101 clients a round, but there are 100 clients; "
    "give at most 100",
    "data.held_out_clients=95": "strategy.clients_per_round: 10 clients a round, but there are 100 clients, "
    "95 of them held out; give at most 5",
    "data.held_out_clients=100": "data.held_out_clients: 100 of 100 clients held out leaves none to train; give fewer",
    "strategy.fraction=0.1": "strategy: fraction and clients_per_round are both given; give one of them",
    "strategy.min_clients=11": "strategy.min_clients: 11 is more than the 10 clients of a round; give fewer",
    "data.validation_fraction=.8": "data.test_fraction: 0.2 and data.validation_fraction 0.8 together leave nothing",
    "evaluation.batch_norm=shared": "evaluation.batch_norm: 'shared' needs the clients' statistics; give",
    "client.early_stopping.patience=2": "client.early_stopping: clients have no validation examples to stop by; give",
    "client.regularization.l1=-1": "client.regularization.l1: ",
    "client.layer_initialization.head=he_norml": "client.layer_initialization.head: unknown initialisation 'he_norml'",
    "client.schedule=cosin": "client.schedule: unknown schedule 'cosin'; known are",
    "evaluation.clients=true": "evaluation.clients: clients have no examples to evaluate on; give data.client_test",
    "name=a/b": "name: 'a/b' cannot name a directory",
    "plugins.quantize.bits=4": "plugins.quantize: plugins has nothing",
    "plugins=quantize": "plugins: 'quantize' is not a list",
    "engine.workers=0": "engine.workers: 0 is out of range; give a whole number of at least 1",
    "engine.colour=red": "engine.colour: unknown key; engine has name, workers, stack_memory_mib, client_timeout",
    "strategy=rules.py:Mine": "strategy: ",
    "task=no_such_package.tasks:Mine": "task: there is no module 'no_such_package.tasks'; give 'file.py:Thing'",
    "model=mlp:": "model: 'mlp:' is not 'file.py:Thing' or 'package.module:Thing'",
    "rounds": "--set rounds: not of the form key=value",
    "a..b=1": "--set a..b=1: not of the form key=value",
}


@pytest.mark.parametrize(("wrong", "line"), ONE_KEY.items(), ids=list(ONE_KEY))
def test_a_wrong_value_is_one_line(fedsim: Command, folder: Path, wrong: str, line: str) -> None:
    ended = fedsim("run", "--set", wrong)
    assert (ended.code, ended.out, len(ended.lines)) == (2, "", 1)
    assert ended.lines[0].startswith(line)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("strategy=fedavgg", "fedavg"),
        ("strategy.name=fedadm", "fedadam"),
        ("model=mpl", "mlp"),
        ("data.partition=dirichlt", "dirichlet"),
        ("data.source=digit", "digits"),
        ("client.optimizer=adma", "adam"),
        ("client.initialization=he_nrmal", "he_normal"),
        ("task=clasification", "classification"),
        ("strategy.sampling=poison", "poisson"),
        ("strategy.aggregator=maen", "mean"),
        ("strategy.server_optimizer=yogii", "yogi"),
        ("engine=inlin", "inline"),
        ("data.clinets=3", "clients"),
        ("client.batchsize=3", "batch_size"),
        ("client.regularization.l3=1", "l2"),
        ("strategy.clients_per_ruond=3", "clients_per_round"),
        ("model.hiden=[3]", "hidden"),
        ("data.partition.alhpa=1", "alpha"),
        ("evalation.every=3", "evaluation"),
    ],
)
def test_an_unknown_name_or_key_is_told_the_nearest(fedsim: Command, wrong: str, nearest: str) -> None:
    ended = fedsim("run", "--set", wrong)
    assert ended.code == 2
    assert len(ended.lines) == 1
    assert "unknown" in ended.lines[0]
    assert ended.lines[0].endswith(f"did you mean '{nearest}'?")


def test_everything_wrong_is_said_at_once(fedsim: Command, folder: Path) -> None:
    (folder / "experiment.toml").write_text(
        'rounds = "many"\nmodle = "mlp"\n[client]\nlr = "abc"\nepoch = 1\n[strategy]\nname = "fedprax"\n'
        "clients_per_round = 5\nfraction = 0.5\n[data]\nclients = 3\n"
    )
    ended = fedsim("run", "experiment.toml", "--workers", "none", "--out", "experiment.toml")
    keys = [line.split(":")[0] for line in ended.lines]
    assert ended.code == 2
    assert sorted(keys) == [
        "--out", "client.epoch", "client.lr", "engine.workers", "modle", "rounds", "strategy", "strategy",
        "strategy.clients_per_round",
    ]  # fmt: skip


def test_files_that_are_no_experiments(fedsim: Command, folder: Path) -> None:
    said = "nope.toml: no such file; make an experiment file with: fedsim new --toml"
    assert fedsim("run", "nope.toml").lines == [said]
    (folder / "bad.toml").write_text("rounds = 3\n[data\nclients = 3\n")
    assert fedsim("run", "bad.toml").lines == [
        "bad.toml is not TOML: Expected ']' at the end of a table declaration (at line 2, column 6)"
    ]
    (folder / "cut.toml").write_text("hidden = [1,")
    assert fedsim("run", "cut.toml").lines == ["cut.toml is not TOML: Invalid value (at line 1, column 13, the end)"]
    (folder / "bytes.toml").write_bytes(b"\xff\xfe")
    assert fedsim("run", "bytes.toml").lines == ["bytes.toml is not TOML: it is not UTF-8 text"]
    ended = fedsim("run", str(folder))
    assert ended.code == 2
    assert "is a folder; to go on with a run: fedsim run --resume --out" in ended.lines[0]


def test_python_files_that_define_no_experiment(fedsim: Command, folder: Path) -> None:
    assert fedsim("run", "my.py").lines == ["my.py: no such file"]
    (folder / "my.py").write_text("raise SystemExit('not run')\n")
    ended = fedsim("run", "my.py")
    assert (ended.code, ended.lines) == (2, ["my.py defines no experiment; add: experiment = fedsim.Experiment(...)"])
    (folder / "my.py").write_text("x = (1\n")
    assert fedsim("run", "my.py").lines == ["my.py is not Python: '(' was never closed (line 1)"]
    (folder / "other.py").write_text("experiment = 3\n")
    assert fedsim("run", "other.py").lines == ["other.py: experiment is int; make it a fedsim.Experiment(...)"]
    (folder / "wrong.py").write_text("import fedsim\nexperiment = fedsim.Experiment(rounds=0, sed=1)\n")
    ended = fedsim("run", "wrong.py")
    assert ended.code == 2
    assert [line.split(":")[0] for line in ended.lines] == ["rounds", "sed"]
    (folder / "fails.py").write_text("experiment = 3\n1 / 0\n")
    ended = fedsim("run", "fails.py")
    assert (ended.code, ended.lines) == (1, ["fails.py, line 2: ZeroDivisionError: division by zero"])


def test_an_own_thing_is_checked_without_being_run(fedsim: Command, folder: Path) -> None:
    (folder / "rules.py").write_text(
        "from dataclasses import dataclass\n"
        "raise SystemExit('not run')\n"
        "from strategies import Aggregator\n"
        "@dataclass(frozen=True)\n"
        "class Agreement(Aggregator):\n"
        "    beta: float\n"
        "    keep: int = 3\n"
    )
    said = {
        "rules.py:Agreemint": "strategy.aggregator: rules.py has no Agreemint; it defines Agreement; "
        "did you mean 'Agreement'?",
        "{name='rules.py:Agreement', beta='x'}": "strategy.aggregator.beta: 'x' is not a number",
        "{name='rules.py:Agreement', beta=1, kep=2}": "strategy.aggregator.kep: unknown key; strategy.aggregator has "
        "beta, keep, name; did you mean 'keep'?",
        "rules.py:Agreement": "strategy.aggregator.beta: missing; give a number",
    }
    for value, line in said.items():
        ended = fedsim("run", "--set", f"strategy.aggregator={value}")
        assert (ended.code, ended.lines) == (2, [line])


def test_usage_errors_are_one_line(fedsim: Command) -> None:
    for arguments in (["run", "--colour"], ["runn"], ["run", "a.toml", "b.toml"], ["run", "--set"], ["export"]):
        ended = fedsim(*arguments)
        assert (ended.code, ended.out, len(ended.lines)) == (2, "", 1)


def test_the_other_commands_refuse_too(fedsim: Command, folder: Path) -> None:
    assert fedsim("list", "strateges").lines[0].endswith("did you mean 'strategies'?")
    assert fedsim("report", "runs/digits", "x").lines == [
        "runs/digits: there is no such directory; give a run's directory, such as runs/digits",
        "x: there is no such directory; give a run's directory, such as runs/digits",
    ]
    ended = fedsim("export", ".", "--format", "parkett")
    assert ended.code == 2
    assert ended.lines[0] == "--format: 'parkett' is not one of parquet, csv, tensorboard; did you mean 'parquet'?"
    assert not list(folder.iterdir())


def test_several_sets_reach_the_schema_together(fedsim: Command) -> None:
    ended = fedsim("run", *sets(["strategy.name=fedadam", "strategy.b1=x", "engine=auto", "plugins=[5]"]))
    assert [line.split(":")[0] for line in ended.lines] == ["plugins[0]", "strategy.b1"]
