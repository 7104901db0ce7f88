"""Hugging Face data sets: what can be a tensor becomes one, and the input and the label are found or asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients import catalog
from clients.errors import RequestError
from clients.parts import Part
from fedsim.data import Source, TensorColumns, build, huggingface
from fedsim.experiment import DataSettings, Experiment

datasets = pytest.importorskip("datasets")
image = pytest.importorskip("PIL.Image")

pixels = np.random.default_rng(0).integers(0, 256, (12, 5, 4, 3), dtype=np.uint8)


def pictures(mode: str = "RGB", rows: int = 12, sizes: tuple[int, ...] = (5,)) -> Any:
    """Pictures 4 wide, with a class and a caption."""
    made = [image.fromarray(pixels[i, : sizes[i % len(sizes)]]).convert(mode) for i in range(rows)]
    return datasets.Dataset.from_dict(
        {
            "image": made,
            "caption": [f"number {i}" for i in range(rows)],
            "kind": [i % 3 for i in range(rows)],
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "caption": datasets.Value("string"),
                "kind": datasets.ClassLabel(names=["a", "b", "c"]),
            }
        ),
    )


def table(**columns: Any) -> Any:
    return datasets.Dataset.from_dict({"x": [[0.5, 1.0], [2.0, 3.0]], "y": [1, 0], **columns})


def test_pictures_become_bytes_and_captions_are_left_out() -> None:
    columns = Source(train=pictures(), label="kind").columns("train")
    assert isinstance(columns, TensorColumns)
    assert columns.names == ("image", "kind")
    assert columns.tensors["image"].dtype == torch.uint8
    assert np.array_equal(columns.tensors["image"].numpy(), pixels.transpose(0, 3, 1, 2))
    assert columns.tensors["kind"].tolist() == [i % 3 for i in range(12)]


def test_grey_pictures_have_one_channel_and_palettes_are_colours() -> None:
    grey = Source(train=pictures("L"), label="kind").columns("train")
    palette = Source(train=pictures("P"), label="kind").columns("train")
    assert grey is not None
    assert palette is not None
    assert grey.shape("image") == (1, 5, 4)
    assert palette.shape("image") == (3, 5, 4)
    expected = np.asarray(image.fromarray(pixels[3]).convert("L"))
    taken = grey.take(torch.tensor(3))["image"][0].numpy()
    assert np.array_equal(taken, expected.astype(np.float32) / np.float32(255))


def test_numbers_and_arrays_of_one_shape_become_tensors() -> None:
    given = table(
        matrix=[[[1, 2], [3, 4]], [[5, 6], [7, 8]]],
        flag=[True, False],
        ragged=[[1], [2, 3]],
        words=[["a"], ["b"]],
    )
    columns = Source(train=given).columns("train")
    assert columns is not None
    taken = columns.take(torch.tensor([1]))
    assert {name: (value.dtype, value.tolist()) for name, value in taken.items()} == {
        "x": (torch.float32, [[2.0, 3.0]]),
        "y": (torch.int64, [0]),
        "matrix": (torch.int64, [[[5, 6], [7, 8]]]),
        "flag": (torch.bool, [False]),
    }


def test_rows_that_were_selected_or_shuffled_are_those_that_are_taken() -> None:
    given = datasets.Dataset.from_dict({"x": list(range(10)), "y": [0] * 10}).select([7, 2, 5])
    columns = Source(train=given).columns("train")
    assert columns is not None
    assert columns.column("x").tolist() == [7, 2, 5]


def test_a_dict_of_splits_is_a_source_with_x_and_y() -> None:
    given = datasets.DatasetDict({"train": pictures(), "test": pictures(rows=4), "valid": pictures(rows=2)})
    source = Source.of(given)
    assert isinstance(source, Source)
    assert source.input_range == (0, 1)
    for split, rows in (("train", 12), ("test", 4), ("validation", 2)):
        columns = source.columns(split)
        assert columns is not None
        assert (len(columns), columns.names) == (rows, ("x", "y"))
        assert columns.take(torch.tensor([1]))["x"][0] == pytest.approx(pixels[1].transpose(2, 0, 1) / np.float32(255))
    population = build(source, DataSettings(partition=Part("dirichlet"), clients=3, proxy=2), 0)
    assert (population.classes, population.input_shape) == (3, (3, 5, 4))
    assert Source.of(source) is source
    assert Source.of(3) == 3


def test_an_experiment_takes_a_dict_of_splits_as_its_source_and_keeps_it() -> None:
    given = datasets.DatasetDict({"train": table(), "test": table()})
    for said in (given, {"name": given}):
        made = Experiment(data={"source": said, "clients": 2})
        assert made.data.source.thing is given
        assert made.override(["rounds=3"]).data.source.thing is given
        assert made.resolved()["data"]["source"] == "datasets.dataset_dict:DatasetDict(...)"


def test_true_and_false_are_two_classes() -> None:
    given = datasets.Dataset.from_dict({"x": [[0.5]] * 6, "y": [True, False] * 3})
    population = build(Source(train=given), DataSettings(clients=2, proxy=0), 0)
    assert population.classes == 2


@pytest.mark.parametrize("kind", ["a data set", "splits"])
def test_what_was_saved_to_disk_is_a_source(tmp_path: Path, kind: str) -> None:
    given = (
        pictures() if kind == "a data set" else datasets.DatasetDict({"train": pictures(), "test": pictures(rows=3)})
    )
    given.save_to_disk(str(tmp_path / "saved"))
    part = Part("huggingface", {"path": "saved", "label": "kind"})
    source = catalog.build(part, "sources", tmp_path, key="data.source")
    columns = source.columns("train")
    assert (len(columns), columns.names, columns.shape("x")) == (12, ("x", "y"), (3, 5, 4))
    assert (source.columns("test") is None) == (kind == "a data set")


def test_columns_are_found_by_name() -> None:
    given = table(speaker=[4, 5]).rename_columns({"x": "sound", "y": "label"})
    columns = Source.of(given).columns("train")
    assert columns.names == ("x", "y", "speaker")
    assert columns.tensors["y"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            lambda: pictures(sizes=(5, 3)),
            r"train: column 'image' has images of different shapes, \[3, 5, 4\] at 0 and \[3",
        ),
        (lambda: pictures("I"), r"train: column 'image' has an image of mode I at 0, which is not of bytes"),
        (lambda: pictures("1").select([]), r"train: no example"),
        (lambda: datasets.DatasetDict({"tarin": pictures()}), r"source: no split 'train'; it has tarin"),
        (lambda: table(x=["a", "b"]), r"train: column 'x' holds strings"),
        (lambda: table(x=[[1], [2, 3]]), r"train: column 'x' holds examples of different shapes"),
        (
            lambda: table().rename_column("y", "z").rename_column("x", "w"),
            r"source\.label: which column is it\? .* w, z",
        ),
        (lambda: table(v=[[1], [2]]).rename_column("x", "w"), r"source\.x: which column is it\? Name one of w, v"),
        (
            lambda: datasets.Dataset.from_dict({"x": ["a"], "y": ["b"]}),
            r"train: no column .* x holds strings.*; y holds",
        ),
    ],
)
def test_what_is_no_source_is_refused_by_the_column(given: Any, said: str) -> None:
    with pytest.raises(RequestError, match=rf"data\.{'source' if said.startswith('train') else ''}\.?{said}") as caught:
        Source.of(given())
    assert "\n" not in str(caught.value)


def test_a_needed_column_that_was_left_out_is_named() -> None:
    given = datasets.Dataset.from_dict({"x": [1.0, 2.0], "y": ["cat", "dog"]})
    with pytest.raises(RequestError, match=r"data\.source\.train: column 'y' holds strings, which are no numbers"):
        Source(train=given)


def test_settings_and_folders_that_are_wrong_are_refused(tmp_path: Path) -> None:
    pictures().save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(RequestError, match=r"data\.source\.x: no column 'imgae'; .*did you mean 'image'"):
        huggingface(tmp_path / "saved", x="imgae")
    with pytest.raises(RequestError, match=r"data\.source\.label: no column 'y'"):
        huggingface(tmp_path / "saved", label="y")
    with pytest.raises(RequestError, match=r"data\.source\.path: .* is no data set that save_to_disk wrote"):
        huggingface(tmp_path)


def test_datasets_is_not_imported_where_nobody_uses_it() -> None:
    code = "import sys, torch, fedsim; fedsim.Source(train={'x': torch.zeros(2, 2)}); print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
