"""Poison is a function of the example; the success of an attack is judged on the examples where it means something."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients import catalog, data_attacks
from clients.data_attacks import (
    AttackContext,
    Backdoor,
    DataAttack,
    FreeRider,
    LabelFlip,
    NoisyFeatures,
    malicious_clients,
)
from clients.errors import RequestError
from clients.parts import Part

CTX = AttackContext(classes=10, input_range=(0.0, 1.0), seed=3)
ATTACKS = [LabelFlip(), LabelFlip(1, 7), LabelFlip(1, 7, swap=True), Backdoor(), NoisyFeatures(0.3)]


def pool(size: int = 400, shape: tuple[int, ...] = (3, 6, 5)) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    # The top of the range is the trigger's.
    x = torch.rand(size, *shape, generator=made) * 0.9
    return {"x": x, "y": torch.randint(10, (size,), generator=made), "other": torch.arange(size)}


def poisoned(attack: DataAttack, index: Tensor, ctx: AttackContext = CTX, **rest: tuple[int, ...]) -> dict[str, Tensor]:
    return attack.poison({name: column[index] for name, column in pool(**rest).items()}, index, ctx)


EVERY = torch.arange(400)


# All of them.


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@settings(max_examples=25, deadline=None)
@given(order=st.lists(st.integers(0, 399), min_size=1, max_size=40))
def test_an_example_is_always_treated_alike(attack, order):
    index = torch.tensor(order)
    whole, part = poisoned(attack, EVERY), poisoned(attack, index)
    assert all(torch.equal(part[name], whole[name][index]) for name in whole)


@pytest.mark.parametrize("attack", [*ATTACKS, FreeRider()], ids=repr)
def test_columns_keep_shape_and_type_and_are_not_changed_in_place(attack):
    batch = pool()
    before = {name: column.clone() for name, column in batch.items()}
    made = attack.poison(batch, EVERY, CTX)
    attack.success(batch, CTX)
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    assert {name: (column.shape, column.dtype) for name, column in made.items()} == {
        name: (column.shape, column.dtype) for name, column in batch.items()
    }
    assert attack.changes_data == any(not torch.equal(made[name], batch[name]) for name in batch)
    assert made["other"] is batch["other"]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_no_example_is_no_matter(attack):
    made = poisoned(attack, torch.arange(0))
    assert {name: len(column) for name, column in made.items()} == {"x": 0, "y": 0, "other": 0}


def test_attacks_print_and_compare_by_their_settings():
    assert repr(LabelFlip(1, 7)) == "LabelFlip(source=1, target=7, swap=False)"
    assert Backdoor(target=2) == Backdoor(target=2) != Backdoor(target=3)
    assert len({NoisyFeatures(0.1), NoisyFeatures(0.1), NoisyFeatures(0.2)}) == 2


def test_they_are_found_by_name_and_their_settings_are_checked_from_source():
    names = [entry.name for entry in catalog.entries("attacks")]
    assert {"label_flip", "backdoor", "noisy_features", "free_rider"} <= set(names)
    wrong = [
        Part("backdoor", {"share": 0.0}),
        Part("backdoor", {"corner": "middle"}),
        Part("backdoor", {"size": 0}),
        Part("label_flip", {"source": -1, "target": 2}),
        Part("noisy_features", {"std": 0.0}),
        Part("noisy_features"),
        Part("free_rider", {"noise": -0.1}),
    ]
    assert all(len(catalog.check(part, "attacks")) == 1 for part in wrong)
    right = Part("backdoor", {"target": 3, "value": 0.5, "corner": "top_left", "share": 1.0})
    assert catalog.build(right, "attacks") == Backdoor(target=3, value=0.5, corner="top_left", share=1.0)
    with pytest.raises(RequestError, match=r"^attacks\.0: source and target make a pair"):
        catalog.build(Part("label_flip", {"source": 3}), "attacks", key="attacks.0")


# Labels.


@given(st.lists(st.integers(0, 9), min_size=1))
def test_flipping_every_label_or_swapping_two_is_undone_by_doing_it_again(labels):
    batch, index = {"x": torch.zeros(len(labels), 1), "y": torch.tensor(labels)}, torch.arange(len(labels))
    for attack, by_hand in (
        (LabelFlip(), {label: 9 - label for label in range(10)}),
        (LabelFlip(2, 5, swap=True), {2: 5, 5: 2}),
    ):
        once = attack.poison(batch, index, CTX)
        assert once["y"].tolist() == [by_hand.get(label, label) for label in labels]
        assert torch.equal(attack.poison(once, index, CTX)["y"], batch["y"])


def test_a_pair_flips_the_source_alone_and_is_judged_on_it():
    batch = {"x": torch.rand(6, 2), "y": torch.tensor([2, 5, 7, 2, 0, 5])}
    made = LabelFlip(2, 5).poison(batch, torch.arange(6), CTX)
    assert made["y"].tolist() == [5, 5, 7, 5, 0, 5]
    judged = LabelFlip(2, 5).success(batch, CTX)
    assert judged is not None
    assert judged[1].tolist() == [True, False, False, True, False, False]
    assert judged[0]["y"][judged[1]].tolist() == [5, 5]
    assert torch.equal(judged[0]["x"], batch["x"])
    both = LabelFlip(2, 5, swap=True).success(batch, CTX)
    assert both is not None
    assert both[0]["y"][both[1]].tolist() == [5, 2, 5, 2]
    assert both[1].tolist() == [True, True, False, True, False, True]


def test_attacks_without_an_aim_have_no_success():
    assert [attack.success(pool(), CTX) for attack in (LabelFlip(), NoisyFeatures(0.1), FreeRider())] == [None] * 3


@pytest.mark.parametrize(
    ("attack", "ctx", "message"),
    [
        (LabelFlip(3, 10), CTX, "label_flip.target: 10 is no class; the classes are 0 to 9"),
        (LabelFlip(12, 1), CTX, "label_flip.source: 12 is no class; the classes are 0 to 9"),
        (Backdoor(target=10), CTX, "backdoor.target: 10 is no class; the classes are 0 to 9"),
        (LabelFlip(), AttackContext(), "the number of classes is not known"),
        (LabelFlip(), AttackContext(classes=4), "in row .* is no class; they are 0 to 3"),
        (LabelFlip(), AttackContext(label="z", classes=10), "no column 'z'; they have x, y, other"),
        (
            LabelFlip(),
            AttackContext(label="x", classes=10),
            r"'x' is float32 \[400, 3, 6, 5\]; .* one class an example",
        ),
    ],
    ids=str,
)
def test_classes_and_labels_that_are_none_are_refused(attack, ctx, message):
    with pytest.raises(RequestError, match=message):
        attack.poison(pool(), EVERY, ctx)


def test_labels_that_are_no_classes_are_refused():
    for y in (torch.rand(4), torch.zeros(4, dtype=torch.bool), torch.zeros(4, 2, dtype=torch.long)):
        with pytest.raises(RequestError, match="one class an example"):
            LabelFlip().poison({"x": torch.rand(4, 2), "y": y}, torch.arange(4), CTX)
    with pytest.raises(RequestError, match="label -100 in row 1 of 'y' is no class; they are 0 and more"):
        LabelFlip(0, 1).poison({"y": torch.tensor([0, -100])}, torch.arange(2), AttackContext())


@pytest.mark.parametrize(
    "settings", [{"source": 1}, {"target": 1}, {"swap": True}, {"source": 4, "target": 4}], ids=str
)
def test_half_a_pair_and_a_pair_of_one_class_are_refused(settings):
    with pytest.raises(ValueError, match="source and target"):
        LabelFlip(**settings)


# The backdoor.


@pytest.mark.parametrize(
    ("corner", "rows", "columns"),
    [
        ("top_left", slice(0, 2), slice(0, 2)),
        ("top_right", slice(0, 2), slice(3, 5)),
        ("bottom_left", slice(4, 6), slice(0, 2)),
        ("bottom_right", slice(4, 6), slice(3, 5)),
    ],
)
def test_the_trigger_is_a_square_in_its_corner_and_changes_nothing_else(corner, rows, columns):
    for shape in ((3, 6, 5), (6, 5)):
        x = pool(shape=shape)["x"]
        stamped = Backdoor(corner=corner, value=0.95).trigger(x, CTX)
        assert bool((stamped[..., rows, columns] == 0.95).all())
        changed = (stamped != x).flatten(1).sum(1)
        assert bool((changed == 4 * (3 if len(shape) == 3 else 1)).all())


def test_flat_squares_are_stamped_as_the_images_that_they_are():
    images = pool(shape=(8, 8))["x"]
    attack = Backdoor(size=3, corner="top_right")
    assert torch.equal(attack.trigger(images.flatten(1), CTX), attack.trigger(images, CTX).flatten(1))
    turned = images.flatten(1).T.contiguous().T  # not contiguous
    assert torch.equal(attack.trigger(turned, CTX), attack.trigger(images, CTX).flatten(1))


def test_a_square_is_as_bright_as_inputs_get_where_nothing_is_said():
    x = pool()["x"]
    assert float(Backdoor().trigger(x, AttackContext(input_range=(-2.0, 2.5)))[0, 0, -1, -1]) == 2.5
    assert int(Backdoor().trigger((x * 255).byte(), AttackContext(input_range=(0, 255)))[0, 0, -1, -1]) == 255


def test_what_is_stamped_is_called_the_target_and_what_is_not_is_left_alone():
    batch = pool(4000, (1, 4, 4))
    made = Backdoor(target=6, share=0.3).poison(batch, torch.arange(4000), CTX)
    stamped = made["x"][:, 0, -1, -1] == 1
    assert bool((made["y"][stamped] == 6).all())
    assert torch.equal(made["x"][stamped], Backdoor().trigger(batch["x"], CTX)[stamped])
    for name in ("x", "y"):
        assert torch.equal(made[name][~stamped], batch[name][~stamped])
    # Standard error of 4,000 draws: 0.0072.
    assert abs(float(stamped.double().mean()) - 0.3) < 0.03


def test_shares_are_nested_all_means_all_and_the_seed_counts():
    def stamped(share: float, ctx: AttackContext = CTX) -> Tensor:
        return poisoned(Backdoor(share=share), EVERY, ctx)["x"][:, 0, -1, -1] == 1

    assert bool((stamped(0.2) <= stamped(0.5)).all())
    assert bool(stamped(1.0).all())
    assert not torch.equal(stamped(0.5), stamped(0.5, AttackContext(classes=10, input_range=(0, 1), seed=4)))


def test_a_backdoors_success_leaves_out_images_that_are_of_the_target_anyway():
    batch = pool()
    judged, counts = Backdoor(target=6).success(batch, CTX)
    assert torch.equal(counts, batch["y"] != 6)
    assert 0 < int(counts.sum()) < 400
    assert bool((judged["y"] == 6).all())
    assert torch.equal(judged["x"], Backdoor().trigger(batch["x"], CTX))
    assert judged["other"] is batch["other"]


@pytest.mark.parametrize(
    ("attack", "x", "ctx", "message"),
    [
        (Backdoor(), torch.rand(2, 12), CTX, r"\[2, 12\] are no images"),
        (Backdoor(), torch.rand(2), CTX, r"\[2\] are no images"),
        (Backdoor(size=5), torch.rand(2, 1, 9, 4), CTX, "backdoor.size: 5 pixels do not fit images of 9 x 4"),
        (Backdoor(), torch.rand(2, 4, 4), AttackContext(), "range of the inputs is not known"),
        (Backdoor(value=1.5), torch.rand(2, 4, 4), CTX, "1.5 is outside the inputs' range, 0.0 to 1.0"),
        (Backdoor(value=0.5), torch.zeros(2, 4, 4, dtype=torch.uint8), AttackContext(), "give a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trigger_that_cannot_be_is_refused(attack, x, ctx, message):
    with pytest.raises(RequestError, match=message):
        attack.trigger(x, ctx)


def test_a_backdoor_that_does_nothing_is_refused():
    with pytest.raises(ValueError, match="size of at least 1"):
        Backdoor(size=0)
    with pytest.raises(ValueError, match=r"share 1\.5"):
        Backdoor(share=1.5)


# Noise.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_gaussian_with_the_standard_deviation_that_is_said(dtype):
    x = torch.full((200, 20, 20), 0.5, dtype=dtype)
    noise = NoisyFeatures(0.2).poison({"x": x}, torch.arange(200), AttackContext())["x"] - x
    assert noise.dtype == dtype
    z = noise.double().flatten() / 0.2
    # 80,000 draws; standard errors of mean, variance and fourth moment: 0.0035, 0.005 and 0.035.
    assert abs(float(z.mean())) < 0.014
    assert abs(float(z.var()) - 1) < 0.02
    assert abs(float((z**4).mean()) - 3) < 0.14
    assert abs(float(torch.corrcoef(noise.flatten(1)[:2])[0, 1])) < 0.2  # 400 pairs: standard error 0.05


def test_noise_does_not_depend_on_how_much_is_drawn_at_once(monkeypatch):
    whole = poisoned(NoisyFeatures(0.2), EVERY)
    monkeypatch.setattr(data_attacks, "_AT_ONCE", 1000)
    assert torch.equal(poisoned(NoisyFeatures(0.2), EVERY)["x"], whole["x"])


def test_noise_stays_in_the_range_and_needs_numbers():
    noisy = poisoned(NoisyFeatures(2.0), EVERY)["x"]
    assert (float(noisy.min()), float(noisy.max())) == (0.0, 1.0)
    with pytest.raises(RequestError, match="noise needs real-valued inputs"):
        NoisyFeatures(0.1).poison({"x": torch.zeros(2, 3, dtype=torch.long)}, torch.arange(2), CTX)


# What is sent.


def test_a_free_rider_sends_zeros_or_its_own_noise():
    rows, clients = torch.rand(3, 2000), np.array([4, 9, 2])
    before = rows.clone()
    assert not FreeRider().update(rows, clients, 1, CTX).any()
    sent = FreeRider(noise=0.1).update(rows, clients, 1, CTX)
    assert torch.equal(rows, before)
    assert abs(float(sent.std()) - 0.1) < 0.005  # 6,000 draws: standard error 0.0009
    assert torch.equal(sent[1:2], FreeRider(noise=0.1).update(rows[1:2], clients[1:2], 1, CTX))
    assert not torch.equal(sent, FreeRider(noise=0.1).update(rows, clients, 2, CTX))
    assert not torch.equal(sent[0], sent[1])


def test_only_a_free_rider_changes_what_is_sent():
    rows = torch.rand(2, 5)
    assert FreeRider().changes_update
    assert not FreeRider().changes_data
    for attack in ATTACKS:
        assert not attack.changes_update
        assert attack.update(rows, np.arange(2), 1, CTX) is rows


# Who it is.


@settings(max_examples=50, deadline=None)
@given(
    able=st.lists(st.integers(0, 10_000), min_size=1, max_size=50, unique=True),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_a_fraction_draws_that_many_clients_and_a_larger_one_adds_to_them(able, fraction, seed):
    ids = np.array(able)
    found = malicious_clients(fraction, None, ids, seed)
    assert len(found) == (max(1, round(fraction * len(able))) if fraction else 0)
    assert set(found.tolist()) <= set(able)
    assert found.tolist() == sorted(found.tolist())
    assert np.array_equal(found, malicious_clients(fraction, None, ids[::-1], seed))
    assert set(found.tolist()) <= set(malicious_clients(1 - (1 - fraction) / 2, None, ids, seed).tolist())


def test_the_draw_is_even_and_keyed():
    chosen = [malicious_clients(0.2, None, np.arange(20), seed) for seed in range(2000)]
    counts = np.bincount(np.concatenate(chosen), minlength=20)
    # 400 times each, standard deviation 17.9.
    assert np.abs(counts - 400).max() < 80
    assert not np.array_equal(
        malicious_clients(0.5, None, np.arange(50), 0, "a"), malicious_clients(0.5, None, np.arange(50), 0, "b")
    )


def test_clients_may_be_named():
    assert malicious_clients(None, [7, 3], np.arange(10), 0).tolist() == [3, 7]
    assert malicious_clients(None, [], np.arange(10), 0).tolist() == []


@pytest.mark.parametrize(
    ("fraction", "clients", "able", "message"),
    [
        (None, [3, 12], np.arange(10), "attack.clients: 12 cannot be malicious clients; they are among 0 to 9"),
        (None, [3, 3], np.arange(10), "attack.clients: 3 more than once"),
        (1.5, None, np.arange(10), "attack.fraction: 1.5 is not in 0 to 1"),
        (0.5, None, np.arange(0), "there is no client"),
        (None, None, np.arange(10), "give fraction or clients"),
        (0.5, [1], np.arange(10), "give fraction or clients"),
    ],
)
def test_clients_that_cannot_be_are_refused(fraction, clients, able, message):
    with pytest.raises(RequestError, match=message):
        malicious_clients(fraction, clients, able, 0)
