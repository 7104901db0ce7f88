"""Tables of the user's own, CSV and Parquet: one row an example, one column the label, the others numbers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clients.errors import RequestError, nearest
from fedsim.data.source import Source
from fedsim.data.table_files import Table, read_csv, read_parquet

#: What programs write where there is no value, in lower case.
_MISSING = frozenset({"", "na", "n/a", "nan", "<na>", "null"})

_WHOLE = re.compile(r"[+-]?\d+")


def csv(
    *,
    path: Path,
    label: str = "y",
    test_path: Path | None = None,
    group: str | None = None,
    features: Sequence[str] | None = None,
    separator: str = ",",
) -> Source:
    """A CSV file whose first line names the columns: ``x`` float32 ``[N, features]``, ``y`` classes or real numbers.

    A label column of whole numbers holds classes, counted from 0; of text, or of true and false, classes in sorted
    order; of other numbers, targets (float32). The file is UTF-8; every value must be there and finite. True and false
    are 1 and 0.

    Args:
        path: the file; in an experiment file, relative to it.
        label: the label's column.
        test_path: another file with the same columns, for the server's test split.
        group: the column that says whose each row is, a number or text; clients are its values in sorted order (take
            ``partition = "natural"``).
        features: the columns of ``x``, in this order; left out, all others.
        separator: what stands between two values.
    """
    if len(separator) != 1 or separator in '"\r\n':
        raise RequestError(f"data.source.separator: {separator!r} is not one character that can stand between values")

    def read(file: Path, key: str) -> Table:
        return read_csv(file, key, separator)

    return _source(read, path, test_path, label, group, features)


def parquet(
    *,
    path: Path,
    label: str = "y",
    test_path: Path | None = None,
    group: str | None = None,
    features: Sequence[str] | None = None,
) -> Source:
    """A Parquet file: ``x`` float32 ``[N, features]``, ``y`` classes or real numbers.

    A label column of integers holds classes, counted from 0; of strings, booleans or categories, classes in sorted
    order; of floats, targets (float32). A column of equally long lists of numbers may be the only feature: ``x`` is
    ``[N, length]``. The index that pandas writes along is no feature.

    Args:
        path: the file; in an experiment file, relative to it.
        label: the label's column.
        test_path: another file with the same columns, for the server's test split.
        group: the column that says whose each row is; clients are its values in sorted order (take
            ``partition = "natural"``).
        features: the columns of ``x``, in this order; left out, all others.
    """
    return _source(read_parquet, path, test_path, label, group, features)


def _source(
    read: Callable[[Path, str], Table],
    path: Path,
    test_path: Path | None,
    label: str,
    group: str | None,
    features: Sequence[str] | None,
) -> Source:
    if group == label:
        raise RequestError(f"data.source.group: {group!r} is the label; give another column")
    table = read(path, "data.source.path")
    given = table.column(label, "label")
    ids = None if group is None else _codes(table, table.column(group, "group"), group)
    names = _features(table, label, group, features)
    x = _numbers(table, names)
    y, classes = _labels(table, given, label)
    train = {"x": x, "y": y}
    test = None
    if test_path is not None:
        other = read(test_path, "data.source.test_path")
        given = other.column(label, "test_path")
        for name in names:
            other.column(name, "test_path")
        test = {"x": _numbers(other, names), "y": _test_labels(other, given, label, y, classes)}
        if test["x"].shape[1:] != x.shape[1:]:
            raise other.wrong(f"lists of {test['x'].shape[1]} values; {path} has {x.shape[1]}", names[0])
    return Source(train=train, test=test, clients=ids)


# ------------------------------------------------------------------------------------------------ columns


def _features(table: Table, label: str, group: str | None, features: Sequence[str] | None) -> list[str]:
    """The names of the columns that ``x`` is made of."""
    if features is None:
        names = [name for name in table.columns if name not in (label, group) and name not in table.index]
        if "" in names:
            raise table.wrong(
                "a column has no name (pandas' index?); write the file without it, or name the columns with "
                "data.source.features"
            )
        if not names:
            raise table.wrong(f"no column is left for x beside {label!r}{f' and {group!r}' if group else ''}")
        return names
    names, lines = list(features), []
    for place, name in enumerate(names):
        where = f"data.source.features[{place}]"
        if name in names[:place]:
            lines.append(f"{where}: {name!r} is named twice; name each column once")
        elif name == label:
            lines.append(f"{where}: {name!r} is the label; it cannot be an input too")
        elif name not in table.columns:
            have = ", ".join(map(repr, table.columns))
            lines.append(
                f"{where}: {table.file} has no column {name!r}; it has {have}{nearest(name, list(table.columns))}"
            )
    if not names:
        lines.append("data.source.features: no column; name at least one, or leave it out for all")
    if lines:
        raise RequestError(lines)
    return names


def _numbers(table: Table, names: list[str]) -> np.ndarray:
    """The columns side by side, float32 ``[N, columns]``; a single column of lists, ``[N, length]``."""
    import pyarrow as pa

    for name in names:
        if _is_list(table.columns[name].type):
            if len(names) > 1:
                others = ", ".join(repr(other) for other in names if other != name)
                raise table.wrong(f"holds lists, and so must be the only feature; beside it are {others}", name)
            return _lists(table, name)
    x = np.empty((len(table), len(names)), dtype=np.float32)
    for place, name in enumerate(names):
        array = table.columns[name]
        if table.text:
            found = _parsed(array)
            if found is None:
                row, value = next((row, value) for row, value in enumerate(array.to_pylist()) if not _is_number(value))
                if value.lower() in _MISSING:
                    raise table.wrong(_missing(value), name, row)
                raise table.wrong(f"{value!r} is text in a column of numbers", name, row)
            x[:, place] = _finite(table, found, name)
        elif pa.types.is_null(array.type) or array.null_count:
            raise table.wrong(_missing(), name, _first_null(array))
        elif _is_numeric(array.type):
            x[:, place] = _finite(table, _as_float64(array), name)
        else:
            raise table.wrong(f"holds {array[0].as_py()!r}, of type {array.type}; give numbers", name, 0)
    return x


def _lists(table: Table, name: str) -> np.ndarray:
    """A column of equally long lists of numbers."""
    import pyarrow.compute as pc

    array = table.columns[name]
    if array.null_count:
        raise table.wrong(_missing(), name, _first_null(array))
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    if (lengths != lengths[0]).any():
        row = int((lengths != lengths[0]).argmax())
        raise table.wrong(
            f"a list of {lengths[row]} where {table.place(0)} has {lengths[0]}; pad or crop them to one length",
            name,
            row,
        )
    if not lengths[0]:
        raise table.wrong("the lists are empty", name, 0)
    values = pc.list_flatten(array)
    if values.null_count:
        raise table.wrong(_missing(), name, _first_null(values) // int(lengths[0]))
    if not _is_numeric(values.type):
        raise table.wrong(f"holds lists of {values.type}; give lists of numbers", name, 0)
    return _finite(table, _as_float64(values), name, int(lengths[0])).reshape(len(array), -1)


def _finite(table: Table, values: np.ndarray, name: str, per_row: int = 1) -> np.ndarray:
    """Float64 values as float32, once it is known that they are numbers there."""
    with np.errstate(over="ignore"):
        made = values.astype(np.float32)
    if not np.isfinite(made).all():
        place = int(np.argmin(np.isfinite(made)))
        value = values[place]
        said = (
            f"{value:g} is too large for float32" if np.isfinite(value) else f"{value:g}; every number must be finite"
        )
        raise table.wrong(_missing("nan") if np.isnan(value) else said, name, place // per_row)
    return made


# ------------------------------------------------------------------------------------------------ labels and groups


def _labels(table: Table, array: Any, name: str) -> tuple[np.ndarray, list[Any] | None]:
    """The labels, and the values that are classes 0, 1, ... where they are no numbers."""
    values = _values(table, array, name)
    if values.dtype.kind in "iu":
        return _class_numbers(table, values, name), None
    if values.dtype.kind == "f":
        return _finite(table, values, name), None
    classes, codes = np.unique(values, return_inverse=True)
    return codes.reshape(-1).astype(np.int64), classes.tolist()


def _test_labels(table: Table, array: Any, name: str, trained: np.ndarray, classes: list[Any] | None) -> np.ndarray:
    """The test file's labels by the training file's coding."""
    # What the training file has as text is text here too, even where all of it could be numbers.
    values = _values(table, array, name, words=classes is not None and isinstance(classes[0], str))
    if classes is not None:
        codes = {value: code for code, value in enumerate(classes)}
        for row, value in enumerate(values.tolist()):
            if value not in codes or type(value) is not type(classes[0]):
                close = nearest(value, [str(known) for known in classes]) if isinstance(value, str) else ""
                known = ", ".join(map(repr, classes[:10])) + (", ..." if len(classes) > 10 else "")
                raise table.wrong(f"{value!r} is no label of the training file; its are {known}{close}", name, row)
        return np.array([codes[value] for value in values.tolist()], dtype=np.int64)
    if values.dtype.kind not in "iuf" or (values.dtype.kind == "f" and trained.dtype.kind == "i"):
        kind = "whole numbers" if trained.dtype.kind == "i" else "numbers"
        row = next((row for row, value in enumerate(values.tolist()) if not _fits(value, kind)), 0)
        raise table.wrong(f"{values.tolist()[row]!r} is no label of the training file; its are {kind}", name, row)
    if trained.dtype.kind == "f":
        return _finite(table, values.astype(np.float64), name)
    return _class_numbers(table, values, name)


def _fits(value: Any, kind: str) -> bool:
    return not isinstance(value, bool) and isinstance(value, int if kind == "whole numbers" else int | float)


def _class_numbers(table: Table, values: np.ndarray, name: str) -> np.ndarray:
    if values.min() < 0:
        row = int(values.argmin())
        raise table.wrong(f"the class {values[row]}; classes count from 0 (real targets are written 1.0)", name, row)
    if values.max() > np.iinfo(np.int64).max:
        row = int(values.argmax())
        raise table.wrong(f"the class {values[row]} is too large", name, row)
    return values.astype(np.int64)


def _codes(table: Table, array: Any, name: str) -> np.ndarray:
    """Each row's place among the sorted values."""
    values = _values(table, array, name, mixed=True)
    return np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _values(table: Table, array: Any, name: str, mixed: bool = False, words: bool = False) -> np.ndarray:
    """A column's values as integers, float64, booleans or strings.

    Args:
        table: where it is from.
        array: the column.
        name: its name.
        mixed: in a CSV file, takes numbers among text as text.
        words: in a CSV file, takes all as text.
    """
    import pyarrow as pa

    if table.text:
        return _text_values(table, array, name, mixed, words)
    if pa.types.is_null(array.type) or array.null_count:
        raise table.wrong(_missing(), name, _first_null(array))
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        # Numpy's own strings are as wide as the longest one and drop zeros at the end.
        return np.array(array.to_pylist(), dtype=object)
    if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        return array.to_numpy(zero_copy_only=False)
    if _is_numeric(array.type):
        return _as_float64(array)
    raise table.wrong(f"holds {array[0].as_py()!r}, of type {array.type}; give numbers, text or booleans", name, 0)


def _text_values(table: Table, array: Any, name: str, mixed: bool, words: bool) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    values = array.to_pylist()
    for row, value in enumerate(values):
        if value.lower() in _MISSING:
            raise table.wrong(_missing(value), name, row)
    if words:
        return np.array(values, dtype=object)
    if {value.lower() for value in values} <= {"true", "false"}:
        return np.array([value.lower() == "true" for value in values])
    with contextlib.suppress(pa.ArrowInvalid):
        return pc.cast(array, pa.int64()).to_numpy()
    numbers = [row for row, value in enumerate(values) if _is_number(value)]
    if len(numbers) == len(values):
        if all(map(_WHOLE.fullmatch, values)):
            integers = [int(value) for value in values]
            if mixed:
                return np.array(integers, dtype=object)
            for row, value in enumerate(integers):
                if not -(2**63) <= value < 2**63:
                    raise table.wrong(f"{value} is too large for int64 (real targets are written 1.0)", name, row)
            return np.array(integers, dtype=np.int64)
        return np.array([float(value) for value in values])
    if numbers and not mixed:
        text = next(row for row, value in enumerate(values) if not _is_number(value))
        number = f"{table.place(numbers[0])} has the number {values[numbers[0]]!r}"
        said = f"{values[text]!r} is text, and {number}; give labels that are all numbers or all text"
        raise table.wrong(said, name, text)
    return np.array(values, dtype=object)


def _parsed(array: Any) -> np.ndarray | None:
    """A column of text as float64, where every value stands for a number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with contextlib.suppress(pa.ArrowInvalid):
        return pc.cast(array, pa.float64()).to_numpy()
    values = array.to_pylist()
    if all(value.lower() in ("true", "false") for value in values):
        return np.array([value.lower() == "true" for value in values], dtype=np.float64)
    return np.array([float(value) for value in values]) if all(map(_is_number, values)) else None


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return "_" not in value  # 1_000 is a number to Python only


def _missing(value: str = "") -> str:
    return f"a value is missing{f' ({value})' if value else ''}; every row needs one"


def _is_numeric(kind: Any) -> bool:
    import pyarrow as pa

    return any(
        known(kind) for known in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    )


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _as_float64(array: Any) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_boolean(array.type):
        array = pc.cast(array, pa.uint8())
    return pc.cast(array, pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _first_null(array: Any) -> int:
    import pyarrow.compute as pc

    return pc.index(pc.is_null(array), True).as_py()
