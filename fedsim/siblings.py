"""The two floors below: that they are fedsim's own, and that ``fedsim.strategies`` is ``strategies``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

FLOORS = ("strategies", "clients")


def install() -> None:
    """Checks the floors and makes ``fedsim.strategies...`` other names of ``strategies...``.

    Raises:
        ImportError: where another package of that name comes first.
    """
    for floor in FLOORS:
        check(floor, Path(__file__).resolve().parent.parent)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def check(floor: str, home: Path) -> None:
    """That the package ``floor`` that Python finds lies in ``home``.

    Raises:
        ImportError: says what hides it and what to do.
    """
    spec = importlib.util.find_spec(floor)
    if spec is None:
        raise ImportError(f"fedsim's own package {floor!r} is missing from {home}; install fedsim again")
    places = list(spec.submodule_search_locations or []) or [spec.origin or ""]
    found = Path(places[0]).resolve()
    if found != home / floor:
        what = "folder" if spec.submodule_search_locations is not None else "file"
        raise ImportError(
            f"the {what} {found} hides fedsim's own package {floor!r} ({home / floor}); rename it, "
            f"or start Python where {found.parent} is not on its search path (sys.path, PYTHONPATH)"
        )


class _Finder(MetaPathFinder):
    """Finds ``fedsim.strategies.robust`` as the very module ``strategies.robust``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "fedsim" or name.partition(".")[0] not in FLOORS:
            return None
        if importlib.util.find_spec(name) is None:
            return None
        return ModuleSpec(fullname, _SameModule(name))


class _SameModule(Loader):
    def __init__(self, name: str):
        self.name = name
        self.spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has put the other name's there
