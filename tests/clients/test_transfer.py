"""Starting from weights that others trained: frozen layers, new heads, adapters, rates by layer, personal phases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clients.batches import schedule
from clients.errors import RequestError
from clients.initialization import initialize
from clients.local_state import PERSONAL, shared_layout
from clients.normalization import FixedBatchNorm
from clients.optimizers import Adam, Momentum, Sgd
from clients.parts import Part
from clients.patterns import selected
from clients.recipe import Adapters, Recipe
from clients.transfer import add_adapters, freeze, frozen_size, merge_adapters, prepare, rate_factors
from clients.weight_files import load_weights
from clients.weights import Layout
from tests.clients.problems import SIZES, apart, digits_like, members, mlp, trainer

CLIENTS = np.arange(len(SIZES))
NAMES = ["body.0.weight", "body.0.bias", "body.1.weight", "head.weight", "head.bias", "header.bias"]


def prepared(model, recipe, seed=0):
    model = prepare(model, recipe, seed)
    return model, shared_layout(recipe, model)


def trained(recipe, stacked, model=None, optimizer=None):
    model, layout = prepared(model or mlp(), recipe)
    training = trainer(model, digits_like(), stacked=stacked, recipe=recipe, layout=layout, optimizer=optimizer)
    found = training.train(CLIENTS, layout.flatten(model), 1)
    assert not found.failures
    return model, layout, found


def batches(recipe, client, round=1):
    """What a client trains on, batch after batch."""
    training = trainer(mlp(), digits_like(), stacked=False, recipe=recipe)
    done = training.work(np.array([client]), round)
    plan = schedule(done, [members()(client)], np.array([client]), recipe.batch_size, 0, round)
    for i in range(len(plan.count)):
        yield digits_like().take(plan.index[i, 0, : plan.count[i, 0]])


# ------------------------------------------------------------------------------------------------ patterns


def test_a_pattern_means_a_layer_with_all_that_is_inside_it_and_no_other_of_that_beginning():
    assert selected(["head"], NAMES, "key") == ["head.weight", "head.bias"]
    assert selected(["*.bias"], NAMES, "key") == ["body.0.bias", "head.bias", "header.bias"]


def test_of_several_patterns_the_last_counts():
    assert selected(["*", "!body", "body.1"], NAMES, "key") == ["body.1.weight", *NAMES[3:]]


def test_a_pattern_without_a_match_is_refused_with_the_names():
    with pytest.raises(RequestError, match=r"client.freeze: 'haed' matches no parameter; the model has body.0.weight"):
        selected(["*", "haed"], NAMES, "client.freeze")


# ------------------------------------------------------------------------------------------------ frozen layers


@pytest.mark.parametrize("stacked", [True, False])
def test_what_is_frozen_is_neither_sent_nor_moved_and_the_rest_trains_as_in_torch(stacked):
    recipe = Recipe(batch_size=10, epochs=2, lr=0.1, freeze=["0"])
    model, layout, found = trained(recipe, stacked, optimizer=Momentum())
    assert layout.names == ["2.weight", "2.bias"]
    assert found.updates.bill()[0] == 4 * (16 * 4 + 4) + 8

    plain = mlp()
    plain[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for batch in batches(recipe, client=3):
        optimizer.zero_grad()
        F.cross_entropy(plain(batch["x"]), batch["y"]).backward()
        optimizer.step()
    expected = torch.cat([p.detach().reshape(-1) for p in plain[2].parameters()]) - layout.flatten(model)
    assert apart(found.updates.rows[3], expected) < 1e-5
    assert torch.equal(model[0].weight, mlp()[0].weight)
    assert frozen_size(model) == 12 * 16 + 16


def with_statistics(model):
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.running_mean.normal_(generator=torch.Generator().manual_seed(3))
            norm.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(4))
    return model


def test_a_frozen_batch_norm_keeps_the_statistics_that_came_with_its_weights():
    model = with_statistics(mlp(norm=True))
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(x)
    names = [name for name, _ in model.named_parameters()]
    freeze(model, ["0", "1"])
    assert isinstance(model[1], FixedBatchNorm)
    assert torch.allclose(model.train()(x), expected, atol=1e-6)
    assert frozen_size(model) == 12 * 16 + 16 + 32
    assert [name for name in model.state_dict() if "running" not in name] == names


def test_a_batch_norm_that_trains_or_came_without_statistics_goes_by_its_inputs():
    assert isinstance(freeze(with_statistics(mlp(norm=True)), ["1.weight"])[1], nn.BatchNorm1d)
    assert isinstance(freeze(mlp(norm=True), ["*", "!3"])[1], nn.BatchNorm1d)


def test_a_fixed_batch_norm_is_torchs_in_evaluation_mode_for_images_and_without_scales():
    for norm, shape in ((nn.BatchNorm2d(3), (4, 3, 5, 5)), (nn.BatchNorm1d(3, affine=False), (4, 3))):
        norm = with_statistics(nn.Sequential(norm))[0].eval()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(FixedBatchNorm(norm)(x), norm(x), atol=1e-6)


# ------------------------------------------------------------------------------------------------ rates by layer


@pytest.mark.parametrize(
    ("optimizer", "plain"), [(Sgd(), torch.optim.SGD), (Adam(), torch.optim.Adam)], ids=["sgd", "adam"]
)
def test_rates_by_layer_are_torchs_parameter_groups(optimizer, plain):
    recipe = Recipe(batch_size=10, epochs=2, lr=0.05, lr_factors={"*": 0.1, "2": 1.0, "*.bias": 2.0})
    model, layout, stacked = trained(recipe, True, optimizer=optimizer)
    _, _, loop = trained(recipe, False, optimizer=optimizer)
    assert apart(stacked.updates.rows, loop.updates.rows) < 1e-5

    net = mlp()
    rates = {"0.weight": 0.005, "0.bias": 0.1, "2.weight": 0.05, "2.bias": 0.1}
    steps = plain([{"params": [p], "lr": rates[name]} for name, p in net.named_parameters()])
    for batch in batches(recipe, client=1):
        steps.zero_grad()
        F.cross_entropy(net(batch["x"]), batch["y"]).backward()
        steps.step()
    assert apart(stacked.updates.rows[1], layout.flatten(net) - layout.flatten(model)) < 1e-4


def test_rates_by_layer_go_with_a_schedule_over_steps_and_with_every_penalty():
    penalties = {"l1": 0.01, "weight_decay": 0.1, "group_lasso": 0.01, "elastic_net": {"l1": 0.01, "l2": 0.01}}
    recipe = Recipe(batch_size=10, epochs=2, lr=0.1, lr_factors={"0": 0.5}, regularization=penalties)
    rows = [trained(recipe, stacked)[2].updates.rows for stacked in (True, False)]
    assert apart(*rows) < 1e-5
    halved = Recipe(batch_size=10, epochs=2, lr=0.05, regularization=penalties)
    everywhere = Recipe(batch_size=10, epochs=2, lr=0.1, lr_factors={"*": 0.5}, regularization=penalties)
    one, other = (trained(r, True)[2].updates.rows for r in (halved, everywhere))
    assert apart(one, other) < 1e-6


def test_a_rate_for_what_is_frozen_is_refused():
    layout = shared_layout(Recipe(), freeze(mlp(), ["0"]))
    with pytest.raises(RequestError, match=r"client.lr_factors: '0' matches no trained parameter"):
        rate_factors({"0": 2.0}, layout.all)


# ------------------------------------------------------------------------------------------------ new heads


def test_a_file_for_other_classes_is_refused_with_the_mend_and_loads_with_a_new_head(tmp_path):
    torch.save(mlp(classes=7).state_dict(), tmp_path / "w.pt")
    model = mlp(classes=4)
    head = model[2].weight.detach().clone()
    with pytest.raises(RequestError) as refused:
        load_weights(model, tmp_path / "w.pt")
    assert "'2.weight' has shape [7, 16]" in str(refused.value)
    assert 'name the layer: new = ["2"]' in str(refused.value)
    initialize(model, Part("file", {"path": str(tmp_path / "w.pt"), "new": ["2"]}), seed=0)
    assert torch.equal(model[0].weight, mlp(classes=7)[0].weight)
    assert torch.equal(model[2].weight, head)


def test_a_new_layer_may_be_missing_in_the_file_and_an_old_one_may_be_left_over_there(tmp_path):
    torch.save({**mlp().state_dict(), "old.weight": torch.ones(3)}, tmp_path / "w.pt")
    with pytest.raises(RequestError, match=r"has 'old.weight', which the model has not"):
        load_weights(mlp(), tmp_path / "w.pt")
    torch.save({name: t for name, t in mlp().state_dict().items() if name[0] == "0"}, tmp_path / "body.pt")
    load_weights(mlp(), tmp_path / "body.pt", new=["2"])
    with pytest.raises(RequestError, match=r"\.new: 'fc' matches no parameter"):
        load_weights(mlp(), tmp_path / "body.pt", new=["fc"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of published weights of its own."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def published(**settings):
    from fedsim.models import resnet18

    model = resnet18(input_shape=(3, 32, 32), classes=10, stem="large")
    return initialize(model, Part("pretrained", settings), seed=0)


def test_published_weights_come_from_torchvisions_cache_with_a_head_for_other_classes(hub):
    from torchvision.models import ResNet18_Weights, resnet18

    theirs = resnet18(num_classes=1000)
    torch.save(theirs.state_dict(), hub / ResNet18_Weights.DEFAULT.url.rpartition("/")[2])
    model = published(new=["fc"])
    assert torch.equal(model.layer3[0].conv1.weight, theirs.layer3[0].conv1.weight)
    assert model.fc.out_features == 10
    with pytest.raises(RequestError, match=r"'fc.weight' has shape \[1000, 512\]"):
        published()


def test_published_weights_that_cannot_be_fetched_or_do_not_exist_are_refused(hub, monkeypatch):
    def unreachable(url, *args, **settings):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(RequestError, match=r"cannot be fetched from https://.*resnet18.*\(no network\); put the file"):
        published(new=["fc"])
    with pytest.raises(RequestError, match=r"weights: resnet18 has IMAGENET1K_V1, DEFAULT, and no 'V9'|and no 'V9'"):
        published(weights="V9")
    with pytest.raises(RequestError, match="Sequential does not say which"):
        initialize(mlp(), "pretrained", seed=0)
    assert not list(hub.iterdir())


# ------------------------------------------------------------------------------------------------ adapters


class Conv1D(nn.Module):
    """As transformers has it: a linear layer with its weight transposed."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf, generator=torch.Generator().manual_seed(5)))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def adapted(model, **settings):
    """A model with adapters that are not zero any more."""
    add_adapters(model, Adapters(**settings), seed=0)
    draw = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=draw)
    return model


def nets():
    yield mlp(), torch.randn(5, 12)
    yield nn.Sequential(Conv1D(6, 12), nn.ReLU(), nn.Linear(6, 4)), torch.randn(5, 12)
    yield nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True), torch.randn(5, 3, 12)


@pytest.mark.parametrize("place", range(3))
def test_adapters_begin_without_effect_and_can_be_merged_into_the_weights(place):
    net, x = list(nets())[place]
    net.eval()
    plain = sorted(net.state_dict())
    with torch.no_grad():
        before = net(x)
        model = add_adapters(net, Adapters(rank=2), seed=0)
        assert torch.equal(model(x), before)
        after = adapted(list(nets())[place][0], rank=2, alpha=3.0).eval()
        changed = after(x)
        assert float((changed - before).abs().max()) > 0.01
        assert torch.allclose(merge_adapters(after)(x), changed, atol=1e-4)
    assert sorted(after.state_dict()) == plain


def test_an_adapter_adds_the_product_of_its_two_factors_times_alpha_over_rank():
    layer = adapted(nn.Sequential(nn.Linear(6, 5)), rank=2, alpha=3.0)[0]
    x = torch.randn(4, 6)
    weight = layer.weight + 1.5 * layer.lora_B.weight @ layer.lora_A.weight
    assert torch.allclose(layer(x), x @ weight.T + layer.bias, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"freeze_a": True}, {"layers": ["2"]}], ids=str)
def test_clients_send_adapters_only_and_train_alike_stacked_and_in_a_loop(settings):
    recipe = Recipe(batch_size=10, epochs=2, lr=0.1, adapters=Adapters(rank=2, alpha=2.0, **settings))
    model, layout, stacked = trained(recipe, True)
    loop = trained(recipe, False)[2]
    assert apart(stacked.updates.rows, loop.updates.rows) < 1e-5
    assert float(stacked.updates.rows.norm(dim=1).min()) > 0
    wanted = {"0.lora_A.weight", "0.lora_B.weight", "2.lora_A.weight", "2.lora_B.weight"}
    if "freeze_a" in settings:
        wanted = {name for name in wanted if "lora_B" in name}
    if "layers" in settings:
        wanted = {name for name in wanted if name[0] == "2"}
    assert set(layout.names) == wanted
    assert torch.equal(model[0].weight, mlp()[0].weight)


def test_adapters_and_a_head_train_together_where_the_recipe_says_so():
    recipe = Recipe(adapters=Adapters(rank=2, layers=["0"]), freeze=["*", "!2"])
    assert prepared(mlp(), recipe)[1].names == ["0.lora_A.weight", "0.lora_B.weight", "2.weight", "2.bias"]


def test_an_attention_layers_own_projection_gets_no_adapter():
    layer = add_adapters(nn.TransformerEncoderLayer(12, 2, 16), Adapters(rank=2), seed=0)
    assert {n.rpartition(".lora")[0] for n, _ in layer.named_parameters() if "lora" in n} == {"linear1", "linear2"}
    with pytest.raises(RequestError, match=r"client.adapters.layers: 'self_attn' matches no linear layer"):
        add_adapters(nn.TransformerEncoderLayer(12, 2, 16), Adapters(rank=2, layers=["self_attn"]), seed=0)


def test_adapters_that_a_layer_has_no_room_for_are_refused():
    with pytest.raises(RequestError, match=r"client.adapters.rank: 8 is more than '2' has, 16 in and 4 out"):
        add_adapters(mlp(), Adapters(rank=8), seed=0)


def test_the_same_seed_draws_the_same_adapters():
    def first(seed):
        return add_adapters(mlp(), Adapters(rank=2), seed)[0].lora_A.weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_adapters_train_with_privacy_for_each_example():
    dp = {"noise_multiplier": 0.0, "max_grad_norm": 1e6, "sampling": "shuffle"}
    private = Recipe(batch_size=10, epochs=2, lr=0.1, adapters=Adapters(rank=2), dp_sgd=dp)
    plain = private.model_copy(update={"dp_sgd": None})
    rows = [trained(recipe, False)[2].updates.rows for recipe in (private, plain)]
    assert apart(*rows) < 1e-5


# ------------------------------------------------------------------------------------------------ personal phases


@pytest.mark.parametrize("stacked", [True, False])
def test_personal_epochs_train_the_head_alone_and_then_the_body_alone(stacked):
    recipe = Recipe(
        batch_size=10, epochs=2, personal=["2"], personal_epochs=1, lr=0.1, regularization={"weight_decay": 0.1}
    )
    model, layout, found = trained(recipe, stacked, optimizer=Momentum())

    net = mlp()
    phases = [torch.optim.SGD(net[place].parameters(), lr=0.1, momentum=0.9) for place in (2, 0)]
    plan = list(batches(recipe, client=0))
    for step, batch in enumerate(plan):
        now, place = (phases[0], 2) if step < 3 else (phases[1], 0)
        net.zero_grad()
        F.cross_entropy(net(batch["x"]), batch["y"]).backward()
        with torch.no_grad():
            for parameter in net[place].parameters():
                parameter.mul_(1 - 0.1 * 0.1)
        now.step()
    assert len(plan) == 9
    assert apart(found.updates.rows[0], layout.flatten(net) - layout.flatten(model)) < 1e-5
    personal = layout.personal.flatten(net) - layout.personal.flatten(model)
    assert apart(found.state[PERSONAL][0], personal) < 1e-5


def test_personal_epochs_need_personal_parameters():
    with pytest.raises(ValueError, match="personal_epochs has nothing to train"):
        Recipe(personal_epochs=1)


def test_a_layout_of_adapters_is_a_small_part_of_the_model():
    from fedsim.models import resnet18

    model = freeze(resnet18(input_shape=(1, 8, 8), classes=10), ["*", "!fc"])
    assert Layout(model).size / (frozen_size(model) + Layout(model).size) < 0.01
