"""DP-SGD on clients: clipping, noise and accounting are Opacus' own, and the loop around them is the plain one."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPLSTM, DPMultiheadAttention
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import nn

import fedsim
from clients import randomness
from clients.batches import Work, schedule
from clients.dp_sgd import PrivateExecutor, check_private, releases, spent
from clients.errors import RequestError, RunError
from clients.hooks import Correction, Variables
from clients.local_state import RELEASES
from clients.objective import Objective, TaskModule
from clients.optimizers import Adam, Sgd
from clients.recipe import DpSgd, Recipe
from clients.task import Classification, Tokens
from clients.weights import Layout, share_all_but
from fedsim.assembly import assemble
from tests.clients.problems import SIZES, apart, digits_like, members, mlp, trainer

CLIENTS = np.arange(len(SIZES))


class Step:
    """One private gradient at a time, of a model's own weights.

    Without further settings it neither clips nor adds noise, and divides by the batch's own size.
    """

    def __init__(self, model, task=None, correction=None, layout=None, **dp):
        settings = {"noise_multiplier": 0.0, "max_grad_norm": 1e9, "sampling": "shuffle", **dp}
        layout = layout or Layout(model)
        module = TaskModule(copy.deepcopy(model).train(), task or Classification())
        self.row = layout.all.flatten(model)[None]
        self.executor = PrivateExecutor(Objective(module, layout, correction or Correction()), DpSgd(**settings))
        self.loss = torch.nan

    def __call__(self, batch, key=(0, 1, 0), expected=10.0):
        self.executor.begin(*key, expected)
        found = torch.full_like(self.row, torch.nan)
        v = Variables(self.row[0].clone())
        with torch.no_grad():
            columns = {name: column[None] for name, column in batch.items()}
            (self.loss,) = self.executor.gradients(self.row, found, columns, None, v).tolist()
        return found[0]


def examples(count=6, shape=(12,), words=0, seed=0):
    made = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=made)
    if words:
        return {"x": torch.randint(words, (count, *shape), generator=made), "y": y}
    return {"x": torch.randn(count, *shape, generator=made), "y": y}


def one_by_one(model, batch, norm, task=None):
    """The mean of the examples' gradients, each found alone and clipped by hand."""
    model, task, total = copy.deepcopy(model).train(), task or Classification(), 0
    for i in range(len(batch["y"])):
        one = {name: column[i : i + 1] for name, column in batch.items()}
        model.zero_grad()
        trained = [p for p in model.parameters() if p.requires_grad]
        found = task.loss(task.forward(model, one), one)
        (found[0] if isinstance(found, tuple) else found).sum().backward()
        flat = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in trained]
        gradient = torch.cat([part.reshape(-1) for part in flat])
        total = total + gradient * min(1.0, norm / (float(gradient.norm()) + 1e-6))
    return total / len(batch["y"])


def private(model=None, optimizer=None, clients=CLIENTS, pool=None, **dp):
    """One round of private training, and the trainer that did it."""
    recipe = Recipe(batch_size=10, epochs=2, lr=0.1, dp_sgd={"noise_multiplier": 1.0, **dp})
    model = model or mlp()
    training = trainer(model, pool or digits_like(), stacked=False, recipe=recipe, optimizer=optimizer)
    trained = training.train(clients, training.layout.flatten(model), 1)
    assert not trained.failures, trained.failures[0].traceback
    return trained, training


@pytest.mark.parametrize("optimizer", [Sgd(), Adam()], ids=lambda o: type(o).__name__)
def test_without_noise_and_clipping_it_is_plain_training(optimizer):
    # Adam makes whole steps of the rounding of gradients near zero, which float64 has none of.
    model = mlp() if isinstance(optimizer, Sgd) else mlp().double()
    dp, _ = private(model, optimizer, noise_multiplier=0.0, max_grad_norm=1e9, sampling="shuffle")
    recipe = Recipe(batch_size=10, epochs=2, lr=0.1)
    plain = trainer(model, digits_like(), stacked=False, recipe=recipe, optimizer=optimizer)
    expected = plain.train(CLIENTS, plain.layout.flatten(model), 1)
    assert float((dp.updates.rows - expected.updates.rows).abs().max()) < 1e-6
    assert torch.allclose(dp.loss, expected.loss, atol=1e-5)


def test_at_rate_one_every_poisson_batch_is_the_whole_of_the_data():
    recipe = Recipe(batch_size=40, steps=5, lr=0.1)
    chances = recipe.model_copy(update={"dp_sgd": DpSgd(noise_multiplier=0.0, max_grad_norm=1e9)})
    dp, plain = (trainer(mlp(), digits_like(), stacked=False, recipe=made) for made in (chances, recipe))
    found, expected = (t.train(CLIENTS, t.layout.flatten(mlp()), 1) for t in (dp, plain))
    assert not found.failures
    assert float((found.updates.rows - expected.updates.rows).abs().max()) < 1e-6


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_step_is_opacus_own_on_the_same_batches_and_noise():
    trained, _ = private(max_grad_norm=0.3, sampling="poisson")
    client, model = 3, mlp()
    recipe = Recipe(batch_size=10, epochs=2, lr=0.1)
    done = trainer(model, digits_like(), stacked=False, recipe=recipe).work(np.array([client]), 1)
    plan = schedule(done, [members()(client)], np.array([client]), 10, 0, 1, poisson=True)
    start = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=0.3,
        expected_batch_size=10,
        generator=randomness.generator(0, "dp_sgd", 1, client),
    )
    for step in range(len(plan.count)):
        batch = digits_like().take(plan.index[step, 0, : plan.count[step, 0]])
        optimizer.zero_grad()
        F.cross_entropy(wrapped(batch["x"]), batch["y"]).backward()
        optimizer.step()
    end = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.allclose(trained.updates.rows[client], end - start, atol=1e-6)


def test_one_examples_influence_is_bounded_by_the_clipping_norm():
    """Without noise, a full batch: another example in one's place moves the gradient by at most 2 C / L, lr 1 of it."""
    moved = []
    for scale in (1.0, 1e4):
        pool = digits_like()
        pool.columns["x"][members()(1)[5]] *= scale
        recipe = Recipe(
            batch_size=40,
            epochs=1,
            lr=1.0,
            dp_sgd={"noise_multiplier": 0.0, "max_grad_norm": 0.5, "sampling": "shuffle"},
        )
        training = trainer(mlp(), pool, stacked=False, recipe=recipe)
        moved.append(training.train(np.array([1]), training.layout.flatten(mlp()), 1).updates.rows[0])
    assert 0 < float((moved[0] - moved[1]).norm()) <= 2 * 0.5 / 40 + 1e-6
    assert float(moved[0].norm()) <= 0.5 + 1e-6


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    place=st.integers(0, 5),
    scale=st.sampled_from([0.0, 1.0, 1e6, 1e25, math.inf, math.nan]),
    norm=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_the_sum_moves_by_the_clipping_norm_at_most(seed, place, scale, norm):
    """Under Poisson sampling, divisor 10: an example away moves it by ``C / 10`` at most, another one by twice that."""
    step, batch = Step(mlp(), max_grad_norm=norm, sampling="poisson"), examples(seed=seed)
    other = {name: column.clone() for name, column in batch.items()}
    other["x"][place] = scale
    without = {name: column[torch.arange(6) != place] for name, column in batch.items()}
    here, away, moved = step(batch), step(without), step(other)
    assert bool(torch.isfinite(moved).all())
    assert float((here - away).norm()) <= norm / 10 * (1 + 1e-4)
    assert float((here - moved).norm()) <= 2 * norm / 10 * (1 + 1e-4)


def test_an_example_whose_gradient_is_not_finite_gives_nothing_and_costs_nobody():
    step, batch = Step(mlp(), max_grad_norm=0.5, sampling="poisson"), examples()
    broken = {**batch, "x": batch["x"].clone()}
    broken["x"][2] = math.nan
    without = {name: column[torch.arange(6) != 2] for name, column in batch.items()}
    assert torch.allclose(step(broken), step(without), atol=1e-7)


class Silent(nn.Module):
    """Its loss does not depend on its many parameters, so that their gradients are noise alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.idle = nn.Linear(200, 100)

    def forward(self, x):
        return self.linear(x) + 0 * self.idle(x.new_zeros(len(x), 200)).sum(-1, keepdim=True)


def test_the_noise_has_the_stated_spread_and_is_keyed():
    model = Silent()
    recipe = Recipe(batch_size=40, epochs=1, lr=1.0, dp_sgd={"noise_multiplier": 2.0, "max_grad_norm": 0.5})
    training = trainer(model, digits_like(), stacked=False, recipe=recipe)
    weights = training.layout.flatten(model)
    first = training.train(np.array([1]), weights, 1).updates.rows[0]
    noise = first[training.layout.slots[2].slice]
    expected = 2.0 * 0.5 / 40
    assert abs(float(noise.std()) - expected) < 4 * expected / math.sqrt(2 * len(noise))
    assert torch.equal(first, training.train(np.array([1]), weights, 1).updates.rows[0])
    for other in (training.train(np.array([1]), weights, 2), training.train(np.array([4]), weights, 1)):
        assert apart(other.updates.rows[0][training.layout.slots[2].slice], noise) > 1


def test_empty_batches_are_steps_of_noise_alone():
    recipe = Recipe(batch_size=1, steps=40, lr=0.1, dp_sgd={"noise_multiplier": 1.0})
    training = trainer(mlp(), digits_like(), stacked=False, recipe=recipe)
    done = training.work(np.array([0]), 1)
    plan = schedule(done, [members()(0)], np.array([0]), 1, 0, 1, poisson=True)
    assert (plan.count[:, 0] == 0).any()
    trained = training.train(np.array([0]), training.layout.flatten(mlp()), 1)
    assert not trained.failures
    assert bool(torch.isfinite(trained.loss).all())
    assert int(trained.updates.steps[0]) == 40


def test_an_empty_batch_is_noise_of_the_stated_spread_without_a_forward_pass():
    class Refusing(nn.Linear):
        def forward(self, x):
            raise AssertionError

    step = Step(Refusing(100, 300), noise_multiplier=3.0, max_grad_norm=0.5, sampling="poisson")
    nothing = {"x": torch.zeros(0, 100), "y": torch.zeros(0, dtype=torch.int64)}
    noise, expected = step(nothing, expected=12.0), 3.0 * 0.5 / 12.0
    # n times the variance over its expectation is chi-square of n degrees of freedom, whose deviation is sqrt(2 n).
    n = len(noise)
    assert abs(float(noise.double().square().sum()) / expected**2 - n) < 4 * math.sqrt(2 * n)
    assert abs(float(noise.mean())) < 4 * expected / math.sqrt(n)
    assert step.loss == 0.0
    assert torch.equal(noise, step(nothing, expected=12.0))
    others = [step(nothing, key, expected=12.0) for key in ((1, 1, 0), (0, 2, 0), (0, 1, 1))]
    assert all(apart(other, noise) > 1 for other in others)


def test_personal_parameters_are_trained_privately_too():
    model, batch = mlp(), examples()
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 0.3}
    whole, split = (
        Step(model, layout=layout, **settings)(batch)
        for layout in (Layout(model), Layout(model, share_all_but(("0.*",), model)))
    )
    first = Layout(model).slots[2].start  # the personal ones come last
    quiet, apart_ = (
        Step(model, layout=layout, max_grad_norm=0.3)(batch)
        for layout in (Layout(model), Layout(model, share_all_but(("0.*",), model)))
    )
    assert torch.allclose(quiet, torch.cat([apart_[-first:], apart_[:-first]]), atol=1e-7)
    for row, clean in ((whole, quiet), (split, apart_)):
        assert abs(float((row - clean).std()) / (0.3 / 6) - 1) < 4 / math.sqrt(2 * len(row))


@pytest.mark.parametrize(
    ("rate", "noise", "count", "delta", "rdp", "prv"),
    [
        (0.01, 1.0, 1000, 1e-5, 2.101365, 1.8384),
        (0.01, 1.1, 10000, 1e-5, 5.631992, 5.2029),
        (0.01, 4.0, 10000, 1e-5, 1.035490, 0.9569),
        (0.1, 2.0, 100, 1e-3, 1.799003, 1.5541),
        (1.0, 1.0, 1, 1e-5, 4.728507, 4.3874),
        (1.0, 10.0, 100, 1e-5, 4.728507, 4.3874),
    ],
)
def test_the_accountants_give_known_values(rate, noise, count, delta, rdp, prv):
    found = spent(DpSgd(noise_multiplier=noise, delta=delta), rate, count)
    tight = spent(DpSgd(noise_multiplier=noise, delta=delta, accountant="prv"), rate, count)
    assert abs(found - rdp) < 3e-3 * rdp
    assert abs(tight - prv) < 1.5e-2
    assert tight <= found + 0.01


def test_orders_and_divergences_give_the_published_moments_accountant():
    """Abadi et al. 2016: q = 0.01, sigma = 4, 10,000 steps, delta = 1e-5, epsilon 1.26 by their conversion."""
    orders = np.arange(2, 65)
    divergences = compute_rdp(q=0.01, noise_multiplier=4.0, steps=10_000, orders=list(orders))
    published = float((divergences + math.log(1e5) / (orders - 1)).min())
    assert abs(published - 1.26) < 5e-3
    # Balle et al. 2020 convert the same divergences more tightly.
    assert 0.8 * published < spent(DpSgd(noise_multiplier=4.0), 0.01, 10_000) < published


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_accounting_is_quiet_and_ends_for_any_noise(accountant):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for noise, rate, count in [(1e-3, 0.5, 10), (0.1, 0.2, 500), (10.0, 1.0, 1), (1e4, 0.1, 10), (200.0, 0.01, 10)]:
            found = spent(DpSgd(noise_multiplier=noise, accountant=accountant), rate, count)
            assert 0 < found < math.inf
            assert found <= spent(DpSgd(noise_multiplier=noise), rate, count)


def test_releases_and_no_noise():
    dp = DpSgd(noise_multiplier=1.0)

    def work_of(examples, per_epoch, steps):
        return Work(*(np.array([number]) for number in (examples, per_epoch, steps)))

    assert releases(dp, work_of(40, 4, 9), 10) == (0.25, 9)
    assert releases(dp, work_of(4, 1, 3), 10) == (1.0, 3)
    assert releases(dp.model_copy(update={"sampling": "shuffle"}), work_of(40, 4, 9), 10) == (1.0, 3)
    assert spent(DpSgd(noise_multiplier=0.0), 0.1, 5) == math.inf
    assert spent(dp, 0.1, 0) == 0.0
    assert releases(dp, work_of(0, 0, 0), 10)[1] == 0


def test_a_clients_accountant_goes_on_from_round_to_round():
    trained, training = private(clients=np.array([3]))
    assert float(trained.state[RELEASES]) == 8
    again = training.train(np.array([3]), training.layout.flatten(mlp()), 2, trained.state)
    assert float(again.state[RELEASES]) == 16
    dp, rate = training.recipe.dp_sgd, 10 / 31
    assert float(trained.report["epsilon"]) == spent(dp, rate, 8)
    assert float(again.report["epsilon"]) == spent(dp, rate, 16)


class Calling(nn.Module):
    """A model whose forward is a function of it and its inputs."""

    def __init__(self, call, **modules):
        super().__init__()
        self.call = call
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.call(self, x)


def tied(padding=None):
    words = nn.Embedding(11, 8, padding_idx=padding)
    model = Calling(lambda m, x: m.out(m.words(x).mean(1)), words=words, out=nn.Linear(8, 11))
    model.out.weight = model.words.weight
    return model


class Token(nn.Module):
    """A parameter beside layers, for which Opacus calls the whole module anew."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.out = nn.Sequential(nn.Dropout(dropout), nn.Linear(8, 4))

    def forward(self, x):
        return self.out((x + self.token).tanh().mean(1))


def attending(layer):
    return Calling(lambda m, x: m.out(m.layer(x).mean(1)), layer=layer, out=nn.Linear(8, 4))


VECTORS, SERIES, IMAGES, WORDS = {}, {"shape": (5, 8)}, {"shape": (3, 8, 8)}, {"shape": (5,), "words": 11}
MODELS = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding="same", groups=3),
            nn.GroupNorm(2, 6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 4, 3, stride=2, dilation=2),
            nn.InstanceNorm2d(4, affine=True),
            nn.ConvTranspose2d(4, 4, 2),
            nn.Flatten(),
            nn.Linear(36, 4),
        ),
        IMAGES,
    ),
    "convolution over time": (
        lambda: nn.Sequential(nn.Conv1d(5, 4, 3, padding=1), nn.Flatten(), nn.Linear(32, 4)),
        SERIES,
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)), VECTORS),
    "root mean square norm": (lambda: nn.Sequential(nn.Linear(12, 8), nn.RMSNorm(8), nn.Linear(8, 4)), VECTORS),
    "no rule of Opacus": (lambda: nn.Sequential(nn.Linear(12, 8), nn.PReLU(), nn.Linear(8, 4)), VECTORS),
    "a parameter beside layers": (Token, SERIES),
    "residual in place": (
        lambda: Calling(lambda m, x: m.out(m.layer(x).add_(x).relu_()), layer=nn.Linear(12, 12), out=nn.Linear(12, 4)),
        VECTORS,
    ),
    "a layer used twice": (
        lambda: Calling(lambda m, x: m.out(m.layer(m.layer(x).tanh())), layer=nn.Linear(12, 12), out=nn.Linear(12, 4)),
        VECTORS,
    ),
    "a layer used once for nothing": (
        lambda: Calling(lambda m, x: (m.out(x + 1), m.out(x))[1], out=nn.Linear(12, 4)),
        VECTORS,
    ),
    "a layer not used": (lambda: Calling(lambda m, x: m.out(x), idle=nn.Linear(3, 3), out=nn.Linear(12, 4)), VECTORS),
    "words with padding": (
        lambda: Calling(
            lambda m, x: m.out(m.words(x).mean(1)), words=nn.Embedding(11, 8, padding_idx=0), out=nn.Linear(8, 4)
        ),
        WORDS,
    ),
    "sparse words": (
        lambda: Calling(
            lambda m, x: m.out(m.words(x).mean(1)), words=nn.Embedding(11, 8, sparse=True), out=nn.Linear(8, 4)
        ),
        WORDS,
    ),
    "tied words": (tied, WORDS),
    "tied words with padding": (lambda: tied(padding=2), WORDS),
    "frozen words with padding": (
        lambda: Calling(
            lambda m, x: m.out(m.words(x).mean(1)),
            words=nn.Embedding(11, 8, padding_idx=2).requires_grad_(False),
            out=nn.Linear(8, 4),
        ),
        WORDS,
    ),
    "LSTM of Opacus": (
        lambda: Calling(
            lambda m, x: m.out(m.layer(x)[0][:, -1]),
            layer=DPLSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True),
            out=nn.Linear(10, 4),
        ),
        SERIES,
    ),
    "LSTM replaced": (
        lambda: ModuleValidator.fix(Recurrent(nn.LSTM(8, 5, batch_first=True))),
        SERIES,
    ),
    "attention of Opacus": (lambda: attending(Self(DPMultiheadAttention(8, 2, batch_first=True))), SERIES),
    "transformer layer replaced": (
        lambda: attending(ModuleValidator.fix(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))),
        SERIES,
    ),
}


class Recurrent(nn.Module):
    """Opacus' replacement copies a model by pickle."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.out = layer, nn.Linear(layer.hidden_size, 4)

    def forward(self, x):
        return self.out(self.layer(x)[0][:, -1])


class Self(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)
def test_per_example_gradients_are_those_of_one_example_at_a_time(make, shape):
    """Private steps without noise against gradients found alone and clipped by hand."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    assert check_private(model) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = Step(model, max_grad_norm=0.1)
        for seed in range(2):
            batch = examples(**shape, seed=seed)
            assert torch.allclose(step(batch), one_by_one(model, batch, 0.1), atol=1e-6)


def test_the_users_model_is_left_as_it_was():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    Step(model, noise_multiplier=1.0)(examples())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(hasattr(parameter, "grad_sample") for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_has_no_noise():
    words = nn.Embedding(11, 8, padding_idx=3)
    model = Calling(lambda m, x: m.out(m.words(x).mean(1)), words=words, out=nn.Linear(8, 4))
    batch = examples(shape=(5,), words=11)
    found = Step(model, noise_multiplier=5.0)(batch)[: 11 * 8].view(11, 8)
    assert (found == 0).all(1).tolist() == [word == 3 for word in range(11)]
    # A row that is trained elsewhere has its noise.
    assert bool((Step(tied(padding=3), noise_multiplier=5.0)(batch)[: 11 * 8].view(11, 8) != 0).all())


def test_examples_count_alike_whatever_weights_the_task_gives_them():
    """Tokens weighs an example by its length, which would couple it with the others through the sum of weights."""
    model = Calling(lambda m, x: m.out(m.words(x)), words=nn.Embedding(11, 8), out=nn.Linear(8, 4))
    batch = examples(shape=(5,), words=11)
    batch["y"] = torch.randint(4, (6, 5), generator=torch.Generator().manual_seed(0))
    batch["y"][:3, 2:] = Tokens.ignore
    assert torch.allclose(Step(model, Tokens(), max_grad_norm=0.1)(batch), one_by_one(model, batch, 0.1, Tokens()))


class Near(Correction):
    """Pulls outputs towards those of the global weights."""

    def loss(self, call, batch, outputs, v):
        return (outputs - call(v.weights + 0.1, batch)).square().sum(-1)


def test_a_corrections_loss_is_part_of_what_is_clipped():
    model, batch = mlp(), examples()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.1

    class Sum(Classification):
        def loss(self, outputs, batch):
            return super().loss(outputs, batch) + (outputs - moved(batch["x"]).detach()).square().sum(-1)

    found = Step(model, correction=Near(), max_grad_norm=0.1)(batch)
    assert torch.allclose(found, one_by_one(model, batch, 0.1, Sum()), atol=1e-6)


def test_a_step_that_failed_leaves_nothing_for_the_next_client():
    class Failing(Classification):
        fails = False

        def loss(self, outputs, batch):
            if self.fails:
                raise ValueError("no loss")
            return super().loss(outputs, batch)

    task, batch = Failing(), examples()
    step = Step(mlp(), task, max_grad_norm=0.1)
    expected = step(batch)
    task.fails = True
    with pytest.raises(ValueError, match="no loss"):
        step(batch)
    task.fails = False
    assert torch.equal(step(batch), expected)


def test_the_first_steps_trial_changes_neither_draws_nor_buffers():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 4))
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("longer", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            self.longer = torch.cat([self.longer, self.calls[None]])
            return self.layers(x)

    model, found = Counting(), []
    for examined in (False, True):
        step = Step(model, noise_multiplier=1.0)
        step.executor.examined = examined
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found.append(step(examples()))
        assert step.executor.objective.module.model.longer.tolist() == [0, 1]
        assert step.executor.examined
    assert torch.equal(*found)


class Following(nn.Module):
    """A buffer that is a moving average of inputs."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(12, 4)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.out(x)


class Contrasting(Classification):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch) + (outputs - outputs.mean(0)).square().sum(-1)


POSITIONS = nn.Embedding(5, 8)


@pytest.mark.parametrize(
    ("make", "task", "shape", "said"),
    [
        (lambda: Calling(lambda m, x: m.out(x - x.mean(0)), out=nn.Linear(12, 4)), None, VECTORS, "mixes examples"),
        (
            lambda: Calling(lambda m, x: m.out(F.batch_norm(x, None, None, training=True)), out=nn.Linear(12, 4)),
            None,
            VECTORS,
            "mixes examples",
        ),
        (mlp, Contrasting(), VECTORS, "mixes examples"),
        (Following, None, VECTORS, "'mean' follows the examples"),
        (
            lambda: Calling(lambda m, x: m.out((x + m.at(torch.arange(5))).mean(1)), at=POSITIONS, out=nn.Linear(8, 4)),
            None,
            SERIES,
            "'at.weight'.*first dimension",
        ),
        (
            lambda: Calling(
                lambda m, x: m.out(m.layer(x.transpose(0, 1)).tanh().mean(0)),
                layer=nn.Linear(8, 8),
                out=nn.Linear(8, 4),
            ),
            None,
            {"shape": (2, 8)},  # as many steps as there are examples on trial: only the values tell
            "do not add up|mixes examples",
        ),
        (
            lambda: Calling(lambda m, x: (m.out(x), m.out(x + 1))[0], out=nn.Linear(12, 4)),
            None,
            VECTORS,
            "'out.weight'.*do not add up",
        ),
        (lambda: Calling(lambda m, x: m.out(input=x), out=nn.Linear(12, 4)), None, VECTORS, "IndexError"),
    ],
    ids=["centred", "functional norm", "loss", "buffer", "positions", "time first", "used for nothing", "keyword"],
)
def test_what_only_a_forward_pass_shows_is_refused_by_the_first_step(make, task, shape, said):
    assert check_private(make()) == []
    with pytest.raises((RequestError, RunError), match=said):
        Step(make(), task)(examples(**shape))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.BatchNorm2d(3), 'model.norm = "group"'),
        (nn.SyncBatchNorm(3), "replace_batch_norm"),
        (nn.InstanceNorm2d(3, track_running_stats=True), "track_running_stats = False"),
        (nn.LSTM(3, 3), "ModuleValidator.fix"),
        (type("Own", (nn.GRU,), {})(3, 3), "opacus.layers"),
        (nn.RNN(3, 3), "opacus.layers.DPRNN"),
        (nn.GRUCell(3, 3), "opacus.layers.DPGRUCell"),
        (nn.MultiheadAttention(4, 2), "ModuleValidator.fix"),
        (nn.TransformerEncoderLayer(4, 2, 8), "ModuleValidator.fix"),
        (nn.Bilinear(3, 3, 3), "needs several inputs"),
        (nn.EmbeddingBag(3, 3), "nn.Embedding"),
        (nn.Embedding(3, 3, max_norm=1.0), "max_norm"),
        (nn.Embedding(3, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Conv2d(3, 3, 3, padding_mode="reflect"), 'use "zeros"'),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False)), "remove the parametrization"),
        (Token(dropout=0.5), "has dropout"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_without_private_gradients_are_refused_by_name_and_with_a_mend(module, said):
    model = nn.Sequential(nn.Linear(3, 3), module)
    (line,) = check_private(model)
    assert line.startswith("client.dp_sgd: ")
    assert "'1" in line
    assert said in line
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    # What is not trained needs no gradients; what mixes examples, or keeps their statistics, is refused all the same.
    kept = isinstance(module, nn.modules.batchnorm._NormBase)
    assert len(check_private(model)) == kept


def test_what_mixes_examples_is_refused_with_the_mend():
    lines = check_private(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert len(lines) == 1
    assert "'1'" in lines[0]
    assert 'model.norm = "group"' in lines[0]
    assert "ModuleValidator.fix" in check_private(nn.LSTM(3, 3))[0]
    made = {"client": {"dp_sgd": {"noise_multiplier": 1.0}}}
    with pytest.raises(RequestError, match="replace_batch_norm"):
        assemble(fedsim.Experiment(model={"name": "mlp", "norm": "batch"}, **made))
    for others, said in [
        ({"execution": "stacked"}, "client by client"),
        ({"precision": "bfloat16"}, "bfloat16"),
        ({"early_stopping": {}}, "validation examples without noise"),
    ]:
        with pytest.raises(RequestError, match=said):
            fedsim.Experiment(
                client={"dp_sgd": {"noise_multiplier": 1.0}, **others}, data={"client_validation_fraction": 0.2}
            )
    with pytest.raises(RequestError, match="delta"):
        assemble(fedsim.Experiment(client={"dp_sgd": {"noise_multiplier": 1.0, "delta": 0.5}}))


def test_a_runs_ledger_has_every_clients_epsilon_and_the_largest(tmp_path):
    def ran(name, engine="inline", workers=None, **dp):
        made = fedsim.Experiment(rounds=3, client={"epochs": 1, "dp_sgd": {"noise_multiplier": 1.0, **dp}})
        return fedsim.run(made, out=tmp_path / name, engine=engine, workers=workers).summary

    found = ran("run")
    clients = fedsim.load(tmp_path / "run").clients
    assert clients["epsilon"].notna().all()
    assert found["epsilon"] == pytest.approx(clients["epsilon"].max())
    assert any("by example" in note and "local trust" in note for note in found["notes"])
    both = ran("two", "processes", 2)
    assert (both["weights_sha256"], both["epsilon"]) == (found["weights_sha256"], found["epsilon"])
    none = ran("none", noise_multiplier=0.0)
    assert none["epsilon"] == math.inf
    assert any("there is no privacy" in note for note in none["notes"])


def test_opacus_is_imported_only_by_those_who_use_it():
    code = (
        "import sys, fedsim, strategies, clients, fedsim.cli, clients.training, fedsim.running;"
        "assert 'torch' in sys.modules; assert 'opacus' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
