"""Devices on a virtual clock, and FedBuff's rounds on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import fedsim
from fedsim.assembly import assemble
from fedsim.buffering import Queue
from fedsim.devices import Devices
from fedsim.engines.inline import Inline
from fedsim.experiment import DeviceSettings
from fedsim.records import RoundRecord
from fedsim.scheduling import Scheduler
from fedsim.simulation import InMemory, Simulation
from strategies.buffered import FedBuff
from tests.end_to_end.commands import interrupt_after, query, start

BUSY = {"speed_spread": 1.0, "jitter": 0.3, "dropout": 0.1, "up_mbps": 1.0, "down_mbps": 10.0, "latency": 0.1}


def queue(size, concurrency, clients=20, durations=None, **devices):
    found = Devices(DeviceSettings(**devices), seed=3)
    duration = durations or (lambda client, version: 1.0)
    return Queue(np.arange(clients), size, concurrency, found, duration, seed=3)


# ------------------------------------------------------------------------------------------------ the queue


def test_a_step_takes_the_updates_that_arrive_first():
    events = queue(2, 4, clients=4, durations=lambda client, version: [4.0, 1.0, 3.0, 2.0][client])
    first = events.next()
    assert (first.clients.tolist(), first.versions.tolist(), first.time) == ([1, 3], [0, 0], 2.0)
    # 1 and 3 gave an update to the buffer already and begin again with the next version, 1 at time 2.
    second = events.next()
    assert (second.clients.tolist(), second.versions.tolist(), second.time) == ([1, 2], [1, 0], 3.0)


def test_staleness_counts_the_servers_steps_since_a_client_began():
    slow = queue(1, 2, clients=2, durations=lambda client, version: [10.0, 1.0][client])
    batches = [slow.next() for _ in range(10)]
    assert [batch.clients.tolist() for batch in batches] == [[1]] * 9 + [[0]]
    assert batches[-1].versions.tolist() == [0]
    assert batches[-1].time == 10.0


def test_nobody_is_at_work_twice_or_gives_two_updates_to_a_step():
    events = queue(5, 12, speed_spread=1.0, durations=lambda client, version: 1.0 + client % 7)
    for _ in range(50):
        batch = events.next()
        assert len(set(batch.clients.tolist())) == 5
        at_work = [client for _, _, client, _ in events.events]
        assert len(at_work) == len(set(at_work)) == 11  # and one begins with the next version
        assert events.versions <= set(range(events.version + 1))


def test_the_same_seed_gives_the_same_events():
    def trace():
        events = queue(3, 6, dropout=0.2, available=0.5, period=10.0)
        return [
            (b.clients.tolist(), b.versions.tolist(), b.dropped, b.time) for b in (events.next() for _ in range(30))
        ]

    assert trace() == trace()
    assert any(dropped for _, _, dropped, _ in trace())


def test_time_passes_where_nobody_is_there():
    batch = queue(1, 1, clients=1, available=0.1, period=100.0).next()
    assert batch.clients.tolist() == [0]
    assert batch.time > 1.0


# ------------------------------------------------------------------------------------------------ devices


def test_a_round_takes_as_long_as_its_slowest_client():
    experiment = fedsim.Experiment(
        rounds=1,
        data={"clients": 10, "partition": "iid"},
        devices={"step_seconds": 0.5, "up_mbps": 8.0, "latency": 1.0},
    )
    *_, record = fedsim.rounds(experiment)
    sent = 4 * sum(p.numel() for p in assemble(experiment).setup.model.parameters()) / 1e6
    steps = max(client["steps"] for client in record.clients)
    assert record.simulated_seconds == pytest.approx(2.0 + 0.5 * steps + sent)


def test_devices_keep_their_speed_and_jitter_changes_it():
    ids, steps = np.arange(2000), np.full(2000, 4)
    devices = Devices(DeviceSettings(step_seconds=0.25, speed_spread=0.7), seed=0)
    first, second = (devices.seconds(ids, work, steps, 0, np.zeros(2000)) for work in (1, 2))
    assert np.array_equal(first, second)
    assert abs(np.log(first).std() - 0.7) < 0.7 * 3 / np.sqrt(2 * 2000)
    shaky = Devices(DeviceSettings(jitter=0.5), seed=0)
    assert not np.array_equal(*(shaky.seconds(ids, work, steps, 0, np.zeros(2000)) for work in (1, 2)))


def test_clients_drop_out_by_chance_and_the_record_says_who():
    experiment = fedsim.Experiment(rounds=20, client={"epochs": 1}, devices={"dropout": 0.3})
    records = list(fedsim.rounds(experiment))[1:]
    lost = sum(record.cohort - record.completed for record in records)
    assert 35 < lost < 85  # of 200
    assert sum(event.kind == "dropped_out" for record in records for event in record.events) > 10
    assert all(record.bytes_down % 10 == 0 for record in records)  # whoever drops out was sent the weights, too


def test_only_those_who_are_there_are_asked():
    experiment = fedsim.Experiment(
        rounds=12, client={"epochs": 1}, devices={"step_seconds": 10.0, "available": 0.3, "period": 1000.0}
    )
    setup = assemble(experiment).setup
    devices, time = Devices(experiment.devices, 0), 0.0
    for record in list(fedsim.rounds(experiment))[1:]:
        ids = np.array([client["client"] for client in record.clients])
        assert devices.present(ids, time).all()
        assert not devices.present(setup.population.trainable, time).all()
        time += record.simulated_seconds


# ------------------------------------------------------------------------------------------------ FedBuff


def test_with_everybody_at_work_and_no_delay_it_is_fedavg_to_the_bit(tmp_path):
    shared = {"rounds": 5, "data": {"clients": 20}}
    plain = fedsim.Experiment(**shared, strategy={"name": "fedavg", "weighting": "uniform", "clients_per_round": 20})
    buffered = {"name": "fedbuff", "concurrency": 20, "clients_per_round": 20}
    asynchronous = fedsim.Experiment(**shared, strategy=buffered, devices={"step_seconds": 1e-9})
    ends = {
        fedsim.run(experiment, out=tmp_path / name).summary["weights_sha256"]
        for name, experiment in (("plain", plain), ("buffered", asynchronous))
    }
    assert len(ends) == 1


def test_a_step_is_the_sum_of_discounted_updates_over_their_number():
    strategy = {"name": "fedbuff", "concurrency": 8, "clients_per_round": 3, "lr": 0.5}
    experiment = fedsim.Experiment(rounds=6, data={"clients": 10}, strategy=strategy, devices={"speed_spread": 1.0})
    setup = assemble(experiment).setup
    setup = replace(setup, stacked=False)
    engine = Inline()
    engine.start(setup)
    simulation, trainer = Simulation(experiment, setup, engine, InMemory()), setup.trainer()
    scheduler = Scheduler(experiment, setup)
    events, stale = scheduler.queue, []
    weights = {0: simulation.weights.clone()}
    for number in range(1, 7):
        simulation.step()
        batch, total = events.next(), torch.zeros(setup.layout.size, dtype=torch.float64)
        for client, version in zip(batch.clients.tolist(), batch.versions.tolist(), strict=True):
            staleness = number - 1 - version
            stale.append(staleness)
            update = trainer.train(np.array([client]), weights[version], version + 1).updates.rows[0]
            total += update.double() / (1 + staleness) ** 0.5
        expected = weights[number - 1] + (0.5 * total / 3).float()
        assert torch.allclose(simulation.weights, expected, atol=1e-6)
        weights[number] = simulation.weights.clone()
    assert max(stale) >= 1
    engine.close()


def test_it_gives_the_same_bits_on_every_engine_and_after_a_kill(tmp_path):
    devices = "\n".join(f"{name} = {value}" for name, value in BUSY.items())
    (tmp_path / "busy.toml").write_text(
        "rounds = 20\n[client]\nepochs = 1\n[strategy]\nname = 'fedbuff'\nconcurrency = 12\nclients_per_round = 5\n"
        f"[devices]\n{devices}\n"
    )
    ends = set()
    for name, engine, workers in (("inline", "inline", None), ("two", "processes", 2)):
        result = fedsim.run(tmp_path / "busy.toml", out=tmp_path / name, engine=engine, workers=workers)
        ends.add(result.summary["weights_sha256"])
    process = start(tmp_path, "run", "busy.toml", "--quiet", "--out", "killed", "--engine", "inline")
    assert interrupt_after(process, tmp_path / "killed", 6)
    process.communicate()
    assert query(tmp_path / "killed", "SELECT max(round) FROM rounds")[0][0] < 20
    ends.add(fedsim.run(out=tmp_path / "killed", resume=True).summary["weights_sha256"])
    assert len(ends) == 1
    seconds = [
        query(tmp_path / name, "SELECT simulated_seconds FROM rounds ORDER BY round") for name in ("two", "killed")
    ]
    assert seconds[0] == seconds[1]


def test_on_uneven_devices_it_takes_its_steps_in_less_time(tmp_path):
    def seconds(strategy):
        experiment = fedsim.Experiment(
            rounds=15, client={"epochs": 1}, strategy=strategy, devices={"speed_spread": 1.5, "step_seconds": 1.0}
        )
        return sum(record.simulated_seconds or 0.0 for record in fedsim.rounds(experiment))

    assert seconds({"name": "fedbuff", "concurrency": 30}) < 0.2 * seconds("fedavg")


def test_its_parts_are_what_it_says():
    assert FedBuff(concurrency=7).concurrency == 7
    assert FedBuff(concurrency=7).with_parts().concurrency == 7
    assert FedBuff(concurrency=7) != FedBuff(concurrency=8)


def test_one_client_at_a_time_is_never_stale():
    events = queue(1, 1, clients=5, speed_spread=1.0)
    versions = [events.next().versions.tolist() for _ in range(10)]
    assert versions == [[number] for number in range(10)]


def test_a_client_trains_with_the_control_variate_that_it_was_sent_with_its_weights(tmp_path):
    """SCAFFOLD on its own: what stale clients are sent is of one version, in a run and after a resume."""
    strategy = {"name": "fedbuff", "concurrency": 4, "clients_per_round": 2, "correction": "scaffold"}
    experiment = fedsim.Experiment(
        rounds=6, data={"clients": 8}, client={"epochs": 1}, strategy=strategy, devices={"speed_spread": 1.0}
    )
    setup = assemble(experiment).setup
    engine = Inline()
    engine.start(setup)
    simulation = Simulation(experiment, setup, engine, InMemory())
    sent = {0: simulation.state["correction/control"].clone()}
    seen = []
    train = engine.map

    def watched(task, chunks, broadcast):
        if task == "train":
            seen.append((broadcast["round"] - 1, broadcast["state"]["correction/control"].clone()))
        return train(task, chunks, broadcast)

    engine.map = watched
    for number in range(1, 7):
        simulation.step()
        simulation.commit(fedsim_record(number))
        sent[number] = simulation.state["correction/control"].clone()
    assert len({version for version, _ in seen}) > 2
    assert all(torch.equal(control, sent[version]) for version, control in seen)
    again = Simulation(experiment, setup, engine, InMemory())
    again.restore(6, simulation.checkpoint())
    assert again._versions.keys() == simulation._versions.keys()
    assert all(
        torch.equal(again._versions[v][name], value)
        for v, kept in simulation._versions.items()
        for name, value in kept.items()
    )
    engine.close()


def fedsim_record(number):
    return RoundRecord(round=number, cohort=0, completed=0)
