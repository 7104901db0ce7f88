"""flwr-datasets' Partitioners as partitions: they are given the columns of one value an example, and read back.

Such a partitioner has ``num_partitions`` of its own, which is how many clients there are, and draws with its own
``seed``; where it is named (``"flwr_datasets.partitioner:DirichletPartitioner"``) and its constructor takes a ``seed``
that is not given, it gets the experiment's. Rows come to it in an order drawn by the experiment's seed, as
``FederatedDataset`` shuffles before it partitions, so that partitioners which take rows as they come are random too.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from clients.errors import RequestError, nearest
from fedsim.data.dealing import Partition, offsets_of

if TYPE_CHECKING:
    from clients.parts import Part

#: The column that positions travel in; every other one has the name that the source gave it.
_POSITION = "__position__"
_INSTALL = 'pip install "fedsim[datasets]"'


def is_partitioner(thing: Any) -> bool:
    """Whether a class or an object is a Partitioner: by what it has, so that nothing need be imported to tell."""
    return all(inspect.getattr_static(thing, name, None) is not None for name in ("load_partition", "num_partitions"))


def need_installed(part: Part) -> None:
    """Says how to install flwr-datasets where a part names something of it and it is missing.

    Raises:
        RequestError: under ``data.partition``.
    """
    if part.thing is None and part.name.split(":")[0].split(".")[0] == "flwr_datasets" and not _installed():
        raise RequestError(f"data.partition: {part.name} needs flwr-datasets, which is not installed; {_INSTALL}")


def takes_seed(thing: Any) -> bool:
    """Whether a thing is a Partitioner's class whose constructor takes a ``seed``."""
    return inspect.isclass(thing) and is_partitioner(thing) and "seed" in inspect.signature(thing).parameters


def read(
    partitioner: Any,
    labels: np.ndarray,
    generator: np.random.Generator,
    ids: np.ndarray | None = None,
    columns: Any = None,
) -> Partition:
    """What a Partitioner makes of the examples; the given object is left as it is.

    Args:
        partitioner: a Partitioner without a data set.
        labels: ``[N]`` classes, its column ``y`` where there are no ``columns``.
        generator: draws the order in which rows come to it.
        ids: ``int [N]`` the source's client of each example, its column ``client``.
        columns: the source's columns; those of one value an example are given to it under their names.

    Returns:
        Not checked for coverage yet.

    Raises:
        RequestError: where flwr-datasets is missing, the partitioner asks for a column that there is not, or fails.
    """
    name = type(partitioner).__name__
    try:
        from datasets import Dataset
    except ImportError:
        raise RequestError(f"data.partition: {name} needs flwr-datasets, which is not installed; {_INSTALL}") from None
    assigned = getattr(partitioner, "is_dataset_assigned", None)
    if assigned is not None and assigned():
        raise RequestError(f"data.partition: this {name} has a data set already; give one without")
    table = _table(labels, ids, columns)
    asked = getattr(partitioner, "_partition_by", None)
    if isinstance(asked, str) and asked not in table:
        raise RequestError(_missing(name, asked, table))

    order = generator.permutation(len(labels))
    rows = {column: values[order] for column, values in table.items()}
    partitioner = copy.deepcopy(partitioner)  # it takes one data set in its life, and several runs may share it
    try:
        partitioner.dataset = Dataset.from_dict({**rows, _POSITION: order})
        parts = [_positions(partitioner.load_partition(part)) for part in range(partitioner.num_partitions)]
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"data.partition: {name} on the columns {_names(table)}: {said}") from error
    if any(part is None for part in parts):
        raise RequestError(
            f"data.partition: {name} deals out columns, and clients are dealt examples; take a partitioner of rows"
        )
    sizes = np.array([len(part) for part in parts if part is not None], dtype=np.int64)
    return Partition(np.concatenate([np.zeros(0, dtype=np.int64), *parts]), offsets_of(sizes))


def _installed() -> bool:
    return importlib.util.find_spec("flwr_datasets") is not None


def _table(labels: np.ndarray, ids: np.ndarray | None, columns: Any) -> dict[str, np.ndarray]:
    """The columns of one value an example, by name."""
    table: dict[str, np.ndarray] = {}
    if columns is None:
        if labels.ndim == 1:
            table["y"] = labels
    else:
        shape = getattr(columns, "shape", None)  # spares reading what is no single value, such as images
        for column in columns.names:
            if shape is None or tuple(shape(column)) == ():
                values = np.asarray(columns.column(column))
                if values.ndim == 1:
                    table[column] = values
    if ids is not None:
        table.setdefault("client", ids)
    return table


def _positions(part: Any) -> np.ndarray | None:
    """The positions of a part's examples; None where the partitioner took that column away."""
    if _POSITION not in part.column_names:
        return None
    return np.asarray(part.with_format("numpy")[_POSITION][:], dtype=np.int64)


def _missing(name: str, asked: str, table: dict[str, np.ndarray]) -> str:
    said = f"data.partition: {name} asks for the column {asked!r}; those of one value an example are {_names(table)}"
    return said + nearest(asked, list(table))


def _names(table: dict[str, np.ndarray]) -> str:
    return ", ".join(table) or "none"
