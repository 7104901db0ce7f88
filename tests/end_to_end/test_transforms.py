"""Transforms of data as a user names them: torchvision's, one's own, in training and in evaluation."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

import fedsim
from clients.errors import RequestError

OWN = """
import random
import numpy as np
import torch

def shift(x):
    return x + random.random() + float(np.random.rand())

class Noise:
    def __init__(self, scale: float = 0.1):
        self.scale = scale

    def __call__(self, x):
        return x + self.scale * torch.randn_like(x)
"""


def experiment(folder, transforms, **settings):
    data = {"transforms": transforms, **settings.pop("data", {})}
    return fedsim.Experiment(folder, rounds=2, data=data, **{"client": {"epochs": 1}, **settings})


@pytest.mark.parametrize("execution", ["stacked", "loop"])
def test_every_draw_is_the_same_on_every_engine_whatever_it_is_drawn_from(execution, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    steps = ["own.py:shift", {"name": "own.py:Noise", "scale": 0.2}, {"name": "random_crop", "size": 8, "padding": 1}]
    ends = set()
    for engine, workers in (("inline", None), ("processes", 2)):
        made = experiment(tmp_path, steps, client={"epochs": 1, "execution": execution})
        result = fedsim.run(made, out=tmp_path / f"{engine}", engine=engine, workers=workers)
        ends.add(result.summary["weights_sha256"])
    plain = fedsim.run(experiment(tmp_path, [], client={"epochs": 1, "execution": execution}), out=tmp_path / "plain")
    assert len(ends) == 1
    assert plain.summary["weights_sha256"] not in ends


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_model_by_name_is_made_for_inputs_as_they_are_after_the_transforms(model, tmp_path):
    crop = [{"name": "center_crop", "size": 6}]
    made = experiment(tmp_path, crop, model=model, data={"test_transforms": crop, "source": images(tmp_path)})
    result = fedsim.run(made, out=tmp_path / "run")
    assert result.metrics["test"]["accuracy"] > 0.05
    first = next(tensor for name, tensor in result.weights.items() if "weight" in name)
    assert first.shape[1] == (36 if model == "mlp" else 1)


def images(folder):
    """Digits as images, in a file."""
    import numpy as np
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    np.savez(folder / "images.npz", x=(x / 16).astype(np.float32).reshape(-1, 1, 8, 8), y=y)
    return {"name": "arrays", "path": str(folder / "images.npz")}


def test_what_is_evaluated_goes_through_the_test_transforms_alone(tmp_path):
    """Inverted images are judged as such: a model of plain ones fails on them, one of inverted ones does not."""
    invert, data = [{"name": "random_invert", "p": 1.0}], {"client_test_fraction": 0.3}
    settings = {"client": {"epochs": 5}, "evaluation": {"clients": True, "every": 2}}
    found = {}
    for name, steps, tests in (("both", invert, invert), ("test", [], invert), ("neither", [], [])):
        made = experiment(tmp_path, steps, data={**data, "test_transforms": tests}, **settings)
        metrics = fedsim.run(made, out=tmp_path / name).metrics
        found[name] = min(metrics["test"]["accuracy"], metrics["client_test"]["accuracy"])
    assert found["neither"] > found["test"] + 0.1
    assert found["both"] > found["test"] + 0.1


@pytest.mark.parametrize(
    ("transforms", "said"),
    [
        ([v2.RandomApply([v2.MixUp(num_classes=10)])], "they mix examples of a batch"),
        ([{"name": "torchvision.transforms.v2:CutMix", "num_classes": 10}], "they mix examples of a batch"),
        (["own.py:shift"], "they mix examples of a batch, or may"),
    ],
    ids=["inside another", "by module", "own"],
)
def test_what_may_mix_examples_does_not_go_with_privacy_of_each(transforms, said, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    made = experiment(tmp_path, transforms, client={"dp_sgd": {"noise_multiplier": 1.0}})
    with pytest.raises(RequestError, match=said):
        fedsim.run(made, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"transforms": [{"name": "five_crop", "size": 4}]}, r"data.transforms: FiveCrop made \w+ of 2 examples"),
        ({"test_transforms": [{"name": "mix_up"}]}, r"data.test_transforms: MixUp raises"),
        ({"transforms": [lambda x: x[:1]]}, r"made \[1, 1, 8, 8\] of 2 examples"),
    ],
    ids=["several", "classes missing", "too few"],
)
def test_transforms_that_cannot_be_are_refused_in_a_line(data, said, tmp_path):
    with pytest.raises(RequestError, match=said):
        fedsim.run(fedsim.Experiment(tmp_path, data=data), out=tmp_path / "run")


def test_attacks_stay_in_the_range_of_the_inputs_so_transforms_must_too(tmp_path):
    normalize = [{"name": "normalize", "mean": [0.5], "std": [0.1]}]
    made = experiment(tmp_path, normalize, client={"adversarial": {"eps": 0.1}}, data={"test_transforms": normalize})
    with pytest.raises(RequestError, match=r"data.transforms take inputs out of their range"):
        fedsim.run(made, out=tmp_path / "run")


def test_early_stopping_reads_validation_examples_as_they_are_evaluated(tmp_path):
    crop = [{"name": "center_crop", "size": 6}]
    data = {"test_transforms": crop, "source": images(tmp_path), "client_validation_fraction": 0.3}
    client = {"early_stopping": {"patience": 1}, "epochs": 3}
    result = fedsim.run(experiment(tmp_path, crop, data=data, client=client), out=tmp_path / "run")
    assert torch.isfinite(result.row).all()
    assert not fedsim.load(tmp_path / "run").events.kind.eq("client_failed").any()
