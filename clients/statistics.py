"""The running statistics of a model's batch norms as one row: a client's own, or pooled over a cohort."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients.normalization import batch_norms

#: The name of a client's (or the server's) statistics among its state.
STATISTICS = "batch_norm"


@dataclass(frozen=True)
class _Norm:
    name: str
    channels: int
    start: int


class Statistics:
    """Maps the running means and variances of a model's batch norms to one row.

    A row in work is ``[2 c]``: the means of all layers, then their variances. A row that is *kept* is ``[2 c + 1]``:
    means, variances less 1, and how many local steps they come from, so that zeros are a fresh start that nobody
    trained, and a store that knows nothing of a client need not be asked twice.

    Args:
        model: layers that keep no running statistics have no place in the row.

    Attributes:
        size: ``2 c``, twice the channels of all layers.
        kept_size: ``2 c + 1``.
    """

    def __init__(self, model: nn.Module):
        known = set(batch_norms(model))
        norms, start = [], 0
        for name, module in model.named_modules():
            if module in known and module.running_mean is not None:
                norms.append(_Norm(name, len(module.running_mean), start))
                start += len(module.running_mean)
        self.norms = tuple(norms)
        self.channels = start
        self.size, self.kept_size = 2 * start, 2 * start + 1

    def of(self, model: nn.Module) -> Tensor:
        """The model's own, ``[2 c]``."""
        buffers = dict(model.named_buffers())
        return self.gathered({name: buffers[name] for name in self.views(torch.empty(self.size))})

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """Buffer name -> view of a row ``[2 c]`` or block ``[k, 2 c]``."""
        found = {}
        for norm in self.norms:
            mean, prefix = slice(norm.start, norm.start + norm.channels), f"{norm.name}." if norm.name else ""
            variance = slice(self.channels + mean.start, self.channels + mean.stop)
            found[f"{prefix}running_mean"], found[f"{prefix}running_var"] = block[..., mean], block[..., variance]
        return found

    def spread(self, block: Tensor) -> dict[str, Tensor]:
        """Buffer name -> a tensor of its own ``[k, channels]``; vmap updates contiguous ones only in place."""
        return {name: view.clone(memory_format=torch.contiguous_format) for name, view in self.views(block).items()}

    def gathered(self, buffers: Mapping[str, Tensor]) -> Tensor:
        """The block ``[k, 2 c]`` of what :meth:`spread` gave."""
        values = list(buffers.values())
        return torch.cat([*values[::2], *values[1::2]], dim=-1)

    @torch.no_grad()
    def load(self, model: nn.Module, row: Tensor) -> None:
        """Copies a row ``[2 c]`` into the model's buffers."""
        buffers = dict(model.named_buffers())
        for name, view in self.views(row).items():
            buffers[name].copy_(view)

    def attach(self, model: nn.Module) -> None:
        """Lets those layers of ``model`` track running statistics, from a fresh start."""
        places = dict(model.named_modules())
        for norm in self.norms:
            module = places[norm.name]
            like = next(iter(model.parameters()))
            module.track_running_stats = True
            module.running_mean = torch.zeros(norm.channels, dtype=like.dtype)
            module.running_var = torch.ones(norm.channels, dtype=like.dtype)
            # Only a cumulative average (momentum=None) asks how many batches there were.
            module.num_batches_tracked = torch.tensor(0) if module.momentum is None else None

    def kept(self, block: Tensor, steps: Tensor) -> Tensor:
        """Rows in work ``[k, 2 c]``, from so many steps ``[k]``, as rows to keep ``[k, 2 c + 1]``."""
        rows = torch.cat([block, steps[:, None].to(block.dtype)], dim=1)
        rows[:, self.channels : self.size] -= 1
        return rows

    def in_work(self, kept: Tensor) -> Tensor:
        """Kept rows ``[..., 2 c + 1]`` as rows in work ``[..., 2 c]``."""
        rows = kept[..., : self.size].clone()
        rows[..., self.channels :] += 1
        return rows

    def known(self, kept: Tensor) -> bool:
        """Whether a kept row ``[2 c + 1]`` comes from training."""
        return float(kept[-1]) > 0

    # Pooling over clients: variance of the whole = mean of the variances + variance of the means.

    def moments(self, block: Tensor, weights: Tensor) -> Tensor:
        """Weighted first and second moments ``float64 [k, 2 c]`` of rows in work; they add over clients."""
        wide = block.to(torch.float64)
        means, variances = wide[:, : self.channels], wide[:, self.channels :]
        return torch.cat([means, variances + means.square()], dim=1) * weights[:, None]

    def pooled(self, moments: Tensor, weight: Tensor) -> Tensor:
        """The cohort's statistics ``[2 c]`` from the sum of its moments ``[2 c]`` and of its weights."""
        mean = moments / weight
        means, second = mean[: self.channels], mean[self.channels :]
        return torch.cat([means, (second - means.square()).clamp(min=0)])


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm normalises by the batch and leaves running statistics as they are."""
    norms = [norm for norm in batch_norms(model) if norm.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
