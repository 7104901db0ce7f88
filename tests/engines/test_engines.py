from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from clients.errors import RequestError, RunError
from fedsim.engines.inline import Inline
from fedsim.engines.memory import Segments, adopt, dumps
from fedsim.engines.processes import Processes
from tests.engines.helper_worker import Items, Worker, failing_setup


def engines():
    return [Inline(), *(Processes(workers) for workers in (1, 2, 3))]


@pytest.fixture
def two():
    with Processes(2) as engine:
        engine.start(Worker)
        yield engine


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


def test_results_come_in_order_whoever_is_first():
    for engine in engines():
        with engine:
            engine.start(Worker)
            add = engine.share(torch.ones(3, dtype=torch.int64))
            for _ in range(3):
                found = []
                for result in engine.map("square", list(range(11)), {"add": add}):
                    assert result.answer.tensors["big"].eq(result.chunk).all()
                    found.append(result.answer.value)
                assert found == [i * i + 3 for i in range(11)]


def test_both_workers_work_and_neither_is_the_driver(two):
    pids = {result.pid for result in two.map("slowly", [0.1] * 4, {})}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_workers_write_into_shared_memory_and_use_one_thread(two):
    matrix = two.buffer("matrix", (7, 1000), torch.float32)
    assert [r.answer.value for r in two.map("write", list(range(7)), {"matrix": matrix})] == [1] * 7
    assert torch.equal(matrix[:, 0], torch.arange(7.0))
    again = two.buffer("matrix", (3, 1000), torch.float32)
    assert again.data_ptr() == matrix.data_ptr()


def test_what_a_worker_raises_is_an_error_with_its_traceback(two):
    with pytest.raises(RunError, match=r"ValueError: chunk 0 is bad(.|\n)*in raises"):
        list(two.map("raises", [0, 1], {}))
    assert [r.answer.value for r in two.map("slowly", [0, 0], {})] == [0, 0]  # the engine goes on


@pytest.mark.parametrize("kind", [RequestError, RunError])
def test_what_a_worker_says_on_purpose_is_the_same_line_from_every_engine(kind):
    for engine in engines():
        with engine:
            engine.start(Worker)
            with pytest.raises(kind) as caught:
                list(engine.map("says", [1, 2], {"kind": kind}))
            assert type(caught.value) is kind
            assert str(caught.value) == "data.source.train.x: nan at [1]"


def test_a_setup_that_fails_says_why():
    with Processes(1) as engine, pytest.raises(RunError, match="could not be set up: RuntimeError: no data here"):
        engine.start(failing_setup)


def test_a_lost_worker_costs_its_chunk_which_is_tried_again(two, tmp_path):
    results = list(two.map("die_once", list(range(6)), {"folder": str(tmp_path)}))
    assert [r.answer.value for r in results] == list(range(6))
    assert [bool(r.retries) for r in results] == [False, False, True, False, False, False]
    assert "its process ended" in results[2].retries[0]


@pytest.mark.parametrize("task", ["die_on_five", "hang_on_five"])
def test_a_chunk_lost_thrice_is_split_until_the_one_at_fault_is_found(task):
    with Processes(2, client_timeout=0.3) as engine:
        engine.start(Worker)
        chunks = [Items((0, 1, 2)), Items((3, 4, 5, 6)), Items((7, 8))]
        results = list(engine.map(task, chunks, {}))
        kept = [item for r in results if r.answer is not None for item in r.answer.value]
        lost = [item for r in results if r.answer is None for item in r.chunk.items]
        assert kept == [0, 1, 2, 3, 4, 6, 7, 8]
        assert lost == [5]
        assert next(r for r in results if r.answer is None).lost
        assert [r.answer.value for r in engine.map("slowly", [0] * 5, {})] == [0] * 5


def test_a_worker_killed_while_idle_is_replaced(two):
    victim = next(iter(two.map("slowly", [0], {}))).pid
    os.kill(victim, 9)
    time.sleep(0.1)
    assert [r.answer.value for r in two.map("slowly", [0] * 4, {})] == [0] * 4


def test_leaving_a_map_early_leaves_the_engine_whole(two):
    for result in two.map("slowly", [0.05] * 8, {}):
        assert result.answer.value == 0.05
        break
    assert [r.answer.value for r in two.map("slowly", [0] * 3, {})] == [0] * 3


def test_tensors_and_arrays_in_segments_cross_by_reference():
    engine = Processes(1)
    try:
        big = engine.share(torch.arange(300_000, dtype=torch.float64).reshape(300, 1000))
        payload, used = dumps((big[5:], big.view(-1)[::2], big.numpy()), engine.segments)
        assert len(payload) < 2000
        assert len(used) == 1
        import pickle

        adopt(engine.segments)
        rows, strided, array = pickle.loads(payload)
        assert torch.equal(rows, big[5:])
        assert torch.equal(strided, big.view(-1)[::2])
        rows[0, 0] = -1
        assert big[5, 0] == -1
        assert array[5, 0] == -1
    finally:
        engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_elsewhere_cross_by_value(dtype):
    import pickle

    adopt(Segments())
    for tensor in (
        torch.ones(3, 4).to(dtype),
        torch.ones(4, 3).to(dtype).T,
        torch.tensor(1).to(dtype),
        torch.empty(0, 5).to(dtype),
    ):
        back = pickle.loads(dumps(tensor, Segments())[0])
        assert back.dtype == dtype
        assert torch.equal(back, tensor)
    array = np.arange(5)
    assert np.array_equal(pickle.loads(dumps(array, Segments())[0]), array)


def test_nothing_remains_after_close():
    engine = Processes(2)
    engine.start(Worker)
    pids = {r.pid for r in engine.map("slowly", [0.05] * 4, {})}
    engine.close()
    deadline = time.monotonic() + 5
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(map(gone, pids))


def test_nothing_remains_after_the_driver_is_killed_at_work():
    """Workers in the middle of a chunk end too; shared memory has no name that could remain."""
    script = textwrap.dedent("""
        import sys
        import torch
        from fedsim.engines.processes import Processes
        from tests.engines.helper_worker import Worker
        engine = Processes(2)
        engine.start(Worker)
        engine.share(torch.ones(1000))
        print(engine.nursery.process.pid, *[worker.pid for worker in engine.crew], flush=True)
        list(engine.map("slowly", [60] * 4, {}))
    """)
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(pids) == 3
    time.sleep(0.3)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 10
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, pids))
    assert (set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()) <= before


def test_memory_stays_flat_over_many_maps(two):
    tensor = two.share(torch.ones(10))
    for _ in range(20):
        list(two.map("echo", [0, 1], {"tensor": tensor}))
    segments = len(two.segments.by_key)
    for i in range(60):
        add = two.buffer("add", (1,), torch.int64)
        for result in two.map("square", [0, 1, 2, 3], {"add": add.fill_(i)}):
            assert result.answer.tensors["big"].numel() == 50_000
    grown = len(two.segments.by_key) - segments
    assert grown <= 1 + 2 * 3  # the buffer, and the places of each of two workers
