from .directory import first_free, holds_run, latest, read_experiment
from .history import Run, load
from .store import Checkpoint, RunStore

__all__ = [
    "Checkpoint",
    "Run",
    "RunStore",
    "first_free",
    "holds_run",
    "latest",
    "load",
    "read_experiment",
]
