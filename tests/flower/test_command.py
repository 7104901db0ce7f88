"""``fedsim simulate``: how an app's folder and the command line are read, and what is refused before anything runs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clients.errors import RequestError
from fedsim import cli
from fedsim.flower import apps, command

HOME = Path(__file__).resolve().parents[2]
Made = Callable[..., Path]

NESTED = ("num-server-rounds = 3", "num-server-rounds = 3\nmodel.hidden = 8\nmodel.name = 'mlp'\nfast = false")


def problems(*arguments: object, **named: object) -> list[str]:
    with pytest.raises(RequestError) as refused:
        command.read(*arguments, **named)  # type: ignore[arg-type]
    return refused.value.problems


# ------------------------------------------------------------------------------------------------ what is read


def test_an_app_is_what_its_pyproject_says(app: Made) -> None:
    found = apps.read(app("quickstart-numpy", NESTED))
    assert (found.name, found.server, found.client) == (
        "quickstart-numpy",
        "numpyexample.server_app:app",
        "numpyexample.client_app:app",
    )
    assert found.config == {
        "num-server-rounds": 3,
        "model.hidden": 8,
        "model.name": "mlp",
        "fast": False,
        "fraction-train": 0.5,
    }
    assert found.supernodes == 6


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["num-server-rounds=5 fraction-train=0.25"], {"num-server-rounds": 5, "fraction-train": 0.25}),
        (["num-server-rounds=5", "num-server-rounds=7"], {"num-server-rounds": 7}),
        (["fraction-train=1"], {"fraction-train": 1.0}),
        (["model.name='a b' fast=true"], {"model.name": "a b", "fast": True}),
        (['model.name="a=b c"'], {"model.name": "a=b c"}),
        (["model.name=resnet"], {"model.name": "resnet"}),
        (["model.hidden = 9"], {"model.hidden": 9}),
        (["model={hidden=9}"], {"model.hidden": 9}),
        ([], {}),
    ],
)
def test_overrides_are_toml_values(app: Made, overrides: list[str], changed: dict[str, apps.Value]) -> None:
    there = app("quickstart-numpy", NESTED)
    found = apps.read(there, overrides).config
    assert found == {**apps.read(there).config, **changed}
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in apps.read(there).config.items()
    }


def test_overrides_may_stand_in_a_file(app: Made, folder: Path) -> None:
    (folder / "mine.toml").write_text("num-server-rounds = 4\n[model]\nhidden = 3\n")
    found = apps.read(app("quickstart-numpy", NESTED), ["mine.toml"]).config
    assert (found["num-server-rounds"], found["model.hidden"]) == (4, 3)


def test_flower_reads_the_same_configuration(app: Made) -> None:
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    there = app("quickstart-numpy", NESTED)
    given = ["num-server-rounds=5 model.name='a b' model.hidden=9", "fast=true"]
    assert apps.read(there, given).config == get_fused_config_from_dir(there, parse_config_args(given))


@pytest.mark.parametrize(
    ("replaced", "count"),
    [
        (("num-supernodes = 6", "num-supernodes = 11"), 11),
        (('default = "local-simulation"', ""), 6),
        (("options.num-supernodes = 6", "options = {num-supernodes = 9}"), 9),
        (('default = "local-simulation"', 'default = "other"\nother.options.num-supernodes = 4'), 4),
    ],
)
def test_the_default_federation_says_how_many_clients_there_are(
    app: Made, replaced: tuple[str, str], count: int
) -> None:
    there = app("quickstart-numpy", replaced)
    assert apps.read(there).supernodes == count
    assert apps.read(there, supernodes=3).supernodes == 3


def test_flowers_own_configuration_says_it_where_the_app_does_not(app: Made, folder: Path) -> None:
    there = app("quickstart-numpy", ("options.num-supernodes = 6", ""))
    (folder / "flwr-home").mkdir()
    text = '[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\noptions.num-supernodes = 12\n'
    (folder / "flwr-home" / "config.toml").write_text(text)
    assert apps.read(there).supernodes == 12


def test_nothing_of_an_app_is_run_to_read_it(app: Made) -> None:
    there = app()
    (there / "numpyexample" / "__init__.py").write_text("raise SystemExit('run')")
    (there / "numpyexample" / "server_app.py").write_text("raise SystemExit('run')\napp = None")
    assert apps.read(there).server == "numpyexample.server_app:app"


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["num-server-round=5"], "-c num-server-round: the app has no such key*did you mean 'num-server-rounds'?"),
        (["num-server-rounds=many"], "-c num-server-rounds: 'many' is not a whole number, as the app's 3 is"),
        (["num-server-rounds=2.5"], "-c num-server-rounds: 2.5 is not a whole number*"),
        (["num-server-rounds=true"], "-c num-server-rounds: True is not a whole number*"),
        (["fraction-train='0.5'"], "-c fraction-train: '0.5' is not a number, as the app's 0.5 is"),
        (["fraction-train=[0.5]"], "-c fraction-train: a list cannot be sent*"),
        (["fraction-train"], '-c fraction-train: not of the form "key=value*'),
        (["fraction-train=0.5 oops"], '-c oops: not of the form "key=value*'),
        (["nowhere.toml"], "-c nowhere.toml: no such file"),
        (["mine.toml", "fraction-train=0.5"], "-c mine.toml: a TOML file cannot be given beside other overrides*"),
    ],
)
def test_an_override_that_does_not_fit_is_one_line(app: Made, overrides: list[str], said: str) -> None:
    import fnmatch

    (line,) = problems(app(), overrides)
    assert fnmatch.fnmatchcase(line.replace("[", "("), said.replace("[", "(")), line


@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        (("numpyexample.server_app:app", "numpyexample.sever_app:app"), "has no module 'sever_app'"),
        (("numpyexample.server_app:app", "nowhere_to_be.found:app"), "there is no module 'nowhere_to_be.found'"),
        (("numpyexample.server_app:app", "numpyexample.server_app:ap"), "defines no ap; did you mean 'app'?"),
        (("numpyexample.server_app:app", "numpyexample.server_app"), 'is not of the form "package.module:app"'),
        (
            ("serverapp =", "server-app ="),
            "serverapp: missing; give \"package.module:app\"; did you mean 'server-app'?",
        ),
        (("[tool.flwr.app.components]", "[tool.flwr.app.parts]"), "no [tool.flwr.app.components]"),
        (("[tool.flwr.app]", "[tool.flwr"), "is not TOML"),
        (("fraction-train = 0.5", "fraction-train = [0.5]"), "config.fraction-train: a list cannot be sent"),
        (("num-supernodes = 6", "num-supernodes = '6'"), "num-supernodes: '6' is not a whole number of at least 1"),
        (("options.num-supernodes = 6", ""), "--num-supernodes: neither the app nor Flower's configuration says"),
    ],
)
def test_an_app_that_cannot_be_run_is_one_line(app: Made, replaced: tuple[str, str], said: str) -> None:
    (line,) = problems(app("quickstart-numpy", replaced))
    assert said in line


def test_all_that_is_wrong_is_said_at_once(app: Made) -> None:
    found = problems(app(), ["lr=1", "fraction-train=x"], "0", "inlin", "none", "-1")
    assert [line.split(":")[0] for line in found] == [
        "-c lr",
        "-c fraction-train",
        "--num-supernodes",
        "--engine",
        "--workers",
        "--seed",
    ]
    assert "did you mean 'inline'?" in found[3]


def test_a_folder_that_is_no_app_is_refused(folder: Path, app: Made) -> None:
    app()
    (folder / "file").touch()
    assert "there is no such folder" in problems(folder / "nowhere")[0]
    assert "is a file" in problems(folder / "file")[0]
    assert "did you mean" in problems(folder)[0]  # it holds one app


@pytest.mark.parametrize("name", ["strategies.py", "clients"])
def test_an_app_with_a_module_of_fedsims_name_is_refused(app: Made, name: str) -> None:
    there = app()
    (there / name).mkdir()
    (line,) = problems(there)
    assert line.startswith(f"{there / name}: fedsim has a package {name.removesuffix('.py')!r} too")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dropout": "1"}, "--dropout: '1' is not a number from 0 to below 1"),
        ({"client_timeout": "soon"}, "--client-timeout: 'soon' is not a number above 0"),
        (
            {"client_timeout": "3", "engine": "inline"},
            "--client-timeout: the engine inline cannot enforce it; take --engine processes",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(app: Made, given: dict[str, str], said: str) -> None:
    assert problems(app(), **given) == [said]


def test_a_folder_that_holds_a_run_is_not_written_over(app: Made, folder: Path) -> None:
    (folder / "old").mkdir()
    (folder / "old" / "run.db").touch()
    assert problems(app(), out=folder / "old") == [f"--out: {folder / 'old'} holds a run; give another folder"]


def test_a_refusal_takes_no_time_and_writes_nothing(app: Made, folder: Path) -> None:
    there = app()
    code = (
        "import sys; from fedsim.cli import main; code = main(sys.argv[1:]);"
        "print([name for name in ('torch', 'flwr', 'ray', 'numpy') if name in sys.modules]); sys.exit(code)"
    )
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-c", code, "simulate", str(there), "-c", "lr=1"],
        cwd=folder,
        env={"PYTHONPATH": str(HOME), "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout.strip()) == (2, "[]")
    assert ended.stderr.splitlines() == [
        "-c lr: the app has no such key; its keys are num-server-rounds, fraction-train"
    ]
    assert not (folder / "runs").exists()
    # A fifth of a second here; the bound leaves room for a machine that does something else meanwhile.
    assert time.perf_counter() - began < 3


def test_the_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--help"]) == 0
    said = capsys.readouterr().out
    for option in ("-c", "--num-supernodes", "--engine", "--workers", "--seed", "--out", "--json", "--quiet"):
        assert option in said
