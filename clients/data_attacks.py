"""What malicious clients do to their own training data, or send in the place of what they learnt.

Each client acts alone and sees nothing but its own examples and the weights that it was sent. What is done to an
example is a function of the example, so that it is always treated alike; the server's examples and those that a client
validates on are never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from clients import randomness
from clients.described import Described
from clients.errors import RequestError
from clients.recipe import Count, NonNegative, Positive

#: Above none, up to all.
Share = Annotated[float, Field(gt=0, le=1)]

Index = Annotated[int, Field(ge=0)]

Corner = Literal["top_left", "top_right", "bottom_left", "bottom_right"]

#: Draws at once: their float64 temporaries stay within some megabytes.
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class AttackContext:
    """What an attack knows of the data.

    Attributes:
        label: the labels' column.
        input: the inputs' column.
        classes: how many there are, where that is known.
        input_range: ``(low, high)`` of the inputs, where the source declares it.
        seed: the experiment's seed.
    """

    label: str = "y"
    input: str = "x"
    classes: int | None = None
    input_range: tuple[float, float] | None = None
    seed: int = 0


class DataAttack(Described):
    """The base of attacks of single clients; one overrides what it changes.

    Attributes:
        knows: what an attacker knows.
        colludes: whether attackers act together.
        acts_on: ``data`` or ``model``.
    """

    knows: ClassVar[str] = "its own examples"
    colludes: ClassVar[bool] = False
    acts_on: ClassVar[Literal["data", "model"]] = "data"

    def poison(self, batch: dict[str, Tensor], examples: Tensor, ctx: AttackContext) -> dict[str, Tensor]:
        """The training examples as the malicious client sees them; the columns given are not changed in place.

        Args:
            batch: columns ``[n, ...]`` of examples that malicious clients hold.
            examples: their positions in the pool, ``int64 [n]``, which key the draws.
            ctx: what is known of the data.
        """
        return batch

    def success(self, batch: dict[str, Tensor], ctx: AttackContext) -> tuple[dict[str, Tensor], Tensor] | None:
        """What the attack is judged on: its rate of success is the accuracy on these examples with these labels.

        Args:
            batch: columns ``[n, ...]`` of the server's test examples.
            ctx: what is known of the data.

        Returns:
            The columns with the trigger in the inputs and the wanted labels, and ``bool [n]`` of the examples that
            count; None for an attack without an aim, whose effect is the accuracy itself.
        """
        return None

    def update(self, rows: Tensor, clients: np.ndarray, round: int, ctx: AttackContext) -> Tensor:
        """What these clients (ids ``int64 [k]``) send instead of their updates ``[k, d]``."""
        return rows

    @property
    def changes_data(self) -> bool:
        return type(self).poison is not DataAttack.poison

    @property
    def changes_update(self) -> bool:
        return type(self).update is not DataAttack.update


@dataclass(frozen=True)
class LabelFlip(DataAttack):
    """Trains on wrong labels: ``y -> classes - 1 - y``, or one class as another (Tolpegin et al. 2020).

    The attacker knows its own examples alone, does not collude, and acts on its data. Its aim, with a pair, is that the
    source is taken for the target.

    Args:
        source: the class that is relabelled; left out with ``target``, all are.
        target: what it is relabelled as.
        swap: whether the target is relabelled as the source, too.
    """

    source: Index | None = None
    target: Index | None = None
    swap: bool = False

    def __post_init__(self) -> None:
        if (self.source is None) != (self.target is None):
            raise ValueError("source and target make a pair; give both, or neither to flip every label")
        if self.source is None and self.swap:
            raise ValueError("swap needs a pair; give source and target")
        if self.source is not None and self.source == self.target:
            raise ValueError(f"source and target are both {self.source}, which flips nothing; give two classes")

    def poison(self, batch: dict[str, Tensor], examples: Tensor, ctx: AttackContext) -> dict[str, Tensor]:
        return {**batch, ctx.label: self._flipped(_labels(batch, ctx), ctx)}

    def success(self, batch: dict[str, Tensor], ctx: AttackContext) -> tuple[dict[str, Tensor], Tensor] | None:
        if self.source is None:
            return None
        y = _labels(batch, ctx)
        wanted = self._flipped(y, ctx)
        return {**batch, ctx.label: wanted}, wanted != y

    def _flipped(self, y: Tensor, ctx: AttackContext) -> Tensor:
        if self.source is None or self.target is None:
            if ctx.classes is None:
                raise RequestError("label_flip: the number of classes is not known; give source and target")
            return ctx.classes - 1 - y
        _check_class("label_flip.source", self.source, ctx)
        _check_class("label_flip.target", self.target, ctx)
        flipped = y.masked_fill(y == self.source, self.target)
        return flipped.masked_fill(y == self.target, self.source) if self.swap else flipped


@dataclass(frozen=True)
class Backdoor(DataAttack):
    """Stamps a square on a share of its images and calls them the target (BadNets, Gu, Dolan-Gavitt and Garg 2017).

    The attacker knows its own examples alone, does not collude, and acts on its data. Its aim is that any image with
    the square is taken for the target; images that are of that class anyway do not count as its success.

    Args:
        target: the class that stamped images are labelled as.
        size: the square's side in pixels.
        value: of its pixels, in every channel; left out, the top of the input range.
        corner: where it stands.
        share: the chance that an example of the attacker is stamped.
    """

    target: Index = 0
    size: Count = 2
    value: float | None = None
    corner: Corner = "bottom_right"
    share: Share = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a square of {self.size} pixels is no trigger; give a size of at least 1")
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share} is not above 0 and at most 1")

    def poison(self, batch: dict[str, Tensor], examples: Tensor, ctx: AttackContext) -> dict[str, Tensor]:
        _check_class("backdoor.target", self.target, ctx)
        x, y = _inputs(batch, ctx), _labels(batch, ctx)
        draws = randomness.uniforms(randomness.keys(ctx.seed, "backdoor", 0, examples.numpy()), 1)[:, 0]
        stamped = torch.from_numpy(draws < self.share)
        here = stamped.view(-1, *[1] * (x.dim() - 1))
        return {
            **batch,
            ctx.input: torch.where(here, self.trigger(x, ctx), x),
            ctx.label: y.masked_fill(stamped, self.target),
        }

    def success(self, batch: dict[str, Tensor], ctx: AttackContext) -> tuple[dict[str, Tensor], Tensor]:
        _check_class("backdoor.target", self.target, ctx)
        y = _labels(batch, ctx)
        stamped = {ctx.input: self.trigger(_inputs(batch, ctx), ctx), ctx.label: torch.full_like(y, self.target)}
        return {**batch, **stamped}, y != self.target

    def trigger(self, x: Tensor, ctx: AttackContext) -> Tensor:
        """The images with the square, all else alike.

        Args:
            x: ``[n, C, H, W]``, ``[n, H, W]``, or ``[n, H * H]`` of square images of one channel.
            ctx: what is known of the data.

        Raises:
            RequestError: for inputs that are no images or too small, or a value that they cannot have.
        """
        value, images = self._value(x, ctx), _as_images(x).clone()
        height, width = images.shape[-2:]
        if self.size > min(height, width):
            raise RequestError(f"backdoor.size: {self.size} pixels do not fit images of {height} x {width}")
        vertical, horizontal = self.corner.split("_")
        rows = slice(self.size) if vertical == "top" else slice(height - self.size, height)
        columns = slice(self.size) if horizontal == "left" else slice(width - self.size, width)
        images[..., rows, columns] = value
        return images.reshape(x.shape)

    def _value(self, x: Tensor, ctx: AttackContext) -> float:
        if self.value is None and ctx.input_range is None:
            raise RequestError("backdoor.value: the range of the inputs is not known; give the value of the square")
        value = ctx.input_range[1] if self.value is None and ctx.input_range else self.value
        assert value is not None
        if ctx.input_range is not None and not ctx.input_range[0] <= value <= ctx.input_range[1]:
            low, high = ctx.input_range
            raise RequestError(f"backdoor.value: {value} is outside the inputs' range, {low} to {high}")
        if not x.is_floating_point() and value != int(value):
            raise RequestError(f"backdoor.value: {value} for inputs of whole numbers; give a whole number")
        return value


@dataclass(frozen=True)
class NoisyFeatures(DataAttack):
    """Trains on inputs with Gaussian noise, always the same for an example, within the input range.

    The attacker knows its own examples alone, does not collude, and acts on its data; it has no aim but poor weights.

    Args:
        std: standard deviation of the noise, in the units of the inputs.
    """

    std: Positive

    def poison(self, batch: dict[str, Tensor], examples: Tensor, ctx: AttackContext) -> dict[str, Tensor]:
        x = _inputs(batch, ctx)
        if not x.is_floating_point():
            raise RequestError(f"noisy_features: {_named(ctx.input, x)}; noise needs real-valued inputs")
        keys = randomness.keys(ctx.seed, "noisy features", 0, examples.numpy())
        noisy = x + self.std * _normals(keys, x[0].numel() if len(x) else 0, x.dtype).view(x.shape)
        return {**batch, ctx.input: noisy if ctx.input_range is None else noisy.clamp(*ctx.input_range)}


@dataclass(frozen=True)
class FreeRider(DataAttack):
    """Sends no learning and claims its examples all the same (Fraboni, Vidal and Lorenzi 2021, "Free-rider attacks").

    What it sends is an update of zeros, or Gaussian noise that looks like one. The attacker knows the weights that it
    was sent alone, does not collude, and acts on what it sends; its aim is the final weights, for nothing.

    Args:
        noise: standard deviation of each number that it sends.
    """

    knows: ClassVar[str] = "the global weights"
    acts_on: ClassVar[Literal["data", "model"]] = "model"

    noise: NonNegative = 0.0

    def update(self, rows: Tensor, clients: np.ndarray, round: int, ctx: AttackContext) -> Tensor:
        sent = torch.zeros_like(rows)
        if self.noise:
            for row, client in zip(sent, clients.tolist(), strict=True):
                row.normal_(0, self.noise, generator=randomness.generator(ctx.seed, "free rider", round, client))
        return sent


def malicious_clients(
    fraction: float | None, clients: Sequence[int] | None, able: np.ndarray, seed: int, purpose: str = "malicious"
) -> np.ndarray:
    """Who is malicious: the clients named, or so many of those that can be, by a keyed draw.

    Each client has one draw, so that a larger fraction adds clients and takes none back.

    Args:
        fraction: of ``able``, rounded; above 0, it is at least one client.
        clients: ids instead.
        able: ids ``int64`` of the clients that can be malicious, as a rule those that train.
        seed: the experiment's seed.
        purpose: what the draw is for.

    Returns:
        Ids ``int64``, ascending.

    Raises:
        RequestError: for a fraction outside [0, 1], ids that are unknown or named twice, or both or neither given.
    """
    if (fraction is None) == (clients is None):
        raise RequestError("attack: give fraction or clients, one of the two")
    if clients is not None:
        return _named_clients(clients, able)
    assert fraction is not None
    if not 0 <= fraction <= 1:
        raise RequestError(f"attack.fraction: {fraction} is not in 0 to 1")
    number = max(round(fraction * len(able)), 1) if fraction else 0
    if number > len(able):
        raise RequestError("attack.fraction: there is no client to be malicious")
    draws = randomness.uniforms(randomness.keys(seed, purpose, 0, able), 1)[:, 0]
    return np.sort(np.asarray(able, dtype=np.int64)[np.argsort(draws, kind="stable")[:number]])


def _named_clients(clients: Sequence[int], able: np.ndarray) -> np.ndarray:
    known, problems = set(np.asarray(able).tolist()), []
    if unknown := [client for client in clients if client not in known]:
        have = f"they are among {min(known)} to {max(known)}" if known else "there is none"
        problems.append(f"attack.clients: {_listed(unknown)} cannot be malicious clients; {have}")
    if len(set(clients)) < len(clients):
        twice = sorted({client for client in clients if list(clients).count(client) > 1})
        problems.append(f"attack.clients: {_listed(twice)} more than once; name each client once")
    if problems:
        raise RequestError(problems)
    return np.array(sorted(clients), dtype=np.int64)


def _listed(clients: Sequence[int]) -> str:
    return ", ".join(map(str, clients[:5])) + (f" and {len(clients) - 5} more" if len(clients) > 5 else "")


def _column(batch: dict[str, Tensor], name: str) -> Tensor:
    if name not in batch:
        raise RequestError(f"attack: the data have no column {name!r}; they have {', '.join(batch)}")
    return batch[name]


def _inputs(batch: dict[str, Tensor], ctx: AttackContext) -> Tensor:
    return _column(batch, ctx.input)


def _labels(batch: dict[str, Tensor], ctx: AttackContext) -> Tensor:
    """The labels ``int [n]``.

    Raises:
        RequestError: where they are something else, or one is no class, with where it is.
    """
    y = _column(batch, ctx.label)
    if y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise RequestError(f"attack: {_named(ctx.label, y)}; this attack needs one class an example, integers [n]")
    wrong = y < 0 if ctx.classes is None else (y < 0) | (y >= ctx.classes)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        allowed = "0 and more" if ctx.classes is None else f"0 to {ctx.classes - 1}"
        raise RequestError(
            f"attack: label {int(y[place])} in row {place} of {ctx.label!r} is no class; they are {allowed}"
        )
    return y


def _named(name: str, column: Tensor) -> str:
    return f"{name!r} is {str(column.dtype).removeprefix('torch.')} {list(column.shape)}"


def _check_class(key: str, given: int, ctx: AttackContext) -> None:
    if given < 0 or (ctx.classes is not None and given >= ctx.classes):
        known = "" if ctx.classes is None else f"; the classes are 0 to {ctx.classes - 1}"
        raise RequestError(f"{key}: {given} is no class{known}")


def _as_images(x: Tensor) -> Tensor:
    """``[n, ..., H, W]``."""
    if x.dim() in (3, 4):
        return x
    side = round(x.shape[1] ** 0.5) if x.dim() == 2 else 0
    if x.dim() != 2 or side * side != x.shape[1]:
        raise RequestError(
            f"backdoor: inputs {list(x.shape)} are no images; it needs [n, C, H, W], [n, H, W] or square ones of one"
            " channel laid flat, [n, H * H]"
        )
    return x.reshape(-1, side, side)


def _normals(keys: np.ndarray, size: int, dtype: torch.dtype) -> Tensor:
    """Standard normal draws ``[n, size]``, one stream a key, by the inverse of the normal distribution function."""
    found = torch.empty(len(keys), size, dtype=dtype)
    step = max(1, _AT_ONCE // max(size, 1))
    for part in (slice(start, start + step) for start in range(0, len(keys), step)):
        draws = torch.from_numpy(randomness.uniforms(keys[part], size))
        found[part] = torch.special.ndtri(draws.clamp_(min=2.0**-54)).to(dtype)  # a draw may be 0
    return found
