"""Values of an experiment that are right alone and wrong together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from clients import recipe_conflicts
from clients.errors import RequestError
from clients.recipe import Recipe
from clients.recipe_conflicts import TWO_PROXIMAL_TERMS


def conflicts(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """One line for each conflict. Values of a wrong type are left to the schema, which says so.

    Args:
        given: an experiment's table, unchecked.
        defaults: section to its default settings.
    """
    return [line for check in _CHECKS for line in check(_Reader(given, defaults))]


def counted(table: Mapping[str, Any]) -> bool:
    """Whether the number of clients is the experiment's own: a natural partition has as many as its source."""
    data = table.get("data", {})
    named = _name_of(data.get("partition", "dirichlet")) if isinstance(data, Mapping) else None
    return isinstance(named, str) and named != "natural" and ":" not in named


def only_clients_test(kept: Any, evaluated: Any, personal: Any = ()) -> bool:
    """Whether the server has no whole model to test, by what stays with clients and where statistics come from.

    Args:
        kept: ``client.batch_norm``.
        evaluated: ``evaluation.batch_norm``.
        personal: ``client.personal``.
    """
    return bool(personal) or kept == "local" or evaluated in ("clients", "clients_stored")


def _name_of(part: Any) -> Any:
    """The name in a part's table, or the part where it is a name itself."""
    return part.get("name") if isinstance(part, Mapping) else getattr(part, "name", part)


class _Reader:
    """Reads numbers and words of an unchecked table, the defaults where it has none; None where the type is wrong."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.given, self.defaults = given, defaults

    def get(self, key: str) -> Any:
        section, _, name = key.partition(".")
        table = self.given.get(section, {})
        return table[name] if isinstance(table, Mapping) and name in table else getattr(self.defaults[section], name)

    def number(self, key: str) -> Any:
        value = self.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _cohort_conflicts(read: _Reader) -> Iterable[str]:
    size, fraction = read.get("strategy.clients_per_round"), read.get("strategy.fraction")
    if size is not None and fraction is not None:
        yield "strategy: fraction and clients_per_round are both given; give one of them"
    clients, held_out = read.number("data.clients"), read.number("data.held_out_clients")
    if clients is None or held_out is None or not counted(read.given):
        return
    left = clients - held_out
    if clients >= 1 and left < 1:
        yield f"data.held_out_clients: {held_out} of {clients} clients held out leaves none to train; give fewer"
    asked, least = read.number("strategy.clients_per_round"), read.number("strategy.min_clients")
    if asked is not None and asked > left >= 1:
        of = f"{clients} clients" + (f", {held_out} of them held out" if held_out else "")
        yield f"strategy.clients_per_round: {asked} clients a round, but there are {of}; give at most {left}"
        return
    share = read.number("strategy.fraction")
    cohort = asked if asked is not None else min(10, left) if share is None else max(1, round(share * left))
    if least is not None and least > cohort >= 1:
        yield f"strategy.min_clients: {least} is more than the {cohort} clients of a round; give fewer"


def _fraction_conflicts(read: _Reader) -> Iterable[str]:
    for test, validation in (
        ("data.test_fraction", "data.validation_fraction"),
        ("data.client_test_fraction", "data.client_validation_fraction"),
    ):
        a, b = read.number(test), read.number(validation)
        if a is not None and b is not None and a < 1 and b < 1 and a + b >= 1:
            yield f"{test}: {a:g} and {validation} {b:g} together leave nothing to train on; their sum must be below 1"


def _evaluation_conflicts(read: _Reader) -> Iterable[str]:
    clients = read.get("evaluation.clients")
    examples = read.get("data.client_test_fraction") or read.get("data.client_validation_fraction")
    if clients is True and not examples and not _clients_test(read):
        yield (
            "evaluation.clients: clients have no examples to evaluate on; "
            "give data.client_test_fraction or data.client_validation_fraction"
        )


def _clients_test(read: _Reader) -> bool:
    """Whether clients get test examples without being told to, since they alone can test."""
    keys = ("client.batch_norm", "evaluation.batch_norm", "client.personal")
    return read.get("data.client_test_fraction") is None and only_clients_test(*map(read.get, keys))


def _batch_norm_conflicts(read: _Reader) -> Iterable[str]:
    kept, said = read.get("client.batch_norm"), read.get("evaluation.batch_norm")
    if kept == "local" and said in ("recalibrate", "batch", "shared"):
        yield (
            f"evaluation.batch_norm: {said!r} tests on the server, which has no batch norm under client.batch_norm ="
            " \"local\"; give 'auto', 'clients' or 'clients_stored'"
        )
    elif said == "shared" and kept == "share_affine":
        yield (
            "evaluation.batch_norm: 'shared' needs the clients' statistics; give client.batch_norm = \"share_all\","
            " or another evaluation.batch_norm"
        )
    elif said == "clients_stored" and kept == "share_all":
        yield (
            "evaluation.batch_norm: 'clients_stored' needs statistics that stay with a client, and client.batch_norm ="
            ' "share_all" shares them; give \'shared\', or client.batch_norm = "share_affine"'
        )
    tested_by = 'client.batch_norm = "local"' if kept == "local" else f"evaluation.batch_norm = {said!r}"
    if only_clients_test(kept, said) and read.get("data.client_test_fraction") == 0:
        yield (
            f"data.client_test_fraction: 0 leaves nobody to test under {tested_by}, where the server has no whole"
            " model; give a share above 0, or leave it out"
        )


def _client_conflicts(read: _Reader) -> Iterable[str]:
    if _amount(read, "proximal") and _is_prox(read):
        yield TWO_PROXIMAL_TERMS
    if read.get("client.early_stopping") is not None and not read.get("data.client_validation_fraction"):
        yield (
            "client.early_stopping: clients have no validation examples to stop by; give"
            " data.client_validation_fraction above 0"
        )
    recipe = _recipe(read)
    if recipe is not None:
        yield from recipe_conflicts.within(recipe)


def _recipe(read: _Reader) -> Recipe | None:
    """The recipe; None where something in it is wrong by itself, which the schema says."""
    given = read.given.get("client", {})
    try:
        return given if isinstance(given, Recipe) else Recipe(**given)
    except (ValidationError, RequestError, TypeError):
        return None


def _amount(read: _Reader, name: str) -> Any:
    said = read.get("client.regularization")
    return said.get(name) if isinstance(said, Mapping) else getattr(said, name, None)


def _is_prox(read: _Reader) -> bool:
    return not {"fedprox", "prox"}.isdisjoint(_strategy_names(read, "correction"))


def _strategy_names(read: _Reader, part: str) -> list[str]:
    """The names of the strategy and of one of its parts, as they are compared."""
    strategy = read.given.get("strategy", {})
    table = strategy if isinstance(strategy, Mapping) else {"name": strategy}
    return [str(_name_of(named)).lower().replace("_", "") for named in (table, table.get(part))]


def _privacy_conflicts(read: _Reader) -> Iterable[str]:
    plugins = read.given.get("plugins", [])
    named = {str(_name_of(part)).lower().replace("_", "") for part in plugins} if isinstance(plugins, list) else set()
    central = "noise" in named or _strategy_names(read, "aggregator")[0] == "dpfedavg"
    recipe = _recipe(read)
    if recipe is not None and (central or "localnoise" in named):
        yield from recipe_conflicts.beside_noise(recipe)
    if central:
        devices = read.given.get("devices")
        yield from against_central_noise(
            read.number("strategy.min_clients"), read.get("client.stragglers"), _available(devices)
        )


def against_central_noise(min_clients: int | None, stragglers: str, available: float) -> Iterable[str]:
    """What shows who was chosen, or lets one client decide who else is counted, one line a key.

    Args:
        min_clients: ``strategy.min_clients``.
        stragglers: ``client.stragglers``.
        available: ``devices.available``; 1 without devices.
    """
    if min_clients:
        yield (
            f"strategy.min_clients: {min_clients} would show, by a round that keeps the weights, how many clients were"
            " chosen; under noise every round is a release, so leave it out"
        )
    if stragglers == "drop":
        yield (
            'client.stragglers: "drop" leaves out all who do less than one client does, so that one decides over'
            ' others, which no noise covers; give "keep"'
        )
    if available < 1:
        yield (
            "devices.available: who is there follows from how long other clients took, and is not drawn by chance"
            " alone; no epsilon of clients' noise covers that, leave it out"
        )


def _available(devices: Any) -> float:
    found = devices.get("available", 1.0) if isinstance(devices, Mapping) else getattr(devices, "available", 1.0)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else 1.0


def _root_conflicts(read: _Reader) -> Iterable[str]:
    given = read.given.get("data", {})
    own_source = isinstance(given, Mapping) and str(_name_of(given.get("source", "digits"))) != "digits"
    if "fltrust" in _strategy_names(read, "aggregator") and not read.get("data.root") and not own_source:
        yield "data.root: FLTrust trains on examples that the server holds and has labels of; give data.root above 0"


def _name_conflicts(read: _Reader) -> Iterable[str]:
    from fedsim.runs.directory import check_name

    name = read.given.get("name", "digits")
    if isinstance(name, str):
        try:
            check_name(name)
        except RequestError as error:
            yield from error.problems


_CHECKS: tuple[Callable[[_Reader], Iterable[str]], ...] = (
    _name_conflicts,
    _cohort_conflicts,
    _fraction_conflicts,
    _evaluation_conflicts,
    _batch_norm_conflicts,
    _client_conflicts,
    _root_conflicts,
    _privacy_conflicts,
)
