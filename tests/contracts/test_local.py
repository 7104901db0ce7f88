"""What a user changes in local training: an own correction (MOON) and an own loop (FedRep)."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from torch import Tensor, nn

import clients
import fedsim
from tests.contracts.contract import Contract


class TestMoon(Contract):
    table = {
        "name": "moon",
        "rounds": 6,
        "data": {"clients": 8, "proxy": 0},
        "model": {"name": "moon.py:Features", "width": 24},
        "task": "moon.py:OnLogits",
        "client": {"lr": 0.2, "epochs": 2},
        "strategy": {"clients_per_round": 5, "correction": {"name": "moon.py:Moon", "mu": 1.0}},
    }

    def test_it_learns(self, result: fedsim.Result) -> None:
        assert result.metrics["test"]["accuracy"] > 0.5  # chance is 0.1
        assert result.metrics["test"]["loss"] < 0.7 * result.history["test_loss"].iloc[0]

    def test_without_its_weight_it_is_fedavg_to_the_bit(self, result: fedsim.Result, tmp_path: Path) -> None:
        off = {"correction": {"name": "moon.py:Moon", "mu": 0.0}}
        none = {"correction": None}
        hashes = [
            fedsim.run(self.experiment(strategy=changes), out=tmp_path / str(i), engine="inline").summary[
                "weights_sha256"
            ]
            for i, changes in enumerate((off, none))
        ]
        assert hashes[0] == hashes[1] != result.summary["weights_sha256"]

    def test_a_client_keeps_its_last_weights(self, result: fedsim.Result) -> None:
        with sqlite3.connect(result.out / "run.db") as database:
            kept = dict(
                database.execute("SELECT name, count(DISTINCT client) FROM client_state GROUP BY name").fetchall()
            )
        seen = fedsim.load(result.out).clients["client"].nunique()
        assert kept == {"correction/previous": seen, "correction/rounds": seen}


class TestFedRep(Contract):
    """Every client numbers the groups in its own way, so one head for all is right for a third of the examples."""

    table = {
        "name": "fedrep",
        "rounds": 6,
        "data": {"proxy": 0, "source": "fedrep.py:own_names", "partition": "natural", "client_test_fraction": 0.3},
        "model": "fedrep.py:BodyAndHead",
        "client": {"lr": 0.1, "personal": ["head.*"], "local_training": {"name": "fedrep.py:FedRep", "head_epochs": 5}},
        "strategy": {"clients_per_round": 5},
    }
    obstacle = "local_training trains client by client"

    def test_it_learns_what_a_shared_head_cannot(self, result: fedsim.Result, tmp_path: Path) -> None:
        shared = self.experiment(client={"personal": [], "local_training": None}, evaluation={"clients": True})
        fedavg = fedsim.run(shared, out=tmp_path / "shared", engine="inline")
        assert fedavg.metrics["client_test"]["accuracy"] < 0.6
        assert result.metrics["client_test"]["accuracy"] > 0.9
        assert result.summary["split"] == "client_test"

    def test_the_head_never_leaves_a_client(self, result: fedsim.Result) -> None:
        assert list(result.weights) == ["body.0.weight", "body.0.bias"]
        row_and_count = 4 * result.row.numel() + 8
        assert result.summary["bytes_up"] == 6 * 5 * row_and_count


class Careless(clients.LocalTraining):
    """Freezes and never thaws; says so where the model comes frozen."""

    def train(self, model: nn.Module, data: clients.ClientData, ctx: clients.LocalContext) -> dict[str, float | Tensor]:
        if not (model.training and all(parameter.requires_grad for parameter in model.parameters())):
            raise AssertionError("the model is as another client left it")
        model.eval().requires_grad_(False)
        return {}


def test_what_one_client_does_to_the_model_does_not_reach_the_next(tmp_path: Path) -> None:
    experiment = fedsim.Experiment(rounds=2, data={"clients": 10}, client={"local_training": Careless})
    found = fedsim.run(experiment, out=tmp_path / "run", engine="inline")
    assert found.summary["events"] == 0


class Encoder(nn.Module):
    """Torch's own encoder layer: dropout inside its attention, and a bias of the keys that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x.view(-1, 8, 8)).mean(1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_neither_dropout_nor_rounding_keeps_clients_from_being_stacked() -> None:
    client = {"optimizer": "adam", "epochs": 1}
    found = fedsim.plan(fedsim.Experiment(rounds=1, data={"clients": 40}, model=Encoder, client=client))
    assert (found["execution"], found["reason"]) == ("stacked", "two clients trained both ways agree")
