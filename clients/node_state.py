"""What a client keeps between rounds, in Flower's context of its node; arrays alone, nothing is pickled."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor

from clients.errors import RequestError
from clients.messages import record_of, tensors_of

from flwr.app import ArrayRecord, ConfigRecord, Context  # isort: skip

#: What stands; and what the last round made, with its number, until it is known whether the server adopted it.
_STATE, _PENDING, _PENDING_ROUND = "fedsim-state", "fedsim-pending", "fedsim-pending-round"

#: The run that it is of, where the server says so: another one begins afresh.
_RUN = "fedsim-run"

#: How many runs before it are remembered.
_REMEMBERED = 32


def begin(context: Context, run: str | None, stands: Collection[str] = ()) -> None:
    """Forgets what the client kept of another run, but for what ``stands`` whatever becomes of a run (what it spent).

    Raises:
        RequestError: for a run that has gone on without this client's state, since another began meanwhile.
    """
    known = context.state.config_records.get(_RUN)
    if run is None or (known is not None and known["run"] == run):
        return
    before = [] if known is None else [*cast(list[str], known["before"]), str(known["run"])]
    if run in before:
        raise RequestError(
            "run: another run has begun on this node meanwhile, and what the client kept of this one is gone; start"
            " runs one after another, or each on a grid of its own"
        )
    left = {name: array for name, array in context.state.array_records.get(_STATE, {}).items() if name in stands}
    for key in (_STATE, _PENDING, _PENDING_ROUND):
        context.state.pop(key, None)
    if left:
        context.state[_STATE] = ArrayRecord(left)
    context.state[_RUN] = ConfigRecord({"run": run, "before": before[-_REMEMBERED:]})


def kept(context: Context, lengths: Mapping[str, int], dtype: torch.dtype, adopted: int | None) -> dict[str, Tensor]:
    """What the client keeps, ``[1, m]`` each, zeros at first.

    Args:
        context: where it is kept.
        lengths: name -> length.
        dtype: of what was never kept.
        adopted: the last round in which the server adopted what the client sent: what the client made in another one is
            forgotten. None where nothing is decided yet.
    """
    state = context.state
    if adopted is not None and _PENDING in state:
        if state.config_records[_PENDING_ROUND]["round"] == adopted:
            _add(context, state.array_records[_PENDING])
        del state[_PENDING], state[_PENDING_ROUND]
    held = tensors_of(state.array_records[_STATE]) if _STATE in state else {}
    return {
        name: (held[name] if name in held else torch.zeros(length, dtype=dtype))[None]
        for name, length in lengths.items()
    }


def keep(context: Context, fresh: Mapping[str, Tensor], round: int, waiting: Collection[str]) -> None:
    """Keeps what the round made, ``[1, m]`` each; what is ``waiting`` stands once the server has adopted the round."""
    now = {name: value[0] for name, value in fresh.items() if name not in waiting}
    later = {name: value[0] for name, value in fresh.items() if name in waiting}
    if now:
        _add(context, record_of(now))
    if later:
        context.state[_PENDING] = record_of(later)
        context.state[_PENDING_ROUND] = ConfigRecord({"round": round})


def _add(context: Context, arrays: ArrayRecord) -> None:
    stood = dict(context.state.array_records.get(_STATE, {}))
    context.state[_STATE] = ArrayRecord({**stood, **dict(arrays)})
