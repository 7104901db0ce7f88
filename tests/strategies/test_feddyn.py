"""FedDyn (Acar et al. 2021): Algorithm 1 on quadratics, the authors' own form of it, and that its halves agree."""

from __future__ import annotations

import pytest
import torch

import fedsim
from clients.errors import RequestError
from clients.hooks import Variables
from clients.recipe import Recipe
from strategies import corrections
from strategies.drift import Dynamic, FedDyn
from tests.strategies.problems import ETA, A, E
from tests.strategies.quadratics import GRADIENTS_THERE, UNIFORM_OPTIMUM, experiment, last_of, play, rounds_of, updates

ALPHA = 1.0


def minimum(x, g):
    """argmin a/2 (w - e)^2 - g w + alpha/2 (w - x)^2 of each client, ``[3]``."""
    return (A * E + g + ALPHA * x) / (A + ALPHA)


def test_exact_local_solutions_reach_the_optimum_as_in_the_authors_form():
    """Theirs: L_k <- L_k + (w_k - w), the next weights mean_S w_k + mean over all of L_k; here g_k = -alpha L_k."""
    rule, strategy = corrections.FedDyn(ALPHA), FedDyn(ALPHA)
    x, state, g = torch.zeros(1).double(), None, torch.zeros(3, 1).double()
    theirs, L = torch.zeros(1).double(), torch.zeros(3).double()
    for _ in range(100):
        u = updates((minimum(x, g[:, 0]) - x)[:, None], (1, 1, 1))
        u, kept = rule.finish(u, Variables(x, {"gradient": g}))
        g = kept["gradient"]
        x, state = play(strategy, u, x, state)
        w = minimum(theirs, -ALPHA * L)
        L = L + (w - theirs)
        theirs = (w.mean() + L.mean())[None]
        assert float(x) == pytest.approx(float(theirs), abs=1e-13)
        assert float(state["aggregator/h"]) == pytest.approx(float(g.mean()), abs=1e-13)
    assert float(x) == pytest.approx(3.142857142857144, abs=1e-13)
    assert g[:, 0].tolist() == pytest.approx(GRADIENTS_THERE, abs=1e-12)


def test_the_gradient_by_hand():
    made = torch.Generator().manual_seed(0)
    own, grad, row, x = (torch.randn(*shape, generator=made).double() for shape in ((2, 3), (2, 3), (2, 3), (3,)))
    found = corrections.FedDyn(0.3).gradient(grad, row, Variables(x, {"gradient": own}), 0)
    assert torch.allclose(found, grad - own + 0.3 * (row - x), rtol=0, atol=1e-15)


def test_the_first_round_by_hand():
    """Three steps of each client from 0 with g_k = 0, and twice its mean way: -h/alpha is the mean way once more."""
    ways = []
    for a, e in zip(A.tolist(), E.tolist(), strict=True):
        y = 0.0
        for _ in range(3):
            y -= ETA * (a * (y - e) + 0.5 * y)
        ways.append(y)
    last = last_of(experiment({"name": "feddyn", "alpha": 0.5}, rounds=1, steps=3))
    assert last.x == pytest.approx(2 * sum(ways) / 3, abs=1e-14)
    assert last.clients["correction/gradient"][:, 0].tolist() == pytest.approx([-0.5 * way for way in ways], abs=1e-14)


def test_h_is_over_all_clients_and_the_mean_over_the_cohort():
    x, strategy = torch.zeros(1).double(), FedDyn(ALPHA)
    u = updates(torch.tensor([[1.0], [2.0], [6.0]]).double(), (1, 1, 1))
    row, state = play(strategy, u.select(torch.tensor([1, 2])), x, {"aggregator/h": torch.tensor([3.0]).double()})
    # The context of two updates knows two clients.
    assert float(state["aggregator/h"]) == 3.0 - (2 + 6) / 2
    assert float(row) == 4.0 - float(state["aggregator/h"]) / ALPHA


@pytest.mark.parametrize("cohort", [1, 3])
def test_h_is_the_mean_of_the_clients_g_at_every_round_and_the_optimum_is_reached(cohort):
    rounds = 120 if cohort == 1 else 50
    played = list(
        rounds_of(experiment({"name": "feddyn", "alpha": 1.0, "clients_per_round": cohort}, rounds=rounds, lr=0.15))
    )
    for p in played:
        assert float(p.state["aggregator/h"]) == pytest.approx(
            float(p.clients["correction/gradient"].mean()), abs=1e-13
        )
    assert played[-1].x == pytest.approx(UNIFORM_OPTIMUM, abs=1e-3 if cohort == 1 else 1e-6)
    if cohort == 3:
        assert played[-1].clients["correction/gradient"][:, 0].tolist() == pytest.approx(GRADIENTS_THERE, abs=1e-5)


@pytest.mark.parametrize("examples", [(1, 1, 1), (5, 3, 2)])
def test_clients_count_alike(examples):
    assert last_of(experiment("feddyn", rounds=2, examples=examples)).x == pytest.approx(
        last_of(experiment("feddyn", rounds=2)).x, abs=1e-13
    )


def test_the_server_sends_weights_alone():
    ours, fedavg = (last_of(experiment(name, rounds=1)).record for name in ("feddyn", "fedavg"))
    assert (ours.bytes_down, ours.bytes_up) == (fedavg.bytes_down, fedavg.bytes_up)


@pytest.mark.parametrize(
    "parts", [{"correction": corrections.FedDyn(0.3)}, {"aggregator": Dynamic(0.3)}, {"aggregator": Dynamic()}]
)
def test_halves_that_do_not_belong_together_are_refused(parts):
    with pytest.raises(RequestError, match=r"half of (FedDyn|Dynamic)\("):
        FedDyn(0.2, **parts)


def test_a_second_proximal_term_is_refused():
    (line,) = corrections.FedDyn().check(Recipe(regularization={"proximal": 0.1}))
    assert line.startswith("client.regularization.proximal: FedDyn holds clients by alpha already")
    assert corrections.FedDyn().check(Recipe(optimizer="adam", gradient_clip=1.0)) == []


def test_weights_by_examples_are_refused():
    with pytest.raises(RequestError, match=r"strategy\.weighting: Dynamic"):
        last_of(experiment({"name": "feddyn", "weighting": "examples"}, rounds=1))


def test_every_engine_gives_the_same_bits(tmp_path):
    said = experiment({"name": "feddyn", "clients_per_round": 2}, rounds=4)
    inline = fedsim.run(said, out=tmp_path / "inline", engine="inline")
    processes = fedsim.run(said, out=tmp_path / "processes", engine="processes", workers=2)
    assert processes.summary["weights_sha256"] == inline.summary["weights_sha256"]
    stacked = said.model_copy(update={"client": said.client.model_copy(update={"execution": "stacked"})})
    assert last_of(stacked).x == pytest.approx(float(inline.row), abs=1e-13)
