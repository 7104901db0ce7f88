"""Clients that raise, hang, kill their process or answer nonsense, and waits without end: no hang, no silence."""

from __future__ import annotations

import logging
import math
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from clients.errors import RequestError, RunError
from fedsim.flower import compat, simulate
from fedsim.flower import grid as grid_module
from tests.flower.serving import asked, order, run, served, simulated, told


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, "flwr"):
        yield caplog


def training(deed: str, *at: int, **timeout: Any) -> Any:
    """A server that has every client train, of which some misbehave; then asks all whether their state knows of it."""

    def server(grid: Grid, context: Context) -> Any:
        nodes = list(grid.get_node_ids())
        replies = grid.send_and_receive([asked(node, "train", order(deed, *at)) for node in nodes], **timeout)
        states = grid.send_and_receive([asked(node, "query.tried") for node in nodes])
        return replies, [reply.content["metrics"]["tried"] for reply in states]

    return server


def errors(replies: list[Message]) -> list[int | None]:
    return [reply.error.code if reply.has_error() else None for reply in replies]


@pytest.mark.parametrize("engine", ["inline", "processes"])
def test_a_client_that_raises_gives_an_error_with_where_and_why_and_loses_its_state(
    engine: str, said: pytest.LogCaptureFixture
):
    replies, states = run(training("raise", 1), engine=engine, quiet=False)
    assert errors(replies) == [None, 2, None]
    reason = replies[1].error.reason
    assert reason.startswith("ValueError: no data here")
    assert "partition 1" in reason
    assert "train, round 7" in reason
    assert states == [1, 0, 1]
    assert "no data here" in said.text
    assert "in _raise" in said.text
    assert "round 7" in said.text


def test_many_failures_are_counted_and_not_all_shown(said: pytest.LogCaptureFixture):
    result = simulated(training("raise", *range(6)), 6, quiet=False)
    assert result.failures == 6
    assert said.text.count("Traceback") == 3
    assert "3 more clients failed" in said.text


def test_a_failure_reaches_the_ledger_with_its_traceback():
    class Heard:
        failures: list[tuple[str, str]] = []

        def begin(self, *args: Any) -> None: ...
        def answered(self, *args: Any) -> None: ...
        def phase(self, *args: Any) -> None: ...
        def failed(self, message: Message, text: str, traceback: str = "") -> None:
            self.failures.append((text, traceback))

    heard = Heard()
    run(training("raise", 2), ledger=heard)
    assert [text for text, _ in heard.failures] == ["ValueError: no data here"]
    assert "in _raise" in heard.failures[0][1]


@pytest.mark.parametrize("deed", ["nothing", "another", "exit"])
def test_a_client_that_returns_no_reply_or_exits_is_an_error(deed: str):
    replies, states = run(training(deed, 0))
    assert errors(replies) == [2, None, None]
    assert states == [0, 1, 1]


def test_a_client_that_kills_its_process_is_an_error_and_the_others_answer(said: pytest.LogCaptureFixture):
    replies, states = run(training("die", 1), 4, engine="processes", workers=2, quiet=False)
    assert errors(replies) == [None, compat.CLIENT_CRASHED, None, None]
    assert "its process ended" in replies[1].error.reason
    assert states == [1, 0, 1, 1]
    assert "it was run again from the start" in said.text
    assert "partition 1" in said.text


@pytest.mark.slow
def test_a_killer_among_quick_clients_that_share_a_chunk_is_found():
    def server(grid: Grid, context: Context) -> Any:
        nodes = list(grid.get_node_ids())
        for deed in ("fine", "die"):
            at = [] if deed == "fine" else [5]
            replies = grid.send_and_receive([asked(node, "train", order(deed, *at)) for node in nodes])
        return replies

    replies = run(server, 16, engine="processes", workers=1)
    assert [place for place, code in enumerate(errors(replies)) if code is not None] == [5]


def test_a_client_that_hangs_past_the_timeout_is_left_out_and_named(said: pytest.LogCaptureFixture):
    begun = time.monotonic()
    replies, states = run(training("hang", 1, timeout=0.6), engine="processes", workers=2, quiet=False)
    assert time.monotonic() - begun < 15
    assert len(replies) == 2
    assert errors(replies) == [None, None]
    assert states == [1, 0, 1]
    assert "1 of 3 replies did not come within 0.6 s" in said.text
    assert "partition 1" in said.text


def test_a_message_that_outlives_its_ttl_is_an_error():
    def server(grid: Grid, context: Context) -> Any:
        nodes = grid.get_node_ids()
        messages = [asked(node, "train", order("hang", 0), ttl=0.6) for node in nodes]
        return grid.pull_messages(grid.push_messages(messages))

    replies = run(server, engine="processes", workers=2)
    assert errors(replies) == [3, None, None]
    assert "0.6 s" in replies[0].error.reason


def test_limits_count_a_clients_own_time_and_not_its_wait_for_a_worker():
    def server(grid: Grid, context: Context) -> Any:
        messages = [asked(node, "train", order("nap", *range(6))) for node in grid.get_node_ids()]
        return grid.send_and_receive(messages, timeout=0.5)

    assert len(run(server, 6, engine="processes", workers=1)) == 6


def test_inline_waits_past_a_limit_and_says_so(said: pytest.LogCaptureFixture):
    def server(grid: Grid, context: Context) -> Any:
        messages = [asked(node, "train", order("nap", 1)) for node in grid.get_node_ids()]
        return grid.send_and_receive(messages, timeout=0.1)

    assert errors(run(server, quiet=False)) == [None, None, None]
    assert 'engine="inline" cannot enforce limits' in said.text


def test_client_timeout_limits_every_message():
    replies, _ = run(training("hang", 2), engine="processes", workers=2, client_timeout=0.5)
    assert errors(replies) == [None, None, compat.CLIENT_CRASHED]
    assert "took longer than 0.5 s" in replies[2].error.reason


def test_inline_cannot_limit_and_says_so():
    with pytest.raises(RequestError, match=r"client_timeout: .*processes"):
        run(training("fine"), client_timeout=1.0)


def test_drop_outs_are_errors_drawn_from_the_seed():
    def server(grid: Grid, context: Context) -> Any:
        return [errors(grid.send_and_receive([asked(n) for n in grid.get_node_ids()])) for _ in range(3)]

    found = run(server, 40, dropout=0.3)
    assert found == run(server, 40, dropout=0.3) != run(server, 40, dropout=0.3, seed=1)
    codes = [code for row in found for code in row]
    assert set(codes) == {None, compat.NODE_UNAVAILABLE}
    assert 15 < codes.count(compat.NODE_UNAVAILABLE) < 60


class Odd(BaseException):
    """No Exception, and without a text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("engine", ["inline", "processes"])
@pytest.mark.parametrize("kind", [Odd, MuteError, GeneratorExit])
def test_whatever_a_client_raises_is_one_error_with_its_traceback(
    engine: str, kind: type[BaseException], said: pytest.LogCaptureFixture
):
    app = ClientApp()

    @app.train()
    def raises(message: Message, context: Context) -> Message:
        raise kind

    def server(grid: Grid, context: Context) -> Any:
        return grid.send_and_receive([asked(node, "train") for node in grid.get_node_ids()])

    (reply,) = run(server, 1, app, engine=engine, workers=None if engine == "inline" else 1, quiet=False)
    assert reply.error.code == compat.CLIENT_RAISED
    assert reply.error.reason.startswith(f"{kind.__name__}: ")
    assert "in raises" in said.text
    assert "it was run again" not in said.text


def test_an_error_that_is_no_reply_is_quoted():
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = Message(Error(42, "my own reason"), reply_to=message)
        reply.metadata.__dict__["_reply_to_message_id"] = "another"
        return reply

    (reply,) = run(lambda grid, _: grid.send_and_receive([asked(n, "train") for n in grid.get_node_ids()]), 1, app)
    assert "an error (my own reason) that is no reply" in reply.error.reason


def test_a_hang_that_cannot_be_interrupted_is_ended_once(
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
):
    monkeypatch.setattr(grid_module, "_GRACE", 0.2)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            time.sleep(30)
        return Message(RecordDict(), reply_to=message)

    def server(grid: Grid, context: Context) -> Any:
        return grid.send_and_receive([asked(node, "train") for node in grid.get_node_ids()])

    begun = time.monotonic()
    replies = run(server, 3, app, engine="processes", workers=1, client_timeout=0.3, quiet=False)
    assert time.monotonic() - begun < 4
    assert errors(replies) == [None, compat.CLIENT_CRASHED, None]
    assert "took longer than 0.3 s" in replies[1].error.reason
    assert "it was run again" not in said.text


def test_a_timer_of_the_clients_own_is_not_taken_for_the_limit():
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(5)
        return Message(RecordDict(), reply_to=message)

    def server(grid: Grid, context: Context) -> Any:
        return grid.send_and_receive([asked(node, "train") for node in grid.get_node_ids()])

    (reply,) = run(server, 1, app, engine="processes", workers=1)
    assert "a timer (SIGALRM) that it had set itself" in reply.error.reason


def test_a_message_may_live_for_ever():
    def server(grid: Grid, context: Context) -> Any:
        return grid.send_and_receive([asked(node, ttl=math.inf) for node in grid.get_node_ids()])

    assert errors(run(server, engine="processes", workers=1)) == [None, None, None]


# ------------------------------------------------------------------------------------------------- waits without end


def test_a_strategy_that_waits_for_more_nodes_than_there_are_is_refused_at_once():
    def server(grid: Grid, context: Context) -> Any:
        strategy = FedAvg(min_available_nodes=5, min_train_nodes=2, min_evaluate_nodes=4)
        strategy.start(grid=grid, initial_arrays=ArrayRecord({"w": Array(np.zeros(2))}), num_rounds=1)

    begun = time.monotonic()
    with pytest.raises(RequestError) as refused:
        run(server, 3)
    assert time.monotonic() - begun < 2
    assert str(refused.value).startswith("num_supernodes: the server app waits for 5 nodes")
    assert "min_available_nodes=5, min_evaluate_nodes=4" in str(refused.value)
    assert "min_train_nodes" not in str(refused.value)


def test_a_loop_of_the_apps_own_that_waits_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grid_module, "_PATIENCE", 0.3)

    def server(grid: Grid, context: Context) -> Any:
        while len(list(grid.get_node_ids())) < 5:
            time.sleep(0.05)

    with pytest.raises(RequestError, match="sent nothing: it waits for more than the 3"):
        run(server, 3)


def test_a_server_that_works_or_sends_between_its_questions_does_not_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grid_module, "_PATIENCE", 0.1)

    def server(grid: Grid, context: Context) -> Any:
        for _ in range(15):
            node = next(iter(grid.get_node_ids()))
            grid.send_and_receive([asked(node)])
            time.sleep(0.02)
        for _ in range(30):
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                random.random()
            list(grid.get_node_ids())
        return "done"

    assert run(server) == "done"


# ------------------------------------------------------------------------------------------------- what cannot be run


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_supernodes": 0}, "num_supernodes: 0 is not"),
        ({"num_supernodes": True}, "num_supernodes: True is not"),
        ({"workers": 0}, "workers: 0 is not"),
        ({"seed": "x"}, "seed: 'x' is not"),
        ({"dropout": 1.0}, "dropout: 1.0 is not"),
        ({"dropout": "1"}, "dropout: '1' is not"),
        ({"client_timeout": "1"}, "client_timeout: '1' is not"),
        ({"node_config": {"partition-id": 7}}, "node_config: 'partition-id' is the simulation's own"),
        ({"node_config": lambda partition: {"num-partitions": 7}}, "node_config: 'num-partitions' is"),
        ({"engine": "proceses"}, "engine: .*did you mean 'processes'"),
        ({"run_config": {"a": [1]}}, "run_config.a: list is not"),
        ({"client_app": 3}, "client_app: int is not"),
        ({"server_app": "noapp"}, "server_app: 'noapp' is not of the form"),
        ({"server_app": "no.where:app"}, "server_app: there is no module 'no'"),
        ({"client_app": "tests.flower.serving:nobody"}, "client_app: .* has no 'nobody'"),
        ({"client_app": "tests.flower.serving:run"}, "client_app: .* of type function, not a flwr ClientApp"),
        ({"app_dir": "/no/such/folder"}, "app_dir: there is no folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_request_is_refused_in_one_line(options: dict[str, Any], line: str):
    given: dict[str, Any] = {
        "server_app": served(lambda grid, context: None),
        "client_app": told,
        "num_supernodes": 2,
        "engine": "inline",
        **options,
    }
    with pytest.raises(RequestError, match=line) as refused:
        simulate(**given)
    assert len(refused.value.problems) == 1
    assert "\n" not in str(refused.value)


def test_an_app_whose_module_fails_on_import_says_so(tmp_path: Any):
    (tmp_path / "broken_app.py").write_text("raise ZeroDivisionError('at import')\n")
    with pytest.raises(RunError, match="importing 'broken_app' failed: ZeroDivisionError: at import"):
        simulate(served(lambda g, c: None), "broken_app:app", 2, engine="processes", workers=1, app_dir=tmp_path)


def test_what_the_server_app_raises_comes_through_and_the_next_simulation_works():
    def server(grid: Grid, context: Context) -> Any:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        run(server, engine="processes", workers=1)
    assert run(lambda grid, _: len(grid.get_node_ids())) == 3


def test_one_simulation_at_a_time():
    with pytest.raises(RequestError, match="already simulating"):
        run(lambda grid, context: run(lambda g, c: None))
