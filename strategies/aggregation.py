"""From rows, or their weighted sum, to one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clients.described import Described
from clients.errors import RequestError, RunError
from clients.recipe import Count, Recipe
from clients.updates import Updates
from strategies.context import Context

State = dict[str, Any]
_COLUMNS = 1 << 16


class Aggregator(Described):
    """The base of every rule. State is returned, never kept on ``self``; the engine checkpoints it.

    Attributes:
        needs: ``"sum"`` where the weighted sum of rows is enough (workers add, the server holds O(d)), ``"rows"`` where
            the rule looks at every client's row.
        min_rows: how many rows the rule needs; a smaller cohort keeps the weights, and that is recorded.
        needs_loss_before: whether clients send ``loss_before`` ``float64 [k]``, see :class:`clients.hooks.Correction`.
    """

    needs: Literal["sum", "rows"] = "sum"
    min_rows: int = 1
    needs_loss_before: bool = False

    @property
    def assumes(self) -> int | None:
        """How many malicious clients the rule assumes at most, where it goes by a number."""
        return getattr(self, "num_malicious", None)

    def check(self, recipe: Recipe) -> list[str]:
        """What of local training does not go with the rule, one line a key (``client.optimizer: ...``)."""
        return []

    def fits(self, strategy: Any) -> list[str]:
        """What of the strategy that it is part of does not go with the rule, one line a key."""
        return []

    def unbounded(self) -> str:
        """Why one client may move the result by any amount although its row is bounded; empty where it cannot, and
        :meth:`sensitivity` says how far."""
        return "how far one client moves the result is not known"

    @property
    def largest_weight(self) -> float:
        """What a client counts at most, where one client moves the result by so much and no more."""
        return 1.0

    def sensitivity(self, bound: float, ctx: Context) -> float:
        """How far adding or removing one client, whose row has at most that norm, moves the result."""
        raise NotImplementedError

    def init(self, ctx: Context) -> State:
        """The rule's first state: a dict of tensors."""
        return {}

    def prepare(self, u: Updates, ctx: Context) -> Updates:
        """In the worker: weights (default: training examples), row scaling, named statistics."""
        return u.replace(weights=u.examples.to(torch.float64))

    def combine(self, u: Updates, state: State, ctx: Context) -> tuple[Tensor, State, dict[str, Any]]:
        """The aggregate update ``[d]``, the new state, and per-client values for the record.

        Where ``needs == "sum"``, ``u.rows`` is the weighted sum ``float64 [1, d]``, ``u.weights`` ``[1]`` the total
        weight and each of ``u.sends`` a sum; else ``u`` is the cohort, ordered by client id.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Mean(Aggregator):
    """Weighted mean, sum_k n_k x_k / sum_k n_k (McMahan et al. 2017, "Communication-efficient learning", Algorithm 1).

    Over the clients sampled: with unequal n_k a ratio estimator of the mean over all clients, not an unbiased one.
    Divided by what is expected instead, sum_k w_k x_k / (q N w_max), it is unbiased, and one client moves it by at most
    its norm over q N, which privacy rests on (McMahan et al. 2018, "Learning differentially private recurrent language
    models", the estimator f_f).

    Args:
        weighting: ``examples`` weighs by training examples, ``uniform`` counts every client alike, ``capped`` weighs by
            training examples up to ``cap``.
        cap: examples beyond which a client counts no more.
        divisor: ``total``, the clients' total weight; or ``expected``, the expected number of clients times the largest
            weight, whoever takes part.
    """

    weighting: Literal["examples", "uniform", "capped"] = "examples"
    cap: Count | None = None
    divisor: Literal["total", "expected"] = "total"

    def __post_init__(self) -> None:
        if (self.weighting == "capped") != (self.cap is not None):
            raise RequestError(f'strategy.aggregator.cap: belongs to weighting = "capped", not {self.weighting!r}')
        if self.divisor == "expected" and self.weighting == "examples":
            raise RequestError(
                'strategy.aggregator.divisor: "expected" needs a largest weight; give weighting = "uniform" or "capped"'
            )

    @property
    def min_rows(self) -> int:  # type: ignore[override]
        return 1 if self.divisor == "total" else 0

    def unbounded(self) -> str:
        if self.weighting == "examples":
            return "weights by examples have no largest one"
        if self.divisor == "total":
            return "it divides by who took part, which each client changes"
        return ""

    @property
    def largest_weight(self) -> float:
        return float(self.cap or 1)

    def sensitivity(self, bound: float, ctx: Context) -> float:
        return bound / ctx.expected

    def prepare(self, u: Updates, ctx: Context) -> Updates:
        weighed = super().prepare(u, ctx)
        if self.weighting == "examples":
            return weighed
        if self.cap is not None:
            return weighed.replace(weights=weighed.weights.clamp(0, self.cap))
        return weighed.replace(weights=torch.ones_like(weighed.weights))

    def combine(self, u: Updates, state: State, ctx: Context) -> tuple[Tensor, State, dict[str, Any]]:
        if self.divisor == "expected":
            return u.rows[0] / (ctx.expected * (self.cap or 1)), state, {}
        return u.rows[0] / _positive(u.weights.sum()), state, {}


def mean(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean of rows, accumulated in float64 and rounded once.

    ``x_0 + sum_k w_k (x_k - x_0) / sum_k w_k``: equal rows give that very row.

    Args:
        rows: ``[n, d]``.
        weights: ``[n]``, not negative; left out, all count alike.

    Returns:
        ``[d]`` in the rows' dtype.

    Raises:
        RunError: for no rows, another number of weights, a negative or not finite weight, or a total weight of zero.
    """
    if rows.dim() != 2 or not len(rows):
        raise RunError(f"mean: needs rows [n, d] with n above 0, not {list(rows.shape)}")
    w = torch.ones(len(rows), dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if w.shape != (len(rows),):
        raise RunError(f"mean: {list(w.shape)} weights do not fit {len(rows)} rows")
    if not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
        raise RunError("mean: weights must be finite and not negative")
    share = w / _positive(w.sum())
    result = torch.empty_like(rows[0])
    for start in range(0, rows.shape[1], _COLUMNS):
        block = rows[:, start : start + _COLUMNS].to(torch.float64)
        moved = ((block - block[0]) * share[:, None]).sum(0)
        result[start : start + _COLUMNS] = block[0] + moved
    return result


def weighted_sum(u: Updates) -> Updates:
    """The reduction of sum mode: a block of clients as one row, added in client order, in float64."""
    total = torch.zeros(1, u.rows.shape[1], dtype=torch.float64)
    for row, weight in zip(u.rows, u.weights.tolist(), strict=True):
        total[0].add_(row, alpha=weight)
    return Updates(
        rows=total,
        clients=u.clients,
        examples=u.examples.sum(0, keepdim=True),
        steps=u.steps.sum(0, keepdim=True),
        weights=u.weights.sum(0, keepdim=True),
        sends={name: value.to(torch.float64).sum(0, keepdim=True) for name, value in u.sends.items()},
    )


def add_sums(total: Updates | None, part: Updates) -> Updates:
    """Adds a chunk's sum to the total, in place; the order of the calls is the order of addition."""
    if total is None:
        return part.replace(rows=part.rows.clone(), sends={name: value.clone() for name, value in part.sends.items()})
    total.rows.add_(part.rows)
    return total.replace(
        clients=torch.cat([total.clients, part.clients]),
        examples=total.examples + part.examples,
        steps=total.steps + part.steps,
        weights=total.weights + part.weights,
        sends={name: value + part.sends[name] for name, value in total.sends.items()},
    )


def _positive(total: Tensor) -> Tensor:
    if not float(total) > 0:
        raise RunError("aggregation: the clients' total weight is zero, so there is no mean")
    return total
