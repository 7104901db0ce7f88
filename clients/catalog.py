"""Finding, checking and building the things that an experiment names, without importing what is heavy too early.

Built-in things are found by reading source, never by importing: a wrong name or setting is refused in milliseconds,
and adding a thing is adding a file. Wherever a name is taken, ``"file.py:Thing"`` (relative to the experiment file),
``"package.module:Thing"`` or the object itself serve alike.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from clients import problems, reading
from clients.errors import FedsimError, RequestError, nearest
from clients.kinds import Kind, declared
from clients.parts import Part
from clients.reading import Module, Parameter, Signature

#: Kinds of which an experiment has a list each, under their own name.
_LISTED = ("plugins", "attacks", "checks")


@dataclass(frozen=True)
class Entry:
    """A thing that an experiment may name.

    Attributes:
        name: the name it goes by, e.g. ``"fedavg"``.
        kind: the name of its kind, e.g. ``"strategies"``.
        module: where it is defined: a module's dotted name, or the path of a user's file.
        attribute: its name there, e.g. ``"FedAvg"``.
        summary: the first line of its docstring.
        signature: what it is called with.
        attributes: the literal class attributes, e.g. ``{"needs": "rows"}``.
        is_function: whether it is a function, and no class.
    """

    name: str
    kind: str
    module: str
    attribute: str
    summary: str
    signature: Signature
    attributes: Mapping[str, Any]
    is_function: bool = False

    @property
    def settings(self) -> dict[str, Parameter]:
        """Its arguments less those that whoever builds it passes."""
        kind, parameters = kind_of(self.kind), self.signature.parameters
        offered = (*kind.offered, *(list(parameters)[:1] if kind.applied and self.is_function else ()))
        return {name: known for name, known in parameters.items() if name not in offered}


def kind_of(name: str) -> Kind:
    """The kind of that name, of the floors that have been imported.

    Raises:
        RequestError: with the nearest name.
    """
    kinds = declared()
    if name not in kinds:
        raise RequestError(f"unknown kind {name!r}; known are {', '.join(kinds)}{nearest(name, list(kinds))}")
    return kinds[name]


def entries(kind: str) -> list[Entry]:
    """Every thing of a kind that goes by a name: the built-in ones, then those of installed packages."""
    return [*_built_in(kind_of(kind)), *_published(kind_of(kind))]


def find(kind: str, name: str, *, key: str = "") -> Entry:
    """The thing of that name; case, ``_`` and ``-`` do not matter.

    Raises:
        RequestError: with the nearest name and the known ones, under ``key``.
    """
    wanted, of = _plain(name), kind_of(kind)
    for group in (_built_in, _published):
        for entry in group(of):
            if _plain(entry.name) == wanted:
                return entry
    known = [*of.also, *(entry.name for entry in entries(kind))]
    for other in declared().values():
        if (
            other.name in _LISTED
            and other is not of
            and any(_plain(entry.name) == wanted for entry in _built_in(other))
        ):
            raise RequestError(
                f"{_at(key)}{name} is a {other.noun} and no {of.noun}; give it under [[{other.name}]]. Known here are"
                f" {', '.join(known)}"
            )
    have = f"known are {', '.join(known)}" if known else f"there are no {of.name} yet"
    raise RequestError(f"{_at(key)}unknown {of.noun} {name!r}; {have}{nearest(name, known)}")


def canonical(kind: str, name: str) -> str:
    """The way in which a known name is written.

    Raises:
        RequestError: as :func:`find`.
    """
    also = next((known for known in kind_of(kind).also if _plain(known) == _plain(name)), None)
    return also or find(kind, name).name


def describe(part: Part, kind: str, base: Path | None = None, *, key: str = "") -> Entry | None:
    """What a part names, read from source; None for an object, or where the source alone does not tell.

    Raises:
        RequestError: where the name, the file or what it should define is missing.
    """
    if part.thing is not None:
        return None
    return _own(part, kind, base, key) if part.own else find(kind, part.name, key=key)


def check(part: Part, kind: str, base: Path | None = None, *, key: str = "", beside: Iterable[str] = ()) -> list[str]:
    """What is wrong with a part, one line a key, without importing it.

    Args:
        part: what the experiment names, with its settings.
        kind: of which kind it should be.
        base: the folder that files are relative to.
        key: the part's dotted key in the experiment.
        beside: further keys that the part's table has, offered as nearest names.
    """
    if not part.own and _plain(part.name) in kind_of(kind).also:
        return [problems.unknown_key(f"{key}.{name}", list(beside)) for name in part.settings]
    try:
        entry = describe(part, kind, base, key=key)
    except RequestError as error:
        return error.problems
    if entry is None:
        return []
    lines, settings = [], entry.settings
    for name, value in part.settings.items():
        where = f"{key}.{name}"
        if name in settings:
            lines += _wrong(settings[name], value, where, base)
        elif not entry.signature.open or name in kind_of(kind).offered:
            lines.append(problems.unknown_key(where, [*settings, *beside]))
    missing = [name for name, known in settings.items() if known.required and name not in part.settings]
    lines += [f"{key}.{name}: missing; give {_allowed(settings[name])}" for name in missing]
    return lines


def load(part: Part, kind: str, base: Path | None = None, *, key: str = "") -> Any:
    """The class, function or object that a part names; imports it.

    Raises:
        RequestError: where it is missing or its module cannot be imported.
    """
    if part.thing is not None:
        return part.thing
    if not part.own:
        entry = find(kind, part.name, key=key)
        return getattr(importlib.import_module(entry.module), entry.attribute)
    place, attribute = _split(part.name, key)
    try:
        module = load_file(_file(place, base)) if place.endswith(".py") else _import(place, base)
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        raise RequestError(f"{_at(key)}{place} has no {attribute}") from None
    except FedsimError:
        raise
    except Exception as error:
        raise RequestError(f"{_at(key)}{place} cannot be imported: {_said(error)}") from error


def build(part: Part, kind: str, base: Path | None = None, *, key: str = "", **offered: Any) -> Any:
    """The object that a part stands for.

    A class or function is called with the part's settings and with those of ``offered`` that its signature asks for; an
    object is returned as it is.

    Raises:
        RequestError: what is wrong with the part, or what its constructor says, under ``key``.
    """
    settings = _settings(part, kind, base, key)
    thing = load(part, kind, base, key=key)
    if not (inspect.isclass(thing) or inspect.isroutine(thing) or isinstance(thing, functools.partial)):
        return thing
    asked = _asked(thing)
    if "base" in kind_of(kind).offered:
        offered = {"base": base, **offered}
    arguments = {**settings, **{name: offered[name] for name in offered if name in asked}}
    try:
        return thing(**arguments)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{_at(key or kind_of(kind).noun)}{_said(error)}") from error


def build_inner(given: Any, kind: str, base: Path | None = None, *, key: str = "") -> Any:
    """The object that stands inside another part: of a name, a table with its name and settings, or itself.

    Raises:
        RequestError: what is wrong with it, under ``key``.
    """
    try:
        part = Part.of(given)
    except ValueError as error:
        raise RequestError(f"{_at(key)}{error}") from None
    return build(part, kind, base, key=key)


def build_function(part: Part, kind: str, base: Path | None = None, *, key: str = "") -> Callable[..., Any]:
    """The function that a part stands for, its settings bound; for things that are called again and again.

    Raises:
        RequestError: what is wrong with the part, under ``key``.
    """
    settings = _settings(part, kind, base, key)
    thing = load(part, kind, base, key=key)
    return functools.partial(thing, **settings) if settings else thing


def source_hash(part: Part, kind: str, base: Path | None = None) -> str | None:
    """SHA-256 of the file that a user's own thing is defined in; None for what goes by a catalogued name."""
    if not part.own:
        return None
    if part.thing is not None:
        what = part.thing if hasattr(part.thing, "__qualname__") else type(part.thing)
        try:
            path = Path(inspect.getsourcefile(what) or "")
        except TypeError:
            return None
    else:
        place, _ = _split(part.name, kind)
        path = _file(place, base) if place.endswith(".py") else reading.find(place, base) or Path()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def load_file(path: Path) -> ModuleType:
    """Imports a user's file once, under a name that depends on its path alone; its folder may be imported from.

    What it defines is pickled by value, so that workers need not find the file.
    """
    path = path.resolve()
    main = sys.modules.get("__main__")
    if main is not None and getattr(main, "__file__", None) and Path(main.__file__ or "").resolve() == path:
        return main
    name = f"fedsim_file_{re.sub(r'[^0-9A-Za-z]', '_', path.stem)}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    import cloudpickle

    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _may_import_from(path.parent)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    cloudpickle.register_pickle_by_value(module)
    return module


def read_file(path: Path, key: str = "") -> Module:
    """A user's Python file, parsed and not run.

    Raises:
        RequestError: where it is missing or is not Python, with the line.
    """
    try:
        return reading.read(path.resolve(), path.stem)
    except SyntaxError as error:
        raise RequestError(f"{_at(key)}{path} is not Python: {error.msg} (line {error.lineno})") from None
    except UnicodeDecodeError:
        raise RequestError(f"{_at(key)}{path} is not Python: it is not UTF-8 text") from None
    except OSError as error:
        said = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise RequestError(f"{_at(key)}{path}: {said}") from None


def snake(name: str) -> str:
    """The name that a class goes by: ``TrimmedMean`` is ``trimmed_mean``, ``DPFedAvg`` is ``dpfedavg``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()
    return words.replace("_", "") if re.match("[A-Z]*Fed[A-Z]", name) else words


@functools.lru_cache(maxsize=256)
def _built_in(kind: Kind) -> tuple[Entry, ...]:
    found: dict[str, Entry] = {}
    for package in kind.packages:
        for name, path in reading.files(package):
            module = reading.read(path, name)
            for entry in _classes(kind, module) if kind.bases else _functions(kind, module):
                found.setdefault(_plain(entry.name), entry)
    return tuple(found.values())


@functools.lru_cache(maxsize=256)
def _published(kind: Kind) -> tuple[Entry, ...]:
    """What installed packages add by entry points. One whose source cannot be read is not listed."""
    if kind.entry_points is None:
        return ()
    from importlib.metadata import entry_points

    found = []
    for point in entry_points(group=kind.entry_points):
        path = reading.find(point.module)
        module = path and reading.read(path, point.module)
        node = module.bound.get(point.attr) if module else None
        if module and node is not None:
            found.append(_entry(kind, module, node, point.attr, name=point.name))
    return tuple(found)


def _classes(kind: Kind, module: Module) -> list[Entry]:
    found = []
    for node in module.classes():
        ancestors, missing = reading.lineage(module, node)
        descends = not {above.name for _, above in ancestors[1:]}.union(missing).isdisjoint(kind.bases)
        public = node.name not in kind.bases and not node.name.startswith("_")
        if descends and public and not reading.is_abstract(ancestors):
            found.append(_entry(kind, module, node, node.name))
    return found


def _functions(kind: Kind, module: Module) -> list[Entry]:
    found = []
    for node in module.functions():
        public = not node.name.startswith("_") and node.returns is not None
        if public and reading.last_name(node.returns) in kind.returns:  # type: ignore[arg-type]
            entry = _entry(kind, module, node, node.name)
            if not kind.first or next(iter(entry.signature.parameters), "") in kind.first:
                found.append(entry)
    return found


def _entry(kind: Kind, module: Module, node: ast.stmt, attribute: str, name: str | None = None) -> Entry:
    attributes: dict[str, Any] = {}
    if isinstance(node, ast.ClassDef):
        attributes = reading.class_attributes(reading.lineage(module, node)[0])
        own = attributes.get("name")
        name = name or (own if isinstance(own, str) else snake(attribute))
    documented = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    text = (ast.get_docstring(node) or "") if documented else ""  # type: ignore[arg-type]
    return Entry(
        name=name or attribute,
        kind=kind.name,
        module=module.name,
        attribute=attribute,
        summary=text.partition("\n")[0],
        signature=reading.signature(module, node),
        attributes=attributes,
        is_function=isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef),
    )


def _own(part: Part, kind: str, base: Path | None, key: str) -> Entry | None:
    """A user's own thing, read from its file; None where only an import can tell."""
    place, attribute = _split(part.name, key)
    if place.endswith(".py"):
        module = read_file(_file(place, base), key)
    else:
        path = reading.find(place, base)
        if path is None:
            if reading.find(place.split(".")[0], base) is None and not _importable(place.split(".")[0]):
                raise RequestError(f"{_at(key)}there is no module {place!r}; give 'file.py:Thing' or install it")
            return None
        module = reading.read(path, place)
    if attribute in module.bound:
        found = reading.follow(module, attribute)
        return _entry(kind_of(kind), found[0], found[1], attribute) if found else None
    if module.open or "." in attribute:
        return None
    defined = [*(node.name for node in module.classes()), *(node.name for node in module.functions())]
    have = [name for name in defined if not name.startswith("_")]
    said = f"it defines {', '.join(have)}" if have else "it defines no class or function"
    raise RequestError(f"{_at(key)}{place} has no {attribute}; {said}{nearest(attribute, have)}")


def _wrong(parameter: Parameter, value: Any, key: str, base: Path | None) -> list[str]:
    if parameter.is_path:
        if not isinstance(value, str | Path):
            return [f"{key}: {problems.show(value)} is not a path; give a string"]
        return [] if _file(str(value), base).exists() else [f"{key}: no such file: {_file(str(value), base)}"]
    annotation = parameter.annotation
    try:
        TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        return problems.explain(error, annotation, key, value)
    return []


def _allowed(parameter: Parameter) -> str:
    if parameter.is_path:
        return "a path"
    return "a value" if parameter.annotation is Any else problems.describe(parameter.annotation)


def _settings(part: Part, kind: str, base: Path | None, key: str) -> dict[str, Any]:
    """A part's settings, checked, paths made absolute."""
    if part.thing is not None:
        return dict(part.settings)
    wrong = check(part, kind, base, key=key or kind_of(kind).noun)
    if wrong:
        raise RequestError(wrong)
    entry = describe(part, kind, base, key=key)
    settings = dict(part.settings)
    for name, known in (entry.settings if entry else {}).items():
        if name in settings and known.is_path:
            settings[name] = _file(str(settings[name]), base)
        elif known.is_folder and known.given(settings, name) is not None:
            settings[name] = str(_file(known.given(settings, name), base))
    return settings


def _asked(thing: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return set()


def _import(dotted: str, base: Path | None) -> ModuleType:
    _may_import_from(base or Path.cwd())
    return importlib.import_module(dotted)


def _may_import_from(folder: Path) -> None:
    """Adds a folder at the end of the search path, so that nothing in it hides an installed package."""
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))


def _importable(top: str) -> bool:
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False


def _file(place: str, base: Path | None) -> Path:
    return (base or Path.cwd()) / Path(place).expanduser()


def _split(name: str, key: str) -> tuple[str, str]:
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise RequestError(f"{_at(key)}{name!r} is not 'file.py:Thing' or 'package.module:Thing'")
    return place, attribute


def _said(error: BaseException) -> str:
    """One line of an exception; its type where the message alone says too little."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | TypeError) and text else f"{type(error).__name__}: {text}"


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _at(key: str) -> str:
    return f"{key}: " if key else ""
