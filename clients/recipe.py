"""The declarative description of local training. Imports no torch: it is checked before anything heavy is loaded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from clients.errors import RequestError
from clients.parts import Part

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Patterns = Annotated[tuple[str, ...], Strict(False)]

#: A folder that is relative to the experiment's file, and need not exist yet.
Folder = Annotated[str, "folder"]

#: Where batch norm's statistics come from when a model is judged.
BatchNorm = Literal["recalibrate", "clients", "clients_stored", "batch", "shared"]

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


class ElasticNet(Settings):
    """``l1 |w| + l2/2 w^2`` by its proximal map, ``soft(w, lr l1) / (1 + lr l2)`` (Zou and Hastie 2005)."""

    l1: NonNegative = 0.0
    l2: NonNegative = 0.0


class Regularization(Settings):
    """What holds local training back. Any of these compose; none of them is part of the reported loss.

    Attributes:
        l1: lambda in ``lambda ||w||_1``, by its proximal map after each step: exact zeros.
        l2: lambda in ``lambda/2 ||w||^2``; its gradient ``lambda w`` is added before the optimiser (coupled decay).
        weight_decay: decoupled decay, ``w <- w - lr weight_decay w`` before the optimiser's step (AdamW's, for any).
        elastic_net: see :class:`ElasticNet`.
        group_lasso: lambda in ``lambda sum_g sqrt(|g|) ||w_g||`` by its proximal map; a group is an output channel's
            weights (Yuan and Lin 2006).
        proximal: mu in ``mu/2 ||w - w_global||^2`` (FedProx's term), over all shared weights.
        dropout: rate of every dropout layer of the model; left out, the model's own.
        label_smoothing: share of a label's mass that is spread over all classes, in training only.
        penalize_biases: whether l1, l2, weight_decay and elastic_net fall on biases too.
        penalize_norms: whether they fall on the scales and shifts of norm layers too.
    """

    l1: NonNegative = 0.0
    l2: NonNegative = 0.0
    weight_decay: NonNegative = 0.0
    elastic_net: ElasticNet = ElasticNet()
    group_lasso: NonNegative = 0.0
    proximal: NonNegative = 0.0
    dropout: Rate | None = None
    label_smoothing: Rate = 0.0
    penalize_biases: bool = True
    penalize_norms: bool = True


class DpSgd(Settings):
    """Example-level differential privacy on the client (Abadi et al. 2016), through Opacus.

    Each example's gradient is clipped, noise is added to their sum, and the client's own accountant says what was
    spent. The guarantee is the client's alone (it holds against the server) and covers the weights that it sends.

    Attributes:
        noise_multiplier: standard deviation of the noise over ``max_grad_norm``; 0 adds none and gives no privacy.
        max_grad_norm: Euclidean norm that each example's gradient is clipped to.
        delta: of (epsilon, delta); below 1 / (the client's examples) to mean anything.
        accountant: ``rdp`` (Mironov 2017), or ``prv`` (Gopi et al. 2021: tighter and slower; the lower of the two
            counts, and above epsilon 50 ``rdp`` alone).
        sampling: ``poisson`` draws every example into every batch by chance and earns amplification; ``shuffle`` cuts
            shuffled examples into batches and earns none.
    """

    noise_multiplier: NonNegative
    max_grad_norm: Positive = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    accountant: Literal["rdp", "prv"] = "rdp"
    sampling: Literal["poisson", "shuffle"] = "poisson"


class EarlyStopping(Settings):
    """A client stops when its own validation loss stops falling, and sends the best weights that it had.

    Attributes:
        patience: epochs without improvement before it stops.
        min_improvement: how much lower a loss must be to count as better.
    """

    patience: Count = 1
    min_improvement: NonNegative = 0.0


class Adapters(Settings):
    """Low-rank adapters (LoRA; Hu et al. 2022): ``W x`` becomes ``W x + alpha/rank B A x``, and ``A`` and ``B`` train.

    What the model had before is frozen, unless ``freeze`` says otherwise, so that clients send adapters only.

    Attributes:
        rank: of ``B A``; ``A`` is ``[rank, in]``, drawn as linear layers are, ``B`` ``[out, rank]``, zero at first.
        alpha: the product counts ``alpha / rank``.
        layers: patterns of the linear layers that get one; left out, all of them.
        dropout: rate of dropout before ``A``, in training.
        freeze_a: trains and sends ``B`` alone, so that the mean of the clients' products is the product of the mean
            (FFA-LoRA; Sun et al. 2024).
    """

    rank: Count = 8
    alpha: Positive = 16.0
    layers: Patterns | None = None
    dropout: Rate = 0.0
    freeze_a: bool = False


class Adversarial(Settings):
    """Adversarial training on the client (Goodfellow et al. 2015; Madry et al. 2018; federated: Zizzo et al. 2020).

    In every batch, inputs are replaced by the worst that an attack finds within ``eps`` of them (largest change of any
    one number), inside the range of the source's inputs. The reported training loss is that of the batch as it is
    trained on.

    Attributes:
        attack: ``pgd`` (projected gradient descent) or ``fgsm`` (one step to the edge).
        eps: radius, in units of the inputs.
        steps: of ``pgd``.
        step_size: of ``pgd``; left out, ``2.5 eps / steps``.
        random_start: whether ``pgd`` starts anywhere in the ball, or at the input.
        fraction: share of each batch that is attacked.
    """

    attack: Literal["pgd", "fgsm"] = "pgd"
    eps: Positive
    steps: Count = 7
    step_size: Positive | None = None
    random_start: bool = True
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0


class Recipe(Settings):
    """How one client trains its local copy.

    Patterns name parameters (``"head.*"``, ``"*.bias"``) or layers with all that is in them (``"head"``); ``"!head"``
    takes back what an earlier pattern took, and of several that match the last counts.

    Attributes:
        initialization: how the server's first weights are drawn; every client starts from the server's.
        layer_initialization: pattern of layer names -> initialisation of those layers' weights instead.
        freeze: patterns of parameters that keep their first values: they are neither trained nor sent. A batch norm all
            of whose parameters are frozen goes on with the statistics that came with its weights, where some did.
        adapters: see :class:`Adapters`.
        optimizer: ``sgd``, ``momentum``, ``nesterov``, ``adam``, ``adamw``, ``rmsprop``, ``adagrad`` or an own one.
        optimizer_state: whether its moments start anew every round (``reset``) or stay with the client (``keep``).
        lr: local learning rate; left out, the optimiser's default (:data:`DEFAULT_LR`).
        lr_factors: pattern of parameters -> factor on their learning rate (discriminative; Howard and Ruder 2018).
        schedule: factor on ``lr`` by round: ``constant``, ``step``, ``cosine``, ``warmup``.
        step_schedule: the same by local step, over the client's own steps of the round; the factors multiply.
        batch_size: examples a local step; the last batch of an epoch may be short.
        epochs: passes over the client's examples a round, a number or ``{uniform = [low, high]}``.
        steps: local steps a round instead of epochs.
        stragglers: whether a client that drew less work than the most is kept (``keep``) or left out (``drop``).
        early_stopping: see :class:`EarlyStopping`.
        regularization: see :class:`Regularization`.
        gradient_clip: largest Euclidean norm of a client's gradient of the loss, before penalties are added.
        dp_sgd: see :class:`DpSgd`.
        adversarial: see :class:`Adversarial`.
        batch_norm: what of batch norm leaves a client. ``share_affine``: scale and shift, statistics stay local;
            ``local``: nothing (FedBN, Li et al. 2021); ``share_all``: statistics too.
        personal: patterns of parameters that stay on the client and are kept between rounds (FedPer; Arivazhagan et
            al. 2019).
        personal_epochs: epochs a round on the personal parameters alone, before ``epochs`` on the shared ones alone
            (FedRep; Collins et al. 2021); left out, all are trained together.
        local_training: a :class:`clients.hooks.LocalTraining` of the user's own that replaces the loop.
        precision: dtype of the rows and of training; ``bfloat16`` keeps float32 rows and runs the model under autocast.
        execution: ``stacked`` trains many clients at once, ``loop`` one after another; ``auto`` decides and says why.
    """

    initialization: Part = Part("he_normal")
    layer_initialization: dict[str, Part] = {}
    freeze: Patterns | None = None
    adapters: Adapters | None = None
    optimizer: Part = Part("sgd")
    optimizer_state: Literal["reset", "keep"] = "reset"
    lr: Positive | None = None
    lr_factors: dict[str, Positive] = {}
    schedule: Part = Part("constant")
    step_schedule: Part = Part("constant")
    batch_size: Count = 10
    epochs: Count | Uneven = 5
    steps: Count | Uneven | None = None
    stragglers: Literal["keep", "drop"] = "keep"
    early_stopping: EarlyStopping | None = None
    regularization: Regularization = Regularization()
    gradient_clip: Positive | None = None
    dp_sgd: DpSgd | None = None
    adversarial: Adversarial | None = None
    batch_norm: Literal["share_affine", "local", "share_all"] = "share_affine"
    personal: Patterns = ()
    personal_epochs: Count | None = None
    local_training: Part | None = None
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    execution: Literal["auto", "stacked", "loop"] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError("epochs and steps are both given; give one of them")
        if self.local_training is not None and self.execution == "stacked":
            raise ValueError('local_training trains client by client; execution = "stacked" does not go with it')
        if self.dp_sgd is not None and self.execution == "stacked":
            raise ValueError('dp_sgd trains client by client; execution = "stacked" does not go with it')
        if self.dp_sgd is not None and self.precision == "bfloat16":
            raise ValueError('dp_sgd needs precision = "float32" or "float64"; bfloat16 does not go with it')
        if self.dp_sgd is not None and self.adversarial is not None and self.adversarial.fraction < 1:
            # Which examples are attacked would go by how many there are, and one more would change others' gradients.
            raise ValueError("dp_sgd needs adversarial.fraction = 1, since a share of a batch depends on its size")
        if self.personal_epochs is not None and not self.personal:
            raise ValueError("personal_epochs has nothing to train; name the parameters with personal")
        if self.personal_epochs is not None and self.steps is not None:
            raise ValueError("personal_epochs goes before epochs, and steps is given instead of them; give epochs")
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
