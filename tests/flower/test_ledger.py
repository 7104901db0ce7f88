"""The record of a Flower app's run: which round a message belongs to, what is counted, and what clients failed at."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim.flower import compat  # noqa: F401  (decides about telemetry before flwr is imported)
from fedsim.flower.apps import App
from fedsim.flower.ledger import Ledger, canonical, size
from fedsim.flower.listening import listening
from fedsim.flower.showing import Bar, Lines
from fedsim.records import Event, RoundRecord

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict  # isort: skip

NODES = [1000, 1001, 1002, 1003]
WEIGHTS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, dtype=np.float32)}
BYTES = sum(len(Array(value).data) for value in WEIGHTS.values())
NUMBERS = count(1)


@dataclass
class Metadata:
    message_id: str
    dst_node_id: int = 0
    message_type: str = "train"
    group_id: str = ""
    reply_to_message_id: str = ""


@dataclass
class Sent:
    """What the ledger reads of a message."""

    content: RecordDict
    metadata: Metadata
    error: Any = None

    def has_error(self) -> bool:
        return self.error is not None


@dataclass
class Failed:
    code: int
    reason: str


def arrays() -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in WEIGHTS.items()})


def ask(node: int, kind: str = "train", group: str = "", **config: Any) -> Sent:
    content = RecordDict({"arrays": arrays(), "config": ConfigRecord(config)})
    return Sent(content, Metadata(str(next(NUMBERS)), node, kind, group))


def answer(message: Sent, metrics: dict[str, Any] | None = None, with_arrays: bool = True) -> Sent:
    records: dict[str, Any] = {"metrics": MetricRecord(metrics or {})}
    if with_arrays:
        records["arrays"] = arrays()
    return Sent(RecordDict(records), Metadata("r", reply_to_message_id=message.metadata.message_id))


def refuse(message: Sent, reason: str = "no") -> Sent:
    metadata = Metadata("r", reply_to_message_id=message.metadata.message_id)
    return Sent(RecordDict(), metadata, Failed(2, reason))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "mine.py").write_text("app = None\n")
    app = App(tmp_path / "app", "mine", "mine:app", "mine:app", {"lr": 0.1}, len(NODES))
    made = Ledger(tmp_path / "run", app, engine="inline", workers=1)
    made.begin(NODES, "inline", 1)
    yield made
    made.close()


def play(ledger: Ledger, phases: Iterable[list[Sent]]) -> fedsim.Run:
    for sent in phases:
        ledger.phase(sent, [answer(message, {"num-examples": 2}) for message in sent], 0.0, [7] * len(sent))
    ledger.finish()
    return fedsim.load(ledger.directory)


def rounds(run: fedsim.Run) -> list[tuple[int, int]]:
    return [(row["round"], row["cohort"]) for row in run.rounds()]


# ------------------------------------------------------------------------------------------------ rounds


def test_a_round_is_the_server_round_that_messages_name(ledger: Ledger) -> None:
    phases = [
        [ask(node, kind, **{"server-round": number}) for node in NODES[:number]]
        for number in (1, 2, 3)
        for kind in ("train", "evaluate")
    ]
    assert rounds(play(ledger, phases)) == [(1, 1), (2, 2), (3, 3)]


def test_where_rounds_are_not_numbered_a_type_that_comes_again_begins_the_next(ledger: Ledger) -> None:
    phases = [
        [ask(node, kind) for node in NODES]
        for kind in ("query.statistics", "train", "evaluate", "train", "evaluate", "train")
    ]
    run = play(ledger, phases)
    assert rounds(run) == [(1, 4), (2, 4), (3, 4)]
    assert [row["bytes_down"] for row in run.rounds()] == [12 * BYTES, 8 * BYTES, 4 * BYTES]


def test_a_group_of_messages_is_a_round_however_often_it_is_asked(ledger: Ledger) -> None:
    phases = [[ask(node, "query", group)] for group in ("0", "1") for node in NODES]
    assert rounds(play(ledger, phases)) == [(1, 4), (2, 4)]


def test_what_is_asked_before_the_first_evaluation_belongs_to_round_0(ledger: Ledger) -> None:
    who = [ask(node, "query.who") for node in NODES]
    ledger.phase(who, [answer(message) for message in who], 0.0, [7] * 4)
    ledger.metrics("test", 0, {"accuracy": 0.125})
    run = play(ledger, [[ask(NODES[0], **{"server-round": number})] for number in (1, 2)])
    assert rounds(run) == [(0, 0), (1, 1), (2, 1)]
    assert [row.get("test_accuracy") for row in run.rounds()] == [0.125, None, None]
    assert run.rounds()[0]["bytes_down"] == 4 * BYTES


def test_an_app_that_counts_from_0_trains_in_round_1(ledger: Ledger) -> None:
    phases = [[ask(node, **{"server-round": number}) for node in NODES] for number in (0, 1, 2)]
    assert rounds(play(ledger, phases)) == [(1, 4), (2, 4), (3, 4)]


def test_a_second_strategy_counts_on_from_the_first(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.strategy_starts("FedAvg", 2)
        for number in (1, 2):
            sent = [ask(NODES[0], **{"server-round": number})]
            ledger.phase(sent, [answer(sent[0])], 0.0, [7])
    ledger.finish()
    assert rounds(fedsim.load(ledger.directory)) == [(1, 1), (2, 1), (3, 1), (4, 1)]


# ------------------------------------------------------------------------------------------------ what is counted


def test_bytes_are_those_of_the_arrays_and_of_byte_strings() -> None:
    masked = ConfigRecord({"vector": [b"1234", b"56"], "seed": b"789", "name": "not counted", "round": 3})
    assert size(RecordDict({"arrays": arrays(), "masked": masked, "m": MetricRecord({"loss": 1.0})})) == BYTES + 9


def test_clients_are_recorded_by_partition_with_the_numbers_that_they_tell(ledger: Ledger) -> None:
    sent = [ask(node, **{"server-round": 1}) for node in NODES]
    told = [{"num-examples": 10 * i, "train_loss": float(i), "lr": 0.5, "sizes": [1, 2]} for i in range(4)]
    ledger.phase(sent, [answer(*pair) for pair in zip(sent, told, strict=True)], 0.25, [7, 7, 8, 8])
    ledger.finish()
    run = fedsim.load(ledger.directory)
    assert run.clients[["client", "examples", "loss", "lr"]].to_numpy().tolist() == [
        [i, 10 * i, float(i), 0.5] for i in range(4)
    ]
    assert run.chunks[["pid", "clients", "seconds"]].to_numpy().tolist() == [[7, 2, 0.25], [8, 2, 0.25]]
    (row,) = run.rounds()
    assert (row["bytes_up"], row["bytes_down"]) == (4 * BYTES, 4 * BYTES)
    assert row["train_loss"] == pytest.approx((10 * 1 + 20 * 2 + 30 * 3) / 60)


def test_what_clients_evaluate_is_pooled_over_their_examples(ledger: Ledger) -> None:
    sent = [ask(node, "evaluate", **{"server-round": 1}) for node in NODES[:2]]
    replies = [
        answer(sent[0], {"num-examples": 1, "eval_acc": 0.0, "eval_loss": 4.0}, with_arrays=False),
        answer(sent[1], {"num-examples": 3, "eval_acc": 1.0, "eval_loss": 2.0}, with_arrays=False),
    ]
    ledger.phase(sent, replies, 0.0, [7, 7])
    summary = ledger.finish()
    assert (summary["split"], summary["metric_name"], summary["accuracy"]) == ("client_test", "accuracy", 0.75)
    assert (summary["loss"], summary["examples"], summary["bytes_up"]) == (2.5, 4.0, 0)
    frame = fedsim.load(ledger.directory).client_metrics
    assert frame[["client", "accuracy", "loss", "examples"]].to_numpy().tolist() == [[0, 0, 4, 1], [1, 1, 2, 3]]


@pytest.mark.parametrize(
    ("told", "recorded"),
    [
        ({"eval_loss": 1.0, "eval_acc": 0.5}, {"loss": 1.0, "accuracy": 0.5}),
        ({"test-accuracy": 0.5, "val_f1": 0.25}, {"accuracy": 0.5, "f1": 0.25}),
        ({"loss": 1.0, "train_loss": 2.0}, {"loss": 1.0, "train_loss": 2.0}),
        ({"train_loss": 2.0, "loss": 1.0}, {"train_loss": 2.0, "loss": 1.0}),
        ({"evaluation": 1.0, "steps": 3, "client": 4}, {"evaluation": 1.0, "steps": 3, "client_": 4}),
        ({"num-examples": 3, "ok": True, "name": "x", "many": [1, 2]}, {}),
    ],
)
def test_metrics_go_by_their_short_names(told: dict[str, Any], recorded: dict[str, float]) -> None:
    assert canonical(told) == recorded


def test_the_servers_word_on_a_split_stands_before_the_clients_mean(ledger: Ledger) -> None:
    sent = [ask(NODES[0], "evaluate", **{"server-round": 1})]
    ledger.phase(sent, [answer(sent[0], {"num-examples": 4, "loss": 1.0, "accuracy": 0.5})], 0.0, [7])
    ledger.metrics("client_test", 1, {"accuracy": 0.75})
    ledger.metrics("test", 1, {"accuracy": 0.25, "loss": 3.0})
    summary = ledger.finish()
    assert (summary["split"], summary["accuracy"], summary["loss"]) == ("test", 0.25, 3.0)
    (row,) = fedsim.load(ledger.directory).rounds()
    assert (row["client_test_accuracy"], row["client_test_loss"], row["test_accuracy"]) == (0.75, 1.0, 0.25)


def test_the_final_weights_are_a_row_in_the_order_in_which_they_were_sent(ledger: Ledger) -> None:
    import hashlib

    sent = [ask(NODES[0], **{"server-round": 1})]
    ledger.phase(sent, [answer(sent[0])], 0.0, [7])
    ledger.arrays((name, value + 1) for name, value in WEIGHTS.items())
    summary = ledger.finish()
    row = np.concatenate([value.ravel() + 1 for value in WEIGHTS.values()]).astype("<f4")
    assert summary["weights_sha256"] == hashlib.sha256(row.tobytes()).hexdigest()
    weights = fedsim.load(ledger.directory).weights
    assert {name: value.tolist() for name, value in weights.items()} == {
        name: (value + 1).tolist() for name, value in WEIGHTS.items()
    }


# ------------------------------------------------------------------------------------------------ failures


def test_a_client_that_raises_is_an_event_with_client_round_and_traceback(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger._show = Lines()
    ledger._show.start("mine", 4)
    sent = [ask(node, **{"server-round": 3}) for node in NODES]
    ledger.failed(sent[2], "ValueError: no data", "Traceback ...\nValueError: no data\n")
    ledger.phase(sent, [*map(answer, sent[:2]), refuse(sent[2], "ValueError")], 0.0, [7] * 3)
    ledger.finish()
    events = fedsim.load(ledger.directory).events
    assert events[["round", "kind", "client", "stage"]].to_numpy().tolist() == [
        [3, "client_failed", 2, "train"],
        [3, "no_reply", 3, "train"],
    ]
    assert events["traceback"][0].endswith("ValueError: no data\n")
    (row,) = fedsim.load(ledger.directory).rounds()
    assert (row["cohort"], row["completed"]) == (4, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "round 3: client 2, train: ValueError: no data"
    assert lines[2] == "round 3: client 3, train: no reply"


def test_an_error_that_nobody_explained_is_told_by_its_reason(ledger: Ledger) -> None:
    sent = [ask(NODES[1], **{"server-round": 1})]
    ledger.phase(sent, [refuse(sent[0], "the process\ndied")], 0.0, [])
    ledger.finish()
    (event,) = fedsim.load(ledger.directory).events.to_dict("records")
    assert event["message"] == "client 1, train: the process died"


def test_a_run_that_the_server_ends_early_keeps_its_rounds_and_says_why(ledger: Ledger) -> None:
    sent = [ask(NODES[0], **{"server-round": 1})]
    ledger.phase(sent, [answer(sent[0])], 0.0, [7])
    ledger.event("server_failed", "KeyError: 'w'", "Traceback")
    ledger.close()
    run = fedsim.load(ledger.directory)
    assert run.summary is None
    assert rounds(run) == [(1, 1)]
    assert run.events["message"].tolist() == ["KeyError: 'w'"]


def test_failures_are_counted_and_told_in_one_line(ledger: Ledger) -> None:
    sent = [ask(node, **{"server-round": 1}) for node in NODES]
    ledger.failed(sent[2], "ValueError: no\ndata")
    ledger.phase(sent, [*map(answer, sent[:2]), refuse(sent[2])], 0.0, [7] * 2)
    assert ledger.finish()["failures"] == 2
    assert fedsim.load(ledger.directory).events["message"].tolist() == [
        "client 2, train: ValueError: no data",
        "client 3, train: no reply",
    ]


def test_a_message_to_nobody_is_an_event(ledger: Ledger) -> None:
    ledger.dropped(ask(77, **{"server-round": 2}), "there is no such node")
    play(ledger, [[ask(NODES[0], **{"server-round": 2})]])
    (event,) = fedsim.load(ledger.directory).events.to_dict("records")
    assert (event["round"], event["kind"]) == (2, "not_sent")
    assert event["message"] == "node 77, train: not sent: there is no such node"


def test_the_privacy_spent_is_the_most_that_anybody_reports(ledger: Ledger) -> None:
    for number, spent in ((1, [0.5, 0.75]), (2, [0.25, 1.5])):
        sent = [ask(node, **{"server-round": number}) for node in NODES[:2]]
        replies = [answer(m, {"num-examples": 1, "epsilon": e}) for m, e in zip(sent, spent, strict=True)]
        ledger.phase(sent, replies, 0.0, [7, 7])
        ledger.metrics("train", number, {"epsilon": sum(spent) / 2})
    ledger.metrics("train", 3, {"epsilon": 2.0})
    assert ledger.finish()["epsilon"] == 2.0
    assert fedsim.load(ledger.directory).history["epsilon"].tolist() == [0.75, 1.5, 2.0]


def test_an_app_that_reports_no_epsilon_has_none(ledger: Ledger) -> None:
    ledger.phase(sent := [ask(NODES[0])], [answer(sent[0])], 0.0, [7])
    assert ledger.finish()["epsilon"] is None


# ------------------------------------------------------------------------------------------------ the directory


def test_the_record_stays_where_it_began(tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    mine = Ledger(Path("mine"), ledger.app)
    mine.begin(NODES, "inline", 1)
    mine.phase(sent := [ask(NODES[0])], [answer(sent[0])], 0.0, [7])
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert mine.finish()["out"] == "mine"
    mine.close()
    assert rounds(fedsim.load(tmp_path / "mine")) == [(1, 1)]
    assert not list(Path().iterdir())


def test_where_the_loss_is_the_only_metric_the_report_speaks_of_it(ledger: Ledger) -> None:
    from fedsim.report import write_report

    sent = [ask(NODES[0], "evaluate", **{"server-round": 1})]
    ledger.phase(sent, [answer(sent[0], {"num-examples": 4, "eval_loss": 1.25})], 0.0, [7])
    ledger.finish()
    page = write_report([ledger.directory]).read_text()
    assert "no evaluation yet" not in page
    assert "reached 1.25" in page
    assert "client test loss" in page.lower()
    assert "client test accuracy</dt>" not in page.lower()


def test_the_directory_is_like_any_runs(ledger: Ledger) -> None:
    from fedsim.report import write_report

    ledger.strategy_starts("FedAvg", 2)
    phases = [[ask(node, **{"server-round": number}) for node in NODES] for number in (1, 2)]
    run = play(ledger, phases)
    assert run.experiment["name"] == "mine"
    assert (run.experiment["rounds"], run.experiment["strategy"]) == (2, "FedAvg")
    assert run.experiment["app"]["config"] == {"lr": 0.1}
    assert json.loads((ledger.directory / "manifest.json").read_text())["sources"].keys() == {"mine.py"}
    page = write_report([ledger.directory]).read_text()
    assert "fedsim simulate" in page
    assert "fedsim run" not in page


def test_a_bar_shows_messages_and_the_last_metric(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    bar.start("mine", 4)
    bar.answered(2, 3, 4)
    bar.answered(2, 4, 4)
    metrics = {"client_test": {"loss": 0.5}, "test": {"loss": 2.0, "accuracy": 0.25, "examples": 8.0}}
    bar.round(RoundRecord(2, 4, 3, metrics=metrics, events=[Event(2, "client_failed", "client 1, train: [no]")]))
    (task,) = bar._live.tasks
    assert (task.completed, task.total, task.description) == (4, 4, "mine round 2")
    assert task.fields["metric"] == "test accuracy 0.250"
    bar.stop()
    said = capsys.readouterr()
    assert said.out == ""
    assert "round 2: client 1, train: [no]" in said.err


# ------------------------------------------------------------------------------------------------ listening


def test_strategies_are_as_they_were_after_listening(ledger: Ledger) -> None:
    from flwr.server.history import History
    from flwr.serverapp.strategy import FedAvg, Strategy

    before = (FedAvg.aggregate_train, FedAvg.aggregate_evaluate, Strategy.start, History.add_loss_centralized)
    with listening(ledger):
        assert FedAvg.aggregate_train is not before[0]
    after = (FedAvg.aggregate_train, FedAvg.aggregate_evaluate, Strategy.start, History.add_loss_centralized)
    assert after == before


def test_a_strategy_that_starts_tells_its_rounds_and_what_the_server_evaluates(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    from flwr.serverapp.strategy import FedAvg

    class Mine(FedAvg):
        def start(self, grid: Any, initial_arrays: Any, num_rounds: int = 7, evaluate_fn: Any = None) -> Any:
            return super().start(grid, initial_arrays, num_rounds, evaluate_fn=evaluate_fn)

        def configure_train(self, *args: Any) -> list:
            return []

        configure_evaluate = configure_train

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return arrays(), MetricRecord({"train_loss": float(server_round)})

    class Grid:
        def send_and_receive(self, messages: Any, timeout: float) -> list:
            return []

    caplog.set_level(logging.ERROR, "flwr")
    with listening(ledger):
        Mine().start(Grid(), arrays(), 2, evaluate_fn=lambda number, _: MetricRecord({"accuracy": number / 4}))
    summary = ledger.finish()
    assert (ledger.strategy, ledger.planned, summary["accuracy"]) == ("Mine", 2, 0.5)
    rows = fedsim.load(ledger.directory).rounds()
    assert [(row["round"], row["test_accuracy"]) for row in rows] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert [row.get("train_loss") for row in rows] == [None, 1.0, 2.0]


def test_a_strategy_may_return_what_cannot_be_recorded(ledger: Ledger) -> None:
    from flwr.serverapp.strategy import FedAvg

    class Odd(FedAvg):
        def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
            return 0.5

    with listening(ledger):
        assert [Odd().aggregate_evaluate(number, []) for number in (1, 2)] == [0.5, 0.5]
    ledger.finish()
    (event,) = fedsim.load(ledger.directory).events.to_dict("records")
    assert event["kind"] == "not_recorded"
    assert "Odd.aggregate_evaluate returned is not in the record: AttributeError" in event["message"]
