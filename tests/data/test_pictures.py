"""Picture data sets come from files in their authors' formats; what is missing, damaged or unsafe is refused."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
from clients import catalog
from clients.errors import RequestError, RunError
from clients.parts import Part
from fedsim.data.picture_files import read_batch, read_idx, read_mat
from fedsim.data.pictures import cifar10, cifar100, emnist, fashion_mnist, mnist, only_classes, svhn
from fedsim.data.source import Source
from fedsim.experiment import DataSettings
from tests.data import writing_pictures as writing
from tests.data.refusing import refused


def assert_holds(split: dict[str, Any], images: np.ndarray, labels: Any) -> None:
    """Bytes and classes, exactly."""
    assert (split["x"].dtype, split["y"].dtype) == (np.uint8, np.int64)
    assert np.array_equal(split["x"], images)
    assert split["y"].tolist() == list(labels)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------ what the files hold


@pytest.mark.parametrize(("source", "name"), [(mnist, "MNIST"), (fashion_mnist, "FashionMNIST")])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_and_fashion_mnist_are_bytes_with_one_channel(
    tmp_path: Path, source: Callable[..., Source], name: str, packed: bool
) -> None:
    train, test = writing.write_mnist(tmp_path, name, packed=packed)
    found = source(root=str(tmp_path))
    assert_holds(found.train, train[:, None], (0, 1, 2, 9, 1, 2))
    assert_holds(found.test, test[:, None], (1, 2, 0))
    assert found.input_range == (0, 1)


def test_what_torchvision_reads_is_read_here(tmp_path: Path) -> None:
    writing.write_mnist(tmp_path)
    theirs = torchvision.datasets.MNIST(str(tmp_path), train=True)
    assert_holds(mnist(root=str(tmp_path)).train, theirs.data.numpy()[:, None], theirs.targets.tolist())


def test_emnist_stands_upright(tmp_path: Path) -> None:
    images, raw = writing.some_images(3, 28, 28), tmp_path / "EMNIST" / "raw"
    for split in ("train", "test"):  # in the files a row of an image is a column
        writing.write_idx(raw, f"emnist-balanced-{split}", images.swapaxes(1, 2), [0, 46, 11], packed=True)
    found = emnist(root=str(tmp_path))
    assert_holds(found.train, images[:, None], [0, 46, 11])
    assert_holds(found.test, images[:, None], [0, 46, 11])


def test_the_letters_of_emnist_count_from_0(tmp_path: Path) -> None:
    images, raw = writing.some_images(3, 28, 28), tmp_path / "EMNIST" / "raw"
    for split in ("train", "test"):
        writing.write_idx(raw, f"emnist-letters-{split}", images, [1, 26, 3])
    assert emnist(root=str(tmp_path), split="letters").train["y"].tolist() == [0, 25, 2]
    assert emnist(root=str(tmp_path), split="letters", classes=[25, 2]).train["y"].tolist() == [0, 1]
    writing.write_idx(raw, "emnist-letters-test", images, [1, 26, 0])
    refused(lambda: emnist(root=str(tmp_path), split="letters"), "test-labels", "label 0 at [2]; they are 1 to 26")


@pytest.mark.parametrize("protocol", [None, 0, 1, 2, 3, 4, 5])
def test_cifar10_is_five_batches_of_planes_by_any_protocol(tmp_path: Path, protocol: int | None) -> None:
    images, labels = writing.write_cifar10(tmp_path, protocol)
    found = cifar10(root=str(tmp_path))
    assert_holds(found.train, images, labels)
    assert found.test["x"].shape == (2, 3, 32, 32)


def test_cifar10_takes_names_in_bytes_and_labels_in_arrays(tmp_path: Path) -> None:
    images, labels = writing.write_cifar10(tmp_path)
    first = {b"data": np.asfortranarray(images[:2].reshape(2, -1)), b"labels": labels[:2].astype(">i4")}
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(first))
    second = {"data": images[2:4].reshape(2, -1), "labels": list(labels[2:4])}  # numpy's numbers
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(second, 2))
    assert_holds(cifar10(root=str(tmp_path)).train, images, labels)


def test_cifar100_has_fine_and_coarse_labels(tmp_path: Path) -> None:
    images = writing.write_cifar100(tmp_path)
    assert_holds(cifar100(root=str(tmp_path)).train, images, (0, 99, 5))
    assert_holds(cifar100(root=str(tmp_path), labels="coarse").test, images, (4, 13, 19))
    refused(lambda: cifar100(root=str(tmp_path), labels="coarse", classes=[20]), "no class 20; they are 0 to 19")


def test_svhn_calls_the_digit_0_class_0(tmp_path: Path) -> None:
    images = writing.write_svhn(tmp_path)
    found = svhn(root=str(tmp_path))
    assert_holds(found.train, images, (0, 1, 9, 5))
    assert_holds(found.test, images, (0, 1, 9, 5))


def test_svhn_trains_on_the_extra_examples_where_they_are_asked_for(tmp_path: Path) -> None:
    writing.write_svhn(tmp_path)
    refused(lambda: svhn(root=str(tmp_path), extra=True), f"{tmp_path} lacks extra_32x32.mat")
    writing.write_svhn(tmp_path, labels=(3, 4), splits=("extra",))
    found = svhn(root=str(tmp_path), extra=True)
    assert found.train["y"].tolist() == [0, 1, 9, 5, 3, 4]
    assert found.test["y"].tolist() == [0, 1, 9, 5]


def test_classes_are_renumbered_in_the_order_given(tmp_path: Path) -> None:
    train, test = writing.write_mnist(tmp_path)
    found = mnist(root=str(tmp_path), classes=[2, 0])
    assert_holds(found.train, train[[0, 2, 5]][:, None], (1, 0, 0))
    assert_holds(found.test, test[[1, 2]][:, None], (0, 1))


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([1, 10], "classes[1]: there is no class 10; they are 0 to 9"),
        ([-1], "classes[0]: there is no class -1"),
        ([2, True], "classes[1]: there is no class True"),
        ([1, 2, 1], "classes[2]: 1 is named twice"),
        ([], "classes: no class"),
        ([7, 8], "classes: there is no example of 7, 8"),
    ],
)
def test_classes_that_there_are_not_are_refused(tmp_path: Path, classes: list[int], said: str) -> None:
    writing.write_mnist(tmp_path)
    refused(lambda: mnist(root=str(tmp_path), classes=classes), said)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.permutations(range(5)), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_only_classes_keeps_every_example_of_them_and_no_other(y: list[int], order: list[int], kept: int) -> None:
    classes, column = order[:kept], np.arange(len(y))
    wanted = [(place, classes.index(label)) for place, label in enumerate(y) if label in classes]
    if wanted:
        found = only_classes({"x": column, "y": np.array(y)}, classes, 5)
        assert list(zip(found["x"].tolist(), found["y"].tolist(), strict=True)) == wanted


# ------------------------------------------------------------------------------------------ where the files lie


def test_root_is_relative_to_the_experiment(tmp_path: Path) -> None:
    writing.write_mnist(tmp_path / "data")
    for given_root in ({}, {"root": "data"}):
        source = catalog.build(Part("mnist", given_root), "sources", tmp_path, key="data.source")
        assert len(source.train["y"]) == 6
    missing = DataSettings(source=Part("mnist", {"root": "nowhere", "download": True}))
    assert catalog.check(missing.source, "sources", tmp_path, key="data.source") == []


def test_a_resolved_experiment_names_the_folder_wherever_it_is_run_again(tmp_path: Path) -> None:
    for source in ("mnist", {"name": "mnist", "root": "data"}):
        resolved = fedsim.Experiment(tmp_path, data={"source": source}).resolved()
        assert resolved["data"]["source"]["root"] == str(tmp_path / "data")


@pytest.mark.parametrize("inner", ["MNIST", "MNIST/raw"])
def test_root_may_be_the_inner_folder(tmp_path: Path, inner: str) -> None:
    writing.write_mnist(tmp_path)
    assert len(mnist(root=str(tmp_path / inner)).train["y"]) == 6
    writing.write_cifar10(tmp_path)
    assert len(cifar10(root=str(tmp_path / "cifar-10-batches-py")).train["y"]) == 10


def test_the_inner_folder_of_another_data_set_is_not_taken_for_its_own(tmp_path: Path) -> None:
    writing.write_mnist(tmp_path, "FashionMNIST")
    for inner in ("FashionMNIST", "FashionMNIST/raw"):
        refused(lambda inner=inner: mnist(root=str(tmp_path / inner)), "there is no folder")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (mnist, "MNIST/raw"),
        (fashion_mnist, "FashionMNIST/raw"),
        (emnist, "EMNIST/raw"),
        (cifar10, "cifar-10-batches-py"),
        (cifar100, "cifar-100-python"),
        (svhn, "none"),
    ],
)
def test_a_wrong_root_is_said_in_one_line(tmp_path: Path, source: Callable[..., Source], said: str) -> None:
    line = refused(lambda: source(root=str(tmp_path / "none")), "data.source.root", said, "download = true")
    assert str(tmp_path / "none") in line
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    refused(lambda: source(root=str(tmp_path / "file")), "file is no folder")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    writing.write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    line = refused(lambda: mnist(root=str(tmp_path)), "MNIST/raw lacks t10k-labels-idx1-ubyte (or .gz)")
    assert "train" not in line
    writing.write_svhn(tmp_path, splits=["train"])
    refused(lambda: svhn(root=str(tmp_path)), f"{tmp_path} lacks test_32x32.mat;")


def test_an_archive_that_lies_there_is_told_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").touch()
    refused(lambda: cifar10(root=str(tmp_path)), "cifar-10-python.tar.gz is there: unpack it")


# ------------------------------------------------------------------------------------------ damaged files


def damage_idx(path: Path, kind: str) -> None:
    whole, labels = path.read_bytes(), "labels" in path.name
    path.write_bytes(
        {
            "empty": b"",
            "garbage": b"not an idx file at all",
            "header": whole[:6],
            "cut": whole[:-1],
            "long": whole + b"\x00",
            "none": writing.idx(np.zeros(0 if labels else (0, 28, 28))),
            "fewer": writing.idx(np.zeros(5 if labels else (5, 28, 28))),
            "label": writing.idx(np.array([0, 1, 10, 0, 0, 0])),
            "shape": writing.idx(np.zeros((6, 28, 27))),
            "swapped": writing.idx(np.zeros((6, 28, 28)) if labels else np.zeros(6)),
        }[kind]
    )


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        *((name, kind, said) for name in ("images-idx3", "labels-idx1") for kind, said in [
            ("empty", "is empty"),
            ("garbage", "magic number"),
            ("header", "ends within its header"),
            ("cut", "is cut off"),
            ("long", "goes on too long"),
            ("none", "holds no"),
            ("fewer", "images"),
            ("swapped", "begins with the magic number"),
        ]),
        ("labels-idx1", "label", "has the label 10 at [2]; they are 0 to 9"),
        ("images-idx3", "shape", "holds images of 28x27; they are 28x28"),
    ],
)  # fmt: skip
def test_a_damaged_idx_file_is_refused(tmp_path: Path, name: str, kind: str, said: str) -> None:
    writing.write_mnist(tmp_path)
    path = tmp_path / f"MNIST/raw/train-{name}-ubyte"
    damage_idx(path, kind)
    before = contents(tmp_path)
    refused(lambda: mnist(root=str(tmp_path)), "data.source.root", "train-", said)
    assert contents(tmp_path) == before


def test_a_damaged_packed_file_is_refused(tmp_path: Path) -> None:
    writing.write_mnist(tmp_path, packed=True)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for bytes_ in (whole[:-9], whole[: len(whole) // 2], whole[:5], b"no gzip", whole[:40] + b"\xff" * 40 + whole[80:]):
        path.write_bytes(bytes_)
        refused(lambda: mnist(root=str(tmp_path)), f"{path} cannot be read")
    path.write_bytes(b"")
    refused(lambda: mnist(root=str(tmp_path)), f"{path} is empty")


PIXELS = np.zeros((2, 3072), dtype=np.uint8)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (b"", "is empty"),
        (b"no pickle", "is not a whole pickle"),
        (pickle.dumps({"data": PIXELS, "labels": [0, 1]})[:-200], "is not a whole pickle"),
        ([PIXELS, [0, 1]], "holds list and no dict of data and labels"),
        ({"data": PIXELS}, "has no labels; it has data"),
        ({}, "has no data and no labels; it has nothing"),
        ({"data": PIXELS, "fine_labels": [0, 1]}, "has no labels; it has data, fine_labels"),
        ({"data": PIXELS, "labels": [0, 10]}, "has the label 10 at [1]; they are 0 to 9"),
        ({"data": PIXELS, "labels": [-1, 0]}, "has the label -1 at [0]"),
        ({"data": PIXELS, "labels": [0]}, "holds 1 labels and 2 images"),
        ({"data": PIXELS, "labels": ["a", "b"]}, "has labels that are no list of whole numbers"),
        ({"data": PIXELS, "labels": [[0], [1, 2]]}, "has labels that are no list of whole numbers"),
        ({"data": PIXELS, "labels": [0.5, 1.0]}, "has labels that are no list of whole numbers"),
        ({"data": PIXELS[:, :784], "labels": [0, 1]}, "has data of uint8 [2, 784]; it is uint8 [N, 3072]"),
        ({"data": PIXELS.astype(float), "labels": [0, 1]}, "has data of float64 [2, 3072]"),
        ({"data": PIXELS.tolist(), "labels": [0, 1]}, "has data of list"),
        ({"data": PIXELS[:0], "labels": []}, "holds no images"),
    ],
)
def test_a_damaged_batch_is_refused(tmp_path: Path, entry: Any, said: str) -> None:
    writing.write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(entry if isinstance(entry, bytes) else pickle.dumps(entry))
    refused(lambda: cifar10(root=str(tmp_path)), f"{path} {said}")


class Runs:
    """A pickle that makes a file when it is read."""

    def __init__(self, fn: Any, *arguments: Any):
        self.call = fn, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    path, made = tmp_path / "batch", tmp_path / "made"
    for attack in (
        Runs(os.mkdir, str(made)),
        Runs(eval, f"__import__('os').mkdir({str(made)!r})"),
        Runs(np.save, str(made), PIXELS),
        np.array([Runs(os.mkdir, str(made))], dtype=object),
        Path("a"),
    ):
        path.write_bytes(pickle.dumps({"data": attack, "labels": [0]}, protocol))
        refused(lambda: read_batch(path, "labels", 10), f"{path} is not safe to read: it asks for ")
    assert [found.name for found in tmp_path.iterdir()] == ["batch"]


def test_an_array_of_objects_or_records_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    for array in (np.array([None, 1]), np.zeros(2, dtype=[("a", int)]), np.array(["a"]), np.array(["2020"], "M8[D]")):
        path.write_bytes(pickle.dumps({"data": array, "labels": [0]}))
        refused(lambda: read_batch(path, "labels", 10), f"{path} is not ")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, "has no y"),
        ({"a": 1}, "has no X and no y"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1], [11]]}, "has the label 11 at [1]; they are 1 to 10"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[0], [1]]}, "has the label 0 at [0]; they are 1 to 10"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1], [1.5]]}, "has the label 1.5 at [1]"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1], [2], [3]]}, "holds 3 labels and 2 images"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1, 2], [2, 3]]}, "has y of "),
        ({"X": np.zeros((2, 3, 32, 32), np.uint8), "y": [[1], [2]]}, "has X of uint8 [2, 3, 32, 32]"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": [[1], [2]]}, "has X of float64 [32, 32, 3, 2]; it is uint8"),
    ],
)
def test_a_damaged_mat_file_is_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    from scipy.io import savemat

    writing.write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    savemat(path, arrays)
    refused(lambda: svhn(root=str(tmp_path)), f"{path} {said}")


def test_a_mat_file_that_is_none_is_refused(tmp_path: Path) -> None:
    writing.write_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    whole = path.read_bytes()
    for bytes_ in (whole[: len(whole) // 2], whole[:100], b"garbage" * 100, b"x"):
        path.write_bytes(bytes_)
        refused(lambda: svhn(root=str(tmp_path)), f"{path} ")
    path.write_bytes(b"")
    refused(lambda: svhn(root=str(tmp_path)), f"{path} is empty")


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_no_flipped_bytes_make_a_reader_fail_otherwise(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    writing.write_svhn(folder, labels=(1,), splits=["whole"])
    small = {"labels": [1], "data": writing.some_images(1, 3072)}
    wholes = [
        (lambda path: read_batch(path, "labels", 10), writing.python2_pickle(**small)),
        (lambda path: read_batch(path, "labels", 10), pickle.dumps(small, 5)),
        (lambda path: read_idx(path, "labels", 1), writing.idx(np.arange(5))),
        (read_mat, (folder / "whole_32x32.mat").read_bytes()),
    ]
    read, whole = data.draw(st.sampled_from(wholes))
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, min(400, len(whole) - 1)))] = data.draw(st.integers(0, 255))
    (folder / "changed").write_bytes(changed[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(RequestError):
        read(folder / "changed")


# ------------------------------------------------------------------------------------------ downloads


def downloading(monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[..., Any]) -> list[dict[str, Any]]:
    """Torchvision's class replaced by one that writes a small data set; what it was called with."""
    calls: list[dict[str, Any]] = []

    def fetch(root: str, **arguments: Any) -> None:
        calls.append(arguments)
        print("Downloading")  # as torchvision did in some versions
        write(Path(root))

    monkeypatch.setattr(torchvision.datasets, name, fetch)
    return calls


def test_a_download_makes_the_root_and_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calls = downloading(monkeypatch, "MNIST", writing.write_mnist)
    root = tmp_path / "new" / "data"
    for _ in range(2):
        assert len(mnist(root=str(root), download=True).train["y"]) == 6
    assert calls == [{"download": True}]
    assert [path.name for path in root.iterdir()] == ["MNIST"]
    assert capsys.readouterr().out == ""


def test_a_download_asks_torchvision_for_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_emnist(root: Path) -> None:
        for split in ("train", "test"):
            writing.write_idx(root / "EMNIST/raw", f"emnist-digits-{split}", writing.some_images(1, 28, 28), [3])

    calls = downloading(monkeypatch, "EMNIST", write_emnist)
    assert emnist(root=str(tmp_path), split="digits", download=True).test["y"].tolist() == [3]
    assert calls == [{"download": True, "split": "digits"}]
    calls = downloading(monkeypatch, "SVHN", lambda root: writing.write_svhn(root, splits=("train", "test", "extra")))
    svhn(root=str(tmp_path), extra=True, download=True)
    assert [call["split"] for call in calls] == ["train", "extra", "test"]


def test_a_download_leaves_files_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloading(monkeypatch, "MNIST", writing.write_mnist)
    own = writing.some_images(6, 28, 28, seed=9)
    writing.write_idx(tmp_path / "MNIST/raw", "train", own, [5] * 6)
    assert_holds(mnist(root=str(tmp_path), download=True).train, own[:, None], [5] * 6)


def midway(root: Path, error: BaseException) -> None:
    writing.write_mnist(root)
    (root / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    raise error


@pytest.mark.parametrize(
    "error", [URLError("no network"), RuntimeError("File not\nfound or corrupted."), OSError(28, "full")]
)
def test_a_download_that_fails_midway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    downloading(monkeypatch, "MNIST", lambda root: midway(root, error))
    with pytest.raises(RunError) as caught:
        mnist(root=str(tmp_path / "new/data"), download=True)
    line = str(caught.value)
    assert "\n" not in line
    for said in (
        "data.source.download: MNIST could not be fetched from http",
        "put train-images-idx3-ubyte",
        "MNIST/raw",
    ):
        assert said in line
    assert not list(tmp_path.iterdir())


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloading(monkeypatch, "MNIST", lambda root: midway(root, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        mnist(root=str(tmp_path / "data"), download=True)
    assert not list(tmp_path.iterdir())


def test_a_download_that_lacks_a_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloading(monkeypatch, "CIFAR10", lambda root: writing.write_mnist(root))
    with pytest.raises(RunError, match="it came without data_batch_1"):
        cifar10(root=str(tmp_path), download=True)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_download_left_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = os.fork()
    if not process:  # dies while it downloads, as by kill -9
        try:
            downloading(monkeypatch, "MNIST", lambda root: (writing.write_mnist(root), os._exit(9)))
            mnist(root=str(tmp_path), download=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert [path.name for path in tmp_path.iterdir()] == [".downloading"]
    refused(lambda: mnist(root=str(tmp_path)), "data.source.root")
    downloading(monkeypatch, "MNIST", writing.write_mnist)
    mnist(root=str(tmp_path), download=True)
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


def test_an_archive_that_lies_there_goes_to_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"packed")

    def unpack(root: Path) -> None:
        assert (root / "cifar-10-python.tar.gz").read_bytes() == b"packed"
        writing.write_cifar10(root)

    downloading(monkeypatch, "CIFAR10", unpack)
    assert len(cifar10(root=str(tmp_path), download=True).train["y"]) == 10
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == b"packed"


@pytest.mark.parametrize("source", [mnist, fashion_mnist, emnist, cifar10, cifar100, svhn])
def test_torchvision_itself_is_asked_as_it_wants_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Callable[..., Source]
) -> None:
    """All but the network: the first address that torchvision's own class opens fails."""

    def unreachable(request: Any, *_: Any, **__: Any) -> None:
        raise URLError(f"unreachable {request.full_url}")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(RunError) as caught:
        source(root=str(tmp_path / "data"), download=True)
    said = re.search(r"could not be fetched from (\S+) .*?unreachable (\S+?)[>)]", str(caught.value))
    assert said is not None
    assert said[2].startswith(said[1])
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ end to end


def test_a_cohort_trains_on_pictures(tmp_path: Path) -> None:
    labels = [n % 3 for n in range(60)]
    writing.write_mnist(tmp_path, train=labels, test=labels[:12])
    experiment = fedsim.Experiment(
        rounds=2,
        data={"source": {"name": "mnist", "root": str(tmp_path)}, "clients": 4, "partition": "iid", "proxy": 0},
        model={"name": "mlp", "hidden": [8]},
        client={"epochs": 1, "lr": 0.05},
        strategy={"clients_per_round": 2},
        engine={"name": "inline"},
    )
    result = fedsim.run(experiment, out=tmp_path / "run")
    assert len(result.history) >= 2
    assert np.isfinite(result.metrics["test"]["loss"])
