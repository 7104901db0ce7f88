"""A recipe as a ClientApp: Flower's conventions, what travels and what stays, and what is refused."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import strategies
from clients import Recipe, RequestError
from clients.flower_app import client_app, initial_arrays, prepared
from clients.task import Classification
from strategies.client_hooks import ClientHooks
from tests.flower.small_grid import SmallGrid
from tests.flower.worlds import Net, NormNet

RECIPE = Recipe(lr=0.1, batch_size=8, epochs=1, execution="loop")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("flwr")
    monkeypatch.setattr(logger, "handlers", [])


def columns(partition: int, n: int = 20) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    x = torch.rand(n, 64, generator=generator)
    return {"x": x, "y": (x[:, :32].sum(1) - x[:, 32:].sum(1) > 0).long()}


def data(partition: int) -> dict[str, Any]:
    return {"train": columns(partition), "test": columns(partition + 1000, 10)}


def app(recipe: Recipe = RECIPE, model: Any = Net, data: Any = data, **options: Any) -> ClientApp:
    return client_app(recipe, model, data, **options)


def asked(
    made: ClientApp, kind: str = "train", round: int = 1, grid: SmallGrid | None = None, **config: Any
) -> Message:
    """What partition 0 answers."""
    grid = SmallGrid(made, 3) if grid is None else grid
    model = prepared(NormNet if config.pop("norm", False) else Net, RECIPE)
    content = RecordDict({"arrays": ArrayRecord(model.state_dict())})
    content["config"] = ConfigRecord({"server-round": round, **config} if round else config)
    (reply,) = grid.send_and_receive([Message(content, 1000, kind)])
    return reply


def reason(reply: Message) -> str:
    assert reply.has_error()
    return reply.error.reason.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------------- conventions


def test_a_reply_has_one_array_record_and_one_metric_record_with_num_examples() -> None:
    content = asked(app()).content
    assert len(content.array_records) == len(content.metric_records) == 1
    assert content["metrics"]["num-examples"] == 20
    assert content["metrics"]["steps"] == 3
    assert 0 < content["metrics"]["train_loss"] < 10


def test_only_shared_parameters_travel() -> None:
    reply = asked(app(RECIPE.model_copy(update={"personal": ("head",)}), NormNet), norm=True)
    assert list(reply.content["arrays"]) == ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]
    reply = asked(app(RECIPE.model_copy(update={"freeze": ("body.0.*",)})))
    assert list(reply.content["arrays"]) == ["head.weight", "head.bias"]
    assert list(initial_arrays(NormNet, Recipe(batch_norm="local"))) == [
        "body.0.weight",
        "body.0.bias",
        "head.weight",
        "head.bias",
    ]


def test_what_is_the_clients_stays_in_its_context_as_arrays() -> None:
    recipe = Recipe(personal=("head",), batch_norm="local", optimizer="adam", optimizer_state="keep", epochs=1)
    grid = SmallGrid(app(recipe, NormNet), 3)
    asked(None, grid=grid, norm=True)
    state = grid.contexts[1000].state
    assert all(isinstance(record, ArrayRecord) for record in state.values())
    kept = {name for record in state.values() for name in record}
    assert kept == {"personal", "batch_norm", "optimizer/m", "optimizer/v", "optimizer/steps"}
    assert not grid.contexts[1001].state


def test_the_same_message_gives_the_same_bits_and_other_rounds_other_batches() -> None:
    def bits(round: int, seed: int = 0) -> bytes:
        return asked(app(seed=seed, model=Net()), round=round).content["arrays"]["head.weight"].data

    torch.manual_seed(0)
    first = prepared(Net, RECIPE)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), prepared(Net, RECIPE).parameters(), strict=True))
    assert bits(1) == bits(1)
    assert len({bits(1), bits(2), bits(1, seed=1)}) == 3


def test_an_app_travels_by_cloudpickle_and_gives_the_same() -> None:
    made = app(seed=3)
    there = pickle.loads(cloudpickle.dumps(made))
    before = asked(made).content["arrays"]
    again = pickle.loads(cloudpickle.dumps(made))  # a trainer that was made does not travel with it
    for other in (there, again):
        assert asked(other).content["arrays"] == before


# ---------------------------------------------------------------------------------------------------- Flower's servers


@pytest.mark.parametrize(
    "server",
    [
        flower.FedAvg(),
        flower.FedProx(proximal_mu=0.1),
        flower.FedAdam(eta=0.01),
        flower.FedMedian(),
        flower.Krum(num_malicious_nodes=1),
        # It collects garbage several times a reply.
        pytest.param(flower.QFedAvg(client_learning_rate=0.1), marks=pytest.mark.slow),
        flower.DifferentialPrivacyServerSideFixedClipping(flower.FedAvg(), 0.01, 1.0, 5),
    ],
    ids=lambda server: type(server).__name__,
)
def test_flowers_strategies_and_privacy_wrappers_drive_it(server: Any) -> None:
    grid = SmallGrid(app(), 5)
    result = server.start(grid, initial_arrays(Net, RECIPE), num_rounds=3)
    assert not any(reply.has_error() for reply in grid.replies)
    losses = [result.train_metrics_clientapp[round]["train_loss"] for round in (1, 3)]
    assert losses[1] < losses[0]
    assert 0 <= result.evaluate_metrics_clientapp[3]["accuracy"] <= 1


@pytest.mark.parametrize(
    ("mods", "server"),
    [
        ([fixedclipping_mod], flower.DifferentialPrivacyClientSideFixedClipping(flower.FedAvg(), 0.01, 0.1, 3)),
        ([LocalDpMod(1.0, 1.0, 50.0, 1e-5), arrays_size_mod], flower.FedAvg()),
    ],
)
def test_flowers_mods_go_around_training(mods: list[Any], server: Any) -> None:
    grid = SmallGrid(app(mods=mods), 3)
    result = server.start(grid, initial_arrays(Net, RECIPE), num_rounds=2)
    assert not any(reply.has_error() for reply in grid.replies)
    assert result.evaluate_metrics_clientapp[2]["loss"] > 0


def test_a_correction_that_needs_no_server_works_under_flowers_strategies() -> None:
    def moved(hooks: Any) -> float:
        first = initial_arrays(Net, RECIPE)
        result = flower.FedAvg(fraction_evaluate=0.0).start(SmallGrid(app(hooks=hooks), 3), first, num_rounds=1)
        return float(np.linalg.norm(result.arrays["body.0.weight"].numpy() - first["body.0.weight"].numpy()))

    held = moved(ClientHooks(strategies.FedProx(mu=5.0)))
    assert held < 0.9 * moved(None)
    assert moved(ClientHooks(strategies.FedProx(mu=0.0))) == moved(None)


def test_a_strategy_with_a_servers_half_says_that_it_is_missing() -> None:
    told = reason(asked(app(hooks=ClientHooks(strategies.Scaffold()))))
    assert told.startswith("clients.errors.RequestError: hooks: Strategy(correction=Scaffold(")
    assert "this server runs another strategy" in told


def test_two_different_strategies_are_named() -> None:
    made = app(hooks=ClientHooks(strategies.FedProx(mu=0.5)))
    told = reason(asked(made, **{"fedsim-strategy": ClientHooks(strategies.FedProx(mu=0.1)).told}))
    assert "the client has Strategy(correction=Prox(mu=0.5)" in told
    assert "and the server Strategy(correction=Prox(mu=0.1)" in told


# ------------------------------------------------------------------------------------- what the server's word changes


def trained_from(made: ClientApp, arrays: ArrayRecord, kind: str = "train", **config: Any) -> Message:
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1, **config})})
    (reply,) = SmallGrid(made, 1).send_and_receive([Message(content, 1000, kind)])
    return reply


#: What a server of fedsim's says, which sends all arrays in every round.
RUN = {"fedsim-run": "first"}


def other_model(net: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(9)
    return net()


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_frozen_weights_that_are_sent_are_those_that_the_client_trains_and_is_judged_on(execution: str) -> None:
    recipe = RECIPE.model_copy(update={"freeze": ("body.*",), "execution": execution})
    sent = ArrayRecord(other_model().state_dict())
    mine, theirs = app(recipe), app(recipe, other_model())
    for kind, key in (("train", "arrays"), ("evaluate", "metrics")):
        own = trained_from(mine, ArrayRecord(prepared(Net, recipe).state_dict()), kind, **RUN).content[key]
        answer = trained_from(mine, sent, kind, **RUN).content[key]
        assert answer == trained_from(theirs, sent, kind).content[key]
        assert answer != own
        # What was sent once is not there for another run.
        again = trained_from(mine, ArrayRecord(prepared(Net, recipe).state_dict()), kind, **RUN).content[key]
        assert again == own


def test_a_server_that_will_not_send_frozen_weights_again_must_not_send_others() -> None:
    recipe = RECIPE.model_copy(update={"freeze": ("body.*",)})
    told = reason(trained_from(app(recipe), ArrayRecord(other_model().state_dict())))
    assert "weights: 'body.0.weight' is frozen, and the server sends other values than the client's" in told
    assert not trained_from(app(recipe), ArrayRecord(prepared(Net, recipe).state_dict())).has_error()


def test_a_frozen_batch_norm_goes_by_the_statistics_that_are_sent() -> None:
    def published(shift: float) -> nn.Module:
        model = other_model(NormNet)
        model.body[1].running_mean += shift
        return model

    recipe = RECIPE.model_copy(update={"freeze": ("body.*",)})
    sent = ArrayRecord(published(2.0).state_dict())
    answer = trained_from(app(recipe, published(1.0)), sent, **RUN).content["arrays"]
    assert answer == trained_from(app(recipe, published(2.0)), sent).content["arrays"]
    assert (
        answer != trained_from(app(recipe, published(1.0)), ArrayRecord(published(1.0).state_dict())).content["arrays"]
    )
    told = reason(trained_from(app(recipe, NormNet), sent, **RUN))
    assert "the batch norm 'body.1' is frozen, and the server sends statistics of it" in told


def test_flowers_fedprox_brings_its_proximal_term() -> None:
    first = ArrayRecord(prepared(Net, RECIPE).state_dict())
    term = RECIPE.regularization.model_copy(update={"proximal": 5.0})
    held = app(RECIPE.model_copy(update={"regularization": term}))
    answer = trained_from(app(), first, **{"proximal-mu": 5.0}).content["arrays"]
    assert answer == trained_from(held, first).content["arrays"]
    assert answer == trained_from(held, first, **{"proximal-mu": 5.0}).content["arrays"]
    assert answer != trained_from(app(), first).content["arrays"]
    assert "the server says 1, and the client has a proximal term of 5" in reason(
        trained_from(held, first, **{"proximal-mu": 1.0})
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lr": 0.5}, "config.lr: the server says 0.5, and the client trains by its recipe's 0.1"),
        ({"local-epochs": 3}, "config.local-epochs: the server says 3"),
        ({"proximal-mu": -1.0}, "config.proximal-mu: -1.0 given; give a number from 0"),
    ],
)
def test_what_the_server_says_of_training_and_the_client_does_not_do_is_refused(config: dict, said: str) -> None:
    assert reason(asked(app(), **config)).startswith(f"clients.errors.RequestError: {said}")


def test_what_the_server_says_as_the_client_has_it_is_no_difference() -> None:
    assert asked(app(), lr=0.1, epochs=1, optimizer="sgd", note="x").content["arrays"] == asked(app()).content["arrays"]


# ---------------------------------------------------------------------------------------------------- data


def pairs(partition: int) -> TensorDataset:
    return TensorDataset(*columns(partition).values())


class Splits:
    def __init__(self, partition: int):
        self.train, self.test = columns(partition), columns(partition + 1000, 10)


@pytest.mark.parametrize(
    "given",
    [
        columns,
        lambda partition: {name: column.numpy() for name, column in columns(partition).items()},
        lambda partition, of: columns(partition) if of == 3 else None,
        lambda partition: (columns(partition), columns(partition + 1000)),
        lambda partition: tuple(columns(partition).values()),
        lambda partition: (tuple(columns(partition).values()), tuple(columns(partition + 1000).values())),
        pairs,
        lambda partition: DataLoader(pairs(partition), batch_size=4),
        lambda partition: [{"x": x, "y": y} for x, y in pairs(partition)],
        Splits,
    ],
    ids=[
        "columns",
        "arrays",
        "number of partitions",
        "two splits",
        "x, y",
        "two x, y",
        "pairs",
        "loader",
        "dicts",
        "object",
    ],
)
def test_examples_come_in_many_forms_and_train_alike(given: Any) -> None:
    assert asked(app(data=given)).content["arrays"] == asked(app()).content["arrays"]


def test_bytes_of_the_input_are_pixels() -> None:
    pixels = {"x": (columns(0)["x"] * 255).to(torch.uint8), "y": columns(0)["y"]}
    real = {"x": pixels["x"].to(torch.float32).div_(255), "y": pixels["y"]}
    assert asked(app(data=lambda _: pixels)).content["arrays"] == asked(app(data=lambda _: real)).content["arrays"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda _: {"x": torch.rand(3, 64), "y": torch.zeros(2)}, "data(0).train: columns differ in length (x 3, y 2)"),
        (lambda _: {"train": columns(0), "dev": columns(1)}, "data(0): unknown split 'dev'"),
        (lambda _: {"x": torch.rand(0, 64), "y": torch.zeros(0)}, "data(0): no example to train on"),
        (lambda _: 7, "data(0).train: int given"),
        (lambda _: {"x": 7}, "data(0).train.x: int given"),
    ],
)
def test_examples_that_are_none_are_refused_by_their_place(given: Any, said: str) -> None:
    assert reason(asked(app(data=given))).startswith(f"clients.errors.RequestError: {said}")


# ---------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_is_on_the_clients_own_test_examples() -> None:
    metrics = asked(app(), "evaluate").content["metrics"]
    batch = columns(1000, 10)
    outputs = prepared(Net, RECIPE)(batch["x"]).detach()
    assert metrics["num-examples"] == 10
    assert metrics["accuracy"] == pytest.approx(float((outputs.argmax(1) == batch["y"]).float().mean()))
    assert metrics["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, batch["y"])), rel=1e-6)
    assert set(metrics) == {"num-examples", "accuracy", "loss"}


def test_evaluation_is_of_the_clients_own_head() -> None:
    grid = SmallGrid(app(RECIPE.model_copy(update={"personal": ("head",), "epochs": 20})), 3)
    before = asked(None, "evaluate", grid=grid).content["metrics"]["loss"]
    asked(None, "train", grid=grid)
    assert asked(None, "evaluate", grid=grid).content["metrics"]["loss"] < before


@pytest.mark.parametrize("by", ["clients", "clients_stored", "batch"])
def test_batch_norm_is_judged_by_the_clients_own_statistics(by: str) -> None:
    made = app(RECIPE.model_copy(update={"batch_norm": "local"}), NormNet, batch_norm=by)
    grid = SmallGrid(made, 3)
    asked(None, "train", grid=grid, norm=True)
    assert np.isfinite(asked(None, "evaluate", grid=grid, norm=True).content["metrics"]["loss"])


class Exact(Classification):
    """A task whose metrics are NumPy's numbers."""

    def metrics(self, totals: dict[str, Tensor]) -> dict[str, float]:
        return {name: np.float32(value) for name, value in super().metrics(totals).items()}  # type: ignore[misc]


def test_metrics_may_be_numpys_numbers() -> None:
    told, plain = (asked(app(task=task), "evaluate").content["metrics"] for task in (Exact(), None))
    assert told["accuracy"] == pytest.approx(plain["accuracy"], rel=1e-6)


def test_a_client_without_test_examples_says_so() -> None:
    told = reason(asked(app(data=columns), "evaluate"))
    assert told.startswith("clients.errors.RequestError: data: partition 0 has no test examples")


# ---------------------------------------------------------------------------------------------------- failures


class Breaks(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise OSError("no disk")


def test_what_a_clients_code_raises_names_round_client_and_stage() -> None:
    reply = asked(app(model=Breaks), round=4)
    assert "round 4, client 0, training: OSError: no disk" in reason(reply)


def test_an_update_of_nan_is_an_error_and_no_reply() -> None:
    broken = {"x": torch.full((20, 64), torch.nan), "y": torch.zeros(20, dtype=torch.int64)}
    assert "NaN or infinite values" in reason(asked(app(data=lambda _: broken)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["arrays"].pop("head.bias"), "weights: 'head.bias' is missing"),
        (lambda content: content["config"].pop("server-round"), "config: the message has no 'server-round'"),
        (lambda content: content.pop("arrays"), "arrays: the message has 0 ArrayRecords"),
    ],
)
def test_a_message_that_lacks_something_is_refused_by_its_key(change: Any, said: str) -> None:
    content = RecordDict({"arrays": initial_arrays(Net, RECIPE), "config": ConfigRecord({"server-round": 1})})
    change(content)
    (reply,) = SmallGrid(app(), 1).send_and_receive([Message(content, 1000, "train")])
    assert reason(reply).startswith(f"clients.errors.RequestError: {said}")


def test_a_node_without_a_partition_is_told_how_to_get_one() -> None:
    grid = SmallGrid(app(), 1)
    del grid.contexts[1000].node_config["partition-id"]
    assert "node_config: has no 'partition-id'" in reason(asked(None, grid=grid))


@pytest.mark.parametrize(("partition", "said"), [(-1, "-1 given; give one from 0"), (3, "3 given; give one from 0")])
def test_a_partition_that_there_is_not_is_refused(partition: int, said: str) -> None:
    grid = SmallGrid(app(), 3)
    grid.contexts[1000].node_config["partition-id"] = partition
    assert f"node_config.partition-id: {said}" in reason(asked(None, grid=grid))


def test_a_run_whose_state_another_run_took_the_place_of_is_refused() -> None:
    grid = SmallGrid(app(), 3)
    for run in ("first", "first", "second"):
        assert not asked(None, grid=grid, **{"fedsim-run": run}).has_error()
    assert "run: another run has begun on this node" in reason(asked(None, grid=grid, **{"fedsim-run": "first"}))
    assert not asked(None, grid=grid, **{"fedsim-run": "second"}).has_error()


PRIVATE: dict[str, Any] = {"dp_sgd": {"noise_multiplier": 1.0}}
PHASES: dict[str, Any] = {"personal": ["head"], "personal_epochs": 1}
NOISE = strategies.Strategy(plugins=[strategies.LocalNoise(noise_multiplier=1.0)])


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ({"stragglers": "drop"}, {}, 'client.stragglers: "drop" compares the clients of a round'),
        ({"batch_norm": "share_all"}, {"model": NormNet}, 'client.batch_norm: "share_all" sends running statistics'),
        ({"batch_norm": "local"}, {}, "client.batch_norm: Net has no batch norm"),
        ({"batch_size": 1}, {"model": NormNet}, "client.batch_size: 1 does not go with batch norm"),
        ({"regularization": {"dropout": 0.5}}, {}, "client.regularization.dropout: 0.5 has nothing to act on"),
        ({"optimizer": "adam"}, {"hooks": ClientHooks(strategies.Scaffold())}, "client.optimizer: 'adam' moves"),
        ({}, {"hooks": "scaffold"}, "hooks: 'scaffold' is no strategy"),
        ({}, {"model": lambda: 3}, "model: int is not a torch.nn.Module"),
        ({}, {"model": "mlp"}, "model: str given; give a torch.nn.Module"),
        ({}, {"data": [1]}, "data: list given; give a function of partition_id"),
        ({}, {"seed": -1}, "seed: -1 given; give a whole number from 0"),
        ({}, {"seed": "7"}, "seed: '7' given; give a whole number from 0"),
        ({}, {"batch_size": 0}, "batch_size: 0 given; give a whole number from 1"),
        ({}, {"batch_norm": "stored"}, "batch_norm: 'stored' given; give one of clients, clients_stored, batch"),
        ({}, {"rounds": 0}, "rounds: 0 given; give a whole number from 1"),
        ({}, {"mods": fixedclipping_mod}, "mods: <function fixedclipping_mod"),
        ({}, {"evaluate_mods": ["clip"]}, "evaluate_mods: ['clip'] given"),
        ({}, {"hooks": strategies.FedBuff()}, "strategy: it takes a step whenever some clients have answered"),
        ({"regularization": {"proximal": 0.1}}, {"hooks": strategies.FedProx()}, "client.regularization.proximal: the"),
        ({**PRIVATE, "early_stopping": {}}, {}, "client.early_stopping: it looks at validation examples"),
        ({**PRIVATE, **PHASES}, {}, "client.personal_epochs: what client.dp_sgd releases"),
        ({**PHASES, "early_stopping": {}}, {}, "client.early_stopping: it would stop a client in its epochs"),
        ({**PHASES, "optimizer_state": "keep"}, {}, "client.optimizer_state: 'keep' does not go with"),
        (PRIVATE, {"hooks": NOISE}, "client.dp_sgd: its epsilon is of examples, that of the strategy's noise"),
        (PRIVATE, {"hooks": strategies.DPFedAvg()}, "client.dp_sgd: its epsilon is of examples"),
        ({"personal": ["tail"]}, {}, "client.personal: "),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_in_one_line(recipe: dict, options: dict, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        app(Recipe(**recipe), **options)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(said)


def test_a_recipe_that_is_a_table_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^recipe: dict given; give a clients\.Recipe"):
        client_app({"lr": 0.1}, Net, data)


def test_a_schedule_that_needs_the_number_of_rounds_asks_for_it() -> None:
    recipe = RECIPE.model_copy(update={"schedule": Recipe(schedule="cosine").schedule})
    assert "give client_app(rounds = ...)" in reason(asked(app(recipe)))
    assert not asked(app(recipe, rounds=5)).has_error()
