"""The error tree: a message says what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class FedsimError(Exception):
    """Base of everything fedsim raises on purpose."""


class RequestError(FedsimError):
    """The request is wrong (command line: exit code 2). Holds one line for each wrong thing, all found at once.

    ``RequestError("client.lr: ...")`` or ``RequestError(["client.lr: ...", "data.clients: ..."])``.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunError(FedsimError):
    """The run failed (command line: exit code 1). Says the round, the client and the stage where it is known."""


class ClientError(RunError):
    """A client's own code raised. The round goes on without it, down to ``min_clients``."""

    def __init__(self, message: str, *, client: int, stage: str, round: int | None = None, traceback: str = ""):
        where = f"round {round}, " if round is not None else ""
        super().__init__(f"{where}client {client}, {stage}: {message}")
        self.client, self.stage, self.round, self.traceback = client, stage, round, traceback

    def __reduce__(self) -> tuple:
        return _client_error, (str(self), self.client, self.stage, self.round, self.traceback)


def _client_error(text: str, client: int, stage: str, round: int | None, traceback: str) -> ClientError:
    error = ClientError("", client=client, stage=stage, round=round, traceback=traceback)
    error.args = (text,)
    return error


def nearest(word: str, allowed: Sequence[str]) -> str:
    """``"; did you mean 'fedavg'?"`` or nothing."""
    import difflib

    close = difflib.get_close_matches(word.lower(), [a.lower() for a in allowed], n=1, cutoff=0.5)
    match = next((a for a in allowed if close and a.lower() == close[0]), None)
    return f"; did you mean {match!r}?" if match else ""
