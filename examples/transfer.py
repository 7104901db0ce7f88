"""Transfer: features learnt on the digits 0 to 4 help with 5 to 9.

    python transfer.py            one seed
    python transfer.py 5          the mean of five

A first federation learns 0 to 4. A second one, with the digits 5 to 9 and fewer rounds, starts from its convolutions
with a new head; a third starts from scratch. The same by hand, from the command line:

    fedsim run fine.toml --set client.initialization.path=runs/digits-0-to-4
"""

import sys

import fedsim

NEW = ["hidden", "head"]  # layers that begin anew: what they had learnt is about other digits


def experiment(name, classes, rounds, seed, **client):
    return fedsim.Experiment(
        name=name,
        seed=seed,
        rounds=rounds,
        data={"clients": 50, "source": {"name": "digits", "classes": classes}},
        model="cnn",
        client={"lr": 0.1, **client},
    )


def fine_tuning(start, seed, **client):
    """The second federation, from the weights of a run."""
    initialization = {"name": "file", "path": str(start.resolve()), "new": NEW}
    fresh = dict.fromkeys(NEW, "he_normal")
    return experiment(
        "fine-tuned", [5, 6, 7, 8, 9], 10, seed, epochs=1, initialization=initialization, layer_initialization=fresh,
        **client,
    )  # fmt: skip


def compare(seed):
    """Test accuracy fine-tuned and from scratch, after equally many rounds."""
    first = fedsim.run(experiment("digits-0-to-4", [0, 1, 2, 3, 4], 30, seed, epochs=2))
    runs = {
        "fine-tuned": fedsim.run(fine_tuning(first.out, seed)),
        "from scratch": fedsim.run(experiment("from-scratch", [5, 6, 7, 8, 9], 10, seed, epochs=1)),
    }
    return {name: result.metrics["test"]["accuracy"] for name, result in runs.items()}


if __name__ == "__main__":
    found = [compare(seed) for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1)]
    for name in found[0]:
        print(f"{name}: accuracy {sum(result[name] for result in found) / len(found):.3f}")
