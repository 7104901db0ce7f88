"""What a strategy's noise guarantees its clients: which privacy, against whom, and how much of it is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from strategies import accounting
from strategies.accounting import Accountant, Relation


@dataclass(frozen=True)
class Guarantee:
    """The differential privacy of a run, by client.

    Attributes:
        trust: ``central``: the server sees updates, and what it releases is protected. ``local``: what leaves a client
            is, also against the server; each client has spent what its own releases cost.
        delta: of (epsilon, delta).
        noise_multiplier: standard deviation of the noise over the clipping norm C; with local trust over 2 C, by which
            one update may differ from any other.
        rounds: how many releases are planned.
        sampling_rate: chance of a client to be in a round; 1 where sampling earns nothing.
        accountant: ``pld`` or ``rdp``; with local trust the analytic Gaussian mechanism, which is exact.
        clients: how many clients cohorts of a fixed size are drawn from; ``None`` under Poisson sampling.
        budget: the epsilon at which the run ends, where it has one.
    """

    trust: Literal["central", "local"]
    delta: float
    noise_multiplier: float
    rounds: int
    sampling_rate: float = 1.0
    accountant: Accountant = "pld"
    clients: int | None = None
    budget: float | None = None

    unit = "client"
    covers = "the released weights only: not metrics, not the trials of tune"

    def __post_init__(self) -> None:
        accounting.check(
            self.noise_multiplier, self.sampling_rate, self.rounds, self.delta, self.accountant, self.clients
        )

    @property
    def relation(self) -> Relation:
        """Which neighbours the guarantee speaks of: of two bounds, the one that is lower after all rounds."""
        if self.trust == "local":
            return "replace one"
        return accounting.relation(**self._releases(self.rounds))

    @property
    def epsilon(self) -> float:
        """After all rounds that are planned; with local trust, of a client that takes part in each."""
        return self.spent(self.rounds)

    def spent(self, releases: int) -> float:
        """Epsilon after so many releases (with local trust, of one client)."""
        if self.trust == "local":
            if not releases:
                return 0.0
            return accounting.gaussian_epsilon(self.noise_multiplier / math.sqrt(releases), self.delta)
        return accounting.epsilon(**self._releases(releases), relation=self.relation)

    def described(self) -> dict[str, Any]:
        """Plain values that say what kind of epsilon this is."""
        told: dict[str, Any] = {
            "unit": self.unit,
            "relation": self.relation,
            "trust": self.trust,
            "delta": self.delta,
            "accountant": self._accountant,
            "noise_multiplier": self.noise_multiplier,
            "covers": self.covers,
        }
        if self.trust == "central":
            told |= {"sampling_rate": self.sampling_rate, "sampling": "poisson" if self.clients is None else "fixed"}
        return told

    @property
    def note(self) -> str:
        """One sentence for the reader of a run."""
        if not self.noise_multiplier:
            return "Updates were clipped and got no noise, so epsilon is infinite: there is no privacy."
        whose = "Epsilon is the largest that a client has spent: " if self.trust == "local" else "Epsilon is "
        return (
            f"{whose}by {self.unit}, {self.relation}, {self.trust} trust, delta {self.delta:g}, {self._method()}; it"
            f" covers {self.covers}."
        )

    @property
    def _accountant(self) -> str:
        if self.trust == "local":
            return "analytic"
        return "rdp" if self.relation == "replace one" else self.accountant  # of which only that bound is known

    def _method(self) -> str:
        if self.trust == "local":
            return "analytic Gaussian mechanism"
        accountant = f"{self.accountant.upper()} accountant"
        if self.relation == "replace one":
            assert self.clients is not None
            count = round(self.sampling_rate * self.clients)
            return f"RDP accountant, {count} of {self.clients} clients without replacement"
        if self.relation == "replace one by nothing" or self.sampling_rate == 1:
            return f"{accountant}, no amplification by sampling"
        return f"{accountant}, Poisson sampling at {self.sampling_rate:g}"

    def _releases(self, count: int) -> dict[str, Any]:
        names = ("noise_multiplier", "sampling_rate", "delta", "accountant", "clients")
        return {**{name: getattr(self, name) for name in names}, "rounds": count}
