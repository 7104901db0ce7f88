import clients as clients
import strategies as strategies

from . import data as data
from . import engines as engines
from .data import Partition, Source
from .experiment import Experiment
from .flower import simulate
from .records import Event, RoundRecord
from .running import Result, plan, rounds, run
from .runs import Run, load
from .trained import load_model

__all__ = [
    "Event",
    "Experiment",
    "Partition",
    "Result",
    "RoundRecord",
    "Run",
    "Source",
    "clients",
    "data",
    "engines",
    "load",
    "load_model",
    "plan",
    "rounds",
    "run",
    "simulate",
    "strategies",
]
