"""The grid's semantics, those of Flower's own in-memory grid: what is pushed, pulled, dropped, and isolated."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsim.flower import compat
from fedsim.flower.parcels import Shelf, pack, packed, size, unpack
from tests.flower.serving import asked, run, simulated, told, weights


def partitions(replies: list[Message]) -> list[int]:
    return [reply.content["me"]["partition"] for reply in replies]


def test_nodes_have_fixed_ordered_ids_and_are_the_same_at_every_call():
    first, second = (run(lambda grid, _: (list(grid.get_node_ids()), list(grid.get_node_ids()))) for _ in range(2))
    assert first == second
    assert first[0] == first[1] == sorted(first[0])
    assert len(set(first[0])) == 3
    assert compat.SERVER_NODE not in first[0]
    assert 0 not in first[0]


def test_push_gives_every_message_an_id_of_its_own():
    def server(grid: Grid, context: Context) -> Any:
        messages = [asked(node) for node in grid.get_node_ids()]
        ids = list(grid.push_messages(messages))
        return ids, [message.metadata.message_id for message in messages]

    ids, theirs = run(server)
    assert ids == theirs
    assert len(set(ids)) == 3


def test_a_reply_is_pulled_once_and_later_is_unknown():
    def server(grid: Grid, context: Context) -> Any:
        ids = list(grid.push_messages([asked(node) for node in grid.get_node_ids()]))
        some = list(grid.pull_messages(ids[:1]))
        rest = list(grid.pull_messages(ids[1:]))
        again = list(grid.pull_messages(ids[:1]))
        return ids, some, rest, again

    ids, some, rest, again = run(server)
    assert [reply.metadata.reply_to_message_id for reply in some + rest] == ids
    assert all(reply.has_content() for reply in some + rest)
    assert again[0].error.code == 3
    assert again[0].metadata.reply_to_message_id == ids[0]


def test_a_reply_goes_from_the_node_to_the_server_in_the_same_group_and_run():
    def server(grid: Grid, context: Context) -> Any:
        message = asked(grid.get_node_ids()[1], group_id="4")
        return message.metadata, grid.send_and_receive([message])[0].metadata, grid.run.run_id, context.run_id

    sent, reply, run_id, context_run = run(server)
    assert (reply.src_node_id, reply.dst_node_id) == (sent.dst_node_id, sent.src_node_id)
    assert reply.group_id == "4"
    assert reply.reply_to_message_id == sent.message_id != reply.message_id != ""
    assert reply.run_id == sent.run_id == run_id == context_run


def test_an_unknown_id_gives_an_error_message():
    reply = run(lambda grid, _: grid.pull_messages(["nobody"]))[0]
    assert reply.error.code == 3
    assert "nobody" in reply.error.reason


def test_messages_to_unknown_nodes_reach_the_ledger():
    class Heard:
        dropped_: list[tuple[int, str]] = []

        def begin(self, *args: Any) -> None: ...
        def answered(self, *args: Any) -> None: ...
        def phase(self, *args: Any) -> None: ...
        def failed(self, *args: Any) -> None: ...
        def dropped(self, message: Message, why: str) -> None:
            self.dropped_.append((message.metadata.dst_node_id, why))

    run(lambda grid, _: grid.send_and_receive([asked(7), asked(grid.get_node_ids()[0])]), ledger=Heard())
    assert Heard.dropped_ == [(7, "there is no such node; the nodes are 1000000 to 1000002")]


def test_messages_to_unknown_nodes_are_dropped_and_it_is_said(caplog: pytest.LogCaptureFixture):
    replies = run(lambda grid, _: grid.send_and_receive([asked(7), asked(grid.get_node_ids()[0])]))
    assert partitions(replies) == [0]
    assert "1 message was dropped: to 7" in caplog.text


@pytest.mark.parametrize("options", [{"ttl": -1.0}], ids=["ttl"])
def test_an_invalid_message_is_refused(options: dict[str, Any]):
    def server(grid: Grid, context: Context) -> Any:
        message = asked(grid.get_node_ids()[0])
        message.metadata.ttl = options["ttl"]
        grid.push_messages([message])

    with pytest.raises(ValueError, match="Invalid message"):
        run(server)


def test_a_reply_cannot_be_pushed():
    def server(grid: Grid, context: Context) -> Any:
        grid.push_messages(grid.send_and_receive([asked(grid.get_node_ids()[0])]))

    with pytest.raises(ValueError, match="Invalid message"):
        run(server)


def test_replies_come_as_a_list_in_the_order_of_the_messages():
    def server(grid: Grid, context: Context) -> Any:
        nodes = list(reversed(grid.get_node_ids()))
        return grid.send_and_receive(asked(node) for node in nodes)

    replies = run(server, 5)
    assert isinstance(replies, list)
    assert partitions(replies) == [4, 3, 2, 1, 0]


def test_messages_to_one_node_are_handled_one_after_another_in_their_order():
    def server(grid: Grid, context: Context) -> Any:
        a, b = grid.get_node_ids()[:2]
        return grid.send_and_receive([asked(a), asked(b), asked(a), asked(a)])

    replies = run(server, engine="processes", workers=2)
    assert [reply.content["me"]["asked"] for reply in replies] == [1, 1, 2, 3]


def test_state_persists_by_node_over_calls():
    def server(grid: Grid, context: Context) -> Any:
        a, b = grid.get_node_ids()[:2]
        grid.send_and_receive([asked(a)])
        return grid.send_and_receive([asked(a), asked(b)])

    assert [reply.content["me"]["asked"] for reply in run(server)] == [2, 1]


@pytest.mark.parametrize("engine", ["inline", "processes"])
def test_what_one_client_changes_no_other_sees_nor_the_server(engine: str):
    def server(grid: Grid, context: Context) -> Any:
        content = RecordDict({"config": ConfigRecord({"list": [1], "word": "clean"}), "arrays": weights(1, 2, 3)})
        replies = grid.send_and_receive([asked(node, "query.spoil", content) for node in grid.get_node_ids()])
        return [dict(reply.content["seen"]) for reply in replies], content, dict(context.run_config)

    seen, content, config = run(server, 4, engine=engine, workers=1 if engine == "processes" else None)
    assert seen == [{"list": [1], "word": "clean", "sum": 6.0}] * 4
    assert content["config"] == {"list": [1], "word": "clean"}
    assert float(content["arrays"]["w"].numpy().sum()) == 6
    assert config == {}


def test_a_server_may_take_replies_apart():
    def server(grid: Grid, context: Context) -> Any:
        content = RecordDict({"arrays": weights(1, 2)})
        replies = grid.send_and_receive([asked(node, content=content) for node in grid.get_node_ids()])
        replies[0].content["arrays"].pop("w")
        return [len(reply.content["arrays"]) for reply in replies], len(content["arrays"])

    assert run(server) == ([0, 1, 1], 1)


def test_a_message_is_sent_as_it_was_when_it_was_pushed():
    def server(grid: Grid, context: Context) -> Any:
        config = ConfigRecord()

        def messages() -> Any:
            for number, node in enumerate(grid.get_node_ids()):
                config["number"] = number
                yield asked(node, content=RecordDict({"config": config}))

        return [reply.content["config"]["number"] for reply in grid.send_and_receive(messages())]

    assert run(server) == [0, 1, 2]


def test_the_servers_random_state_is_left_alone_and_clients_draw_by_seed_node_and_message():
    def server(grid: Grid, context: Context) -> Any:
        random.seed(5)
        draws = []
        for _ in range(2):
            replies = grid.send_and_receive([asked(node, "query.draw") for node in grid.get_node_ids()])
            draws += [tuple(reply.content["drawn"]["values"]) for reply in replies]
        return draws, random.random()

    drawn, after = run(server)
    random.seed(5)
    assert after == random.random()
    assert len({value for values in drawn for value in values}) == 18
    assert drawn == run(server, engine="processes", workers=2)[0]
    assert drawn != run(server, seed=1)[0]


def test_the_deprecated_create_message_works():
    def server(grid: Grid, context: Context) -> Any:
        message = grid.create_message(RecordDict(), "query", grid.get_node_ids()[2], "1", ttl=60)
        return grid.send_and_receive([message])

    assert partitions(run(server)) == [2]


def test_the_ledger_hears_of_every_message_answer_and_phase():
    class Heard:
        def __init__(self) -> None:
            self.calls: list[tuple] = []

        def begin(self, nodes: Any, engine: str, workers: int) -> None:
            self.calls.append(("begin", len(nodes), engine, workers))

        def answered(self, message: Message, done: int, asked: int) -> None:
            self.calls.append(("answered", done, asked))

        def failed(self, message: Message, text: str, traceback: str = "") -> None:
            self.calls.append(("failed", text))

        def phase(self, sent: Any, replies: Any, seconds: float, pids: Any) -> None:
            self.calls.append(("phase", len(sent), len(replies), len(pids), seconds > 0))

    heard = Heard()
    run(lambda grid, _: grid.send_and_receive([asked(node) for node in grid.get_node_ids()]), 2, ledger=heard)
    assert heard.calls == [
        ("begin", 2, "inline", 1),
        ("answered", 1, 2),
        ("answered", 2, 2),
        ("phase", 2, 2, 2, True),
    ]


def test_weights_that_many_messages_share_are_held_once():
    record = ArrayRecord({"w": Array(np.zeros(1000)), "small": Array(np.zeros(2))})
    shelf = Shelf()
    contents = [pack(RecordDict({"arrays": record.copy(), "n": MetricRecord({"n": i})}), shelf) for i in range(50)]
    assert len(shelf.blobs) == 1
    assert sum(size(content, shelf.blobs) for content in contents) == 50 * record.count_bytes() - 50 * len("wsmall")


def test_packing_keeps_everything():
    content = RecordDict(
        {
            "arrays": ArrayRecord(
                {"a": Array(np.arange(600)), "b": Array(np.array(1.0)), "c": Array(np.zeros((0, 3)))}
            ),
            "empty": ArrayRecord(),
            "metrics": MetricRecord({"n": 1, "x": 1.5, "list": [1.0, 2.0]}),
            "config": ConfigRecord({"s": "text", "b": b"bytes", "flag": True, "list": [b"1", b"2"]}),
        }
    )
    kept = packed(content)
    assert unpack(kept.records, kept.blobs) == content


def test_bytes_are_counted_both_ways():
    def server(grid: Grid, context: Context) -> Any:
        grid.send_and_receive(
            [asked(node, content=RecordDict({"w": weights(*range(100))})) for node in grid.get_node_ids()]
        )

    found = simulated(server)
    each = len(Array(np.arange(100.0)).data)
    assert (found.messages, found.failures, found.bytes_down, found.bytes_up) == (3, 0, 3 * each, 3 * each)


def test_a_message_type_that_the_app_has_not_is_an_error():
    reply = run(lambda grid, _: grid.send_and_receive([asked(grid.get_node_ids()[0], "evaluate")]))[0]
    assert reply.error.code == 2
    assert "No evaluate function" in reply.error.reason


def test_the_app_is_called_by_flowers_own_rules():
    calls = []
    app = ClientApp(mods=[lambda message, context, call: calls.append("mod") or call(message, context)])

    @app.lifespan()
    def lifespan(context: Context) -> Any:
        calls.append("enter")
        yield
        calls.append("exit")

    @app.query("mine")
    def mine(message: Message, context: Context) -> Message:
        calls.append("app")
        return Message(RecordDict(), reply_to=message)

    run(lambda grid, _: grid.send_and_receive([asked(grid.get_node_ids()[0], "query.mine")]), 1, app)
    assert calls == ["enter", "mod", "app", "exit"]
    assert told is not app


@pytest.mark.parametrize("engine", ["inline", "processes"])
def test_one_message_sent_twice_is_two_messages(engine: str):
    def server(grid: Grid, context: Context) -> Any:
        node = next(iter(grid.get_node_ids()))
        message = asked(node)
        both = grid.send_and_receive([message, message])
        return [reply.content["me"]["asked"] for reply in both], len({r.metadata.reply_to_message_id for r in both})

    assert run(server, engine=engine) == ([1, 2], 2)
