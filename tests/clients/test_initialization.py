from __future__ import annotations

import contextlib
import math
import random

import pytest
import safetensors.torch
import torch
from torch import nn

import fedsim
from clients.errors import RequestError
from clients.initialization import fans, initialize
from clients.weights import Layout
from strategies import Aggregator

VARIANCE = {
    "xavier_uniform": lambda i, o: 2 / (i + o),
    "xavier_normal": lambda i, o: 2 / (i + o),
    "he_uniform": lambda i, o: 2 / i,
    "he_normal": lambda i, o: 2 / i,
    "lecun_uniform": lambda i, o: 1 / i,
    "lecun_normal": lambda i, o: 1 / i,
}


@pytest.mark.parametrize("name", VARIANCE)
@pytest.mark.parametrize(
    ("layer", "fan_in", "fan_out"),
    [
        (nn.Linear(200, 150), 200, 150),
        (nn.Conv2d(32, 64, 3, groups=4), 8 * 9, 16 * 9),
        (nn.ConvTranspose2d(32, 64, 3), 32 * 9, 64 * 9),
    ],
)
def test_the_empirical_spread_is_the_papers(name, layer, fan_in, fan_out):
    assert fans(layer) == (fan_in, fan_out)
    weight = initialize(layer, name, seed=0).weight.detach()
    expected = math.sqrt(VARIANCE[name](fan_in, fan_out))
    # The standard deviation of N normal draws has standard error expected / sqrt(2 N).
    assert abs(float(weight.std()) - expected) < 3 * expected / math.sqrt(2 * weight.numel())
    if name.endswith("uniform"):
        assert float(weight.abs().max()) <= math.sqrt(3) * expected
    assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def test_fans_where_torch_has_them_wrong():
    assert fans(nn.Conv2d(8, 16, 3, groups=4)) == (18, 36)
    assert fans(nn.ConvTranspose2d(8, 16, 3)) == (72, 144)


@pytest.mark.parametrize("seed", range(3))
def test_he_keeps_the_variance_through_twenty_relu_layers_of_width_1024(seed):
    net = nn.Sequential(*[part for _ in range(20) for part in (nn.Linear(1024, 1024), nn.ReLU())])
    initialize(net, "he_normal", seed=seed)
    x = torch.randn(128, 1024, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        ratio = float(net(x).square().mean() / x.square().mean())
    assert 0.5 < ratio < 2


def test_xavier_keeps_the_scale_of_tanh_layers_where_torchs_default_loses_it():
    net = nn.Sequential(*[part for _ in range(20) for part in (nn.Linear(512, 512), nn.Tanh())])
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept = float(initialize(net, "xavier_normal", seed=0)(x).square().mean())
        lost = float(initialize(net, "default", seed=0)(x).square().mean())
    assert kept > 0.02
    assert lost < kept / 10


def test_settings_of_the_papers():
    leaky = initialize(nn.Linear(400, 300), {"name": "he_normal", "slope": 0.5, "mode": "fan_out"}, seed=0).weight
    assert abs(float(leaky.detach().std()) - math.sqrt(2 / (1.25 * 300))) < 1e-3
    gained = initialize(nn.Linear(400, 300), {"name": "xavier_uniform", "gain": 5 / 3}, seed=0).weight
    assert abs(float(gained.detach().std()) - 5 / 3 * math.sqrt(2 / 700)) < 2e-3


def test_orthogonal_zeros_and_truncated_normal():
    weight = initialize(nn.Linear(40, 30), "orthogonal", seed=0).weight.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(30), atol=1e-5)
    assert initialize(nn.Linear(4, 3), "zeros", seed=0).weight.abs().sum() == 0
    weight = initialize(nn.Linear(400, 300), {"name": "truncated_normal", "std": 0.1}, seed=0).weight.detach()
    assert float(weight.abs().max()) <= 0.2


def test_norm_layers_start_at_identity_and_others_by_their_own_rule():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Embedding(100, 8))
    model[1].weight.data.fill_(5)
    initialize(model, "he_normal", seed=0)
    assert model[1].weight.eq(1).all()
    assert model[1].bias.eq(0).all()
    assert abs(float(model[3].weight.detach().std()) - 1) < 0.1


def test_the_same_seed_gives_the_same_weights_and_another_gives_others():
    def made(name, seed):
        return [
            p.detach().clone()
            for p in initialize(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), name, seed).parameters()
        ]

    for name in ("he_normal", "default"):
        assert all(map(torch.equal, made(name, 0), made(name, 0)))
        assert not all(map(torch.equal, made(name, 0), made(name, 1)))
    # Layers draw from streams of their own: the two differ even where shapes agree.
    twins = initialize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "he_normal", 0)
    assert not torch.equal(twins[0].weight, twins[1].weight)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(RequestError, match="he_normal"):
        initialize(nn.Linear(2, 2), "he_norml", seed=0)


def net():
    layers = {"conv": nn.Conv2d(1, 3, 2), "norm": nn.BatchNorm2d(3), "hidden": nn.Linear(8, 6), "head": nn.Linear(6, 4)}
    return nn.ModuleDict(layers)


def test_layers_can_be_drawn_otherwise_by_pattern():
    plain = initialize(net(), "he_normal", seed=0)
    patterns = {"h*": {"name": "orthogonal", "gain": 2.0}, "head.*": "zeros"}
    model = initialize(net(), "he_normal", seed=0, layers=patterns)
    assert torch.equal(model["conv"].weight, plain["conv"].weight)
    rows = model["hidden"].weight.detach()
    assert torch.allclose(rows @ rows.T, 4 * torch.eye(6), atol=1e-5)
    assert model["head"].weight.abs().sum() == 0  # the last pattern that matches wins


def test_embeddings_can_be_drawn_by_pattern_with_torchs_fans_and_keep_their_padding():
    words = nn.Sequential(nn.Embedding(500, 80, padding_idx=2))
    initialize(words, "he_normal", 0, layers={"0": {"name": "he_normal", "mode": "fan_in"}})
    weight = words[0].weight.detach()
    rows = torch.cat([weight[:2], weight[3:]])
    assert abs(float(rows.std()) - math.sqrt(2 / 80)) < 3 * math.sqrt(2 / 80) / math.sqrt(2 * rows.numel())
    assert weight[2].eq(0).all()


def test_default_for_a_layer_is_its_own_rule_and_not_what_the_others_have():
    model = initialize(net(), "he_normal", seed=0, layers={"head": "default"})
    assert torch.equal(model["head"].weight, initialize(net(), "default", seed=0)["head"].weight)
    assert not torch.equal(model["head"].weight, initialize(net(), "he_normal", seed=0)["head"].weight)
    assert model["head"].bias.abs().min() > 0


def test_a_model_that_is_one_layer_is_named_by_its_weight():
    assert initialize(nn.Linear(4, 3), None, 0, layers={"weight": "zeros"}).weight.eq(0).all()
    with pytest.raises(RequestError, match="the model has weight"):
        initialize(nn.Linear(4, 3), None, 0, layers={"head": "zeros"})


def test_a_weight_that_is_computed_from_others_is_never_said_to_be_drawn():
    model = nn.ModuleDict({"head": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "last": nn.Linear(3, 3)})
    with pytest.raises(RequestError, match=r"the model has last$"):
        initialize(model, None, 0, layers={"head": "zeros"})


def test_half_precision_has_the_rounded_draws_of_float32():
    plain, half = initialize(net(), "orthogonal", 0), initialize(net().bfloat16(), "orthogonal", 0)
    assert torch.equal(half["hidden"].weight, plain["hidden"].weight.bfloat16())


def in_place(weight, fan_in, fan_out, generator):
    nn.init.uniform_(weight, 1.0, 2.0, generator=generator)


def test_a_function_of_ones_own_may_fill_in_place_or_return():
    assert initialize(net(), in_place, 0)["head"].weight.min() >= 1
    made = initialize(net(), lambda weight, i, o, generator: torch.full_like(weight, i), 0, layers={"conv": in_place})
    assert made["head"].weight.eq(6).all()
    assert made["conv"].weight.min() >= 1
    ones = initialize(net(), lambda model, generator: [p.fill_(1) for p in model.parameters()] and model, 0)
    assert all(p.eq(1).all() for p in ones.parameters())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda weight, i, o, generator: torch.zeros(()), r"returned shape \[\] for a weight of shape \[3, 1, 2, 2\]"),
        (lambda weight, i, o, generator: 0.0, "returned float for a weight of shape"),
        (lambda model, generator: net(), "did not return the model; fill the given one"),
    ],
    ids=["another shape", "a number", "another model"],
)
def test_what_a_function_of_ones_own_must_not_return(wrong, said):
    with pytest.raises(RequestError, match=r"^client\.initialization: .*" + said):
        initialize(net(), wrong, 0)


@pytest.mark.parametrize(
    "part",
    [
        {"name": "truncated_normal", "std": 0.0},
        {"name": "orthogonal", "gain": math.nan},
        {"name": "xavier_normal", "gain": -1.0},
        {"name": "he_normal", "slope": -0.1},
        {"name": "he_uniform", "mode": "fan"},
    ],
    ids=lambda part: part["name"],
)
def test_settings_that_give_no_spread_are_refused(part):
    with pytest.raises(RequestError, match=r"^client\.initialization\.(std|gain|slope|mode): "):
        initialize(net(), part, 0)


def test_patterns_alone_keep_the_rest_of_a_users_own_weights():
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    initialize(model, None, seed=0, layers={"head.weight": "xavier_normal"})
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert model["head"].bias.abs().sum() == 0


def test_a_pattern_that_matches_nothing_is_refused_with_the_layers_there_are(tmp_path):
    with pytest.raises(
        RequestError, match=r"client\.layer_initialization\.hed: matches no layer.*hidden, head.*'head'"
    ):
        initialize(net(), "he_normal", 0, layers={"hed": "zeros"})
    with pytest.raises(RequestError, match="whole models"):
        initialize(net(), "he_normal", 0, layers={"head": {"name": "file", "path": str(tmp_path)}})


def from_file(model, path):
    return initialize(model, {"name": "file", "path": str(path)}, seed=0)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_a_file_of_weights_comes_back_statistics_included(name, tmp_path):
    saved = net()
    saved["norm"].running_mean.fill_(3.0)
    if name.endswith("pt"):
        torch.save(saved.state_dict(), tmp_path / name)
    else:
        safetensors.torch.save_file(saved.state_dict(), tmp_path / name)
    renamed = (tmp_path / name).rename(tmp_path / "weights.bin")  # what it is called does not matter
    model = from_file(net(), renamed)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in saved.state_dict().items())
    halves = {key: value.to(torch.bfloat16) for key, value in saved.named_parameters()}
    torch.save(halves, tmp_path / "half.pt")  # buffers may be missing
    assert torch.equal(from_file(net(), tmp_path / "half.pt")["head"].weight, halves["head.weight"].float())


def test_the_old_format_of_torch_is_read_too(tmp_path):
    saved = net()
    torch.save(saved.state_dict(), tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(from_file(net(), tmp_path / "w.bin")["head"].weight, saved["head"].weight)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_numbers_that_the_model_cannot_hold_are_refused(tmp_path):
    state = net().double().state_dict()
    state["head.bias"][0] = 1e300
    state["conv.bias"] = state["conv.bias"].to(torch.complex64)
    state["hidden.weight"] = state["hidden.weight"].to_sparse()
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(RequestError) as caught:
        from_file(net(), tmp_path / "w.pt")
    assert [line.split("'")[1] for line in caught.value.problems] == ["conv.bias", "hidden.weight", "head.bias"]
    assert "too large for float32" in caught.value.problems[2]


def test_tied_weights_need_one_of_their_names(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    torch.save({"a.bias": torch.ones(3), "b.bias": torch.ones(3), "b.weight": torch.eye(3)}, tmp_path / "w.pt")
    assert torch.equal(from_file(model, tmp_path / "w.pt")["a"].weight, torch.eye(3))


def test_everything_wrong_with_a_file_is_said_at_once(tmp_path):
    state = dict(net().named_parameters())
    del state["hidden.bias"]
    state |= {"head.weight": torch.zeros(5, 6), "hed.bias": torch.zeros(4), "conv.bias": torch.full((3,), torch.nan)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(RequestError) as caught:
        from_file(net(), tmp_path / "w.pt")
    lines = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for said in ("has no 'hidden.bias'", "shape [5, 6]", "'hed.bias', which the model has not", "NaN"):
        assert said in lines
    assert all(line.startswith("client.initialization: ") for line in caught.value.problems)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"not a file of weights"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: torch.save(net(), path), "save model.state_dict"),
        (lambda path: torch.save({"state_dict": net().state_dict(), "epoch": 3}, path), "inside, under 'state_dict'"),
        (lambda path: torch.save([1, 2], path), "no state dict"),
        (lambda path: torch.save(torch.ones(2), path), "no state dict"),
        (lambda path: torch.save({}, path), "no state dict"),
        (lambda path: torch.save({0: torch.ones(2)}, path), "no state dict"),
    ],
    ids=["missing", "text", "empty", "whole model", "nested", "list", "tensor", "nothing", "numbers for names"],
)
def test_what_is_no_file_of_weights_is_refused(write, said, tmp_path):
    path = tmp_path / "w.pt"
    write(path)
    with pytest.raises(RequestError, match=said):
        from_file(net(), path)
    damaged = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(3)}, damaged)
    damaged.write_bytes(damaged.read_bytes()[:-4])
    with pytest.raises(RequestError, match="cannot be read"):
        from_file(net(), damaged)
    with pytest.raises(RequestError, match="without a run's checkpoints"):
        from_file(net(), tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_damaged_file_is_refused_wherever_it_is_damaged(zipped, tmp_path):
    """It may be loaded where only numbers changed, but nothing else than a refusal is ever raised."""
    path = tmp_path / "w.pt"
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole, draw, loaded = path.read_bytes(), random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.4 else whole)
        for _ in range(draw.choice([1, 5, 50])):
            if damaged:
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(RequestError):
            from_file(net(), path)
            loaded += 1
    assert loaded < 75


@pytest.mark.parametrize("layout", ["[]", "null", "3", "nonsense", '{"a": 3}', '{"a": [2]}'])
def test_a_checkpoint_whose_header_does_not_fit_its_row_is_refused(layout, tmp_path):
    safetensors.torch.save_file({"row": torch.zeros(3)}, tmp_path / "w.safetensors", metadata={"layout": layout})
    with pytest.raises(RequestError, match="cannot be read"):
        from_file(net(), tmp_path / "w.safetensors")


def test_a_run_starts_from_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = fedsim.run(fedsim.Experiment(rounds=2), out="first")
    second = fedsim.Experiment(
        rounds=1,
        client={"initialization": {"name": "file", "path": "first"}, "layer_initialization": {"head": "zeros"}},
    )
    records = list(fedsim.rounds(second))
    assert records[0].metrics["test"]["accuracy"] < 0.3  # a new head
    kept = fedsim.Experiment(rounds=1, client={"initialization": {"name": "file", "path": "first"}})
    (start, *_) = fedsim.rounds(kept)
    assert start.metrics["test"] == first.metrics["test"]
    resolved = kept.resolved()["client"]["initialization"]
    assert resolved["path"] == str(tmp_path / "first")
    layers = second.resolved()["client"]["layer_initialization"]
    assert layers == {"head": "zeros"}
    assert fedsim.Experiment(**second.resolved()).resolved() == second.resolved()


class Recording(Aggregator):
    """Remembers the weights that the first round started from."""

    needs = "rows"
    seen: list = []

    def combine(self, u, state, ctx):
        Recording.seen.append(ctx.weights.clone())
        return u.rows.mean(0), state, {}


def test_every_client_starts_from_the_servers_weights():
    """With a learning rate of nearly nothing all clients' updates are nothing: they started where the server stands."""
    made = fedsim.Experiment(rounds=1, client={"lr": 1e-30}, strategy={"aggregator": Recording()})
    (_, record) = fedsim.rounds(made)
    assert max(client["update_norm"] for client in record.clients) == 0
    model = initialize(fedsim.models.mlp(input_shape=(64,), classes=10), "he_normal", seed=0)
    assert torch.equal(Recording.seen[0], Layout(model).flatten(model))
