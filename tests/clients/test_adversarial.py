"""Attacks stay in their ball and range and do what their equations say; stacked attacks are those of each client."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clients import randomness
from clients.adversarial import Adversary, attacking, fgsm, gradient_of, input_gradient, pgd, random_start
from clients.errors import RequestError
from clients.normalization import batch_statistics, without_running_statistics
from clients.objective import TaskModule
from clients.recipe import Adversarial
from clients.task import Classification, Task
from clients.weights import Layout
from tests.clients.problems import mlp

EPS = 0.1


class Margin(Task):
    """The logistic loss of a binary model with one output; ``y`` is -1 or 1."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.softplus(-outputs[:, 0] * batch["y"])


@cache
def digits() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """1,285 training and 512 test images of digits, ``[n, 64]`` in [0, 1]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:-512], order[-512:]
    return {"x": x[train], "y": y[train]}, {"x": x[test], "y": y[test]}


@cache
def trained() -> nn.Module:
    """An MLP that tells digits apart, in evaluation mode."""
    train, _ = digits()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(30):
            for index in torch.randperm(len(train["x"])).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(train["x"][index]), train["y"][index]).backward()
                optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def start(x: Tensor) -> Tensor:
    return random_start(0, "test", 0, np.array([0]), tuple(x.shape))[0]


def attacked(name: str, eps: float = EPS, **rest: object) -> Tensor:
    _, test = digits()
    gradient = gradient_of(trained(), Classification(), test)
    if name == "fgsm":
        return fgsm(gradient, test["x"], eps, input_range=(0, 1))
    more = {"steps": 20, "step_size": eps / 4, "start": start(test["x"]), **rest}
    return pgd(gradient, test["x"], eps, input_range=(0, 1), **more)  # type: ignore[arg-type]


@torch.no_grad()
def accuracy(x: Tensor) -> float:
    return float((trained()(x).argmax(1) == digits()[1]["y"]).double().mean())


def batch_of(k: int, size: int, shape: tuple[int, ...], classes: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(3)
    x = torch.rand(k, size, *shape, generator=made, dtype=torch.float64)
    return {"x": x, "y": torch.randint(classes, (k, size), generator=made)}


def rows_of(layout: Layout, model: nn.Module, k: int) -> Tensor:
    """Weights that differ from client to client, ``[k, D]``."""
    noise = torch.randn(k, layout.size, generator=torch.Generator().manual_seed(4), dtype=layout.dtype)
    return layout.flatten(model) + 0.1 * noise


def convolutional() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(100, 3),
        )


def dropping() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(16, 4))


def adversary(model: nn.Module, *, stacked: bool, input_range: tuple[float, float] | None = (0, 1), **said: object):
    said = {"eps": EPS, "steps": 3, **said}
    return Adversary(TaskModule(model, Classification()), Layout(model), Adversarial(**said), stacked, input_range, 7)


# The equations.


def test_the_margin_of_a_linear_model_falls_by_eps_times_the_l1_norm_of_its_weights():
    model = nn.Linear(8, 1, dtype=torch.float64)
    batch = batch_of(1, 50, (8,), 2)
    x, y = batch["x"][0], batch["y"][0] * 2 - 1
    gradient = gradient_of(model, Margin(), {"x": x, "y": y})
    with torch.no_grad():
        margin = model(x)[:, 0] * y
        drop = EPS * model.weight.abs().sum()
        for moved in (fgsm(gradient, x, EPS), pgd(gradient, x, EPS, steps=5, step_size=EPS)):
            assert torch.allclose(margin - model(moved)[:, 0] * y, drop.expand(50), rtol=0, atol=1e-14)
        for moved in (fgsm(gradient, x, EPS, targeted=True), pgd(gradient, x, EPS, steps=5, targeted=True)):
            assert torch.allclose(model(moved)[:, 0] * y - margin, drop.expand(50), rtol=0, atol=1e-14)


def test_fgsm_is_that_of_plain_pytorch_bit_by_bit():
    _, test = digits()
    x = test["x"].clone().requires_grad_()
    F.cross_entropy(copy.deepcopy(trained())(x), test["y"]).backward()  # the mean over 2^9, which rounds nothing
    assert x.grad is not None
    assert torch.equal(attacked("fgsm"), (test["x"] + EPS * x.grad.sign()).clamp(0, 1))


def test_one_step_of_pgd_from_the_inputs_by_eps_is_fgsm_bit_by_bit():
    assert torch.equal(attacked("pgd", steps=1, step_size=EPS, start=None), attacked("fgsm"))


def test_pgds_own_step_reaches_the_edge_from_anywhere_in_the_ball():
    x, first = torch.zeros(100), torch.linspace(-1, 1, 100)
    assert torch.equal(pgd(torch.ones_like, x, 0.25, steps=4, start=first), torch.full((100,), 0.25))
    assert torch.equal(pgd(torch.ones_like, x, 0.25, steps=5), torch.full((100,), 0.25))
    by_hand = pgd(torch.ones_like, x.double(), 1.0, steps=10)
    assert torch.equal(by_hand, pgd(torch.ones_like, x.double(), 1.0, steps=10, step_size=0.25))


def test_a_gradient_of_zero_moves_nothing():
    x = torch.rand(2, 3, 4)
    assert torch.equal(fgsm(torch.zeros_like, x, EPS), x)
    assert torch.equal(pgd(torch.zeros_like, x, EPS, steps=3), x)


@settings(max_examples=50, deadline=None)
@given(
    eps=st.floats(0, 2),
    steps=st.integers(1, 4),
    step_size=st.none() | st.floats(0, 3),
    shape=st.sampled_from([(3,), (2, 3), (2, 1, 4), (2, 3, 2, 2)]),
    seed=st.integers(0, 1000),
)
def test_attacks_stay_in_the_ball_and_in_the_range(eps, steps, step_size, shape, seed):
    made = torch.Generator().manual_seed(seed)
    x, first = torch.rand(shape, generator=made), torch.rand(shape, generator=made) * 2 - 1
    before = x.clone()

    def gradient(at: Tensor) -> Tensor:
        assert float(at.min()) >= 0
        assert float(at.max()) <= 1
        return torch.randn(at.shape, generator=made)

    for moved in (
        fgsm(gradient, x, eps, input_range=(0, 1)),
        pgd(gradient, x, eps, steps=steps, step_size=step_size, start=first, input_range=(0, 1)),
    ):
        assert float((moved - x).abs().max()) <= eps + 1e-7
        assert float(moved.min()) >= 0
        assert float(moved.max()) <= 1
    assert torch.equal(x, before)


def test_no_graph_comes_in_or_out():
    x = torch.rand(4, 12, requires_grad=True)
    gradient = gradient_of(mlp(), Classification(), {"x": x, "y": torch.zeros(4, dtype=torch.long)})
    for moved in (fgsm(gradient, x, EPS), pgd(gradient, x, EPS, steps=2)):
        assert not moved.requires_grad
    assert x.grad is None
    # A gradient may be written as one likes, also under no_grad.
    with torch.no_grad():
        moved = pgd(lambda at: torch.autograd.grad(at.requires_grad_().sum(), at)[0], x, EPS, steps=2)
    assert torch.allclose(moved, x + EPS)
    assert not moved.requires_grad


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_a_radius_that_is_none_is_refused(eps):
    with pytest.raises(RequestError, match="eps"):
        fgsm(torch.ones_like, torch.rand(3), eps)
    with pytest.raises(RequestError, match="eps"):
        pgd(torch.ones_like, torch.rand(3), eps, steps=1)


def test_other_senseless_settings_are_refused():
    with pytest.raises(RequestError, match="steps = 0"):
        pgd(torch.ones_like, torch.rand(3), EPS, steps=0)
    with pytest.raises(RequestError, match="step_size = -1"):
        pgd(torch.ones_like, torch.rand(3), EPS, steps=1, step_size=-1)
    with pytest.raises(RequestError, match="inputs are int64"):
        fgsm(torch.ones_like, torch.arange(3), EPS)


# On digits.


def test_pgd_does_at_least_as_much_harm_as_fgsm_and_that_more_than_none():
    clean, once, often = accuracy(digits()[1]["x"]), accuracy(attacked("fgsm")), accuracy(attacked("pgd"))
    assert clean > 0.95
    assert often <= once < clean - 0.2


def test_a_larger_ball_and_more_steps_leave_no_more_right():
    by_eps = [accuracy(attacked("pgd", eps)) for eps in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)]
    assert by_eps == sorted(by_eps, reverse=True)
    assert by_eps[0] == accuracy(digits()[1]["x"])
    assert by_eps[-1] == 0
    by_steps = [accuracy(attacked("pgd", steps=steps)) for steps in (1, 2, 5, 20, 40)]
    assert by_steps == sorted(by_steps, reverse=True)
    assert by_steps[-1] < by_steps[0]


# Starts.


def test_a_start_depends_on_the_client_and_not_on_who_else_is_there_or_on_padding():
    many = random_start(0, "a", 2, np.array([5, 9, 1]), (6, 2, 2))
    assert many.dtype == torch.float32
    assert torch.equal(many[1], random_start(0, "a", 2, np.array([9]), (6, 2, 2))[0])
    assert torch.equal(many[:, :4], random_start(0, "a", 2, np.array([5, 9, 1]), (4, 2, 2)))
    assert torch.equal(many[:, 2:], random_start(0, "a", 2, np.array([5, 9, 1]), (4, 2, 2), draw=8))
    others = [(1, "a", 2), (0, "b", 2), (0, "a", 3)]
    assert not any(torch.equal(many, random_start(*key, np.array([5, 9, 1]), (6, 2, 2))) for key in others)


def test_starts_are_uniform_in_the_ball():
    found = random_start(0, "a", 0, np.arange(4), (100, 100))
    assert float(found.abs().max()) <= 1
    # Mean and variance of 40,000 such draws: standard errors 0.0029 and 0.0015.
    assert abs(float(found.mean())) < 0.012
    assert abs(float(found.var()) - 1 / 3) < 0.006
    exact = 2 * randomness.uniforms(randomness.keys(0, "a", 0, np.array([3])), 10_000) - 1
    assert np.abs(found[3].flatten().numpy() - exact[0]).max() < 1e-6


# Gradients.


@pytest.mark.parametrize("build", [convolutional, dropping], ids=["batch norm", "dropout"])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "loop"])
def test_attacking_leaves_gradients_modes_statistics_and_torchs_generator_alone(build, stacked):
    model = build().double().train()
    model[-1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    modes = [module.training for module in model.modules()]
    held = {name: value.clone() for name, value in model.state_dict().items()}
    batch = batch_of(2, 5, (2, 5, 5) if build is convolutional else (6,), 3)
    before = {name: value.clone() for name, value in batch.items()}
    state = torch.random.get_rng_state()
    layout = Layout(model)
    with torch.no_grad():
        made = adversary(model, stacked=stacked)(
            rows_of(layout, model, 2), batch, torch.tensor([5, 5]), 1, np.arange(2), 0
        )
    assert not torch.equal(made["x"], batch["x"])
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    assert all(bool((parameter.grad == 3.0).all()) for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batch_norm_is_attacked_as_it_is_trained_and_dropout_is_off():
    model = convolutional().double()
    batch = batch_of(1, 5, (2, 5, 5), 3)
    alone = {name: column[0] for name, column in batch.items()}
    plain = copy.deepcopy(model).train()
    plain[3].p = 0.0
    x = alone["x"].clone().requires_grad_()
    F.cross_entropy(plain(x), alone["y"], reduction="sum").backward()
    assert x.grad is not None
    found = input_gradient(TaskModule(model.train(), Classification()), {}, batch, stacked=False)[0]
    assert torch.allclose(found, x.grad, atol=1e-12)
    # A model that is judged with its running statistics is attacked with them, and by the batch where it is so judged.
    model.eval()
    gradient = gradient_of(model, Classification(), alone)
    (judged,) = torch.autograd.grad(F.cross_entropy(model(x), alone["y"], reduction="sum"), x)
    assert torch.equal(gradient(alone["x"]), judged)
    with batch_statistics(model):
        assert torch.allclose(gradient(alone["x"]), x.grad, atol=1e-12)
    assert torch.equal(gradient(alone["x"]), judged)


def test_modes_are_restored_when_a_model_raises():
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            assert self.norm.training
            assert not self.norm.track_running_stats
            assert not self.drop.training
            raise ArithmeticError

    model = Failing().train()
    with pytest.raises(ArithmeticError), attacking(model):
        model(torch.rand(2, 3))
    assert all(module.training for module in model.modules())
    assert model.norm.track_running_stats


def test_a_client_alone_of_a_stack_has_the_gradient_of_its_own_loss_and_masked_examples_have_none():
    model, k = mlp().double(), 3
    batch, mask = batch_of(k, 6, (12,), 4), torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    layout = Layout(model)
    rows = rows_of(layout, model, k)
    module = TaskModule(model, Classification())
    with torch.no_grad():
        tensors = layout.unflatten(rows)
        stacked = input_gradient(module, tensors, batch, mask, stacked=True)
        loop = input_gradient(module, tensors, batch, mask, stacked=False)
    assert torch.allclose(stacked, loop, atol=1e-12)
    assert not stacked[~mask].any()
    for i, count in enumerate(mask.sum(1).tolist()):
        own = copy.deepcopy(model)
        layout.load(own, rows[i])
        x = batch["x"][i, :count].clone().requires_grad_()
        F.cross_entropy(own(x), batch["y"][i, :count], reduction="sum").backward()
        assert torch.allclose(stacked[i, :count], x.grad, atol=1e-12)


def test_a_model_may_change_its_inputs_in_place_or_ignore_them():
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.mul_(0.5))

    batch = {name: column.float() if name == "x" else column for name, column in batch_of(2, 4, (12,), 4).items()}
    before = batch["x"].clone()
    for stacked in (True, False):
        model = Halving()
        found = input_gradient(
            TaskModule(model, Classification()),
            {name: value.detach().expand(2, *value.shape) for name, value in model.named_parameters()},
            batch,
            stacked=stacked,
        )
        assert torch.equal(batch["x"], before)
        assert bool(found.any())


class Coarse(nn.Module):
    """Sees of its inputs whether they are large."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x > 0.5).to(x.dtype))


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "loop"])
def test_where_the_loss_does_not_depend_on_an_input_the_gradient_is_zero(stacked):
    module, batch = TaskModule(Coarse().double(), Classification()), batch_of(2, 4, (12,), 4)
    rows = {name: value.detach().expand(2, *value.shape) for name, value in module.model.named_parameters()}
    for tensors in (rows,) if stacked else (rows, {}):  # {}: the weights of the model itself, which could be trained
        found = input_gradient(module, tensors, batch, stacked=stacked)
        assert torch.equal(found, torch.zeros_like(batch["x"]))
        assert not found.requires_grad


# Training.


@pytest.mark.parametrize("said", [{"attack": "fgsm"}, {}, {"random_start": False}, {"fraction": 0.5}], ids=str)
@pytest.mark.parametrize("build", [dropping, mlp], ids=["dropout", "plain"])
def test_stacked_adversarial_examples_are_those_of_each_client(build, said):
    model = build().train()
    width = 6 if build is dropping else 12
    counts = torch.tensor([7, 1, 4, 0])
    batch = batch_of(4, 7, (width,), 4) | {"other": torch.arange(28).view(4, 7)}
    batch["x"] = batch["x"].float()
    layout, clients = Layout(model), np.array([3, 8, 2, 11])
    rows = rows_of(layout, model, 4)
    stacked = adversary(model, stacked=True, **said)(rows, batch, counts, 2, clients, 5)
    assert stacked["other"] is batch["other"]
    assert stacked["y"] is batch["y"]
    for i, count in enumerate(counts.tolist()):
        share = -(-count // 2) if "fraction" in said else count
        assert torch.equal(stacked["x"][i, share:], batch["x"][i, share:])  # masked ones among them
        moved = (stacked["x"][i, :share] - batch["x"][i, :share]).abs()
        assert bool((moved.amax(1) > EPS / 2).all())
        assert float(moved.max() if count else 0) <= EPS + 1e-7
        assert float(stacked["x"].min()) >= 0
        assert float(stacked["x"].max()) <= 1
        # As the loop has it: this client, and no more of its batch than is real.
        one = {name: column[i : i + 1, :count] for name, column in batch.items()}
        alone = adversary(model, stacked=False, **said)(
            rows[i : i + 1], one, counts[i : i + 1], 2, clients[i : i + 1], 5
        )
        assert torch.allclose(stacked["x"][i, :count], alone["x"][0], atol=1e-6)


def test_batch_norm_sees_the_whole_batch_when_a_part_is_attacked():
    model = without_running_statistics(convolutional().double()).train()
    batch, layout = batch_of(2, 6, (2, 5, 5), 3), Layout(model)
    rows, counts = rows_of(layout, model, 2), torch.tensor([6, 6])
    found = {
        stacked: adversary(model, stacked=stacked, attack="fgsm", fraction=0.1)(
            rows, batch, counts, 1, np.arange(2), 0
        )["x"]
        for stacked in (True, False)
    }
    assert torch.allclose(found[True], found[False], atol=1e-12)
    assert torch.equal(found[True][:, 1:], batch["x"][:, 1:])
    plain = copy.deepcopy(model)
    plain[3].p = 0.0
    for i in range(2):
        layout.load(plain, rows[i])
        x = batch["x"][i].clone().requires_grad_()
        F.cross_entropy(plain(x), batch["y"][i], reduction="none")[0].backward()
        assert x.grad is not None
        by_hand = (batch["x"][i] + EPS * x.grad.sign())[0].clamp(0, 1)
        assert torch.allclose(found[True][i, 0], by_hand, atol=1e-12)


def test_attention_is_attacked_by_its_layers_and_not_by_the_kernel_that_has_no_derivative():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3)).double().train()
    layout, batch, counts = Layout(model), batch_of(2, 4, (5, 8), 3), torch.tensor([4, 2])
    rows = rows_of(layout, model, 2)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        stacked, loop = (
            adversary(model, stacked=stacked)(rows, batch, counts, 1, np.arange(2), 0)["x"] for stacked in (True, False)
        )
    assert torch.allclose(stacked, loop, atol=1e-12)
    assert bool((stacked[0] != batch["x"][0]).any())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("fraction", "count", "expected"), [(0.28, 25, 7), (0.3, 10, 3), (0.01, 25, 1), (1.0, 7, 7)])
def test_the_share_is_rounded_up_and_not_by_rounding_errors(fraction, count, expected):
    model = mlp().double()
    batch = batch_of(1, 25, (12,), 4)
    made = adversary(model, stacked=False, attack="fgsm", fraction=fraction)(
        Layout(model).flatten(model)[None], batch, torch.tensor([count]), 1, np.array([0]), 0
    )
    assert (made["x"] != batch["x"]).any(2).sum() == expected


def test_random_starts_differ_by_step_round_and_client():
    model = nn.Linear(12, 4, dtype=torch.float64)
    nn.init.zeros_(model.weight)  # no gradient: what is left is the start
    batch, layout = batch_of(2, 3, (12,), 4), Layout(model)
    rows = layout.flatten(model).expand(2, -1)
    made = adversary(model, stacked=True, input_range=None)

    def starts(round: int, step: int) -> Tensor:
        return made(rows, batch, torch.tensor([3, 3]), round, np.arange(2), step)["x"] - batch["x"]

    first = starts(1, 0)
    assert torch.equal(first, starts(1, 0))
    others = [first[0], first[1], *starts(1, 1), *starts(2, 0)]
    assert len({tuple(other.flatten().tolist()) for other in others}) == 6


def test_words_cannot_be_attacked():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 4))
    batch = {"x": torch.zeros(1, 2, 3, dtype=torch.long), "y": torch.zeros(1, 2, dtype=torch.long)}
    with pytest.raises(RequestError, match="inputs are int64"):
        adversary(model, stacked=False)(
            Layout(model).flatten(model)[None], batch, torch.tensor([2]), 1, np.array([0]), 0
        )
