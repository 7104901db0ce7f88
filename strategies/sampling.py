"""Who trains in a round. One uniform u(seed, round, client) drives every sampler, so strategies stay paired."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clients import randomness
from clients.described import Described
from clients.errors import RequestError
from clients.recipe import Count, Positive
from strategies.context import Context


class Sampling(Described):
    """The base of every sampler.

    Attributes:
        amplifies: whether privacy accounting may count the sampling (Poisson only).
    """

    amplifies: bool = False

    def cohort(self, ctx: Context) -> np.ndarray:
        """``int64 [n]`` client ids of the round, ascending."""
        raise NotImplementedError

    def expected(self, clients: int) -> float:
        """The expected cohort, of so many clients. It only serves estimates; who cannot know says all."""
        return clients


def draws(ctx: Context, ids: np.ndarray) -> np.ndarray:
    """u(seed, round, client) in ``[0, 1)`` for these ids, ``float64 [k]``."""
    return randomness.uniforms(randomness.keys(ctx.seed, "cohort", ctx.round, ids), 1)[:, 0]


@dataclass(frozen=True)
class _Sized(Sampling):
    """Takes so many clients a round, or a fraction of them; one of the two.

    Args:
        clients_per_round: how many clients.
        fraction: which share of the population, in (0, 1].
    """

    clients_per_round: Count | None = None
    fraction: Positive | None = None

    def __post_init__(self) -> None:
        if (self.clients_per_round is None) == (self.fraction is None):
            raise RequestError("strategy: give clients_per_round or fraction, one of the two")
        if self.clients_per_round is not None and self.clients_per_round < 1:
            raise RequestError(
                f"strategy.clients_per_round: {self.clients_per_round} clients cannot train; give 1 or more"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise RequestError(f"strategy.fraction: {self.fraction} is not above 0 and at most 1")

    def expected(self, clients: int) -> float:
        if self.clients_per_round is not None:
            return self.clients_per_round
        assert self.fraction is not None
        return self.fraction * clients


@dataclass(frozen=True)
class Fixed(_Sized):
    """A cohort of fixed size, without replacement: the m clients with the smallest u."""

    def size(self, clients: int) -> int:
        """m, of so many clients."""
        return min(clients, max(1, round(self.expected(clients))))

    def cohort(self, ctx: Context) -> np.ndarray:
        ids = ctx.population.trainable
        m = self.size(len(ids))
        if m >= len(ids):
            return ids
        return np.sort(ids[np.argpartition(draws(ctx, ids), m)[:m]])


@dataclass(frozen=True)
class Poisson(_Sized):
    """Every client takes part by its own coin, those with u below q; the cohort's size varies and may be zero."""

    amplifies = True

    def cohort(self, ctx: Context) -> np.ndarray:
        ids = ctx.population.trainable
        return ids[draws(ctx, ids) < self.expected(len(ids)) / len(ids)]


@dataclass(frozen=True)
class All(Sampling):
    """Every client, every round."""

    def cohort(self, ctx: Context) -> np.ndarray:
        return ctx.population.trainable

    def expected(self, clients: int) -> float:
        return clients
