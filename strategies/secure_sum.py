"""Secure summation: updates are added under masks that cancel, so that the server learns their sum alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clients import randomness
from clients.errors import RequestError, RunError
from clients.recipe import Count, Positive
from clients.updates import Updates
from strategies import masking
from strategies.context import Context
from strategies.masking import MOST_CLIENTS, Grid
from strategies.plugins import Plugin, State

_WEIGHT = "masked_weight"


@dataclass(frozen=True)
class SecureSum(Plugin):
    """The weighted sum of updates under pairwise masks, modulo 2^32, exact whoever drops out.

    Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning"; neighbours by Bell et
    al. 2020. With q_k the client's update times its weight as whole numbers (see :class:`strategies.masking.Grid`), N_k
    its neighbours, and streams of a round's own for itself, b_k, and for each pair, s_kl = s_lk, client k sends

        y_k = q_k + b_k + sum_{l in N_k, l > k} s_kl - sum_{l in N_k, l < k} s_kl    (mod 2^32)

    The server adds what arrives, takes off b_k of clients that answered and the s_kl that those who began and did not
    answer left uncancelled (in the protocol it asks the others for shares of these seeds), and reads the sum of the q_k
    from it, to the last bit, for every subset that arrives: there is no threshold. Only rounding remains, to the
    nearest step, ``clip / floor((2^31 - 1) / n)`` for n clients that began. A weighted mean of m of them is off by at
    most ``m max_weight / total weight`` half steps in a coordinate: by one where weights are equal, 4e-7 for n = 200
    and the clip of 8. So near to float32's own precision there is nothing to gain by rounding at random, which would
    double the worst case.

    It stands last among the plug-ins, for a rule that needs only the sum. A client sends 4 bytes a coordinate and 4 for
    its weight, masked likewise; the protocol's keys and shares, whose size does not grow with the update, are not
    counted. A codec before it saves nothing: masked words do not compress. Keeps ``max_weight``, which is sent, 8 bytes
    a client; records ``clamped``, how many coordinates were beyond the clip.

    Args:
        clip: coordinates of an update are clamped to +-clip, whatever its weight.
        max_weight: the largest weight that a client may have; left out, the rule's for the most training examples that
            a client holds.
        neighbors: how many others each client shares masks with; left out, about 2 log2 n and 20 at least. All others,
            where there are no more.
    """

    clip: Positive = 8.0
    max_weight: Positive | None = None
    neighbors: Count | None = None
    owns_sum = True
    private = True
    note = (
        "Updates were added under pairwise masks as in secure aggregation. In one process, where the simulator holds"
        " every client's update, this protects nothing: it shows what the protocol would compute and send. Numbers of"
        " examples, and what rules and plug-ins send beside the update by name, travel in the clear."
    )

    def fits(self, strategy: Any) -> list[str]:
        mine = next(i for i, plugin in enumerate(strategy.plugins) if plugin is self)
        lines = []
        for place, plugin in enumerate(strategy.plugins):
            if place > mine and plugin.overrides("client", "server_each"):
                lines.append(
                    f"plugins: {plugin!r} would change what {self!r} has masked, which leaves nothing of it; put"
                    " secure_sum last, once"
                )
            elif place < mine and plugin.overrides("server_sum") and not plugin.owns_sum:
                lines.append(
                    f"plugins: {plugin!r} would see the sum before {self!r} has taken the masks off; put secure_sum"
                    " before it, or leave one of them out"
                )
            elif place < mine and plugin.overrides("server_each") and not plugin.repeats:
                lines.append(
                    f"plugins: {plugin!r} needs to see each update on arrival, which secure_sum hides; leave one of the"
                    " two out"
                )
        if strategy.correction.server_state:
            lines.append(
                f"strategy.correction: {strategy.correction!r} sends rows beside the update, which secure_sum does not"
                " mask; leave one of them out, or use prox or feddyn"
            )
        if strategy.aggregator.needs_loss_before and self.max_weight is None:
            lines.append(
                f"plugins.secure_sum.max_weight: {strategy.aggregator!r} weighs clients by their losses, of which none"
                " is the largest; give the largest weight that a client may have"
            )
        if strategy.concurrency is not None:
            lines.append(
                "plugins.secure_sum: clients that do not wait for one another have no cohort whose masks would cancel;"
                " leave it out, or use a strategy with rounds"
            )
        return lines

    def init(self, ctx: Context) -> State:
        if ctx.recipe is not None and ctx.recipe.batch_norm == "share_all":
            raise RequestError(
                'client.batch_norm: "share_all" sends batch norm\'s statistics weighted in the clear, and secure_sum'
                ' hides the weights; give "share_affine" or "local", or leave secure_sum out'
            )
        return {"max_weight": torch.tensor(self._largest(ctx), dtype=torch.float64)}

    def _largest(self, ctx: Context) -> float:
        """The largest weight: as it is given, or what the rule weighs a client by that holds the most examples."""
        rule, most = ctx.strategy.aggregator, int(ctx.population.examples[ctx.population.trainable].max())
        one, row = torch.ones(1, dtype=torch.int64), torch.zeros(1, len(ctx.weights), dtype=ctx.weights.dtype)
        client = Updates(row, 0 * one, most * one, one, one.to(torch.float64))
        try:
            known = float(rule.prepare(client, ctx).weights)
            if not 0 < known < math.inf:
                raise ValueError(f"{known:g} for {most} examples")
        except Exception as error:
            if self.max_weight is not None:
                return self.max_weight
            raise RequestError(
                f"plugins.secure_sum.max_weight: what {rule!r} weighs clients by is not known before they train"
                f" ({type(error).__name__}: {error}); give the largest weight that a client may have"
            ) from error
        if self.max_weight is None or self.max_weight >= known:
            return self.max_weight or known
        raise RequestError(
            f"plugins.secure_sum.max_weight: {self.max_weight:g} is less than the {known:g} of a client with {most}"
            " examples; give at least that, or leave it out"
        )

    def client(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        cohort, grid, ids = self._cohort(ctx), self._grid(state, ctx), u.clients.numpy()
        bad = ~((u.weights >= 0) & (u.weights <= grid.largest))
        if bool(bad.any()):
            client, weight = int(u.clients[bad][0]), float(u.weights[bad][0])
            raise RunError(
                f"round {ctx.round}, client {client}, secure_sum: its weight {weight:g} is not between 0 and the"
                f" largest, {grid.largest:g}; give plugins.secure_sum.max_weight as much as a client may have"
            )
        finite = torch.isfinite(u.rows).all(1)
        rows = u.rows if bool(finite.all()) else u.rows.where(finite[:, None], 0)
        words, near, own = grid.words(rows, u.weights), self._near(ids, cohort, ctx), _keys(ids, ids, ctx)
        for i, client in enumerate(ids):
            keys, later = _keys(ids[i], near[i], ctx), near[i] > client
            words[i] += masking.mask(np.append(keys[later], own[i]), keys[~later], words.shape[1])
        masked = torch.from_numpy(words[:, :-1].astype(np.float64))
        # What cannot be added must arrive as such: the server leaves it out, as if it had never been sent.
        masked[~finite] = torch.nan
        u = u.tell(weight=u.weights, clamped=(rows.abs() > self.clip).sum(1))
        u = u.send(**{_WEIGHT: torch.from_numpy(words[:, -1].view(np.int32))})
        sizes = torch.full((len(u),), rows.shape[1] * words.itemsize, dtype=torch.int64)
        return u.replace(rows=masked, weights=torch.ones_like(u.weights), nbytes=sizes), state

    def server_sum(self, u: Updates, state: State, ctx: Context) -> Updates:
        arrived = u.clients.numpy()
        if not len(arrived):
            return u
        near = self._near(arrived, self._cohort(ctx), ctx)
        ids = np.broadcast_to(arrived[:, None], near.shape)
        gone, later = ~np.isin(near, arrived), near > ids
        added, subtracted = (_keys(ids[which], near[which], ctx) for which in (gone & later, gone & ~later))
        left = masking.mask(np.append(added, _keys(arrived, arrived, ctx)), subtracted, len(ctx.weights) + 1)
        sends = dict(u.sends)
        total = torch.cat([u.rows[0], sends.pop(_WEIGHT)]).to(torch.int64).numpy().astype(np.uint32)
        rows, weights = self._grid(state, ctx).values(total - left)
        return u.replace(rows=rows, weights=weights, sends=sends)

    def _cohort(self, ctx: Context) -> np.ndarray:
        if ctx.cohort is None or not 0 < len(ctx.cohort) <= MOST_CLIENTS:
            raise RunError(
                f"round {ctx.round}, secure_sum: needs a cohort of 1 to {MOST_CLIENTS} clients that is known to all;"
                " give fewer clients a round"
            )
        return ctx.cohort.numpy()

    def _grid(self, state: State, ctx: Context) -> Grid:
        return Grid(self.clip, float(state["max_weight"]), len(self._cohort(ctx)))

    def _near(self, ids: np.ndarray, cohort: np.ndarray, ctx: Context) -> np.ndarray:
        """``int64 [k, degree]`` ids of the clients' neighbours."""
        degree = self.neighbors or max(20, 2 * math.ceil(math.log2(len(cohort))))
        draws = ctx.uniform("graph", cohort)[:, 0].numpy()
        return cohort[masking.neighbors(draws, degree, np.searchsorted(cohort, ids))]


def _keys(ids: np.ndarray, others: np.ndarray, ctx: Context) -> np.ndarray:
    """``uint64 [m]`` keys of the streams that clients share, the same from both ends."""
    low, high = np.minimum(ids, others), np.maximum(ids, others)
    return randomness.keys(ctx.seed, f"{ctx.scope}mask", ctx.round, low * ctx.population.clients + high)
