from __future__ import annotations

from itertools import chain

import numpy as np
import torch

from clients.batches import Work, schedule, work
from clients.recipe import Recipe
from tests.clients.problems import SIZES, members


def _planned(clients: np.ndarray, recipe: Recipe):
    done = work(recipe, np.array(SIZES)[clients], clients, seed=0, round=3)
    order = np.argsort(-done.steps, kind="stable")
    ranked = Work(done.examples[order], done.per_epoch[order], done.steps[order])
    where = [members()(client) for client in clients[order]]
    return clients[order], ranked, schedule(ranked, where, clients[order], recipe.batch_size, 0, 3)


def _batches(clients, plan, client):
    column = int(np.flatnonzero(clients == client)[0])
    return [
        plan.index[t, column, : plan.count[t, column]].tolist() for t in range(len(plan.count)) if plan.count[t, column]
    ]


def test_each_epoch_visits_every_example_once_in_an_order_of_its_own():
    clients, done, plan = _planned(np.arange(6), Recipe(batch_size=10, epochs=3))
    for i, client in enumerate(clients):
        batches = _batches(clients, plan, client)
        assert len(batches) == done.steps[i]
        epochs = [list(chain(*batches[e * done.per_epoch[i] : (e + 1) * done.per_epoch[i]])) for e in range(3)]
        for epoch in epochs:
            assert sorted(epoch) == members()(client).tolist()
        if SIZES[client] > 5:
            assert epochs[0] != epochs[1]


def test_a_clients_batches_do_not_depend_on_its_stack():
    recipe = Recipe(batch_size=10, epochs=2)
    clients, _, plan = _planned(np.arange(6), recipe)
    for client in range(6):
        alone, _, single = _planned(np.array([client]), recipe)
        assert _batches(alone, single, client) == _batches(clients, plan, client)


def test_those_still_training_are_a_prefix():
    _, done, plan = _planned(np.arange(6), Recipe(batch_size=10, epochs=2))
    for step, active in enumerate(plan.active):
        assert (done.steps[:active] > step).all()
        assert (done.steps[active:] <= step).all()


def test_steps_instead_of_epochs_and_uneven_work():
    examples, clients = np.array([25, 3]), np.array([0, 1])
    assert work(Recipe(steps=7), examples, clients, 0, 1).steps.tolist() == [7, 7]
    many = np.arange(3000)
    drawn = work(Recipe(epochs={"uniform": (1, 19)}), np.full(3000, 10), many, 0, 1).steps
    assert drawn.min() == 1
    assert drawn.max() == 19
    assert abs(drawn.mean() - 10) < 0.4  # standard error 0.1
    again = work(Recipe(epochs={"uniform": (1, 19)}), np.full(3000, 10), many, 0, 2).steps
    assert (again != drawn).mean() > 0.9  # drawn anew each round


def test_poisson_batches_hold_every_example_by_chance_and_independently_of_the_stack():
    sizes = np.array([50, 8, 30])
    clients = np.array([4, 9, 2])
    recipe = Recipe(batch_size=10, steps=400)
    done = work(recipe, sizes, clients, seed=0, round=1)
    members = [np.arange(100, 150), np.arange(8), np.arange(200, 230)]
    plan = schedule(done, members, clients, 10, 0, 1, poisson=True)
    for k, (member, chance) in enumerate(zip(members, (0.2, 1.0, 1 / 3), strict=True)):
        drawn = [set(plan.index[t, k, : plan.count[t, k]].tolist()) for t in range(400)]
        assert all(len(batch) == int(plan.count[t, k]) for t, batch in enumerate(drawn))
        counts = np.array([sum(example in batch for batch in drawn) for example in member.tolist()])
        # Each count is binomial; the bound is five standard deviations.
        assert (abs(counts - 400 * chance) <= 5 * np.sqrt(400 * chance * (1 - chance)) + 1e-9).all()
        variance = 400 * len(member) * chance * (1 - chance)
        assert abs(counts.sum() - 400 * len(member) * chance) <= 5 * np.sqrt(variance) + 1e-9
        alone = schedule(work(recipe, sizes[[k]], clients[[k]], 0, 1), [member], clients[[k]], 10, 0, 1, poisson=True)
        assert [set(alone.index[t, 0, : alone.count[t, 0]].tolist()) for t in range(400)] == drawn
    # Two examples of a client are in a batch together as often as chance has it.
    together = sum({100, 101} <= set(plan.index[t, 0, : plan.count[t, 0]].tolist()) for t in range(400))
    assert abs(together - 400 * 0.04) < 5 * np.sqrt(400 * 0.04)


def _by_chance(examples: int, steps: int, batch_size: int = 10, round: int = 1):
    done = work(Recipe(batch_size=batch_size, steps=steps), np.array([examples]), np.array([7]), 0, round)
    return schedule(done, [np.arange(examples)], np.array([7]), batch_size, 0, round, poisson=True)


def test_poisson_batches_may_be_empty_while_the_client_still_trains():
    plan = _by_chance(examples=20, steps=500, batch_size=1)
    empty = int((plan.count == 0).sum())
    expected = 500 * 0.95**20
    assert abs(empty - expected) < 5 * (expected * (1 - 0.95**20)) ** 0.5
    assert plan.active == [1] * 500
    assert plan.mask(int((plan.count[:, 0] == 0).nonzero()[0]), 1).sum() == 0


def test_sizes_of_poisson_batches_are_binomial():
    """Each is the sum of 1,000 draws of chance 0.01: mean 10, variance 9.9, and some are twice the batch size."""
    count = _by_chance(examples=1000, steps=5000).count[:, 0].double()
    assert abs(float(count.mean()) - 10) < 5 * (9.9 / 5000) ** 0.5
    assert abs(float(count.var()) - 9.9) < 5 * 9.9 * (2 / 5000) ** 0.5
    assert count.max() >= 20


def test_a_batch_size_of_all_examples_or_more_takes_all_of_them_every_time():
    for batch_size in (12, 50):
        plan = _by_chance(examples=12, steps=30, batch_size=batch_size)
        assert plan.index[:, 0].tolist() == [list(range(12))] * 30
        assert (plan.count == 12).all()


def test_poisson_batches_are_drawn_anew_each_round_and_go_on_as_before_with_more_steps():
    def batches(plan):
        return [frozenset(plan.index[t, 0, : plan.count[t, 0]].tolist()) for t in range(20)]

    drawn = []
    for round in range(1, 21):
        first = batches(_by_chance(60, 20, round=round))
        assert batches(_by_chance(60, 40, round=round)) == first
        drawn += first
    assert len(set(drawn)) > 0.99 * len(drawn)


def test_poisson_batches_of_a_large_client_cost_by_what_is_drawn():
    """2,500 million chances of being drawn, a quarter of a million examples drawn."""
    plan = _by_chance(examples=100_000, steps=25_000)
    assert abs(int(plan.count.sum()) - 250_000) < 5 * 500
    taken = np.bincount(plan.index[torch.arange(plan.index.shape[2]) < plan.count[..., None]], minlength=100_000)
    assert abs(taken[:50_000].sum() - 125_000) < 5 * 354
