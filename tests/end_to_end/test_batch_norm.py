"""Batch norm in every mode: what leaves a client, what stays, what is judged by, and the same bits everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fedsim
from clients.errors import RequestError
from clients.normalization import recalibrate
from clients.statistics import STATISTICS, Statistics
from fedsim.assembly import assemble
from fedsim.simulation import InMemory, Simulation
from tests.end_to_end.commands import interrupt_after, rounds_committed, run, start

MODES = {
    "share_affine, recalibrate": ("share_affine", "recalibrate"),
    "share_affine, batch": ("share_affine", "batch"),
    "share_affine, clients": ("share_affine", "clients"),
    "share_affine, clients_stored": ("share_affine", "clients_stored"),
    "local, auto": ("local", "auto"),
    "local, clients_stored": ("local", "clients_stored"),
    "share_all, auto": ("share_all", "auto"),
    "share_all, recalibrate": ("share_all", "recalibrate"),
    "share_all, clients": ("share_all", "clients"),
}


def experiment(kept, evaluated="auto", **settings):
    client = {"batch_norm": kept, "epochs": 2, **settings.pop("client", {})}
    given = {"rounds": 3, "model": {"name": "mlp", "norm": "batch"}, "evaluation": {"batch_norm": evaluated}}
    return fedsim.Experiment(client=client, **{**given, **settings})


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("execution", ["stacked", "loop"])
def test_every_mode_gives_the_same_bits_on_every_engine(mode, execution, tmp_path):
    found = {}
    for engine, workers in (("inline", None), ("processes", 2)):
        result = fedsim.run(
            experiment(*mode, client={"execution": execution}), out=tmp_path / engine, engine=engine, workers=workers
        )
        metrics = {split: dict(values) for split, values in result.metrics.items()}
        found[engine] = (result.summary["weights_sha256"], metrics, result.summary["bytes_up"])
    assert found["inline"] == found["processes"]
    split = "client_test" if mode[0] == "local" or mode[1].startswith("clients") else "test"
    assert result.summary["split"] == split
    assert result.summary["accuracy"] > 0.3


@pytest.mark.parametrize("mode", ["share_affine, clients_stored", "local, clients_stored", "share_all, auto"])
def test_stacked_and_loop_agree_in_float64_statistics_included(mode, tmp_path):
    rows = {}
    for execution in ("stacked", "loop"):
        client = {"execution": execution, "precision": "float64"}
        result = fedsim.run(experiment(*MODES[mode], client=client), out=tmp_path / execution, engine="inline")
        rows[execution] = torch.cat([result.row, torch.tensor([result.summary["loss"]], dtype=torch.float64)])
    assert float((rows["stacked"] - rows["loop"]).norm() / rows["loop"].norm()) < 1e-10


def played(made, rounds=3):
    """A simulation played in this process, its state in memory."""
    assembly = assemble(made)
    engine = fedsim.engines.Inline()
    engine.start(assembly.setup)
    simulation = Simulation(made, assembly.setup, engine, InMemory())
    simulation.commit(simulation.first())
    records = []
    for _ in range(rounds):
        records.append(simulation.step())
        simulation.commit(records[-1])
    return simulation, records


def test_each_way_of_judging_does_what_it_says():
    """Client models put together by hand, and the server's, against what the last round recorded."""
    found = {}
    pairs = [("share_all", how) for how in ("recalibrate", "shared", "clients")]
    pairs += [("share_affine", "recalibrate"), ("local", "clients"), ("local", "clients_stored")]
    for kept, evaluated in pairs:
        simulation, records = played(experiment(kept, evaluated))
        found[kept, evaluated] = simulation, records[-1].metrics
    shared, weights = found["share_all", "shared"][0], found["share_affine", "recalibrate"][0].weights
    assert torch.equal(shared.weights, weights)
    # The statistics that clients send change nothing of how a model is recalibrated.
    assert found["share_all", "recalibrate"][1]["test"] == found["share_affine", "recalibrate"][1]["test"]
    assert found["share_all", "recalibrate"][1]["test"] != found["share_all", "shared"][1]["test"]
    assert found["local", "clients"][1] != found["local", "clients_stored"][1]
    for pair in [("share_all", "clients"), ("local", "clients")]:
        simulation, metrics = found[pair]
        columns, splits = simulation.population.columns, simulation.population.splits
        right = total = 0
        for client in np.flatnonzero(splits["test"].sizes).tolist():
            members = torch.from_numpy(splits["train"].of(client))
            if len(members) < 2:
                continue
            model = recalibrate(simulation.client_model(client), [columns.take(members)["x"]])
            assert torch.equal(model.norm1.running_mean, simulation.client_model(client).norm1.running_mean)
            batch = columns.take(torch.from_numpy(splits["test"].of(client)))
            with torch.no_grad():
                right += int((model(batch["x"]).argmax(1) == batch["y"]).sum())
            total += len(batch["y"])
        assert metrics["client_test"]["accuracy"] == pytest.approx(right / total)


def test_a_model_judged_by_batches_comes_back_with_statistics_all_the_same(tmp_path):
    result = fedsim.run(experiment("share_affine", "batch"), out=tmp_path / "run")
    for client in (None, 1):
        norm = fedsim.load_model(result.out, client).norm1
        assert float(norm.running_mean.abs().max()) > 0
    nothing = fedsim.run(experiment("share_affine", "batch", data={"proxy": 0}), out=tmp_path / "none")
    with pytest.raises(RequestError, match="proxy"):
        fedsim.load_model(nothing.out)


def untracked(*, input_shape, classes):
    layers = [torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8, track_running_stats=False), torch.nn.Linear(8, classes)]
    return torch.nn.Sequential(*layers)


def test_batch_norms_without_running_statistics_are_judged_by_batches_and_said_so():
    with pytest.raises(RequestError, match=r'say so with evaluation\.batch_norm = "batch"'):
        assemble(experiment("share_affine", model=untracked))
    assemble(experiment("share_affine", "batch", model=untracked))


def test_under_local_two_clients_differ_in_batch_norm_alone():
    simulation, records = played(experiment("local", strategy={"clients_per_round": 20}))
    trained = [client["client"] for client in records[-1].clients][:2]
    models = [simulation.client_model(client) for client in trained]
    own = {f"norm1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    for name, tensor in models[0].state_dict().items():
        if name in own:
            assert not torch.equal(tensor, models[1].state_dict()[name]), name
        elif "num_batches" not in name:
            assert torch.equal(tensor, models[1].state_dict()[name]), name
    assert not own & set(simulation.layout.names)


def test_a_run_gives_back_its_model_and_its_clients_models(tmp_path):
    """A client's own model, read back from the run's directory, gets the accuracy that the run recorded for it."""
    result = fedsim.run(experiment("local", "clients_stored", data={"clients": 20}), out=tmp_path / "run")
    recorded = fedsim.load(result.out).client_metrics
    recorded = recorded[recorded["round"] == 3].set_index("client")["accuracy"]
    population = assemble(fedsim.Experiment.load(tmp_path / "run" / "experiment.toml")).setup.population
    for client in recorded.index[:5]:
        model = fedsim.load_model(result.out, int(client))
        batch = population.columns.take(torch.from_numpy(population.splits["test"].of(int(client))))
        with torch.no_grad():
            right = (model(batch["x"]).argmax(1) == batch["y"]).float().mean()
        assert float(right) == pytest.approx(recorded[client])
    with pytest.raises(RequestError, match="name a client"):
        fedsim.load_model(result.out)
    with pytest.raises(RequestError, match="no client 20"):
        fedsim.load_model(result.out, 20)

    shared = fedsim.run(experiment("share_all"), out=tmp_path / "shared")
    test = assemble(fedsim.Experiment.load(tmp_path / "shared" / "experiment.toml")).setup.population.server["test"]
    batch = test.take(torch.arange(len(test)))
    with torch.no_grad():
        right = (fedsim.load_model(shared.out)(batch["x"]).argmax(1) == batch["y"]).float().mean()
    assert float(right) == pytest.approx(shared.summary["accuracy"])


def test_running_statistics_are_those_of_plain_pytorch_and_stay_with_the_client():
    """A client's stored statistics after two rounds, against a loop written out with nn.BatchNorm1d."""
    made = experiment("share_affine", "clients_stored", client={"execution": "loop"}, strategy={"fraction": 1.0})
    assembly = assemble(made)
    setup = assembly.setup
    trainer = setup.trainer()
    client = setup.population.trainable[:1]
    from clients.batches import schedule

    weights = setup.layout.flatten(setup.model)
    model = fedsim.models.mlp(input_shape=(64,), classes=10, norm="batch")
    known, state = Statistics(model), {}
    for number in (1, 2):
        trained = trainer.train(client, weights, number, state)
        state = {STATISTICS: trained.state[STATISTICS]}
        setup.layout.load(model, weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        done = trainer.work(client, number)
        plan = schedule(done, [trainer.members(int(client[0]))], client, 10, 0, number)
        model.train()
        for step in range(len(plan.count)):
            batch = setup.population.columns.take(plan.index[step, 0, : plan.count[step, 0]])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"]).backward()
            optimizer.step()
        update = setup.layout.flatten(model) - weights
        assert torch.allclose(trained.updates.rows[0], update, atol=1e-5)
        weights = weights + trained.updates.rows[0]
    stored = known.in_work(state[STATISTICS][0])
    assert torch.allclose(stored, known.of(model), atol=1e-4)
    assert float(state[STATISTICS][0, -1]) == sum(int(trainer.work(client, n).steps[0]) for n in (1, 2))


def test_shared_statistics_are_pooled_by_the_clients_weights_and_billed():
    simulation, records = played(experiment("share_all"), rounds=1)
    known, record = simulation.setup.statistics, records[0]
    # The same clients once more, one at a time, and the pooling written out.
    trainer = simulation.setup.trainer(stacked=False)
    ids = np.array(sorted(client["client"] for client in record.clients))
    weights = simulation.layout.flatten(simulation.setup.model)
    u = trainer.train(ids, weights, 1).updates
    share = (u.examples / u.examples.sum()).double()[:, None]
    means, variances = u.sends[STATISTICS].double().chunk(2, dim=1)
    mean = (share * means).sum(0)
    variance = (share * variances).sum(0) + (share * (means - mean).square()).sum(0)
    pooled = known.in_work(simulation.state[STATISTICS])
    assert torch.allclose(pooled, torch.cat([mean, variance]).float(), atol=1e-3)
    plain = played(experiment("share_affine"), rounds=1)[1][0]
    assert record.bytes_up - plain.bytes_up == 4 * known.size * len(ids)
    assert record.bytes_down > plain.bytes_down


def test_statistics_as_they_are_made_are_never_judged_by():
    simulation, records = played(experiment("share_all", evaluation={"batch_norm": "shared", "every": 1}), rounds=1)
    assert not simulation.first().metrics or records[0].metrics["test"]["accuracy"] > 0
    fresh = Simulation(simulation.experiment, simulation.setup, simulation.engine, InMemory())
    assert fresh.first().metrics == {}
    with pytest.raises(Exception, match="mean 0, variance 1"):
        fresh.evaluate(fresh.weights, "test")


@pytest.mark.parametrize("mode", [pytest.param("local, clients_stored", marks=pytest.mark.slow), "share_all, auto"])
def test_statistics_survive_a_kill(mode, tmp_path):
    kept, evaluated = MODES[mode]
    settings = {"client.batch_norm": kept, "evaluation.batch_norm": evaluated, "rounds": 30, "client.epochs": 2}
    given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    given += ["--set", "model.norm=batch"]
    whole = run(tmp_path, *given, "--out", "whole")
    process = start(tmp_path, "run", *given, "--out", "cut", "--quiet")
    assert interrupt_after(process, tmp_path / "cut", 8)
    process.wait()
    assert 8 <= rounds_committed(tmp_path / "cut") < 30
    resumed = run(tmp_path, *given, "--out", "cut", "--resume")
    for key in ("weights_sha256", "accuracy", "loss", "bytes_up"):
        assert resumed[key] == whole[key]


@pytest.mark.parametrize(
    ("kept", "evaluated", "said"),
    [
        ("local", "recalibrate", r'no batch norm under client\.batch_norm = "local"'),
        ("local", "batch", "no batch norm"),
        ("local", "shared", "no batch norm"),
        ("share_affine", "shared", r'client\.batch_norm = "share_all"'),
        ("share_all", "clients_stored", "give 'shared'"),
    ],
)
def test_impossible_pairs_are_refused(kept, evaluated, said):
    with pytest.raises(RequestError, match=said):
        experiment(kept, evaluated)


def test_what_has_nothing_to_act_on_or_nobody_to_test_is_refused():
    with pytest.raises(RequestError, match="client_test_fraction: 0 leaves nobody"):
        experiment("local", data={"client_test_fraction": 0.0})
    for kept in ("local", "share_all"):
        with pytest.raises(RequestError, match="has no batch norm"):
            assemble(experiment(kept, model="mlp"))
    with pytest.raises(RequestError, match="has no batch norm"):
        assemble(experiment("share_affine", "clients", model="mlp"))
    with pytest.raises(RequestError, match=r"client\.batch_size: 1"):
        assemble(experiment("share_affine", client={"batch_size": 1}))
    with pytest.raises(RequestError, match="proxy"):
        assemble(experiment("share_affine", data={"proxy": 0}))


def one_each(labels, clients, generator):
    """Client 0 holds a single example, client 1 two, the others the rest."""
    order = np.arange(len(labels))
    sizes = np.array([1, 2, *[(len(labels) - 3) // (clients - 2)] * (clients - 2)])
    sizes[-1] += len(labels) - sizes.sum()
    return order, np.concatenate([[0], np.cumsum(sizes)])


@pytest.mark.parametrize("execution", ["stacked", "loop"])
def test_a_client_with_one_example_is_recorded_and_the_others_count(execution):
    made = experiment(
        "share_affine",
        data={"clients": 8, "partition": one_each},
        strategy={"fraction": 1.0},
        client={"execution": execution},
    )
    _, records = played(made, rounds=1)
    assert [(event.client, event.kind) for event in records[0].events] == [(0, "too_few_examples")]
    assert "batch norm needs two" in records[0].events[0].message
    assert sorted(client["client"] for client in records[0].clients) == list(range(1, 8))


def test_a_new_client_is_judged_by_its_own_training_inputs():
    """Stored statistics fall back to estimated ones for whoever has not trained yet: the two agree before training."""
    stored, _ = played(experiment("local", "clients_stored"), rounds=0)
    estimated, _ = played(experiment("local", "clients"), rounds=0)
    assert stored.first().metrics == estimated.first().metrics
