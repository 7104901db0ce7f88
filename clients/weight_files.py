"""Weights from files that others or earlier runs wrote. Nothing in them is ever executed."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clients.errors import RequestError, nearest
from clients.patterns import matches, selected

KEY = "client.initialization"


@torch.no_grad()
def load_weights(model: nn.Module, path: Path, key: str = KEY, new: Sequence[str] = ()) -> nn.Module:
    """Puts a file's weights into a model, in place.

    Args:
        model: every parameter must be in the file with its shape; buffers are loaded where they are there.
        path: a safetensors file, a PyTorch state dict (``weights_only``), a checkpoint of a run, or a run's folder.
        key: what to call the file in messages.
        new: patterns of layers or parameters that stay as they are in the model, whatever the file has.

    Raises:
        RequestError: with a line for each key that is missing, unknown, of another shape or not finite.
    """
    file = _newest_checkpoint(path, key) if path.is_dir() else path
    found = {**(_beside(path) if path.is_dir() else {}), **_read(file, key)}
    return put_weights(model, found, str(file), key, new)


@torch.no_grad()
def put_weights(
    model: nn.Module, found: Mapping[str, Tensor], path: str, key: str = KEY, new: Sequence[str] = ()
) -> nn.Module:
    """Puts named tensors into a model, in place; see :func:`load_weights`, ``path`` says where they come from."""
    wanted: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    wanted |= dict(model.named_buffers(remove_duplicate=False))
    kept = {id(wanted[name]) for name in selected(new, list(wanted), f"{key}.new")}
    found = {name: tensor for name, tensor in found.items() if not _is_new(name, wanted, kept, new)}
    there = {id(wanted[name]) for name in found if name in wanted}  # tied parameters need one of their names
    problems = [
        f"{key}: {path} has no {name!r}{nearest(name, list(found))}{_renew(name)}"
        for name, parameter in model.named_parameters()
        if id(parameter) not in there | kept
    ]
    for name, tensor in found.items():
        if name not in wanted and ".lora_" in name:
            problems.append(
                f"{key}: {path} has {name!r}, of an adapter; merge it first: save"
                " clients.transfer.merge_adapters(fedsim.load_model(run)).state_dict()"
            )
        elif name not in wanted:
            problems.append(f"{key}: {path} has {name!r}, which the model has not{nearest(name, list(wanted))}")
        elif tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            problems.append(f"{key}: {name!r} is sparse, quantised or complex in {path}; save plain real numbers")
        elif tensor.shape != wanted[name].shape:
            theirs, mine = list(tensor.shape), list(wanted[name].shape)
            problems.append(f"{key}: {name!r} has shape {theirs} in {path} where the model has {mine}{_renew(name)}")
        elif not bool(torch.isfinite(tensor.to(wanted[name].dtype)).all()):
            kind = str(wanted[name].dtype).removeprefix("torch.")
            problems.append(f"{key}: {name!r} holds values in {path} that are NaN or infinite, or too large for {kind}")
    if problems:
        raise RequestError(problems)
    for name, tensor in found.items():
        wanted[name].copy_(tensor)
    return model


def _is_new(name: str, wanted: Mapping[str, Tensor], kept: set[int], new: Sequence[str]) -> bool:
    """Whether a file's tensor belongs to what begins anew: by the model's names, or where it has none by the file's."""
    if name in wanted:
        return id(wanted[name]) in kept
    return any(matches(pattern, name) for pattern in new)


def _renew(name: str) -> str:
    """How to begin with a layer of one's own."""
    layer = name.rpartition(".")[0] or name
    return f'; to begin anew there, name the layer: new = ["{layer}"]'


def _newest_checkpoint(folder: Path, key: str) -> Path:
    files = sorted((folder / "checkpoints").glob("round-*.safetensors"))
    if not files:
        raise RequestError(f"{key}: {folder} is a folder without a run's checkpoints; give a file or a run's folder")
    return files[-1]


def _beside(run: Path) -> dict[str, Tensor]:
    """What a run's checkpoints leave out: frozen parameters and buffers, not what stays with its clients."""
    path = run / "first.safetensors"
    if not path.is_file():
        return {}
    with safetensors.safe_open(path, "pt") as file:
        personal = json.loads((file.metadata() or {}).get("personal", "[]"))
        return {name: file.get_tensor(name) for name in file.keys() if name not in personal}  # noqa: SIM118


def _read(path: Path, key: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise RequestError(f"{key}: {path}: no such file")
    try:
        if path.suffix == ".safetensors" or _has_safetensors_header(path):
            return _unpacked(path, load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises depends on which of its bytes are damaged
        if isinstance(error, pickle.UnpicklingError) and "not an allowed global" in str(error):
            raise RequestError(
                f"{key}: {path} holds more than tensors, and loading it could run any code; save model.state_dict()"
            ) from None
        said = "" if isinstance(error, pickle.UnpicklingError) else f" ({' '.join(str(error).split())[:200]})"
        raise RequestError(
            f"{key}: {path} cannot be read: it is damaged, or no safetensors file and no PyTorch state dict{said}"
        ) from None
    named = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not named or not found or not all(isinstance(value, Tensor) for value in found.values()):
        inside = [name for name, value in found.items() if isinstance(value, dict)] if isinstance(found, dict) else []
        hint = f" (one may be inside, under {', '.join(map(repr, inside))})" if inside else ""
        raise RequestError(f"{key}: {path} is no state dict{hint}; save model.state_dict(), name to tensor")
    return found


def _has_safetensors_header(path: Path) -> bool:
    """Whether a file, whatever it is called, begins as the format does: the header's length, then JSON."""
    with open(path, "rb") as file:
        begin = file.read(9)
    return begin[8:] == b"{" and 8 + int.from_bytes(begin[:8], "little") <= path.stat().st_size


def _unpacked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A run's checkpoint has the weights in one row, and their names and shapes in its header."""
    with safetensors.safe_open(path, "pt") as file:
        layout = (file.metadata() or {}).get("layout")
    if layout is None or "row" not in tensors:
        return tensors
    shapes: dict[str, list[int]] = json.loads(layout)
    parts = tensors["row"].split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
