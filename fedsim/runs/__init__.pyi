from .directory import first_free, holds_run
from .history import Run, load
from .resolved import latest, read_experiment
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
