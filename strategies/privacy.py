"""Differential privacy of clients: clipping, central and local noise.

What a plug-in here must not meet is refused when the strategy is built, since a guarantee that does not hold is worse
than none. The server clips on arrival whatever was sent, so it rests on no client's honesty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from clients.errors import RequestError, RunError
from clients.recipe import NonNegative, Positive
from clients.updates import Updates
from strategies import accounting, noising
from strategies.clipping import clip, norms
from strategies.context import Context
from strategies.guarantees import Guarantee
from strategies.plugins import Plugin, State

Quantile = Annotated[float, Field(gt=0, lt=1)]
Accountant = Literal["pld", "rdp"]

#: Standard deviation of the noise on the count of unclipped clients over the expected cohort (Andrew et al. 2021).
_COUNT_NOISE = 0.05


class _Clipping(Plugin):
    """Clips on the client, and again on arrival: what a codec or a client has made larger is cut off."""

    repeats = True
    private = True

    def client(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        norm = self.bounded_by(state)
        assert norm is not None
        clipped = norms(u.rows) > norm
        return u.replace(rows=clip(u.rows, norm)).tell(clipped=clipped.to(torch.int64)), state

    def server_each(self, u: Updates, state: State, ctx: Context) -> Updates:
        norm = self.bounded_by(state)
        assert norm is not None
        return u.replace(rows=clip(u.rows, norm))


@dataclass(frozen=True)
class Clip(_Clipping):
    """Clips every update to a Euclidean norm, all shared weights and biases jointly (McMahan et al. 2018).

    ``D_k <- D_k min(1, norm / ||D_k||)``, on the client and again on the server after whatever a codec decodes, so that
    no client moves the sum by more. Keeps nothing; records ``clipped``.

    Args:
        norm: the clipping norm.
    """

    norm: Positive = 1.0

    def bounded_by(self, state: State) -> float:
        return self.norm


@dataclass(frozen=True)
class AdaptiveClip(_Clipping):
    """A clipping norm that follows a quantile of the updates' norms.

    Andrew et al. 2021, "Differentially private learning with adaptive clipping", Algorithm 1, with geometric updates. A
    client sends ``below``, b_k = 1 where ||D_k|| <= C, one byte; with m the expected cohort the server sets

        b = 1/2 + (sum_k (b_k - 1/2) + N(0, sigma_b^2)) / m,    C <- C exp(-lr (b - quantile))

    after the round's noise, which belongs to the C that clipped. Beside noise of multiplier z the two releases together
    cost what z alone would: updates get (z^-2 - (2 sigma_b)^-2)^(-1/2). Keeps C on the server and sends it; records
    ``clipped``.

    Args:
        initial_norm: C at first.
        quantile: which share of the clients should be below C.
        lr: how fast C moves.
        count_noise: sigma_b / m; left out, 1/20 beside noise, and none without.
    """

    initial_norm: Positive = 0.1
    quantile: Quantile = 0.5
    lr: Positive = 0.2
    count_noise: NonNegative | None = None

    def init(self, ctx: Context) -> State:
        return {"norm": torch.tensor(self.initial_norm, dtype=torch.float64)}

    def bounded_by(self, state: State) -> float:
        return float(state["norm"])

    def deviation(self, strategy: Any, expected: float) -> float:
        """sigma_b, in clients."""
        noised = any(plugin.noises for plugin in strategy.plugins)
        share = self.count_noise if self.count_noise is not None else _COUNT_NOISE if noised else 0.0
        return share * expected

    def client(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        u, state = super().client(u, state, ctx)
        return u.send(below=(u.report["clipped"] == 0).to(torch.uint8)), state

    def fits(self, strategy: Any) -> list[str]:
        if sum(isinstance(plugin, AdaptiveClip) for plugin in strategy.plugins) == 1:
            return []
        return ["plugins.adaptive_clip: two of them would each count clients by the other's norm; give it once"]

    def server_each(self, u: Updates, state: State, ctx: Context) -> Updates:
        said = u.sends["below"].reshape(len(u), -1)[:, :1].flatten()  # one bit a client, whatever it sends
        return super().server_each(u, state, ctx).send(below=(said > 0).to(torch.uint8))

    def server_total(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        m, sigma = ctx.expected, self.deviation(ctx.strategy, ctx.expected)
        count = sum(u.sends["below"].flatten().tolist()) if len(u.clients) else 0
        drawn = float(torch.randn((), generator=ctx.generator("count"), dtype=torch.float64))
        b = 0.5 + (count - len(u.clients) / 2 + sigma * drawn) / m
        return u, {"norm": state["norm"] * math.exp(-self.lr * (b - self.quantile))}


@dataclass(frozen=True)
class Noise(Plugin):
    """Gaussian noise on the mean of clipped updates, before the server optimiser: central differential privacy.

    D <- D + N(0, (z C / q N)^2 I) (McMahan et al. 2018, "Learning differentially private recurrent language models"),
    with C the clipping norm and q N the expected cohort: the mean must be divided by what is expected, not by who came.
    Neighbours differ in one client, whatever it sends. Every round is a release, also one without clients. Under
    Poisson sampling the accountant counts that a client is rarely in the cohort; cohorts of fixed size are accounted as
    replacing a client, or without counting the sampling, whichever is the less. Keeps nothing.

    Args:
        noise_multiplier: z; left out, what ``target_epsilon`` takes over all rounds.
        target_epsilon: the budget. With ``noise_multiplier``, the run ends before the round that would exceed it.
        delta: left out, 1 / clients^1.1.
        accountant: ``pld``, privacy loss distributions, or the looser ``rdp``, Renyi divergences.
        amplification: whether the sampling of clients counts; left out, where it can.
    """

    noise_multiplier: NonNegative | None = None
    target_epsilon: Positive | None = None
    delta: Quantile | None = None
    accountant: Accountant = "pld"
    amplification: bool | None = None
    private = True
    noises = True

    def __post_init__(self) -> None:
        if self.noise_multiplier is None and self.target_epsilon is None:
            raise RequestError("plugins.noise: how much noise? give noise_multiplier, or target_epsilon")

    def fits(self, strategy: Any) -> list[str]:
        return noising.against_noise(self, strategy)

    def guarantee(self, strategy: Any, clients: int, rounds: int) -> Guarantee:
        return noising.central(self, strategy, clients, rounds)

    def server_total(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        assert ctx.sensitivity is not None
        z = ctx.strategy.guarantee(len(ctx.population.trainable), ctx.rounds).noise_multiplier
        for plugin in ctx.strategy.plugins:
            deviation = plugin.deviation(ctx.strategy, ctx.expected)
            if deviation is not None and z:
                z = accounting.noise_on_updates(z, deviation)
        drawn = torch.randn(u.rows.shape, generator=ctx.generator("noise"), dtype=torch.float64)
        return u.replace(rows=(u.rows + z * ctx.sensitivity * drawn).to(u.rows.dtype)), state


@dataclass(frozen=True)
class LocalNoise(Plugin):
    """Clips an update and adds Gaussian noise before it leaves the client: local differential privacy.

    ``D_k min(1, C / ||D_k||) + N(0, (2 C z)^2 I)`` with C the clipping norm: neighbours are any two updates of a
    client, 2 C apart. z is that of the analytic Gaussian mechanism (Balle and Wang 2018; the classical
    sqrt(2 ln(1.25 / delta)) / epsilon holds for epsilon up to 1 only). A client's releases compose over the rounds in
    which it takes part; its epsilon stands in the record, the largest in the ledger. How many examples it holds is sent
    as it is. Keeps the number of releases with the client.

    Args:
        norm: C.
        epsilon: of one release; or give ``noise_multiplier``.
        noise_multiplier: z.
        delta: of a client's releases together, and of one where ``epsilon`` is given; left out, 1 / clients^1.1.
    """

    norm: Positive = 1.0
    epsilon: Positive | None = None
    noise_multiplier: NonNegative | None = None
    delta: Quantile | None = None
    client_state = {"releases": 1}
    stands = ("releases",)

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise RequestError("plugins.local_noise: give epsilon or noise_multiplier, one of the two")

    def fits(self, strategy: Any) -> list[str]:
        return noising.against_local_noise(self, strategy)

    def guarantee(self, strategy: Any, clients: int, rounds: int) -> Guarantee:
        return noising.local(self, strategy, clients, rounds)

    def init(self, ctx: Context) -> State:
        if noising.raw_weights(ctx):
            raise RequestError(
                f"strategy.aggregator: {ctx.strategy.aggregator!r} makes weights or values of the updates themselves,"
                " which are sent without noise; use mean, or a rule that counts clients alike"
            )
        return {}

    def client(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        if u.sends:
            raise RunError(
                f"round {ctx.round}, local_noise: {', '.join(u.sends)} would be sent beside the update without noise;"
                " let plug-ins before it, and client.local_training, send nothing"
            )
        told = self.guarantee(ctx.strategy, len(ctx.population.trainable), ctx.rounds)
        std = 2 * self.norm * told.noise_multiplier
        rows = clip(u.rows, self.norm)
        clipped = (norms(u.rows) > self.norm).to(torch.int64)
        for row, client in zip(rows, u.clients.tolist(), strict=True):
            row += std * torch.randn(row.shape, generator=ctx.generator("noise", client), dtype=row.dtype)
        releases = state["releases"] + 1
        spent = [told.spent(int(count)) for count in releases[:, 0].tolist()]
        u = u.replace(rows=rows).tell(clipped=clipped, epsilon=torch.tensor(spent, dtype=torch.float64))
        return u, {**state, "releases": releases}
