"""Robust rules as aggregators: each is its function on rows, with what the record tells of every client.

``kept`` is 1 for clients whose rows a rule chose and 0 for the others, ``share`` how much of a client's row is in the
result. Clients count alike whatever number of examples they report, unless a rule says otherwise. ``num_malicious`` is
what the rule assumes; a cohort too small for it keeps the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from clients.errors import RequestError
from clients.recipe import Count, Positive
from clients.updates import Updates
from strategies import centres, coordinates, selection
from strategies.aggregation import Aggregator
from strategies.context import Context

State = dict[str, Any]
Combined = tuple[Tensor, State, dict[str, Any]]

#: How many malicious clients a rule assumes.
Malicious = Annotated[int, Field(ge=0)]
WeighBy = Literal["examples", "uniform"]


class _Rule(Aggregator):
    """Needs every row, and counts clients alike."""

    needs = "rows"
    weigh_by: WeighBy = "uniform"

    def prepare(self, u: Updates, ctx: Context) -> Updates:
        return super().prepare(u, ctx) if self.weigh_by == "examples" else u.replace(weights=torch.ones_like(u.weights))


@dataclass(frozen=True)
class MedianRule(_Rule):
    """Coordinate-wise median (Yin et al. 2018).

    See :func:`strategies.median`. No state; any cohort.
    """

    name = "median"

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        return coordinates.median(u.rows), state, {}


@dataclass(frozen=True)
class TrimmedMeanRule(_Rule):
    """Coordinate-wise mean without f values at either end (Yin et al. 2018).

    See :func:`strategies.trimmed_mean`. No state; needs n > 2f.

    Args:
        num_malicious: f.
    """

    name = "trimmed_mean"

    num_malicious: Malicious = 1

    @property
    def min_rows(self) -> int:  # type: ignore[override]
        return 2 * self.num_malicious + 1

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        return coordinates.trimmed_mean(u.rows, self.num_malicious), state, {}


@dataclass(frozen=True)
class KrumRule(_Rule):
    """The row with the nearest neighbours (Blanchard et al. 2017).

    See :func:`strategies.krum`. No state; needs n >= 2f + 3. Records ``kept``.

    Args:
        num_malicious: f.
    """

    name = "krum"

    num_malicious: Malicious = 1

    @property
    def min_rows(self) -> int:  # type: ignore[override]
        return 2 * self.num_malicious + 3

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        row, kept = selection.krum_selection(u.rows, self.num_malicious)
        return row, state, {"kept": kept.to(torch.int64)}


@dataclass(frozen=True)
class MultiKrumRule(_Rule):
    """The mean of the rows with the best Krum scores (Blanchard et al. 2017).

    See :func:`strategies.multi_krum`. No state; needs n >= 2f + 3 and n >= m + f. Records ``kept``.

    Args:
        num_malicious: f.
        num_selected: m; left out, n - f.
    """

    name = "multi_krum"

    num_malicious: Malicious = 1
    num_selected: Count | None = None

    @property
    def min_rows(self) -> int:  # type: ignore[override]
        return max(2 * self.num_malicious + 3, (self.num_selected or 0) + self.num_malicious)

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        row, kept = selection.multi_krum_selection(u.rows, self.num_malicious, self.num_selected)
        return row, state, {"kept": kept.to(torch.int64)}


@dataclass(frozen=True)
class BulyanRule(_Rule):
    """Krum again and again, then a mean around the median (El Mhamdi et al. 2018).

    See :func:`strategies.bulyan`. No state; needs n >= 4f + 3. Records ``kept``: who is in the second half.

    Args:
        num_malicious: f.
    """

    name = "bulyan"

    num_malicious: Malicious = 1

    @property
    def min_rows(self) -> int:  # type: ignore[override]
        return 4 * self.num_malicious + 3

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        row, kept = selection.bulyan_selection(u.rows, self.num_malicious)
        return row, state, {"kept": kept.to(torch.int64)}


@dataclass(frozen=True)
class GeometricMedianRule(_Rule):
    """The point with the least sum of distances (Pillutla et al. 2022).

    See :func:`strategies.geometric_median`. No state; any cohort. Records ``share``.

    Args:
        weigh_by: ``examples`` as in the paper, where a client that reports many counts for many; or ``uniform``.
    """

    name = "geometric_median"

    weigh_by: WeighBy = "examples"

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        row, shares = centres.geometric_median_shares(u.rows, u.weights)
        return row, state, {"share": shares}


@dataclass(frozen=True)
class CenteredClippingRule(_Rule):
    """A mean of rows clipped around the last round's result (Karimireddy et al. 2021).

    See :func:`strategies.centered_clipping`. Its state is that result, ``center`` ``[d]``, zero at first. The paper's
    guarantee is for workers that send momentum; plain updates move the center more slowly than they drift apart. Any
    cohort. Records ``share``: how much of the client's difference to the center is in the result.

    Args:
        radius: tau; left out, the median distance to the center.
        iterations: how many in a round.
    """

    name = "centered_clipping"

    radius: Positive | None = None
    iterations: Count = 1

    def init(self, ctx: Context) -> State:
        return {"center": torch.zeros_like(ctx.weights)}

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        row, shares = centres.centered_clipping_shares(u.rows, state["center"], self.radius, iterations=self.iterations)
        return row, {"center": row.to(ctx.layout.dtype)}, {"share": shares}


@dataclass(frozen=True)
class NormBoundingRule(_Rule):
    """A mean of updates of bounded norm (Sun et al. 2019).

    See :func:`strategies.norm_bounding`. No state; any cohort. Records ``share``.

    Args:
        radius: M; left out, the median norm of the round's updates.
        weigh_by: ``uniform``, so that each client moves the result by at most M / n; or ``examples``.
    """

    name = "norm_bounding"

    radius: Positive | None = None
    weigh_by: WeighBy = "uniform"

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        row, shares = centres.norm_bounding_shares(u.rows, self.radius, u.weights)
        return row, state, {"share": shares}


@dataclass(frozen=True)
class FLTrustRule(_Rule):
    """A mean weighted by the agreement with an update of the server's own (Cao et al. 2021).

    See :func:`strategies.fltrust`. The server trains the global weights on its ``root`` split by the clients' recipe,
    every round. No state; any cohort. Records ``share``: the normalised trust.
    """

    name = "fltrust"

    def init(self, ctx: Context) -> State:
        if ctx.server is not None:
            try:
                ctx.data("root")
            except KeyError:
                raise RequestError("data.root: FLTrust trains on examples of the server's own; set data.root") from None
        return {}

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        root = ctx.train(ctx.weights, "root") - ctx.weights
        row, trust = centres.fltrust_shares(u.rows, root)
        return row, state, {"share": trust}


@dataclass(frozen=True)
class DnCRule(_Rule):
    """Drops what lies farthest along the main direction (Shejwalkar and Houmansadr 2021).

    See :func:`strategies.dnc`. No state; needs n > 2f, and more rows than an iteration drops. Coordinates are drawn
    anew every round. Records ``kept``.

    Args:
        num_malicious: f.
        iterations: the paper's niters.
        columns: how many coordinates an iteration looks at, the paper's b.
        fraction: an iteration drops fraction * f rows, the paper's c.
    """

    name = "dnc"

    num_malicious: Malicious = 1
    iterations: Count = 5
    columns: Count = 10_000
    fraction: Positive = 1.0

    @property
    def min_rows(self) -> int:  # type: ignore[override]
        return max(2 * self.num_malicious, selection.dropped(self.num_malicious, self.fraction)) + 1

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        row, kept = selection.dnc_selection(
            u.rows,
            self.num_malicious,
            ctx.generator("dnc"),
            iterations=self.iterations,
            columns=self.columns,
            fraction=self.fraction,
        )
        return row, state, {"kept": kept.to(torch.int64)}


@dataclass(frozen=True)
class SignMajorityRule(_Rule):
    """Each client votes with the signs of its update (Bernstein et al. 2019).

    See :func:`strategies.sign_majority`. No state; any cohort. The signs are taken where the rows arrive, so that an
    attacker has one vote whatever it sends. The result is -1, 0 or 1: give the server a learning rate.
    """

    name = "sign_majority"

    def combine(self, u: Updates, state: State, ctx: Context) -> Combined:
        return coordinates.sign_majority(u.rows), state, {}
