"""Finding parts by reading source: adding a thing is adding a file, and nothing is imported before it must be."""

from __future__ import annotations

import functools
import hashlib
import sys
import textwrap
from pathlib import Path

import pytest

from clients import catalog
from clients.calls import parse_call, split_calls
from clients.errors import RequestError
from clients.kinds import Kind, declare, declared
from clients.parts import Part

SHAPES = """
    from __future__ import annotations
    import abc
    from collections.abc import Sequence
    from dataclasses import dataclass, field
    from typing import Annotated, ClassVar, Literal
    from pydantic import Field

    Level = Annotated[float, Field(ge=0, le=1)]

    class Shape:
        pass

    class Open(Shape, abc.ABC):
        @abc.abstractmethod
        def area(self): ...

    class FedBox(Open):
        '''A box.

        More.
        '''
        needs = "rows"
        def __init__(self, width: Level, *, kind: Literal["a", "b"] = "a", size: int | None = None): ...
        def area(self): ...

    class FedBoxPlus(FedBox):
        def __init__(self, extra: Sequence[int] = (), **rest): super().__init__(**rest)

    @dataclass(frozen=True)
    class RoundBall(Shape):
        radius: float = 1.0
        shared: ClassVar[int] = 3
        hidden: list = field(default_factory=list, init=False)

    @dataclass(frozen=True)
    class LIONBall(RoundBall):
        name = "lion"
        pair: tuple[int, int] = (1, 2)

    class _Private(Shape): ...
    class Unrelated: ...
"""


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with things of a kind of its own."""
    package = tmp_path / "zoo_of_shapes"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('not imported')\n")
    (package / "basic.py").write_text(textwrap.dedent(SHAPES))
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "far.py").write_text("from ..basic import RoundBall as Ball\nclass FarBall(Ball): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    known = declared()
    declare(Kind("shapes", "shape", "zoo_of_shapes", base="Shape", offered=("size",)))
    catalog._built_in.cache_clear()
    yield tmp_path
    from clients import kinds

    kinds._DECLARED.clear()
    kinds._DECLARED.update(known)


def test_a_file_is_all_that_a_new_thing_needs(shapes: Path) -> None:
    found = {entry.name: entry for entry in catalog.entries("shapes")}
    assert list(found) == ["fedbox", "fedboxplus", "round_ball", "lion", "far_ball"]
    box = found["fedbox"]
    assert (box.module, box.attribute, box.summary) == ("zoo_of_shapes.basic", "FedBox", "A box.")
    assert box.attributes == {"needs": "rows"}
    assert list(box.settings) == ["width", "kind"]
    assert list(found["fedboxplus"].settings) == ["width", "kind", "extra"]
    assert list(found["round_ball"].settings) == ["radius"]
    assert list(found["lion"].settings) == ["radius", "pair"]
    assert list(found["far_ball"].settings) == ["radius"]
    assert "zoo_of_shapes" not in sys.modules


def test_settings_are_checked_against_the_signature(shapes: Path) -> None:
    def wrong(name: str, **settings: object) -> list[str]:
        return catalog.check(Part(name, settings), "shapes", key="shape")

    assert wrong("FedBox", width=0.5, kind="b") == []
    assert wrong("fed_box") == ["shape.width: missing; give a number of at least 0 and of at most 1"]
    assert wrong("fedbox", width=2) == ["shape.width: 2 is out of range; give a number of at least 0 and of at most 1"]
    assert wrong("fedbox", width=1, kind="c") == ["shape.kind: 'c' is not 'a' or 'b'"]
    assert wrong("fedbox", width=1, size=3) == ["shape.size: unknown key; shape has width, kind"]
    assert wrong("fedboxplus", width=1, extra=[1, 2]) == []
    assert wrong("fedboxplus", width=1, extra=[1, "x"]) == ["shape.extra[1]: 'x' is not a whole number"]
    assert wrong("lion", pair=[1, 2]) == []
    assert wrong("lion", pair=[1, True]) == ["shape.pair[1]: true is not a whole number"]
    assert wrong("lyon") == [
        "shape: unknown shape 'lyon'; known are fedbox, fedboxplus, round_ball, lion, far_ball; did you mean 'lion'?"
    ]


def test_what_source_does_not_tell_is_left_to_the_import(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom somewhere import Base, Made\n"
        "class Net(torch.nn.Module): ...\nclass Child(Base): ...\nthing = make()\n"
    )
    for name in ("Net", "Child", "thing", "Made"):
        assert catalog.check(Part(f"own.py:{name}", {"anything": 1}), "tasks", tmp_path, key="task") == []


def test_an_own_class_built_on_a_shipped_one_is_checked(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from strategies import FedAdam\nclass Mine(FedAdam):\n"
        "    def __init__(self, warmup: int = 3, **rest):\n        super().__init__(**rest)\n"
    )
    part = Part("own.py:Mine", {"warmup": "x", "tau": -1, "colour": 2, "sampling": "all"})
    import fedsim.experiment  # noqa: F401  (declares the kinds)

    lines = catalog.check(part, "strategies", tmp_path, key="strategy")
    wrong = [line.split(":")[0].removeprefix("strategy.") for line in lines]
    assert wrong == ["warmup", "tau", "colour", "sampling"]


def test_build_calls_with_settings_and_with_what_is_asked_for(tmp_path: Path) -> None:
    import fedsim.kinds  # noqa: F401  (declares the kinds)

    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n"
        "def net(*, input_shape, width: int = 3, path: Path | None = None): return input_shape, width, path\n"
        "class Odd:\n    def __init__(self, n: int):\n        if n % 2 == 0: raise ValueError('n must be odd')\n"
    )
    built = functools.partial(catalog.build, base=tmp_path, key="model")
    assert built(Part("own.py:net", {"width": 5}), "models", input_shape=(2,), classes=10) == ((2,), 5, None)
    assert built(Part("own.py:net", {"path": "own.py"}), "models", input_shape=1)[2] == tmp_path / "own.py"
    with pytest.raises(RequestError, match="model: n must be odd"):
        built(Part("own.py:Odd", {"n": 2}), "models")
    with pytest.raises(RequestError, match=r"model\.n: missing; give a whole number"):
        built(Part("own.py:Odd"), "models")
    with pytest.raises(RequestError, match=r"model: own\.py has no Even; it defines Odd, net"):
        built(Part("own.py:Even"), "models")
    made = object()
    assert built(Part.of(made), "models") is made
    assert built(Part.of(lambda classes: classes), "models", classes=3, input_shape=(1,)) == 3
    with pytest.raises(RequestError, match=r"model: .* missing 1 required positional argument"):
        built(Part.of(lambda colour: colour), "models")
    function = catalog.build_function(Part("truncated_normal", {"std": 0.5}), "initializations")
    assert function.keywords == {"std": 0.5}


def test_modules_beside_the_experiment_are_found(tmp_path: Path) -> None:
    package = tmp_path / "zoo_of_tasks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text("def made(size: int = 3): return size\n")
    part = Part("zoo_of_tasks.deep:made", {"size": 4})
    assert catalog.check(part, "tasks", tmp_path, key="task") == []
    assert catalog.check(Part(part.name, {"sise": 4}), "tasks", tmp_path, key="task") == [
        "task.sise: unknown key; task has size; did you mean 'size'?"
    ]
    assert "zoo_of_tasks" not in sys.modules
    assert catalog.build(part, "tasks", tmp_path) == 4
    with pytest.raises(RequestError, match=r"task: zoo_of_tasks\.flat cannot be imported: ModuleNotFoundError"):
        catalog.load(Part("zoo_of_tasks.flat:made"), "tasks", tmp_path, key="task")


def test_packages_add_things_by_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedsim.experiment  # noqa: F401  (declares the kinds)

    (tmp_path / "zoo_addition.py").write_text(
        "from strategies import FedAvg\nclass Added(FedAvg):\n    '''From elsewhere.'''\n"
        "    def __init__(self, zeal: int = 3): super().__init__()\n"
    )
    distribution = tmp_path / "zoo_addition-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-addition\nVersion: 1.0\n")
    (distribution / "entry_points.txt").write_text("[fedsim.strategies]\nadded_one = zoo_addition:Added\n")
    monkeypatch.syspath_prepend(tmp_path)
    catalog._published.cache_clear()
    try:
        found = catalog.find("strategies", "AddedOne")
        assert (found.name, found.summary, list(found.settings)) == ("added_one", "From elsewhere.", ["zeal"])
        assert "zoo_addition" not in sys.modules
        assert type(catalog.build(Part("added_one"), "strategies")).__name__ == "Added"
    finally:
        catalog._published.cache_clear()


def test_a_file_is_run_once_and_pickled_by_value(tmp_path: Path) -> None:
    import pickle

    import cloudpickle

    (tmp_path / "helper_of_mine.py").write_text("VALUE = 3\n")
    (tmp_path / "own.py").write_text("import helper_of_mine\nclass Thing:\n    value = helper_of_mine.VALUE\n")
    thing = catalog.load(Part("own.py:Thing"), "tasks", tmp_path)
    assert catalog.load(Part(f"{tmp_path}/own.py:Thing"), "tasks") is thing
    assert thing.value == 3
    module = sys.modules.pop(thing.__module__)
    sent = cloudpickle.dumps(thing)
    assert pickle.loads(sent).value == 3
    sys.modules[module.__name__] = module


def test_a_file_that_cannot_be_imported_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import no_such_thing\nclass Thing: ...\n")
    with pytest.raises(RequestError, match=r"task: own\.py cannot be imported: ModuleNotFoundError: No module named"):
        catalog.load(Part("own.py:Thing"), "tasks", tmp_path, key="task")


def test_the_hash_is_that_of_the_users_file(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("class Thing: ...\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    part = Part("own.py:Thing")
    assert catalog.source_hash(part, "tasks", tmp_path) == digest
    assert catalog.source_hash(Part.of(catalog.load(part, "tasks", tmp_path)), "tasks") == digest
    assert catalog.source_hash(Part("classification"), "tasks") is None


def test_every_shipped_thing_can_be_imported() -> None:
    import fedsim.experiment  # noqa: F401  (declares the kinds)

    for kind in declared():
        for entry in catalog.entries(kind):
            assert catalog.load(Part(entry.name), kind).__name__ == entry.attribute
            own = entry.module.startswith(("clients.", "strategies.", "fedsim."))
            assert entry.summary or not own, f"{entry.name} has no docstring"


def test_calls_are_parts() -> None:
    assert parse_call("fedavg") == Part("fedavg")
    assert parse_call("fedprox(mu=0.1, mode=fast, on=true, sizes=[1, 2])") == Part(
        "fedprox", {"mu": 0.1, "mode": "fast", "on": True, "sizes": [1, 2]}
    )
    assert split_calls("fedavg, fedprox(mu=0.1, a=[1, 2], s='x,y)'), rules.py:Agreement(beta=0.5),") == [
        Part("fedavg"),
        Part("fedprox", {"mu": 0.1, "a": [1, 2], "s": "x,y)"}),
        Part("rules.py:Agreement", {"beta": 0.5}),
    ]
    for text in ("fedprox(0.1)", "fedprox(mu=", "fedprox(**x)", "", "a b", "fedprox(mu=f(1))", "fedprox(mu=0.1) x"):
        with pytest.raises(RequestError):
            split_calls(text)
