"""Transfer as a user runs it: what is frozen is not sent, adapters alone are, and a pretrained start helps."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from clients.errors import RequestError
from clients.transfer import merge_adapters
from fedsim.models import mlp, resnet18
from tests.end_to_end.commands import run

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "transfer.py"


class Language(nn.Module):
    """A causal language model of two transformer layers."""

    def __init__(self, words: int = 24, width: int = 32, length: int = 12):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, words)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x):
        return self.head(self.layers(self.embedding(x) + self.position, mask=self.mask, is_causal=True))


def sentences(words: int = 24, length: int = 12) -> fedsim.data.Source:
    """The next word follows from the last one."""
    line = [np.random.default_rng(0).integers(0, words, 300)]
    for _ in range(length):
        line.append((line[-1] * 5 + 3) % words)
    text = np.stack(line, axis=1)
    return fedsim.data.Source(train={"x": text[:, :-1], "y": text[:, 1:]})


@pytest.fixture
def language() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Language()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A resnet18 for 1000 classes with statistics, as a state dict."""
    model = resnet18(input_shape=(1, 8, 8), classes=1000)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    torch.save(model.state_dict(), tmp_path / "resnet18.pt")
    return tmp_path / "resnet18.pt"


@pytest.mark.slow
def test_fine_tuning_the_head_of_a_frozen_resnet18_sends_less_than_a_hundredth_and_says_so(file, tmp_path):
    text = f"""
    rounds = 2
    model = "resnet18"
    [data]
    clients = 60
    test_fraction = 0.05
    [client]
    epochs = 1
    initialization = {{ name = "file", path = "{file}", new = ["fc"] }}
    freeze = ["*", "!fc"]
    """
    (tmp_path / "head.toml").write_text(text)
    summary = run(tmp_path, "head.toml", "--out", "head", "--engine", "processes", "--workers", "2")
    whole = sum(p.numel() for p in resnet18(input_shape=(1, 8, 8), classes=10).parameters())
    assert summary["parameters"] == 5130
    updates = 2 * 10
    assert summary["bytes_up"] == updates * (4 * 5130 + 8)
    assert summary["bytes_up"] < 0.01 * updates * 4 * whole
    assert summary["bytes_saved"] == 2 * updates * 4 * (whole - 5130)
    report = (tmp_path / "head" / "report.html").read_text()
    assert f"5,130 of {whole:,} parameters" in report
    ledger = fedsim.load(tmp_path / "head").ledger
    assert ledger["bytes_saved"].sum() == summary["bytes_saved"]

    model, start = fedsim.load_model(tmp_path / "head"), torch.load(file)
    assert torch.equal(model.layer2[0].conv1.weight, start["layer2.0.conv1.weight"])
    assert torch.equal(model.layer2[0].bn1.running_var, start["layer2.0.bn1.running_var"])
    assert model.fc.weight.shape == (10, 512)


@pytest.mark.parametrize("kept", ["frozen", "personal"])
def test_a_run_keeps_what_it_rests_on_whatever_becomes_of_the_file(kept, file, tmp_path):
    """Frozen weights and the first ones of personal layers are in no checkpoint, and a resume needs them."""
    model, head, client = "resnet18", "fc", {"freeze": ["*", "!fc"]}
    if kept == "personal":
        file, model, head, client = tmp_path / "mlp.pt", "mlp", "head", {"personal": ["head"]}
        torch.save(mlp(input_shape=(64,), classes=10).state_dict(), file)
    client |= {"initialization": {"name": "file", "path": str(file), "new": [head] if kept == "frozen" else []}}
    data = {"clients": 10, "test_fraction": 0.05, "client_test_fraction": 0.1 if kept == "personal" else 0.0}
    settings = {"model": model, "data": data, "client": {"epochs": 1, **client}}
    settings["strategy"] = {"clients_per_round": 4}
    whole = fedsim.run(fedsim.Experiment(rounds=2, **settings), out=tmp_path / "whole")
    played = fedsim.rounds(fedsim.Experiment(rounds=2, **settings), out=tmp_path / "run")
    next(played), next(played)
    played.close()
    torch.save({name: torch.zeros_like(tensor) for name, tensor in torch.load(file).items()}, file)
    again = fedsim.run(out=tmp_path / "run", resume=True)
    assert again.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert again.metrics == whole.metrics
    models = [fedsim.load_model(tmp_path / name, None if kept == "frozen" else 3) for name in ("whole", "run")]
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models), strict=True))


def test_a_frozen_run_can_be_started_from_and_one_with_adapters_says_what_to_do(file, tmp_path):
    start = {"name": "file", "path": str(file), "new": ["fc"]}
    frozen = {"initialization": start, "freeze": ["*", "!fc"], "epochs": 1}
    first = fedsim.run(fedsim.Experiment(rounds=1, model="resnet18", client=frozen), out=tmp_path / "frozen")
    file_of = {"name": "file", "path": str(tmp_path / "frozen")}
    on = {"initialization": file_of, "lr": 1e-300, "epochs": 1}
    weights = fedsim.run(fedsim.Experiment(rounds=1, model="resnet18", client=on), out=tmp_path / "on").weights
    assert torch.equal(weights["fc.weight"], first.weights["fc.weight"])
    assert torch.equal(weights["layer1.0.conv1.weight"], torch.load(file)["layer1.0.conv1.weight"])

    fedsim.run(fedsim.Experiment(rounds=1, client={"adapters": {"rank": 2}, "lr": 0.01}), out=tmp_path / "adapters")
    from_adapters = {"initialization": {"name": "file", "path": str(tmp_path / "adapters")}}
    with pytest.raises(RequestError, match=r"of an adapter; merge it first"):
        fedsim.run(fedsim.Experiment(rounds=1, client=from_adapters), out=tmp_path / "no")
    merged = merge_adapters(fedsim.load_model(tmp_path / "adapters")).state_dict()
    torch.save(merged, tmp_path / "merged.pt")
    from_merged = {"initialization": {"name": "file", "path": str(tmp_path / "merged.pt")}, "lr": 1e-300}
    weights = fedsim.run(fedsim.Experiment(rounds=1, client=from_merged), out=tmp_path / "merged").weights
    assert torch.equal(weights["hidden1.weight"], merged["hidden1.weight"])


@pytest.mark.parametrize("execution", ["stacked", "loop"])
def test_adapters_of_a_language_model_train_and_are_all_that_is_sent(execution, language, tmp_path):
    experiment = fedsim.Experiment(
        rounds=4,
        model=language,
        task="tokens",
        data={"source": sentences(), "clients": 8, "partition": "iid"},
        client={"adapters": {"rank": 4}, "optimizer": "adam", "lr": 0.01, "execution": execution},
    )
    result = fedsim.run(experiment, out=tmp_path / "run")
    assert result.metrics["test"]["accuracy"] > 0.9
    assert all(".lora_" in name for name in result.weights)
    assert result.summary["bytes_up"] == 4 * 8 * (4 * result.summary["parameters"] + 8)
    assert fedsim.load(tmp_path / "run").manifest["execution"]["name"] == execution

    model = fedsim.load_model(tmp_path / "run", experiment=experiment)
    x = torch.randint(24, (3, 12))
    with torch.no_grad():
        outputs = model(x)
        assert float((language.eval()(x) - outputs).abs().max()) > 0.1
        assert torch.allclose(merge_adapters(model)(x), outputs, atol=1e-4)


def test_stacked_and_loop_come_to_the_same_adapters(language, tmp_path):
    rows = []
    for execution in ("stacked", "loop"):
        experiment = fedsim.Experiment(
            rounds=2,
            model=language,
            task="tokens",
            data={"source": sentences(), "clients": 8, "partition": "iid"},
            client={"adapters": {"rank": 4}, "lr": 0.3, "epochs": 1, "execution": execution},
        )
        rows.append(fedsim.run(experiment, out=tmp_path / execution).row)
    assert float((rows[0] - rows[1]).norm() / rows[1].norm()) < 1e-5


def test_an_adapter_that_the_model_goes_around_is_refused(tmp_path):
    class Around(nn.Module):
        def __init__(self, input_shape, classes):
            super().__init__()
            self.called = nn.Linear(input_shape[0], 16)
            self.read = nn.Linear(16, classes)

        def forward(self, x):
            return self.called(x) @ self.read.weight.T

    experiment = fedsim.Experiment(model=Around, client={"adapters": {"rank": 2}, "lr": 0.1})
    with pytest.raises(RequestError, match=r"client.adapters.layers: Around never calls read"):
        fedsim.run(experiment, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_personal_heads_are_trained_first_and_stay_with_the_clients(tmp_path):
    client = {"personal": ["head"], "personal_epochs": 1, "epochs": 2}
    data = {"clients": 10, "partition": "shards"}
    ends = set()
    for engine, workers in (("inline", None), ("processes", 2)):
        experiment = fedsim.Experiment(rounds=10, data=data, client=client)
        result = fedsim.run(experiment, out=tmp_path / engine, engine=engine, workers=workers)
        ends.add(result.summary["weights_sha256"])
        assert result.metrics["client_test"]["accuracy"] > 0.8
        assert result.summary["bytes_saved"] == 2 * 100 * 4 * (64 * 10 + 10)
    assert len(ends) == 1


def test_a_run_with_personal_heads_can_be_started_from_with_new_ones(tmp_path):
    first = fedsim.Experiment(rounds=2, client={"personal": ["head"]})
    start = fedsim.run(first, out=tmp_path / "first").weights
    file = {"name": "file", "path": str(tmp_path / "first")}
    with pytest.raises(RequestError, match=r"has no 'head.weight'.*new = \[\"head\"\]"):
        fedsim.run(fedsim.Experiment(rounds=1, client={"initialization": file}), out=tmp_path / "no")
    client = {"initialization": {**file, "new": ["head"]}, "lr": 1e-300}
    again = fedsim.run(fedsim.Experiment(rounds=1, client=client), out=tmp_path / "second").weights
    assert torch.equal(again["hidden1.weight"], start["hidden1.weight"])


@pytest.mark.slow
def test_digits_0_to_4_help_with_5_to_9(tmp_path, monkeypatch):
    """Mean of five seeds, equal rounds."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("transfer_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = [example.compare(seed) for seed in range(5)]
    means = {name: np.mean([result[name] for result in found]) for name in found[0]}
    print(json.dumps(found), file=sys.stderr)
    assert means["fine-tuned"] > means["from scratch"] + 0.03
