"""Columns give examples by position whatever they are made of, and a source says what is wrong with it."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from clients.errors import RequestError
from fedsim.assembly import assemble
from fedsim.data import DatasetColumns, Source, TensorColumns
from fedsim.experiment import Experiment


class Rows(torch.utils.data.Dataset):
    """A data set of dicts: an image as an array, a mask as a tensor, a label as a number."""

    def __init__(self, size: int = 6):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert 0 <= index < self.size
        image = np.full((2, 3), index, dtype=np.float32)
        return {"x": image, "mask": torch.full((4,), index), "y": index % 3}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "x": torch.arange(6.0)[:, None, None].expand(6, 2, 3),
        "mask": torch.arange(6)[:, None].expand(6, 4),
        "y": torch.arange(6) % 3,
    }


@pytest.fixture(params=["tensors", "dataset"])
def columns(request: pytest.FixtureRequest) -> Any:
    return TensorColumns(tensors()) if request.param == "tensors" else DatasetColumns(Rows())


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (2, 1, 3), (0,), (2, 0)])
def test_take_gives_the_index_its_shape(columns: Any, shape: tuple[int, ...]) -> None:
    index = torch.arange(shape.numel() if isinstance(shape, torch.Size) else int(np.prod(shape))).reshape(shape)
    batch = columns.take(index)
    assert list(batch) == ["x", "mask", "y"]
    for name, whole in tensors().items():
        assert torch.equal(batch[name], whole[index])
        assert batch[name].dtype == whole.dtype


def test_columns_know_their_size_names_and_shapes(columns: Any) -> None:
    assert len(columns) == 6
    assert columns.names == ("x", "mask", "y")
    assert columns.shape("x") == (2, 3)
    assert columns.shape("y") == ()
    assert torch.equal(columns.column("y"), torch.tensor([0, 1, 2, 0, 1, 2]))


def test_subsets_and_hidden_columns_compose(columns: Any) -> None:
    some = columns.subset(torch.tensor([5, 1, 3])).subset(torch.tensor([2, 0])).without("y")
    assert len(some) == 2
    assert some.names == ("x", "mask")
    assert some.take(torch.tensor([0, 1]))["mask"][:, 0].tolist() == [3, 5]


def test_columns_are_picklable(columns: Any) -> None:
    again = pickle.loads(pickle.dumps(columns.subset(torch.tensor([4, 2]))))
    assert torch.equal(again.column("y"), torch.tensor([1, 2]))


def test_arrays_are_shared_and_not_copied(tmp_path: Any) -> None:
    x = np.zeros((5, 2), dtype=np.float32)
    held = Source(train={"x": x}).columns("train")
    x[3, 1] = 7
    assert held is not None
    assert held.column("x")[3, 1] == 7

    np.save(tmp_path / "x.npy", x)
    mapped = Source(train={"x": np.load(tmp_path / "x.npy", mmap_mode="r")}).columns("train")
    assert mapped is not None
    assert mapped.column("x")[3, 1] == 7


class Broken(Rows):
    """A data set whose example 2 is as given."""

    def __init__(self, third: Any):
        super().__init__()
        self.third = third

    def __getitem__(self, index: int) -> Any:
        return self.third if index == 2 else {"x": torch.zeros(3), "y": 0}


@pytest.mark.parametrize(
    ("third", "said"),
    [
        ((torch.zeros(3), 0), r"one dict an example.*got tuple at 2"),
        ({"x": torch.zeros(4), "y": 0}, r"data\.source\.x: examples differ in shape \(\(3,\), \(4,\)\)"),
        ({"x": torch.zeros(3)}, r"data\.source\.y: some examples have this column"),
        ({"x": "a word", "y": 0}, r"data\.source\.x: str at 2 is no tensor"),
    ],
)
def test_a_data_set_of_other_things_is_refused(third: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        DatasetColumns(Broken(third)).take(torch.arange(4))


x, y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train": {}}, r"data\.source\.train: no column"),
        ({"train": {"x": x, "y": y[:3]}}, r"data\.source\.train: columns differ in length \(x 4, y 3\)"),
        ({"train": {"x": x[:0], "y": y[:0]}}, r"data\.source\.train: no example"),
        ({"train": {"x": [1, 2]}}, r"data\.source\.train\.x: list given; give a tensor or an array"),
        ({"train": {"x": np.array([[1], [2, 3]], dtype=object)}}, r"data\.source\.train\.x: .*ragged"),
        ({"train": {"x": np.array(["a", "b"])}}, r"data\.source\.train\.x: no tensor has dtype"),
        ({"train": {"x": torch.tensor(1.0)}}, r"data\.source\.train\.x: a single number"),
        ({"train": 3}, r"data\.source\.train: int given"),
        ({"train": torch.utils.data.TensorDataset(x, y)}, r"one dict an example.*got tuple at 0"),
        ({"train": {"x": x, "y": y}, "test": {"x": x, "Y": y}}, r"data\.source\.test: column 'y'.*did you mean 'Y'"),
        ({"train": {"x": x}, "clients": [0, 1]}, r"data\.source\.clients: int64 \[2\] given.*4 training examples"),
        ({"train": {"x": x}, "clients": np.zeros(4)}, r"data\.source\.clients: float64"),
        ({"train": {"x": x}, "input_range": (1, 0)}, r"data\.source\.input_range"),
        ({"train": {"x": x}, "classes": 0}, r"data\.source\.classes: 0 given"),
        ({"train": {"x": x}, "classes": True}, r"data\.source\.classes: True given"),
        ({"train": {"x": x * 1j, "y": y}}, r"data\.source\.train\.x: complex numbers given"),
        ({"train": {"x": x[:, :0], "y": y}}, r"data\.source\.train\.x: examples of shape \[0\] hold no number"),
        (
            {"train": {"x": x, "y": y}, "test": {"x": x[:, :1], "y": y}},
            r"data\.source\.test\.x: \[1\] an example, and train has \[2\]",
        ),
        (
            {"train": {"x": x, "y": y}, "proxy": {"x": torch.zeros(4, 3)}},
            r"data\.source\.proxy\.x: \[3\] an example, and train has \[2\]",
        ),
        (
            {"train": {"x": x, "y": y}, "test": {"x": x, "y": y.float()}},
            r"data\.source\.test\.y: float32 given, and train has int64; give labels that are classes",
        ),
        (
            {"train": {"x": x, "y": np.array([0, 1, 2, 2**63], np.uint64)}},
            r"data\.source\.train\.y: 9223372036854775808 at \[3\]; too large for int64",
        ),
        ({"train": None}, r"data\.source\.train: None given"),
        ({"train": {"x": torch.tensor(1)}}, r"data\.source\.train\.x: a single number"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        Source(**given)
    assert "\n" not in str(caught.value)


def test_a_proxy_needs_no_labels() -> None:
    assert Source(train={"x": x, "y": y}, proxy={"x": x}).columns("proxy") is not None


@pytest.mark.parametrize(
    ("given", "changes", "said"),
    [
        (
            {"train": {"x": torch.rand(40, 2), "y": torch.rand(40)}},
            {},
            "model: logistic needs classes, and column 'y' of this source holds real numbers; give a model of your own",
        ),
        (
            {"train": {"x": torch.rand(40, 2)}},
            {"task": "regression"},
            "model: logistic needs classes, and this source has no column 'y'",
        ),
        (
            {"train": {"x": torch.rand(40, 2), "z": torch.arange(40) % 3}, "label": "z"},
            {},
            "asks for a column 'y', and a batch has x float32 [2, 2], z int64 [2]; name the source's columns so",
        ),
    ],
)
def test_labels_that_model_or_task_cannot_take_are_told_before_training(
    given: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    data = {"source": Source(**given), "clients": 4, "proxy": 0, "partition": "iid"}
    with pytest.raises(RequestError) as caught:
        assemble(Experiment(data=data, model="logistic", **changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_numbers_beyond_float32_train_in_float64_alone(precision: str) -> None:
    large = torch.rand(40, 2, dtype=torch.float64) * 1e60
    data = {"source": Source(train={"x": large, "y": torch.arange(40) % 3}), "clients": 4, "proxy": 0}
    experiment = Experiment(data=data, model="logistic", client={"precision": precision})
    if precision == "float64":
        assert assemble(experiment).setup.population.columns.column("x").dtype == torch.float64
    else:
        with pytest.raises(RequestError, match=r"train\.x: .* too large for float32; scale it, or set client"):
            assemble(experiment)
