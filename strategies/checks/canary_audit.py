"""An audit of a run's privacy: does its noise hide one client as it claims?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from clients.errors import RequestError, RunError
from clients.recipe import Count
from strategies.auditing import Scores, audit, epsilon_lower_bound, provable
from strategies.checks.check import Check, CheckContext, Findings

Confidence = Annotated[float, Field(gt=0, lt=1)]


class CanaryAudit(Check):
    """Plays the run's strategy many times with and without a client that shouts, and tells them apart.

    From how well that goes follows a lower bound of epsilon, see :func:`strategies.auditing.epsilon_lower_bound`; a
    bound above the epsilon that the run claims shows that the noise, the clip or the accounting is wrong. A bound below
    shows that this attack found nothing: it is far from a proof, and so few canaries prove little more than epsilon
    ``provable`` of any mechanism. What it plays is the strategy alone, on short rows and without the run's training:
    about a millisecond a round, for twice as many runs as there are canaries.

    Args:
        canaries: runs that are played with the canary, and as many without.
        confidence: that the bound holds.
        rounds: rounds of each run that is played; left out, as many as the run had. The bound is held against what is
            claimed for so many.
    """

    def __init__(self, canaries: Count = 500, confidence: Confidence = 0.95, rounds: Count | None = None):
        if canaries < 4:
            raise RequestError(
                f"checks.canary_audit.canaries: {canaries} are too few to tell anything; give at least 4"
            )
        self.canaries, self.confidence, self.rounds = canaries, confidence, rounds

    def fits(self, strategy: Any) -> list[str]:
        if strategy.noised:
            return []
        return [
            "checks.canary_audit: the strategy adds no noise on the server, so there is no claim to test; leave the"
            " check out, or name the strategy dpfedavg"
        ]

    def run(self, ctx: CheckContext) -> Findings:
        """Metrics ``epsilon_lower_bound``, ``epsilon``, ``provable``, ``confidence`` and ``canaries``; the scores.

        Raises:
            RequestError: where the strategy has no central noise.
            RunError: where the bound exceeds what the run claims.
        """
        if problems := self.fits(ctx.strategy):
            raise RequestError(problems)
        told = ctx.strategy.guarantee(len(ctx.population.trainable), ctx.rounds)
        rounds = min(ctx.round, self.rounds or ctx.round)
        scores = audit(ctx.strategy, ctx, relation=told.relation, rounds=rounds, trials=self.canaries)
        bound = epsilon_lower_bound(scores.with_canary, scores.without, told.delta, self.confidence)
        claimed = told.spent(rounds)
        if bound > claimed:
            raise RunError(
                f"an attacker shows epsilon to be at least {bound:.4g} with confidence {self.confidence:g}, more than"
                f" the {claimed:.4g} that {rounds} rounds claim: the noise, the clip or the accounting is wrong"
            )
        metrics = {
            "epsilon_lower_bound": bound,
            "epsilon": claimed,
            "provable": provable(self.canaries, told.delta, self.confidence),
            "confidence": self.confidence,
            "canaries": float(self.canaries),
        }
        return metrics, {"scores": _table(scores)}, {"scores": _figure(scores, bound, claimed)}

    def __repr__(self) -> str:
        return f"CanaryAudit(canaries={self.canaries}, confidence={self.confidence}, rounds={self.rounds})"


def _table(scores: Scores) -> Sequence[Mapping[str, Any]]:
    pairs = zip(scores.with_canary.tolist(), scores.without.tolist(), strict=True)
    return [{"trial": trial, "with_canary": one, "without": other} for trial, (one, other) in enumerate(pairs)]


def _figure(scores: Scores, bound: float, claimed: float) -> Mapping[str, Any]:
    edges = np.histogram_bin_edges(np.concatenate([scores.with_canary, scores.without]), bins=40)
    bars = [
        {
            "type": "bar",
            "name": name,
            "x": ((edges[1:] + edges[:-1]) / 2).tolist(),
            "y": np.histogram(side, edges)[0].tolist(),
            "opacity": 0.6,
        }
        for name, side in (("with the canary", scores.with_canary), ("without", scores.without))
    ]
    return {
        "data": bars,
        "layout": {
            "barmode": "overlay",
            "title": {"text": f"Epsilon is at least {bound:.3g}, of {claimed:.3g} claimed"},
            "xaxis": {"title": {"text": "how far the weights moved the canary's way"}},
            "yaxis": {"title": {"text": "runs"}},
        },
    }
