"""A round is committed whole or not at all, and a run goes on from whatever a kill, a full disk or a bad file left."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.errors import RequestError, RunError
from fedsim.records import Event, RoundRecord
from fedsim.runs import RunStore, load
from tests.runs.making import EXPERIMENT, LAYOUT, commit, create, record, row

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run of five rounds, closed."""
    with create(tmp_path / "run", rounds=5):
        pass
    return tmp_path / "run"


def select(directory: Path, sql: str) -> list[Any]:
    with sqlite3.connect(directory / "run.db") as database:
        return database.execute(sql).fetchall()


def checkpoints(directory: Path) -> list[str]:
    return sorted(file.name for file in (directory / "checkpoints").iterdir())


def test_a_committed_round_is_what_a_resume_starts_from(run: Path) -> None:
    with RunStore.open(run) as store:
        found = store.resume()
        assert found is not None
        assert found.round == 5
        assert torch.equal(found.tensors["row"], row(5))
        assert store.damage is None
        assert store.experiment_toml == EXPERIMENT
        assert store.layout == LAYOUT
        assert store.manifest["versions"] == {"torch": "2.14"}
        assert list(store.layout) == list(LAYOUT)


def test_the_two_newest_checkpoints_are_kept(run: Path) -> None:
    assert checkpoints(run) == ["round-000004.safetensors", "round-000005.safetensors"]


def test_all_of_a_round_is_in_the_database(run: Path) -> None:
    assert select(run, "SELECT round, cohort, completed, bytes_up, bytes_down FROM rounds WHERE round = 2") == [
        (2, 2, 2, 64, 80)
    ]
    assert select(run, "SELECT client, examples, loss FROM clients WHERE round = 2") == [(0, 10, 0.5), (3, 40, 0.5)]
    assert select(run, "SELECT split, name, value FROM metrics WHERE round = 5 AND name = 'accuracy'") == [
        ("test", "accuracy", 0.75)
    ]
    assert select(run, "SELECT chunk, pid, clients, seconds FROM chunks WHERE round = 1") == [(0, 42, 2, 0.1)]
    assert select(run, "SELECT kind, client, message FROM events WHERE round = 3") == [("client_failed", 3, "boom")]
    assert select(run, "SELECT DISTINCT pid FROM rounds") == [(os.getpid(),)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    block = torch.randn(4, 6).to(dtype)
    tensors = {"row": block[0], "transposed": block.t(), "whole": block, "scalar": block[0, 0], "none": block[:0]}
    with RunStore.create(tmp_path, EXPERIMENT, {}) as store:
        store.commit(record(1), tensors)
        found = store.resume()
    assert found is not None
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == dtype
        assert torch.equal(found.tensors[name], tensor)


def test_the_same_tensors_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with create(tmp_path / name, rounds=2):
            pass
    sums = "SELECT checkpoint_sha256 FROM rounds"
    assert select(tmp_path / "a", sums) == select(tmp_path / "b", sums)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_of_numpy_and_tensors_and_no_numbers_are_taken(tmp_path: Path, value: float) -> None:
    client = {"client": np.int64(3), "examples": torch.tensor(5), "loss": np.float32(value), "trust": np.float64(0.5)}
    evaluated = {"client": np.int32(1), "split": "client_test", "examples": np.int64(4), "accuracy": torch.tensor(0.5)}
    made = RoundRecord(
        round=np.int64(1),  # type: ignore[arg-type]
        cohort=np.int64(1),  # type: ignore[arg-type]
        completed=1,
        clients=[client],
        metrics={"test": {"loss": value}},
        client_metrics=[evaluated],
        events=[Event(1, "client_failed", "name \udcff of a file", traceback="\x00")],
        epsilon=value,
    )
    with RunStore.create(tmp_path, EXPERIMENT, {"array": np.arange(2), "path": tmp_path}) as store:
        store.commit(made, {"row": row(1)})
    found = load(tmp_path)
    assert found.clients.loc[0, ["client", "examples", "trust"]].tolist() == [3, 5, 0.5]
    assert found.client_metrics.loc[0, "accuracy"] == 0.5
    assert found.events.loc[0, "message"] == "name ? of a file"
    assert found.manifest == {"array": [0, 1], "path": str(tmp_path)}


# ------------------------------------------------------------------------------------------------ client state


def test_client_state_is_the_newest_version_or_zeros(tmp_path: Path) -> None:
    with create(tmp_path, rounds=3) as store:
        found = store.client_state("residual", torch.tensor([5, 7]), 3)
        assert torch.equal(found, torch.tensor([[0.0, 0, 0], [3, 3, 3]]))
        assert store.client_state("another", [7], 2, torch.float64).tolist() == [[0.0, 0.0]]
        assert store.client_state("residual", [], 3).shape == (0, 3)
        with pytest.raises(RunError, match=r"client 7's state 'residual' is 12 bytes of float32"):
            store.client_state("residual", [7], 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_client_state_round_trips(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.randn(3, 10, dtype=dtype)
    state = {
        "block": (torch.tensor([4, 0, 9]), rows),
        "strided": (torch.tensor([4, 0, 9]), torch.stack([rows.t(), rows.t()])[1].t()),
        "one value": (torch.tensor([4]), rows[:1, 0]),
        "nobody": (torch.tensor([], dtype=torch.int64), rows[:0]),
    }
    with RunStore.create(tmp_path, EXPERIMENT, {}) as store:
        store.commit(record(1), {"row": row(1)}, state)
        assert torch.equal(store.client_state("block", [9, 4], 10, dtype), rows[[2, 0]])
        assert torch.equal(store.client_state("strided", [9, 4], 10, dtype), rows[[2, 0]])
        assert torch.equal(store.client_state("one value", [4], 1, dtype), rows[:1, :1])
        assert torch.equal(store.client_state("nobody", [4], 10, dtype), torch.zeros(1, 10, dtype=dtype))


def test_only_versions_that_a_kept_checkpoint_needs_are_kept(tmp_path: Path) -> None:
    versions = "SELECT client, round FROM client_state ORDER BY client, round"
    with RunStore.create(tmp_path, EXPERIMENT, {}) as store:
        for number, client in enumerate([1, 1, 2, 1, 2, 2], start=1):
            state = {"c": (torch.tensor([client]), torch.full((1, 2), float(number)))}
            store.commit(record(number), {"row": row(number)}, state)
    # Kept are rounds 5 and 6: client 1 as of round 4, client 2 as of rounds 5 and 6.
    assert select(tmp_path, versions) == [(1, 4), (2, 5), (2, 6)]


# ------------------------------------------------------------------------------------------------ damage


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [halve, flip, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_checkpoint_falls_back_to_the_whole_round_before(run: Path, harm: Any) -> None:
    harm(run / "checkpoints" / "round-000005.safetensors")
    with RunStore.open(run) as store:
        store.finish({"metric": 0.75})
        found = store.resume()
        assert found is not None
        assert found.round == 4
        assert torch.equal(found.tensors["row"], row(4))
        assert store.damage is not None
        assert store.damage.kind == "checkpoint_damaged"
        assert "round-000005.safetensors" in store.damage.message
        assert "going on from round 4" in store.damage.message
        assert store.client_state("residual", [7], 3).tolist() == [[4.0, 4.0, 4.0]]
        assert store.summary is None
    for table in ("rounds", "clients", "chunks", "metrics", "client_state"):
        assert select(run, f"SELECT max(round) FROM {table}") == [(4,)]
    assert select(run, "SELECT count(*) FROM events WHERE kind = 'client_failed' AND round = 5") == [(0,)]
    with RunStore.open(run) as store:
        commit(store, 5, 6)
    assert checkpoints(run) == ["round-000005.safetensors", "round-000006.safetensors"]
    assert select(run, "SELECT count(*) FROM events WHERE kind = 'checkpoint_damaged'") == [(1,)]


def test_with_no_whole_checkpoint_the_run_starts_anew(run: Path) -> None:
    for file in (run / "checkpoints").iterdir():
        halve(file)
    with RunStore.open(run) as store:
        assert store.resume() is None
        assert store.damage is not None
        assert "starting anew" in store.damage.message
        assert store.client_state("residual", [7], 3).tolist() == [[0.0, 0.0, 0.0]]
        commit(store, 1)
    assert select(run, "SELECT round FROM rounds") == [(1,)]


def test_an_event_of_the_run_outlives_a_fall_back(run: Path) -> None:
    with RunStore.open(run) as store:
        store.event(Event(5, "resumed", "on another machine"))
    halve(run / "checkpoints" / "round-000005.safetensors")
    with RunStore.open(run) as store:
        store.resume()
    assert select(run, "SELECT message FROM events WHERE kind = 'resumed'") == [("on another machine",)]


def test_what_an_unfinished_commit_left_is_removed(run: Path) -> None:
    folder = run / "checkpoints"
    (folder / "round-000006.safetensors").write_bytes(b"written, never committed")
    (folder / "round-000007.safetensors.writing").write_bytes(b"half")
    (folder / "mine.txt").write_text("the user's own")
    with RunStore.open(run) as store:
        found = store.resume()
        assert found is not None
        assert found.round == 5
        assert store.damage is None
    assert checkpoints(run) == ["mine.txt", "round-000004.safetensors", "round-000005.safetensors"]


def test_a_failing_commit_leaves_the_rounds_before_as_they_were(run: Path) -> None:
    with RunStore.open(run) as store:
        unfit = record(6, chunks=[{"chunk": 0}])
        with pytest.raises(KeyError):
            store.commit(unfit, {"row": row(6)}, {"residual": (torch.tensor([7]), torch.zeros(1, 3))})
        assert checkpoints(run) == ["round-000004.safetensors", "round-000005.safetensors"]
        assert store.client_state("residual", [7], 3).tolist() == [[5.0, 5.0, 5.0]]
        commit(store, 6)
        with pytest.raises(RunError, match="round 6 cannot follow round 6"):
            store.commit(record(6), {"row": row(0)})
    assert torch.equal(load(run).row, row(6))


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: file.write_bytes(b"not a database at all, but long enough to look like something" * 100),
        lambda file: file.write_bytes(b""),
        halve,
        Path.unlink,
        lambda file: sqlite3.connect(file).executescript("DELETE FROM meta"),
    ],
    ids=["garbage", "empty", "halved", "missing", "emptied"],
)
def test_a_damaged_database_is_named(run: Path, harm: Any) -> None:
    harm(run / "run.db")
    for read in (RunStore.open, lambda directory: load(directory).history):
        with pytest.raises(RunError, match=r"run\.db") as raised:
            read(run)
        assert "\n" not in str(raised.value)
    (run / "run.db").unlink(missing_ok=True)
    with pytest.raises(RunError, match=r"run\.db is missing"):  # and the lock was given back each time
        RunStore.open(run)


def test_bytes_changed_anywhere_in_the_database_never_give_a_traceback(run: Path) -> None:
    whole = (run / "run.db").read_bytes()
    draws = np.random.Generator(np.random.Philox(0))
    refusals = []
    for _ in range(60):
        data = bytearray(whole)
        at = int(draws.integers(0, len(data) - 64))
        data[at : at + 64] = draws.bytes(64)
        (run / "run.db").write_bytes(data)
        try:
            with RunStore.open(run) as store:
                store.resume()
            load(run).rounds()
        except RunError as error:
            refusals.append(str(error))
        for left in ("run.db-wal", "run.db-shm"):
            (run / left).unlink(missing_ok=True)
    assert refusals
    assert all("run.db" in refusal for refusal in refusals)


@pytest.mark.parametrize(("schema", "said"), [("1", "older fedsim"), ("999", "newer fedsim")])
def test_a_run_of_another_schema_is_refused(run: Path, schema: str, said: str) -> None:
    with sqlite3.connect(run / "run.db") as database:
        database.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (schema,))
    for read in (RunStore.open, load):
        with pytest.raises(RunError, match=said):
            read(run)


# ------------------------------------------------------------------------------------------------ a full disk


def test_a_full_disk_keeps_the_rounds_before(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; first the checkpoint does not fit, then the database."""
    code = f"""
import resource, signal, sys, torch
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from clients.errors import RunError
from tests.runs.making import commit, create, record, row
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with create(Path({str(tmp_path / "run")!r}), rounds=3) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, resource.RLIM_INFINITY))
    for round, checkpoint, state in [
        (4, torch.zeros(1_000_000), torch.zeros(1, 3)),
        (4, row(4), torch.zeros(20, 1_000_000)),
    ]:
        try:
            store.commit(record(round), {{"row": checkpoint}}, {{"c": (torch.arange(len(state)), state)}})
        except RunError as error:
            print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    lines = ended.stdout.splitlines()
    assert len(lines) == 2
    assert all("saving round 4 failed, nothing more can be written there" in line for line in lines)
    assert checkpoints(tmp_path / "run") == ["round-000002.safetensors", "round-000003.safetensors"]
    with RunStore.open(tmp_path / "run") as store:
        found = store.resume()
        assert found is not None
        assert found.round == 3
        assert store.damage is None
        commit(store, 4)


# ------------------------------------------------------------------------------------------------ kills


KILLED = """
import sys, torch
sys.path.insert(0, {repository!r})
from pathlib import Path
from fedsim.runs import RunStore
from tests.runs.making import EXPERIMENT, LAYOUT, record
directory = Path({directory!r})
fresh = not (directory / "run.db").exists()
store = RunStore.create(directory, EXPERIMENT, {{}}, LAYOUT) if fresh else RunStore.open(directory)
found = store.resume()
round = found.round if found else 0
row = found.tensors["row"] if found else torch.zeros(2000)
print("ready", flush=True)
while True:
    state = store.client_state("c", [0, 1, 2], 2000)
    assert torch.equal(state, row.expand(3, -1)), (round, state[:, 0], row[0])
    round, row = round + 1, row + 1
    store.commit(record(round), {{"row": row}}, {{"c": (torch.arange(3), row.repeat(3, 1))}})
"""


def test_a_kill_at_any_moment_leaves_a_whole_round(tmp_path: Path) -> None:
    """The killed process itself checks, when it goes on, that the state agrees with the checkpoint's round."""
    directory = tmp_path / "run"
    code = KILLED.format(repository=str(REPOSITORY), directory=str(directory))
    committed = 0
    for delay in (0.0, 0.0131, 0.0471):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        process.stdout.close()
        process.stderr.close()
        with RunStore.open(directory) as store:
            found = store.resume()
            assert store.damage is None
            done = found.round if found else 0
            assert done >= committed
            assert [n for (n,) in select(directory, "SELECT round FROM rounds")] == list(range(1, done + 1))
            committed = done
    assert committed > 3


@pytest.mark.parametrize("made", [[], ["run.db.writing"], ["run.db"]])
def test_a_run_killed_while_it_was_made(tmp_path: Path, made: list[str]) -> None:
    with create(tmp_path / "whole"):
        pass
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "lock").write_text("123")
    for name in made:
        (killed / name).write_bytes((tmp_path / "whole" / "run.db").read_bytes() if name == "run.db" else b"half")
    if "run.db" in made:
        with RunStore.open(killed) as store:
            assert store.resume() is None
            assert store.damage is None
    else:
        with create(killed):
            pass
    assert (killed / "experiment.toml").read_text() == EXPERIMENT
    assert not (killed / "run.db.writing").exists()


# ------------------------------------------------------------------------------------------------ the directory


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with create(tmp_path / "run", rounds=1):
        with pytest.raises(RequestError, match=f"process {os.getpid()} is using this run"):
            RunStore.open(tmp_path / "run")
        code = f"from fedsim.runs import RunStore; RunStore.open({str(tmp_path / 'run')!r})"
        ended = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert "is using this run" in ended.stderr.splitlines()[-1]
        assert load(tmp_path / "run").rounds()[0]["round"] == 1
    with RunStore.open(tmp_path / "run") as store:
        store.close()  # twice does no harm


def test_a_run_is_not_written_over(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds a run already"):
        create(run)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "experiment.toml").write_text("mine = 1")
    with pytest.raises(RequestError, match=r"holds experiment\.toml of something else"):
        create(tmp_path / "mine")
    assert (tmp_path / "mine" / "experiment.toml").read_text() == "mine = 1"
    with pytest.raises(RequestError, match="cannot be written to"):
        create(run / "run.db")
    with pytest.raises(RequestError, match="holds no run"):
        RunStore.open(tmp_path)
    with pytest.raises(RequestError, match="no such directory"):
        RunStore.open(tmp_path / "nowhere")


def test_a_commit_costs_little(tmp_path: Path) -> None:
    """Under 3 ms for a small model and 10 clients with state of their own; the median, on a machine that is shared."""
    clients = [{**record(1).clients[0], "client": c} for c in range(10)]
    took = []
    with RunStore.create(tmp_path, EXPERIMENT, {}) as store:
        for number in range(1, 41):
            made = record(number, clients=clients)
            state = {"c": (torch.arange(10), torch.randn(10, 5000))}
            begun = time.perf_counter()
            store.commit(made, {"row": torch.randn(5000)}, state)
            took.append(time.perf_counter() - begun)
    assert sorted(took)[20] < 0.003
