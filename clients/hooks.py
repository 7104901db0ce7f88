"""What a strategy may change in local training: protocols that the one local loop calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from clients.described import Described
from clients.updates import Updates

if TYPE_CHECKING:
    import torch

    from clients.recipe import Recipe
    from clients.task import Batch, Task

Call = Callable[[Tensor, "Batch"], Any]


@dataclass(frozen=True)
class Variables:
    """What a correction reads: ``v.weights``, ``v.client[...]``, ``v.server[...]``.

    Attributes:
        weights: ``[d]`` the global weights this round started from.
        client: this round's client state, ``[k, d]`` or ``[k, m]`` each (``[d]``/``[m]`` inside ``loss``, one client).
        server: server state that was broadcast, ``[d]`` or ``[m]`` each.
        round: the round.
        lr: the round's local learning rate, its schedule applied.
    """

    weights: Tensor
    client: Mapping[str, Tensor] = field(default_factory=dict)
    server: Mapping[str, Tensor] = field(default_factory=dict)
    round: int = 0
    lr: float = 0.0

    def select(self, which: int | slice | Tensor) -> Variables:
        """The same with the state of some clients alone; of one, without the dimension ``k``."""
        return (
            replace(self, client={name: value[which] for name, value in self.client.items()}) if self.client else self
        )


class Correction(Described):
    """The base of local corrections (proximal term, control variates, contrastive terms). State is declared, not kept.

    Attributes:
        client_state: name -> ``"row"`` or a length ``m``; kept per client between rounds, zeros at first.
        server_state: likewise for the server; broadcast with the weights, and billed.
        needs_loss_before: whether clients send ``loss_before`` ``float64 [k]``: the task's mean loss on all their
            training examples, of the weights that they were sent.
    """

    client_state: Mapping[str, str | int] = {}
    server_state: Mapping[str, str | int] = {}
    needs_loss_before: bool = False

    def check(self, recipe: Recipe) -> list[str]:
        """What of local training does not go with the correction, one line a key (``client.optimizer: ...``)."""
        return []

    def fits(self, strategy: Any) -> list[str]:
        """What of the strategy that it is part of does not go with the correction, one line a key."""
        return []

    def loss(self, call: Call, batch: Batch, outputs: Any, v: Variables) -> Tensor:
        """An added loss ``[B]`` for one client's batch; ``call(row, batch)`` runs the model with other weights."""
        raise NotImplementedError

    def gradient(self, grad: Tensor, row: Tensor, v: Variables, step: int) -> Tensor:
        """Changes the gradient ``[k, d]`` at the weights ``row`` ``[k, d]`` before regularisation and optimiser."""
        return grad

    def finish(self, u: Updates, v: Variables) -> tuple[Updates, dict[str, Tensor]]:
        """After training: what else to send, and the new client state (``[k, ...]`` each)."""
        return u, {}

    def server(self, u: Updates, server_state: dict[str, Tensor], ctx: Any) -> dict[str, Tensor]:
        """The server's half, with the reduced updates (sums, or rows where the rule needs them)."""
        return server_state

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def adds_loss(self) -> bool:
        return type(self).loss is not Correction.loss

    @property
    def changes_gradient(self) -> bool:
        return type(self).gradient is not Correction.gradient


@dataclass(frozen=True)
class ClientData:
    """One client's training examples, for a :class:`LocalTraining`.

    Attributes:
        columns: name -> ``[n, ...]``.
        generator: draws the batches.
        transforms: changes a batch at random; :meth:`batches` calls it with the number of the batch as ``step``.
    """

    columns: dict[str, Tensor]
    generator: torch.Generator
    transforms: Callable[..., dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def batches(self, batch_size: int, epochs: int = 1) -> Iterator[dict[str, Tensor]]:
        """Shuffled mini-batches; the last of an epoch may be short."""
        import torch

        step = 0
        for _ in range(epochs):
            for index in torch.randperm(len(self), generator=self.generator).split(batch_size):
                batch = {name: column[index] for name, column in self.columns.items()}
                yield batch if self.transforms is None else self.transforms(batch, step=step)
                step += 1


@dataclass(frozen=True)
class LocalContext:
    """Where a :class:`LocalTraining` runs: the round, the client and what the experiment says of training.

    What ``recipe`` asks of the loop (epochs, optimiser, penalties) is for it to do; ``lr`` is the round's learning
    rate, the schedule applied.
    """

    round: int
    client: int
    recipe: Recipe
    task: Task
    generator: torch.Generator
    names: tuple[str, ...]
    personal: tuple[str, ...]
    lr: float


class LocalTraining:
    """Replaces the local loop, client by client. What it changes in the model's parameters is the update."""

    def train(self, model: nn.Module, data: ClientData, ctx: LocalContext) -> dict[str, float | Tensor]:
        """Trains ``model`` in place; the numbers returned are sent along (``loss`` and ``steps`` are known)."""
        raise NotImplementedError


@dataclass(frozen=True)
class ClientFailure:
    """A client whose own code raised, or whose update cannot be used."""

    client: int
    kind: str
    stage: str
    message: str
    traceback: str = ""
