"""The declarative description of local training. Imports no torch: it is checked before anything heavy is loaded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from clients.errors import RequestError
from clients.parts import Part

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

#: The learning rate when none is given; an optimiser of the user's own must be given one.
DEFAULT_LR = {
    "sgd": 0.3,
    "momentum": 0.03,
    "nesterov": 0.03,
    "adam": 0.003,
    "adamw": 0.003,
    "rmsprop": 0.001,
    "adagrad": 0.01,
}


class Settings(BaseModel):
    """Frozen settings; an unknown key is an error, and so is ``"0.1"`` or ``true`` for a number."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", arbitrary_types_allowed=True)


class Uneven(Settings):
    """Uneven work: each client draws its number anew every round, ``{uniform = [low, high]}``, ends included."""

    uniform: Annotated[tuple[Count, Count], Strict(False)]

    @model_validator(mode="after")
    def _ordered(self) -> Uneven:
        if self.uniform[0] > self.uniform[1]:
            raise ValueError(f"uniform = {list(self.uniform)} has its ends the wrong way round; give [low, high]")
        return self


class Regularization(Settings):
    """Penalties on local training. They are never part of the reported loss.

    Attributes:
        l2: lambda in ``lambda/2 ||w||^2``; its gradient ``lambda w`` is added before the optimiser (coupled decay).
    """

    l2: NonNegative = 0.0


class Recipe(Settings):
    """How one client trains its local copy.

    Attributes:
        initialization: how the server's first weights are drawn; every client starts from the server's.
        optimizer: ``sgd``, ``momentum``, ``nesterov``, ``adam``, ``adamw``, ``rmsprop``, ``adagrad`` or an own one; its
            state starts anew every round.
        lr: local learning rate; left out, the optimiser's default (:data:`DEFAULT_LR`).
        batch_size: examples a local step; the last batch of an epoch may be short.
        epochs: passes over the client's examples a round, a number or ``{uniform = [low, high]}``.
        steps: local steps a round instead of epochs.
        stragglers: whether a client that drew less work than the most is kept (``keep``) or left out (``drop``).
        regularization: see :class:`Regularization`.
        batch_norm: what of batch norm leaves a client: ``share_affine`` sends scale and shift, statistics stay local.
        personal: patterns of parameter names (``"head.*"``) that stay on the client and are kept between rounds.
        local_training: a :class:`clients.hooks.LocalTraining` of the user's own that replaces the loop.
        precision: dtype of the rows and of training.
        execution: ``stacked`` trains many clients at once, ``loop`` one after another; ``auto`` decides and says why.
    """

    initialization: Part = Part("he_normal")
    optimizer: Part = Part("sgd")
    lr: Positive | None = None
    batch_size: Count = 10
    epochs: Count | Uneven = 5
    steps: Count | Uneven | None = None
    stragglers: Literal["keep", "drop"] = "keep"
    regularization: Regularization = Regularization()
    batch_norm: Literal["share_affine"] = "share_affine"
    personal: Annotated[tuple[str, ...], Strict(False)] = ()
    local_training: Part | None = None
    precision: Literal["float32", "float64"] = "float32"
    execution: Literal["auto", "stacked", "loop"] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError("epochs and steps are both given; give one of them")
        if self.local_training is not None and self.execution == "stacked":
            raise ValueError('local_training trains client by client; execution = "stacked" does not go with it')
        if self.lr is None and self.optimizer.own:
            raise ValueError("an optimiser of your own has no default learning rate; give lr")
        return self

    @property
    def learning_rate(self) -> float:
        """The local learning rate, the optimiser's default where none is given."""
        if self.lr is not None:
            return self.lr
        if self.optimizer.name not in DEFAULT_LR:
            raise RequestError(f"client.lr: the optimiser {self.optimizer.name!r} has no default; give one")
        return DEFAULT_LR[self.optimizer.name]
