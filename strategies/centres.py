"""Robust rules that weigh rows by their distances: geometric median, centred clipping, norm bounding, FLTrust.

Each has a sibling that says how much every row counts in the result. All iterations happen on the ``[n, n]`` products
of the rows: a result is a combination of rows, and only its coefficients change.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clients.errors import RequestError
from strategies.columns import checked, one_blas_thread, row_of
from strategies.distances import combined, gram, products_with, squared_distances, squared_norms

_EPSILON = float(np.finfo(np.float64).eps)


def geometric_median(
    rows: Tensor, weights: Tensor | None = None, *, tolerance: float = 1e-9, iterations: int = 10_000
) -> Tensor:
    """The minimiser of ``sum_k alpha_k ||z - x_k||`` (Pillutla et al. 2022, "Robust aggregation").

    Weiszfeld's iteration from the mean, ``z <- sum_k b_k x_k / sum_k b_k``, ``b_k = alpha_k / ||z - x_k||``, with a
    Newton step wherever that is better, to convergence: the limit of the paper's smoothed rule for nu -> 0. Where rows
    minimise it themselves (by their subgradient; Vardi and Zhang 2000) the result is that row, or the mean of all that
    do, so that on a line it is the median. Tolerates malicious rows of less than half the weight.

    Args:
        rows: ``[n, d]``, finite.
        weights: ``[n]`` alpha, not negative; left out, all count alike. The paper's are numbers of examples.
        tolerance: where to stop: a step of that share of the rows' median distance.
        iterations: how many at most.

    Returns:
        ``[d]`` in the rows' dtype.

    Raises:
        RequestError: for weights that do not fit, or rows that are not finite.
    """
    return geometric_median_shares(rows, weights, tolerance=tolerance, iterations=iterations)[0]


def geometric_median_shares(
    rows: Tensor, weights: Tensor | None = None, *, tolerance: float = 1e-9, iterations: int = 10_000
) -> tuple[Tensor, Tensor]:
    """:func:`geometric_median`, and the shares of the rows in it: ``float64 [n]``, adding up to 1."""
    array = checked("geometric_median", rows)
    alpha = _weights("geometric_median", weights, len(array))
    square = squared_distances("geometric_median", array)
    shares = np.zeros(len(array))
    best = _minimising_rows(np.sqrt(square), square, alpha)
    if len(best):
        shares[best] = 1 / len(best)
    else:
        medoid = int((np.sqrt(square) @ alpha).argmin())
        products = gram("geometric_median", array, array[medoid])
        with one_blas_thread():
            shares = _weiszfeld(products, alpha, tolerance, iterations)
    return row_of(combined(array, shares), rows), torch.from_numpy(shares)


def centered_clipping(
    rows: Tensor, center: Tensor | None = None, radius: float | None = None, *, iterations: int = 1
) -> Tensor:
    """``v <- v + mean_k (x_k - v) min(1, tau / ||x_k - v||)`` from the last aggregate (Karimireddy et al. 2021).

    Each row moves v by at most tau / n an iteration, so all f malicious ones by at most f tau / n; the guarantee
    is for workers that send momentum, fewer than half of them malicious, and a center that was near the honest rows.
    With an infinite radius it is the mean. Equivariant to shifts together with its center, not to scale.

    Args:
        rows: ``[n, d]``, finite.
        center: ``[d]``, v before the first iteration; left out, zeros, as before the first round.
        radius: tau; left out, the median distance of the rows to v, anew in every iteration.
        iterations: how many.

    Returns:
        ``[d]`` in the rows' dtype.

    Raises:
        RequestError: for a radius that is not above 0, or rows or a center that do not fit or are not finite.
    """
    return centered_clipping_shares(rows, center, radius, iterations=iterations)[0]


def centered_clipping_shares(
    rows: Tensor, center: Tensor | None = None, radius: float | None = None, *, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """:func:`centered_clipping`, and how much of ``x_k - center`` is in it: ``float64 [n]``."""
    array = checked("centered_clipping", rows)
    _check_radius("centered_clipping", radius)
    if iterations < 1:
        raise RequestError(f"centered_clipping.iterations: {iterations} is not at least 1")
    middle = np.zeros_like(array[0])
    if center is not None:
        middle = _one_row("centered_clipping.center", center, array)
    n = len(array)
    if iterations == 1:
        away = np.sqrt(squared_norms("centered_clipping", array, middle))
        shares = _clipped(away, radius) / n
    else:
        products = gram("centered_clipping", array, middle)
        shares = np.zeros(n)
        with one_blas_thread():
            for _ in range(iterations):
                factor = _clipped(_distances(products, shares), radius) / n
                shares = shares * (1 - factor.sum()) + factor
    return row_of(combined(array, shares, middle), rows), torch.from_numpy(shares)


def norm_bounding(rows: Tensor, radius: float | None = None, weights: Tensor | None = None) -> Tensor:
    """``sum_k alpha_k x_k min(1, M / ||x_k||) / sum_k alpha_k`` (Sun et al. 2019, "Can you really backdoor").

    Malicious rows of any number move the result by at most their share of the weight times M. Neither a median of any
    kind nor equivariant: rows are updates, bounded around zero.

    Args:
        rows: ``[n, d]``, finite.
        radius: M; left out, the median norm of these rows.
        weights: ``[n]`` alpha, not negative; left out, all count alike.

    Returns:
        ``[d]`` in the rows' dtype.

    Raises:
        RequestError: for a radius that is not above 0, weights that do not fit, or rows that are not finite.
    """
    return norm_bounding_shares(rows, radius, weights)[0]


def norm_bounding_shares(
    rows: Tensor, radius: float | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`norm_bounding`, and what each row is multiplied by: ``float64 [n]``."""
    array = checked("norm_bounding", rows)
    _check_radius("norm_bounding", radius)
    alpha = _weights("norm_bounding", weights, len(array))
    shares = alpha * _clipped(np.sqrt(squared_norms("norm_bounding", array)), radius)
    return _from_zero(rows, array, shares)


def fltrust(rows: Tensor, root: Tensor) -> Tensor:
    """``sum_k TS_k (||g_0|| / ||g_k||) g_k / sum_k TS_k``, ``TS_k = ReLU(cos(g_k, g_0))`` (Cao et al. 2021, "FLTrust").

    g_0 is the update that the server makes on data of its own. Tolerates any number of malicious rows as long as g_0
    points where honest rows do. A row's length does not matter; where no row is trusted, or g_0 is zero, the result is
    zero.

    Args:
        rows: ``[n, d]`` the clients' updates g_k, finite.
        root: ``[d]`` the server's update g_0.

    Returns:
        ``[d]`` in the rows' dtype.

    Raises:
        RequestError: for rows or a root that do not fit or are not finite.
    """
    return fltrust_shares(rows, root)[0]


def fltrust_shares(rows: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`fltrust`, and ``TS_k / sum TS`` of each row: ``float64 [n]``, zeros where none is trusted."""
    array = checked("fltrust", rows)
    own = _one_row("fltrust.root", root, array)
    norms = np.sqrt(squared_norms("fltrust", array))
    length = float(np.sqrt(squared_norms("fltrust", own[None])[0]))
    known = norms * length > 0
    score = np.zeros(len(array))
    score[known] = products_with("fltrust", array, own)[known] / norms[known] / length
    score = score.clip(0, 1)
    if not score.sum() > 0:
        return torch.zeros_like(rows[0]), torch.zeros(len(array), dtype=torch.float64)
    trust = score / score.sum()
    scaled = np.divide(trust * length, norms, out=np.zeros(len(array)), where=known)
    return _from_zero(rows, array, scaled)[0], torch.from_numpy(trust)


def _minimising_rows(distance: np.ndarray, square: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The rows at which zero is a subgradient: ``||sum_{j not at k} alpha_j u_j|| <= sum_{j at k} alpha_j``.

    u_j are unit vectors from row k: ``u_i . u_j = (D_ki + D_kj - D_ij) / (2 d_ki d_kj)``.
    """
    away = distance > 0
    pull = np.divide(alpha, distance, out=np.zeros_like(distance), where=away)
    with one_blas_thread():
        inner = (pull * square).sum(1) * pull.sum(1) - ((pull @ square) * pull).sum(1) / 2
    here = ~away @ alpha
    return np.flatnonzero((alpha > 0) & (np.sqrt(np.maximum(inner, 0)) <= here * (1 + 1e-9)))


def _weiszfeld(products: np.ndarray, alpha: np.ndarray, tolerance: float, iterations: int) -> np.ndarray:
    """Coefficients of the geometric median from products ``[n, n]`` of rows around one of them; none minimises it."""
    shares = alpha.copy()
    distance = _distances(products, shares)
    # A median, since a far outlier would make the mean distance one of its own.
    scale = float(np.sqrt(np.median(np.diag(products)[alpha > 0])))
    stop, least = tolerance * scale, _EPSILON * scale
    for _ in range(iterations):
        pull = alpha / np.maximum(distance, least)
        fresh = pull / pull.sum()
        after = _distances(products, fresh)
        newton = _newton(products, shares, pull)
        if newton is not None and alpha @ (there := _distances(products, newton)) < alpha @ after:
            fresh, after = newton, there
        moved = fresh - shares
        shares, distance = fresh, after
        if moved @ products @ moved <= stop**2:
            break
    # Once more without Newton: shares that are not negative and add up to 1.
    pull = alpha / np.maximum(distance, least)
    return pull / pull.sum()


def _newton(products: np.ndarray, shares: np.ndarray, pull: np.ndarray) -> np.ndarray | None:
    """One Newton step in the span of the rows; None where its equations cannot be solved.

    The gradient at z is ``sum_k b_k (z - x_k)`` and the Hessian ``sum_k b_k (I - u_k u_k^T)``; ``z - x_k`` has the
    coefficients ``a - e_k``.
    """
    n = len(shares)
    away = shares[:, None] - np.eye(n)
    square = np.maximum(np.einsum("ik,ij,jk->k", away, products, away, optimize=True), np.finfo(np.float64).tiny)
    gradient = away @ pull
    hessian = pull.sum() * np.eye(n) - (away * (pull / square)) @ away.T @ products
    try:
        step = np.linalg.solve(hessian, gradient)
    except np.linalg.LinAlgError:
        return None
    made = shares - step
    return made if np.isfinite(made).all() else None


def _distances(products: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """``||sum_j a_j y_j - y_k||`` for every k, from the products of y."""
    across = products @ shares
    return np.sqrt(np.maximum(shares @ across - 2 * across + np.diag(products), 0))


def _clipped(norms: np.ndarray, radius: float | None) -> np.ndarray:
    bound = float(np.median(norms)) if radius is None else radius
    return np.where(norms > bound, bound / np.where(norms > 0, norms, 1), 1.0)


def _from_zero(rows: Tensor, array: np.ndarray, shares: np.ndarray) -> tuple[Tensor, Tensor]:
    """``sum_k s_k x_k``; for shares that add up to 1 around a row, so that equal rows give that very row."""
    whole = abs(shares.sum() - 1) < 4 * _EPSILON
    made = combined(array, shares, None if whole else np.zeros_like(array[0]))
    return row_of(made, rows), torch.from_numpy(shares)


def _one_row(name: str, row: Tensor, array: np.ndarray) -> np.ndarray:
    if not isinstance(row, Tensor) or row.shape != array.shape[1:]:
        given = list(row.shape) if isinstance(row, Tensor) else type(row).__name__
        raise RequestError(f"{name}: {given} does not fit rows {list(array.shape)}; give [{array.shape[1]}]")
    if not bool(torch.isfinite(row).all()):
        raise RequestError(f"{name}: it holds NaN or infinity")
    return row.detach().cpu().to(torch.float64).numpy().astype(array.dtype, copy=False)


def _check_radius(rule: str, radius: float | None) -> None:
    if radius is not None and not radius > 0:
        raise RequestError(f"{rule}.radius: {radius!r} is not above 0")


def _weights(rule: str, weights: Tensor | None, n: int) -> np.ndarray:
    """``float64 [n]``, adding up to 1."""
    alpha = np.ones(n) if weights is None else torch.as_tensor(weights, dtype=torch.float64).cpu().numpy()
    if alpha.shape != (n,) or not np.isfinite(alpha).all() or (alpha < 0).any() or not alpha.sum() > 0:
        raise RequestError(f"{rule}.weights: they must be {n} finite numbers, none negative and not all zero")
    return alpha / alpha.sum()
