"""Where runs go, which one a resume finds, and that asking costs no heavy import."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clients.errors import RequestError, RunError
from fedsim.runs import first_free, holds_run, latest, read_experiment
from fedsim.runs.directory import check_name
from tests.runs.making import EXPERIMENT, create


def test_the_first_free_name(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    assert [first_free(root, "digits").name for _ in range(3)] == ["digits", "digits-2", "digits-3"]
    (root / "digits-2").rmdir()
    assert first_free(root, "digits").name == "digits-2"


def test_no_two_get_the_same_name(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: first_free(tmp_path, "digits"), range(40)))
    assert len(set(made)) == 40


def test_a_root_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RequestError, match="is not a directory"):
        first_free(tmp_path / "runs", "digits")


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "/etc", "a\\b", "-x", ".hidden", "~", " a", "a\n", "x" * 201, "a:b", "\x00"]
)
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="cannot name a directory"):
        first_free(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["digits", "my run 2", "Größe", "a.b_c-d"])
def test_a_plain_name_is_taken(name: str) -> None:
    check_name(name)


def test_the_latest_is_the_run_of_that_name_written_to_last(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere", "digits") is None
    for place in ("digits", "digits-2", "digits-3", "digits-old", "other"):
        with create(tmp_path / place, rounds=1):
            pass
    other = (tmp_path / "digits-3" / "experiment.toml").read_text().replace("digits", "digits-3")
    (tmp_path / "digits-3" / "experiment.toml").write_text(other)
    (tmp_path / "digits-4").mkdir()
    for age, place in enumerate(["digits-3", "digits-old", "digits", "digits-2"]):
        for file in (tmp_path / place).rglob("*"):
            os.utime(file, (1e9 - age, 1e9 - age))
    assert latest(tmp_path, "digits") == tmp_path / "digits"
    assert latest(tmp_path, "digits-3") == tmp_path / "digits-3"


def test_a_damaged_run_is_still_a_run(tmp_path: Path) -> None:
    assert not holds_run(tmp_path / "nowhere")
    assert not holds_run(tmp_path)
    with create(tmp_path / "run", rounds=1):
        pass
    assert holds_run(tmp_path / "run")
    (tmp_path / "run" / "run.db").unlink()
    assert holds_run(tmp_path / "run")


def test_the_experiment_is_read_from_either_copy(tmp_path: Path) -> None:
    with create(tmp_path / "run"):
        pass
    assert read_experiment(tmp_path / "run")["data"] == {"clients": 20}
    file = tmp_path / "run" / "experiment.toml"
    file.unlink()
    assert read_experiment(tmp_path / "run")["name"] == "digits"
    file.write_text("name = ")
    with pytest.raises(RunError, match=r"experiment\.toml is damaged"):
        read_experiment(tmp_path / "run")
    file.write_text(EXPERIMENT)
    with pytest.raises(RequestError, match="holds no run"):
        read_experiment(tmp_path)


def test_asking_imports_nothing_heavy(tmp_path: Path) -> None:
    with create(tmp_path / "run", rounds=1):
        pass
    code = f"""
import sys
from pathlib import Path
from fedsim.records import RoundRecord
from fedsim.runs.directory import first_free, holds_run
from fedsim.runs.resolved import read_experiment
from fedsim.runs import read_experiment
from fedsim.report import write_report
read_experiment(Path({str(tmp_path / "run")!r}))
write_report({str(tmp_path / "run")!r})
print([name for name in ("torch", "numpy", "pandas", "plotly", "flwr", "sklearn") if name in sys.modules])
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"
