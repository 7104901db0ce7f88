"""MOON: model-contrastive federated learning (Li, He and Song 2021, "Model-contrastive federated learning")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients import Classification, Correction, Updates, Variables


class Features(nn.Module):
    """A network whose features are an output beside the logits."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 24):
        super().__init__()
        inputs = torch.Size(input_shape).numel()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return {"features": features, "logits": self.head(features.relu())}


class OnLogits(Classification):
    """Classification by the logits among several outputs."""

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss(outputs["logits"], batch)

    def statistics(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().statistics(outputs["logits"], batch)


class Moon(Correction):
    """Adds ``-mu log(e^(s_g / tau) / (e^(s_g / tau) + e^(s_p / tau)))`` to the loss of an example.

    ``s_g`` and ``s_p`` are the cosines between its features under the local weights and those under the global weights
    and under the client's own after its previous round. In its first round the previous weights are the global ones.
    """

    client_state = {"previous": "row", "rounds": 1}

    def __init__(self, mu: float = 1.0, tau: float = 0.5):
        self.mu, self.tau = mu, tau

    def loss(self, call: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor], v: Variables) -> Tensor:
        previous = torch.where(v.client["rounds"] > 0, v.client["previous"], v.weights)
        with torch.no_grad():
            of_global = call(v.weights, batch)["features"]
            of_previous = call(previous, batch)["features"]
        near = F.cosine_similarity(outputs["features"], of_global) / self.tau
        far = F.cosine_similarity(outputs["features"], of_previous) / self.tau
        return self.mu * F.softplus(far - near)

    def finish(self, u: Updates, v: Variables) -> tuple[Updates, dict[str, Tensor]]:
        return u, {"previous": v.weights + u.rows, "rounds": v.client["rounds"] + 1}
