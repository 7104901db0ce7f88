"""Strategies by messages: the same weights as the fused path, whatever else comes back."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import nn

import fedsim.flower.simulation
import strategies
from clients import Recipe, RequestError
from clients.flower_app import client_app, initial_arrays
from strategies.client_hooks import ClientHooks
from strategies.flower import MessageStrategy, on_grid, start
from tests.flower.small_grid import SmallGrid
from tests.flower.worlds import (
    CLIENTS,
    ROUNDS,
    Net,
    NormNet,
    app_of,
    assembled,
    by_messages,
    fused,
    recipe_of,
    start_of,
)

SAME = {
    "fedavg": {},
    "fedavg by examples of few": {"strategy": {"name": "fedavg", "clients_per_round": 3}},
    "fedprox": {"strategy": {"name": "fedprox", "mu": 0.5}},
    "fedavgm": {"strategy": {"name": "fedavgm"}},
    "fedadam": {"strategy": {"name": "fedadam", "lr": 0.05}},
    "scaffold": {"strategy": {"name": "scaffold"}},
    "feddyn": {"strategy": {"name": "feddyn"}},
    "fednova": {"strategy": {"name": "fednova"}, "client": {"epochs": {"uniform": [1, 3]}}},
    "qfedavg": {"strategy": {"name": "qfedavg"}},
    "median": {"strategy": {"name": "median"}},
    "krum": {"strategy": {"name": "krum"}},
    "signsgd": {"strategy": {"name": "signsgd"}},
    "dpfedavg": {"strategy": {"name": "dpfedavg", "noise_multiplier": 1.0}},
    "adaptive clipping": {"strategy": {"name": "dpfedavg", "noise_multiplier": 0.4, "adaptive": True}},
    "local noise": {"plugins": [{"name": "local_noise", "noise_multiplier": 0.1}]},
    "quantised": {"plugins": [{"name": "quantize", "bits": 6}]},
    "error feedback": {"plugins": [{"name": "error_feedback", "codec": {"name": "top_k", "fraction": 0.1}}]},
    "downlink": {"plugins": [{"name": "downlink", "codec": "quantize"}]},
    "secure sum": {"plugins": ["secure_sum"]},
    "personal head": {"client": {"personal": ["head"]}},
    "local batch norm": {"model": NormNet, "client": {"batch_norm": "local"}},
    "adam with kept moments": {"client": {"optimizer": "adam", "lr": 0.01, "optimizer_state": "keep"}},
    "example-level privacy": {"client": {"dp_sgd": {"noise_multiplier": 1.0}}},
    "frozen body": {"client": {"freeze": ["body.*"]}},
    "cosine schedule": {"client": {"schedule": "cosine"}},
    "float64": {"client": {"precision": "float64"}},
}

#: Opacus takes seconds to import, and the accountant of adaptive clipping to search.
SLOW = ("example-level privacy", "adaptive clipping")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower prints every round; tests that look at the log see it through caplog."""
    logger = logging.getLogger("flwr")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)


@pytest.mark.parametrize("world", [pytest.param(w, marks=pytest.mark.slow) if w in SLOW else w for w in SAME])
def test_messages_give_the_weights_of_the_fused_path_to_the_bit(world: str) -> None:
    settings = {"strategy": {"name": "fedavg"}, **SAME[world]}
    settings["strategy"] = {"clients_per_round": 5, **settings["strategy"]}
    assembly = assembled(**settings)
    adapter, weights, _ = by_messages(assembly, evaluate_every=0)
    assert torch.equal(weights, fused(assembly).weights)
    assert not torch.equal(weights, assembly.setup.layout.flatten(assembly.setup.model))
    assert adapter.dropped == []


def test_flowers_fedavg_fedsims_by_messages_and_the_fused_path_agree() -> None:
    from flwr.serverapp.strategy import FedAvg

    assembly = assembled({"name": "fedavg", "clients_per_round": CLIENTS})
    reference = fused(assembly).weights
    theirs = FedAvg(fraction_evaluate=0.0).start(SmallGrid(app_of(assembly), CLIENTS), start_of(assembly), ROUNDS)
    _, ours, result = by_messages(assembly)
    layout = assembly.setup.layout
    for arrays in (theirs.arrays, result.arrays):
        row = layout.flatten({name: torch.from_numpy(array.numpy()) for name, array in arrays.items()})
        torch.testing.assert_close(row, reference, rtol=0, atol=1e-6)
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("engine", ["inline", pytest.param("processes", marks=pytest.mark.slow)])
def test_fedsims_own_grid_gives_the_weights_of_the_fused_path_to_the_bit(engine: str) -> None:
    assembly = assembled({"name": "scaffold", "clients_per_round": 5})
    hooks, server, found = ClientHooks(assembly.setup.strategy), ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        adapter = on_grid(assembly.setup.strategy, seed=assembly.setup.seed)
        adapter.start(grid, start_of(assembly), num_rounds=ROUNDS)
        found.append(adapter.weights)

    fedsim.flower.simulation.simulate(server, app_of(assembly, hooks=hooks), CLIENTS, engine=engine, workers=2)
    assert torch.equal(found[0], fused(assembly).weights)


def test_nodes_are_known_by_their_partitions_in_whatever_order_they_come() -> None:
    assembly = assembled({"name": "fedavg", "clients_per_round": 3})
    shuffled = SmallGrid(app_of(assembly), CLIENTS, ids=[7, 3, 99, 21, 5, 4, 8])
    _, weights, _ = by_messages(assembly, shuffled, evaluate_every=0)
    torch.testing.assert_close(weights, fused(assembly).weights, rtol=0, atol=1e-6)


def test_clients_metrics_are_those_of_the_fused_path() -> None:
    assembly = assembled({"name": "fedavg", "clients_per_round": 5})
    simulation = fused(assembly)
    _, _, result = by_messages(assembly)
    told = result.evaluate_metrics_clientapp[ROUNDS]
    record = type("Record", (), {"client_metrics": [], "events": [], "round": ROUNDS})()
    expected = simulation._judge_clients("test", record)
    assert told["clients"] == CLIENTS
    assert told["num-examples"] == expected["examples"]
    for name in ("accuracy", "loss", "accuracy_client_mean", "loss_client_mean"):
        assert told[name] == pytest.approx(expected[name], abs=1e-9)


def sent_bytes(grid: SmallGrid) -> int:
    """Of one client's arrays in the last training reply, without numpy's headers."""
    reply = next(r for r in reversed(grid.replies) if "arrays" in r.content)
    return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in reply.content["arrays"].values())


def test_a_codecs_payload_is_what_travels() -> None:
    assembly = assembled({"name": "fedavg", "clients_per_round": 2}, plugins=[{"name": "quantize", "bits": 6}])
    grid = SmallGrid(app_of(assembly, hooks=ClientHooks(assembly.setup.strategy)), CLIENTS)
    by_messages(assembly, grid, evaluate_every=0)
    size = assembly.setup.layout.size
    assert sent_bytes(grid) == 4 + -(-size * 6 // 8)


def test_masked_updates_travel_as_words_that_mean_nothing_alone() -> None:
    assembly = assembled({"name": "fedavg", "clients_per_round": 3}, plugins=["secure_sum"])
    grid = SmallGrid(app_of(assembly, hooks=ClientHooks(assembly.setup.strategy)), CLIENTS)
    by_messages(assembly, grid, evaluate_every=0)
    arrays = next(r for r in reversed(grid.replies) if "arrays" in r.content).content["arrays"]
    assert arrays["update"].dtype == "uint32"
    # Masks are uniform: the words fill their range as no update would.
    assert 0.4 < arrays["update"].numpy().mean() / 2**32 < 0.6


def test_a_strategy_starts_as_flowers_do_with_the_adapters_options_beside() -> None:
    assembly = assembled({"name": "fedadam", "lr": 0.05, "clients_per_round": 3})
    setup, seen = assembly.setup, []
    result = start(
        setup.strategy,
        grid=SmallGrid(app_of(assembly, hooks=ClientHooks(setup.strategy)), CLIENTS),
        initial_arrays=start_of(assembly),
        num_rounds=ROUNDS,
        train_config=ConfigRecord({"note": "hello"}),
        evaluate_fn=lambda round, arrays: seen.append(round),
        seed=setup.seed,
        evaluate_every=2,
    )
    row = setup.layout.flatten({name: torch.from_numpy(array.numpy()) for name, array in result.arrays.items()})
    assert torch.equal(row, fused(assembly).weights)
    assert seen == [0, 1, 2, 3]
    assert list(result.evaluate_metrics_clientapp) == [2, 3]


def test_another_run_on_the_same_nodes_begins_afresh() -> None:
    assembly = assembled({"name": "scaffold", "clients_per_round": 5})
    grid = SmallGrid(app_of(assembly, hooks=ClientHooks(assembly.setup.strategy)), CLIENTS)
    first = by_messages(assembly, grid, evaluate_every=0)[1]
    assert torch.equal(by_messages(assembly, grid, evaluate_every=0)[1], first)


def test_epsilon_is_the_most_that_a_client_has_spent() -> None:
    assembly = assembled({"name": "fedavg", "clients_per_round": 3}, plugins=[{"name": "local_noise", "epsilon": 2.0}])
    _, _, result = by_messages(assembly, evaluate_every=0)
    simulation = fused(assembly)
    assert result.train_metrics_clientapp[ROUNDS]["epsilon"] == float(simulation.state["dp_sgd/epsilon"])


def test_metrics_that_do_not_add_are_means_by_example() -> None:
    assembly = assembled(rounds=1)

    def other(partition: int, message: Message, reply: Message) -> Message:
        if partition == 3 and message.metadata.message_type == "evaluate":
            reply.content["metrics"]["total/loss"] = [1.0, 2.0]
        return reply

    adapter, _, result = by_messages(assembly, SmallGrid(app_of(assembly), CLIENTS, other))
    _, _, exact = by_messages(assembly, SmallGrid(app_of(assembly), CLIENTS))
    told, expected = result.evaluate_metrics_clientapp[1], exact.evaluate_metrics_clientapp[1]
    assert told["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-9)
    assert told["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert adapter.dropped == []


# -------------------------------------------------------------------------------------------- clients of other people's


def foreign_app(assembly, *, broken: tuple[int, ...] = ()) -> ClientApp:
    """What a Flower user writes: whole state dicts in and out, and no query."""
    population, app = assembly.setup.population, ClientApp()

    @app.train()
    def train(message: Message, context) -> Message:
        partition = context.node_config["partition-id"]
        if partition in broken:
            raise OSError("no camera")
        model = assembly.experiment.model.thing()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        batch = population.columns.take(torch.from_numpy(population.splits["train"].of(partition).copy()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(batch["x"]), batch["y"]).backward()
            optimizer.step()
        content = {"weights": ArrayRecord(model.state_dict()), "m": MetricRecord({"num-examples": len(batch["y"])})}
        return Message(RecordDict(content), reply_to=message)

    return app


@pytest.mark.parametrize("strategy", [strategies.FedAdam(lr=0.05), strategies.Krum(), strategies.Median()])
def test_a_strategy_that_needs_nothing_of_clients_drives_any_client_app(strategy: strategies.Strategy) -> None:
    assembly = assembled(model=NormNet)
    adapter = on_grid(strategy, model=assembly.setup.model, evaluate_every=0)
    result = adapter.start(SmallGrid(foreign_app(assembly), CLIENTS), start_of(assembly), num_rounds=2)
    assert adapter.dropped == []
    before, after = start_of(assembly), result.arrays
    assert list(before) == list(after)
    for name in before:  # buffers go on as they are, parameters move
        assert (before[name].data == after[name].data) == ("running" in name or "tracked" in name)


def test_foreign_clients_that_raise_are_dropped_with_their_reason() -> None:
    assembly = assembled()
    adapter = on_grid(strategies.FedAvg(), evaluate_every=0)
    adapter.start(SmallGrid(foreign_app(assembly, broken=(1, 4)), CLIENTS), start_of(assembly), num_rounds=1)
    assert [(lost.client, lost.why) for lost in adapter.dropped] == [
        (1, "OSError: no camera"),
        (4, "OSError: no camera"),
    ]


def test_without_a_model_all_real_arrays_are_parameters() -> None:
    assembly = assembled(model=NormNet)
    adapter = on_grid(strategies.FedAvg(), evaluate_every=0)
    result = adapter.start(SmallGrid(foreign_app(assembly), CLIENTS), start_of(assembly), num_rounds=1)
    moved = {name: result.arrays[name].data != array.data for name, array in start_of(assembly).items()}
    assert moved["body.1.running_mean"]
    assert not moved["body.1.num_batches_tracked"]


# ---------------------------------------------------------------------------------------------------- refusals


def refusal(strategy: Any, app: Any, nodes: int = CLIENTS, **options: Any) -> str:
    assembly = assembled()
    with pytest.raises(RequestError) as caught:
        on_grid(strategy, **options).start(SmallGrid(app, nodes), start_of(assembly), num_rounds=1)
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_what_messages_cannot_carry_out_is_refused_with_the_reason() -> None:
    with pytest.raises(RequestError, match=r"^strategy: it takes a step whenever some clients have answered"):
        on_grid(strategies.FedBuff())
    with pytest.raises(RequestError, match=r"^strategy: 'fedavg' is no strategies\.Strategy"):
        on_grid("fedavg")
    assembly = assembled()
    assert refusal(strategies.FLTrust(), app_of(assembly)).startswith("server: the strategy asks for ctx.data")


def test_clients_without_the_strategys_half_are_refused_before_they_train() -> None:
    assembly = assembled()
    scaffold, other = strategies.Scaffold(), ClientHooks(strategies.FedProx(mu=1.0))
    assert refusal(scaffold, app_of(assembly)).startswith("hooks: the clients have no hooks, and this server's")
    assert "have Strategy(correction=Prox(mu=1.0)" in refusal(scaffold, app_of(assembly, hooks=other))
    assert "does not answer as one of clients.client_app" in refusal(scaffold, foreign_app(assembly))


@pytest.mark.parametrize(
    ("strategy", "hooks"),
    [
        (strategies.FedProx(mu=0.2), None),
        (strategies.FedProx(mu=0.2), strategies.FedProx(mu=0.1)),
        (strategies.FedAvg(), strategies.FedProx(mu=0.1)),
        (strategies.FedAvg(), strategies.Scaffold()),
        (strategies.FedAvg(), strategies.FedAvg(plugins=[strategies.Quantize(bits=4)])),
        (strategies.FedNova(), None),
    ],
)
def test_a_term_that_only_one_side_has_is_refused_before_anybody_trains(strategy: Any, hooks: Any) -> None:
    half = None if hooks is None else ClientHooks(hooks)
    assert refusal(strategy, app_of(assembled(), hooks=half)).startswith("hooks: the clients have ")


@pytest.mark.parametrize("strategy", [strategies.FedProx(mu=0.2), strategies.FedNova()])
def test_a_plain_client_app_cannot_carry_out_a_strategys_part(strategy: Any) -> None:
    assert "does not answer as one of clients.client_app" in refusal(strategy, foreign_app(assembled()))


def test_hooks_that_change_nothing_go_with_any_rule_that_needs_nothing_of_clients() -> None:
    assembly = assembled()
    adapter = on_grid(strategies.Median(), evaluate_every=0)
    grid = SmallGrid(app_of(assembly, hooks=ClientHooks(strategies.FedAvg())), CLIENTS)
    adapter.start(grid, start_of(assembly), num_rounds=1)
    assert adapter.dropped == []


def test_central_noise_goes_with_no_least_number_of_clients() -> None:
    with pytest.raises(RequestError, match=r"^min_clients: 2 would show, by a round that keeps the weights"):
        on_grid(strategies.DPFedAvg(), min_clients=2)


def test_nodes_that_cannot_take_part_are_told_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    assembly = assembled()
    sound = app_of(assembly)

    def no_disk(partition: int) -> Any:
        raise OSError("no disk")

    broken = client_app(recipe_of(assembly), assembly.setup.model, no_disk)

    def silent(partition: int, message: Message, reply: Message) -> Message | None:
        return None if partition == 4 and message.metadata.message_type.startswith("query") else reply

    grid = SmallGrid(lambda partition: broken if partition == 2 else sound, CLIENTS, silent)
    adapter = on_grid(strategies.FedAvg(), seed=assembly.setup.seed, evaluate_every=0, ask_timeout=5)
    with caplog.at_level(logging.WARNING, "flwr"):
        adapter.start(grid, start_of(assembly), num_rounds=2)
    assert sorted(adapter.dropped) == [
        (0, 1002, -1, "data: OSError: no disk"),
        (0, 1004, -1, "no answer to the roll call within 5 s"),
    ]
    assert caplog.text.count("node 1002 cannot take part: data: OSError: no disk") == 1
    told = refusal(strategies.FedAvg(), broken)
    assert told == f"nodes: none of {CLIENTS} can take part; node 1000: data: OSError: no disk"


def eight_examples(partition: int) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(512.0).reshape(8, 64) / 512, "y": torch.arange(8)}


def test_a_delta_that_would_give_an_example_away_is_refused() -> None:
    app = client_app(Recipe(dp_sgd={"noise_multiplier": 1.0, "delta": 0.125}), Net, eight_examples)
    told = refusal(strategies.FedAvg(), app)
    assert told.startswith("client.dp_sgd.delta: 0.125 is no less than 1 / 8, the examples of the client")


def test_partitions_that_would_fill_the_memory_are_refused() -> None:
    grid = SmallGrid(client_app(Recipe(), Net, eight_examples), 1)
    grid.contexts[1000].node_config.update({"partition-id": 10**9, "num-partitions": 2 * 10**9})
    with pytest.raises(RequestError, match=r"^nodes: 1000 holds partition 1000000000; give partition-ids from 0"):
        on_grid(strategies.FedAvg()).start(grid, start_of(assembled()), num_rounds=1)


def test_two_nodes_with_one_partition_and_other_seeds_for_masks_are_refused() -> None:
    assembly = assembled()
    grid = SmallGrid(app_of(assembly), CLIENTS)
    grid.contexts[1003].node_config["partition-id"] = 1
    with pytest.raises(RequestError, match=r"^nodes: 1001 and 1003 both hold partition 1"):
        on_grid(strategies.FedAvg()).start(grid, start_of(assembly), num_rounds=1)
    secure = strategies.Strategy(plugins=[strategies.SecureSum()])
    said = refusal(secure, app_of(assembly, hooks=ClientHooks(secure), seed=1), seed=2)
    assert said.startswith("seed: clients draw their masks by 1")


def test_arrays_that_lack_a_parameter_are_refused() -> None:
    assembly = assembled()
    arrays = start_of(assembly)
    del arrays["head.bias"]
    with pytest.raises(RequestError, match=r"^initial_arrays: 'head\.bias', which clients share, is missing"):
        on_grid(strategies.FedAvg()).start(SmallGrid(app_of(assembly), CLIENTS), arrays, num_rounds=1)


def test_a_privacy_budget_ends_the_run() -> None:
    strategy = strategies.DPFedAvg(noise_multiplier=1.0, target_epsilon=4.0)
    assembly = assembled()
    app = app_of(assembly, hooks=ClientHooks(strategy))
    adapter = MessageStrategy(strategy, evaluate_every=0)
    arrays = initial_arrays(assembly.setup.model, recipe_of(assembly))
    result = adapter.start(SmallGrid(app, CLIENTS), arrays, num_rounds=6)
    spent = [metrics["epsilon"] for metrics in result.train_metrics_clientapp.values()]
    guarantee = strategy.guarantee(CLIENTS, 6)
    assert 1 <= len(spent) < 6
    assert spent[-1] <= 4.0 < guarantee.spent(len(spent) + 1)
