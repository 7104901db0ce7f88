"""A strategy is a composition: sampling + correction + plug-ins + aggregator + server optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from clients import catalog
from clients.errors import FedsimError, RequestError, RunError
from clients.hooks import Correction
from clients.objects import wrong_settings
from clients.updates import Updates
from strategies.aggregation import Aggregator, Mean, weighted_sum
from strategies.clipping import clip, norms
from strategies.context import Context
from strategies.plugins import Plugin
from strategies.sampling import Fixed, Sampling
from strategies.server_optimizers import SGD, ServerOptimizer

if TYPE_CHECKING:
    from flwr.app import ArrayRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Result

    from strategies.client_hooks import ClientHooks
    from strategies.guarantees import Guarantee

State = dict[str, Any]
Info = dict[str, Any]


class Strategy:
    """How a server chooses clients, combines what they send, and moves the weights. A preset is a subclass.

    Args:
        sampling: who trains in a round; left out, a fixed cohort of 10.
        correction: what changes in the local loop.
        plugins: what happens to updates on their way, in order.
        aggregator: from rows (or their weighted sum) to one row.
        server_optimizer: what is done with the pseudo-gradient; left out, it is added as it is.

    Attributes:
        needs: of a preset as it is named: whether its rule needs the ``sum`` of the updates or all ``rows``.
        keeps: what state it keeps between rounds, and where.
        composes_with: what else may stand beside it.
        concurrency: how many clients train at the same time without waiting for one another, so that the server takes a
            step with every ``clients_per_round`` updates; None where rounds are synchronous.

    Raises:
        RequestError: for a part of the wrong kind, and for compositions that make no sense.
    """

    needs: ClassVar[Literal["sum", "rows"]] = "sum"
    keeps: ClassVar[str] = "nothing"
    composes_with: ClassVar[str] = "any sampling, correction, plug-ins, aggregator and server optimiser"
    concurrency: int | None = None

    def __init__(
        self,
        *,
        sampling: Sampling | None = None,
        correction: Correction | None = None,
        plugins: Sequence[Plugin] = (),
        aggregator: Aggregator | None = None,
        server_optimizer: ServerOptimizer | None = None,
    ):
        self.sampling = Fixed(clients_per_round=10) if sampling is None else sampling
        self.correction = Correction() if correction is None else correction
        self.plugins = tuple(plugins)
        self.aggregator = Mean() if aggregator is None else aggregator
        self.server_optimizer = SGD() if server_optimizer is None else server_optimizer
        self._refuse()

    def _refuse(self) -> None:
        kinds = {
            "sampling": Sampling,
            "correction": Correction,
            "aggregator": Aggregator,
            "server_optimizer": ServerOptimizer,
        }
        problems = [
            f"strategy.{name}: {getattr(self, name)!r} is no {kind.__name__}; derive it from strategies.{kind.__name__}"
            for name, kind in kinds.items()
            if not isinstance(getattr(self, name), kind)
        ]
        problems += [
            f"plugins: {plugin!r} is no Plugin; derive it from strategies.Plugin"
            for plugin in self.plugins
            if not isinstance(plugin, Plugin)
        ]
        if not problems:
            problems += [line for name in kinds for line in wrong_settings(getattr(self, name), f"strategy.{name}")]
            problems += [
                line for plugin in self.plugins for line in wrong_settings(plugin, f"plugins.{_named_as(plugin)}")
            ]
        if not problems and self.aggregator.needs not in ("sum", "rows"):
            problems.append(
                f'strategy.aggregator: {self.aggregator!r} needs {self.aggregator.needs!r}; say "sum" or "rows"'
            )
        if not problems and self.aggregator.needs == "rows":
            problems += [
                f"plugins: {plugin!r} adds the updates so that nobody sees one, but {self.aggregator!r} needs every"
                " row; use an aggregator that needs only the sum, such as mean"
                for plugin in self.plugins
                if plugin.owns_sum
            ]
        if not problems:
            problems += [*self.correction.fits(self), *self.aggregator.fits(self)]
            problems += [line for plugin in self.plugins for line in plugin.fits(self)]
        if problems:
            raise RequestError(list(dict.fromkeys(problems)))

    def with_parts(self, **parts: Any) -> Strategy:
        """The same composition with some parts replaced; a plain :class:`Strategy`."""
        mine = {name: getattr(self, name) for name in _PARTS}
        made = Strategy.__new__(Strategy)
        made.concurrency = self.concurrency  # known when the parts are held against one another
        Strategy.__init__(made, **{**mine, **{name: part for name, part in parts.items() if part is not None}})
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Strategy) and all(getattr(self, name) == getattr(other, name) for name in _TOLD)

    def __hash__(self) -> int:
        return hash(tuple(map(repr, (getattr(self, name) for name in _TOLD))))

    def __repr__(self) -> str:
        plain = Strategy.__new__(Strategy)
        Strategy.__init__(plain)
        said = [f"{name}={getattr(self, name)!r}" for name in _TOLD if getattr(self, name) != getattr(plain, name)]
        return f"{type(self).__name__}({', '.join(said)})"

    # State: one flat dict of tensors, "part/name" -> tensor, so that a checkpoint is a list of tensors.

    def init(self, ctx: Context) -> State:
        """The whole server state before the first round."""
        state = _under("aggregator", self.aggregator.init(ctx))
        state |= _under("server_optimizer", self.server_optimizer.init(ctx.weights))
        for name, size in self.correction.server_state.items():
            state[f"correction/{name}"] = torch.zeros(ctx.layout.length(size), dtype=ctx.layout.dtype)
        for place, plugin in self._named_plugins():
            state |= _under(place, plugin.init(self._inside(place, ctx)))
        return state

    def client_state(self, ctx: Context) -> dict[str, int]:
        """Name -> length of what every client keeps between rounds."""
        kept = {f"correction/{name}": ctx.layout.length(size) for name, size in self.correction.client_state.items()}
        for place, plugin in self._named_plugins():
            kept |= {f"{place}/{name}": ctx.layout.length(size) for name, size in plugin.client_state.items()}
        return kept

    def broadcast(self, state: State) -> State:
        """The part of the state that goes to the clients with the weights, and is billed."""
        read = tuple(
            f"{place}/" for place, plugin in self._named_plugins() if plugin.overrides("client", "server_each")
        )
        return {name: value for name, value in state.items() if name.startswith(("correction/", *read))}

    def down(self, state: State, ctx: Context) -> tuple[Tensor, int]:
        """What clients are sent in place of the weights ``[d]``, and its bytes."""
        row, size = ctx.weights, ctx.weights.nbytes
        for place, plugin in self._named_plugins():
            if plugin.overrides("down"):
                with _named(plugin, "down", ctx):
                    row, size = plugin.down(row, _of(place, state), self._inside(place, ctx))
        return row, size

    def bound(self, state: State) -> float | None:
        """The largest Euclidean norm that a row has as it is added, whatever was sent; None where there is none."""
        bounds = [plugin.bounded_by(_of(place, state)) for place, plugin in self._named_plugins()]
        return next((bound for bound in bounds if bound is not None), None)

    @property
    def stands(self) -> frozenset[str]:
        """The names of client state that is adopted even where the server keeps its weights."""
        return frozenset(f"{place}/{name}" for place, plugin in self._named_plugins() for name in plugin.stands)

    def guarantee(self, clients: int, rounds: int) -> Guarantee | None:
        """The differential privacy of a run over so many clients that can be trained, and so many rounds."""
        found = [plugin.guarantee(self, clients, rounds) for plugin in self.plugins]
        return next((guarantee for guarantee in found if guarantee is not None), None)

    # On a Flower grid.

    @property
    def client_hooks(self) -> ClientHooks:
        """Its half on the clients of a Flower app: ``clients.client_app(..., hooks=strategy)``."""
        from strategies.client_hooks import ClientHooks  # takes flwr, which takes a second

        return ClientHooks(self)

    def start(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, **options: Any) -> Result:
        """Runs by messages on a Flower grid, see :func:`strategies.flower.start`."""
        from strategies.flower import start

        return start(self, grid, initial_arrays, num_rounds, **options)

    # The worker's half.

    def contribute(
        self, u: Updates, state: State, kept: Mapping[str, Tensor], ctx: Context, receive: bool = True
    ) -> tuple[Updates, State]:
        """Prepares a chunk: weights, the client halves of the plug-ins, then (``receive``) what the server does on
        arrival.

        Returns:
            The updates as they enter the reduction, and the new client state of the plug-ins.
        """
        ctx = replace(ctx, strategy=self)
        with _named(self.aggregator, "prepare", ctx):
            u = self.aggregator.prepare(u, ctx)
        fresh: State = {}
        for place, plugin in self._named_plugins():
            mine = {name: kept[f"{place}/{name}"] for name in plugin.client_state}
            with _named(plugin, "client", ctx):
                u, after = plugin.client(u, {**_of(place, state), **mine}, self._inside(place, ctx))
                _same_width(u, ctx)
                fresh |= {f"{place}/{name}": after[name] for name in plugin.client_state}
        u = u.replace(nbytes=u.bill())
        return self.receive(u, state, ctx) if receive else u, fresh

    def receive(self, u: Updates, state: State, ctx: Context) -> Updates:
        """What the server does with each update on arrival; nothing where it sees only their sum.

        Under central noise, rows are held to their bound and weights to the largest at last, whatever was done before.
        """
        hidden = any(plugin.owns_sum for plugin in self.plugins)
        for place, plugin in reversed(self._named_plugins()):
            if plugin.overrides("server_each") and not (hidden and plugin.repeats):
                with _named(plugin, "server_each", ctx):
                    u = plugin.server_each(u, _of(place, state), self._inside(place, ctx))
                    _same_width(u, ctx)
        return self._held(u, state) if self.noised else u

    @property
    def noised(self) -> bool:
        """Whether the server adds noise, so that no client may count for more than its bound."""
        return any(plugin.noises for plugin in self.plugins)

    def _held(self, u: Updates, state: State) -> Updates:
        bound, most = self.bound(state), self.aggregator.largest_weight
        assert bound is not None
        if bool((norms(u.rows) > bound * (1 + 1e-6)).any()):
            u = u.replace(rows=clip(u.rows, bound))
        return u.replace(weights=u.weights.nan_to_num(nan=0.0).clamp(0.0, most))

    def reduce(self, u: Updates) -> Updates:
        """A chunk's weighted sum, for an aggregator that needs no more."""
        return weighted_sum(u)

    def nothing(self, ctx: Context) -> Updates:
        """The sum over no clients."""
        none, zero = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        total = torch.zeros(1, len(ctx.weights), dtype=torch.float64)
        return Updates(total, none, zero, zero, torch.zeros(1, dtype=torch.float64))

    # The server's half.

    def aggregate(self, u: Updates, state: State, ctx: Context) -> tuple[Tensor, State, Info]:
        """From the reduced updates to new weights ``[d]``, the new state, and the rule's per-client values."""
        ctx = replace(ctx, strategy=self)
        bound = self.bound(state)
        for place, plugin in self._named_plugins():
            if self.aggregator.needs == "sum" and plugin.overrides("server_sum"):
                with _named(plugin, "server_sum", ctx):
                    u = plugin.server_sum(u, _of(place, state), self._inside(place, ctx))
        with _named(self.aggregator, "combine", ctx):
            combined, after, info = self.aggregator.combine(u, _of("aggregator", state), ctx)
            if combined.shape != ctx.weights.shape:
                raise ValueError(f"gave a row of shape {list(combined.shape)}; give {list(ctx.weights.shape)}")
        state = {**_without("aggregator", state), **_under("aggregator", after)}
        total = u.replace(rows=combined[None].to(ctx.layout.dtype))
        if bound is not None and not self.aggregator.unbounded():
            ctx = replace(ctx, sensitivity=self.aggregator.sensitivity(bound, ctx))
        for place, plugin in self._named_plugins():
            with _named(plugin, "server_total", ctx):
                total, after = plugin.server_total(total, _of(place, state), self._inside(place, ctx))
            state = {**_without(place, state), **_under(place, after)}
        with _named(self.correction, "server", ctx):
            own = self.correction.server(u, _of("correction", state), ctx)
        state = {**_without("correction", state), **_under("correction", own)}
        with _named(self.server_optimizer, "step", ctx):
            row, after = self.server_optimizer.step(ctx.weights, total.rows[0], _of("server_optimizer", state))
        state = {**_without("server_optimizer", state), **_under("server_optimizer", after)}
        return row.to(ctx.layout.dtype), state, info

    def _inside(self, place: str, ctx: Context) -> Context:
        """The context as a plug-in sees it."""
        return replace(ctx, strategy=self, scope=f"{place}/")

    def _named_plugins(self) -> list[tuple[str, Plugin]]:
        return [(f"plugin/{i}-{type(plugin).__name__}", plugin) for i, plugin in enumerate(self.plugins)]


_PARTS = ("sampling", "correction", "plugins", "aggregator", "server_optimizer")
_TOLD = (*_PARTS, "concurrency")


@contextmanager
def _named(part: object, half: str, ctx: Context) -> Iterator[None]:
    """Says of an error in a part's own code which part it was, and in which round."""
    try:
        yield
    except FedsimError:
        raise
    except Exception as error:
        raise RunError(f"round {ctx.round}, {type(part).__name__}.{half}: {type(error).__name__}: {error}") from error


def _same_width(u: Updates, ctx: Context) -> None:
    if u.rows.shape[1:] != ctx.weights.shape:
        raise ValueError(f"gave rows of shape {list(u.rows.shape)}; give [k, {len(ctx.weights)}]")


def _named_as(part: object) -> str:
    """The name that a part goes by."""
    name = getattr(type(part), "name", "")
    return name if isinstance(name, str) and name else catalog.snake(type(part).__name__)


def _under(place: str, state: Mapping[str, Any]) -> State:
    """State as tensors under a prefix; plain numbers become float64 tensors, so that a resume gives the same types."""
    return {
        f"{place}/{name}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, value in state.items()
    }


def _of(place: str, state: Mapping[str, Any]) -> State:
    return {name[len(place) + 1 :]: value for name, value in state.items() if name.startswith(f"{place}/")}


def _without(place: str, state: Mapping[str, Any]) -> State:
    return {name: value for name, value in state.items() if not name.startswith(f"{place}/")}
