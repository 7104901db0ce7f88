"""A Flower app's directory, read as ``flwr run`` reads it. Imports neither flwr nor torch, and runs nothing of the app.

``pyproject.toml`` names the app's two halves and its configuration::

    [tool.flwr.app.components]
    serverapp = "package.server_app:app"
    clientapp = "package.client_app:app"

    [tool.flwr.app.config]
    num-server-rounds = 3
    train.lr = 0.1                     # nested tables are dotted keys: "train.lr"

    [tool.flwr.federations.local-simulation]
    options.num-supernodes = 10        # newer releases: in config.toml of Flower's home, under [superlink.NAME]
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients import catalog, reading
from clients.errors import RequestError, nearest
from fedsim.overriding import read_value

Value = bool | int | float | str

PROJECT = "pyproject.toml"

_COMPONENTS = ("serverapp", "clientapp")
_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_PAIR = re.compile(r"""([^\s='"]+)\s*=\s*('[^']*'|"(?:[^"\\]|\\.)*"|\S+)(?:\s+|$)""")
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True)
class App:
    """A Flower app that can be simulated.

    Attributes:
        directory: where its ``pyproject.toml`` is; its modules are imported from there.
        name: the project's name, or the directory's.
        server: ``"module:attribute"`` of the ServerApp.
        client: ``"module:attribute"`` of the ClientApp.
        config: the run's configuration, nested tables as dotted keys, overrides applied.
        supernodes: how many clients there are.
    """

    directory: Path
    name: str
    server: str
    client: str
    config: dict[str, Value] = field(default_factory=dict)
    supernodes: int = 0


def read(directory: Path, overrides: Sequence[str] = (), supernodes: int | None = None) -> App:
    """Reads an app and checks what is asked of it.

    Args:
        directory: the app's folder.
        overrides: ``"key=value other='text'"`` each, values as in TOML (a bare word is a string), the last one counts;
            or the path of one TOML file.
        supernodes: how many clients there are; left out, what the app's federation or Flower's own configuration
            says.

    Raises:
        RequestError: with one line for each wrong thing.
    """
    path = directory.expanduser()
    project = _project(path)
    wrong: list[str] = []
    app = _table(project, "tool.flwr.app", wrong)
    components = _table(app, "components", wrong, "tool.flwr.app.")
    if not wrong and not components:
        wrong.append(
            f"{path / PROJECT}: no [tool.flwr.app.components]; it names a Flower app's halves: "
            'serverapp = "package.server_app:app" and clientapp = "package.client_app:app"'
        )
    elif not wrong:
        wrong += [problem for name in _COMPONENTS for problem in _check_component(path, components, name)]
        wrong += _hidden(path)
    try:
        config = flatten(_table(app, "config", wrong, "tool.flwr.app."), f"{path / PROJECT}: tool.flwr.app.config.")
    except RequestError as error:
        wrong += error.problems
    else:
        config, problems = _overridden(config, overrides)
        wrong += problems
    if supernodes is None:
        try:
            supernodes = _supernodes(project, path)
        except RequestError as error:
            wrong += error.problems
    elif supernodes < 1:
        wrong.append(f"--num-supernodes: {supernodes} is too small; at least one client is needed")
    if wrong:
        raise RequestError(wrong)
    name = project.get("project", {}).get("name")
    assert supernodes is not None
    return App(
        path.resolve(),
        name if isinstance(name, str) and name else path.resolve().name,
        components["serverapp"],
        components["clientapp"],
        config,
        supernodes,
    )


def flatten(table: Mapping[str, Any], where: str = "", prefix: str = "") -> dict[str, Value]:
    """Nested tables as dotted keys.

    Raises:
        RequestError: for each value that is not a bool, int, float or string.
    """
    flat: dict[str, Value] = {}
    wrong = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            try:
                flat |= flatten(value, where, f"{prefix}{key}.")
            except RequestError as error:
                wrong += error.problems
        elif isinstance(value, Value):
            flat[prefix + key] = value
        else:
            wrong.append(f"{where}{prefix}{key}: {_kind(value)} cannot be sent; give true, false, a number or a string")
    if wrong:
        raise RequestError(wrong)
    return flat


def _project(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such folder"
        raise RequestError(f"{path}: {what}; give the folder that holds the app's {PROJECT}")
    file = path / PROJECT
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = sorted(found.parent.name for found in path.glob(f"*/{PROJECT}"))
        mend = f"; did you mean {path / inside[0]}?" if inside else "; give the folder of a Flower app"
        raise RequestError(f"{path} holds no {PROJECT}{mend}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} is not TOML: {error}") from None
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}") from None


def _table(holder: Mapping[str, Any], dotted: str, wrong: list[str], prefix: str = "") -> Mapping[str, Any]:
    """An inner table, empty where there is none; what stands there and is no table is added to ``wrong``."""
    found: Any = holder
    for name in dotted.split("."):
        found = found.get(name, {})
        if not isinstance(found, Mapping):
            wrong.append(f"{PROJECT}: {prefix}{dotted}: {_kind(found)} where a table belongs")
            return {}
    return found


def _check_component(path: Path, components: Mapping[str, Any], name: str) -> Iterable[str]:
    """What is wrong with a component, as far as the source tells."""
    key = f"{path / PROJECT}: tool.flwr.app.components.{name}"
    said = components.get(name)
    if said is None:
        known = [known for known in components if known not in _COMPONENTS]
        yield f'{key}: missing; give "package.module:app"{nearest(name, known)}'
        return
    if not isinstance(said, str) or not _REFERENCE.fullmatch(said):
        yield f'{key}: {said!r} is not of the form "package.module:app"'
        return
    module, _, attribute = said.partition(":")
    file = reading.find(module, path)
    if file is None:
        top = module.split(".")[0]
        # A compiled or namespace package: only an import can tell.
        if reading.find(top, path) is None and not (path / top).is_dir():
            yield f"{key}: there is no module {module!r} in {path}"
        elif (path / top).exists():
            yield f"{key}: {path / top} has no module {module.removeprefix(top + '.')!r}"
        return
    try:
        read = catalog.read_file(file, key)
    except RequestError as error:
        yield from error.problems
        return
    first = attribute.split(".")[0]
    if first not in read.bound and not read.open:
        yield f"{key}: {file} defines no {first}{nearest(first, list(read.bound))}"


def _hidden(path: Path) -> Iterable[str]:
    """Modules of the app that cannot be imported beside fedsim's packages."""
    ours = Path(__file__).resolve().parents[2]
    for name in ("fedsim", "strategies", "clients"):
        for found in (path / name, path / f"{name}.py"):
            if found.exists() and found.resolve().parent != ours:
                yield f"{found}: fedsim has a package {name!r} too, and only one can be imported; rename the app's"


def _overridden(config: Mapping[str, Value], overrides: Sequence[str]) -> tuple[dict[str, Value], list[str]]:
    """The configuration with the overrides, and what is wrong with them."""
    changed = dict(config)
    wrong: list[str] = []
    try:
        given = _given(overrides, wrong)
    except RequestError as error:
        return changed, error.problems
    for key, value in given.items():
        if key not in config:
            known = f"; its keys are {', '.join(config)}" if 0 < len(config) <= 12 else ""
            none = "" if config else "; it has no [tool.flwr.app.config]"
            wrong.append(f"-c {key}: the app has no such key{known}{none}{nearest(key, list(config))}")
            continue
        wanted = type(config[key])
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            mend = "; write the app's own value with a point where fractions make sense" if wanted is int else ""
            mend = mend if isinstance(value, float) else ""
            wrong.append(f"-c {key}: {value!r} is not {_TYPES[wanted]}, as the app's {config[key]!r} is{mend}")
            continue
        changed[key] = value
    return changed, wrong


def _given(overrides: Sequence[str], wrong: list[str]) -> dict[str, Value]:
    """Dotted key -> value of all overrides, later ones over earlier ones; what is no pair is added to ``wrong``."""
    files = [text for text in overrides if text.strip().endswith(".toml") and "=" not in text]
    if files and len(overrides) > 1:
        raise RequestError(f"-c {files[0]}: a TOML file cannot be given beside other overrides; put them into it")
    if files:
        return flatten(_toml(Path(files[0].strip()).expanduser()), f"-c {files[0]}: ")
    given: dict[str, Value] = {}
    for text in overrides:
        place, stripped = 0, text.strip()
        while place < len(stripped):
            found = _PAIR.match(stripped, place)
            if found is None:
                left = stripped[place:]
                wrong.append(f"""-c {left}: not of the form "key=value key='text'\"""")
                break
            place = found.end()
            try:
                given |= flatten({found[1]: read_value(found[2])}, "-c ")
            except RequestError as error:
                wrong += error.problems
    return given


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"-c {path}: not TOML: {error}") from None
    except OSError as error:
        said = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise RequestError(f"-c {path}: {said}") from None


# ------------------------------------------------------------------------------------------------ how many clients


def _supernodes(project: Mapping[str, Any], path: Path) -> int:
    """The number of clients that the app's federation gives, or else Flower's own configuration."""
    wrong: list[str] = []
    federations = _table(project, "tool.flwr.federations", wrong)
    told = _told(federations, f"{path / PROJECT}: tool.flwr.federations")
    if told is None:
        home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "config.toml"
        told = _told(_connections(home), f"{home}: superlink")
    if told is None:
        wrong.append(
            "--num-supernodes: neither the app nor Flower's configuration says how many clients "
            "there are; give it, e.g. --num-supernodes 10"
        )
    if wrong:
        raise RequestError(wrong)
    assert told is not None
    return told


def _connections(file: Path) -> Mapping[str, Any]:
    """Flower's table of connections; none where there is no such file or it cannot be read."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8")).get("superlink", {})
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _told(federations: Mapping[str, Any], where: str) -> int | None:
    """``options.num-supernodes`` of the default federation, or of the only one that has it."""
    default = federations.get("default")
    options = {
        name: known["options"]
        for name, known in federations.items()
        if isinstance(known, Mapping) and isinstance(known.get("options"), Mapping)
    }
    having = [name for name, known in options.items() if "num-supernodes" in known]
    chosen = default if default in having else having[0] if len(having) == 1 else None
    if chosen is None:
        return None
    count = options[chosen]["num-supernodes"]
    if type(count) is not int or count < 1:
        raise RequestError(f"{where}.{chosen}.options.num-supernodes: {count!r} is not a whole number of at least 1")
    return count


def _kind(value: Any) -> str:
    """A TOML value's kind, in words."""
    kinds: dict[type, str] = {list: "a list", dict: "a table"}
    return kinds.get(type(value), f"{value!r} ({type(value).__name__})")
