"""What noise needs of the strategy that it stands in, and what it guarantees there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from clients.errors import FedsimError, RequestError
from clients.hooks import Correction
from clients.updates import Updates
from strategies import accounting
from strategies.context import Context
from strategies.guarantees import Guarantee
from strategies.sampling import All, Fixed


def against_noise(noise: Any, strategy: Any) -> list[str]:
    """Why central noise would not give what it says, one line each with the mend."""
    return [
        *_several(strategy),
        *_unclipped(noise, strategy),
        *_beside(noise, strategy),
        *_unaccounted(noise, strategy),
    ]


def against_local_noise(noise: Any, strategy: Any) -> list[str]:
    """The same of local noise."""
    lines = [*_several(strategy), *_sent_beside(strategy)]
    for plugin in strategy.plugins:
        if plugin.overrides("deviation"):
            lines.append(
                "plugins.adaptive_clip: clients would send whether they were clipped without noise; local_noise clips"
                " by itself, leave adaptive_clip out"
            )
        elif plugin.overrides("bounded_by"):
            lines.append(
                f"plugins: {plugin!r} would cut the noise of local_noise off on arrival; local_noise clips by itself,"
                " leave the other out"
            )
    return lines


def _several(strategy: Any) -> Iterator[str]:
    from strategies.error_feedback import ErrorFeedback

    noises = [plugin for plugin in strategy.plugins if plugin.overrides("guarantee")]
    if len(noises) > 1:
        yield f"plugins: {' and '.join(map(repr, noises))} would each count for themselves; give one of them"
    if any(isinstance(plugin, ErrorFeedback) for plugin in strategy.plugins):
        yield (
            "plugins.error_feedback: what a client keeps back of one round it sends in another, which the guarantee of"
            " a round does not count; leave it out, and compress by quantize, which needs no feedback"
        )


def _unclipped(noise: Any, strategy: Any) -> Iterator[str]:
    """The last thing done to a contribution before the sum must be the clip."""
    plugins = strategy.plugins
    first = next((i for i, plugin in enumerate(plugins) if plugin.overrides("bounded_by")), None)
    if first is None:
        yield (
            "plugins.noise: nothing bounds what a client sends, so no noise hides it; put clip before it"
            ' ([[plugins]] name = "clip"), or name the strategy dpfedavg'
        )
        return
    for plugin in plugins[:first]:
        if plugin.overrides("server_each"):
            yield (
                f"plugins: {plugin!r} stands before {plugins[first]!r}, and would change on arrival what that has"
                " clipped; put the clip first"
            )
    if any(plugin.owns_sum for plugin in plugins):
        yield (
            "plugins.secure_sum: the server cannot clip what it does not see, so central noise would rest on every"
            " client's honesty; leave secure_sum out, or use local_noise"
        )
    why = strategy.aggregator.unbounded()
    if not why and not _vouched(strategy.aggregator, "unbounded", "combine"):
        why = "its own combine is not what unbounded() speaks of; give it unbounded() and sensitivity() of its own"
    if why:
        yield (
            f"strategy.aggregator: noise must know how far one client moves {strategy.aggregator!r}: {why}. What noise"
            ' goes with is strategy.aggregator = {name = "mean", weighting = "uniform", divisor = "expected"}, without'
            " strategy.weighting, which dpfedavg has"
        )


def _vouched(part: Any, claim: str, *uses: str) -> bool:
    """Whether what a class says of itself was said where, or after, what it speaks of was last written."""
    order = type(part).__mro__

    def place(name: str) -> int:
        return next(i for i, kind in enumerate(order) if name in vars(kind))

    return all(place(claim) <= place(use) for use in uses)


def amplifies(sampling: Any) -> bool:
    """Whether every client takes part by a coin of its own, which its class must say where it draws the cohort."""
    return bool(sampling.amplifies) and _vouched(sampling, "amplifies", "cohort")


def _is_fixed(sampling: Any) -> bool:
    return isinstance(sampling, Fixed) and _vouched(sampling, "size", "cohort")


def raw_weights(ctx: Context) -> bool:
    """Whether an aggregator's ``prepare`` gives away more of an update than its row, which local noise hides."""
    examples = torch.tensor([3, 50])
    one = torch.ones(2, dtype=torch.int64)
    rows = torch.randn(2, len(ctx.weights), generator=torch.Generator().manual_seed(0)).to(ctx.weights.dtype)
    u = Updates(rows, torch.tensor([0, 1]), examples, one, one.to(torch.float64))
    try:
        told = [
            ctx.strategy.aggregator.prepare(u.replace(rows=rows), ctx) for rows in (u.rows, 0 * u.rows, -7 * u.rows)
        ]
    except FedsimError:
        return True
    return any(t.sends or not torch.equal(t.weights, told[0].weights) for t in told)


def _sent_beside(strategy: Any) -> Iterator[str]:
    correction, aggregator = strategy.correction, strategy.aggregator
    sends = type(correction).finish is not Correction.finish or type(correction).server is not Correction.server
    if sends or correction.server_state:
        yield (
            f"strategy.correction: {correction!r} sends values beside the update, which no noise covers; leave it out,"
            " or use prox"
        )
    if aggregator.needs_loss_before or correction.needs_loss_before:
        yield (f"strategy.aggregator: {aggregator!r} is sent losses beside the update, which no noise covers; use mean")


def _beside(noise: Any, strategy: Any) -> Iterator[str]:
    """Nothing else of the clients' may reach the weights than what is noised."""
    yield from _sent_beside(strategy)
    for plugin in strategy.plugins:
        if plugin.overrides("server_total", "server_sum") and not plugin.private:
            yield (
                f"plugins: what the server's half of {plugin!r} makes of the clients' values is not known to be noised;"
                " leave it out, or say private = True in its class where it reads nothing but u.rows, after the noise"
            )
    if strategy.concurrency is not None:
        yield (
            "strategy: clients that train without waiting are in no round's sample, which noise accounts for; use"
            " dpfedavg, with devices if time matters"
        )


def _unaccounted(noise: Any, strategy: Any) -> Iterator[str]:
    sampling = strategy.sampling
    if noise.amplification and not (amplifies(sampling) or isinstance(sampling, All)):
        if not _is_fixed(sampling):
            why = f"{sampling!r} is not known to draw every client by a coin of its own"
        elif noise.accountant == "pld":
            why = "for cohorts of fixed size there is no such bound by pld"
        else:
            return
        yield (f'plugins.noise.amplification: {why}; give strategy.sampling = "poisson", or leave amplification out')


def delta(given: float | None, clients: int, key: str) -> float:
    """Delta, ``1 / clients^1.1`` where none is given.

    Raises:
        RequestError: for what is no less than 1 / clients, which would allow to give one client away.
    """
    if clients < 2:
        raise RequestError(f"{key}: a single client cannot be hidden among others; give data.clients above 1")
    if given is None:
        return clients**-1.1
    if given * clients >= 1:
        raise RequestError(
            f"{key}.delta: {given:g} is no less than 1 / {clients} clients, and would allow that one of them is given"
            f" away; give less, such as {clients**-1.1:.3g}"
        )
    return given


def central(noise: Any, strategy: Any, clients: int, rounds: int) -> Guarantee:
    """What central noise guarantees; ``clients`` can be trained.

    Raises:
        RequestError: for a delta that is too large, a budget that one round exceeds, and a count's noise that is too
            little for the multiplier.
    """
    sampling, chosen = strategy.sampling, delta(noise.delta, clients, "plugins.noise")
    expected = float(sampling.expected(clients))
    rate, population = 1.0, None if isinstance(sampling, All) else clients
    if noise.amplification is not False and amplifies(sampling):
        rate, population = min(1.0, expected / clients), None
    elif noise.amplification is not False and _is_fixed(sampling):
        rate = min(1.0, sampling.size(clients) / clients)
    kind: dict[str, Any] = {
        "sampling_rate": rate,
        "delta": chosen,
        "accountant": noise.accountant,
        "clients": population,
    }
    z = noise.noise_multiplier
    try:
        if z is None:
            assert noise.target_epsilon is not None
            z = accounting.noise_multiplier(epsilon=noise.target_epsilon, rounds=rounds, **kind)
        for plugin in strategy.plugins:
            deviation = plugin.deviation(strategy, expected)
            if deviation is not None and z:
                accounting.noise_on_updates(z, deviation)
    except RequestError as error:
        names = {"epsilon: ": "plugins.noise.target_epsilon: ", "noise_mul": "plugins.noise.noise_mul"}
        lines = [names.get(line[:9], line[:9]) + line[9:] for line in error.problems]
        raise RequestError(lines) from None
    made = Guarantee(noise_multiplier=z, rounds=rounds, budget=noise.target_epsilon, trust="central", **kind)
    if noise.target_epsilon is not None and made.spent(1) > noise.target_epsilon:
        raise RequestError(
            f"plugins.noise.target_epsilon: the first round alone spends {made.spent(1):.8g}, more than"
            f" {noise.target_epsilon:.8g}; give more noise, or leave noise_multiplier out and have it found"
        )
    return made


def local(noise: Any, strategy: Any, clients: int, rounds: int) -> Guarantee:
    """What local noise guarantees each client."""
    chosen = delta(noise.delta, clients, "plugins.local_noise")
    z = noise.noise_multiplier
    if z is None:
        assert noise.epsilon is not None
        z = accounting.gaussian_noise(noise.epsilon, chosen)
    return Guarantee(noise_multiplier=z, rounds=rounds, trust="local", delta=chosen)
