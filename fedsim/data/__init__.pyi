from .partitions import Partition, dirichlet, iid, natural, partition, shards
from .population import CSR, Population, build
from .source import Columns, DatasetColumns, Source, TensorColumns
from .sources import arrays, digits, synthetic

__all__ = [
    "CSR",
    "Columns",
    "DatasetColumns",
    "Partition",
    "Population",
    "Source",
    "TensorColumns",
    "arrays",
    "build",
    "digits",
    "dirichlet",
    "iid",
    "natural",
    "partition",
    "shards",
    "synthetic",
]
