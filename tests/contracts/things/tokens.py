"""Token classification with padding: is a token larger than the first one of its sentence? A small transformer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedsim
from clients import Task

WORDS, LONGEST = 8, 9


def sentences(examples: int = 480) -> fedsim.Source:
    """Sentences of 2 to 9 tokens in 1..8, 0 where padded."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, WORDS + 1, (examples, LONGEST), generator=draw)
    length = torch.randint(2, LONGEST + 1, (examples, 1), generator=draw)
    real = torch.arange(LONGEST) < length
    return fedsim.Source(
        train={"tokens": tokens * real, "larger": (tokens > tokens[:, :1]).long() * real}, label="larger"
    )


class Transformer(nn.Module):
    """One block with one head of attention, which never looks at padding. Logits ``[B, T, 2]``."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.word, self.place = nn.Embedding(WORDS + 1, width), nn.Embedding(LONGEST, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word(tokens) + self.place.weight
        scores = self.query(x) @ self.key(x).mT / x.shape[-1] ** 0.5
        seen = scores.masked_fill((tokens == 0)[:, None, :], -torch.inf).softmax(-1)
        x = x + seen @ self.value(x)
        return self.head(self.norm(x + self.mix(x)))


class Tagging(Task):
    """A class for each real token; a sentence counts by its tokens."""

    primary = "accuracy"
    higher_is_better = True

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["tokens"])

    def loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        real = (batch["tokens"] != 0).to(outputs.dtype)
        losses = F.cross_entropy(outputs.transpose(1, 2), batch["larger"], reduction="none")
        return (losses * real).sum(1) / real.sum(1), real.sum(1)

    def statistics(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        real = batch["tokens"] != 0
        right = (outputs.argmax(2) == batch["larger"]) & real
        return {"accuracy": torch.stack([right.sum(1), real.sum(1)], dim=1).float()}

    def metric(self, name: str, total: Mapping[str, Tensor]) -> float:
        right, tokens = total["accuracy"].tolist()
        return right / tokens
