"""Where examples come from. A source is a public function annotated ``-> Source``; its arguments are its settings."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from clients import randomness
from clients.errors import RequestError, nearest
from clients.recipe import Count, NonNegative
from fedsim.data.source import Source


def digits() -> Source:
    """8x8 grey images of handwritten digits, bundled with scikit-learn: ``x`` float32 ``[1797, 64]`` in [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return Source(
        train={"x": (images / 16).astype(np.float32), "y": labels.astype(np.int64)},
        input_range=(0.0, 1.0),
    )


def synthetic(
    *,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 1.0,
    iid: bool = False,
    clients: Count = 30,
    features: Count = 60,
    labels: Count = 10,
    seed: int = 0,
) -> Source:
    """Synthetic(alpha, beta) of Li et al., "Federated optimization in heterogeneous networks", 2020 (FedProx).

    Client ``k`` has ``int(lognormal(4, 2)) + 50`` examples. With ``u ~ N(0, alpha)`` and ``B ~ N(0, beta)`` (both are
    standard deviations, as in the authors' code) its model is ``W ~ N(u, 1)`` ``[features, labels]`` and
    ``b ~ N(u, 1)`` ``[labels]``; its inputs are ``x ~ N(v, diag(j^-1.2))`` with ``v ~ N(B, 1)`` ``[features]``, and
    ``y = argmax(x W + b)``. The first nine tenths of a client's examples (rounded down) are for training; the rest of
    all clients' is the server's test split. The authors' code sets no seed, so their very data cannot be drawn again.

    Args:
        alpha: how much the clients' models differ.
        beta: how much their inputs differ.
        iid: one model ``W, b ~ N(0, 1)`` and inputs around 0 for everyone instead.
        clients: how many; take ``partition = "natural"`` to keep them apart.
        features: length of ``x``.
        labels: classes.
        seed: the experiment's. Each client is drawn from its own keyed generator: of 100, the first 30 are the 30.
    """
    scale = np.arange(1, features + 1) ** -0.6  # the square root of the variances j^-1.2
    shared = randomness.numpy_generator(seed, "synthetic/shared")
    shared_model = shared.normal(size=(features, labels)), shared.normal(size=labels)
    trains, tests, ids = [], [], []
    for client in range(clients):
        draw = randomness.numpy_generator(seed, "synthetic", client=client)
        size = int(draw.lognormal(4, 2)) + 50
        u, B = draw.normal(0, alpha), draw.normal(0, beta)
        v = np.zeros(features) if iid else draw.normal(B, 1, features)
        W, b = shared_model if iid else (draw.normal(u, 1, (features, labels)), draw.normal(u, 1, labels))
        x = v + scale * draw.normal(size=(size, features))
        y = np.argmax(x @ W + b, axis=1)
        # The examples are independent draws, so the authors' shuffle before the cut changes nothing.
        cut = size * 9 // 10
        x = x.astype(np.float32)
        trains.append((x[:cut], y[:cut]))
        tests.append((x[cut:], y[cut:]))
        ids.append(np.full(cut, client))
    return Source(train=_joined(trains), test=_joined(tests), clients=np.concatenate(ids))


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    return {"x": np.concatenate([x for x, _ in parts]), "y": np.concatenate([y for _, y in parts])}


#: Arrays that a file may hold, besides those of the training split.
_OTHERS = ("x_test", "y_test", "x_validation", "y_validation", "x_proxy", "x_root", "y_root", "clients")


def arrays(path: Path) -> Source:
    """Arrays of your own in one ``.npz`` file, written with ``numpy.savez``.

    The file holds ``x`` ``[N, ...]`` and ``y`` ``[N]`` (classes from 0, or real numbers) or ``[N, ...]``; it may hold
    ``x_test`` and ``y_test``, ``x_validation`` and ``y_validation``, ``x_root`` and ``y_root``, ``x_proxy``, and
    ``clients`` ``[N]``, whose each training example is. Real numbers become float32, classes int64; an ``x`` of bytes
    (``uint8``) is an image's pixels and becomes float32 in [0, 1]. Other integers in ``x`` (tokens) become int64.

    Args:
        path: the file; in an experiment file, relative to it.
    """
    where = "data.source.path"
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise RequestError(
                f"{where}: {path} holds one array without a name; write it with numpy.savez(path, x=x, y=y)"
            )
        with file:
            found = {name: _read(file, name, path) for name in _names(file.files, path)}
    except FileNotFoundError:
        raise RequestError(f"{where}: there is no file {path}") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise RequestError(f"{where}: {path} is not an .npz file that can be read ({error})") from None

    pixels = found["x"].dtype == np.uint8
    columns = {name: _column(array, name, path) for name, array in found.items() if name != "clients"}
    return Source(
        train={"x": columns["x"], "y": columns["y"]},
        test=_split(columns, "test"),
        validation=_split(columns, "validation"),
        proxy=_split(columns, "proxy"),
        root=_split(columns, "root"),
        clients=found.get("clients"),
        input_range=(0.0, 1.0) if pixels else None,
    )


def _names(names: list[str], path: Path) -> list[str]:
    """The arrays of a file, once it is known that they are the needed ones and no others."""
    problems = [
        f"data.source.path: {path} has no array {name!r}; it has {', '.join(names) or 'none'}{nearest(name, names)}"
        for name in ("x", "y")
        if name not in names
    ]
    for name in names:
        if name not in ("x", "y", *_OTHERS):
            problems.append(
                f"data.source.path: {path} has an array {name!r}; allowed are x, y, {', '.join(_OTHERS)}"
                f"{nearest(name, _OTHERS)}"
            )
    for split in ("test", "validation", "root"):
        x, y = f"x_{split}", f"y_{split}"
        if (x in names) != (y in names):
            problems.append(f"data.source.path: {path} has only one of {x} and {y}; give both or neither")
    if problems:
        raise RequestError(problems)
    return names


def _read(file: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    try:
        return file[name]
    except ValueError as error:  # numpy refuses pickled objects, which is what ragged rows are saved as
        reason = "holds objects (ragged rows?); pad or crop its rows to one shape" if "bject" in str(error) else error
        raise RequestError(f"data.source.path: {name} of {path} {reason}") from None


def _column(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """An array in the type that training takes, once it is known that its numbers can be used."""
    where = f"data.source.path: {name} of {path}"
    if array.dtype.kind not in "fiub":
        raise RequestError(f"{where} is of {array.dtype}; give numbers")
    if array.dtype.kind == "f":
        # The extremes of an array with NaN are NaN, so this needs no array of flags as large as the data.
        if array.size and not np.isfinite([array.min(), array.max()]).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise RequestError(f"{where} has {array[place]} at {list(place)}; every number must be finite")
        return array.astype(np.float32, copy=False)
    if name.startswith("x"):
        if array.dtype == np.uint8:
            return array.astype(np.float32) / np.float32(255)
        return array.astype(np.float32 if array.dtype == bool else np.int64, copy=False)
    if array.ndim == 1 and array.size and array.min() < 0:
        raise RequestError(
            f"{where} has the class {array.min()} at [{array.argmin()}]; classes count from 0 (real targets are floats)"
        )
    return array.astype(np.int64, copy=False)


def _split(columns: dict[str, np.ndarray], split: str) -> dict[str, np.ndarray] | None:
    found = {name: columns[f"{name}_{split}"] for name in ("x", "y") if f"{name}_{split}" in columns}
    return found or None
