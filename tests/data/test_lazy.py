"""Data larger than memory: files that are mapped, and clients that are loaded one by one."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

import fedsim
from clients.errors import RequestError, RunError
from clients.parts import Part
from fedsim.data import ClientColumns, MappedColumns, Population, Source, TensorColumns, arrays, build
from fedsim.data.mapped import MappedFile
from fedsim.experiment import DataSettings

draw = np.random.default_rng(0)
x = draw.normal(size=(40, 3, 2))
y = np.arange(40, dtype=np.int32) % 4


def folder(path: Path, **columns: np.ndarray) -> Path:
    for name, values in columns.items():
        np.save(path / f"{name}.npy", values)
    return path


def mapped(path: Path, **columns: np.ndarray) -> MappedColumns:
    found = arrays(folder(path, **columns)).columns("train")
    assert isinstance(found, MappedColumns)
    return found


# ---------------------------------------------------------------------------------------------------- mapped files


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4", np.uint8, np.int16, bool])
@pytest.mark.parametrize("fortran", [False, True])
def test_rows_of_a_folder_are_what_an_npz_file_gives(tmp_path: Path, kind: Any, fortran: bool) -> None:
    values = (np.abs(x) * 50).astype(kind)
    values = np.asfortranarray(values) if fortran else values
    np.savez(tmp_path / "own.npz", x=values, y=y)
    whole = arrays(tmp_path / "own.npz").columns("train")
    assert whole is not None
    columns = mapped(tmp_path, x=values, y=y)
    for again in (columns, pickle.loads(pickle.dumps(columns)), columns.map_tensors(torch.clone)):
        assert again.names == ("x", "y")
        assert (len(again), again.shape("x"), again.dtype("x")) == (40, (3, 2), whole.dtype("x"))
        for index in (torch.tensor([[7, 0], [39, 7]]), torch.zeros(0, 2, dtype=torch.int64)):
            for name, expected in whole.take(index).items():
                taken = again.take(index)[name]
                assert taken.dtype == expected.dtype
                assert torch.equal(taken, expected)


def test_a_mapped_array_that_python_gives_stays_in_its_file(tmp_path: Path) -> None:
    array = np.load(folder(tmp_path, x=x) / "x.npy", mmap_mode="r")
    raw = np.memmap(tmp_path / "raw", np.float32, "w+", offset=12, shape=(40, 5))
    raw[:] = np.arange(200).reshape(40, 5)
    raw.flush()
    columns = Source(train={"x": array, "raw": raw, "y": torch.from_numpy(y)}).columns("train")
    assert isinstance(columns, MappedColumns)
    assert set(columns.files) == {"x", "raw"}
    taken = pickle.loads(pickle.dumps(columns)).take(torch.tensor([3, 1]))
    assert taken["x"] == pytest.approx(x[[3, 1]].astype(np.float32))
    assert taken["raw"].tolist() == raw[[3, 1]].tolist()
    part = Source(train={"x": array[10:]}).columns("train")  # has no place in its file that could be told
    assert isinstance(part, TensorColumns)
    assert part.take(torch.tensor([0]))["x"] == pytest.approx(x[[10]])


def test_workers_get_the_path_and_map_again(tmp_path: Path) -> None:
    source = arrays(folder(tmp_path, x=np.zeros((2000, 500), dtype=np.float32), y=np.arange(2000) % 4))
    population = build(source, DataSettings(partition=Part("iid"), clients=4), 0)
    moved: list[int] = []
    population.map_tensors(lambda tensor: moved.append(tensor.nbytes) or tensor)
    assert sum(moved) < 100_000  # labels and positions; x has 4 MB
    population.columns.take(torch.arange(2))
    assert len(pickle.dumps(population)) < 100_000
    assert population.label_table("train", np.arange(4)).sum() == population.splits["train"].examples


def test_labels_and_ids_are_read_and_masks_stay_in_their_file(tmp_path: Path) -> None:
    masks = draw.integers(0, 3, (40, 2, 2))
    source = arrays(folder(tmp_path, x=x, y=masks, clients=np.arange(40) // 10, x_test=x[:4], y_test=masks[:4]))
    columns = source.columns("train")
    assert isinstance(columns, MappedColumns)
    assert set(columns.files) == {"x", "y"}
    assert isinstance(source.columns("test"), MappedColumns)
    population = build(source, DataSettings(partition=Part("natural"), proxy=3), 0)
    assert (population.clients, population.classes, population.input_shape) == (4, 3, (3, 2))
    assert population.label_table("train", np.arange(4)) is None


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_number_that_is_not_finite_is_named_by_its_place_unless_nobody_looks(tmp_path: Path, value: float) -> None:
    broken = x.copy()
    broken[17, 2, 1] = value
    folder(tmp_path, x=broken, y=y)
    with pytest.raises(RequestError, match=rf"data\.source\.path: x of .* has {value} at \[17, 2, 1\]; every number"):
        arrays(tmp_path)
    assert not arrays(tmp_path, scan=False).columns("train").take(torch.tensor([17]))["x"].isfinite().all()


def test_all_of_a_file_is_looked_through_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.data.tensors._BLOCK", 7 * 6)
    for place in (0, 6, 7, 38, 39):
        broken = x.copy()
        broken[place, 0, 0] = np.inf
        with pytest.raises(RequestError, match=rf"inf at \[{place}, 0, 0\]"):
            arrays(folder(tmp_path, x=broken, y=y))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"y": y}, "has no array 'x'; it has y"),
        ({"x": x, "y": y, "x_tset": x}, "has an array 'x_tset'.*did you mean 'x_test'"),
        ({"x": x, "y": y, "x_test": x}, "has only one of x_test and y_test"),
        ({"x": np.array([[1], [2, 3]], dtype=object), "y": y[:2]}, "x of .* holds objects .ragged"),
        ({"x": x, "y": y - 1}, r"y of .* has the class -1 at \[0\]"),
        ({"x": x.astype(str), "y": y}, "x of .* is of <U"),
        ({"x": x, "y": y[:5]}, r"columns differ in length \(x 40, y 5\)"),
        ({"x": x[:0], "y": y[:0]}, r"x of .* (is empty|is not an \.npy file that can be mapped)"),
        ({"x": np.array(3.0), "y": y}, "x of .* is a single number"),
        ({"x": x, "y": y, "clients": y[:5]}, r"clients: int32 \[5\] given"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=rf"data\.source.*{said}"):
        arrays(folder(tmp_path, **columns))


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, x=x, y=y)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-100])
    with pytest.raises(RequestError, match=r"x of .* is not an \.npy file that can be mapped"):
        arrays(tmp_path)
    (tmp_path / "x.npy").write_bytes(b"")
    with pytest.raises(RequestError, match=r"x of .* is not an \.npy file that can be mapped"):
        arrays(tmp_path)


#: Runs experiments in processes that may take only so much more memory than they have; prints the weights' hashes.
_LIMITED = """
import json, resource, sys
import torch
torch.set_num_threads(1)
import numpy as np
import fedsim
folder, data, room = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
def run(name, **settings):
    return fedsim.run(fedsim.Experiment(**settings), out=f"{folder}/{name}", engine=name.split("-")[0], workers=2)
run("inline-first", rounds=1)
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
try:
    np.load(f"{folder}/x.npy")
    print("the limit limits nothing")
except MemoryError:
    pass
source = {"name": "arrays", "path": folder}
for name, source in (("inline-files", source), ("processes-files", source), ("inline-clients", f"{folder}/own.py:own"),
                     ("processes-clients", f"{folder}/own.py:own")):
    settings = {"model": {"name": "logistic"}, "client": {"batch_size": 20, "lr": 0.01},
                "strategy": {"name": "fedavg", "clients_per_round": 4}, "evaluation": {"clients": True}}
    print(run(name, rounds=2, data={"source": source, **data}, **settings).summary["weights_sha256"])
"""

_OWN = """
import numpy as np
import fedsim

def load(client):
    x = np.full((EACH, 2000), np.float16(client / CLIENTS), dtype=np.float32)
    return {"x": x, "y": np.arange(EACH) % 3}

def own():
    return fedsim.Source(train=fedsim.data.ClientColumns(load, np.full(CLIENTS, EACH), kept_mib=10), classes=3)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts memory that is mapped on Linux alone")
def test_every_engine_trains_on_more_than_memory_holds(tmp_path: Path) -> None:
    """80 MB of inputs in files, 160 MB as float32, in processes that may take 48 MiB more than they have."""
    clients, each = 40, 500
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float16, (clients * each, 2000))
    for client in range(clients):
        file[client * each : (client + 1) * each] = client / clients
    file.flush()
    folder(tmp_path, y=np.arange(clients * each) % each % 3, clients=np.arange(clients * each) // each)
    (tmp_path / "own.py").write_text(_OWN.replace("EACH", str(each)).replace("CLIENTS", str(clients)))
    data = {"partition": "natural", "test_fraction": 0.0, "proxy": 0, "client_test_fraction": 0.02}
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path), json.dumps(data), str(48 * 2**20)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    hashes = done.stdout.split("\n")[:-1]
    assert len(hashes) == 4
    assert len(set(hashes)) == 1, hashes


# ---------------------------------------------------------------------------------------------- clients, one by one


class Loader:
    """Clients whose ``x`` is their own number and the example's; counts how often each is loaded."""

    def __init__(self, sizes: Any, **changes: Any):
        self.sizes, self.changes, self.calls = sizes, changes, []

    def __call__(self, client: int) -> Mapping[str, Any]:
        self.calls.append(client)
        size = int(self.sizes[client])
        given = {"x": np.stack([np.full(size, client), np.arange(size)], axis=1), "y": torch.arange(size) % 3}
        return {**given, **self.changes.get(f"of_{client}", {})} if self.changes else given


SIZES = np.array([4, 0, 3, 5, 1])


def columns_of(loader: Loader, **settings: Any) -> ClientColumns:
    return ClientColumns(loader, loader.sizes, **settings)


def test_positions_are_client_after_client() -> None:
    columns = columns_of(Loader(SIZES))
    expected = [[client, i] for client, size in enumerate(SIZES) for i in range(size)]
    assert columns.names == ("x", "y")
    assert (len(columns), columns.shape("x"), columns.dtype("x")) == (13, (2,), torch.int64)
    assert columns.column("x").tolist() == expected
    index = torch.tensor([[12, 0, 4], [6, 7, 0]])
    assert columns.take(index)["x"].tolist() == np.array(expected)[index].tolist()
    assert columns.take(index[:0])["x"].shape == (0, 3, 2)
    assert columns.ids.tolist() == [client for client, _ in expected]
    again = pickle.loads(pickle.dumps(columns))
    assert "loaded" not in vars(again)
    assert torch.equal(again.take(index)["x"], columns.take(index)["x"])
    by_value = cloudpickle.loads(cloudpickle.dumps(ClientColumns(lambda c: {"y": torch.arange(2)}, [2, 2])))
    assert by_value.column("y").tolist() == [0, 1, 0, 1]


def test_shuffled_examples_of_a_few_clients_load_each_once() -> None:
    loader = Loader(np.full(50, 20))
    columns = columns_of(loader, kept_mib=0)  # the last one alone is kept
    index = torch.from_numpy(np.random.default_rng(0).permutation(200)).reshape(10, 20)  # of clients 0 to 9
    columns.take(index)
    assert sorted(loader.calls) == list(range(10))
    assert list(columns.loaded) == [9]


def test_those_used_last_are_kept_as_far_as_there_is_room() -> None:
    size = 2**14  # an example has 24 bytes: of 384 KiB a client, two fit in 1 MiB
    loader = Loader(np.full(5, size))
    columns = columns_of(loader, kept_mib=1)
    for client in (0, 1, 0, 2, 0, 1):
        columns.take(torch.tensor([client * size]))
    assert loader.calls == [0, 1, 2, 1]
    assert list(columns.loaded) == [0, 1]


def test_the_natural_partition_and_named_classes_need_no_client_but_one() -> None:
    loader = Loader(np.full(30, 4))
    source = Source(train=columns_of(loader), classes=3)
    population = build(source, DataSettings(partition=Part("natural"), proxy=5, held_out_clients=2), 0)
    assert loader.calls == [0]
    assert (population.clients, population.classes, population.input_shape) == (30, 3, (2,))
    assert population.label_table("train", np.arange(3)) is None
    held = population.columns.take(torch.from_numpy(population.splits["train"].of(7)))
    assert held["x"][:, 0].unique().tolist() == [7]


def test_classes_are_counted_in_all_clients_where_nobody_names_them() -> None:
    loader = Loader(np.array([4, 2, 4]), of_2={"y": torch.tensor([0, 1, 8, 2])})
    source = Source(train=columns_of(loader))
    assert build(source, DataSettings(partition=Part("natural"), proxy=0), 0).classes == 9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"y": torch.tensor([0, 1, 7, 2])},
            r"train: client 2: y has class 7 at \[2\]; the source says",
        ),
        ({"y": torch.tensor([0, 1, 2, -100])}, r"train: client 2: y has class -100 at \[3\]; classes count from 0"),
    ],
)
def test_a_label_that_is_no_class_is_refused_when_its_client_is_loaded(changes: dict[str, Any], said: str) -> None:
    source = Source(train=columns_of(Loader(np.array([4, 2, 4]), of_2=changes)), classes=3)
    columns = build(source, DataSettings(partition=Part("natural"), proxy=0, test_fraction=0.0), 0).columns
    assert columns.take(torch.arange(6))["y"].tolist() == [0, 1, 2, 0, 0, 1]
    with pytest.raises(RequestError, match=rf"data\.source\.{said}"):
        columns.take(torch.arange(6, 10))


class Rows:
    """A data set of dicts, 20 long, whose example 13 is as given."""

    def __init__(self, **thirteenth: Any):
        self.thirteenth = thirteenth

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"x": np.full(3, index, np.float64), "y": np.int8(index % 3)}
        return {**row, **self.thirteenth} if index == 13 else row


@pytest.mark.parametrize(
    ("thirteenth", "said"),
    [
        ({"x": np.array([0, np.nan, 0])}, r"train\.x: nan at \[13, 1\]; every number must be finite"),
        ({"x": np.array([0, 0, 1e300])}, r"train\.x: 1e\+300 at \[13, 2\]; too large for float32"),
        ({"y": np.int8(3)}, r"train\.y: class 3 at \[13\]; the source says that there are 3 classes"),
        ({"y": np.int8(-1)}, r"train\.y: class -1 at \[13\]; classes count from 0"),
    ],
)
def test_what_a_data_set_gives_is_looked_at_when_it_is_taken(thirteenth: dict[str, Any], said: str) -> None:
    settings = DataSettings(partition=Part("iid"), clients=2, proxy=0, test_fraction=0.0)
    columns = build(Source(train=Rows(**thirteenth), classes=3), settings, 0).columns
    good = columns.take(torch.tensor([4, 12]))
    assert (good["y"].dtype, good["y"].tolist()) == (torch.int64, [1, 0])
    with pytest.raises(RequestError, match=rf"data\.source\.{said}"):
        columns.take(torch.tensor([[4, 13]]))


def test_marks_of_tokens_that_do_not_count_are_no_classes_and_are_left_alone() -> None:
    given = ClientColumns(lambda client: {"x": torch.zeros(2, 3), "y": torch.tensor([[0, -100], [1, 0]])}, [2, 2])
    settings = DataSettings(partition=Part("natural"), proxy=0, test_fraction=0.0)
    columns = build(Source(train=given, classes=2), settings, 0).columns
    assert columns.take(torch.tensor([2]))["y"].tolist() == [[0, -100]]


def test_numbers_of_a_mapped_array_that_python_gives_are_looked_through(tmp_path: Path) -> None:
    for value, said in ((np.nan, "nan"), (1e300, r"1e\+300")):
        broken = x.copy()
        broken[17, 2, 1] = value
        array = np.load(folder(tmp_path, x=broken) / "x.npy", mmap_mode="r")
        source = Source(train={"x": array, "y": y})
        with pytest.raises(RequestError, match=rf"data\.source\.train\.x: {said} at \[17, 2, 1\]"):
            build(source, DataSettings(clients=2, proxy=0), 0)


def test_a_partition_by_labels_reads_them() -> None:
    source = Source(train=columns_of(Loader(np.full(30, 10))))
    settings = DataSettings(partition=Part("pathological", {"classes_per_client": 1}), clients=3, proxy=0)
    population = build(source, settings, 0)
    for client in range(3):
        held = population.columns.take(torch.from_numpy(population.splits["train"].of(client)))
        assert len(held["y"].unique()) == 1


def test_bytes_of_clients_are_pixels() -> None:
    columns = ClientColumns(lambda client: {"x": np.full((3, 2), 51 * client, dtype=np.uint8)}, [3, 3])
    taken = Source(train=columns, input_range=(0.0, 1.0)).columns("train")
    assert taken is not None
    assert taken.take(torch.tensor([0, 5]))["x"] == pytest.approx(np.array([[0, 0], [0.2, 0.2]]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": np.zeros((2, 2), dtype=int)}, "client 2: x has 2 examples, and sizes says 3"),
        ({"x": np.zeros((3, 4), dtype=int)}, r"client 2: x is int64 \[4\] an example, unlike client 0's x int64 \[2\]"),
        ({"x": np.zeros((3, 2))}, r"client 2: x is float64 \[2\] an example, unlike client 0's x int64 \[2\], y int64"),
        ({"z": np.zeros(3)}, "client 2: columns x, y, z given, unlike client 0's"),
        ({"y": [0, 1, 2]}, "client 2: y: list given; give a tensor"),
        ({"y": np.array([0, np.nan, 1])}, r"client 2: y has nan at \[1\]"),
    ],
)
def test_a_client_unlike_the_others_is_named(given: dict[str, Any], said: str) -> None:
    columns = columns_of(Loader(SIZES, of_2=given))
    columns.take(torch.tensor([0, 12]))
    with pytest.raises(RequestError, match=rf"data\.source\.train: {said}"):
        columns.take(torch.tensor([5]))


def test_a_loader_that_fails_names_its_client() -> None:
    def load(client: int) -> Mapping[str, Any]:
        if client == 1:
            raise OSError("the disk\nis gone")
        return {"x": torch.zeros(2, 2)} if client == 0 else torch.zeros(2)  # type: ignore[return-value]

    columns = ClientColumns(load, [2, 2, 2])
    with pytest.raises(RunError, match=r"train: client 1: loading it raises OSError: the disk is gone"):
        columns.take(torch.tensor([3]))
    with pytest.raises(RequestError, match=r"train: client 2: its loader gave Tensor; give a dict of columns"):
        columns.take(torch.tensor([5]))


@pytest.mark.parametrize("sizes", [[], [0, 0], [1, -1], [1.5], [[1]]])
def test_sizes_that_are_none_are_refused(sizes: list[Any]) -> None:
    with pytest.raises(RequestError, match=r"data\.source\.train: sizes .* given"):
        ClientColumns(lambda client: {}, sizes)


def test_files_and_loaded_clients_train_to_the_same_bits_as_tensors(tmp_path: Path) -> None:
    def load(client: int) -> dict[str, np.ndarray]:
        made = np.random.default_rng(client)
        return {"x": made.normal(size=(20, 5)).astype(np.float32), "y": made.integers(0, 3, 20)}

    loaded = ClientColumns(load, np.full(12, 20))
    whole = {name: loaded.column(name) for name in loaded.names}
    files = folder(tmp_path, clients=loaded.ids, **{name: column.numpy() for name, column in whole.items()})
    by_client = Source(train=loaded, classes=3)
    hashes = []
    for engine, source in (
        ("inline", by_client),
        ("processes", by_client),
        ("inline", arrays(files)),
        ("processes", arrays(files)),
        ("inline", Source(train=whole, clients=loaded.ids)),
    ):
        experiment = fedsim.Experiment(
            rounds=2,
            data={"source": source, "partition": "natural", "proxy": 5},
            model={"name": "logistic"},
            strategy={"name": "fedavg", "clients_per_round": 5},
        )
        run = fedsim.run(experiment, out=tmp_path / str(len(hashes)), engine=engine, workers=2)
        hashes.append(run.summary["weights_sha256"])
    assert len(set(hashes)) == 1, hashes


def test_a_file_is_told_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder(tmp_path, x=x))
    file = MappedFile.of(np.load("x.npy", mmap_mode="r"))
    assert file.path == tmp_path.resolve() / "x.npy"


def test_a_population_of_files_is_picklable(tmp_path: Path) -> None:
    source = arrays(folder(tmp_path, x=x, y=y))
    population = build(source, DataSettings(partition=Part("iid"), clients=4, proxy=3), 0)
    again: Population = pickle.loads(pickle.dumps(population))
    for split, columns in population.server.items():
        assert torch.equal(again.server[split].column("x"), columns.column("x"))
