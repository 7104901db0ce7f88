"""Random changes of training inputs, such as torchvision's transforms, drawn by key."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clients import randomness
from clients.errors import RequestError

_MIXING = ("MixUp", "CutMix")


@dataclass(frozen=True)
class Transforms:
    """Transforms, one after another, on batches of a client.

    Torchvision's v2 transforms get image and label together, so that those of segmentation (labels ``[B, H, W]``) move
    both alike and MixUp and CutMix make soft labels; any other callable gets the inputs alone, ``[B, ...]`` to
    ``[B, ...]``. Torchvision draws once a batch: all its examples are flipped, or none; ``by = "example"`` draws for
    each of them, and takes as many calls.

    Attributes:
        steps: the transforms.
        seed: the experiment's; every draw is keyed by it, the purpose, the round, the client and the step.
        by: what one draw is for.
        input: the column of inputs: images ``[B, C, H, W]``, ``[B, H, W]``, or flat squares ``[B, n]``.
        label: the column of labels.
        purpose: what the draws are for.
    """

    steps: tuple[Callable[..., Any], ...]
    seed: int
    by: Literal["batch", "example"] = "batch"
    input: str = "x"
    label: str = "y"
    purpose: str = "transforms"

    def stack(
        self, batch: dict[str, Tensor], count: Tensor, clients: np.ndarray, round: int, step: int
    ) -> dict[str, Tensor]:
        """A stack's batch ``[k, B, ...]``, each client's by its own draws.

        Only its ``count`` ``[k]`` real examples are drawn for; those beyond repeat the last of them.
        """
        width, parts = len(batch[self.input][0]), []
        for i, (client, real) in enumerate(zip(clients.tolist(), count.tolist(), strict=True)):
            part = self({name: column[i, : max(real, 1)] for name, column in batch.items()}, client, round, step)
            places = torch.arange(width).clamp(max=max(real, 1) - 1)
            parts.append({name: column[places] if real < width else column for name, column in part.items()})
        return {name: torch.stack([part[name] for part in parts]) for name in batch}

    def __call__(self, batch: dict[str, Tensor], client: int = 0, round: int = 0, step: int = 0) -> dict[str, Tensor]:
        """One client's batch ``[B, ...]``."""
        if not self.steps or not len(batch[self.input]):
            return batch
        with _keyed(randomness.key(self.seed, f"{self.purpose}/{step}", round, client), everywhere=not self.all_known):
            if self.by == "batch":
                return self._apply(batch)
            parts = [
                self._apply({name: column[i : i + 1] for name, column in batch.items()})
                for i in range(len(batch[self.input]))
            ]
        return {name: torch.cat([part[name] for part in parts]) for name in batch}

    def change(self, batch: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Input and label of examples ``[n, ...]``, the same whoever asks for them."""
        changed = self(batch)
        return {name: changed[name] for name in (self.input, self.label) if name in changed}

    def _apply(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x, y = batch[self.input], batch.get(self.label)
        images, flat = _as_images(x), x.dim() == 2
        for step in self.steps:
            try:
                images, y = _transformed(step, images, y)
            except Exception as error:
                said = f"{type(error).__name__} on {list(images.shape)}: {' '.join(str(error).split())}"
                raise RequestError(f"data.{self.purpose}: {_called(step)} raises {said}") from error
            if not isinstance(images, Tensor) or images.shape[:1] != x.shape[:1]:
                made = f"{list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
                raise RequestError(f"data.{self.purpose}: {_called(step)} made {made} of {len(x)} examples; give all")
        if images.dim() == 4 and x.dim() < 4:
            images = images.flatten(1) if flat else images.squeeze(1)
        changed = {self.input: images} if y is None else {self.input: images, self.label: y}
        return {**batch, **changed}

    @cached_property
    def all_known(self) -> bool:
        """Whether all are torchvision's, which draw from torch's generator alone."""
        return all(_is_torchvision(step) for step in _inside(self.steps))

    @property
    def mixes(self) -> bool:
        """Whether examples of a batch may be mixed with one another: by torchvision's that do, or by one's own."""
        inside = list(_inside(self.steps))
        own = self.by == "batch" and not self.all_known
        return own or any(type(step).__name__ in _MIXING for step in inside)


def _inside(steps: Iterable[Any]) -> Iterator[Any]:
    """Transforms with those that they are made of."""
    for step in steps:
        yield step
        held = getattr(step, "transforms", ())
        yield from _inside(held if isinstance(held, Iterable) else ())


@contextmanager
def _keyed(key: int, everywhere: bool) -> Iterator[None]:
    """Inside, torch's generator is seeded by the key, and everywhere also Python's and numpy's; restored after."""
    states = (random.getstate(), np.random.get_state()) if everywhere else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key)
        if states is None:
            yield
            return
        try:
            random.seed(key)
            np.random.seed(key % 2**32)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _called(step: Callable[..., Any]) -> str:
    return getattr(step, "__name__", type(step).__name__)


def _as_images(x: Tensor) -> Tensor:
    """``[B, H, W]`` and flat squares as ``[B, 1, H, W]``; all else as it is."""
    if x.dim() == 3:
        return x[:, None]
    side = math.isqrt(x.shape[1]) if x.dim() == 2 else 0
    return x.view(len(x), 1, side, side) if side and side * side == x.shape[1] else x


def _transformed(step: Callable[..., Any], x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if not _is_torchvision(step):
        return step(x), y
    from torchvision import tv_tensors

    sample: dict[str, Any] = {"image": tv_tensors.Image(x)}
    if y is not None:
        sample["label"] = tv_tensors.Mask(y) if y.dim() >= 3 else y
    found = step(sample)
    label = None if y is None else found["label"].as_subclass(Tensor)
    image = found["image"]
    return image.as_subclass(Tensor) if isinstance(image, Tensor) else image, label


def _is_torchvision(step: Callable[..., Any]) -> bool:
    return any(kind.__module__.startswith("torchvision.transforms.v2") for kind in type(step).__mro__)
