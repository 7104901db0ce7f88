"""The page tells the run as it was, works alone, and runs nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.errors import RequestError, RunError
from fedsim.census import census
from fedsim.records import Event
from fedsim.report import write_report
from fedsim.runs import RunStore
from tests.runs.holding import Holding, skewed
from tests.runs.making import EXPERIMENT, LAYOUT, MANIFEST, create, record, row

HOSTILE = (
    '</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028\u2029&amp;"\'<a href="javascript:alert(1)">x'
)


class Page(HTMLParser):
    """What a browser would find: elements with attributes, and the text outside scripts and styles."""

    def __init__(self, file: Path):
        super().__init__()
        self.html = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._inside = ""
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self._inside != "style":
            self.text += data

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "figures"))

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A finished run of five rounds with client evaluations and events."""
    clients = [
        {"client": c, "split": "client_test", "examples": c + 1, "accuracy": c / 19, "loss": 1.0} for c in range(20)
    ]
    with create(tmp_path / "run", rounds=4) as store:
        failed = Event(5, "client_failed", "ValueError: bad", client=3, stage="train", traceback="Traceback ...")
        store.commit(record(5, client_metrics=clients, completed=1, events=[failed]), {"row": row(5)})
        store.finish({"split": "test", "weights_sha256": "ab" * 32, "notes": ["Recalibrated on 120 proxy examples."]})
    return tmp_path / "run"


def test_the_summary_sentence_comes_first(run: Path) -> None:
    page = Page(write_report(run))
    assert "FedAvg reached 75.0\u00a0% test accuracy after 5 rounds (n = 40 examples)." in page.text
    assert page.text.index("FedAvg reached") < page.text.index("Learning curves")
    assert write_report(run) == run / "report.html"


def test_the_page_tells_the_run(run: Path) -> None:
    page = Page(write_report(run))
    for expected in (
        "95 % interval 59.8\u201385.8\u00a0%, n = 40",
        "Recalibrated on 120 proxy examples.",
        "320\u00a0B up, 400\u00a0B down",
        "6 of 20 clients trained at least once",
        "9 of 10 updates were combined",
        "50.0\u00a0% as mean over clients, 66.7\u00a0% pooled over their 210 examples",
        "the lowest is 0.0\u00a0% (client 0, 1 example)",
        "5 events: client failed 5\u00d7.",
        "ValueError: bad",
        "Traceback ...",
        '[strategy]\nname = "fedavg"',
        "ab" * 32,
        f"fedsim run {run}/experiment.toml --out {run}-again",
        "2.14",
    ):
        assert expected in page.text


def test_the_figures_are_the_runs_numbers(run: Path) -> None:
    figures = Page(write_report(run)).figures
    (metric,) = figures["metric"]["traces"]
    assert metric["x"]["round"] == [1, 2, 3, 4, 5]
    assert metric["x"]["bytes"] == [144, 288, 432, 576, 720]
    assert metric["x"]["seconds"] == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert metric["y"] == [0.55, 0.6, 0.65, 0.7, 0.75]
    assert [trace["name"] for trace in figures["loss"]["traces"]] == ["Test", "Training (cohort mean)"]
    assert sum(figures["clients"]["y"]) == 20
    assert sum(figures["participation"]["y"]) == 20
    assert dict(zip(figures["participation"]["x"], figures["participation"]["y"], strict=True)) == {
        0: 14, 1: 5, 2: 0, 3: 0, 4: 0, 5: 1
    }  # fmt: skip


def test_the_page_stands_alone_and_is_small(run: Path) -> None:
    page = Page(write_report(run))
    assert len(page.html.encode()) < 6e6
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "href", "action", "data"} & set(attributes), tag
    (policy,) = [a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe-eval" not in policy
    allowed = re.search("script-src ([^;]*);", policy)
    assert allowed is not None
    run_by_it = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run_by_it]
    assert allowed[1].split() == [f"'sha256-{digest}'" for digest in hashes]


def test_the_page_can_be_used_by_keyboard_and_screen_reader(run: Path) -> None:
    page = Page(write_report(run))
    assert page.attributes("html")[0]["lang"] == "en"
    assert len(page.attributes("h1")) == 1
    tables = len(page.attributes("table"))
    assert tables == len(page.attributes("caption")) > 2
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.attributes("th"))
    plots = [a for a in page.attributes("div") if a.get("class") == "plot"]
    assert len(plots) == 4
    assert all(a["role"] == "img" and a["aria-label"] for a in plots)
    scrolling = [a for a in page.attributes("div") if a.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)


def test_a_hostile_run_is_shown_as_text(tmp_path: Path) -> None:
    named = EXPERIMENT.replace('name = "digits"', f"name = {json.dumps(HOSTILE)}")
    named = named.replace('name = "fedavg"', f"name = {json.dumps('rules.py:' + HOSTILE)}")
    found = census(Holding(np.eye(3, dtype=np.int64)), HOSTILE, {1: HOSTILE})  # type: ignore[arg-type]
    event = Event(1, HOSTILE, HOSTILE, client=1, stage=HOSTILE, traceback=HOSTILE)
    evaluated = [{"client": 1, "split": "client_test", "examples": 1, HOSTILE: 0.5}]
    paths = [tmp_path / "a<b>&'\"", tmp_path / "<img src=x onerror=alert(1)>"]
    for path in paths:
        with RunStore.create(
            path, named, MANIFEST | {HOSTILE: {HOSTILE: HOSTILE}, "task": {"primary": HOSTILE}}, None, found
        ) as store:
            metrics = {"test": {HOSTILE: 0.5, "loss": 1.0, "examples": 3}, HOSTILE: {"loss": 2.0, HOSTILE: 1.0}}
            made = record(1, events=[event], metrics=metrics, client_metrics=evaluated)
            store.commit(made, {"row": row(1)})
            store.finish({"weights_sha256": HOSTILE, "notes": [HOSTILE], "split": "test"})
    for page in (Page(write_report(paths[0])), Page(write_report(paths, tmp_path / "both.html"))):
        assert [a.get("type", "own") for a, _ in page.scripts] == ["application/json", "own", "own"]
        assert page.attributes("img") == page.attributes("a") == []
        assert not [a for _, a in page.elements for name in a if name.startswith("on")]
        assert "alert(1)" in page.text
        raw = next(text for attributes, text in page.scripts if attributes.get("id") == "figures")
        assert not set(raw) & set("<>&\u2028\u2029")
        names = [trace["name"] for trace in page.figures["metric"]["traces"]]
        assert all("<" not in name for name in names)  # Plotly would read it as markup


def test_an_unfinished_run_and_one_without_rounds(tmp_path: Path) -> None:
    with create(tmp_path / "some", rounds=2):
        page = Page(write_report(tmp_path / "some"))  # beside its writer
    assert "the run is unfinished, with 2 of 5 rounds done." in page.text
    with create(tmp_path / "none"):
        pass
    page = Page(write_report(tmp_path / "none"))
    assert "FedAvg has no evaluation yet: 0 of 5 rounds are done." in page.text
    assert page.figures == {}


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        bad = {"test": {"accuracy": float("nan"), "loss": float("inf"), "examples": 4}}
        store.commit(record(1, metrics=bad, epsilon=float("inf")), {"row": row(1)})
        store.commit(record(2, metrics={"test": {"accuracy": 0.5, "loss": float("nan")}}), {"row": row(2)})
    page = Page(write_report(tmp_path))
    assert "50.0\u00a0% test accuracy after 2 rounds" in page.text
    assert "NaN" not in json.dumps(page.figures)


def test_another_task_names_its_own_metric(tmp_path: Path) -> None:
    manifest = MANIFEST | {"task": {"primary": "rmse", "higher_is_better": False}}
    with RunStore.create(tmp_path, EXPERIMENT, manifest, LAYOUT) as store:
        store.commit(
            record(1, metrics={"test": {"mae": 1.0, "rmse": 0.125, "loss": 2.0, "examples": 40}}), {"row": row(1)}
        )
        store.finish({})
    page = Page(write_report(tmp_path))
    assert "reached 0.125 test rmse after 1 round (n = 40 examples)." in page.text
    assert "95 % interval" not in page.text


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    with create(tmp_path):
        pass
    with sqlite3.connect(tmp_path / "run.db") as database:  # five thousand commits would take a while
        rounds = [(n, 1, 1, 10**7, 10**7, 0, None, None, None, 60.0, 50.0, None, "", 1e9, 1) for n in range(1, 5001)]
        database.executemany(f"INSERT INTO rounds VALUES ({', '.join('?' * 15)})", rounds)
        values = [(n, "test", name, 1 / n) for n in range(1, 5001) for name in ("accuracy", "loss")]
        database.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", values)
    page = Page(write_report(tmp_path))
    assert len(page.html.encode()) < 6e6
    (trace, *_) = page.figures["metric"]["traces"]
    assert len(trace["y"]) <= 1500
    assert trace["x"]["round"][-1] == 5000
    assert trace["x"]["seconds"][-1] == pytest.approx(5000 / 60, rel=1e-4)  # hours
    assert "1,000 of 5,000 rounds" in page.text


def test_several_runs_are_laid_over_one_another(run: Path, tmp_path: Path) -> None:
    other = EXPERIMENT.replace('"fedavg"', '"fedadam"')
    with RunStore.create(tmp_path / "other", other, MANIFEST, LAYOUT) as store:
        store.commit(record(1), {"row": row(1)})
    made = write_report([run, tmp_path / "other"])
    assert made == tmp_path / "report.html"
    page = Page(made)
    assert [trace["name"] for trace in page.figures["metric"]["traces"]] == ["run", "other"]
    assert "run 75.0\u00a0% test accuracy after 5 rounds; other 55.0\u00a0% test accuracy after 1 round." in page.text
    assert "strategy.name" in page.text
    assert "do not show that one setting is better" in page.text
    assert "FedAdam" in page.text


# ------------------------------------------------------------------------------------------------ who holds what


def counted(directory: Path, holding: Holding, **settings: Any) -> Path:
    """A run of two rounds whose clients were counted."""
    found = census(holding, "dirichlet (alpha 0.3)", **settings)  # type: ignore[arg-type]
    with RunStore.create(directory, EXPERIMENT, MANIFEST, LAYOUT, found) as store:
        for number in (1, 2):
            store.commit(record(number), {"row": row(number)})
    return directory


def test_the_page_tells_who_holds_what(tmp_path: Path) -> None:
    holding = Holding(
        np.array([[6, 0, 0], [2, 2, 2], [0, 0, 0], [0, 0, 8]]),
        {"test": np.array([1, 2, 0, 3])},
        {"test": range(40), "proxy": range(12), "attack": range(36)},  # the last are test examples, attacked
        held_out=np.array([1]),
    )
    page = Page(write_report(counted(tmp_path / "run", holding, attacks={3: "label_flip"})))
    for expected in (
        "4 clients hold 20 training examples, 5 each on average, from 0 to 8; the middle half of them has 0 to 6",
        "dealt by dirichlet (alpha 0.3)",
        "A client has 1.7 of the 3 classes on average, and its label mix is 0.44 away from that of all:",
        "Clients keep 6 for testing besides. The server holds 40 test examples and 12 proxy examples.",
        "1 client has nothing to train on. 1 client is held out and never trained on. 1 client attacks: label flip.",
        "of 4 clients trained at least once",  # the record's number, not the experiment's 20
    ):
        assert expected in page.text
    assert page.figures["population"] == {
        "kind": "population",
        "clients": [3, 0, 1, 2],
        "sizes": [8, 6, 6, 0],
        "marks": [{"name": "Held out", "at": [2]}, {"name": "Attack: label flip", "at": [0]}],
        "classes": [0, 1, 2],
        "counts": [[0, 6, 2, 0], [0, 0, 2, 0], [8, 0, 2, 0]],
    }
    table = page.text[page.text.index("Clients of digits and their examples") :]
    assert table.startswith(
        "Clients of digits and their examples"
        "ClientTrainingTestHeld outAttackClass 0Class 1Class 2"
        "383label flip008"
        "061600"
        "162yes222"
        "200000"
    )


def test_test_examples_that_are_the_servers_are_not_said_to_be_kept(tmp_path: Path) -> None:
    holding = Holding(skewed(4), {"validation": np.full(4, 2), "test": np.full(4, 25)}, matched=True)
    page = Page(write_report(counted(tmp_path / "run", holding)))
    assert "Clients keep 8 for validation besides. The server holds 40 test examples" in page.text
    assert "Clients test on the server's test examples" in page.text
    assert "comes to 100 examples, counted for each client" in page.text


def test_a_picture_of_labels_that_are_no_classes_shows_sizes(tmp_path: Path) -> None:
    page = Page(write_report(counted(tmp_path / "run", Holding(skewed(30), labelled=False))))
    figure = page.figures["population"]
    assert figure["sizes"] == sorted(skewed(30).sum(1).tolist(), reverse=True)
    assert figure["classes"] == figure["counts"] == []
    assert "How many examples each client has" in page.text
    assert "of which classes" not in page.text
    assert "label mix" not in page.text


def test_a_page_of_a_million_clients_of_many_classes_stays_small(tmp_path: Path) -> None:
    few = skewed(1000, 150)
    counts = np.zeros((1_000_000, 150), np.int8)
    counts[np.arange(0, 1_000_000, 1000)] = few.clip(max=100)
    counts[:, 7] += 1
    page = Page(write_report(counted(tmp_path / "run", Holding(counts))))
    figure = page.figures["population"]
    assert len(page.html.encode()) < 6e6
    assert len(json.dumps(figure)) < 60_000
    assert len(figure["clients"]) == len(figure["sizes"]) == len(figure["counts"][0]) == 100
    assert len(figure["classes"]) == len(figure["counts"]) == 100
    assert 7 in figure["classes"]
    sizes = counts.sum(1)
    assert (figure["sizes"][0], figure["sizes"][-1]) == (sizes.max(), sizes.min())
    assert "Shown are 100 of 1,000,000 clients, evenly chosen by size" in page.text
    assert "Of 150 classes, the 100 most frequent are shown." in page.text


def test_several_runs_tell_who_holds_what_in_words_and_a_table(tmp_path: Path) -> None:
    paths = [counted(tmp_path / name, Holding(skewed(5, 3, seed=i))) for i, name in enumerate("ab")]
    page = Page(write_report(paths, tmp_path / "both.html"))
    assert "population" not in page.figures
    assert page.text.count("5 clients hold") == page.text.count("and their examplesClientTraining") == 2


# ------------------------------------------------------------------------------------------------ what was not sent


def test_the_page_tells_what_was_not_sent(tmp_path: Path) -> None:
    manifest = MANIFEST | {"parameters": 5130, "frozen_parameters": 11_168_000, "personal_parameters": 832}
    with RunStore.create(tmp_path / "run", EXPERIMENT, manifest, LAYOUT) as store:
        store.commit(record(1, bytes_saved=4_500_000_000), {"row": row(1)})
    page = Page(write_report(tmp_path / "run"))
    assert (
        "Clients send 5,130 of 11,173,962 parameters (0.05\u00a0%): 11,168,000 are frozen and 832 stay with the"
        " clients; 4.50\u00a0GB were not sent." in page.text
    )
    assert "0.05\u00a0% of the model's 11.2\u00a0M parameters" in page.text
    assert "Not sent" in page.text


def test_a_run_that_sends_all_says_nothing_of_it(run: Path) -> None:
    page = Page(write_report(run))
    assert "not sent" not in page.text.lower()
    assert "parameters" not in page.text


# ------------------------------------------------------------------------------------------------ attacks


def attacked(directory: Path, success: float, **manifest: Any) -> Path:
    """A run in which an attack's success was measured."""
    with RunStore.create(directory, EXPERIMENT, MANIFEST | manifest, LAYOUT) as store:
        for number in (1, 2):
            metrics = record(number).metrics
            attack = {"attack": {"accuracy": success / number, "loss": 0.1, "examples": 300}}
            store.commit(record(number, metrics={**metrics, **attack}), {"row": row(number)})
        store.finish({"split": "attack"})
    return directory


def test_an_attacks_success_is_told_apart_from_accuracy(tmp_path: Path) -> None:
    page = Page(write_report(attacked(tmp_path / "run", 0.5)))
    traces = {trace["name"]: trace["y"] for trace in page.figures["metric"]["traces"]}
    assert traces == {"Test": [0.55, 0.6], "Attack success": [0.5, 0.25]}
    assert "FedAvg reached 60.0\u00a0% test accuracy after 2 rounds (n = 40 examples)." in page.text
    assert "Attack success25.0\u00a0%95 % interval 20.4\u201330.2\u00a0%, n = 300" in page.text
    assert "RoundTest accuracyTest lossAttack success" in page.text
    assert "attack accuracy" not in page.text.lower()
    assert "attack loss" not in page.text.lower()


def test_an_attacks_success_has_a_figure_where_it_does_not_fit_the_curves(tmp_path: Path) -> None:
    paths = [attacked(tmp_path / "a", 1.0), attacked(tmp_path / "b", 0.5)]
    page = Page(write_report(paths, tmp_path / "both.html"))
    assert [(t["name"], t["y"]) for t in page.figures["attack"]["traces"]] == [("a", [1.0, 0.5]), ("b", [0.5, 0.25])]
    assert [trace["name"] for trace in page.figures["metric"]["traces"]] == ["a", "b"]
    assert "Attack success over the run" in page.text
    other = Page(write_report(attacked(tmp_path / "other", 1.0, task={"primary": "loss"})))
    assert [trace["y"] for trace in other.figures["attack"]["traces"]] == [[1.0, 0.5]]
    assert "metric" not in other.figures


def test_what_cannot_be_read_or_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such directory"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_report(run, tmp_path / "file" / "report.html")
    (run / "run.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(RunError, match=r"run\.db is damaged"):
        write_report(run)
