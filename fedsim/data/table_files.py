"""Reading CSV and Parquet files: columns as pyarrow has them, and where in the file a row is."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.errors import RequestError, nearest

#: What follows a CSV file's last line where it is looked for a quote that would take it in.
_END = "the end of the file"


@dataclass(frozen=True)
class Table:
    """A file's columns as it has them.

    Attributes:
        file: where it came from.
        key: the setting that named it.
        columns: name to an array of pyarrow's; in a CSV file all are strings.
        place: a row's number from 0 to how the user finds it, ``"line 7"``.
        index: columns that are pandas' index and no data.
        text: whether values are text that may stand for numbers.
    """

    file: Path
    key: str
    columns: Mapping[str, Any]
    place: Callable[[int], str]
    index: frozenset[str] = frozenset()
    text: bool = False

    def wrong(self, said: str, column: str | None = None, row: int | None = None) -> RequestError:
        """The error for what is wrong in this file, there."""
        where = [str(self.file)]
        where += [self.place(row)] if row is not None else []
        where += [f"column {column!r}"] if column is not None else []
        return RequestError(f"{self.key}: {', '.join(where)}: {said}")

    def column(self, name: str, setting: str) -> Any:
        if name not in self.columns:
            have = f"it has {', '.join(map(repr, self.columns))}{nearest(name, list(self.columns))}"
            raise RequestError(f"data.source.{setting}: {self.file} has no column {name!r}; {have}")
        return self.columns[name]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def read_csv(path: Path, key: str, separator: str) -> Table:
    """A CSV file, every value as the text that it is, without the spaces around it."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as arrow_csv

    names = _header(path, key, separator)
    try:
        table = arrow_csv.read_csv(
            str(path),
            parse_options=arrow_csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(column_types={name: pa.string() for name in names[0]}),
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, key, separator, len(names[0]), error) from None
    if not table.num_rows:
        raise RequestError(f"{key}: {path} has a header and no row")
    if "\n" in (table.column(table.num_columns - 1)[-1].as_py() or "") or _odd_quotes(path):
        _check_quotes(path, key, separator)
    columns = {
        name: pc.utf8_trim_whitespace(column.combine_chunks())
        for name, column in zip(names[1], table.columns, strict=True)
    }
    return Table(path, key, columns, lambda row: _line(path, separator, row), text=True)


def _header(path: Path, key: str, separator: str) -> tuple[list[str], list[str]]:
    """The columns' names as they are written, and without the spaces around them."""
    try:
        written = next((fields for _, fields in _rows(path, separator)), None)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, key, error) from None
    except OSError as error:
        raise RequestError(f"{key}: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RequestError(f"{key}: {path}, line 1: {error}") from None
    if written and any("\n" in name for name in written):
        _check_quotes(path, key, separator)
    if not written:
        raise RequestError(f"{key}: {path} is empty; its first line names the columns")
    names = [name.strip() for name in written]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RequestError(f"{key}: {path}, line 1: two columns are named {twice[0]!r}; give each a name of its own")
    other = next((mark for mark in ";\t|, " if mark != separator and mark in names[0]), None)
    if len(names) == 1 and other:
        said = f"if {other!r} separates several, give data.source.separator"
        raise RequestError(f"{key}: {path}, line 1: one column {names[0]!r}; {said}")
    return written, names


def _rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file and the line, from 1, at which each begins. Empty lines are none.

    Pyarrow is much faster but does not say where it fails; this is for the header, and for finding the place.
    """
    import csv as csv_module

    begins = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv_module.reader(file, delimiter=separator)
            for fields in reader:
                if fields:
                    yield begins, fields
                begins = reader.line_num + 1
    except csv_module.Error as error:
        raise ValueError(f"line {begins}: {error}") from None


def _odd_quotes(path: Path) -> bool:
    count = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            count += block.count(b'"')
    return count % 2 == 1


def _check_quotes(path: Path, key: str, separator: str) -> None:
    """Refuses a CSV file with a quote that is never closed: all that follows it would be one value."""
    import csv as csv_module

    lines, last = 0, ""

    def read(file: Iterable[str]) -> Iterator[str]:
        nonlocal lines, last
        for last in file:
            lines += 1
            yield last
        yield _END

    found, begins = [_END], 1
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for fields in csv_module.reader(read(file), delimiter=separator):
                found, begins = fields, lines + 1
        except csv_module.Error:  # too much for one value
            opens = begins
        else:
            if found == [_END]:
                return
            opens = lines + last.endswith(("\r", "\n")) - len(re.findall("\r\n|\r|\n", found[-1]))
    raise RequestError(f"{key}: {path}, line {opens}: a quote opens here that is never closed; close it, or double it")


def _line(path: Path, separator: str, row: int) -> str:
    try:
        line, _ = next(itertools.islice(_rows(path, separator), row + 1, None))
    except (ValueError, StopIteration):  # a quote that is never closed
        return f"row {row} (from 0)"
    return f"line {line}"


def _unreadable(path: Path, key: str, separator: str, width: int, error: Exception) -> RequestError:
    """What is wrong with a CSV file that cannot be parsed."""
    rows = 0
    try:
        _check_quotes(path, key, separator)
        for line, fields in _rows(path, separator):
            rows += 1
            if len(fields) != width:
                few = "few" if len(fields) < width else "many"
                return RequestError(
                    f"{key}: {path}, line {line}: too {few} values, {len(fields)} where the header names {width}"
                )
    except RequestError as unclosed:
        return unclosed
    except UnicodeDecodeError as undecoded:
        return _not_utf8(path, key, undecoded)
    except (ValueError, OSError) as found:
        error = found
    if rows == 1:
        return RequestError(f"{key}: {path} has a header and no row")
    return RequestError(f"{key}: {path} is not a CSV file that can be read ({' '.join(str(error).split())})")


def _not_utf8(path: Path, key: str, error: UnicodeDecodeError) -> RequestError:
    line, known = 1, path.read_bytes()
    try:
        known.decode("utf-8")
    except UnicodeDecodeError as found:
        line, error = known[: found.start].count(b"\n") + 1, found
    return RequestError(
        f"{key}: {path}, line {line}: is not UTF-8 text ({error.reason}, byte {error.object[error.start]:#04x}); "
        "save the file as UTF-8"
    )


def read_parquet(path: Path, key: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as arrow_parquet

    if not path.is_file():
        raise RequestError(f"{key}: {path} {'is a folder; give a file' if path.is_dir() else 'is no file'}")
    if not path.stat().st_size:
        raise RequestError(f"{key}: {path} is empty")
    try:
        with arrow_parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = schema.names
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise RequestError(f"{key}: {path}: two columns are named {twice[0]!r}; give each a name of its own")
            table = file.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise RequestError(f"{key}: {path} is not a Parquet file that can be read ({said})") from None
    if not names:
        raise RequestError(f"{key}: {path} has no columns")
    if not table.num_rows:
        raise RequestError(f"{key}: {path} has no row")
    columns = {name: _decoded(column.combine_chunks()) for name, column in zip(names, table.columns, strict=True)}
    told = (schema.pandas_metadata or {}).get("index_columns", [])
    index = frozenset(name for name in told if isinstance(name, str))
    return Table(path, key, columns, lambda row: f"row {row} (from 0)", index)


def _decoded(array: Any) -> Any:
    """Categories as the values that they stand for."""
    return array.dictionary_decode() if hasattr(array, "dictionary_decode") else array
