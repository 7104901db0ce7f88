"""Which clients are malicious, what becomes of their data, and how the success of an attack is judged."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clients import catalog
from clients.data_attacks import AttackContext, DataAttack, malicious_clients
from clients.errors import FedsimError, RequestError, RunError
from clients.updates import Updates
from fedsim.data.columns import Columns, TensorColumns, derive
from fedsim.data.population import Population
from fedsim.experiment import Experiment
from strategies.context import Context
from strategies.model_attacks import CraftContext, ModelAttack
from strategies.strategy import State

#: The server's split on which the success of attacks is judged: its accuracy is the share that they win.
SPLIT = "attack"


@dataclass(frozen=True)
class Malicious:
    """Clients that attack in one way.

    Attributes:
        name: the attack's name, for the record.
        number: its place among the experiment's attacks.
        attack: what they do.
        clients: ``int64`` ids, ascending.
        ctx: what they know of the data.
    """

    name: str
    number: int
    attack: DataAttack | ModelAttack
    clients: np.ndarray
    ctx: AttackContext

    @property
    def crafts(self) -> bool:
        """Whether these clients make their updates of what the honest ones send, after training."""
        return isinstance(self.attack, ModelAttack)

    def craft(
        self, u: Updates, mine: Tensor, malicious: Collection[int], server_lr: float, state: State, ctx: Context
    ) -> tuple[Tensor, State]:
        """The rows that these clients send, and what they remember.

        Args:
            u: the cohort, as it was honestly trained.
            mine: ``bool [n]``, which of it these clients are.
            malicious: ids of all attackers; the updates of others are none of the honest.
            server_lr: the server's learning rate.
            state: the server's state, which holds what attackers remember.
            ctx: the round.
        """
        assert isinstance(self.attack, ModelAttack)
        prefix = f"attack/{self.number}-{self.name}/"
        others = torch.tensor([client in malicious for client in u.clients.tolist()]) & ~mine
        seen, here = u.select(~others), mine[~others]
        told = CraftContext(
            round=ctx.round,
            weights=ctx.weights,
            examples=seen.examples,
            clients=seen.clients,
            generator=ctx.generator(f"attack/{self.number}"),
            server_lr=server_lr,
            others=u.examples[others],
            state={name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)},
        )
        with _named(self.name, "craft", f"round {ctx.round}, "):
            rows = self.attack.craft(seen.rows, here, told).to(u.rows.dtype)
            if rows.shape != (int(here.sum()), u.rows.shape[1]):
                raise ValueError(f"gave rows of shape {list(rows.shape)}; give {[int(here.sum()), u.rows.shape[1]]}")
            kept = self.attack.remember(seen.rows, here, told)
        return rows, {f"{prefix}{name}": value for name, value in kept.items()}

    def falsify(self, u: Updates, round: int) -> None:
        """Puts what these clients send in place of their updates, in place."""
        if isinstance(self.attack, DataAttack) and self.attack.changes_update:
            here = np.flatnonzero(np.isin(u.clients.numpy(), self.clients))
            places = torch.from_numpy(here)
            with _named(self.name, "update", f"round {round}, "):
                sent = self.attack.update(u.rows[places], u.clients.numpy()[here], round, self.ctx)
                if sent.shape != (len(here), u.rows.shape[1]):
                    raise ValueError(f"gave rows of shape {list(sent.shape)}; give {[len(here), u.rows.shape[1]]}")
            u.rows[places] = sent


@contextmanager
def _named(name: str, half: str, where: str = "") -> Iterator[None]:
    """Says of an error in an attack's own code whose it was."""
    try:
        yield
    except RequestError as error:
        lines = [line if line.startswith("attacks.") else f"attacks.{line}" for line in error.problems]
        raise RequestError(lines) from None
    except FedsimError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RunError(f"{where}attacks.{name}, {half}: {said}") from error


def choose(experiment: Experiment, population: Population) -> tuple[Malicious, ...]:
    """The experiment's attacks with their clients; those of one attack are not another's.

    Raises:
        RequestError: for a client that does not exist or attacks twice, or where too few are left.
    """
    found: list[Malicious] = []
    free, taken = population.trainable, set[int]()
    ctx = AttackContext(population.label, population.input, population.classes, population.input_range, experiment.seed)
    for number, said in enumerate(experiment.attacks):
        key = f"attacks.{said.part.name}"
        attack = catalog.build(said.part, "attacks", experiment.base, key=key)
        if not isinstance(attack, DataAttack | ModelAttack):
            raise RequestError(f"{key}: {type(attack).__name__} is no DataAttack and no ModelAttack")
        twice = sorted(taken & set(said.clients or ()))
        if twice:
            raise RequestError(f"{key}.clients: {twice[0]} attacks already; name each client once")
        share = said.fraction
        if share is not None:  # of all clients, whoever else attacks
            share *= len(population.trainable) / max(len(free), 1)
            if share > 1:
                raise RequestError(f"{key}.fraction: {said.fraction} of the clients are more than other attacks left")
        try:
            ids = malicious_clients(share, said.clients, free, experiment.seed, f"malicious/{number}")
        except RequestError as error:
            raise RequestError([f"{key}{line.removeprefix('attack')}" for line in error.problems]) from None
        free, taken = np.setdiff1d(free, ids), taken | set(ids.tolist())
        found.append(Malicious(said.part.name, number, attack, ids, ctx))
    return tuple(found)


def poisoned(population: Population, malicious: Sequence[Malicious]) -> Population:
    """The population with the malicious clients' training examples as they treat them, and a split to judge it on."""
    train, columns = population.splits["train"], population.columns
    for group in malicious:
        if isinstance(group.attack, DataAttack) and group.attack.changes_data:
            held = [train.of(client) for client in group.clients.tolist()]
            columns = derive(
                columns, Poison(group.name, group.attack, group.ctx), torch.from_numpy(np.concatenate(held))
            )
    server = dict(population.server)
    if "test" in server:
        aims = [aim for group in malicious if (aim := _aim(group, server["test"])) is not None]
        if aims:
            server[SPLIT] = TensorColumns({name: torch.cat([aim[name] for aim in aims]) for name in aims[0]})
    return replace(population, columns=columns, server=server)


@dataclass(frozen=True)
class Poison:
    """What an attack makes of training examples, as a change of columns."""

    name: str
    attack: DataAttack
    ctx: AttackContext

    def __call__(self, batch: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        with _named(self.name, "poison"):
            found = self.attack.poison(batch, index, self.ctx)
            for name, column in found.items():
                if name not in batch or column.shape[:1] != index.shape:
                    raise ValueError(f"gave {name!r} of shape {list(column.shape)} for {len(index)} examples")
            return found


def _aim(group: Malicious, test: Columns) -> dict[str, Tensor] | None:
    """The test examples on which an attack's success is judged, with the labels that it wants."""
    if not isinstance(group.attack, DataAttack):
        return None
    parts = []
    for index in torch.arange(len(test)).split(test.at_once):
        with _named(group.name, "success"):
            found = group.attack.success(test.take(index), group.ctx)
        if found is None:
            return None
        batch, counts = found
        parts.append({name: column[counts] for name, column in batch.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
