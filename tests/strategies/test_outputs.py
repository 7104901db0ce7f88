"""What a rule may ask of the server: clients' outputs on its unlabelled examples, as distillation needs them."""

from __future__ import annotations

import pytest
import torch

import fedsim
from strategies import Aggregator


class Agreeing(Aggregator):
    """The mean; it keeps what every client's model says of the proxy, and of the round's own weights."""

    needs = "rows"

    def combine(self, u, state, ctx):
        told = [ctx.outputs(ctx.weights + row, "proxy") for row in u.rows]
        self.seen = torch.stack(told), ctx.outputs(ctx.weights, "proxy"), (ctx.weights + u.rows).clone()
        return u.rows.mean(0), state, {"says": [float(logits.softmax(-1).max()) for logits in told]}


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_rule_sees_what_each_client_says_of_the_proxy(norm, tmp_path):
    rule = Agreeing()
    experiment = fedsim.Experiment(
        rounds=2,
        data={"clients": 6, "proxy": 700},
        model={"name": "mlp", "norm": norm},
        client={"epochs": 1},
        evaluation={"batch_size": 256},
        strategy={"aggregator": rule},
    )
    result = fedsim.run(experiment, out=tmp_path / "run", engine="inline")
    logits, before, rows = rule.seen
    assert logits.shape == (6, 700, 10)
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(before, logits[0])
    # The model that a row makes, by hand.
    from clients.normalization import recalibrate
    from fedsim.assembly import assemble

    setup = assemble(experiment).setup
    model, proxy = setup.model, setup.population.server["proxy"]
    setup.layout.load(model, rows[3])
    x = proxy.take(torch.arange(700))["x"]
    recalibrate(model, [x])
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), logits[3], atol=1e-5)
    assert result.metrics["test"]["accuracy"] > 0.2
