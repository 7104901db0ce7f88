"""The kinds of things that the server side of an experiment names."""

from __future__ import annotations

from clients.kinds import Kind, declare

_COMPOSED = ("sampling", "correction", "plugins", "aggregator", "server_optimizer", "min_clients", "weighting")

declare(
    Kind("strategies", "strategy", "strategies", base="Strategy", offered=_COMPOSED, entry_points="fedsim.strategies"),
    Kind("samplings", "sampling", "strategies", base="Sampling", offered=("clients_per_round", "fraction")),
    Kind("corrections", "correction", "strategies", base="Correction"),
    Kind("plugins", "plug-in", "strategies", base="Plugin", offered=("base",), entry_points="fedsim.plugins"),
    Kind(
        "aggregators",
        "aggregator",
        "strategies",
        base="Aggregator",
        offered=("base",),
        entry_points="fedsim.aggregators",
    ),
    Kind("server_optimizers", "server optimiser", "strategies", base="ServerOptimizer"),
    Kind("attacks", "attack", ("clients", "strategies"), base=("DataAttack", "ModelAttack")),
    Kind("checks", "check", "strategies", base="Check", entry_points="fedsim.checks"),
)
