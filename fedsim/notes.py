"""What a reader must know to read a run's figures right."""

from __future__ import annotations

from typing import Any

from clients.normalization import batch_norms
from clients.recipe import DpSgd
from clients.regularization import describe
from fedsim.worker import Setup


def notes(setup: Setup, source: str) -> list[str]:
    """What must be said beside a run's figures.

    Args:
        setup: what the run's workers are made of.
        source: the name of the data's source.
    """
    found = [describe(setup.recipe.regularization)]
    if setup.local_training is not None:
        found = [
            f"Clients trained by {setup.local_training!r}: what the experiment says of the optimiser, of epochs and of"
            " penalties holds as far as it reads them."
        ]
    if batch_norms(setup.model):
        found.append(_batch_norm_note(setup, source))
    if setup.malicious:
        found.append(_attack_note(setup))
    if setup.recipe.adversarial is not None:
        found.append("The training loss is that of the batches as they were trained on, adversarial inputs included.")
    if setup.recipe.dp_sgd is not None:
        found.append(_privacy_note(setup.recipe.dp_sgd))
    if setup.guarantee is not None:
        found.append(setup.guarantee.note)
    found += [plugin.note for plugin in setup.strategy.plugins]
    return [note for note in found if note]


def _batch_norm_note(setup: Setup, source: str) -> str:
    stays = {
        "share_affine": "clients' statistics stay with them",
        "local": "all of batch norm stays with the clients",
        "share_all": "clients send their statistics",
    }[setup.recipe.batch_norm]
    if setup.batch_norm == "recalibrate":
        size = len(setup.population.server["proxy"])
        return (
            f"Batch norm was recalibrated on {size} unlabelled proxy examples that the server holds, taken from the"
            f" source {source!r}; {stays}."
        )
    return {
        "batch": "Batch norm used each evaluated batch's own statistics, so a prediction depends on its batch;"
        f" {stays}.",
        "shared": "Batch norm used the statistics of the last cohort, pooled: mean of the variances and variance of the"
        " means.",
        "clients": f"Clients tested, each with batch norm's statistics of its own training inputs; {stays}.",
        "clients_stored": "Clients tested, each with batch norm's running statistics of its own training, or of its"
        f" training inputs where it has not trained yet; {stays}.",
    }[setup.batch_norm]


def _attack_note(setup: Setup) -> str:
    told = [
        f"{len(group.clients)} client{'s attack' if len(group.clients) > 1 else ' attacks'} by {group.name} (on the"
        f" {group.attack.acts_on}; each knows {group.attack.knows}"
        f"{'; they act together' if group.attack.colludes else ''})"
        for group in setup.malicious
    ]
    aims = "attack" in setup.population.server
    blind = " Their success was not judged, since the server has no whole model." if aims else ""
    return f"{'; '.join(told)}.{'' if setup.server_has_all else blind}"


def _privacy_note(dp: DpSgd) -> str:
    if not dp.noise_multiplier:
        return "DP-SGD clipped each example's gradient and added no noise, so epsilon is infinite: there is no privacy."
    told = _example_privacy(dp)
    return (
        f"Epsilon is the largest that a client has spent: by {told['unit']}, {told['relation']}, {told['trust']} trust,"
        f" delta {dp.delta:g}, {told['accountant']} accountant; it covers {told['covers']}."
    )


def privacy(setup: Setup) -> dict[str, Any] | None:
    """What kind of epsilon a run has, as plain values; ``None`` without privacy."""
    if setup.guarantee is not None:
        return setup.guarantee.described()
    return None if setup.recipe.dp_sgd is None else _example_privacy(setup.recipe.dp_sgd)


def _example_privacy(dp: DpSgd) -> dict[str, Any]:
    return {
        "unit": "example",
        "relation": "replace one by nothing",  # how many examples a client holds is sent with its update
        "trust": "local",
        "delta": dp.delta,
        "accountant": dp.accountant,
        "noise_multiplier": dp.noise_multiplier,
        "max_grad_norm": dp.max_grad_norm,
        "covers": "the released weights only: not metrics, not the trials of tune",
    }
