"""A strategy's half on a client of a Flower app: the local loop's correction, and what leaves of an update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clients.errors import RequestError, RunError
from clients.hooks import Correction
from clients.messages import ROUNDS, Circumstances
from clients.recipe import Recipe
from clients.recipe_conflicts import TWO_PROXIMAL_TERMS, beside_noise
from clients.task import Classification
from clients.training import NOT_USABLE, usable_rows
from clients.updates import Updates
from clients.weights import Layout, Slot
from strategies.codecs import Codec, Generators, Groups
from strategies.composition import Composition
from strategies.context import Context
from strategies.corrections import Prox

#: Names of what a client sends: its update, or a codec's payload of it; what it sends beside; numbers about it.
UPDATE, PAYLOAD, SEND = "update", "payload/", "send/"
STEPS, WEIGHT = "steps", "weight"

#: For a strategy without rounds.
NO_ROUNDS = (
    "strategy: it takes a step whenever some clients have answered, and Flower's rounds wait for all; use"
    " fedsim.run, or a strategy with rounds"
)

#: What the server tells clients beside: the cohort among what is broadcast, and how many clients there are and can
#: be trained.
COHORT, CLIENTS, TRAINABLE = "cohort", "fedsim-clients", "fedsim-trainable"


@dataclass(frozen=True)
class _Everybody:
    """The population as a client knows it: how many there are, and how many of them can be trained."""

    clients: int
    able: int

    @property
    def trainable(self) -> np.ndarray:
        return np.arange(self.able)

    @property
    def examples(self) -> np.ndarray:
        raise RunError("population.examples: how many examples others hold is the server's to know, not a client's")


class ClientHooks:
    """A strategy's half on a client, see :class:`clients.messages.Hooks`.

    Args:
        strategy: its sampling may differ from the server's; its correction, plug-ins and aggregator may not.
    """

    def __init__(self, strategy: Composition):
        if strategy.concurrency is not None:
            raise RequestError(NO_ROUNDS)
        self.strategy = strategy

    @property
    def correction(self) -> Correction:
        return self.strategy.correction

    @property
    def loss_before(self) -> bool:
        return self.strategy.aggregator.needs_loss_before or self.strategy.correction.needs_loss_before

    @property
    def told(self) -> str:
        return told(self.strategy)

    @property
    def alone(self) -> bool:
        correction = self.strategy.correction
        bound = correction.client_state or correction.server_state or type(correction).finish is not Correction.finish
        return not (bound or self.loss_before or any(p.overrides("client") for p in self.strategy.plugins))

    @property
    def plain(self) -> bool:
        return self.alone and type(self.strategy.correction) is Correction and self.weighs_only

    @property
    def weighs_only(self) -> bool:
        """Whether the rule makes nothing of an update but its weight, and of what a server knows as well."""
        return _weighs_only(self.strategy)

    @property
    def discreet(self) -> bool:
        return self.local_noise or hides(self.strategy)

    @property
    def local_noise(self) -> bool:
        return any(plugin.overrides("guarantee") and not plugin.noises for plugin in self.strategy.plugins)

    @property
    def stands(self) -> frozenset[str]:
        return self.strategy.stands

    def check(self, recipe: Recipe) -> list[str]:
        problems = [*self.strategy.correction.check(recipe), *self.strategy.aggregator.check(recipe)]
        if isinstance(self.strategy.correction, Prox) and recipe.regularization.proximal:
            problems.append(TWO_PROXIMAL_TERMS)
        if any(plugin.overrides("guarantee") for plugin in self.strategy.plugins):
            problems += beside_noise(recipe)
        return problems

    def client_state(self, layout: Layout) -> dict[str, int]:
        nothing = Context(0, layout, torch.empty(0), _Everybody(0, 0), Classification(), strategy=self.strategy)
        return self.strategy.client_state(nothing)

    def contribute(
        self, u: Updates, state: Mapping[str, Tensor], kept: Mapping[str, Tensor], here: Circumstances
    ) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor]]:
        """Prepares one client's update and runs the client halves of the plug-ins.

        What leaves is the payload of the last codec, where what that made of the update is what is sent; else the row.
        """
        heard: list[_Heard] = []
        strategy = _overheard(self.strategy, heard)
        ctx = Context(
            here.round,
            here.layout,
            here.weights,
            _Everybody(int(here.config[CLIENTS]), int(here.config[TRAINABLE])),
            here.task,
            here.seed,
            recipe=here.recipe,
            rounds=int(here.config[ROUNDS]),
            cohort=state.get(COHORT),
            strategy=strategy,
        )
        u, fresh = strategy.contribute(u, {n: v for n, v in state.items() if n != COHORT}, kept, ctx, receive=False)
        if not bool(usable_rows(u.rows).all()):
            raise RunError(f"round {here.round}, client {int(u.clients)}, plugins: {NOT_USABLE}")
        last = heard[-1] if heard else None
        if last is not None and torch.equal(last.row, u.rows[0]):
            arrays = {f"{PAYLOAD}{last.place}": torch.from_numpy(np.frombuffer(last.payload, np.uint8).copy())}
        else:
            arrays = {UPDATE: in_words(u.rows[0]) if hides(self.strategy) else u.rows[0]}
        arrays |= {f"{SEND}{name}": value[0] for name, value in u.sends.items()}
        told_beside = {"epsilon"} if self.discreet else set(u.report)
        numbers = {name: value[0].item() for name, value in u.report.items() if name in told_beside}
        return arrays, {**numbers, STEPS: int(u.steps), WEIGHT: float(u.weights)}, fresh


class _Heard(NamedTuple):
    """What a codec sent: in which place of the strategy it stands, the payload, and the row ``[d]`` that it means."""

    place: str
    payload: bytes
    row: Tensor


def _overheard(strategy: Composition, heard: list[_Heard]) -> Composition:
    """The same strategy, whose codecs leave their payloads in a list."""
    plugins = list(strategy.plugins)
    for place, codec in codecs(strategy).items():
        at = int(place)
        listening = copy.copy(codec)
        object.__setattr__(listening, "transmit", _transmitter(codec, place, heard))
        if plugins[at] is codec:
            plugins[at] = listening
        else:
            around = copy.copy(plugins[at])
            object.__setattr__(around, "codec", listening)
            plugins[at] = around
    made = copy.copy(strategy)
    made.plugins = tuple(plugins)
    return made


def codecs(strategy: Composition) -> dict[str, Codec]:
    """Place among the plug-ins -> the codec that clients encode with there."""
    found = {}
    for place, plugin in enumerate(strategy.plugins):
        codec = plugin if isinstance(plugin, Codec) else getattr(plugin, "codec", None)
        if isinstance(codec, Codec) and plugin.overrides("client"):
            found[str(place)] = codec
    return found


def _transmitter(codec: Codec, place: str, heard: list[_Heard]) -> Callable[..., tuple[Tensor, Tensor]]:
    def transmit(rows: Tensor, generators: Generators, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        arrived, nbytes = codec.transmit(rows, generators, groups)
        again = torch.Generator().manual_seed(generators[0].initial_seed())
        payload = codec.encode(rows[0], again, *_beside(codec, groups))
        if torch.equal(decoded(codec, payload, rows.shape[1], groups).to(rows.dtype), arrived[0]):
            heard.append(_Heard(place, payload, arrived[0]))
        return arrived, nbytes

    return transmit


def decoded(codec: Codec, payload: bytes, size: int, groups: Groups | None) -> Tensor:
    """The row ``[size]`` that a payload stands for, whose named tensors lie in these slices."""
    return codec.decode(payload, size, *_beside(codec, groups))


def _beside(codec: Codec, groups: Groups | None) -> tuple[Groups, ...]:
    return (groups,) if codec.by_tensor and groups is not None else ()


def told(strategy: Composition) -> str:
    """What server and client must have in common, in words."""
    parts = ("correction", "plugins", "aggregator")
    return f"Strategy({', '.join(f'{name}={getattr(strategy, name)!r}' for name in parts)})"


def _weighs_only(strategy: Composition) -> bool:
    """Whether the rule's ``prepare`` makes nothing of an update but its weight, which a server can do as well."""
    layout = Layout.of((Slot("weight", (2,), torch.float32, 0),), torch.float32)
    one = torch.ones(1, dtype=torch.int64)
    u = Updates(torch.tensor([[1.0, -2.0]]), 0 * one, 3 * one, 2 * one, one.to(torch.float64))
    ctx = Context(1, layout, torch.zeros(2), _Everybody(1, 1), Classification(), rounds=1, strategy=strategy)
    try:
        prepared = strategy.aggregator.prepare(u, ctx)
    except Exception:  # it asks for what is not known before clients train
        return False
    return not prepared.sends and torch.equal(prepared.rows, u.rows)


def hides(strategy: Composition) -> bool:
    """Whether rows are words of 32 bits, that mean nothing until they are added."""
    return any(plugin.owns_sum for plugin in strategy.plugins)


def in_words(row: Tensor) -> Tensor:
    """Whole numbers in ``[0, 2^32)`` as ``uint32``, half of what they take as ``float64``; other rows as they are."""
    words = row.to(torch.int64)
    fit = bool((words == row).all()) and int(words.min()) >= 0 and int(words.max()) < 1 << 32
    return torch.from_numpy(words.numpy().astype(np.uint32)) if fit else row
