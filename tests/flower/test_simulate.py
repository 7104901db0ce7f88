"""``simulate``: the same weights from every engine and any number of workers, whatever form the app has."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, FedMedian, QFedAvg

from clients.errors import RequestError
from fedsim.flower import simulate
from tests.flower.serving import asked, run, served, told

ENGINES = [("inline", None), ("processes", 1), ("processes", 2)]

trains = ClientApp()


@trains.train()
def train(message: Message, context: Context) -> Message:
    """A step by random gradients, which a state and the run's configuration scale."""
    weights = message.content["arrays"].to_torch_state_dict()
    times = context.state["times"]["n"] if "times" in context.state else 0
    context.state["times"] = MetricRecord({"n": times + 1})
    scale = context.run_config.get("scale", 1.0) * (1 + times) * random.random() * np.random.rand()
    moved = {name: w + scale * torch.randn(w.shape) for name, w in weights.items()}
    metrics = MetricRecord({"num-examples": 10 + context.node_config["partition-id"], "times": times})
    return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)


@trains.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    total = float(sum(a.numpy().sum() for a in message.content["arrays"].values()))
    return Message(RecordDict({"m": MetricRecord({"num-examples": 1, "total": total})}), reply_to=message)


def first() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.zeros((40, 30), np.float32)), "b": Array(np.ones(5, np.float32))})


def digest(record: ArrayRecord) -> str:
    return hashlib.sha256(b"".join(array.data for array in record.values())).hexdigest()


def federated(strategy: Any = FedAvg, rounds: int = 3, **settings: Any) -> Any:
    def server(grid: Grid, context: Context) -> Any:
        random.seed(3)
        made = strategy(fraction_train=0.5, fraction_evaluate=0.5, **settings)
        return made.start(grid=grid, initial_arrays=first(), num_rounds=rounds)

    return server


@pytest.mark.parametrize(
    "strategy", [FedAvg, *(pytest.param(other, marks=pytest.mark.slow) for other in (FedMedian, QFedAvg))]
)
def test_the_same_weights_and_metrics_from_every_engine(strategy: type):
    settings = {"client_learning_rate": 0.1, "train_loss_key": "times"} if strategy is QFedAvg else {}
    found = [run(federated(strategy, **settings), 8, trains, engine=e, workers=w) for e, w in ENGINES]
    assert len({digest(result.arrays) for result in found}) == 1
    assert found[0].evaluate_metrics_clientapp == found[2].evaluate_metrics_clientapp


def test_another_seed_gives_other_weights():
    assert len({digest(run(federated(), 6, trains, seed=seed).arrays) for seed in (0, 0, 1)}) == 2


def test_run_config_reaches_server_and_clients_and_node_config_each_node():
    def server(grid: Grid, context: Context) -> Any:
        replies = grid.send_and_receive([asked(node, "query.config") for node in grid.get_node_ids()])
        context.state["kept"] = ConfigRecord({"a": 1})
        return dict(context.run_config), [dict(reply.content["node"]) for reply in replies]

    app = ClientApp()

    @app.query("config")
    def config(message: Message, context: Context) -> Message:
        content = RecordDict({"node": ConfigRecord({**context.node_config, **context.run_config})})
        return Message(content, reply_to=message)

    options = {"run_config": {"lr": 0.5}, "node_config": lambda partition: {"speed": 2 * partition}}
    result = simulate(served(server), app, 2, engine="inline", quiet=True, **options)  # type: ignore[arg-type]
    assert result.returned == (
        {"lr": 0.5},
        [
            {"partition-id": 0, "num-partitions": 2, "speed": 0, "lr": 0.5},
            {"partition-id": 1, "num-partitions": 2, "speed": 2, "lr": 0.5},
        ],
    )
    assert result.context.state["kept"] == {"a": 1}


def test_an_app_of_closures_goes_to_workers_by_value():
    offset = np.arange(3.0)
    app = ClientApp()

    @app.query()
    def shift(message: Message, context: Context) -> Message:
        moved = message.content["w"]["w"].numpy() + offset
        return Message(RecordDict({"w": ArrayRecord({"w": Array(moved)})}), reply_to=message)

    def server(grid: Grid, context: Context) -> Any:
        content = RecordDict({"w": ArrayRecord({"w": Array(np.ones(3))})})
        return [
            r.content["w"]["w"].numpy().tolist()
            for r in grid.send_and_receive([asked(grid.get_node_ids()[0], content=content)])
        ]

    assert run(server, 2, app, engine="processes", workers=1) == [[1.0, 2.0, 3.0]]


SCRIPT = """
import functools, threading
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
import fedsim.flower

@functools.lru_cache
def data(partition):
    return float(partition + OFFSET)

OFFSET = 10
lock = {LOCK}
app, server = ClientApp(), ServerApp()

@app.query()
def query(message, context):
    lock
    metrics = MetricRecord({{"x": data(context.node_config["partition-id"])}})
    return Message(RecordDict({{"m": metrics}}), reply_to=message)

@server.main()
def main(grid, context):
    messages = [Message(RecordDict(), dst_node_id=n, message_type="query") for n in grid.get_node_ids()]
    return [reply.content["m"]["x"] for reply in grid.send_and_receive(messages)]

print(fedsim.flower.simulate(server, app, 3, engine="processes", workers=2).returned)
"""


def script(tmp_path: Path, lock: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(SCRIPT.format(LOCK=lock))
    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": root, "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.mark.slow
def test_an_app_of_a_script_with_cached_functions_works_without_a_guard(tmp_path: Path):
    done = script(tmp_path, "None")
    assert done.stdout.strip() == "[10.0, 11.0, 12.0]", done.stderr


@pytest.mark.slow
def test_an_app_that_cannot_travel_is_refused_with_the_mend(tmp_path: Path):
    done = script(tmp_path, "threading.Lock()")
    assert "RequestError: client_app: it cannot be sent to worker processes" in done.stderr
    assert 'engine="inline"' in done.stderr


@pytest.mark.parametrize("engine", ["inline", "processes"])
def test_apps_by_name_are_found_in_their_folder_even_where_another_had_the_same_name(tmp_path: Path, engine: str):
    found = []
    for number in (1, 2):
        package = tmp_path / f"app{number}" / "sameapp"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "client.py").write_text(
            "from flwr.app import *\nfrom flwr.clientapp import ClientApp\nfrom sameapp.task import NUMBER\n"
            "app = ClientApp()\n@app.query()\ndef query(message, context):\n"
            "    return Message(RecordDict({'m': MetricRecord({'n': NUMBER})}), reply_to=message)\n"
        )
        (package / "task.py").write_text(f"NUMBER = {number}\n")
        (package / "server.py").write_text(
            "import random\nfrom flwr.app import *\nfrom flwr.serverapp import ServerApp\napp = ServerApp()\n"
            "@app.main()\ndef main(grid, context):\n"
            "    node = grid.get_node_ids()[0]\n"
            "    message = Message(RecordDict(), dst_node_id=node, message_type='query')\n"
            "    return grid.send_and_receive([message])[0].content['m']['n'], random.random()\n"
        )
        path = list(sys.path)
        options: Any = {"engine": engine, "app_dir": package.parent, "quiet": True}
        result = simulate("sameapp.server:app", "sameapp.client:app", 2, **options)
        assert sys.path == path
        found.append(result.returned)
    assert [number for number, _ in found] == [1, 2]
    assert found[0][1] == found[1][1]  # a server given by name is seeded


def test_telemetry_is_off_unless_it_was_asked_for(tmp_path: Path):
    code = (
        "import flwr.supercore.telemetry as t, os; import fedsim.flower.compat; "
        "print(t.FLWR_TELEMETRY_ENABLED, os.environ['FLWR_TELEMETRY_ENABLED'])"
    )
    root = str(Path(__file__).parents[2])
    for given, expected in (({}, "0 0"), ({"FLWR_TELEMETRY_ENABLED": "1"}, "1 1")):
        environment = {"PYTHONPATH": root, "PATH": "/usr/bin:/bin", **given}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == expected, done.stderr


def test_the_package_is_light_until_it_is_used():
    code = "import sys, fedsim.flower; print(sorted({'flwr', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------------------------------------------- legacy apps


class Legacy(NumPyClient):
    def __init__(self, partition: int):
        self.partition = partition

    def fit(self, parameters: Any, config: Any) -> Any:
        moved = [p + np.random.rand(*p.shape).astype(p.dtype) for p in parameters]
        return moved, 10 + self.partition, {"partition": self.partition}

    def evaluate(self, parameters: Any, config: Any) -> Any:
        return float(sum(p.sum() for p in parameters)), 5, {"partition": self.partition}


def client_fn(context: Context) -> Any:
    return Legacy(int(context.node_config["partition-id"])).to_client()


legacy = ClientApp(client_fn)


class Fixed(Legacy):
    """Its update is its partition's: the mean is known."""

    def fit(self, parameters: Any, config: Any) -> Any:
        return [p + (1 + self.partition) / 10 for p in parameters], 10 + self.partition, {}


secret = ClientApp(lambda context: Fixed(context.node_config["partition-id"]).to_client(), mods=[secaggplus_mod])
finals: list[bytes] = []


class Keeping(LegacyFedAvg):
    """Keeps the bytes of what it aggregates."""

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        found = super().aggregate_fit(server_round, results, failures)
        assert found[0] is not None
        finals.append(b"".join(found[0].tensors))
        self.last = parameters_to_ndarrays(found[0])
        return found


def keeping(**settings: Any) -> Keeping:
    start = ndarrays_to_parameters([np.zeros((20, 10), np.float32)])
    return Keeping(initial_parameters=start, **settings)


def legacy_server(strategy: Keeping) -> ServerApp:
    return ServerApp(
        server_fn=lambda context: ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))
    )


def test_a_legacy_app_gives_the_same_weights_from_every_engine():
    finals.clear()
    for engine, workers in ENGINES:
        random.seed(2)
        result = simulate(legacy_server(keeping()), legacy, 12, engine=engine, workers=workers, quiet=True)
        assert (result.messages, result.failures) == (48, 0)
    assert finals[0] != finals[1]
    assert finals[:2] == finals[2:4] == finals[4:]


def test_a_legacy_server_sends_a_rounds_messages_in_one_phase():
    phases = []

    class Heard:
        def begin(self, *args: Any) -> None: ...
        def answered(self, *args: Any) -> None: ...
        def failed(self, *args: Any) -> None: ...
        def phase(self, sent: Any, replies: Any, seconds: float, pids: Any) -> None:
            phases.append([message.metadata.dst_node_id for message in sent])

    simulate(legacy_server(keeping()), legacy, 12, engine="inline", quiet=True, ledger=Heard())
    assert [len(nodes) for nodes in phases] == [12] * 4
    assert all(nodes == sorted(nodes) for nodes in phases)


def test_a_legacy_server_that_waits_for_more_clients_than_there_are_is_refused():
    with pytest.raises(RequestError, match="num_supernodes: the server app waits for 9 nodes"):
        simulate(legacy_server(keeping(min_available_clients=9)), legacy, 3, engine="inline", quiet=True)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_secure_aggregation_gives_the_mean_of_those_who_remain(dropout: float):
    """SecAgg+ (Bell et al., 2020), quantised to 2**22 levels of [-8, 8]."""
    strategy = keeping(min_fit_clients=2)

    def server(grid: Grid, context: Context) -> Any:
        inner = LegacyContext(context=context, config=ServerConfig(num_rounds=1), strategy=strategy)
        workflow = SecAggPlusWorkflow(num_shares=5, reconstruction_threshold=3, max_weight=20.0)
        DefaultWorkflow(fit_workflow=workflow)(grid, inner)

    result = simulate(served(server), secret, 6, engine="processes", workers=2, quiet=True, dropout=dropout, seed=10)
    assert (result.failures > 0) == (dropout > 0)
    weights, updates = 10 + np.arange(6.0), (1 + np.arange(6.0)) / 10
    sizes = [6] if not dropout else range(3, 6)
    those = [list(who) for size in sizes for who in combinations(range(6), size)]
    means = [np.average(updates[who], weights=weights[who]) for who in those]
    found = strategy.last[0]
    assert found.std() < 1e-5
    assert min(abs(mean - found.mean()) for mean in means) < 1e-5


def test_an_app_of_a_module_is_found_by_its_name():
    from fedsim.flower.worker import Named, travelling

    assert travelling(told) == Named("tests.flower.serving:told")


@pytest.mark.parametrize(("engine", "workers"), ENGINES)
def test_what_a_client_changes_in_its_process_reaches_no_other_client(engine: str, workers: int | None, tmp_path: Path):
    app = ClientApp()

    @app.query()
    def changes(message: Message, context: Context) -> Message:
        found = {
            "folder": os.getcwd(),
            "variable": os.environ.get("FEDSIM_TEST", "none"),
            "dtype": str(torch.ones(1).dtype),
            "gradients": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(),
        }
        os.chdir(tmp_path)
        os.environ["FEDSIM_TEST"] = "changed"
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(2)
        return Message(RecordDict({"found": ConfigRecord(found)}), reply_to=message)

    def server(grid: Grid, context: Context) -> Any:
        replies = grid.send_and_receive([asked(node) for node in grid.get_node_ids()])
        return [dict(reply.content["found"]) for reply in replies]

    found = run(server, 4, app, engine=engine, workers=workers)
    expected = {"folder": os.getcwd(), "variable": "none", "dtype": "torch.float32", "gradients": True, "threads": 1}
    assert found == [expected] * 4


@pytest.mark.parametrize(("engine", "workers"), ENGINES)
def test_clients_have_the_callers_default_dtype(engine: str, workers: int | None):
    app = ClientApp()

    @app.query()
    def tells(message: Message, context: Context) -> Message:
        return Message(RecordDict({"found": ConfigRecord({"dtype": str(torch.ones(1).dtype)})}), reply_to=message)

    def server(grid: Grid, context: Context) -> Any:
        torch.set_default_dtype(torch.float32)  # the server's own affair
        return [r.content["found"]["dtype"] for r in grid.send_and_receive([asked(n) for n in grid.get_node_ids()])]

    torch.set_default_dtype(torch.float64)
    try:
        assert run(server, 2, app, engine=engine, workers=workers) == ["torch.float64"] * 2
    finally:
        torch.set_default_dtype(torch.float32)
