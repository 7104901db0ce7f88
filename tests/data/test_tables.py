"""CSV and Parquet files become the examples that their rows are; what cannot be used is refused where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
from clients import catalog
from clients.parts import Part
from fedsim.data.source import Source
from fedsim.data.tables import csv, parquet
from fedsim.experiment import DataSettings
from tests.data.refusing import refused


def text_file(folder: Path, text: str | bytes, name: str = "own.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def from_text(folder: Path, text: str | bytes, test: str | None = None, **arguments: Any) -> Source:
    if test is not None:
        arguments["test_path"] = text_file(folder, test, "test.csv")
    return csv(path=text_file(folder, text), **arguments)


def from_columns(folder: Path, columns: Any, test: Any = None, **arguments: Any) -> Source:
    for name, given_ in (("path", columns), ("test_path", test)):
        if given_ is not None:
            arguments[name] = folder / f"{name}.parquet"
            table = given_ if isinstance(given_, pa.Table) else pa.table(given_)
            pyarrow.parquet.write_table(table, arguments[name])
    return parquet(**arguments)


def assert_holds(split: dict[str, Any], x: Any, y: Any, kind: Any = np.int64) -> None:
    assert list(split) == ["x", "y"]
    assert (split["x"].dtype, split["y"].dtype) == (np.float32, kind)
    assert split["x"].tolist() == np.asarray(x, dtype=np.float32).tolist()
    assert split["y"].tolist() == y


# ------------------------------------------------------------------------------------------ what rows become


def test_a_row_of_a_csv_file_is_an_example(tmp_path: Path) -> None:
    source = from_text(tmp_path, "a,y,b\n1,0,2.5\n-3e2,2,4\n", test="b,extra,y,a\n8,0,1,7\n")
    assert_holds(source.train, [[1, 2.5], [-300, 4]], [0, 2])
    assert_holds(source.test, [[7, 8]], [1])
    assert source.clients is source.input_range is None
    assert source.label == "y"


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffa,y\r\n1,0\r\n2,1\r\n",
        "\n a , y \n\n 1 , 0 \n\n+2,1",
        'a,y\n"1","0"\n"2","1"\n',
        '"a",y\n1.0,0\n2.0,1\n\n',
    ],
)
def test_a_csv_file_may_be_written_in_many_ways(tmp_path: Path, text: str) -> None:
    assert_holds(from_text(tmp_path, text).train, [[1], [2]], [0, 1])


def test_another_separator_is_taken(tmp_path: Path) -> None:
    for mark in (";", "\t", "|"):
        assert_holds(from_text(tmp_path, f"a{mark}y\n1{mark}0\n", separator=mark).train, [[1]], [0])
    refused(lambda: from_text(tmp_path, "a;b;y\n1;2;0\n"), "own.csv, line 1", "if ';' separates", "separator")
    for wrong in ("", ",,", '"', "\n"):
        refused(lambda wrong=wrong: from_text(tmp_path, "a,y\n1,0\n", separator=wrong), "data.source.separator")


@pytest.mark.parametrize(
    ("labels", "y", "kind"),
    [
        (["3", "0", "12"], [3, 0, 12], np.int64),
        (["0.5", "-1", "2"], [0.5, -1, 2], np.float32),
        (["dog", "cat", "dog"], [1, 0, 1], np.int64),
        (["True", "false", "TRUE"], [1, 0, 1], np.int64),
        (["é", "a b", '"x,y"'], [2, 0, 1], np.int64),
    ],
)
def test_labels_of_a_csv_file_are_classes_or_targets(
    tmp_path: Path, labels: list[str], y: list[Any], kind: Any
) -> None:
    text = "\n".join(["a,kind", *(f"1,{label}" for label in labels)])
    assert_holds(from_text(tmp_path, text, label="kind").train, [[1]] * 3, y, kind)


@pytest.mark.parametrize(
    ("labels", "y", "kind"),
    [
        (pa.array([3, 0, 12], pa.uint8()), [3, 0, 12], np.int64),
        (pa.array([0.5, -1, 2], pa.float64()), [0.5, -1, 2], np.float32),
        (["dog", "cat", "dog"], [1, 0, 1], np.int64),
        (["1", "10", "9"], [0, 1, 2], np.int64),
        ([True, False, True], [1, 0, 1], np.int64),
        (pa.array(["dog", "cat", "dog"]).dictionary_encode(), [1, 0, 1], np.int64),
        (pa.array([5, 2, 5]).dictionary_encode(), [5, 2, 5], np.int64),
    ],
)
def test_labels_of_a_parquet_file_are_classes_or_targets(tmp_path: Path, labels: Any, y: list[Any], kind: Any) -> None:
    assert_holds(from_columns(tmp_path, {"y": labels, "a": [1, 2, 3]}).train, [[1], [2], [3]], y, kind)


def test_the_test_file_has_the_coding_of_the_training_file(tmp_path: Path) -> None:
    words = "a,y\n1,no\n2,true\n3,yes\n"
    assert from_text(tmp_path, words, test="a,y\n1,yes\n2,true\n").test["y"].tolist() == [2, 1]
    assert from_text(tmp_path, words, test="a,y\n1,true\n").test["y"].tolist() == [1]
    refused(
        lambda: from_text(tmp_path, words, test="a,y\n1,yes\n2,yess\n"),
        "data.source.test_path: ",
        "test.csv, line 3, column 'y': 'yess' is no label of the training file",
        "did you mean 'yes'",
    )
    whole, real = "a,y\n1,0\n2,1\n", "a,y\n1,0.5\n2,1\n"
    assert_holds(from_text(tmp_path, real, test=whole).test, [[1], [2]], [0, 1], np.float32)
    refused(lambda: from_text(tmp_path, whole, test=real), "line 2, column 'y': 0.5 is no label", "whole numbers")
    refused(lambda: from_text(tmp_path, whole, test=words), "line 2, column 'y': 'no' is no label")
    refused(lambda: from_text(tmp_path, "a,y\n1,true\n", test=whole), "line 2, column 'y': 0 is no label")
    refused(lambda: from_text(tmp_path, words, test="a,y\n1,3\n"), "'3' is no label")
    known = {"a": [1, 2], "y": ["u", "v"]}
    assert from_columns(tmp_path, known, test={"a": [3], "y": ["v"]}).test["y"].tolist() == [1]
    refused(
        lambda: from_columns(tmp_path, known, test={"a": [3], "y": [1]}), "row 0 (from 0), column 'y': 1 is no label"
    )


def test_a_group_says_whose_each_row_is(tmp_path: Path) -> None:
    source = from_text(tmp_path, "who,a,y\nbob,1,0\nalice,2,1\nbob,3,0\n", group="who")
    assert source.clients.tolist() == [1, 0, 1]
    assert_holds(source.train, [[1], [2], [3]], [0, 1, 0])
    assert from_text(tmp_path, "who,a,y\n10,1,0\n9,2,1\n", group="who").clients.tolist() == [1, 0]  # as numbers
    assert from_text(tmp_path, "who,a,y\n10,1,0\nu9,2,1\n", group="who").clients.tolist() == [0, 1]  # as text
    source = from_columns(tmp_path, {"who": ["b", "a", "b"], "a": [1, 2, 3], "y": [0, 1, 0]}, group="who")
    assert source.clients.tolist() == [1, 0, 1]
    refused(lambda: from_text(tmp_path, "who,a,y\nbob,1,0\n,2,1\n", group="who"), "line 3, column 'who'", "missing")


def test_groups_of_numbers_too_large_for_int64_stay_apart(tmp_path: Path) -> None:
    ids = ["99999999999999999999", "99999999999999999998", "5", "99999999999999999999"]
    source = from_text(tmp_path, "a,who,y\n" + "".join(f"1,{one},0\n" for one in ids), group="who")
    assert source.clients.tolist() == [2, 1, 0, 2]


def test_features_are_taken_in_the_order_given(tmp_path: Path) -> None:
    text = "a,b,c,y\n1,2,3,0\n"
    assert_holds(from_text(tmp_path, text, features=["c", "a"]).train, [[3, 1]], [0])
    refused(lambda: from_text(tmp_path, text, features=["a", "bb"]), "data.source.features[1]", "did you mean 'b'")
    refused(lambda: from_text(tmp_path, text, features=["a", "a"]), "features[1]: 'a' is named twice")
    refused(lambda: from_text(tmp_path, text, features=["y"]), "features[0]: 'y' is the label")
    refused(lambda: from_text(tmp_path, text, features=[]), "features: no column")


def test_true_and_false_are_1_and_0(tmp_path: Path) -> None:
    assert_holds(from_text(tmp_path, "a,y\nTrue,0\nFalse,1\n").train, [[1], [0]], [0, 1])
    assert_holds(from_columns(tmp_path, {"a": [True, False], "y": [0, 1]}).train, [[1], [0]], [0, 1])


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.int16()), pa.list_(pa.float32(), 3)])
def test_a_column_of_lists_is_the_whole_of_x(tmp_path: Path, kind: pa.DataType) -> None:
    lists = pa.array([[1, 2, 3], [4, 5, 6]], kind)
    source = from_columns(tmp_path, {"v": lists, "y": [0, 1]}, test={"v": lists[1:], "y": [1]})
    assert_holds(source.train, [[1, 2, 3], [4, 5, 6]], [0, 1])
    assert_holds(source.test, [[4, 5, 6]], [1])


def test_the_index_of_pandas_is_no_feature(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1.5, 2.5], "y": pd.Categorical(["v", "u"])}, index=pd.Index([7, 8], name="id"))
    frame.to_parquet(tmp_path / "a.parquet")
    assert_holds(parquet(path=tmp_path / "a.parquet").train, [[1.5], [2.5]], [1, 0])
    assert parquet(path=tmp_path / "a.parquet", group="id").clients.tolist() == [0, 1]
    frame.reset_index(drop=True).to_csv(tmp_path / "a.csv")
    refused(lambda: csv(path=tmp_path / "a.csv"), "a column has no name (pandas' index?)")
    assert_holds(csv(path=tmp_path / "a.csv", features=["a"]).train, [[1.5], [2.5]], [1, 0])


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(numbers, numbers, st.integers(0, 9)), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_what_pandas_writes_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    folder = tmp_path_factory.getbasetemp()
    frame = pd.DataFrame(rows, columns=["a", "b", "y"]).astype({"a": np.float32, "b": np.float32})
    frame.to_csv(folder / "back.csv", index=False)
    frame.to_parquet(folder / "back.parquet")
    for source in (csv(path=folder / "back.csv"), parquet(path=folder / "back.parquet")):
        assert_holds(source.train, frame[["a", "b"]].to_numpy(), frame["y"].tolist())


def test_a_file_of_many_blocks_is_read_whole(tmp_path: Path) -> None:
    count = 200_000  # a text in the last block, where pyarrow alone would have taken the column for whole numbers
    frame = pd.DataFrame({"a": np.arange(count) * 1.0, "who": np.arange(count) % 7, "y": np.arange(count) % 3})
    frame.loc[count - 1, "a"] = 0.25
    frame.astype({"who": object}).assign(who=lambda f: f["who"].where(f.index < count - 1, "z")).to_csv(
        tmp_path / "many.csv", index=False
    )
    source = csv(path=tmp_path / "many.csv", group="who")
    assert np.array_equal(source.train["x"][:, 0], frame["a"].to_numpy(np.float32))
    assert source.clients[-1] == 7
    assert len(np.unique(source.clients)) == 8


def test_paths_are_relative_to_the_experiment(tmp_path: Path) -> None:
    text_file(tmp_path, "a,y\n1,0\n")
    chosen = DataSettings(source=Part("csv", {"path": "own.csv", "test_path": "own.csv", "features": ["a"]}))
    source = catalog.build(chosen.source, "sources", tmp_path, key="data.source")
    assert len(source.test["y"]) == 1
    wrong = catalog.check(Part("csv", {"path": "none.csv", "features": "a"}), "sources", tmp_path, key="data.source")
    assert [line.split(":")[0] for line in wrong] == ["data.source.path", "data.source.features"]


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "own.csv is empty"),
        ("\n\n", "own.csv is empty"),
        ("a,y\n", "own.csv has a header and no row"),
        ("a,y", "own.csv has a header and no row"),
        ("a,b,y\n1,2,0\n1,2\n", "own.csv, line 3: too few values, 2 where the header names 3"),
        ("a,b,y\n1,2,0,9\n1,2,0\n", "own.csv, line 2: too many values, 4 where the header names 3"),
        ("a,b,y\n1,2,0\n\n1,2,0,\n", "own.csv, line 4: too many values, 4"),
        ("a,y\n1,0\n,1\n", "own.csv, line 3, column 'a': a value is missing"),
        ("a,y\n1,0\nNaN,1\n", "own.csv, line 3, column 'a': a value is missing (nan)"),
        ("a,y\n1,0\n\nNA,1\n", "own.csv, line 4, column 'a': a value is missing (NA)"),
        ("a,y\n1,0\n2,\n", "own.csv, line 3, column 'y': a value is missing"),
        ("a,y\n1,u\n2,nan\n", "own.csv, line 3, column 'y': a value is missing (nan)"),
        ("a,y\n1,0\n-inf,1\n", "own.csv, line 3, column 'a': -inf; every number must be finite"),
        ("a,y\n1,0\n1e39,1\n", "own.csv, line 3, column 'a': 1e+39 is too large for float32"),
        ("a,y\n1,0.5\n2,inf\n", "own.csv, line 3, column 'y': inf; every number must be finite"),
        ("a,y\n1,0\n1O,1\n", "own.csv, line 3, column 'a': '1O' is text in a column of numbers"),
        ("a,y\n1_0,0\n", "own.csv, line 2, column 'a': '1_0' is text"),
        ('a,b,y\n"1\n",2,0\n"1",x,1\n', "own.csv, line 4, column 'b': 'x' is text"),
        ("a,y\n1,0\n2,-1\n", "own.csv, line 3, column 'y': the class -1; classes count from 0"),
        ("a,y\n1,0\n2,one\n", "own.csv, line 3, column 'y': 'one' is text, and line 2 has the number '0'"),
        ("a,Y\n1,0\n", "own.csv has no column 'y'; it has 'a', 'Y'; did you mean 'Y'"),
        ("a,b,a,y\n1,2,3,0\n", "own.csv, line 1: two columns are named 'a'"),
        ("a,y\n1,0\n\xff,1\n".encode("latin1"), "own.csv, line 3: is not UTF-8 text (invalid start byte, byte 0xff)"),
        ("\xe4,y\n1,0\n".encode("latin1"), "own.csv, line 1: is not UTF-8 text"),
        ("a,y\n1,0\n".encode("utf-16"), "own.csv, line 1: is not UTF-8 text"),
        ("y\n1\n", "own.csv: no column is left for x beside 'y'"),
        ('a,y\n"1,0\n2,1\n', "own.csv, line 2: a quote opens here that is never closed"),
        ('a,b,y\n1,2,0\n3,4,"1\n5,6,1\n', "own.csv, line 3: a quote opens here that is never closed"),
        ('a,y\n"1",0\n2,"1\n2,0', "own.csv, line 3: a quote opens here"),
        ('a,"y\n1,0\n', "own.csv, line 1: a quote opens here"),
        ("a,y\n1,0\n" + '2,"1\n' + "1,0\n" * 40_000, "own.csv, line 3: a quote opens here"),
        ("a,y\n1,0\n2,9223372036854775808\n", "own.csv, line 3, column 'y': 9223372036854775808 is too large"),
    ],
)  # fmt: skip
def test_a_csv_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    refused(lambda: from_text(tmp_path, text), said)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"a": pa.array([], pa.int64()), "y": pa.array([], pa.int64())}, "has no row"),
        ({"a": [1, None], "y": [0, 1]}, "row 1 (from 0), column 'a': a value is missing"),
        ({"a": [1, 2], "y": [0, None]}, "row 1 (from 0), column 'y': a value is missing"),
        ({"a": [1, 2], "y": ["u", None]}, "row 1 (from 0), column 'y': a value is missing"),
        ({"a": pa.nulls(2), "y": [0, 1]}, "row 0 (from 0), column 'a': a value is missing"),
        ({"a": [1.0, float("nan")], "y": [0, 1]}, "row 1 (from 0), column 'a': a value is missing (nan)"),
        ({"a": [1.0, float("inf")], "y": [0, 1]}, "row 1 (from 0), column 'a': inf; every number must be finite"),
        ({"a": [1.0, 1e39], "y": [0, 1]}, "row 1 (from 0), column 'a': 1e+39 is too large"),
        ({"a": ["1", "2"], "y": [0, 1]}, "row 0 (from 0), column 'a': holds '1', of type string; give numbers"),
        ({"a": pa.array([1, 2], pa.date32()), "y": [0, 1]}, "column 'a': holds datetime.date"),
        ({"a": [1, 2], "y": pa.array([1, 2], pa.date32())}, "column 'y': holds datetime.date"),
        ({"a": [1, 2], "y": [[1], [2]]}, "column 'y': holds [1]"),
        ({"a": [1, 2], "y": [0, -1]}, "row 1 (from 0), column 'y': the class -1"),
        ({"a": [1, 2], "lable": [0, 1]}, "has no column 'y'; it has 'a', 'lable'"),
        ({"y": [0, 1]}, "no column is left for x"),
        ({"v": [[1, 2], [3, 4], [5]], "y": [0, 1, 0]}, "row 2 (from 0), column 'v': a list of 1 where"),
        ({"v": [[1, 2], None], "y": [0, 1]}, "row 1 (from 0), column 'v': a value is missing"),
        ({"v": [[1, 2], [3, None]], "y": [0, 1]}, "row 1 (from 0), column 'v': a value is missing"),
        ({"v": [[1.0, 2], [3, float("inf")]], "y": [0, 1]}, "row 1 (from 0), column 'v': inf"),
        ({"v": [["u"], ["v"]], "y": [0, 1]}, "column 'v': holds lists of string"),
        ({"v": [[[1]], [[2]]], "y": [0, 1]}, "column 'v': holds lists of list"),
        ({"v": pa.array([[], []], pa.list_(pa.int64())), "y": [0, 1]}, "column 'v': the lists are empty"),
        ({"v": [[1], [2]], "a": [1, 2], "y": [0, 1]}, "column 'v': holds lists, and so must be the only feature"),
        (pa.table([[1], [2], [0]], names=["a", "a", "y"]), "two columns are named 'a'"),
    ],
)  # fmt: skip
def test_a_parquet_file_that_cannot_be_used_is_refused(tmp_path: Path, columns: Any, said: str) -> None:
    refused(lambda: from_columns(tmp_path, columns), "path.parquet", said)


def test_lists_of_another_length_to_test_are_refused(tmp_path: Path) -> None:
    train, test = {"v": [[1, 2]], "y": [0]}, {"v": [[1, 2, 3]], "y": [0]}
    refused(
        lambda: from_columns(tmp_path, train, test=test),
        "data.source.test_path",
        "column 'v': lists of 3 values",
        "has 2",
    )


def test_a_test_file_that_cannot_be_used_is_refused_by_its_own_name(tmp_path: Path) -> None:
    good = "a,b,y\n1,2,0\n"
    refused(lambda: from_text(tmp_path, good, test="a,y\n1,0\n"), "data.source.test_path", "test.csv has no column 'b'")
    refused(lambda: from_text(tmp_path, good, test="a,b\n1,0\n"), "data.source.test_path", "test.csv has no column 'y'")
    refused(
        lambda: from_text(tmp_path, good, test="a,b,y\n1,x,0\n"),
        "data.source.test_path",
        "test.csv, line 2, column 'b'",
    )
    refused(lambda: from_text(tmp_path, good, test=""), "data.source.test_path", "test.csv is empty")


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    from_columns(tmp_path, {"a": [1] * 100, "y": [0] * 100})
    path = tmp_path / "path.parquet"
    whole = path.read_bytes()
    for bytes_ in (b"a,y\n1,0\n" * 9, whole[: len(whole) // 2], whole[10:], b"PAR1"):
        path.write_bytes(bytes_)
        refused(lambda: parquet(path=path), f"data.source.path: {path} is not a Parquet file")
    path.write_bytes(b"")
    refused(lambda: parquet(path=path), f"{path} is empty")
    refused(lambda: parquet(path=tmp_path), f"{tmp_path} is a folder")
    refused(lambda: csv(path=tmp_path), f"{tmp_path} cannot be read")
    refused(lambda: csv(path=tmp_path / "none.csv"), "none.csv cannot be read: No such file")


def test_a_missing_label_is_told_before_anything_else_of_the_columns(tmp_path: Path) -> None:
    refused(lambda: from_text(tmp_path, "a,b,target\nx,1,0\n", label="targets"), "did you mean 'target'")
    refused(lambda: from_text(tmp_path, "a,b,y\n1,1,0\n", group="c"), "data.source.group", "has no column 'c'")
    refused(lambda: from_text(tmp_path, "a,b,y\n1,1,0\n", group="y"), "data.source.group: 'y' is the label")


# ------------------------------------------------------------------------------------------ end to end


def test_each_group_of_a_csv_file_is_a_client_that_trains(tmp_path: Path) -> None:
    rows = [f"hospital {n % 3},{n % 7},{n % 2},{'ill' if n % 2 else 'well'}" for n in range(60)]
    path = text_file(tmp_path, "\n".join(["who,a,b,y", *rows]))
    experiment = fedsim.Experiment(
        rounds=2,
        data={
            "source": {"name": "csv", "path": str(path), "group": "who"},
            "clients": 3,
            "partition": "natural",
            "proxy": 0,
        },
        model={"name": "logistic"},
        client={"epochs": 3},
        strategy={"clients_per_round": 3},
        engine={"name": "inline"},
    )  # fmt: skip
    result = fedsim.run(experiment, out=tmp_path / "run")
    assert result.metrics["test"]["accuracy"] > 0.9
