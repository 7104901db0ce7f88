"""How a pool of examples is cut: the server's splits, each client's own, and the clients that are never trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from clients import randomness
from clients.errors import RequestError
from fedsim.data.columns import Columns
from fedsim.data.csr import CSR
from fedsim.data.source import Source

if TYPE_CHECKING:
    from fedsim.experiment import DataSettings


def server_splits(
    source: Source, pool: Columns, data: DataSettings, seed: int
) -> tuple[dict[str, Columns], np.ndarray, np.ndarray]:
    """The server's splits, the positions in the pool that they took, and those that remain, ascending."""
    examples = len(pool)
    wanted = {
        "test": ("test_fraction", data.test_fraction, round(data.test_fraction * examples)),
        "validation": ("validation_fraction", data.validation_fraction, round(data.validation_fraction * examples)),
        "proxy": ("proxy", data.proxy, data.proxy),
        "root": ("root", data.root, data.root),
    }
    drawn = randomness.uniforms(randomness.keys(seed, "split", clients=np.arange(examples)), 1)[:, 0]
    order = np.argsort(drawn, kind="stable")
    server: dict[str, Columns] = {}
    start = 0
    for split, (setting, value, size) in wanted.items():
        given = source.columns(split)
        if given is None and size > 0:
            if size >= examples - start:
                raise RequestError(
                    f"data.{setting}: {value} asks for {size} examples, but {examples - start} remain and the clients "
                    "need some; lower it"
                )
            given = pool.subset(torch.from_numpy(np.sort(order[start : start + size])))
            start += size
        if given is not None:
            server[split] = _unlabelled(given, source.label) if split == "proxy" else given
    return server, order[:start], np.sort(order[start:])


def _unlabelled(columns: Columns, label: str) -> Columns:
    """Less the label, so that nothing can learn from it; kept where it is all there is (text is its own label)."""
    return columns.without(label) if label in columns.names and len(columns.names) > 1 else columns


def client_splits(whole: CSR, validation: float, test: float, seed: int) -> dict[str, CSR]:
    """Each client's examples as train, validation and test; at least one of them stays for training.

    A client of n examples keeps ``test * n`` for testing and ``validation * n`` for validation, each rounded.
    """
    if validation == 0 and test == 0:
        return {"train": whole}
    if validation + test >= 1:
        raise RequestError(
            f"data.client_test_fraction: {test} and client_validation_fraction {validation} leave nothing to train on; "
            "together they must be below 1"
        )
    sizes = whole.sizes
    tests = np.clip(np.rint(test * sizes).astype(np.int64), 0, np.maximum(sizes - 1, 0))
    validations = np.clip(np.rint(validation * sizes).astype(np.int64), 0, np.maximum(sizes - 1 - tests, 0))
    owners = whole.owners
    drawn = randomness.uniforms(randomness.keys(seed, "client split", clients=whole.order), 1)[:, 0]
    rank = np.empty(whole.examples, dtype=np.int64)
    rank[np.lexsort((drawn, owners))] = np.arange(whole.examples)
    rank -= whole.offsets[owners]
    in_test = rank < tests[owners]
    in_validation = ~in_test & (rank < (tests + validations)[owners])
    splits = {"train": whole.only(~(in_test | in_validation))}
    if validation:
        splits["validation"] = whole.only(in_validation)
    if test:
        splits["test"] = whole.only(in_test)
    return splits


def held_out(train: CSR, count: int, seed: int) -> np.ndarray:
    """Ids of ``count`` clients with examples, drawn at random, ascending."""
    able = np.flatnonzero(train.sizes)
    if count and count >= len(able):
        raise RequestError(
            f"data.held_out_clients: {count} of {len(able)} clients with examples; at least one must stay to train"
        )
    drawn = randomness.uniforms(randomness.keys(seed, "held out", clients=able), 1)[:, 0]
    return np.sort(able[np.argsort(drawn, kind="stable")[:count]])


def check_cover(examples: int, parts: list[np.ndarray]) -> None:
    """Every example of the pool is in one of the parts, and in no other."""
    if not (np.bincount(np.concatenate(parts), minlength=examples) == 1).all():
        raise AssertionError("the splits do not cover the examples, or overlap")
