"""A run killed at any moment resumes to the same bits."""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.end_to_end.commands import alive, fedsim, interrupt_after, query, rounds_committed, run, start

ROUNDS = ("--set", "rounds=40", "--set", "evaluation.every=3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same experiment, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, "--out", "run", "--engine", "inline", *ROUNDS)


def test_killed_three_times_it_ends_in_the_same_bits(whole, tmp_path):
    directory, draw = tmp_path / "run", random.Random(0)
    arguments = ("run", "--quiet", "--json", "--out", "run", "--engine", "processes", "--workers", "2", *ROUNDS)
    owners: dict[int, int] = {}
    last = 0
    for _ in range(3):
        process = start(tmp_path, *arguments, "--resume")
        last = draw.randint(last + 1, last + 12)
        assert interrupt_after(process, directory, last)
        process.communicate()
        for number, pid in query(directory, "SELECT round, pid FROM rounds"):
            assert owners.setdefault(number, pid) == pid  # what was committed stays as it was
    pids = {pid for (pid,) in query(directory, "SELECT DISTINCT pid FROM chunks")}
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))

    result = run(tmp_path, *arguments[3:], "--resume")
    assert result["weights_sha256"] == whole["weights_sha256"]
    for number, pid in query(directory, "SELECT round, pid FROM rounds"):
        assert owners.get(number, pid) == pid
    assert len(query(directory, "SELECT DISTINCT pid FROM rounds")) == 4
    for key in ("accuracy", "loss", "bytes_up", "bytes_down", "rounds"):
        assert result[key] == whole[key]

    again = run(tmp_path, *arguments[3:], "--resume")  # a finished run has nothing left to do
    assert again == result


@pytest.mark.parametrize("damage", ["cut", pytest.param("gone", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_costs_a_round(whole, tmp_path, damage):
    directory = tmp_path / "run"
    process = start(tmp_path, "run", "--quiet", "--out", "run", *ROUNDS)
    assert interrupt_after(process, directory, 10)
    process.communicate()
    last = rounds_committed(directory)
    newest = sorted((directory / "checkpoints").glob("*.safetensors"))
    assert len([path for path in newest if int(path.stem[-6:]) <= last]) == 2
    path = (
        directory
        / "checkpoints"
        / query(directory, f"SELECT checkpoint FROM rounds WHERE round = {last}")[0][0].split("/")[-1]
    )
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    code, out, err = fedsim(tmp_path, "run", "--json", "--out", "run", "--resume", *ROUNDS)
    assert code == 0
    assert f"going on from round {last - 1}" in err
    assert whole["weights_sha256"] in out
    assert [kind for (kind,) in query(directory, "SELECT kind FROM events")] == ["checkpoint_damaged"]


def test_ctrl_c_leaves_a_resumable_run_and_exit_130(whole, tmp_path):
    directory = tmp_path / "run"
    process = start(tmp_path, "run", "--quiet", "--out", "run", "--engine", "processes", *ROUNDS)
    assert interrupt_after(process, directory, 5, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err
    result = run(tmp_path, "--out", "run", "--resume")  # the run's own experiment
    assert result["weights_sha256"] == whole["weights_sha256"]


def test_what_is_refused_writes_nothing(tmp_path):
    run(tmp_path, "--out", "run", "--set", "rounds=1")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    code, _, err = fedsim(tmp_path, "run", "--out", "run")
    assert code == 2
    assert "holds a run; give --resume" in err
    code, _, err = fedsim(tmp_path, "run", "--out", "run", "--resume", "--set", "client.lr=0.2", "--set", "rounds=1")
    assert code == 2
    assert "client.lr" in err
    assert len(err.splitlines()) == 1
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_second_run_takes_the_next_name(tmp_path):
    first, second = (run(tmp_path, "--set", "rounds=1") for _ in range(2))
    assert (first["out"], second["out"]) == ("runs/digits", "runs/digits-2")
    assert first["weights_sha256"] == second["weights_sha256"]
