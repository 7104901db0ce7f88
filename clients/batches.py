"""Which examples a client trains on at which local step: keyed, and the same whoever else is in the stack."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clients import randomness
from clients.recipe import Recipe, Uneven


@dataclass(frozen=True)
class Work:
    """How much ``k`` clients train this round, arrays ``int64 [k]``.

    Attributes:
        examples: training examples each holds.
        per_epoch: steps an epoch takes.
        steps: steps each takes in all.
    """

    examples: np.ndarray
    per_epoch: np.ndarray
    steps: np.ndarray


def work(recipe: Recipe, examples: np.ndarray, clients: np.ndarray, seed: int, round: int, spare: int = 0) -> Work:
    """The steps of each client, from its examples and the recipe; uneven work is drawn per client and round.

    Args:
        recipe: the local training.
        examples: ``int64 [k]`` training examples.
        clients: ``int64 [k]`` ids.
        seed: the experiment's seed.
        round: the round.
        spare: 1 where a last batch of one example cannot be trained on (batch norm) and is left out.
    """
    batch = recipe.batch_size
    per_epoch = -(-examples // batch) - ((examples % batch == 1) if spare and batch > 1 else 0)
    amount = recipe.epochs if recipe.steps is None else recipe.steps
    if isinstance(amount, Uneven):
        low, high = amount.uniform
        draws = randomness.uniforms(randomness.keys(seed, "work", round, clients), 1)[:, 0]
        number = low + np.floor(draws * (high - low + 1)).astype(np.int64)
    else:
        number = np.full(len(clients), amount, dtype=np.int64)
    if recipe.personal_epochs is not None:
        number = number + recipe.personal_epochs
    steps = number * per_epoch if recipe.steps is None else np.where(per_epoch > 0, number, 0)
    return Work(examples, per_epoch, steps)


@dataclass(frozen=True)
class Schedule:
    """The batches of a stack of ``k`` clients, most steps first.

    Attributes:
        index: ``int64 [T, k, B]`` positions in the data pool; those beyond a batch's count repeat a valid one.
        count: ``int64 [T, k]`` examples in each batch; 0 once a client has finished.
        active: for each step, how many clients (a prefix) still train.
    """

    index: Tensor
    count: Tensor
    active: list[int]

    def mask(self, step: int, active: int) -> Tensor | None:
        """``bool [active, B]`` of the real examples, or None where every batch is full."""
        count = self.count[step, :active]
        width = self.index.shape[2]
        if bool((count == width).all()):
            return None
        return torch.arange(width) < count[:, None]


def schedule(
    done: Work,
    members: list[np.ndarray],
    clients: np.ndarray,
    batch_size: int,
    seed: int,
    round: int,
    poisson: bool = False,
) -> Schedule:
    """Shuffles every client's examples anew each epoch and cuts them into batches.

    Or, with ``poisson``, puts each example into each batch independently, with the chance ``batch_size`` over the
    client's examples (at most 1), as amplified privacy needs it; batches may then be empty.

    Args:
        done: the clients' work, sorted by steps, most first.
        members: for each client its examples' positions in the pool.
        clients: ``int64 [k]`` ids.
        batch_size: examples a step.
        seed: the experiment's seed.
        round: the round.
        poisson: whether batches are drawn by chance.
    """
    if poisson:
        return _by_chance(done, members, clients, batch_size, seed, round)
    total, width = int(done.steps.max(initial=0)), int(min(batch_size, done.examples.max(initial=1)))
    k, longest = len(clients), int(done.examples.max(initial=0))
    steps = np.arange(total)
    safe = np.maximum(done.per_epoch, 1)
    epoch, batch = steps[:, None] // safe, steps[:, None] % safe
    epochs = int(epoch.max(initial=0)) + 1

    base = randomness.keys(seed, "batches", round, clients)
    streams = (base[:, None] + np.arange(epochs, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)).reshape(-1)
    draws = randomness.uniforms(streams, longest).reshape(k, epochs, longest)
    draws[np.broadcast_to(np.arange(longest) >= done.examples[:, None, None], draws.shape)] = 2.0
    order = draws.argsort(axis=2, kind="stable")

    pool = np.zeros((k, longest), dtype=np.int64)
    for i, member in enumerate(members):
        pool[i, : len(member)] = member
    place = batch[:, :, None] * batch_size + np.arange(width)
    real = (place < done.examples[:, None]) & (steps[:, None] < done.steps)[:, :, None]
    rows = np.arange(k)[None, :, None]
    picked = order[rows, np.minimum(epoch, epochs - 1)[:, :, None], np.where(real, place, 0)]
    return Schedule(
        index=torch.from_numpy(pool[rows, picked]),
        count=torch.from_numpy(real.sum(axis=2)),
        active=(steps[:, None] < done.steps).sum(axis=1).tolist(),
    )


def _by_chance(
    done: Work, members: list[np.ndarray], clients: np.ndarray, batch_size: int, seed: int, round: int
) -> Schedule:
    """Poisson batches: those of a client are a function of its id, its number of examples and the round alone."""
    total, k = int(done.steps.max(initial=0)), len(clients)
    base = randomness.keys(seed, "poisson batches", round, clients)
    found = [
        _successes(base[i], min(1.0, batch_size / max(int(done.examples[i]), 1)), int(done.examples[i] * done.steps[i]))
        for i in range(k)
    ]
    # Trial t is the example t % n at the step t // n.
    steps = [trials // max(int(n), 1) for trials, n in zip(found, done.examples, strict=True)]
    count = np.stack([np.bincount(step, minlength=total) for step in steps], axis=1)
    index = np.empty((total, k, max(1, int(count.max(initial=1)))), dtype=np.int64)
    for i, (trials, step, member) in enumerate(zip(found, steps, members, strict=True)):
        # What is beyond a batch's count repeats the client's first example.
        index[:, i] = member[0] if len(member) else 0
        place = np.arange(len(step)) - (count[:, i].cumsum() - count[:, i])[step]
        index[step, i, place] = member[trials % max(len(member), 1)]
    return Schedule(
        index=torch.from_numpy(index),
        count=torch.from_numpy(count),
        active=(np.arange(total)[:, None] < done.steps).sum(axis=1).tolist(),
    )


def _successes(key: np.uint64, chance: float, trials: int) -> np.ndarray:
    """Which of so many independent trials succeed, ``int64``, ascending.

    Drawn by the geometric gaps between them, ``1 + floor(log(1 - u) / log(1 - chance))``, so that the cost goes by the
    successes and not by the trials.
    """
    parts, last, drawn = [np.empty(0, dtype=np.int64)], -1, 0
    while last < trials - 1:
        size = int((trials - 1 - last) * chance) + 8
        with np.errstate(divide="ignore"):
            gaps = 1 + np.floor(np.log1p(-randomness.uniforms(np.array([key]), size, drawn)[0]) / np.log1p(-chance))
        parts.append(last + gaps.astype(np.int64).cumsum())
        last, drawn = int(parts[-1][-1]), drawn + size
    every = np.concatenate(parts)
    return every[every < trials]
