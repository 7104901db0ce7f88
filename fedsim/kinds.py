"""The kinds of things that only the simulator names."""

from __future__ import annotations

from clients.kinds import Kind, declare

declare(
    Kind("sources", "source", "fedsim.data", returns=("Source",), offered=("seed", "base")),
    Kind(
        "partitions",
        "partition",
        "fedsim.data",
        returns=("Partition",),
        first=("labels",),
        offered=("labels", "clients", "generator", "ids", "columns"),
    ),
    Kind("models", "model", "fedsim.models", returns=("Module",), offered=("input_shape", "classes")),
    Kind("engines", "engine", "fedsim.engines", base="Engine", offered=("workers", "client_timeout"), also=("auto",)),
)
