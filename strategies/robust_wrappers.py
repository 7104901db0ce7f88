"""Aggregators in front of another: bucketing and nearest-neighbour mixing."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clients import catalog
from clients.errors import RequestError
from clients.recipe import Count, Recipe
from clients.updates import Updates
from strategies import mixing
from strategies.aggregation import Aggregator, weighted_sum
from strategies.context import Context
from strategies.robust import Combined, Malicious, State


class _Wrapper(Aggregator):
    """Hands changed rows on to a rule, whose state, weights and needs are its own."""

    needs = "rows"
    inner: Any

    def __post_init__(self, base: Path | None) -> None:
        object.__setattr__(self, "inner", _built(self.inner, base))

    @property
    def assumes(self) -> int | None:
        return self.inner.assumes

    @property
    def needs_loss_before(self) -> bool:  # type: ignore[override]
        return self.inner.needs_loss_before

    def check(self, recipe: Recipe) -> list[str]:
        return self.inner.check(recipe)

    def fits(self, strategy: Any) -> list[str]:
        return self.inner.fits(strategy)

    def init(self, ctx: Context) -> State:
        return self.inner.init(ctx)

    def prepare(self, u: Updates, ctx: Context) -> Updates:
        return self.inner.prepare(u, ctx)

    def _handed_on(self, u: Updates, state: State, ctx: Context) -> Combined:
        return self.inner.combine(weighted_sum(u) if self.inner.needs == "sum" else u, state, ctx)


@dataclass(frozen=True)
class Bucketing(_Wrapper):
    """A rule on the means of random buckets of clients (Karimireddy et al. 2022).

    See :func:`strategies.bucketing`.

    Buckets are drawn anew every round; within one, clients count by the rule's own weights. To the rule a bucket is a
    client, numbered from 0; what it tells of a bucket is recorded for all in it, and a ``share`` is divided among them.
    State and f are the rule's: with s to a bucket it must tolerate f of ceil(n / s).

    Args:
        inner: the rule: its name, a table with its name and settings, or an aggregator.
        size: s, clients to a bucket; 1 is the rule itself.
    """

    inner: Any
    size: Count = 2
    base: InitVar[Path | None] = None

    @property
    def min_rows(self) -> int:  # type: ignore[override]
        return (self.inner.min_rows - 1) * self.size + 1

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        groups = mixing.buckets(len(u), self.size, ctx.generator("bucketing"))
        place = torch.empty(len(u), dtype=torch.int64)
        for number, group in enumerate(groups):
            place[group] = number

        def added(values: Tensor) -> Tensor:
            return torch.zeros((len(groups), *values.shape[1:]), dtype=values.dtype).index_add_(0, place, values)

        bucketed = Updates(
            rows=mixing.bucketing(u.rows, self.size, ctx.generator("bucketing"), u.weights),
            clients=torch.arange(len(groups)),
            examples=added(u.examples),
            steps=added(u.steps),
            weights=added(u.weights),
            sends={name: added(value) for name, value in u.sends.items()},
        )
        row, state, info = self._handed_on(bucketed, state, ctx)
        told = {name: torch.as_tensor(values)[place] for name, values in info.items()}
        if "share" in told:
            # A client's part in its bucket's mean; a bucket without weight is refused by the mean.
            told["share"] = told["share"] * u.weights / bucketed.weights[place]
        return row, state, told


@dataclass(frozen=True)
class NearestNeighborMixing(_Wrapper):
    """A rule on rows that are each averaged with their n - f - 1 nearest (Allouah et al. 2023).

    See :func:`strategies.nearest_neighbor_mixing`. State is the rule's; needs n > 2f and what the rule needs. What the
    rule tells of a client is about its mixed row.

    Args:
        inner: the rule: its name, a table with its name and settings, or an aggregator.
        num_malicious: f; left out, the rule's own, or 1 where it has none.
    """

    inner: Any
    num_malicious: Malicious | None = None
    base: InitVar[Path | None] = None

    @property
    def _f(self) -> int:
        return getattr(self.inner, "num_malicious", 1) if self.num_malicious is None else self.num_malicious

    @property
    def min_rows(self) -> int:  # type: ignore[override]
        return max(2 * self._f + 1, self.inner.min_rows)

    @property
    def assumes(self) -> int | None:
        return self._f

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        mixed = mixing.nearest_neighbor_mixing(u.rows, self._f)
        return self._handed_on(u.replace(rows=mixed), state, ctx)


def _built(inner: Any, base: Path | None) -> Aggregator:
    """The rule behind a wrapper, from what stands for a part."""
    key = "strategy.aggregator.inner"
    if isinstance(inner, Aggregator):
        return inner
    made = catalog.build_inner(inner, "aggregators", base, key=key)
    if not isinstance(made, Aggregator):
        raise RequestError(f"{key}: {made!r} is no Aggregator; derive it from strategies.Aggregator")
    return made
