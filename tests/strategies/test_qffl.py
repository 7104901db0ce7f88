"""q-FedAvg (Li et al. 2020, "Fair resource allocation"): its step by hand, its limits, that it evens clients out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
from clients.recipe import Recipe
from strategies.averaging import FedAvg
from strategies.fair import Fair, QFedAvg
from strategies.sampling import Sampling, draws
from tests.strategies.problems import ETA, A, E
from tests.strategies.quadratics import descended, experiment, last_of, play, updates

X = torch.tensor([0.5, -1.0], dtype=torch.float64)


def by_hand(x, local, losses, q, L):
    """Algorithm 2's last line in its own letters, from the clients' weights ``[k, d]``."""
    deltas, hs = [], []
    for w, F in zip(local, losses, strict=True):
        moved = L * (x - w)
        deltas.append((F + 1e-10) ** q * moved)
        hs.append(q * (F + 1e-10) ** (q - 1) * float(moved @ moved) + L * (F + 1e-10) ** q)
    return x - sum(deltas) / sum(hs)


numbers = st.floats(-3, 3)


@given(
    st.lists(st.tuples(numbers, numbers, st.floats(0.01, 9)), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.1, 1.0, 2.5, 5.0]),
    st.floats(0.01, 2),
)
@settings(max_examples=60, deadline=None)
def test_a_step_is_the_papers(cohort, q, lr):
    local = torch.tensor([client[:2] for client in cohort], dtype=torch.float64)
    losses = [client[2] for client in cohort]
    u = updates(local - X, tuple(range(1, len(cohort) + 1)), loss_before=torch.tensor(losses, dtype=torch.float64))
    row, _ = play(QFedAvg(q, lr), u, X)
    assert torch.allclose(row, by_hand(X, local, losses, q, 1 / lr), rtol=1e-9, atol=1e-12)


def test_q_0_is_the_unweighted_mean_to_the_bit():
    rows = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    u = updates(rows, (1, 2, 3, 4, 5), loss_before=torch.tensor([0.0, 1, 2, 3, 4]).double())
    assert torch.equal(play(QFedAvg(0.0, 0.3), u, X)[0], play(FedAvg("uniform"), u.replace(sends={}), X)[0])


@given(st.floats(0.1, 50), st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=30, deadline=None)
def test_the_scale_of_the_loss_matters_as_the_formula_says(c, q):
    """F -> cF at fixed updates: F^q L row falls out of both sides but for the first term of h, which is over c."""
    rows, F = torch.tensor([[0.4], [-1.2]], dtype=torch.float64), torch.tensor([0.7, 2.0], dtype=torch.float64)
    L, x = 4.0, torch.zeros(1).double()
    row, _ = play(QFedAvg(q, 1 / L), updates(rows, (1, 1), loss_before=c * F), x)
    above = (F**q * L * rows[:, 0]).sum()
    below = (q * F ** (q - 1) / c * (L * rows[:, 0]) ** 2 + L * F**q).sum()
    assert float(row) == pytest.approx(float(above / below), rel=1e-7)


def test_no_loss_at_all_does_not_break_it():
    u = updates(torch.tensor([[0.4], [0.2]]).double(), (1, 1), loss_before=torch.zeros(2).double())
    row, _ = play(QFedAvg(0.5, 0.1), u, torch.zeros(1).double())
    assert bool(torch.isfinite(row).all())


def test_l_is_the_inverse_of_the_clients_rate_where_none_is_given():
    u = updates(torch.tensor([[0.4], [0.2]]).double(), (1, 1), loss_before=torch.tensor([1.0, 2.0]).double())
    x, recipe = torch.zeros(1).double(), Recipe(lr=0.07)
    assert torch.equal(play(QFedAvg(1.0), u, x, recipe=recipe)[0], play(QFedAvg(1.0, 0.07), u, x)[0])


def test_what_is_sent_is_h_and_not_the_loss():
    u = updates(torch.tensor([[0.4], [0.2]]).double(), (1, 1), loss_before=torch.tensor([1.0, 2.0]).double())
    rule = Fair(1.0, 0.1)
    assert rule.needs_loss_before
    assert set(rule.prepare(u, None).sends) == {"h"}
    assert set(u.sends) == {"loss_before"}


@pytest.mark.parametrize("execution", ["loop", "stacked"])
@pytest.mark.parametrize("q", [0.0, 1.0, 2.0])
def test_a_simulation_weighs_by_the_losses_of_the_weights_before_training(q, execution):
    """Three rounds, written out; F_k = a/2 (x - e)^2 at the round's weights."""
    x = torch.zeros(1).double()
    for _ in range(3):
        losses = (A / 2 * (x - E) ** 2).tolist()
        x = by_hand(x, descended(x, 10), losses, q, 1 / ETA)
    said = experiment({"name": "qfedavg", "q": q}, rounds=3, examples=(5, 3, 2), execution=execution)
    assert last_of(said).x == pytest.approx(float(x), abs=1e-12)


def test_one_gradient_step_a_client_descends_on_the_q_objective():
    """Its fixed point: sum F_k^q grad F_k = 0."""
    x = last_of(experiment({"name": "qfedavg", "q": 1.0}, rounds=150, steps=1)).x
    losses, gradients = A / 2 * (x - E) ** 2, A * (x - E)
    assert abs(float((losses * gradients).sum())) < 1e-8
    assert float(losses.max()) < float((A / 2 * (22 / 7 - E) ** 2).max())  # lower than at the mean's optimum


def test_every_engine_gives_the_same_bits(tmp_path):
    said = experiment({"name": "qfedavg", "clients_per_round": 2}, rounds=4)
    inline = fedsim.run(said, out=tmp_path / "inline", engine="inline")
    processes = fedsim.run(said, out=tmp_path / "processes", engine="processes", workers=2)
    assert processes.summary["weights_sha256"] == inline.summary["weights_sha256"]


class ByExamples(Sampling):
    """Ten clients, the likelier the more examples they hold, as the paper samples (Efraimidis and Spirakis 2006)."""

    def cohort(self, ctx):
        ids = ctx.population.trainable
        late = -np.log(draws(ctx, ids)) / ctx.population.examples[ids]
        return np.sort(ids[np.argsort(late, kind="stable")[:10]])


def accuracies(q: float, seed: int) -> np.ndarray:
    """Of the clients on their own test examples after 800 rounds of one local step, ascending."""
    said = fedsim.Experiment(
        rounds=800,
        seed=seed,
        data={"source": "synthetic", "partition": "natural", "clients": 30, "client_test_fraction": 0.2},
        model="logistic",
        client={"lr": 0.1, "steps": 1, "batch_size": 50, "initialization": "xavier_uniform", "execution": "stacked"},
        strategy={"name": "qfedavg", "q": q, "sampling": ByExamples()},
        evaluation={"every": 800, "clients": True},
    )
    *_, last = fedsim.rounds(said, engine="inline")
    return np.sort([told["accuracy"] for told in last.client_metrics])


@pytest.mark.slow
def test_accuracies_of_clients_are_evened_out_on_synthetic_data():
    """As table 1 of the paper orders them: the larger q, the smaller the variance and the better the worst tenth.

    Means over three seeds. Clients are sampled by their examples: without that, q = 0 counts them alike and is fair
    already, and where local training is far from converged a larger q is only slower.
    """
    found = {q: [accuracies(q, seed) for seed in range(3)] for q in (0.0, 1.0, 2.0)}
    variance = [np.mean([accuracy.var() for accuracy in found[q]]) for q in found]
    worst = [np.mean([accuracy[:3].mean() for accuracy in found[q]]) for q in found]
    assert variance == sorted(variance, reverse=True)
    assert worst == sorted(worst)
    assert len({*variance}) == len({*worst}) == 3
