"""What the tests of Flower apps share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

APPS = Path(__file__).parent / "apps"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and no configuration of Flower's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr-home"))
    monkeypatch.delenv("FEDSIM_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def app(folder: Path) -> Callable[..., Path]:
    """Copies an app of ``tests/flower/apps`` here, texts of its pyproject.toml replaced."""

    def copied(name: str = "quickstart-numpy", *replaced: tuple[str, str]) -> Path:
        there = folder / name
        shutil.copytree(APPS / name, there, ignore=shutil.ignore_patterns("__pycache__"))
        text = (there / "pyproject.toml").read_text()
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        (there / "pyproject.toml").write_text(text)
        return there

    return copied
