"""Reading Python source without running it: which classes and functions a file has, and what their arguments are.

A wrong name or setting is so refused in milliseconds, before torch is imported. What cannot be told from the source
alone is left open, and found when the thing is built.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import Field, Strict

REQUIRED = object()
#: A default that is an expression and not a literal.
COMPUTED = object()

_TYPES: dict[str, Any] = {
    "int": int, "float": float, "bool": bool, "str": str, "list": list, "tuple": tuple, "dict": dict,
    "Sequence": Sequence, "Mapping": Mapping, "Literal": Literal, "Optional": Optional, "Union": Union,
    "Annotated": Annotated, "Path": Path,
}  # fmt: skip
_TYPE_MODULES = ("typing", "collections.abc", "pathlib")
_NO_ARGUMENTS = ("object", "ABC", "Protocol", "Generic")


@dataclass(frozen=True)
class Parameter:
    """One argument: its type (``Any`` where the source alone does not tell), its default and how that is written."""

    annotation: Any
    default: Any
    shown: str
    keyword_only: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def is_path(self) -> bool:
        """``Path``, ``Path | None``, ``str | Path``: a file that is relative to the experiment's."""
        return self.annotation is Path or Path in getattr(self.annotation, "__args__", ())

    @property
    def is_folder(self) -> bool:
        """A folder, relative to the experiment's file, that need not exist yet (:data:`clients.recipe.Folder`)."""
        return "folder" in getattr(self.annotation, "__metadata__", ())

    def given(self, settings: Mapping[str, Any], name: str) -> Any:
        """What is given under a name, or the folder that is taken where none is; None for anything else."""
        return settings.get(name, self.default if self.is_folder and isinstance(self.default, str) else None)


@dataclass(frozen=True)
class Signature:
    """What a class or function may be called with; ``open`` where there may be arguments that cannot be seen."""

    parameters: Mapping[str, Parameter]
    open: bool = False


@dataclass(frozen=True)
class Module:
    """A parsed file.

    Attributes:
        name: its dotted name; a file that is no part of a package goes by its stem.
        path: the file.
        bound: the names it binds at top level, and the statement that does.
        open: whether it may bind more (a star import, a module ``__getattr__``).
    """

    name: str
    path: Path
    bound: Mapping[str, ast.stmt] = field(repr=False)
    open: bool

    @property
    def package(self) -> str:
        return self.name if self.path.stem == "__init__" else self.name.rpartition(".")[0]

    def classes(self) -> Iterator[ast.ClassDef]:
        return (node for node in self.bound.values() if isinstance(node, ast.ClassDef))

    def functions(self) -> Iterator[ast.FunctionDef]:
        return (node for node in self.bound.values() if isinstance(node, ast.FunctionDef))


def read(path: Path, name: str) -> Module:
    """Parses a file; ``name`` is its dotted name.

    Raises:
        OSError, SyntaxError, UnicodeDecodeError: where it cannot be read.
    """
    stat = path.stat()
    return _read(path, name, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1024)
def _read(path: Path, name: str, _changed: int, _size: int) -> Module:
    bound: dict[str, ast.stmt] = {}
    stub = path.with_suffix(".pyi")
    files = [stub, path] if stub.is_file() else [path]
    for file in files:
        for statement in _statements(ast.parse(file.read_bytes(), filename=str(file)).body):
            bound |= {known: statement for known in _names(statement)}
    return Module(name, path, bound, open="*" in bound or ("__getattr__" in bound and not stub.is_file()))


def find(dotted: str, beside: Path | None = None) -> Path | None:
    """The source file of a module, found without importing it or its parents.

    Args:
        dotted: its name, e.g. ``"strategies.robust"``.
        beside: a folder to look in first.

    Returns:
        A package's ``__init__.py``, a module's file, or None.
    """
    top, *rest = dotted.split(".")
    folders = [beside] if beside is not None and _within(beside, top) else _top_folders(top)
    for depth, part in enumerate([top, *rest]):
        found = next((file for folder in folders if (file := _within(folder, part))), None)
        if depth == len(rest) or found is None:
            return found
        folders = [found.parent] if found.stem == "__init__" else []
    return None


def files(package: str) -> list[tuple[str, Path]]:
    """A package's modules (dotted name and file), itself and its subpackages included; or a module alone."""
    root = find(package)
    if root is None:
        return []
    if root.stem != "__init__":
        return [(package, root)]
    found = []
    for path in sorted(root.parent.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found.append((".".join([package, *(part for part in parts if part != "__init__")]), path))
    return found


def follow(module: Module, name: str) -> tuple[Module, ast.stmt] | None:
    """Where a name of a module is defined: through ``from x import name``, within the same packages."""
    for _ in range(8):
        statement = module.bound.get(name)
        if not isinstance(statement, ast.ImportFrom):
            return (module, statement) if statement is not None else None
        name = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
        source = _imported(module, statement)
        if source is None:
            return None
        module = source
    return None


def lineage(module: Module, node: ast.ClassDef) -> tuple[list[tuple[Module, ast.ClassDef]], list[str]]:
    """A class and its ancestors, nearest first, as far as their source is at hand; and the bases that are not."""
    found, missing = [(module, node)], []
    for base in node.bases:
        name = last_name(base)
        place = follow(module, name) if isinstance(base, ast.Name) else None
        if place and isinstance(place[1], ast.ClassDef) and place[1] is not node:
            more, lost = lineage(place[0], place[1])
            found += [pair for pair in more if pair not in found]
            missing += lost
        elif name not in _NO_ARGUMENTS:
            missing.append(name)
    return found, missing


def is_abstract(ancestors: Sequence[tuple[Module, ast.ClassDef]]) -> bool:
    """Whether a method is still abstract in the first of these classes."""
    seen: set[str] = set()
    for _, node in ancestors:
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name not in seen:
                seen.add(item.name)
                if any(last_name(mark) == "abstractmethod" for mark in item.decorator_list):
                    return True
    return any(last_name(base) in ("ABC", "Protocol") for base in ancestors[0][1].bases)


def class_attributes(ancestors: Sequence[tuple[Module, ast.ClassDef]]) -> dict[str, Any]:
    """The literal class attributes (``needs = "rows"``), the nearest class's first."""
    found: dict[str, Any] = {}
    for _, node in reversed(ancestors):
        for item in node.body:
            plain = isinstance(item, ast.Assign) and len(item.targets) == 1
            target = item.targets[0] if plain else getattr(item, "target", None)  # type: ignore[attr-defined]
            field_of_dataclass = isinstance(item, ast.AnnAssign) and _is_dataclass(node) and not _is_class_var(item)
            if isinstance(item, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and not field_of_dataclass:
                value = _literal(item.value)
                if value is not COMPUTED:
                    found[target.id] = value
    return found


def signature(module: Module, node: ast.stmt) -> Signature:
    """What a class or function is called with."""
    if isinstance(node, ast.ClassDef):
        ancestors, missing = lineage(module, node)
        return _class_signature(ancestors, bool(missing))
    if isinstance(node, ast.FunctionDef):
        return _function_signature(module, node, skip=0)
    return Signature({}, open=True)


def _class_signature(ancestors: list[tuple[Module, ast.ClassDef]], unseen: bool) -> Signature:
    if not ancestors:
        return Signature({}, open=unseen)
    (module, node), rest = ancestors[0], ancestors[1:]
    own = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if own is not None:
        found = _function_signature(module, own, skip=1)
        if not found.open:
            return found
        above = _class_signature(rest, unseen)
        return Signature({**above.parameters, **found.parameters}, above.open)
    above = _class_signature(rest, unseen)
    if not _is_dataclass(node):
        return above
    return Signature({**above.parameters, **_fields(module, node)}, above.open)


def _function_signature(module: Module, node: ast.FunctionDef, skip: int) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(positional, defaults, [False] * len(positional), strict=True)][skip:]
    pairs += [*zip(arguments.kwonlyargs, arguments.kw_defaults, [True] * len(arguments.kwonlyargs), strict=True)]
    found = {
        argument.arg: _parameter(module, argument.annotation, default, keyword) for argument, default, keyword in pairs
    }
    return Signature(found, open=arguments.kwarg is not None)


def _fields(module: Module, node: ast.ClassDef) -> dict[str, Parameter]:
    """The arguments that a dataclass's own fields make."""
    found = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not _is_class_var(item):
            default = item.value
            if isinstance(default, ast.Call) and last_name(default.func) == "field":
                given = {word.arg: word.value for word in default.keywords}
                if _literal(given.get("init")) is False:
                    continue
                default = given.get("default", given.get("default_factory"))
            found[item.target.id] = _parameter(module, item.annotation, default)
    return found


def _parameter(
    module: Module, annotation: ast.expr | None, default: ast.expr | None, keyword: bool = False
) -> Parameter:
    type_ = Any if annotation is None else resolve(annotation, module)
    if default is None:
        return Parameter(type_, REQUIRED, "", keyword)
    return Parameter(type_, _literal(default), ast.unparse(default), keyword)


def resolve(node: ast.expr, module: Module) -> Any:
    """The type that an annotation stands for; ``Any`` where the source alone does not tell."""
    try:
        found = _resolve(node, module)
    except (_UnknownError, TypeError, SyntaxError):
        return Any
    return _from_list(found) if found is tuple else found


class _UnknownError(Exception):
    """An annotation that source alone does not tell."""


def _resolve(node: ast.expr, module: Module) -> Any:
    if isinstance(node, ast.Constant):
        if node.value is None:
            return None
        if isinstance(node.value, str):
            return _resolve(ast.parse(node.value, mode="eval").body, module)
        raise _UnknownError
    if isinstance(node, ast.Name):
        return _named_type(node.id, module)
    if isinstance(node, ast.Attribute):
        if _root(node) in ("typing", "t", "pathlib", "collections") and node.attr in _TYPES:
            return _TYPES[node.attr]
        raise _UnknownError
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_resolve(node.left, module), _resolve(node.right, module)]  # noqa: UP007
    if isinstance(node, ast.Subscript):
        return _subscript(node, module)
    raise _UnknownError


def _named_type(name: str, module: Module) -> Any:
    place = follow(module, name)
    if place is None or isinstance(place[1], ast.Import | ast.ImportFrom):
        imported = module.bound.get(name)
        known = imported is None or (isinstance(imported, ast.ImportFrom) and imported.module in _TYPE_MODULES)
        if known and name in _TYPES:
            return _TYPES[name]
        raise _UnknownError
    where, statement = place
    if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
        return _resolve(statement.value, where)
    raise _UnknownError


def _subscript(node: ast.Subscript, module: Module) -> Any:
    outer = _resolve(node.value, module)
    items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if outer is Literal:
        return Literal[tuple(ast.literal_eval(item) for item in items)]
    if outer is Annotated:
        made: Any = _resolve(items[0], module)
        for call in items[1:]:
            if isinstance(_literal(call), str):
                made = Annotated[made, _literal(call)]
                continue
            if not (isinstance(call, ast.Call) and last_name(call.func) == "Field" and not call.args):
                raise _UnknownError
            made = Annotated[made, Field(**{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})]
        return made
    inner = tuple(Ellipsis if _literal(item) is Ellipsis else _resolve(item, module) for item in items)
    made = outer[inner if len(inner) > 1 else inner[0]]
    return _from_list(made) if outer is tuple else made


def _from_list(made: Any) -> Any:
    """A TOML list serves for a tuple; what is in it is checked strictly all the same."""
    return Annotated[made, Strict(False)]


def _imported(module: Module, statement: ast.ImportFrom) -> Module | None:
    """The module that a ``from x import y`` reads from, where its source is of the same packages or lies beside."""
    name = statement.module or ""
    if statement.level:
        parents = module.package.split(".")
        kept = parents[: len(parents) - statement.level + 1]
        name = ".".join([*kept, *([name] if name else [])])
    known = {"clients", "strategies", "fedsim", module.name.split(".")[0]}
    beside = None if "." in module.name or module.path.stem == "__init__" else module.path.parent
    if name.split(".")[0] not in known and not (beside and _within(beside, name.split(".")[0])):
        return None
    path = find(name, beside)
    try:
        return None if path is None else read(path, name)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _top_folders(top: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(folder).parent for folder in spec.submodule_search_locations]
    return [Path(spec.origin).parent] if spec.origin and spec.has_location else []


def _within(folder: Path, name: str) -> Path | None:
    for file in (folder / name / "__init__.py", folder / f"{name}.py"):
        if file.is_file():
            return file
    return None


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at top level, those under ``if`` and ``try`` included."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(statement, block, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _names(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield statement.name
    elif isinstance(statement, ast.Import):
        yield from (alias.asname or alias.name.split(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _literal(node: ast.expr | None) -> Any:
    if node is None:
        return COMPUTED
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return COMPUTED


def last_name(node: ast.expr) -> str:
    """``c`` of ``a.b.c``, ``a.b.c[...]`` and ``a.b.c(...)``."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    if isinstance(node, ast.Subscript):
        return last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return getattr(node, "id", "")


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(last_name(mark) == "dataclass" for mark in node.decorator_list)


def _is_class_var(item: ast.AnnAssign) -> bool:
    return last_name(item.annotation) == "ClassVar"
