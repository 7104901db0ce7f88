"""Where examples come from. A source is a public function annotated ``-> Source``; its arguments are its settings."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients import randomness
from clients.errors import RequestError, nearest
from clients.recipe import Count, NonNegative
from fedsim.data.arrow import splits_of
from fedsim.data.mapped import is_mapped, mapped_columns
from fedsim.data.pictures import only_classes
from fedsim.data.source import Source
from fedsim.data.tensors import not_finite


def digits(*, classes: Sequence[int] | None = None) -> Source:
    """8x8 grey images of handwritten digits, bundled with scikit-learn: ``x`` float32 ``[1797, 64]`` in [0, 1].

    Args:
        classes: only examples of these, renumbered from 0 in this order.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train = {"x": (images / 16).astype(np.float32), "y": labels.astype(np.int64)}
    return Source(train=only_classes(train, classes, 10), input_range=(0.0, 1.0))


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


#: Arrays that a file or folder may hold, besides those of the training split.
_OTHERS = ("x_test", "y_test", "x_validation", "y_validation", "x_proxy", "x_root", "y_root", "clients")


def arrays(path: Path, *, scan: bool = True) -> Source:
    """Arrays of your own: one ``.npz`` file, written with ``numpy.savez``, or a folder of ``.npy`` files.

    The file holds ``x`` ``[N, ...]`` and ``y`` ``[N]`` (classes from 0, or real numbers) or ``[N, ...]``; it may hold
    ``x_test`` and ``y_test``, ``x_validation`` and ``y_validation``, ``x_root`` and ``y_root``, ``x_proxy``, and
    ``clients`` ``[N]``, whose each training example is. A folder has the same as ``x.npy``, ``y.npy`` and so on; its
    files may be larger than memory, since of arrays of more than one number an example only the rows that are asked for
    are read. Real numbers become float32, classes int64; an ``x`` of bytes (``uint8``) is an image's pixels, which stay
    bytes until they are taken as float32 in [0, 1]. Other integers in ``x`` (tokens) become int64.

    Args:
        path: the file or folder; in an experiment file, relative to it.
        scan: whether to look through all numbers for NaN and infinities first.
    """
    found: dict[str, Any] = _folder(path) if path.is_dir() else _file(path)
    for name, array in found.items():
        _check(array, name, path, scan)
    types = {name: _type(array, name) for name, array in found.items()}
    columns = {
        name: array if is_mapped(array) else array.astype(types[name], copy=False)
        for name, array in found.items()
        if name != "clients"
    }
    return Source(
        train=_split(columns, types, ""),
        test=_split(columns, types, "_test"),
        validation=_split(columns, types, "_validation"),
        proxy=_split(columns, types, "_proxy"),
        root=_split(columns, types, "_root"),
        clients=np.array(found["clients"]) if "clients" in found else None,
        input_range=(0.0, 1.0) if found["x"].dtype == np.uint8 else None,
        scan=False,
    )


def _file(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file."""
    where = "data.source.path"
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise RequestError(
                f"{where}: {path} holds one array without a name; write it with numpy.savez(path, x=x, y=y)"
            )
        with file:
            return {name: _read(file, name, path) for name in _names(file.files, path)}
    except FileNotFoundError:
        raise RequestError(f"{where}: there is no file {path}") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise RequestError(f"{where}: {path} is not an .npz file that can be read ({error})") from None


def _folder(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder of .npy files, mapped."""
    found = {}
    for name in _names(sorted(file.stem for file in path.glob("*.npy")), path):
        file = path / f"{name}.npy"
        try:
            found[name] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            reason = _RAGGED if "bject" in str(error) else f"is not an .npy file that can be mapped ({error})"
            raise RequestError(f"data.source.path: {name} of {path} {reason}") from None
    return found


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


#: What numpy refuses to read: pickled objects, which is what ragged rows are saved as.
_RAGGED = "holds objects (ragged rows?); pad or crop its rows to one shape"


def _read(file: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    try:
        return file[name]
    except ValueError as error:
        raise RequestError(
            f"data.source.path: {name} of {path} {_RAGGED if 'bject' in str(error) else error}"
        ) from None


def _check(array: np.ndarray, name: str, path: Path, scan: bool) -> None:
    """Refuses an array whose numbers cannot be used."""
    where = f"data.source.path: {name} of {path}"
    if array.dtype.kind not in "fiub":
        raise RequestError(f"{where} is of {array.dtype}; give numbers")
    if array.ndim == 0:
        raise RequestError(f"{where} is a single number; give one value an example, [N, ...]")
    if not len(array):
        raise RequestError(f"{where} is empty; give at least one example")
    if array.dtype.kind == "f" and scan:
        wrong = not_finite(array, torch.float32)
        if wrong is not None:
            raise RequestError(f"{where} has {wrong}")
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size and array.max() > np.iinfo(np.int64).max:
        raise RequestError(f"{where} has {array.max()}, which is too large for int64")
    if name.startswith("y") and array.dtype.kind == "i" and array.ndim == 1 and array.min() < 0:
        raise RequestError(
            f"{where} has the class {array.min()} at [{array.argmin()}]; classes count from 0 (real targets are floats)"
        )


def _type(array: np.ndarray, name: str) -> type:
    """The type that training takes."""
    if array.dtype.kind == "f" or (name.startswith("x") and array.dtype == bool):
        return np.float32
    return np.uint8 if name.startswith("x") and array.dtype == np.uint8 else np.int64


def _split(columns: dict[str, Any], types: dict[str, type], suffix: str) -> Any:
    """The columns of a split, by the suffix of its arrays' names; None where there are none."""
    found = {name: columns[name + suffix] for name in ("x", "y") if name + suffix in columns}
    if not any(is_mapped(array) for array in found.values()):
        return found or None
    lengths = {name: len(array) for name, array in found.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name}{suffix} {length}" for name, length in lengths.items())
        raise RequestError(f"data.source.path: columns differ in length ({said})")
    return mapped_columns(found, {name: types[name + suffix] for name in found})


def huggingface(path: Path, *, x: str | None = None, label: str | None = None) -> Source:
    """A Hugging Face data set that was saved with ``save_to_disk``: a ``Dataset``, or a ``DatasetDict`` of splits.

    Splits are ``train``, ``test`` and ``validation``. The input becomes ``x`` and the label ``y``. Images are decoded
    to bytes ``[C, H, W]`` and are float32 in [0, 1] when they are taken; they must have one shape. Columns of text are
    left out.

    Args:
        path: the folder; in an experiment file, relative to it.
        x: the column of inputs; left out, ``x``, or the only image, or the only array.
        label: the column of labels; left out, ``y`` or ``label``, or the only ``ClassLabel``.
    """
    try:
        from datasets import load_from_disk
    except ImportError:
        raise RequestError(
            'data.source: huggingface needs datasets, which is not installed; pip install "fedsim[datasets]"'
        ) from None
    try:
        given = load_from_disk(str(path))
    except Exception as error:
        said = " ".join(str(error).split())
        raise RequestError(
            f"data.source.path: {path} is no data set that save_to_disk wrote ({type(error).__name__}: {said})"
        ) from None
    return Source(**splits_of(given, "data.source", x, label))
