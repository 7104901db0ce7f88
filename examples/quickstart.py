"""Federated learning in a few lines: 100 clients, handwritten digits, labels spread unevenly.

    python quickstart.py

Everything that an experiment file can say, `fedsim.Experiment` takes under the same names.
"""

import fedsim

experiment = fedsim.Experiment(
    name="quickstart",
    rounds=40,
    data={"clients": 100, "partition": {"name": "dirichlet", "alpha": 0.3}},
    model={"name": "mlp", "hidden": [64]},
    client={"optimizer": "sgd", "lr": 0.3, "epochs": 5},
    strategy={"name": "fedavg", "clients_per_round": 10},
)

if __name__ == "__main__":
    result = fedsim.run(experiment)
    print(result.history[["test_accuracy", "test_loss"]].dropna().iloc[::4])
    print(f"accuracy {result.metrics['test']['accuracy']:.3f} after {result.summary['rounds']} rounds")
    print({name: tuple(weight.shape) for name, weight in result.weights.items()})
    print(f"report: {result.out / 'report.html'}")
