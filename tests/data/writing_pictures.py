"""Small picture data sets in the very formats of their authors' files, for tests."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np


def some_images(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    """LeCun's format: two zero bytes, 8 for unsigned bytes, the number of dimensions, their sizes, the values."""
    array = np.asarray(array, dtype=np.uint8)
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: Any, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        path, data = folder / f"{prefix}-{kind}-ubyte", idx(array)
        if packed:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data))
        else:
            path.write_bytes(data)


def write_mnist(
    root: Path, name: str = "MNIST", train: Any = (0, 1, 2, 9, 1, 2), test: Any = (1, 2, 0), packed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Both splits below ``root``, with these labels; the images of each."""
    splits = some_images(len(train), 28, 28), some_images(len(test), 28, 28, seed=1)
    for prefix, images, labels in zip(("train", "t10k"), splits, (train, test), strict=True):
        write_idx(root / name / "raw", prefix, images, labels, packed)
    return splits


def python2_pickle(**entries: Any) -> bytes:
    """A dict as cPickle of Python 2 wrote it (protocol 2, strings as bytes), arrays as numpy 1 did."""
    return b"\x80\x02}(" + b"".join(_string(key) + _value(value) for key, value in entries.items()) + b"u."


def _string(text: str) -> bytes:
    return b"U" + bytes([len(text)]) + text.encode("latin1")


def _whole(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list):
        return b"](" + b"".join(_string(one) if isinstance(one, str) else _whole(one) for one in value) + b"e"
    dtype = b"cnumpy\ndtype\n" + _string("u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + _string("|") + b"NNN" + _whole(-1) + _whole(-1) + b"K\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _string("b") + b"\x87R"
    shape = _whole(value.shape[0]) + _whole(value.shape[1]) + b"\x86"
    raw = value.tobytes()
    return made + b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"


def write_cifar10(root: Path, protocol: int | None = None, batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Six batches as Python 2 wrote them, or by this Python's protocol; the images and labels of the training split."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = some_images(6 * batch, 3, 32, 32), np.arange(6 * batch) % 10
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        own = slice(number * batch, (number + 1) * batch)
        entry = {"batch_label": name, "labels": labels[own].tolist(), "data": images[own].reshape(batch, -1)}
        (folder / name).write_bytes(python2_pickle(**entry) if protocol is None else pickle.dumps(entry, protocol))
    return images[: 5 * batch], labels[: 5 * batch]


def write_cifar100(root: Path, fine: Any = (0, 99, 5), coarse: Any = (4, 13, 19)) -> np.ndarray:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    images = some_images(len(fine), 3, 32, 32)
    for name in ("train", "test"):
        data = images.reshape(len(fine), -1)
        entry = {"filenames": ["a.png"] * len(fine), "fine_labels": list(fine), "coarse_labels": list(coarse)}
        (folder / name).write_bytes(python2_pickle(**entry, data=data))
    return images


def write_svhn(root: Path, labels: Any = (10, 1, 9, 5), splits: Any = ("train", "test")) -> np.ndarray:
    """The same examples in each split, ``[N, 3, 32, 32]``."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    images = some_images(len(labels), 3, 32, 32)
    for split in splits:
        y = np.asarray(labels, dtype=np.uint8)[:, None]
        savemat(root / f"{split}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": y}, do_compression=True)
    return images
