"""FedNova (Wang et al. 2020): its normalisers, its fixed points, and that with equal work it is FedAvg."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
from clients.errors import RequestError
from clients.recipe import Recipe
from strategies.averaging import FedAvg
from strategies.corrections import Prox
from strategies.normalized import FedNova, Normalized, normalizers
from tests.strategies.problems import ETA, A, E
from tests.strategies.quadratics import EXAMPLES, descended, experiment, last_of, play, updates

TAU = (2, 5, 10)


def played(strategy, x, lr):
    """A round from ``x`` ``[1]`` of closed-form local descent, y - e = (1 - eta a)^tau (x - e)."""
    rows = ((E - x) * (1 - (1 - lr * A) ** torch.tensor(TAU)))[:, None]
    return play(strategy, updates(rows, EXAMPLES, TAU), x, recipe=Recipe(batch_size=1, lr=lr))[0]


@pytest.mark.parametrize(
    ("lr", "nova", "avg"),
    [(0.05, 1.704137601128504, 2.900306011921243), (0.005, 2.335155, 3.512), (0.0005, 2.412349, 3.576)],
)
def test_the_objective_inconsistency_table(lr, nova, avg):
    """FedNova's fixed point, sum w (1 - rho) e / sum w (1 - rho) with w = p / tau, nears the optimum 2.421053 as the
    rate falls; FedAvg's, with w = p, does not."""
    p, tau = torch.tensor(EXAMPLES) / torch.tensor(10.0).double(), torch.tensor(TAU)
    rho = (1 - lr * A) ** tau
    for strategy, w, expected, digits in ((FedNova(), p / tau, nova, 1e-6), (FedAvg(), p, avg, 1e-3)):
        x = ((w * (1 - rho) * E).sum() / (w * (1 - rho)).sum())[None]
        assert float(x) == pytest.approx(expected, abs=digits)
        assert float(played(strategy, x, lr)) == pytest.approx(float(x), abs=1e-13)
        assert abs(float(played(strategy, x + 0.1, lr) - x)) < 0.1


def test_rounds_lead_to_the_fixed_point():
    x = torch.zeros(1, dtype=torch.float64)
    for _ in range(120):
        x = played(FedNova(), x, 0.05)
    assert float(x) == pytest.approx(1.704137601128504, abs=1e-12)


def test_fixed_points_in_a_simulation():
    """Batches of one: client k takes n_k steps an epoch, so that p_k / tau_k is the same for all."""
    rho = (1 - ETA * A) ** torch.tensor(EXAMPLES)
    expected = float(((1 - rho) * E).sum() / (1 - rho).sum())
    last = last_of(experiment("fednova", rounds=120, examples=EXAMPLES, batch_size=1, epochs=1))
    assert [client["steps"] for client in last.record.clients] == list(EXAMPLES)
    assert last.x == pytest.approx(expected, abs=1e-12)


def test_steps_in_proportion_to_examples_are_a_scaled_uniform_mean():
    x = torch.tensor([0.3], dtype=torch.float64)
    rows = descended(x, EXAMPLES) - x
    row, _ = play(FedNova(), updates(rows, EXAMPLES, EXAMPLES), x)
    effective = sum(n * n for n in EXAMPLES) / 10
    assert float(row - x) == pytest.approx(float(effective * rows.mean() * 3 / 10), abs=1e-14)


steps = st.lists(st.integers(1, 30), min_size=1, max_size=6)


@given(steps, st.floats(0, 0.95), st.floats(1e-3, 0.9))
@settings(max_examples=50, deadline=None)
def test_normalisers_are_the_papers(tau, rho, pull):
    t, count = torch.tensor(tau).double(), torch.tensor(tau)
    assert torch.equal(normalizers(count), t)
    momentum = (t - rho * (1 - rho**t) / (1 - rho)) / (1 - rho)
    assert torch.allclose(normalizers(count, rho), momentum, rtol=1e-12, atol=0)
    assert torch.allclose(normalizers(count, pull=pull), (1 - (1 - pull) ** t) / pull, rtol=1e-12, atol=0)


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov"])
@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_normalisers_are_how_far_gradients_of_one_carry(optimizer, mu):
    """With a_k near 0 and a_k e_k = -1 every gradient is -1 but for the proximal term's."""
    rest = torch.zeros(1, dtype=torch.float64)
    for count in (1, 2, 7):
        y, m = rest.clone(), rest.clone()
        for _ in range(count):
            g = -1 + mu * y
            m = 0.9 * m + g
            y = y - ETA * (g + 0.9 * m if optimizer == "nesterov" else m)
        found = normalizers(torch.tensor([count]), 0.9, nesterov=optimizer == "nesterov", pull=ETA * mu)
        assert float(found) == pytest.approx(float(y) / ETA, abs=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov"])
@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_with_equal_work_it_is_fedavg(optimizer, mu):
    momentum = 0.0 if optimizer == "sgd" else 0.8
    x = torch.tensor([0.3], dtype=torch.float64)
    rows = descended(x, 7, momentum, mu, nesterov=optimizer == "nesterov") - x
    recipe = Recipe(
        optimizer="sgd" if optimizer == "sgd" else {"name": optimizer, "momentum": momentum}, batch_size=1, lr=ETA
    )
    u = updates(rows, EXAMPLES, 7)
    assert torch.allclose(play(FedNova(mu), u, x, recipe=recipe)[0], play(FedAvg(), u, x)[0], rtol=0, atol=1e-12)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_order_does_not_matter_and_a_client_of_twice_the_examples_is_two_clients(cohort):
    x = torch.tensor([0.3], dtype=torch.float64)

    def result(clients):
        rows, n, tau = zip(*clients, strict=True)
        return float(play(FedNova(), updates(torch.tensor(rows, dtype=torch.float64)[:, None], n, tau), x)[0])

    row, n, tau = cohort[0]
    assert result(cohort[::-1]) == pytest.approx(result(cohort), abs=1e-12)
    assert result([(row, 2 * n, tau), *cohort[1:]]) == pytest.approx(result([*cohort, cohort[0]]), abs=1e-12)
    assert result(cohort[:1]) == pytest.approx(0.3 + row, abs=1e-12)
    scaled = [(3 * row, n, tau) for row, n, tau in cohort]
    assert result(scaled) - 0.3 == pytest.approx(3 * (result(cohort) - 0.3), abs=1e-11)


def test_effective_steps_under_a_proximal_term_as_in_the_authors_code():
    x = torch.tensor([0.3], dtype=torch.float64)
    rows = descended(x, TAU, mu=1.0) - x
    a = (1 - (1 - ETA) ** torch.tensor(TAU).double()) / ETA
    p = torch.tensor(EXAMPLES).double() / 10
    for kind, effective in {"normalizers": (p * a).sum(), "steps": (p * torch.tensor(TAU)).sum()}.items():
        row, _ = play(FedNova(1.0, kind), updates(rows, EXAMPLES, TAU), x)
        assert float(row - x) == pytest.approx(float(effective * (p * rows[:, 0] / a).sum()), abs=1e-13)


def test_the_recipes_own_proximal_term_is_known():
    x = torch.tensor([0.3], dtype=torch.float64)
    u = updates(descended(x, TAU, mu=0.7) - x, EXAMPLES, TAU)
    said = Recipe(batch_size=1, lr=ETA, regularization={"proximal": 0.7})
    assert torch.equal(play(FedNova(), u, x, recipe=said)[0], play(FedNova(0.7), u, x)[0])


def test_arguments_are_left_alone():
    x = torch.tensor([0.3], dtype=torch.float64)
    u = updates(torch.ones(3, 1).double(), EXAMPLES, TAU)
    play(FedNova(), u, x)
    assert torch.equal(u.rows, torch.ones(3, 1).double())
    assert u.sends == {}


WRONG = {
    "adam": ({"optimizer": "adam"}, 0.0, "client.optimizer: 'adam' rescales gradients"),
    "kept": ({"optimizer": "momentum", "optimizer_state": "keep"}, 0.0, "client.optimizer_state: "),
    "own": ({"local_training": "file.py:Own"}, 0.0, "client.local_training: "),
    "step_schedule": ({"step_schedule": "cosine"}, 0.0, "client.step_schedule: "),
    "early_stopping": ({"early_stopping": {}}, 0.0, "client.early_stopping: "),
    "personal_epochs": ({"personal": ["head"], "personal_epochs": 2}, 0.0, "client.personal_epochs: "),
    "schedule": ({"schedule": "cosine"}, 0.1, "client.schedule: "),
    "lr_factors": ({"lr_factors": {"x": 0.5}}, 0.1, "client.lr_factors: "),
    "overshoot": ({"lr": 0.5}, 2.0, "client.lr: under a proximal term, lr mu = 1 must be below 1"),
}


@pytest.mark.parametrize(("client", "mu", "said"), WRONG.values(), ids=WRONG)
def test_a_recipe_whose_normaliser_is_unknown_is_refused(client, mu, said):
    (line,) = Normalized(mu).check(Recipe(**client))
    assert line.startswith(said)


def test_other_recipes_are_not_refused():
    for client in (
        {"optimizer": "nesterov"},
        {"lr_factors": {"x": 0.5}},
        {"schedule": "cosine"},
        {"gradient_clip": 1.0},
    ):
        assert Normalized().check(Recipe(**client)) == []
    assert Normalized(0.1).check(Recipe(schedule={"name": "constant", "warmup": 0})) == []


def test_the_normaliser_and_the_clients_agree_on_the_proximal_term():
    assert FedNova(0.3).correction == Prox(0.3)
    for parts in ({"correction": Prox(0.1)}, {"mu": 0.3, "correction": Prox(0.1)}, {"aggregator": Normalized(0.2)}):
        with pytest.raises(RequestError, match="normalises for another proximal term"):
            FedNova(**parts)


def test_a_run_is_refused_with_the_reason():
    with pytest.raises(RequestError, match=r"client\.optimizer: 'adam' rescales"):
        last_of(experiment("fednova", rounds=1, optimizer="adam"))


def test_every_engine_gives_the_same_bits(tmp_path):
    said = experiment({"name": "fednova", "clients_per_round": 2}, rounds=4, examples=EXAMPLES, batch_size=1, epochs=1)
    inline = fedsim.run(said, out=tmp_path / "inline", engine="inline")
    processes = fedsim.run(said, out=tmp_path / "processes", engine="processes", workers=2)
    assert processes.summary["weights_sha256"] == inline.summary["weights_sha256"]
    stacked = said.model_copy(update={"client": said.client.model_copy(update={"execution": "stacked"})})
    assert last_of(stacked).x == pytest.approx(float(inline.row), abs=1e-13)
