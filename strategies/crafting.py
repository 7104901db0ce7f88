"""Updates that malicious clients make up, as pure functions of a round's updates.

From the honest clients' updates, ``rows [n - m, d]``, or from what the attackers would honestly have sent,
``own [m, d]``, to the rows ``[m, d]`` that the ``m`` attackers among ``n`` clients send. All keep the dtype, add up in
float64, and change no input.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clients.errors import RunError
from strategies.columns import checked, each_block, one_blas_thread, row_of
from strategies.distances import gram, squared_norms

#: Of the clients that the attackers need on their side, whose share the bound is of: the honest ones, or all.
Variant = Literal["arxiv", "paper"]

#: Where a crafted update leaves the honest mean mu to: ``-s``, ``-sign(mu)`` or ``-mu / ||mu||``.
Direction = Literal["std", "sign", "unit"]

Score = Literal["max", "min"]

#: Rows as far out as this, relative to the farthest, are as far: of two rows each is, and rounding must not choose.
_AS_FAR = 1 - 1e-9


def alie_z(clients: int, num_malicious: int, variant: Variant = "arxiv") -> float:
    """How many standard deviations "A little is enough" leaves the mean by.

    With ``s = floor(n / 2 + 1) - m`` honest clients the attackers are a majority; ``z`` is where so many of a normal
    distribution lie farther out: ``ppf((n - m - s) / (n - m))`` as in the preprint and most code, or
    ``ppf((n - s) / n)``. Below 0 where the attackers are so few that even the mean has too few beyond it. Attackers
    that are a majority by themselves have no bound; they take that of a single honest client.

    Args:
        clients: n, the attackers included.
        num_malicious: m, below n.
        variant: which of the two.
    """
    honest = clients - num_malicious
    if num_malicious < 0 or honest < 1:
        raise RunError(f"alie: {num_malicious} malicious of {clients} clients leave no honest one to hide behind")
    wanted = max(clients // 2 + 1 - num_malicious, 1)
    share = (honest - wanted) / honest if variant == "arxiv" else (clients - wanted) / clients
    # Two clients, one of them honest: nobody can be beyond the mean, and there is no spread either.
    return NormalDist().inv_cdf(share) if share > 0 else 0.0


def alie(rows: Tensor, num_malicious: int, *, z: float | None = None, variant: Variant = "arxiv") -> Tensor:
    """``mu - z s`` in every coordinate (Baruch, Baruch and Goldberg 2019, "A little is enough").

    Args:
        rows: ``[n - m, d]`` honest updates; mu is their mean, s their sample standard deviation (0 of a single row).
        num_malicious: m.
        z: left out, :func:`alie_z`.
        variant: of :func:`alie_z`.
    """
    array = checked("alie", rows, num_malicious)
    far = alie_z(len(rows) + num_malicious, num_malicious, variant) if z is None else z
    mu = _mean(array)
    return _alike(mu - far * _spread(array, mu), rows, num_malicious)


def ipm(rows: Tensor, num_malicious: int, *, eps: float = 0.5) -> Tensor:
    """``-eps mu`` (Xie, Koyejo and Gupta 2020, "Fall of empires: inner product manipulation").

    The mean of all becomes ``((n - m) - m eps) / n mu``: it points against mu if and only if ``eps > (n - m) / m``.
    A small eps is for rules that choose among rows, which it gets close to.
    """
    return _alike(-eps * _mean(checked("ipm", rows, num_malicious)), rows, num_malicious)


def min_max(rows: Tensor, num_malicious: int, *, direction: Direction = "std") -> Tensor:
    """No farther from any honest update than two of them are apart (Min-Max; Shejwalkar and Houmansadr 2021).

    ``mu + gamma p`` with the largest gamma such that ``max_i ||mu + gamma p - x_i|| <= max_ij ||x_i - x_j||``. With
    ``c_i = x_i - mu`` each i is a parabola in gamma, ``||c_i||^2 - 2 gamma <p, c_i> + gamma^2 ||p||^2``, at most the
    squared bound at 0; gamma is the smallest of their upper roots, exact where a search would stop at a tolerance.

    Args:
        rows: ``[n - m, d]`` honest updates.
        num_malicious: m.
        direction: p.
    """
    array = checked("min_max", rows, num_malicious)
    mu, p = _leaving(array, direction)
    square = _square(p)
    if square == 0:
        return _alike(mu, rows, num_malicious)
    products, along = gram("min_max", array, mu), _along(array, mu, p)
    squares = np.diag(products)
    bound = (squares[:, None] + squares[None, :] - 2 * products).max()
    room = np.maximum(bound - squares, 0)
    root = np.sqrt(along**2 + square * room)
    # Of the two ways to write a root, that which subtracts nothing of the same sign; 0 / 0 is a root at 0.
    upper = np.where(along > 0, (along + root) / square, room / np.maximum(root - along, np.finfo(np.float64).tiny))
    return _alike(mu + upper.min() * p, rows, num_malicious)


def min_sum(rows: Tensor, num_malicious: int, *, direction: Direction = "std", score: Score = "max") -> Tensor:
    """As far from the honest updates in sum as one of them is (Min-Sum; Shejwalkar and Houmansadr 2021).

    ``mu + gamma p`` with the largest gamma such that ``sum_i ||mu + gamma p - x_i||^2 <= max_i sum_j ||x_i - x_j||^2``.
    Every such sum is ``(n - m) (||x - mu||^2 + mean_j ||x_j - mu||^2)``, so ``gamma ||p|| = max_i ||x_i - mu||``.

    Args:
        rows: ``[n - m, d]`` honest updates.
        num_malicious: m.
        direction: p.
        score: whose sum is the bound: the largest as in the paper, or the smallest as in the code released with it.
    """
    array = checked("min_sum", rows, num_malicious)
    mu, p = _leaving(array, direction)
    squares, square = squared_norms("min_sum", array, mu), _square(p)
    gamma = math.sqrt((squares.max() if score == "max" else squares.min()) / square) if square else 0.0
    return _alike(mu + gamma * p, rows, num_malicious)


def mimic(rows: Tensor, num_malicious: int, *, position: int | None = None) -> Tensor:
    """Copies of one honest update, which so counts m + 1 times (Karimireddy, He and Jaggi 2022, "Bucketing").

    Args:
        rows: ``[n - m, d]`` honest updates.
        num_malicious: m.
        position: whose; left out, :func:`standing_out`.
    """
    checked("mimic", rows, num_malicious)
    return rows[standing_out(rows) if position is None else position].repeat(num_malicious, 1)


def standing_out(rows: Tensor) -> int:
    """The row farthest from the mean along the direction in which the rows differ most; the first where several are.

    The top eigenvector of the centred rows' Gram matrix holds their coordinates along it, up to a factor.
    """
    array = checked("mimic", rows)
    with one_blas_thread():
        values, vectors = np.linalg.eigh(gram("mimic", array, _mean(array)))
    far = np.abs(vectors[:, -1]) * max(values[-1], 0)
    return int(np.argmax(far >= _AS_FAR * far.max()))


def sign_flip(rows: Tensor, num_malicious: int, *, own: Tensor | None = None) -> Tensor:
    """``-g``, each attacker its own update; without them ``-mu``, the honest mean: two attacks that share a name.

    Args:
        rows: ``[n - m, d]`` honest updates; not looked at where ``own`` is given.
        num_malicious: m.
        own: ``[m, d]`` what the attackers would honestly have sent.
    """
    return ipm(rows, num_malicious, eps=1.0) if own is None else -own


def scaled(own: Tensor, *, kappa: float = 10.0) -> Tensor:
    """``-kappa g``, each attacker its own update ``[m, d]``."""
    return _times(own, -kappa)


def gaussian(own: Tensor, *, std: float, generator: torch.Generator) -> Tensor:
    """``N(0, std^2)`` in place of every number of the updates ``[m, d]``; not of the weights."""
    return torch.empty_like(own).normal_(0, std, generator=generator)


def model_replacement(own: Tensor, *, share: float, server_lr: float = 1.0) -> Tensor:
    """``(x_adv - x) / (eta share)``: the server's step makes x_adv of its weights (Bagdasaryan et al. 2020).

    Exact for a mean where the other updates are zero, as they nearly are once training has converged.

    Args:
        own: ``[m, d]`` what the attackers' training gave, ``x_adv - x``.
        share: what the attackers together count in the server's mean: ``m / n``, so that one of them alone sends
            the paper's ``n / eta (x_adv - x)``, and several the mean of theirs.
        server_lr: eta, by which the server multiplies the mean.
    """
    if not 0 < share <= 1 or not server_lr > 0:
        raise RunError(f"model_replacement: a share of {share} at a server_lr of {server_lr} moves no weights")
    return _times(own, 1 / (server_lr * share))


def _mean(array: np.ndarray) -> np.ndarray:
    """``float64 [d]``; of equal rows, that very row."""
    mu = np.empty(array.shape[1])

    def work(columns: slice) -> None:
        block = array[:, columns].astype(np.float64)
        mu[columns] = block[0] + (block - block[0]).mean(0)

    for _ in each_block(array.shape, work):
        pass
    return mu


def _spread(array: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """Sample standard deviation of every column, ``float64 [d]``; of a single row, 0."""
    s = np.empty_like(mu)

    def work(columns: slice) -> None:
        block = np.subtract(array[:, columns], mu[columns], dtype=np.float64)
        s[columns] = np.sqrt((block**2).sum(0) / max(len(array) - 1, 1))

    for _ in each_block(array.shape, work):
        pass
    return s


def _along(array: np.ndarray, mu: np.ndarray, p: np.ndarray) -> np.ndarray:
    """``<p, x_i - mu>``, ``float64 [n]``."""

    def work(columns: slice) -> np.ndarray:
        return np.subtract(array[:, columns], mu[columns], dtype=np.float64) @ p[columns]

    return np.sum(list(each_block(array.shape, work)), axis=0)


def _leaving(array: np.ndarray, direction: Direction) -> tuple[np.ndarray, np.ndarray]:
    """The honest mean, and the direction in which to leave it (zero where it has none), ``float64 [d]`` each."""
    mu = _mean(array)
    if direction == "std":
        return mu, -_spread(array, mu)
    norm = math.sqrt(_square(mu))
    return mu, -np.sign(mu) if direction == "sign" or norm == 0 else -mu / norm


def _square(row: np.ndarray) -> float:
    """``||row||^2``, not by BLAS, whose sum depends on how many threads it has."""
    return float((row**2).sum())


def _alike(row: np.ndarray, rows: Tensor, num_malicious: int) -> Tensor:
    """One row for every attacker, ``[m, d]`` as the rows are."""
    return row_of(row, rows).repeat(num_malicious, 1)


def _times(own: Tensor, factor: float) -> Tensor:
    return (own.to(torch.float64) * factor).to(own.dtype)
