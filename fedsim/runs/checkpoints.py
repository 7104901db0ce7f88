"""Checkpoint files: named tensors in safetensors format, whole or not at all. Nothing is ever pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fedsim.runs.directory import CHECKPOINTS, checkpoint_files, checkpoint_name, remove_unfinished, write_whole

#: The tensor of a checkpoint that holds the global weights and biases, ``[d]``.
ROW = "row"


def write(directory: Path, round: int, tensors: Mapping[str, Tensor], layout: Mapping[str, Sequence[int]]) -> str:
    """Writes a round's checkpoint under its name.

    Args:
        directory: the run's directory.
        round: the round.
        tensors: any names, shapes and dtypes (0-dimensional and bfloat16 ones too); views are written as they read.
        layout: parameter name -> shape, in the row's order; it stands in the file's header, so that the file alone can
            be unpacked.

    Returns:
        The file's sha256, the same for the same tensors.

    Raises:
        OSError: and leaves no part of the file.
    """
    data = safetensors.torch.save(_apart(tensors), metadata={"layout": json.dumps(dict(layout), default=list)})
    digest = hashlib.sha256(data).hexdigest()
    write_whole(directory / checkpoint_name(round), data)
    return digest


def write_tensors(path: Path, tensors: Mapping[str, Tensor], personal: Sequence[str] = ()) -> str:
    """Writes named tensors to a file, whole or not at all, and which are clients' own; returns the file's sha256."""
    data = safetensors.torch.save(_apart(tensors), metadata={"personal": json.dumps(list(personal))})
    write_whole(path, data)
    return hashlib.sha256(data).hexdigest()


def read(path: Path, sha256: str) -> dict[str, Tensor] | str:
    """The tensors of a checkpoint file, or in what way it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if hashlib.sha256(data).hexdigest() != sha256:
        return f"is damaged ({len(data):,} bytes that do not match its sha256)"
    return safetensors.torch.load(data)


def keep_only(directory: Path, names: Collection[str]) -> None:
    """Deletes the checkpoint files that no kept round names, and what a killed write left."""
    for file in checkpoint_files(directory):
        if f"{CHECKPOINTS}/{file.name}" not in names:
            file.unlink(missing_ok=True)
    remove_unfinished(directory / CHECKPOINTS)


def unpack(row: Tensor, layout: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Parameter name -> tensor, views of a row ``[d]``."""
    sizes = [torch.Size(shape).numel() for shape in layout.values()]
    parts = row.split([*sizes, row.numel() - sum(sizes)])
    return {name: part.view(list(shape)) for (name, shape), part in zip(layout.items(), parts, strict=False)}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and each in memory of its own, as the format asks."""
    seen: set[int] = set()
    made = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        made[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return made
