"""SCAFFOLD (Karimireddy et al. 2020): Algorithm 1 on quadratics, its invariant round by round, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import clients.catalog
import fedsim
from clients.errors import RequestError
from clients.hooks import Variables
from clients.parts import Part
from clients.recipe import Recipe
from strategies import Mean, corrections
from strategies.drift import Scaffold
from tests.end_to_end.commands import interrupt_after, rounds_committed, run, start
from tests.strategies.quadratics import (
    EXAMPLES,
    GRADIENTS_THERE,
    UNIFORM_OPTIMUM,
    WEIGHTED_OPTIMUM,
    Played,
    descended,
    experiment,
    last_of,
    rounds_of,
    updates,
)


def off(played: Played, weights=(1, 1, 1)) -> float:
    """|c - mean_k c_k|, the clients weighted."""
    p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return float((p @ played.clients["correction/control"] - played.state["correction/control"]).abs())


def control(played: Played) -> list[float]:
    return played.clients["correction/control"][:, 0].tolist()


def test_option_two_by_hand():
    """c_i+ = c_i - c + (x - y_i) / (K eta), with the client's own K."""
    rule, made = corrections.Scaffold(), torch.Generator().manual_seed(0)
    own, c, grad, rows = (torch.randn(*shape, generator=made).double() for shape in ((2, 3), (3,), (2, 3), (2, 3)))
    v = Variables(torch.zeros(3).double(), {"control": own}, {"control": c}, lr=0.2)
    assert torch.equal(rule.gradient(grad, rows, v, 0), grad - own + c)
    u, kept = rule.finish(updates(rows, (1, 1), torch.tensor([4, 7])), v)
    for i, steps in enumerate((4, 7)):
        assert torch.allclose(kept["control"][i], own[i] - c - rows[i] / (steps * 0.2), rtol=0, atol=1e-14)
    assert torch.equal(u.sends["control"], kept["control"] - own)


def test_it_reaches_the_optimum_where_fedavg_does_not():
    played = list(rounds_of(experiment("scaffold", rounds=60)))
    error = [abs(p.x - UNIFORM_OPTIMUM) for p in played]
    assert error[9] == pytest.approx(3.8e-4, rel=0.05)
    assert error[-1] < 1e-14
    assert played[-1].x == pytest.approx(3.142857142857143, abs=1e-14)
    assert control(played[-1]) == pytest.approx(GRADIENTS_THERE, abs=1e-12)
    assert abs(float(played[-1].state["correction/control"])) < 1e-13
    fedavg = last_of(experiment({"name": "fedavg", "weighting": "uniform"}, rounds=40))
    assert fedavg.x == pytest.approx(2.629253137501482, abs=1e-12)


@pytest.mark.parametrize("cohort", [1, 2, 3])
@pytest.mark.parametrize("steps", [10, {"uniform": [1, 9]}], ids=["even", "uneven"])
def test_c_is_the_mean_of_the_controls_at_every_round(cohort, steps):
    played = list(rounds_of(experiment({"name": "scaffold", "clients_per_round": cohort}, rounds=20, steps=steps)))
    assert max(map(off, played)) < 1e-14


@pytest.mark.parametrize(("cohort", "rounds"), [(1, 160), (2, 80)])
def test_it_reaches_the_optimum_with_some_of_the_clients(cohort, rounds):
    last = last_of(experiment({"name": "scaffold", "clients_per_round": cohort}, rounds=rounds, steps=4, lr=0.1))
    assert last.x == pytest.approx(UNIFORM_OPTIMUM, abs=1e-6)
    assert control(last) == pytest.approx(GRADIENTS_THERE, abs=1e-4)


@pytest.mark.parametrize(("cohort", "rounds"), [(2, 80), (3, 40)])
def test_weighted_by_examples_it_reaches_that_optimum(cohort, rounds):
    strategy = {"name": "scaffold", "weighting": "examples", "clients_per_round": cohort}
    played = list(rounds_of(experiment(strategy, rounds=rounds, examples=EXAMPLES, steps=4, lr=0.1)))
    assert max(off(p, EXAMPLES) for p in played) < 1e-14
    assert played[-1].x == pytest.approx(WEIGHTED_OPTIMUM, abs=1e-6)


def test_its_first_round_of_one_step_is_fedavgs():
    ours, fedavg = (
        last_of(experiment({"name": name, "weighting": "uniform"}, rounds=1, steps=1))
        for name in ("scaffold", "fedavg")
    )
    assert ours.x == fedavg.x


def test_the_server_learning_rate_multiplies_the_mean_update():
    once, half = (last_of(experiment({"name": "scaffold", "lr": lr}, rounds=1)).x for lr in (1.0, 0.5))
    assert half == once / 2  # from x = 0
    assert once == float((descended(torch.zeros(1).double(), 10)).mean())


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        ({"schedule": {"name": "step", "every": 10, "by": 0.5}}, UNIFORM_OPTIMUM),
        ({"regularization": {"l2": 0.5}}, 22 / 8.5),
        ({"regularization": {"weight_decay": 0.5}}, 22 / 8.5),
        ({"regularization": {"l1": 0.7}}, (22 - 3 * 0.7) / 7),
        ({"regularization": {"elastic_net": {"l1": 0.7, "l2": 0.5}}}, (22 - 3 * 0.7) / 8.5),
        ({"regularization": {"proximal": 0.5}}, UNIFORM_OPTIMUM),
        ({"gradient_clip": 7.0}, (2 + 7 * 8 / (8 + 1e-6)) / 3),  # x + 2 (x - 1) = 7, which the third one's 8 is cut to
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_clients_do_at_every_step_of_one_rate_is_part_of_the_control(client, expected):
    """The optimum is that of the penalised mean; with clipped gradients, where those sum to zero."""
    played = list(rounds_of(experiment("scaffold", rounds=25, steps=4, **{"lr": 0.15, **client})))
    assert max(map(off, played)) < 1e-13
    assert played[-1].x == pytest.approx(expected, abs=1e-4)


def fails_sometimes(monkeypatch, loses):
    """Makes the updates of some rounds' clients not finite: ``loses(round, client)``."""
    from clients.training import Trainer

    train = Trainer._train

    def losing(self, clients, weights, round, *rest):
        trained = train(self, clients, weights, round, *rest)
        for place, client in enumerate(clients.tolist()):
            if loses(round, client):
                trained.updates.rows[place] = torch.nan
        return trained

    monkeypatch.setattr(Trainer, "_train", losing)


def test_the_control_of_a_client_whose_update_was_lost_stays(monkeypatch):
    fails_sometimes(monkeypatch, lambda round, client: client == round % 3 and round <= 12)
    before = [0.0] * 3
    for played in rounds_of(experiment("scaffold", rounds=40, steps=4, lr=0.1)):
        number, now = played.record.round, control(played)
        lost = [client for client in range(3) if client == number % 3 and number <= 12]
        assert played.record.completed == 3 - len(lost)
        assert [now[client] for client in lost] == [before[client] for client in lost]
        assert off(played) < 1e-14
        before = now
    assert played.x == pytest.approx(UNIFORM_OPTIMUM, abs=1e-6)


def test_no_control_moves_in_a_round_that_keeps_the_weights(monkeypatch):
    fails_sometimes(monkeypatch, lambda round, client: client > 0 and round % 2 == 0)
    said = experiment({"name": "scaffold", "min_clients": 2}, rounds=40, steps=4, lr=0.1)
    before = None
    for played in rounds_of(said):
        if played.record.round % 2 == 0:
            assert played.record.events[-1].kind == "cohort_too_small"
            assert (played.x, control(played)) == before
        before = (played.x, control(played))
        assert off(played) < 1e-14
    assert played.x == pytest.approx(UNIFORM_OPTIMUM, abs=1e-6)


class Breaks(Mean):
    """A mean that is not finite in every third round."""

    def combine(self, u, state, ctx):
        row, state, info = super().combine(u, state, ctx)
        return (row / 0 if ctx.round % 3 == 0 else row), state, info


def test_no_control_moves_in_a_round_whose_aggregate_is_not_finite():
    strategy = Scaffold().with_parts(aggregator=Breaks("uniform"))
    for played in rounds_of(experiment("scaffold", rounds=40, steps=4, lr=0.1), strategy):
        assert any(event.kind == "weights_not_finite" for event in played.record.events) == (
            played.record.round % 3 == 0
        )
        assert off(played) < 1e-14
    assert played.x == pytest.approx(UNIFORM_OPTIMUM, abs=1e-6)


WRONG = {
    "optimizer": ({"optimizer": "momentum"}, "client.optimizer: 'momentum' moves otherwise"),
    "adam": ({"optimizer": "adam"}, "client.optimizer: 'adam' moves otherwise"),
    "step_schedule": ({"step_schedule": {"name": "step", "every": 3}}, "client.step_schedule: "),
    "warmup": ({"step_schedule": {"name": "constant", "warmup": 3}}, "client.step_schedule: "),
    "lr_factors": ({"lr_factors": {"x": 0.5}}, "client.lr_factors: "),
    "early_stopping": ({"early_stopping": {"patience": 1}}, "client.early_stopping: "),
    "personal_epochs": ({"personal": ["head"], "personal_epochs": 2, "epochs": 1}, "client.personal_epochs: "),
}


@pytest.mark.parametrize(("client", "said"), WRONG.values(), ids=WRONG)
def test_a_recipe_that_the_formula_does_not_hold_for_is_refused(client, said):
    (line,) = corrections.Scaffold().check(Recipe(**client))
    assert line.startswith(said)
    assert "\n" not in line


def test_other_recipes_are_not_refused():
    assert corrections.Scaffold().check(Recipe(step_schedule={"name": "constant", "warmup": 0})) == []
    assert corrections.Scaffold().check(Recipe(gradient_clip=1.0, optimizer_state="keep", lr=0.1)) == []


def test_a_run_is_refused_with_the_reason():
    with pytest.raises(RequestError, match=r"client\.optimizer: 'nesterov' moves otherwise"):
        last_of(experiment("scaffold", rounds=1, optimizer="nesterov"))


def test_updates_and_controls_are_weighted_alike():
    assert Scaffold(weighting="examples").correction == corrections.Scaffold("examples")
    with pytest.raises(RequestError, match=r"strategy.weighting: 'examples' for updates"):
        Scaffold(aggregator=Mean("examples"))
    assert [entry.name for entry in clients.catalog.entries("corrections")].count("scaffold") == 1
    assert clients.catalog.describe(Part("scaffold"), "strategies").module == "strategies.drift"


@pytest.mark.parametrize(("execution", "workers"), [("loop", (1, 2)), ("stacked", (2,))])
def test_every_engine_gives_the_same_bits_and_both_executions_agree(execution, workers, tmp_path):
    said = experiment({"name": "scaffold", "clients_per_round": 2}, rounds=4, execution=execution)
    inline = fedsim.run(said, out=tmp_path / "inline", engine="inline")
    for number in workers:
        other = fedsim.run(said, out=tmp_path / str(number), engine="processes", workers=number)
        assert other.summary["weights_sha256"] == inline.summary["weights_sha256"]
    loop = last_of(experiment({"name": "scaffold", "clients_per_round": 2}, rounds=4))
    assert float(inline.row) == pytest.approx(loop.x, abs=1e-13)


class KilledError(Exception):
    """Ends a run in the middle of a round."""


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn"])
def test_what_server_and_clients_keep_survives_a_run_that_is_cut_off(strategy, tmp_path):
    said = experiment({"name": strategy, "clients_per_round": 2}, rounds=6, epochs=10)

    def kill(record):
        if record.round == 4:
            raise KilledError

    with pytest.raises(KilledError):
        fedsim.run(said, out=tmp_path / "run", engine="inline", callbacks=[kill])
    again = fedsim.run(out=tmp_path / "run", engine="inline", resume=True)
    assert float(again.row) == last_of(said).x


@pytest.mark.slow
def test_it_is_killed_and_resumed_to_the_same_bits(tmp_path):
    said = experiment({"name": "scaffold", "clients_per_round": 2}, rounds=60, epochs=10)
    whole = fedsim.run(said, out=tmp_path / "whole", engine="inline")
    (tmp_path / "experiment.toml").write_bytes((tmp_path / "whole" / "experiment.toml").read_bytes())
    arguments = ("experiment.toml", "--out", "run", "--engine", "processes", "--workers", "2")
    process = start(tmp_path, "run", "--quiet", *arguments)
    assert interrupt_after(process, tmp_path / "run", 20)
    process.communicate()
    assert 20 <= rounds_committed(tmp_path / "run") < 60
    result = run(tmp_path, *arguments, "--resume")
    assert result["weights_sha256"] == whole.summary["weights_sha256"]
