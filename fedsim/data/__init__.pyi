from .columns import Columns, TensorColumns, derive
from .lazy import ClientColumns, DatasetColumns
from .mapped import MappedColumns
from .partitions import (
    Partition,
    dirichlet,
    feature_shift,
    iid,
    natural,
    partition,
    pathological,
    quantity_skew,
    shards,
)
from .pictures import cifar10, cifar100, emnist, fashion_mnist, mnist, svhn
from .population import CSR, Population, build
from .source import Source
from .sources import arrays, digits, huggingface, synthetic
from .tables import csv, parquet

__all__ = [
    "CSR",
    "ClientColumns",
    "Columns",
    "DatasetColumns",
    "MappedColumns",
    "Partition",
    "Population",
    "Source",
    "TensorColumns",
    "arrays",
    "build",
    "cifar10",
    "cifar100",
    "csv",
    "derive",
    "digits",
    "dirichlet",
    "emnist",
    "fashion_mnist",
    "feature_shift",
    "huggingface",
    "iid",
    "mnist",
    "natural",
    "parquet",
    "partition",
    "pathological",
    "quantity_skew",
    "shards",
    "svhn",
    "synthetic",
]
