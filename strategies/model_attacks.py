"""What malicious clients send after honest training, and what they must know for it.

An attack sees a round's whole cohort. Curves of two attacks are comparable where ``knows`` and ``colludes`` agree.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from clients.described import Described
from clients.recipe import Positive
from strategies.aggregation import State
from strategies.crafting import (
    Direction,
    Score,
    Variant,
    alie,
    alie_z,
    gaussian,
    ipm,
    mimic,
    min_max,
    min_sum,
    model_replacement,
    scaled,
    sign_flip,
    standing_out,
)

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, eq=False)
class CraftContext:
    """What attackers may look at beside the updates; each of them says in ``knows`` what it does look at.

    Attributes:
        round: the round, from 1.
        weights: ``[d]`` the global weights that the round started from.
        examples: ``int64 [n]`` training examples of the cohort's clients.
        clients: ``int64 [n]`` their ids.
        generator: for draws, keyed by the round.
        server_lr: by which the server multiplies the aggregate.
        others: ``int64 [o]`` training examples of other attackers in the cohort, whose updates are not shown.
        state: what :meth:`ModelAttack.remember` returned in the last round; empty in the first.
    """

    round: int
    weights: Tensor
    examples: Tensor
    clients: Tensor
    generator: torch.Generator
    server_lr: float = 1.0
    others: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    state: State = field(default_factory=dict)


class ModelAttack(Described):
    """The base of attacks on updates; one overrides :meth:`forge`.

    Attributes:
        knows: what an attacker must have seen, in words.
        colludes: whether attackers agree on what they send.
        acts_on: what they change, ``"data"`` or ``"model"``.
        sees_others: whether honest updates are needed; without any, attackers send what they honestly would.
    """

    knows: ClassVar[str] = "all honest updates of the round"
    colludes: ClassVar[bool] = True
    acts_on: ClassVar[Literal["data", "model"]] = "model"
    sees_others: ClassVar[bool] = True

    def craft(self, rows: Tensor, malicious: Tensor, ctx: CraftContext) -> Tensor:
        """What the malicious clients send; the order of the cohort does not matter.

        Args:
            rows: ``[n, d]`` updates of the whole cohort after honest training.
            malicious: ``bool [n]``, which of them attack.
            ctx: the round's circumstances, of the same ``n`` clients.

        Returns:
            ``[m, d]`` in the order in which they stand in the cohort.
        """
        order = ctx.clients.argsort()
        mine, others = order[malicious[order]], order[~malicious[order]]
        own, places = rows[mine], malicious.cumsum(0)[mine] - 1
        if len(mine) and (len(others) or not self.sees_others):
            honest = rows[others] if self.sees_others else rows[:0]
            own = self.forge(honest, own, _of(ctx, torch.cat([others, mine])))
        return torch.empty_like(own).index_copy_(0, places, own)

    def forge(self, honest: Tensor, own: Tensor, ctx: CraftContext) -> Tensor:
        """What the malicious clients send, ``[m, d]`` with ``m`` above 0.

        Args:
            honest: ``[n - m, d]`` ordered by client id, at least one; ``[0, d]`` where ``sees_others`` is false.
            own: ``[m, d]`` what they would honestly have sent, ordered by client id.
            ctx: the round's circumstances; honest clients come first, then malicious ones, each ordered by id.
        """
        raise NotImplementedError

    def remember(self, rows: Tensor, malicious: Tensor, ctx: CraftContext) -> State:
        """What the attackers keep for later rounds, a dict of tensors; arguments as for :meth:`craft`."""
        return ctx.state


@dataclass(frozen=True)
class SignFlip(ModelAttack):
    """Sends minus its own update, or minus the honest mean.

    With ``own`` an attacker knows its own update alone and does not collude; with ``mean`` it knows all honest updates
    of the round and colludes. It acts on the model.

    Args:
        of: whose sign is flipped.
    """

    of: Literal["own", "mean"] = "own"

    knows = "its own update"
    colludes = False
    sees_others = False

    def __post_init__(self) -> None:
        if self.of == "mean":  # the other attack of this name has the base's knowledge
            for name in ("knows", "colludes", "sees_others"):
                object.__setattr__(self, name, getattr(ModelAttack, name))

    def forge(self, honest: Tensor, own: Tensor, ctx: CraftContext) -> Tensor:
        return sign_flip(honest, len(own), own=own if self.of == "own" else None)


@dataclass(frozen=True)
class Scaled(ModelAttack):
    """Sends minus its own update, many times as long.

    The attacker knows its own update alone, does not collude, and acts on the model.

    Args:
        kappa: how many times.
    """

    kappa: Positive = 10.0

    knows = "its own update"
    colludes = False
    sees_others = False

    def forge(self, honest: Tensor, own: Tensor, ctx: CraftContext) -> Tensor:
        return scaled(own, kappa=self.kappa)


@dataclass(frozen=True)
class Gaussian(ModelAttack):
    """Sends Gaussian noise as its update.

    The attacker knows how many weights there are, does not collude, and acts on the model.

    Args:
        std: standard deviation of each number that it sends.
    """

    std: Positive

    knows = "the size of the model"
    colludes = False
    sees_others = False

    def forge(self, honest: Tensor, own: Tensor, ctx: CraftContext) -> Tensor:
        return gaussian(own, std=self.std, generator=ctx.generator)


@dataclass(frozen=True)
class Alie(ModelAttack):
    """Leaves the honest mean by as little as goes unnoticed (Baruch et al. 2019, "A little is enough").

    The attackers know all honest updates of the round, collude, and act on the model; see :func:`alie`.

    Args:
        z: how many standard deviations; left out, by the numbers of clients and attackers in the round.
        variant: by which formula, see :func:`alie_z`.
    """

    z: Finite | None = None
    variant: Variant = "arxiv"

    def forge(self, honest: Tensor, own: Tensor, ctx: CraftContext) -> Tensor:
        malicious = len(own) + len(ctx.others)
        z = alie_z(len(honest) + malicious, malicious, self.variant) if self.z is None else self.z
        return alie(honest, len(own), z=z)


@dataclass(frozen=True)
class Ipm(ModelAttack):
    """Sends a negative multiple of the honest mean (Xie et al. 2020, "Inner product manipulation").

    The attackers know all honest updates of the round, collude, and act on the model; see :func:`ipm`.

    Args:
        eps: the multiple; above honest per malicious clients, a plain mean points the wrong way.
    """

    eps: Positive = 0.5

    def forge(self, honest: Tensor, own: Tensor, ctx: CraftContext) -> Tensor:
        return ipm(honest, len(own), eps=self.eps)


@dataclass(frozen=True)
class MinMax(ModelAttack):
    """Leaves the honest mean while no distance exceeds the largest honest one (Shejwalkar and Houmansadr 2021).

    The attackers know all honest updates of the round, collude, and act on the model; see :func:`min_max`.

    Args:
        direction: against the honest updates' spread, the signs of their mean, or their mean.
    """

    direction: Direction = "std"

    def forge(self, honest: Tensor, own: Tensor, ctx: CraftContext) -> Tensor:
        return min_max(honest, len(own), direction=self.direction)


@dataclass(frozen=True)
class MinSum(ModelAttack):
    """Leaves the honest mean while its squared distances sum to an honest sum (Shejwalkar and Houmansadr 2021).

    The attackers know all honest updates of the round, collude, and act on the model; see :func:`min_sum`.

    Args:
        direction: against the honest updates' spread, the signs of their mean, or their mean.
        score: which honest sum; the paper's is the largest.
    """

    direction: Direction = "std"
    score: Score = "max"

    def forge(self, honest: Tensor, own: Tensor, ctx: CraftContext) -> Tensor:
        return min_sum(honest, len(own), direction=self.direction, score=self.score)


@dataclass(frozen=True)
class Mimic(ModelAttack):
    """Copies one honest client, whom the mean then hears too often (Karimireddy et al. 2022, "Bucketing").

    The attackers know all honest updates of the round, collude, and act on the model. They copy the client named, or
    else one that they copied before, the earliest first; where none of these takes part, whoever stands out.

    Args:
        client: whom to copy.
    """

    client: Annotated[int, Field(ge=0)] | None = None

    def forge(self, honest: Tensor, own: Tensor, ctx: CraftContext) -> Tensor:
        return mimic(honest, len(own), position=self._known(ctx.clients[: len(honest)], ctx))

    def remember(self, rows: Tensor, malicious: Tensor, ctx: CraftContext) -> State:
        others = ctx.clients.argsort()
        others = others[~malicious[others]]
        there = ctx.clients[others]
        if not bool(malicious.any()) or not len(there) or self._known(there, ctx) is not None:
            return ctx.state
        return {"copied": torch.cat([self._copied(ctx), there[standing_out(rows[others])][None]])}

    def _known(self, clients: Tensor, ctx: CraftContext) -> int | None:
        """Where the first of those to copy stands among these; None where none does."""
        named = [] if self.client is None else [self.client]
        place = {client: at for at, client in enumerate(clients.tolist())}
        return next((place[client] for client in named + self._copied(ctx).tolist() if client in place), None)

    def _copied(self, ctx: CraftContext) -> Tensor:
        """``int64`` ids of clients that were copied before, in that order."""
        return ctx.state.get("copied", torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True)
class ModelReplacement(ModelAttack):
    """Sends its own update so much enlarged that the server's mean is what it trained (Bagdasaryan et al. 2020).

    The attacker knows its own update, how much the cohort counts, and the server's learning rate; several collude, so
    that together they replace the model once. It acts on the model. What it trained on is an attack on data's to say.

    Args:
        weighting: how it takes the server's mean to weigh clients: all alike, or by training examples.
    """

    weighting: Literal["uniform", "examples"] = "uniform"

    knows = "its own update, the size of the cohort and the server's learning rate"
    sees_others = False

    def forge(self, honest: Tensor, own: Tensor, ctx: CraftContext) -> Tensor:
        everyone = torch.cat([ctx.examples, ctx.others])
        counts = everyone if self.weighting == "examples" else torch.ones_like(everyone)
        share = int(counts[len(ctx.examples) - len(own) : len(ctx.examples)].sum()) / int(counts.sum())
        return model_replacement(own, share=share, server_lr=ctx.server_lr)


def _of(ctx: CraftContext, order: Tensor) -> CraftContext:
    return dataclasses.replace(ctx, clients=ctx.clients[order], examples=ctx.examples[order])
