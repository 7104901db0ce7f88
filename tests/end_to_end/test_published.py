"""What another package publishes by entry points goes by name like what is built in."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.end_to_end.commands import fedsim, interrupt_after, query, run, start

PACKAGE = Path(__file__).resolve().parents[2] / "examples" / "fedsim_extras"
SETTINGS = (
    *("--set", "rounds=20", "--set", "client.epochs=2"),
    *("--set", "strategy=steady_avg", "--set", "strategy.beta=0.5", "--set", "strategy.strength=0.8"),
    *("--set", 'checks=["layer_norms"]'),
)


def install(folder: Path) -> None:
    """Installs the package; without its build backend, by hand, as an installer would."""
    if importlib.util.find_spec("hatchling") and importlib.util.find_spec("pip"):
        options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder))
        subprocess.run([sys.executable, "-m", "pip", "install", *options, str(PACKAGE)], check=True)
        return
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    shutil.copy(PACKAGE / "fedsim_extras.py", folder)
    about = folder / f"fedsim_extras-{project['version']}.dist-info"
    about.mkdir()
    about.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {place}" for name, place in points.items())]
    about.joinpath("entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    """Only for the processes that are started here, whose path follows from this one's."""
    folder = tmp_path_factory.mktemp("installed")
    install(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, and its directory."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, "--out", "run", "--engine", "inline", *SETTINGS), folder / "run"


def test_they_are_listed_by_name_with_their_settings(tmp_path):
    code, out, _ = fedsim(tmp_path, "list")
    assert code == 0
    listed = (
        "agreement(strength=0.5)",
        "steady_avg(beta=0.9, strength=0.5)",
        "steady_mean(beta=0.9)",
        "layer_norms(largest=None)",
    )
    assert set(listed) <= {line.strip() for line in out.splitlines()}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("strategy=steady_avg", "strategy.bta=0.5"), "strategy.bta: unknown key; .*did you mean 'beta'?"),
        (('plugins=[{name = "agreement", strength = "much"}]',), "plugins.agreement.strength: 'much' "),
        (("strategy.aggregator=steddy_mean",), "unknown aggregator 'steddy_mean'; .*did you mean 'steady_mean'?"),
        (('checks=[{name = "layer_norms", largest = 0}]',), "checks.layer_norms.largest: 0 "),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, said, tmp_path):
    code, out, err = fedsim(tmp_path, "run", *(word for line in settings for word in ("--set", line)))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    for part in said.split(".*"):
        assert part in err
    assert not list(tmp_path.iterdir())


def test_it_does_what_it_says(whole):
    result, directory = whole
    assert result["bytes_down"] == 20 * 10 * 2 * 4 * result["parameters"]  # the weights and the last aggregate
    assert 0 < result["checks"]["layer_norms"]["largest_norm"] < result["checks"]["layer_norms"]["norm"]
    agreement = "SELECT json_extract(info, '$.agreement') FROM clients WHERE round "
    assert {value for (value,) in query(directory, agreement + "= 1")} == {1.0}
    later = [value for (value,) in query(directory, agreement + "> 1")]
    assert all(0 <= value < 1 for value in later)
    assert len(set(later)) > 50


@pytest.mark.slow
def test_killed_on_another_engine_it_ends_in_the_same_bits(whole, tmp_path):
    result, _ = whole
    arguments = ("--out", "run", "--engine", "processes", "--workers", "2", *SETTINGS)
    process = start(tmp_path, "run", "--quiet", *arguments)
    assert interrupt_after(process, tmp_path / "run", 4)
    process.communicate()
    resumed = run(tmp_path, *arguments, "--resume")
    assert resumed["weights_sha256"] == result["weights_sha256"]
    assert resumed["checks"] == result["checks"]


@pytest.mark.slow
def test_a_check_that_fails_ends_with_exit_3(tmp_path):
    limit = ("--set", 'checks=[{name = "layer_norms", largest = 0.01}]')
    code, _, err = fedsim(tmp_path, "run", "--quiet", "--out", "run", "--set", "rounds=1", *limit)
    assert code == 3
    assert "check failed: layer_norms" in err
    assert "above 0.01" in "".join(text for (text,) in query(tmp_path / "run", "SELECT message FROM events"))
