"""The model that a run has trained, as a module to use."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from torch import nn

from clients.errors import RequestError, RunError
from clients.local_state import put_unshared
from fedsim.assembly import assemble
from fedsim.engines.inline import Inline
from fedsim.experiment import Experiment
from fedsim.runs import RunStore, read_experiment
from fedsim.simulation import Simulation


def load_model(directory: Path | str, client: int | None = None, experiment: Experiment | None = None) -> nn.Module:
    """A run's model after its newest round, in evaluation mode, batch norm's statistics in order.

    Args:
        directory: the run's.
        client: a client's own model: the global weights with the parameters and statistics that it keeps in their
            place. Left out, the server's, as it is judged.
        experiment: the run's, where parts of it are objects that were made in Python.

    Raises:
        RequestError: where there is no such run or client, or where the server has no whole model.
    """
    directory = Path(directory)
    recorded = read_experiment(directory)
    if experiment is None:
        try:
            experiment = Experiment(directory, **recorded)
        except RequestError as error:
            made = [
                line.replace("run the Python file that makes it", "give load_model(..., experiment=...)")
                for line in error.problems
            ]
            raise RequestError(made) from None
    elif different := experiment.difference(recorded):
        raise RequestError(f"{directory}: the run's experiment was another one, in {', '.join(different)}")
    setup = assemble(experiment).setup
    if client is None and not setup.server_has_all:
        raise RequestError(
            f"{directory}: the server has no whole model, since parameters or batch norm's statistics stay with the"
            " clients; name a client"
        )
    if client is not None and not 0 <= client < setup.population.clients:
        raise RequestError(f"{directory}: there is no client {client}; ids are 0 to {setup.population.clients - 1}")
    with RunStore.open(directory) as store, closing(Inline()) as engine:
        checkpoint = store.resume()
        if checkpoint is None:
            raise RunError(f"{directory}: the run has not committed a round yet")
        put_unshared(setup.model, store.first())
        engine.start(setup)
        simulation = Simulation(experiment, setup, engine, store)
        simulation.restore(checkpoint.round, checkpoint.tensors)
        return simulation.server_model() if client is None else simulation.client_model(client)
