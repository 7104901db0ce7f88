"""A virtual environment for pfl-research, whose pins clash with fedsim's; built once and kept in the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PFL = "0.6.0"


def python() -> Path:
    """The interpreter that has pfl and the same PyTorch as this one, installed first if need be (a few GB, minutes).

    Raises:
        RuntimeError: pip cannot install pfl.
    """
    torch = version("torch").split("+")[0]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    tag = f"python{sys.version_info.major}.{sys.version_info.minor}"
    home = cache / "fedsim-benchmarks" / f"pfl-{PFL}-torch-{torch}-{tag}"
    interpreter = home / "bin" / "python"
    # The mark is written last: an installation that was interrupted is not taken for a whole one.
    mark = home / "complete"
    if not mark.exists():
        print(f"installing pfl {PFL} with torch {torch} into {home}", file=sys.stderr, flush=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        install = [str(interpreter), "-m", "pip", "install", "--quiet", f"pfl[pytorch]=={PFL}", f"torch=={torch}"]
        done = subprocess.run(install, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"pfl {PFL} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        mark.touch()
    return interpreter
