"""Reading the files of picture data sets: idx, Python's pickles without their dangers, MATLAB's.

Every reader raises a ``RequestError`` that names the file and what is wrong with it, whatever its bytes are.
"""

from __future__ import annotations

import gzip
import math
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from clients.errors import RequestError


def read_idx(path: Path, what: str, dimensions: int) -> np.ndarray:
    """The bytes of an idx file: a magic number, the shape, and the values, numbers big-endian (LeCun et al. 1998)."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(path, f"cannot be read ({error})") from None
    if not data:
        raise damaged(path, "is empty")
    magic, wanted, head = int.from_bytes(data[:4], "big"), 0x0800 + dimensions, 4 + 4 * dimensions
    if magic != wanted:
        raise damaged(path, f"begins with the magic number {magic}; a file of {what} begins with {wanted}")
    if len(data) < head:
        raise damaged(path, f"ends within its header, after {len(data)} bytes")
    shape = tuple(int.from_bytes(data[place : place + 4], "big") for place in range(4, head, 4))
    size = math.prod(shape)
    if len(data) - head != size:
        kind = "is cut off" if len(data) - head < size else "goes on too long"
        said = " x ".join(map(str, shape))
        raise damaged(path, f"{kind}: {len(data) - head} bytes of {what} follow, and its header says {said}")
    if not size:
        raise damaged(path, f"holds no {what}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def read_batch(path: Path, key: str, count: int) -> dict[str, np.ndarray]:
    """One pickled batch: rows of 1,024 red, 1,024 green and 1,024 blue pixels, and a list of labels."""
    batch = _unpickled(path)
    if not isinstance(batch, dict):
        raise damaged(path, f"holds {type(batch).__name__} and no dict of data and {key}")
    batch = {name.decode("latin1") if isinstance(name, bytes) else name: value for name, value in batch.items()}
    if missing := [name for name in ("data", key) if name not in batch]:
        raise damaged(path, f"has no {' and no '.join(missing)}; it has {', '.join(map(str, batch)) or 'nothing'}")
    x, labels = (value.array if isinstance(value, _Array) else value for value in (batch["data"], batch[key]))
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072:
        shape = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        raise damaged(path, f"has data of {shape}; it is uint8 [N, 3072]")
    y = _whole_numbers(labels)
    if y is None:
        raise damaged(path, f"has {key} that are no list of whole numbers")
    if len(x) != len(y):
        raise damaged(path, f"holds {len(y)} {key} and {len(x)} images")
    if not len(x):
        raise damaged(path, "holds no images")
    check_labels(y, range(count), path)
    return {"x": x.reshape(-1, 3, 32, 32), "y": y}


def _whole_numbers(labels: Any) -> np.ndarray | None:
    try:
        array = np.asarray(labels)
    except ValueError:  # ragged
        return None
    # An empty list is one of floats to numpy.
    return array.astype(np.int64) if array.ndim == 1 and (array.dtype.kind in "iu" or not len(array)) else None


class _UnsafeError(Exception):
    """A pickle asks for something that no array of numbers needs."""


class _Type:
    """Stands for ``numpy.dtype`` while a pickle is read."""

    def __init__(self, name: str, *_: Any):
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biuf":
            raise _UnsafeError(f"an array of {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for ``numpy.ndarray`` while a pickle is read, so that no pickle's state reaches numpy unseen."""

    array: np.ndarray = np.empty(0)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, columns_first, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # a string of Python 2
        self.array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if columns_first else "C")


def _from_buffer(data: Any, kind: _Type, shape: Any, order: str) -> _Array:
    """How protocol 5 writes an array."""
    made = _Array()
    made.array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if order == "F" else "C")
    return made


def _scalar(kind: _Type, data: Any) -> Any:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, kind.dtype)[0]


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in old protocols."""
    if encoding != "latin1":
        raise _UnsafeError(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numbers, strings, lists, dicts and arrays of numbers.

    A pickle may ask for any function there is and so run anything; all but what arrays are made with is refused.
    """

    def find_class(self, module: str, name: str) -> Any:
        # Numpy 2 renamed numpy.core to numpy._core.
        match f"{module.replace('numpy._core.', 'numpy.core.')}.{name}":
            case "numpy.ndarray" | "numpy.core.multiarray._reconstruct":
                return _Array
            case "numpy.dtype":
                return _Type
            case "numpy.core.numeric._frombuffer":
                return _from_buffer
            case "numpy.core.multiarray.scalar":
                return _scalar
            case "_codecs.encode":
                return _latin1
        raise _UnsafeError(f"{module}.{name}")


def _unpickled(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            # The authors' files were written by Python 2, whose strings are bytes.
            return _ArrayUnpickler(file, encoding="latin1").load()
    except _UnsafeError as error:
        raise damaged(path, f"is not safe to read: it asks for {error}, which no array needs") from None
    except Exception as error:  # bytes that are no pickle can make any
        said = " ".join(str(error).split()) or type(error).__name__
        empty = path.is_file() and not path.stat().st_size
        raise damaged(path, "is empty" if empty else f"is not a whole pickle ({said})") from None


def read_mat(path: Path) -> dict[str, np.ndarray]:
    """One MATLAB file: ``X`` ``[32, 32, 3, N]`` and ``y`` ``[N, 1]``, from 1 to 10."""
    from scipy.io import loadmat

    if not path.stat().st_size:
        raise damaged(path, "is empty")
    try:
        found = loadmat(str(path), variable_names=["X", "y"])
    except Exception as error:  # bytes that are no MATLAB file can make any
        said = " ".join(str(error).split()) or type(error).__name__
        raise damaged(path, f"is not a whole MATLAB file ({said})") from None
    if missing := [name for name in ("X", "y") if not isinstance(found.get(name), np.ndarray)]:
        raise damaged(path, f"has no {' and no '.join(missing)}")
    x, y = found["X"], found["y"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise damaged(path, f"has X of {x.dtype} {list(x.shape)}; it is uint8 [32, 32, 3, N]")
    if y.dtype.kind not in "iuf" or y.size != max(y.shape, default=0):
        raise damaged(path, f"has y of {y.dtype} {list(y.shape)}; it is [N, 1] whole numbers")
    y = y.reshape(-1)
    if x.shape[3] != len(y):
        raise damaged(path, f"holds {len(y)} labels and {x.shape[3]} images")
    if not len(y):
        raise damaged(path, "holds no images")
    check_labels(y, range(1, 11), path)
    return {"x": np.ascontiguousarray(x.transpose(3, 2, 0, 1)), "y": y.astype(np.int64) % 10}


def check_labels(y: np.ndarray, labels: range, path: Path) -> None:
    """Raises unless every label is one of the data set's."""
    wrong = ~np.isin(y, labels)
    if wrong.any():
        place = int(wrong.argmax())
        raise damaged(path, f"has the label {y[place]} at [{place}]; they are {labels[0]} to {labels[-1]}")


def damaged(path: Path, said: str) -> RequestError:
    """The error for a file that is not what it should be."""
    return RequestError(f"data.source.root: {path} {said}")
