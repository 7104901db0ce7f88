"""An aggregation rule of your own, held against clients that send the reverse of what they learnt.

    python own_rule.py

compares it with the mean. From the command line, by file and name, settings beside it:

    fedsim run --set strategy.aggregator=own_rule.py:Reputation --set strategy.aggregator.memory=0.8

or in an experiment file, relative to that file:

    [strategy.aggregator]
    name = "own_rule.py:Reputation"
    memory = 0.8
"""

import torch

import fedsim
from strategies import Aggregator, Plugin


class Reputation(Aggregator):
    """Weighs every client by how far it agrees with the round's median, now and before.

    The agreement of client k is the cosine ``c_k`` of its update with the coordinates' median, 0 where negative;
    its reputation is remembered, ``r_k <- memory r_k + (1 - memory) c_k``; the aggregate weighs by ``r_k c_k``.
    """

    needs = "rows"  # every client's update, not only their sum

    def __init__(self, memory: float = 0.5):
        self.memory = memory

    def init(self, ctx):
        return {"reputation": torch.zeros(ctx.population.clients)}

    def combine(self, u, state, ctx):
        agreement = torch.cosine_similarity(u.rows, u.rows.median(dim=0).values[None]).clamp(min=0)
        reputation = state["reputation"].clone()
        reputation[u.clients] = self.memory * reputation[u.clients] + (1 - self.memory) * agreement
        weights = reputation[u.clients] * agreement
        row = weights @ u.rows / weights.sum().clamp(min=1e-12)
        return row, {"reputation": reputation}, {"reputation": reputation[u.clients]}


class Reverse(Plugin):
    """Clients with an id below ``attackers`` send their update reversed and three times as long."""

    def __init__(self, attackers: int = 3):
        self.attackers = attackers

    def client(self, u, state, ctx):
        sign = torch.where(u.clients < self.attackers, -3.0, 1.0)
        return u.replace(rows=u.rows * sign[:, None]), state


def experiment(aggregator):
    return fedsim.Experiment(
        name="own-rule",
        rounds=20,
        data={"clients": 12, "partition": "iid"},
        client={"epochs": 1},
        strategy={"clients_per_round": 10, "aggregator": aggregator},
        plugins=[Reverse(attackers=4)],
    )


if __name__ == "__main__":
    for rule in ("mean", Reputation(memory=0.5)):
        result = fedsim.run(experiment(rule))
        print(f"{rule}: accuracy {result.metrics['test']['accuracy']:.3f}, details in {result.out}")
    told = fedsim.load(result.out).clients
    print(told.groupby("client")["reputation"].last().round(2).to_string())
