"""Transforms of training batches: drawn by key, the same in every execution, image and label together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from clients.augmentation import Transforms
from clients.errors import RequestError
from clients.recipe import Recipe
from clients.task import Classification
from tests.clients.problems import SIZES, Pool, apart, digits_like, trainer

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 4


def transforms(*steps, **settings):
    return Transforms(tuple(steps), 0, **settings)


def test_one_draw_changes_a_whole_batch_or_every_example_its_own_way():
    batch = {"x": IMAGES, "y": LABELS}

    def flipped(by):
        found = transforms(v2.RandomHorizontalFlip(), by=by)
        return [
            [not torch.equal(a, b) for a, b in zip(found(batch, step=s)["x"], IMAGES, strict=True)] for s in range(8)
        ]

    assert all(len(set(step)) == 1 for step in flipped("batch"))
    assert len({step[0] for step in flipped("batch")}) == 2
    assert any(len(set(step)) == 2 for step in flipped("example"))


def test_a_draw_is_a_function_of_seed_round_client_and_step_and_leaves_torchs_generator_alone():
    found, batch = transforms(v2.RandomCrop(8, padding=4)), {"x": IMAGES, "y": LABELS}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = found(batch, client=1, round=2, step=3)["x"]
    torch.rand(7)
    assert torch.equal(found(batch, client=1, round=2, step=3)["x"], first)
    torch.set_rng_state(before)
    others = [{"client": 2}, {"round": 3}, {"step": 4}]
    assert any(not torch.equal(found(batch, **{"client": 1, "round": 2, "step": 3} | o)["x"], first) for o in others)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (6, 8, 8), (6, 64)], ids=str)
def test_inputs_keep_their_form(shape):
    x = torch.rand(shape)
    found = transforms(v2.RandomHorizontalFlip(p=1.0))({"x": x, "y": LABELS})["x"]
    assert found.shape == shape
    assert type(found) is torch.Tensor
    assert torch.equal(found.reshape(-1, 8), x.reshape(-1, 8).flip(-1))


def test_the_labels_of_segmentation_move_with_the_image():
    masks = torch.randint(0, 3, (6, 8, 8), generator=torch.Generator().manual_seed(1))
    found = transforms(v2.RandomHorizontalFlip(p=1.0))({"x": IMAGES, "y": masks})
    assert torch.equal(found["y"], masks.flip(-1))
    assert found["y"].dtype == torch.int64


def test_mixing_examples_makes_soft_labels_that_the_loss_takes():
    found = transforms(v2.MixUp(num_classes=4))({"x": IMAGES, "y": LABELS})
    assert found["y"].shape == (6, 4)
    assert torch.allclose(found["y"].sum(1), torch.ones(6))
    assert Classification().loss(torch.zeros(6, 4), found).shape == (6,)


def test_a_function_of_ones_own_gets_the_inputs():
    found = transforms(lambda x: x * 2)({"x": IMAGES, "y": LABELS})
    assert torch.equal(found["x"], IMAGES * 2)
    with pytest.raises(RequestError, match=r"made \[5, 3, 8, 8\] of 6 examples"):
        transforms(lambda x: x[1:])({"x": IMAGES, "y": LABELS})


@pytest.mark.parametrize("by", ["batch", "example"])
def test_stacked_and_loop_see_the_same_inputs(by):
    plain = digits_like(features=15)
    pool = Pool(x=plain.columns["x"].view(-1, 1, 3, 5), y=plain.columns["y"])
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 4))
    steps = transforms(v2.RandomCrop((3, 5), padding=1), v2.GaussianNoise(), by=by)
    recipe = Recipe(batch_size=10, epochs=2, lr=0.1)
    rows = []
    for stacked, used in ((True, steps), (False, steps), (False, None)):
        training = trainer(model, pool, stacked=stacked, recipe=recipe, transforms=used)
        rows.append(training.train(np.arange(len(SIZES)), training.layout.flatten(model), 1).updates.rows)
    assert apart(rows[0], rows[1]) < 1e-5
    assert apart(rows[2], rows[1]) > 1e-2
