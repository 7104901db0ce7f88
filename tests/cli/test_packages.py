"""``fedsim.strategies`` is the package ``strategies`` itself, and local folders that hide it are named."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[2]


def test_the_floors_are_the_same_modules() -> None:
    import clients
    import fedsim
    import strategies

    assert fedsim.strategies is strategies
    assert fedsim.clients is clients
    for name in ("strategies", "strategies.server_optimizers", "clients.weights", "clients.catalog"):
        module = importlib.import_module(name)
        assert importlib.import_module(f"fedsim.{name}") is module
        assert module.__spec__ is not None
        assert module.__spec__.name == module.__name__ == name
    from fedsim.strategies import FedAvg

    assert FedAvg is strategies.FedAvg
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fedsim.strategies.no_such_module")


@pytest.mark.parametrize("floor", ["strategies", "clients"])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_local_folder_that_hides_a_floor_is_named(floor: str, as_file: bool, tmp_path: Path) -> None:
    hiding = tmp_path / (f"{floor}.py" if as_file else floor)
    if as_file:
        hiding.write_text("")
    else:
        hiding.mkdir()
        (hiding / "__init__.py").write_text("")
    ended = subprocess.run(
        [sys.executable, "-c", "import fedsim"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(HOME)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1
    assert said.startswith(f"ImportError: the {'file' if as_file else 'folder'} {hiding} hides fedsim's own package")
    assert "rename it" in said


def test_importing_is_lazy_and_complete() -> None:
    code = (
        "import sys, fedsim, strategies, clients; light = 'torch' not in sys.modules;"
        "[getattr(floor, name) for floor in (fedsim, strategies, clients) for name in floor.__all__]; print(light)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout.strip() == "True"
