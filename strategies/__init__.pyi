from . import server_optimizers as server_optimizers
from .adaptive import FedAdagrad, FedAdam, FedYogi
from .aggregation import Aggregator, Mean, mean
from .averaging import FedAvg, FedAvgM, FedProx
from .checks import Check, CheckContext
from .context import Context
from .corrections import Prox
from .plugins import Plugin
from .sampling import All, Fixed, Poisson, Sampling
from .server_optimizers import ServerOptimizer
from .strategy import Strategy

__all__ = [
    "Aggregator",
    "All",
    "Check",
    "CheckContext",
    "Context",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "Fixed",
    "Mean",
    "Plugin",
    "Poisson",
    "Prox",
    "Sampling",
    "ServerOptimizer",
    "Strategy",
    "mean",
    "server_optimizers",
]
