"""A Flower grid of a few lines: messages are handled one after another, in this process."""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


def copied(content: RecordDict) -> RecordDict:
    return RecordDict({key: record.copy() for key, record in content.items()})


class SmallGrid(Grid):
    """Nodes that each run the app for a partition.

    Args:
        app: the ClientApp, or one for each partition.
        nodes: how many there are.
        after: changes a reply on its way, ``after(partition, message, reply)``; None loses it.
        ids: the nodes' ids, in the order of the partitions.
    """

    def __init__(
        self,
        app: ClientApp | Callable[[int], ClientApp],
        nodes: int,
        after: Callable[[int, Message, Message], Message | None] | None = None,
        ids: list[int] | None = None,
    ):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.ids = ids or [1000 + place for place in range(nodes)]
        self.app = (lambda _: app) if isinstance(app, ClientApp) else app
        self.after = after or (lambda partition, message, reply: reply)
        self.sent: list[Message] = []
        self.replies: list[Message] = []
        self.contexts = {
            node: Context(1, node, {"partition-id": place, "num-partitions": nodes}, RecordDict(), {})
            for place, node in enumerate(self.ids)
        }

    def get_node_ids(self) -> Iterable[int]:
        return list(self.ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = [self._answer(message) for message in list(messages)]
        found = [reply for reply in replies if reply is not None]
        self.replies += found
        return found

    def _answer(self, message: Message) -> Message | None:
        message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        self.sent.append(message)
        context = self.contexts[message.metadata.dst_node_id]
        partition = self.ids.index(context.node_id)
        before = {key: record.copy() for key, record in context.state.items()}
        try:
            given = Message(copied(message.content), message.metadata.dst_node_id, message.metadata.message_type)
            given.metadata.__dict__.update(message.metadata.__dict__)
            reply = self.app(partition)(given, context)
        except Exception:
            context.state = RecordDict(before)
            reply = Message(Error(2, traceback.format_exc()), reply_to=message)
        return self.after(partition, message, reply)

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError
