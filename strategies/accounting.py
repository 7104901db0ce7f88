"""What noise costs in privacy: epsilon from noise, and noise from epsilon.

Every figure is an upper bound of epsilon at the delta asked for. Noise multipliers are standard deviations over the
clipping norm C. Which neighbours a figure speaks of:

- ``add or remove one``: one client more or less; the clipped sum moves by C. Poisson sampling, or none.
- ``replace one``: one client's data become any other; the clipped sum moves by 2 C. Cohorts of a fixed size.
- ``replace one by nothing``: one client is chosen and sends nothing; the clipped sum moves by C. Cohorts of a fixed
  size, of which the sampling earns nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clients.errors import RequestError, nearest

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Accountant = Literal["pld", "rdp"]
Relation = Literal["add or remove one", "replace one", "replace one by nothing"]

#: Renyi orders: low ones for little noise and few releases, high ones for much noise.
_ORDERS = (
    *(1.02, 1.03, 1.04, 1.05, 1.06, 1.08),
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *range(11, 64),
    *(round(64 * 1.2**step) for step in range(20)),
)
#: Fewer for sampling without replacement, where an order takes time by its square up to 256, and by itself above.
_FIXED_ORDERS = (
    *(order for order in _ORDERS if order < 25),
    *(28, 32, 38, 46, 55, 66, 80, 96, 115),
    *(order for order in _ORDERS if order > 256),
)
#: Distance of the points that privacy losses are rounded to, unless the losses are much smaller or larger.
_INTERVAL = 1e-3
#: Noise of less hides nothing: the formulas' terms would overflow.
_NOTHING = 1e-50
#: Between which noise multipliers a budget is met.
_LEAST, _LARGEST = 1e-3, 1e6
#: How far above the least noise multiplier an answer may be, relatively.
_TOLERANCE = 1e-4


def epsilon(
    *,
    noise_multiplier: float,
    sampling_rate: float = 1.0,
    rounds: int,
    delta: float,
    accountant: Accountant = "pld",
    clients: int | None = None,
    relation: Relation | None = None,
) -> float:
    """Epsilon of ``rounds`` releases of a clipped sum with Gaussian noise.

    ``pld`` composes privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022, "Connect the dots") on a
    grid that rounds losses up: at distance 1e-3, finer by powers of two where one release loses less than that, coarser
    where the grid would grow beyond some 100,000 points. Without sampling it is exact (:func:`gaussian_epsilon`). It is
    never more than ``rdp`` gives, or than what no sampling would cost; and that alone counts where a grid is no use:
    for noise that barely hides anything (epsilon in the hundred thousands), beyond a million rounds, and for a delta so
    small that the grid's rounding errors (1e-14 and 1e-16 a round, which are taken off delta) are a thousandth of it.

    ``rdp`` composes Renyi divergences (Mironov 2017; under sampling Mironov, Talwar and Zhang 2019), converted as by
    Canonne, Kamath and Steinke (2020): looser, and faster.

    With ``clients``, every round has exactly ``sampling_rate * clients`` of them, drawn without replacement: the lesser
    of the Renyi bound under ``replace one`` (Wang, Balle and Kasiviswanathan 2019) and of no amplification under
    ``replace one by nothing``; :func:`relation` says which.

    Args:
        noise_multiplier: standard deviation of the noise on the sum, over C.
        sampling_rate: chance of each client to be in a round; 1 where all are, or where sampling shall earn nothing.
        rounds: releases, also those of rounds in which nobody took part.
        delta: of (epsilon, delta).
        accountant: ``pld`` or ``rdp``.
        clients: how many clients cohorts of a fixed size are drawn from; left out, Poisson sampling.
        relation: with ``clients``, the one to go by; left out, the lesser bound.

    Returns:
        0 before the first release, infinity without noise.

    Raises:
        RequestError: for numbers that mean nothing.
    """
    check(noise_multiplier, sampling_rate, rounds, delta, accountant, clients)
    if relation is None and clients is not None:
        bounds = [_fixed(noise_multiplier, sampling_rate, rounds, delta, accountant, clients, each) for each in _FIXED]
        return min(bounds)
    known = ("add or remove one",) if clients is None else _FIXED
    if relation not in (None, *known):
        kind = "Poisson sampling" if clients is None else "cohorts of a fixed size"
        raise RequestError(f"relation: {relation!r} does not go with {kind}; give {' or '.join(map(repr, known))}")
    if clients is not None and relation is not None:
        return _fixed(noise_multiplier, sampling_rate, rounds, delta, accountant, clients, relation)
    return _poisson(noise_multiplier, sampling_rate, rounds, delta, accountant)


def relation(
    *,
    noise_multiplier: float,
    sampling_rate: float = 1.0,
    rounds: int,
    delta: float,
    accountant: Accountant = "pld",
    clients: int | None = None,
) -> Relation:
    """Which neighbours :func:`epsilon` of the same arguments speaks of."""
    check(noise_multiplier, sampling_rate, rounds, delta, accountant, clients)
    if clients is None:
        return "add or remove one"
    bounds = {r: _fixed(noise_multiplier, sampling_rate, rounds, delta, accountant, clients, r) for r in _FIXED}
    return min(_FIXED, key=lambda name: bounds[name])


def noise_multiplier(
    *,
    epsilon: float,
    sampling_rate: float = 1.0,
    rounds: int,
    delta: float,
    accountant: Accountant = "pld",
    clients: int | None = None,
) -> float:
    """The least noise multiplier that keeps ``rounds`` releases within ``epsilon``.

    Args:
        epsilon: the budget; the others as in :func:`epsilon`.

    Returns:
        At most 1e-4 (relative) above the least, and always one whose own :func:`epsilon` is within the budget.

    Raises:
        RequestError: for numbers that mean nothing, and for a budget that no noise meets, or any noise.
    """
    check(1.0, sampling_rate, rounds, delta, accountant, clients)
    _above(epsilon, "epsilon", math.inf)
    if not rounds:
        raise RequestError("rounds: no release costs nothing, whatever the noise; give at least 1")

    return _calibrated(epsilon, sampling_rate, rounds, delta, accountant, clients)


@lru_cache(maxsize=256)
def _calibrated(
    epsilon: float, rate: float, rounds: int, delta: float, accountant: Accountant, clients: int | None
) -> float:
    def excess(log_z: float) -> float:
        spent = _spent(math.exp(log_z), rate, rounds, delta, accountant, clients)
        return math.log(spent / epsilon) if spent else -math.inf

    # Without amplification it is known; sampling needs no more noise, Renyi divergences a little.
    exact = min(max(gaussian_noise(epsilon, delta) * math.sqrt(rounds) * (1 + 1e-9), _LEAST), _LARGEST)
    low = high = math.log(exact)
    above = below = excess(high)
    if below <= 0 and rate == 1 and accountant == "pld" and exact > _LEAST:
        return exact
    while below > 0:
        low, above = high, below
        if high >= math.log(_LARGEST):
            raise RequestError(
                f"epsilon: {epsilon:g} takes a noise_multiplier above {_LARGEST:g}; ask for a larger epsilon or delta"
            )
        high = min(high + math.log(2), math.log(_LARGEST))
        below = excess(high)
    while above <= 0:
        high, below = low, above
        if low <= math.log(_LEAST):
            raise RequestError(
                f"epsilon: {epsilon:g} is met by a noise_multiplier of {_LEAST:g} already, which hides nothing; give a"
                " smaller epsilon or delta"
            )
        low = max(low - math.log(4), math.log(_LEAST))
        above = excess(low)
    return math.exp(_bracketed(excess, low, above, high, below))


def _bracketed(excess: Any, low: float, above: float, high: float, below: float) -> float:
    """Narrows ``[low, high]``, with ``above > 0 >= below`` there, and returns the upper end.

    Secant steps, each a hair towards the farther end so that both ends close in; halving wherever that is slow.
    """
    width = math.inf
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        if math.isfinite(above) and math.isfinite(below) and high - low <= 0.6 * width:
            root = low + (high - low) * above / (above - below)
            middle = root + 0.4 * _TOLERANCE * (1 if high - root > root - low else -1)
            middle = min(max(middle, low + 0.1 * _TOLERANCE), high - 0.1 * _TOLERANCE)
            width = high - low
        else:
            width = math.inf
        at = excess(middle)
        if at > 0:
            low, above = middle, at
        else:
            high, below = middle, at
    return high


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Epsilon of one release with Gaussian noise: exact (Balle and Wang 2018, "Improving the Gaussian mechanism").

    Args:
        noise_multiplier: standard deviation over the sensitivity; T releases are one with ``z / sqrt(T)``.
        delta: of (epsilon, delta).
    """
    _at_least(noise_multiplier, "noise_multiplier")
    _below_one(delta)
    return _gaussian_epsilon(noise_multiplier, delta)


def gaussian_noise(epsilon: float, delta: float) -> float:
    """The noise multiplier of one release within ``epsilon``: :func:`gaussian_epsilon` the other way round.

    Unlike the classical ``sqrt(2 ln(1.25 / delta)) / epsilon`` it holds for every epsilon.
    """
    _above(epsilon, "epsilon", math.inf)
    _below_one(delta)
    from dp_accounting import get_sigma_gaussian

    with np.errstate(divide="ignore"):
        return float(get_sigma_gaussian(epsilon, delta))


def noise_on_updates(noise_multiplier: float, count_noise: float) -> float:
    """The noise multiplier left for updates when a noisy count is released beside them: ``(z^-2 - (2 s)^-2)^(-1/2)``.

    Andrew et al. 2021, "Differentially private learning with adaptive clipping", Theorem 1: one client moves the count
    of those below the norm, less half a client each, by 1/2; the two releases together cost what ``z`` alone does.

    Args:
        noise_multiplier: z, of both together.
        count_noise: s, standard deviation of the noise on the count, in clients.
    """
    _at_least(noise_multiplier, "noise_multiplier")
    _at_least(count_noise, "count_noise")
    if not noise_multiplier:
        return 0.0
    if noise_multiplier >= 2 * count_noise:
        raise RequestError(
            f"noise_multiplier: {noise_multiplier:g} is infeasible beside a count with noise of {count_noise:g}, which"
            f" costs more by itself; go below {2 * count_noise:g}, or raise the count's noise or the cohort"
        )
    return (noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5


_FIXED: tuple[Relation, ...] = ("replace one by nothing", "replace one")


def _spent(z: float, rate: float, rounds: int, delta: float, accountant: Accountant, clients: int | None) -> float:
    if clients is None:
        return _poisson(z, rate, rounds, delta, accountant)
    return min(_fixed(z, rate, rounds, delta, accountant, clients, relation) for relation in _FIXED)


@lru_cache(maxsize=1 << 14)
def _fixed(
    z: float, rate: float, rounds: int, delta: float, accountant: Accountant, clients: int, relation: Relation
) -> float:
    if relation == "replace one by nothing":
        return _poisson(z, 1.0, rounds, delta, accountant)
    if not rounds or z < _NOTHING:
        return math.inf if rounds else 0.0
    # Replacing a client moves the sum by 2 C, and the accountant's multiplier is over how far the sum moves.
    return _converted(_divergences(z / 2, rate, clients), _FIXED_ORDERS, rounds, delta)


@lru_cache(maxsize=1 << 14)
def _poisson(z: float, rate: float, rounds: int, delta: float, accountant: Accountant) -> float:
    if not rounds or z < _NOTHING:
        return math.inf if rounds else 0.0
    if accountant == "rdp":
        return _converted(_divergences(z, rate, None), _ORDERS, rounds, delta)
    exact = _gaussian_epsilon(z / math.sqrt(rounds), delta)
    if rate == 1:
        return exact
    bound = min(exact, _converted(_divergences(z, rate, None), _ORDERS, rounds, delta))
    # Convolution by Fourier transforms leaves errors of either sign, which grow with the rounds: measured, up to half
    # as large.
    error = 1e-14 + 1e-16 * rounds
    interval = _interval(z, rate, bound)
    if delta < 1000 * error or interval > 1 or rounds > 10**6:
        return bound
    composed = _losses(z, rate, interval).self_compose(rounds)
    with np.errstate(over="ignore"):  # infinity is meant
        return min(bound, float(composed.get_epsilon_for_delta(delta - error)))


def _interval(z: float, rate: float, bound: float) -> float:
    """The grid's distance, 1e-3 times a power of two: each coarser grid lies on the finer ones, so that more rounds
    never cost less.

    Args:
        bound: what epsilon is at most.
    """
    exponent = 0.5 / z**2 + 10 / z  # the largest loss without sampling, but for a chance of e^-50
    largest = exponent + math.log(rate) if exponent > 50 else math.log1p(rate * math.expm1(exponent))
    deviation = min(1 / z, rate * math.sqrt(math.expm1(min(z**-2, 50.0))))
    fine = min(_INTERVAL, deviation / 8)
    coarse = max(bound / 2**17, largest / 2**15)
    power = max(math.floor(math.log2(fine / _INTERVAL)), math.ceil(math.log2(coarse / _INTERVAL)))
    return _INTERVAL * 2.0**power


@lru_cache(maxsize=32)
def _losses(z: float, rate: float, interval: float) -> PrivacyLossDistribution:
    """The privacy loss distribution of one release, both adding and removing."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        z, sampling_prob=rate, value_discretization_interval=interval
    )


@lru_cache(maxsize=256)
def _divergences(z: float, rate: float, clients: int | None) -> tuple[float, ...]:
    """Renyi divergences of one release at each order; infinite where the order is of no use."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    release: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(z)
    orders: tuple[float, ...] = _ORDERS
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    if clients is not None:
        orders = _FIXED_ORDERS
        relation = dp_accounting.NeighboringRelation.REPLACE_ONE
        release = dp_accounting.SampledWithoutReplacementDpEvent(clients, _sample(rate, clients), release)
    elif rate < 1:
        release = dp_accounting.PoissonSampledDpEvent(rate, release)
    accountant = RdpAccountant(orders, relation)
    with _quiet():
        accountant.compose(release)
    # Divergences of many releases add. The accountant has no public way to them, and would compute them every time.
    return tuple(float(divergence) for divergence in accountant._rdp)


def _converted(divergences: tuple[float, ...], orders: tuple[float, ...], rounds: int, delta: float) -> float:
    from dp_accounting.rdp import rdp_privacy_accountant

    total = [rounds * max(divergence, 0.0) for divergence in divergences]
    return float(rdp_privacy_accountant.compute_epsilon(orders, total, delta)[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the accountant from warning of each order that does not converge, and that it leaves out."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _gaussian_epsilon(z: float, delta: float) -> float:
    if z < _NOTHING:
        return math.inf
    from dp_accounting import get_epsilon_gaussian

    # Where noise leaves nothing to tell apart, its logarithm of 0 is meant.
    with np.errstate(divide="ignore"):
        return float(get_epsilon_gaussian(z, delta))


def _sample(rate: float, clients: int) -> int:
    return round(rate * clients)


def check(z: float, rate: float, rounds: int, delta: float, accountant: str, clients: int | None) -> None:
    """Refuses numbers that mean nothing, see :func:`epsilon`: ``z`` is the noise multiplier, ``rate`` of sampling."""
    _at_least(z, "noise_multiplier")
    _above(rate, "sampling_rate", 1.0)
    _whole(rounds, "rounds", 0)
    _below_one(delta)
    if accountant not in ("pld", "rdp"):
        raise RequestError(
            f"accountant: {accountant!r} is unknown{nearest(str(accountant), ('pld', 'rdp'))}; give 'pld' or 'rdp'"
        )
    if clients is not None:
        _whole(clients, "clients", 1)
        if not math.isclose(rate * clients, max(_sample(rate, clients), 1), rel_tol=1e-6):
            raise RequestError(
                f"sampling_rate: {rate:g} of {clients} clients is {rate * clients:g}, which is no number of clients;"
                " give a fixed cohort's size over the number of clients"
            )


def _at_least(value: float, name: str) -> None:
    if not (_number(value) and 0 <= value < math.inf):
        raise RequestError(f"{name}: {value!r} is no number from 0; give a finite one")


def _above(value: float, name: str, most: float) -> None:
    if not (_number(value) and 0 < value <= most and math.isfinite(value)):
        end = f" up to {most:g}" if math.isfinite(most) else ""
        raise RequestError(f"{name}: {value!r} is out of range; give a finite number above 0{end}")


def _below_one(delta: float) -> None:
    if not (_number(delta) and 0 < delta < 1):
        raise RequestError(f"delta: {delta!r} is out of range; give a number between 0 and 1, below 1 / clients")


def _whole(value: int, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise RequestError(f"{name}: {value!r} is no whole number from {least}")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


__all__ = [
    "Accountant",
    "Relation",
    "check",
    "epsilon",
    "gaussian_epsilon",
    "gaussian_noise",
    "noise_multiplier",
    "noise_on_updates",
    "relation",
]
