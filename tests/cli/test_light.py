"""Help and refusals take under a second: torch, flwr, ray and scikit-learn wait until they are needed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "flwr", "ray", "sklearn", "pandas", "plotly", "pyarrow", "torchvision")
CODE = """
import sys
from fedsim.cli import main
code = main(sys.argv[1:])
print("heavy:", [name for name in {heavy} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["list"], 0),
        (["new"], 0),
        (["run", "--set", "client.lr=abc"], 2),
        (["run", "--set", "strategy=fedavgg", "--set", "strategy.clients_per_round=1000"], 2),
        (["run", "nope.toml"], 2),
        (["report", "nope"], 2),
        (["simulate", "--help"], 0),
        (["simulate", "nope"], 2),
        (["export", "nope", "--format", "csv"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_nothing_heavy_is_imported(arguments: list[str], code: int, tmp_path: Path) -> None:
    started = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-c", CODE.format(heavy=HEAVY), *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.splitlines()[-1] == "heavy: []"
    # Half a second here; the bound leaves room for a machine that does something else meanwhile.
    assert time.perf_counter() - started < 3
