"""How much privacy an attacker can show to be gone: a lower bound of epsilon from the releases themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from clients.errors import RequestError
from clients.updates import Updates
from clients.weights import Layout
from strategies.accounting import Relation
from strategies.context import Context
from strategies.strategy import State, Strategy

#: Length of the rows that are played.
_SIZE = 64
#: What the canary sends, in clipping norms: more than it may, so that a clip that does not work shows.
_SHOUT = 10.0


def epsilon_lower_bound(
    with_canary: Sequence[float] | np.ndarray,
    without: Sequence[float] | np.ndarray,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """The least epsilon that the scores are consistent with.

    If a mechanism is (epsilon, delta)-private, every event E has ``P[E | D] <= e^epsilon P[E | D'] + delta`` for
    neighbours D and D', in both directions, and so has its complement. E is "the score reaches a threshold". The first
    half of each sample chooses threshold and direction; the second half bounds both probabilities (Clopper and Pearson
    1934), each with a chance of ``(1 - confidence) / 2`` to be wrong:

        epsilon >= max(ln((p - delta) / q), ln((1 - q - delta) / (1 - p)))

    with p at least and q at most the chance of the score to reach the threshold with the canary, and without
    (Jagielski, Ullman and Oprea 2020, "Auditing differentially private machine learning"; with delta, Nasr et al. 2021,
    "Adversary instantiation"). A mechanism that is (epsilon, delta)-private gives more than its epsilon in at most a
    share of ``1 - confidence`` of all audits whose trials are independent. How far below the truth the bound stays is
    not said, and n scores prove no more than :func:`provable`.

    Args:
        with_canary: ``[n]`` scores of independent trials with the canary.
        without: ``[m]`` scores of as many or as few without it.
        delta: of (epsilon, delta).
        confidence: in (0, 1).

    Returns:
        0 where nothing is proven.

    Raises:
        RequestError: for fewer than 2 scores on a side, scores that are not finite, and nonsense.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (with_canary, without)]
    for name, side in zip(("with_canary", "without"), sides, strict=True):
        if side.ndim != 1 or len(side) < 2 or not np.isfinite(side).all():
            raise RequestError(f"{name}: {side.shape} scores; give a list of at least 2 finite numbers")
    _within(delta, "delta", 0 <= delta < 1)
    _within(confidence, "confidence", 0 < confidence < 1)
    chosen_p, chosen_q = (side[: len(side) // 2] for side in sides)
    held_p, held_q = (side[len(side) // 2 :] for side in sides)
    thresholds = np.unique(np.concatenate([chosen_p, chosen_q]))
    told = [
        _proven(_reach(p, thresholds), _reach(q, thresholds), delta, confidence) for p, q in _ways(chosen_p, chosen_q)
    ]
    way, place = np.unravel_index(np.argmax(told), (2, len(thresholds)))
    p, q = _ways(held_p, held_q)[way]
    at = thresholds[place : place + 1]
    return float(max(0.0, _proven(_reach(p, at), _reach(q, at), delta, confidence)[0]))


def provable(trials: int, delta: float, confidence: float = 0.95) -> float:
    """What so many scores on each side prove at most: those of a mechanism that gives every canary away."""
    apart = np.ones(trials), np.zeros(trials)
    return epsilon_lower_bound(*apart, delta, confidence)


def _ways(p: np.ndarray, q: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    return (p, q), (q, p)


def _reach(scores: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, int]:
    """How many scores reach each threshold, of how many."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left"), len(scores)


def _proven(more: tuple[np.ndarray, int], fewer: tuple[np.ndarray, int], delta: float, confidence: float) -> np.ndarray:
    """The bound at each threshold where ``more`` scores reach it on one side and ``fewer`` on the other."""
    from scipy.stats import beta

    wrong = (1 - confidence) / 2
    (k, n), (j, m) = more, fewer
    p = np.where(k > 0, beta.ppf(wrong, np.maximum(k, 1), n - k + 1), 0.0)
    q = np.where(j < m, beta.ppf(1 - wrong, j + 1, np.maximum(m - j, 1)), 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        reached, missed = np.log(np.maximum(p - delta, 0) / q), np.log(np.maximum(1 - q - delta, 0) / (1 - p))
    return np.maximum(reached, missed)


@dataclass(frozen=True)
class Scores:
    """What an audit's attacker saw.

    Attributes:
        with_canary: ``[n]``, one score a trial in which the canary took part whenever it was sampled.
        without: ``[n]``, of other trials in which it did not (or, under ``replace one``, sent the opposite).
    """

    with_canary: np.ndarray
    without: np.ndarray


def audit(strategy: Strategy, ctx: Context, *, relation: Relation, rounds: int, trials: int) -> Scores:
    """Plays a strategy with and without one client, and scores how much it shows in what is released.

    A trial is a whole run of the strategy's own sampling, plug-ins, rule, noise and server optimiser, on rows of 64
    coordinates. Everybody sends zeros but the canary, which sends a random direction of its trial (Andrew et al. 2023,
    "One-shot empirical privacy estimation for federated learning") of ten times the clipping norm: the strategy has to
    clip. The attacker knows the direction. Its score is how far the server's weights moved that way, each round's move
    counted in units of what one client may move it by, added up over rounds. Without the canary its client sends zeros,
    which a fixed divisor cannot tell from nobody; under ``replace one`` it sends the opposite.

    Args:
        strategy: one that clips and adds central noise.
        ctx: the seed, the population (how many can be trained), the task, how many rounds noise is planned for.
        relation: which neighbours the guarantee speaks of.
        rounds: rounds a trial.
        trials: how many with the canary, and as many without.
    """
    opposite = -1.0 if relation == "replace one" else 0.0
    # A draw for each trial and side, so that no two trials share their cohorts or noise.
    seeds = torch.randint(2**62, (2, trials), generator=ctx.generator("audit"))
    scores = []
    for side, sent in enumerate((1.0, opposite)):
        found = []
        for trial in range(trials):
            drawn = torch.randn(_SIZE, generator=ctx.generator("canary", side * trials + trial), dtype=torch.float64)
            direction = (drawn / torch.linalg.vector_norm(drawn)).to(ctx.layout.dtype)
            found.append(_trial(strategy, ctx, int(seeds[side, trial]), rounds, direction, sent))
        scores.append(np.array(found))
    return Scores(*scores)


@dataclass(frozen=True)
class _People:
    """A population in which all can be trained; client 0 is the canary, which counts as much as anyone can."""

    clients: int

    @property
    def trainable(self) -> np.ndarray:
        return np.arange(self.clients)

    @property
    def examples(self) -> np.ndarray:
        return np.array([1 << 30, *[1] * (self.clients - 1)])


def _trial(strategy: Strategy, ctx: Context, seed: int, rounds: int, direction: Tensor, sent: float) -> float:
    """The score of one run."""
    people = _People(len(ctx.population.trainable))
    weights = torch.zeros(_SIZE, dtype=ctx.layout.dtype)
    layout = Layout(nn.Linear(_SIZE, 1, bias=False).to(ctx.layout.dtype))
    # The rounds that the run has, since a budget is for all of them.
    run = Context(0, layout, weights, people, ctx.task, seed, recipe=ctx.recipe, rounds=ctx.rounds, strategy=strategy)
    state = strategy.init(run)
    kept = {
        name: torch.zeros(people.clients, size, dtype=weights.dtype)
        for name, size in strategy.client_state(run).items()
    }
    score = 0.0
    for number in range(1, rounds + 1):
        run = replace(run, round=number, weights=weights)
        cohort = torch.from_numpy(strategy.sampling.cohort(run))
        run = replace(run, cohort=cohort)
        bound = _bound(strategy, state)
        u = _round(strategy, run, state, kept, cohort, sent * _SHOUT * bound * direction)
        after, state, _ = strategy.aggregate(u, state, run)
        moved = float((after - weights).double() @ direction.double())
        score += moved / strategy.aggregator.sensitivity(bound, run)
        weights = after
    return score


def _bound(strategy: Strategy, state: State) -> float:
    """The clipping norm as it stands."""
    found = strategy.bound(state)
    if found is None:
        raise RequestError("strategy: nothing clips what clients send, so there is no noise to audit; use dpfedavg")
    return found


def _round(
    strategy: Strategy, run: Context, state: State, kept: dict[str, Tensor], cohort: Tensor, canary: Tensor
) -> Updates:
    """What the server gets of a cohort."""
    if not len(cohort):
        return strategy.nothing(run)
    rows = torch.zeros(len(cohort), _SIZE, dtype=canary.dtype)
    rows[cohort == 0] = canary
    one = torch.ones(len(cohort), dtype=torch.int64)
    examples = torch.where(cohort == 0, 1 << 30, one)
    u = Updates(rows, cohort, examples, one, one.to(torch.float64))
    mine = {name: value[cohort] for name, value in kept.items()}
    u, fresh = strategy.contribute(u, strategy.broadcast(state), mine, run)
    for name, value in fresh.items():
        kept[name][cohort] = value.to(kept[name].dtype)
    return strategy.reduce(u) if strategy.aggregator.needs == "sum" else u


def _within(value: float, name: str, holds: bool) -> None:
    if not holds:
        raise RequestError(f"{name}: {value!r} is out of range; give a number between 0 and 1")


__all__ = ["Scores", "audit", "epsilon_lower_bound", "provable"]
