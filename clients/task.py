"""What is learnt: how a model is called, its loss, and the statistics that metrics are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.errors import RunError

Batch = Mapping[str, Tensor]
Total = Mapping[str, Tensor]


class Task:
    """The base of every task; a user's own overrides what differs.

    ``forward``, ``loss`` and ``statistics`` see one client's batch, ``[B, ...]`` each column; in stacked training they
    run under ``torch.vmap``. Values are per example: the trainer masks and averages.

    Attributes:
        primary: the metric that runs are judged by (tuning, early stopping, ``--json``).
        higher_is_better: its direction.
    """

    primary: str = "loss"
    higher_is_better: bool = False

    def forward(self, model: Any, batch: Batch) -> Any:
        """Outputs of the model for a batch; by default ``model(batch["x"])``."""
        return model(batch["x"])

    def loss(self, outputs: Any, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        """``[B]`` loss values, or ``([B] values, [B] weights)`` where examples count unequally (padding)."""
        raise NotImplementedError

    def smoothed_loss(self, outputs: Any, batch: Batch, smoothing: float) -> Tensor | tuple[Tensor, Tensor]:
        """The loss for labels of which the share ``smoothing`` is spread over all classes (Szegedy et al. 2016).

        A task without classes has none; a task that overrides :meth:`loss` overrides this too, or has none.
        """
        raise NotImplementedError

    @property
    def can_smooth(self) -> bool:
        """Whether :meth:`smoothed_loss` is that of :meth:`loss`, and not of a class that a subclass's loss replaced."""
        defines = [kind for kind in type(self).__mro__ if "loss" in vars(kind) or "smoothed_loss" in vars(kind)]
        return defines[0] is not Task and "smoothed_loss" in vars(defines[0])

    def statistics(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Per-example statistics ``{name: [B, m]}`` (or ``[B]``); they are summed by client, split and round."""
        return {}

    def metric(self, name: str, total: Total) -> float:
        """A metric from summed statistics (each ``float64 [m]``); ``total["examples"]`` is the count ``[1]``.

        By default the mean of a statistic of one number.
        """
        return float(total[name][0] / total["examples"][0])

    def metrics(self, total: Total) -> dict[str, float]:
        """All metrics of summed statistics: ``loss`` (weighted mean), ``primary``, and what else :meth:`metric` has."""
        found = {
            "loss": float(total["loss"][0] / total["loss_weight"][0]) if total["loss_weight"][0] > 0 else float("nan")
        }
        names = [name for name in total if name not in ("examples", "loss", "loss_weight")]
        for name in dict.fromkeys([self.primary, *names]):
            if name == "loss":
                continue
            try:
                found[name] = self.metric(name, total)
            except KeyError:
                if name == self.primary:
                    raise
        return found

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Classification(Task):
    """One class per example: ``batch["y"]`` ``int64 [B]``, outputs logits ``[B, classes]``; cross-entropy in nats."""

    primary = "accuracy"
    higher_is_better = True

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.smoothed_loss(outputs, batch, 0.0)

    def smoothed_loss(self, outputs: Tensor, batch: Batch, smoothing: float) -> Tensor:
        return F.cross_entropy(outputs, batch["y"], reduction="none", label_smoothing=smoothing)

    def statistics(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(-1) == batch["y"]).to(torch.float32)}


class Multilabel(Task):
    """Several yes/no labels per example: ``batch["y"]`` in {0, 1} ``[B, labels]``, outputs logits alike.

    Metrics: ``f1`` (micro, from summed true positives, false positives and false negatives) and ``accuracy`` by label.
    """

    primary = "f1"
    higher_is_better = True

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.smoothed_loss(outputs, batch, 0.0)

    def smoothed_loss(self, outputs: Tensor, batch: Batch, smoothing: float) -> Tensor:
        target = batch["y"].to(outputs.dtype)
        if smoothing:
            target = target * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(outputs, target, reduction="none").mean(-1)

    def statistics(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        said, truth = outputs > 0, batch["y"] > 0
        counts = torch.stack([(said & truth).sum(-1), (said & ~truth).sum(-1), (~said & truth).sum(-1)], dim=-1)
        return {"f1": counts.to(torch.float32), "accuracy": (said == truth).to(torch.float32).mean(-1)}

    def metric(self, name: str, total: Total) -> float:
        if name != "f1":
            return super().metric(name, total)
        true, false, missed = total["f1"].tolist()
        return 2 * true / max(2 * true + false + missed, 1.0)


class Regression(Task):
    """Real targets: ``batch["y"]`` ``[B]`` or ``[B, m]``, outputs alike; mean squared error. Metric: ``rmse``."""

    primary = "rmse"

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return _by_example((outputs.reshape(batch["y"].shape) - batch["y"]).square()).mean(-1)

    def statistics(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"rmse": self.loss(outputs, batch)}

    def metric(self, name: str, total: Total) -> float:
        return super().metric(name, total) ** 0.5 if name == "rmse" else super().metric(name, total)


class Segmentation(Task):
    """A class per pixel: ``batch["y"]`` ``int64 [B, H, W]``, outputs logits ``[B, classes, H, W]``.

    Metrics: ``mean_iou`` (over the classes that occur in truth or prediction) and ``accuracy`` by pixel.
    """

    primary = "mean_iou"
    higher_is_better = True

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.smoothed_loss(outputs, batch, 0.0)

    def smoothed_loss(self, outputs: Tensor, batch: Batch, smoothing: float) -> Tensor:
        values = F.cross_entropy(outputs, batch["y"], reduction="none", label_smoothing=smoothing)
        return _by_example(values).mean(-1)

    def statistics(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        classes = torch.arange(outputs.shape[1], device=outputs.device)
        said = outputs.argmax(1).flatten(1)[..., None] == classes
        truth = batch["y"].flatten(1)[..., None] == classes
        counts = torch.cat([(said & truth).sum(1), (said | truth).sum(1)], dim=-1)
        return {"mean_iou": counts.to(torch.float32), "accuracy": (said & truth).any(-1).to(torch.float32).mean(-1)}

    def metric(self, name: str, total: Total) -> float:
        if name != "mean_iou":
            return super().metric(name, total)
        both, either = total["mean_iou"].chunk(2)
        return float((both[either > 0] / either[either > 0]).mean()) if bool((either > 0).any()) else float("nan")


class Tokens(Task):
    """A class per token: ``batch["y"]`` ``int64 [B, T]``, ``ignore`` where padded, outputs logits ``[B, T, classes]``.

    An example counts by its real tokens, in training and in metrics. Metric: ``accuracy`` by token.
    """

    primary = "accuracy"
    higher_is_better = True
    ignore = -100

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.smoothed_loss(outputs, batch, 0.0)

    def smoothed_loss(self, outputs: Tensor, batch: Batch, smoothing: float) -> tuple[Tensor, Tensor]:
        real = (batch["y"] != self.ignore).to(outputs.dtype)
        target, logits = batch["y"].clamp(min=0), outputs.movedim(-1, 1)
        values = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing) * real
        count = real.sum(-1)
        return values.sum(-1) / count.clamp(min=1), count

    def statistics(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        real = batch["y"] != self.ignore
        right = (outputs.argmax(-1) == batch["y"]) & real
        return {"accuracy": torch.stack([right.sum(-1), real.sum(-1)], dim=-1).to(torch.float32)}

    def metric(self, name: str, total: Total) -> float:
        return float(total[name][0] / total[name][1].clamp(min=1))


def _by_example(values: Tensor) -> Tensor:
    """``[B, ...]`` as ``[B, m]``."""
    return values.reshape(values.shape[0], -1)


def loss_and_weights(task: Task, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """A task's loss as ``([B] values, [B] weights or None)``, with label smoothing where it is above 0.

    Raises:
        RunError: for a loss that is already averaged.
    """
    found = task.smoothed_loss(outputs, batch, smoothing) if smoothing else task.loss(outputs, batch)
    values, weights = found if isinstance(found, tuple) else (found, None)
    one_each(values, f"{type(task).__name__}.loss")
    return values, weights


def weighted_loss(task: Task, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """A task's loss as ``[B]`` values times their weights, and the ``[B]`` weights: the sums make a mean."""
    values, weights = loss_and_weights(task, outputs, batch)
    weights = torch.ones_like(values) if weights is None else weights
    return values * weights, weights


def one_each(values: Tensor, where: str) -> None:
    """Refuses a loss that is not one value an example.

    Raises:
        RunError: names ``where`` it came from.
    """
    if values.dim() != 1:
        raise RunError(
            f"{where} gave shape {list(values.shape)} for a batch of B examples; give one value an example, [B]"
            ' (torch\'s losses: reduction="none")'
        )
