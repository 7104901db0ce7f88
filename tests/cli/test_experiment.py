"""Reading, changing, writing and comparing experiments."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from clients.errors import RequestError
from clients.parts import Part
from fedsim.data import partition
from fedsim.experiment import DIGITS, DataSettings, Experiment, StrategySettings
from fedsim.overriding import read_value


@dataclass(frozen=True)
class Rule:
    """Stands for an aggregator."""

    beta: float = 0.5


def test_the_embedded_experiment_is_the_documented_one() -> None:
    embedded = Experiment.load()
    assert (embedded.rounds, embedded.data.clients, embedded.strategy.clients_per_round) == (100, 100, 10)
    assert embedded.data.partition == Part("dirichlet", {"alpha": 0.3})
    assert embedded.model == Part("mlp", {"hidden": [64], "norm": "none"})
    assert (embedded.client.epochs, embedded.client.learning_rate, embedded.client.regularization.l2) == (5, 0.3, 1e-4)
    assert Experiment().difference(embedded) == ["client.regularization.l2"]


def test_what_is_resolved_can_be_read_again(tmp_path: Path) -> None:
    made = Experiment(
        seed=7,
        client={"optimizer": "Momentum", "epochs": {"uniform": [1, 3]}, "personal": ["head.*"], "lr": 1e-5},
        strategy={"name": "FedAdam", "tau": 1e-2, "fraction": 0.25, "sampling": "poisson"},
    )
    path = tmp_path / "experiment.toml"
    path.write_text(made.to_toml())
    again = Experiment.load(path)
    assert again.resolved() == made.resolved()
    assert again.difference(made) == []
    assert again.to_toml() == made.to_toml()


def test_what_is_resolved_has_the_defaults_and_nothing_that_was_left_out() -> None:
    table = tomllib.loads(Experiment(strategy="fedadam", client={"optimizer": "adam"}).to_toml())
    assert table["client"]["lr"] == 0.003
    assert table["client"]["optimizer"] == {"name": "adam", "b1": 0.9, "b2": 0.999, "eps": 1e-8}
    assert table["strategy"]["clients_per_round"] == 10
    assert table["strategy"]["b2"] == 0.99
    assert "fraction" not in table["strategy"]
    assert "seed" not in table["data"]


def test_fewer_clients_than_ten_all_take_part() -> None:
    assert Experiment(data={"clients": 4}).resolved()["strategy"]["clients_per_round"] == 4
    assert StrategySettings(fraction=0.2).cohort_size(10) == 2
    assert StrategySettings(fraction=0.01).cohort_size(10) == 1
    natural = Experiment(data={"clients": 4, "partition": "natural"}).resolved()
    assert "clients_per_round" not in natural["strategy"]


def test_names_are_written_one_way() -> None:
    made = Experiment(model="MLP", strategy="Fed_AvgM", client={"optimizer": "RMSProp"})
    assert (made.model.name, made.strategy.part.name, made.client.optimizer.name) == ("mlp", "fedavgm", "rmsprop")
    assert made.client.learning_rate == 0.001


def test_tables_settings_and_objects_serve_alike() -> None:
    table = Experiment(data={"clients": 20}, strategy={"name": "fedadam", "lr": 0.5, "min_clients": 2})
    settings = Experiment(
        data=DataSettings(clients=20),
        strategy=StrategySettings(part=Part("fedadam", {"lr": 0.5}), min_clients=2),
    )
    assert table.difference(settings) == []
    rule = Rule(beta=0.25)
    assert Experiment(strategy={"aggregator": rule}).strategy.aggregator == Part.of(rule)
    assert Experiment(strategy=rule).strategy.part.thing is rule


def test_a_named_partitioner_draws_alike_from_the_experiment_and_from_its_record(tmp_path: Path) -> None:
    pytest.importorskip("flwr_datasets")
    named = {"name": "flwr_datasets.partitioner:DirichletPartitioner"}
    settings = {"num_partitions": 10, "partition_by": "y", "alpha": 5.0}
    made = Experiment(seed=3, data={"partition": {**named, **settings}})
    recorded = made.resolved()["data"]["partition"]
    assert "seed" not in recorded
    assert recorded["min_partition_size"] == 10  # other defaults are there
    (tmp_path / "experiment.toml").write_text(made.to_toml())
    again = Experiment.load(tmp_path / "experiment.toml")
    y = np.arange(300) % 5
    first, second = (partition(run.data.partition, y, 10, run.seed) for run in (made, again))
    assert np.array_equal(first.order, second.order)
    assert np.array_equal(first.offsets, second.offsets)
    own = Experiment(data={"partition": {**named, **settings, "seed": 7}})
    assert own.resolved()["data"]["partition"]["seed"] == 7


def test_objects_are_recorded_and_cannot_be_run_from_the_record(tmp_path: Path) -> None:
    made = Experiment(strategy={"aggregator": Rule(beta=0.25)})
    assert made.resolved()["strategy"]["aggregator"] == f"{__name__}:Rule(beta=0.25)"
    assert made.difference(Experiment(strategy={"aggregator": Rule(beta=0.5)})) == ["strategy.aggregator"]
    assert Experiment(model=Rule).resolved()["model"] == {"name": f"{__name__}:Rule", "beta": 0.5}
    (tmp_path / "experiment.toml").write_text(made.to_toml())
    with pytest.raises(RequestError, match="was made in Python; run the Python file that makes it"):
        Experiment.load(tmp_path / "experiment.toml")


def test_files_are_relative_to_the_experiment_and_absolute_when_resolved(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text("def net(*, classes, width: int = 3): ...\n")
    (tmp_path / "x.npz").write_bytes(b"")
    path = tmp_path / "mine.toml"
    path.write_text('model = "rules.py:net"\n[data.source]\nname = "arrays"\npath = "x.npz"\n')
    made = Experiment.load(path)
    assert made.base == tmp_path
    assert made.resolved()["model"] == {"name": f"{tmp_path}/rules.py:net", "width": 3}
    assert made.resolved()["data"]["source"]["path"] == str(tmp_path / "x.npz")
    assert "initialization" not in made.resolved()["client"]
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "experiment.toml").write_text(made.to_toml())
    assert Experiment.load(tmp_path / "stored" / "experiment.toml").difference(made) == []


def test_parts_are_listed_by_place() -> None:
    made = Experiment(strategy={"name": "fedavg", "aggregator": "mean"})
    assert list(made.parts("strategy")) == [("strategy", Part("fedavg"))]
    assert list(made.parts("strategy.aggregator")) == [("strategy.aggregator", Part("mean"))]
    assert list(made.parts("strategy.correction")) == []
    assert list(made.parts("plugins[]")) == []
    assert list(made.parts("client.optimizer")) == [("client.optimizer", Part("sgd"))]


def test_differences_name_the_key_and_ignore_the_engine() -> None:
    one = Experiment.load(overrides=["engine=auto", "engine.stack_memory_mib=64", "client.lr=0.1"])
    two = Experiment.load(overrides=["model.hidden=[32]", "strategy=fedavgm"])
    assert one.difference(Experiment.load()) == ["client.lr"]
    assert set(two.difference(one)) == {
        "client.lr", "model.hidden", "strategy", "strategy.lr", "strategy.momentum", "strategy.nesterov",
    }  # fmt: skip
    assert ("client.lr", 0.1, 0.3) in one.differences(two)


def test_naming_another_part_drops_the_settings_of_the_one_before() -> None:
    made = Experiment.load(overrides=["model.name=cnn", "data.partition.name=shards", "strategy=fedavgm"])
    assert made.model == Part("cnn")
    assert made.data.partition == Part("shards")
    assert made.strategy.part == Part("fedavgm")
    assert made.strategy.clients_per_round == 10


def test_the_order_of_overrides_does_not_matter() -> None:
    settings, names = ["data.partition.per_client=3", "strategy.momentum=.5"], ["data.partition.name=shards"]
    made = Experiment.load(overrides=[*settings, *names, "strategy=fedavgm"])
    assert made.data.partition == Part("shards", {"per_client": 3})
    assert made.strategy.part == Part("fedavgm", {"momentum": 0.5})


def test_lists_are_addressed_by_name(tmp_path: Path) -> None:
    (tmp_path / "plug.py").write_text(
        "from strategies import Plugin\n"
        "class Round(Plugin):\n    def __init__(self, bits: int = 8): ...\n"
        "class Clip(Plugin):\n    def __init__(self, norm: float): ...\n"
    )
    path = tmp_path / "mine.toml"
    path.write_text('plugins = ["plug.py:Round", {name = "plug.py:Clip", norm = 1.0}]\n')
    table = Experiment.load(path).resolved()
    table = tomllib.loads(Experiment.load(path).to_toml())
    assert [plugin.get("bits", plugin.get("norm")) for plugin in table["plugins"]] == [8, 1.0]


def test_override_keeps_objects_and_changes_the_rest() -> None:
    rule = Rule()
    made = Experiment(model=rule, rounds=5).override(["rounds=3", "client.lr=.1"])
    assert (made.rounds, made.client.lr, made.model.thing) == (3, 0.1, rule)
    with pytest.raises(RequestError, match="was given as an object; change it where it is made"):
        made.override(["model.hidden=[3]"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("1e-3", 1e-3), (".1", 0.1), ("1.", 1.0), ("true", True), ("True", "True"), ("adam", "adam"),
        ("'a b'", "a b"), ("[1, 2]", [1, 2]), ("{name = 'iid'}", {"name": "iid"}), ("", ""), ("1\nb = 2", "1\nb = 2"),
        ("[1,", "[1,"), ("rules.py:Mine", "rules.py:Mine"),
    ],
)  # fmt: skip
def test_values_are_toml_and_bare_words_strings(text: str, value: object) -> None:
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


def test_the_example_of_the_documentation_is_the_embedded_file() -> None:
    assert tomllib.loads(DIGITS.read_text())["strategy"] == {"name": "fedavg", "clients_per_round": 10}


def test_a_quoted_key_may_hold_dots_and_a_table_without_a_name_is_of_the_default_part():
    made = Experiment.load(None, ['client.layer_initialization."head.*"=zeros', "model.norm=batch"])
    assert list(made.client.layer_initialization) == ["head.*"]
    assert (made.model.name, made.model.settings["norm"]) == ("mlp", "batch")
    plain = Experiment(model={"norm": "batch"}, data={"partition": {"alpha": 0.1}})
    assert (plain.model.name, plain.data.partition.name) == ("mlp", "dirichlet")
