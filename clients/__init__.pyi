from . import calls as calls
from . import catalog as catalog
from . import errors as errors
from . import normalization as normalization
from . import randomness as randomness
from . import regularization as regularization
from .errors import ClientError, FedsimError, RequestError, RunError
from .flower_app import client_app, initial_arrays
from .hooks import ClientData, Correction, LocalContext, LocalTraining, Variables
from .initialization import initialize
from .normalization import recalibrate, replace_batch_norm
from .optimizers import Optimizer
from .parts import Part
from .recipe import Recipe
from .schedules import Schedule
from .task import Classification, Multilabel, Regression, Segmentation, Task, Tokens
from .updates import Updates
from .weights import Layout

__all__ = [
    "Classification",
    "ClientData",
    "ClientError",
    "Correction",
    "FedsimError",
    "Layout",
    "LocalContext",
    "LocalTraining",
    "Multilabel",
    "Optimizer",
    "Part",
    "Recipe",
    "Regression",
    "RequestError",
    "RunError",
    "Schedule",
    "Segmentation",
    "Task",
    "Tokens",
    "Updates",
    "Variables",
    "calls",
    "catalog",
    "client_app",
    "errors",
    "initial_arrays",
    "initialize",
    "normalization",
    "randomness",
    "recalibrate",
    "regularization",
    "replace_batch_norm",
]
