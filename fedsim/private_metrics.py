"""Clients' metrics with noise: what they send of an evaluation, summed so that no client shows."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from clients.evaluation import Total
from fedsim.experiment import MetricNoise

#: Of every client the same, so that its sum is no secret.
_COUNT = "examples"


def noised(totals: Iterable[Total], said: MetricNoise, generator: torch.Generator) -> dict[str, Tensor]:
    """The clients' statistics, summed with Gaussian noise; every client counts as one example.

    A client sends the means of its J statistics over its examples, each clipped to its bound B_j (Euclidean norm); to
    their sum is added N(0, (z B_j)^2 J). Replacing a client by nothing then moves the sum, each statistic in units of
    its bound, by at most sqrt(J), so that one evaluation is a Gaussian mechanism of noise multiplier z. How many
    clients evaluate is no secret.

    Args:
        totals: of each client, as an evaluator sums them: name -> ``float64 [m]``, with ``examples`` ``[1]``.
        said: z and the bounds.
        generator: draws the noise.

    Returns:
        Name -> ``float64 [m]``; ``examples`` is the number of clients.
    """
    sums: dict[str, Tensor] = {}
    clients = 0
    for total in totals:
        clients += 1
        for name, value in total.items():
            if name != _COUNT:
                mean = torch.nan_to_num(value / total[_COUNT].clamp(min=1), nan=0.0, posinf=1e300, neginf=-1e300)
                norm = float(mean.norm())
                bound = said.bound_of(name)
                clipped = mean if norm <= bound else mean * (bound / norm)
                sums[name] = sums[name] + clipped if name in sums else clipped.clone()
    spread = said.noise_multiplier * math.sqrt(len(sums))
    for name in sorted(sums):
        drawn = torch.randn(sums[name].shape, generator=generator, dtype=torch.float64)
        sums[name] = sums[name] + spread * said.bound_of(name) * drawn
    return {**sums, _COUNT: torch.tensor([float(clients)], dtype=torch.float64)}
