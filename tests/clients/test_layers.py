"""Torch's layers, stacked and in a loop: the same training, or the reason why not."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fedsim
from clients.recipe import Recipe
from fedsim.assembly import assemble
from tests.clients.problems import SIZES, Pool, apart, digits_like, trainer

pytestmark = [
    # Of layers that vmap runs client by client for want of a rule: right, if not fast.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

FEATURES, CLASSES, WORDS, LENGTH = 48, 4, 11, 7
WIDTH = 8
UNEVEN = {"batch_size": 10, "epochs": {"uniform": [1, 3]}, "lr": 0.1}


def numbers(sizes=SIZES):
    return digits_like(sizes, FEATURES, CLASSES)


def sentences(sizes=SIZES):
    """Words ``[N, T]``, the first of which are of the sentence's class more often than not."""
    made = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (sum(sizes),), generator=made)
    x = torch.randint(WORDS, (sum(sizes), LENGTH), generator=made)
    return Pool(x=torch.where(torch.rand(x.shape, generator=made) < 0.3, y[:, None], x), y=y)


def dense(*layers, out=16):
    return nn.Sequential(nn.Linear(FEATURES, 16), *layers, nn.Linear(out, CLASSES))


def images(*layers):
    """``[B, 3, 4, 4]`` through the layers to logits."""
    return shaped((3, 4, 4), layers)


def signals(*layers):
    """``[B, 4, 12]`` through the layers to logits."""
    return shaped((4, 12), layers)


def shaped(shape, layers):
    body = nn.Sequential(nn.Unflatten(1, shape), *layers, nn.Flatten())
    with torch.no_grad():
        return nn.Sequential(*body, nn.Linear(body(torch.zeros(2, FEATURES)).shape[1], CLASSES))


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(FEATURES // 2, FEATURES // 2, CLASSES)

    def forward(self, x):
        return self.bilinear(*x.chunk(2, dim=1))


class Reader(nn.Module):
    """Words to logits: an embedding, layers over ``[B, T, WIDTH]``, a mean over time and a head."""

    def __init__(self, *layers, out=WIDTH, **settings):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, **settings)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(out, CLASSES)

    def forward(self, x):
        x = self.words(x)
        for layer in self.layers:
            x = self.apply_layer(layer, x)
        return self.head(x.mean(1))

    def apply_layer(self, layer, x):
        found = layer(x)
        return found[0] if isinstance(found, tuple) else found


class Attending(Reader):
    """The same, with a causal mask."""

    def apply_layer(self, layer, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        if isinstance(layer, nn.MultiheadAttention):
            return layer(x, x, x, attn_mask=mask, need_weights=False)[0]
        return layer(x, src_mask=mask, is_causal=True)


class Translating(Reader):
    """The same, through a decoder layer that looks at the words again."""

    def apply_layer(self, layer, x):
        return layer(x, x)


class StepByStep(Reader):
    """A cell in a loop over time; its last state is what is read."""

    def apply_layer(self, layer, x):
        state = None
        for step in x.unbind(1):
            state = layer(step, state)
        return (state[0] if isinstance(state, tuple) else state)[:, None]


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, WIDTH, mode=mode)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.words(x))


class Tied(nn.Module):
    """The embedding is the head too; the classes are the first words."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.hidden(self.words(x).mean(1)).tanh())[:, :CLASSES]


def convolved(*layers):
    return images(nn.Conv2d(3, 6, 3, padding=1), *layers)


def filtered(*layers):
    return signals(nn.Conv1d(4, 6, 3, padding=1), *layers)


ACTIVATIONS = (
    *(nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.ReLU6, nn.Softplus, nn.Tanh, nn.Sigmoid),
    *(nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softsign, nn.Softshrink),
)
OF_NUMBERS = {
    "linear": lambda: dense(nn.ReLU()),
    "linear without bias": lambda: nn.Linear(FEATURES, CLASSES, bias=False),
    "bilinear": Bilinear,
    "conv1d": lambda: filtered(nn.ReLU()),
    "conv1d, strided": lambda: signals(nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.ReLU()),
    "conv1d, dilated, circular": lambda: signals(
        nn.Conv1d(4, 6, 3, dilation=2, padding=2, padding_mode="circular"), nn.ReLU()
    ),
    "conv2d": lambda: images(nn.Conv2d(3, 6, 2), nn.ReLU()),
    "conv2d, padded": lambda: convolved(nn.ReLU()),
    "conv2d, padded by reflection": lambda: images(nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect")),
    "conv2d, strided": lambda: images(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU()),
    "conv2d, dilated": lambda: images(nn.Conv2d(3, 6, 2, dilation=2), nn.ReLU()),
    "conv2d, grouped": lambda: convolved(nn.Conv2d(6, 6, 3, groups=2), nn.ReLU()),
    "conv2d, depthwise": lambda: images(nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False), nn.Conv2d(3, 6, 1)),
    "conv3d": lambda: shaped((2, 2, 3, 4), (nn.Conv3d(2, 4, 2), nn.ReLU())),
    "conv_transpose1d": lambda: signals(nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1)),
    "conv_transpose2d": lambda: images(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), nn.ReLU()),
    "conv_transpose2d, grouped": lambda: images(nn.ConvTranspose2d(3, 6, 2, stride=2, groups=3), nn.ReLU()),
    "max_pool1d": lambda: filtered(nn.MaxPool1d(2)),
    "max_pool2d": lambda: convolved(nn.MaxPool2d(3, stride=1, padding=1)),
    "avg_pool1d": lambda: filtered(nn.AvgPool1d(3, 2, 1)),
    "avg_pool2d": lambda: convolved(nn.AvgPool2d(2)),
    "adaptive_avg_pool1d": lambda: filtered(nn.AdaptiveAvgPool1d(5)),
    "adaptive_avg_pool2d": lambda: convolved(nn.AdaptiveAvgPool2d((1, 3))),
    "adaptive_max_pool1d": lambda: filtered(nn.AdaptiveMaxPool1d(5)),
    "adaptive_max_pool2d": lambda: convolved(nn.AdaptiveMaxPool2d((2, 3))),
    "lp_pool2d": lambda: convolved(nn.Softplus(), nn.LPPool2d(2, 2)),
    "group_norm": lambda: convolved(nn.GroupNorm(2, 6), nn.ReLU()),
    "layer_norm": lambda: dense(nn.LayerNorm(16), nn.ReLU()),
    "rms_norm": lambda: dense(nn.RMSNorm(16), nn.ReLU()),
    "instance_norm1d": lambda: signals(nn.Conv1d(4, 6, 3, bias=False), nn.InstanceNorm1d(6), nn.ReLU()),
    "instance_norm2d": lambda: images(
        nn.Conv2d(3, 6, 2, bias=False), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.ReLU()
    ),
    "local_response_norm": lambda: convolved(nn.LocalResponseNorm(3)),
    "weight_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, 16)), nn.ReLU(), nn.Linear(16, CLASSES)
    ),
    "upsample, nearest": lambda: convolved(nn.Upsample(scale_factor=2)),
    "upsample, linear": lambda: filtered(nn.Upsample(scale_factor=2, mode="linear")),
    "upsample, bilinear": lambda: convolved(nn.Upsample(scale_factor=2, mode="bilinear")),
    "upsample, bicubic": lambda: convolved(nn.Upsample(scale_factor=2, mode="bicubic")),
    "pixel_shuffle": lambda: images(nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2)),
    "pixel_unshuffle": lambda: convolved(nn.PixelUnshuffle(2)),
    "zero_pad": lambda: images(nn.ZeroPad2d(1), nn.Conv2d(3, 6, 3)),
    "reflection_pad": lambda: convolved(nn.ReflectionPad2d(1)),
    "replication_pad": lambda: convolved(nn.ReplicationPad2d(1)),
    "unfold": lambda: convolved(nn.Unfold(2)),
    "prelu": lambda: dense(nn.PReLU()),
    "prelu by channel": lambda: convolved(nn.PReLU(6)),
    "glu": lambda: dense(nn.GLU(), out=8),
    "softmax": lambda: dense(nn.Softmax(-1)),
    "log_softmax": lambda: dense(nn.LogSoftmax(-1)),
    **{kind.__name__.lower(): lambda kind=kind: dense(kind()) for kind in ACTIVATIONS},
}
OF_WORDS = {
    "embedding": Reader,
    "embedding with padding": lambda: Reader(padding_idx=0),
    "embedding_bag, mean": lambda: Bag("mean"),
    "embedding_bag, sum": lambda: Bag("sum"),
    "embedding_bag, max": lambda: Bag("max"),
    "embedding tied to the head": Tied,
    "multihead_attention": lambda: Attending(nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
    "transformer_encoder_layer": lambda: Attending(
        nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    ),
    "transformer_encoder_layer, norm first": lambda: Attending(
        nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, activation="gelu", norm_first=True, batch_first=True)
    ),
    "transformer_decoder_layer": lambda: Translating(
        nn.TransformerDecoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    ),
    "lstm": lambda: Reader(nn.LSTM(WIDTH, 6, batch_first=True), out=6),
    "lstm, deep, both ways, projected": lambda: Reader(
        nn.LSTM(WIDTH, 6, num_layers=2, bidirectional=True, proj_size=3, batch_first=True), out=6
    ),
    "gru": lambda: Reader(nn.GRU(WIDTH, 6, batch_first=True), out=6),
    "gru, deep, both ways": lambda: Reader(nn.GRU(WIDTH, 3, num_layers=2, bidirectional=True, batch_first=True), out=6),
    "rnn": lambda: Reader(nn.RNN(WIDTH, 6, batch_first=True), out=6),
    "rnn, relu, without bias": lambda: Reader(
        nn.RNN(WIDTH, 6, nonlinearity="relu", bias=False, batch_first=True), out=6
    ),
    "lstm_cell": lambda: StepByStep(nn.LSTMCell(WIDTH, 6), out=6),
    "gru_cell": lambda: StepByStep(nn.GRUCell(WIDTH, 6), out=6),
    "rnn_cell": lambda: StepByStep(nn.RNNCell(WIDTH, 6), out=6),
}
CASES = [
    *(pytest.param(made, numbers(), id=name) for name, made in OF_NUMBERS.items()),
    *(pytest.param(made, sentences(), id=name) for name, made in OF_WORDS.items()),
]


def fresh(made):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return made()


def moved(model, pool, rounds=3, sizes=SIZES, recipe=UNEVEN, **settings):
    """How far uniform averaging carries the weights, stacked and in a loop: by parameter, and as rows."""
    rows, layout = [], None
    for stacked in (True, False):
        training = trainer(model, pool, stacked=stacked, sizes=sizes, recipe=Recipe(**recipe), **settings)
        together = widths(training)
        layout = training.layout
        start = weights = layout.flatten(model)
        for number in range(1, rounds + 1):
            trained = training.train(np.arange(len(sizes)), weights, number)
            assert not trained.failures
            weights = weights + trained.updates.rows.mean(0)
        # A stack that raises is taken apart; a stacked trainer that took every stack apart would prove nothing.
        assert (max(together) > 1) == stacked
        rows.append(weights - start)
    return layout.unflatten(rows[1]), *rows


def widths(training):
    """A list that grows by how many clients a trainer computes gradients of, step by step."""
    found, gradients = [], training.executor.gradients

    def watched(rows, *arguments):
        found.append(len(rows))
        return gradients(rows, *arguments)

    training.executor.gradients = watched
    return found


@pytest.mark.parametrize(("made", "pool"), CASES)
def test_stacked_equals_loop(made, pool):
    parameters, stacked, loop = moved(fresh(made), pool)
    assert apart(stacked, loop) < 1e-5
    assert [name for name, move in parameters.items() if float(move.norm()) < 1e-4] == []  # every one takes part


@pytest.mark.parametrize(
    "made",
    [
        lambda: dense(nn.BatchNorm1d(16), nn.ReLU()),
        lambda: convolved(nn.BatchNorm2d(6), nn.ReLU()),
        lambda: convolved(nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 6, 2), nn.BatchNorm2d(6)),
    ],
    ids=["batch_norm1d", "batch_norm2d", "two batch_norm2d, one without scale"],
)
def test_stacked_equals_loop_under_batch_norm(made):
    """In float64: a variance over few examples magnifies the rounding of float32."""
    sizes = tuple(size for size in SIZES if size > 1)
    model, recipe = fresh(made).double(), {**UNEVEN, "precision": "float64"}
    _, stacked, loop = moved(model, numbers(sizes), sizes=sizes, recipe=recipe)
    assert apart(stacked, loop) < 1e-10
    assert float(loop.norm()) > 0.1


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "transformer_encoder_layer"])
def test_gradients_are_clipped_alike(name):
    model = fresh(OF_WORDS[name])
    _, stacked, loop = moved(model, sentences(), recipe={**UNEVEN, "gradient_clip": 0.05})
    _, unclipped, _ = moved(model, sentences())
    assert apart(stacked, loop) < 1e-5
    assert apart(stacked, unclipped) > 0.1


def test_a_recurrent_layer_of_the_users_stays_torchs():
    model = fresh(OF_WORDS["lstm"])
    moved(model, sentences(), rounds=1)
    assert type(model.layers[0]) is nn.LSTM


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__.lower())
def test_bfloat16_trains_recurrent_layers_as_the_loop_does(kind):
    model = fresh(lambda: Reader(kind(WIDTH, 6, batch_first=True), out=6))
    _, stacked, loop = moved(model, sentences(), recipe={**UNEVEN, "precision": "bfloat16"})
    _, full, _ = moved(model, sentences())
    assert apart(stacked, loop) < 0.05  # 8 bits of mantissa, rounded at other places
    assert 1e-4 < apart(stacked, full) < 0.05


DROPPING = {
    "dropout": lambda p: (dense(nn.Dropout(p)), numbers),
    "dropout1d": lambda p: (filtered(nn.Dropout1d(p)), numbers),
    "dropout2d": lambda p: (convolved(nn.Dropout2d(p)), numbers),
    "alpha_dropout": lambda p: (dense(nn.SELU(), nn.AlphaDropout(p)), numbers),
    "feature_alpha_dropout": lambda p: (convolved(nn.SELU(), nn.FeatureAlphaDropout(p)), numbers),
    "transformer_encoder_layer": lambda p: (
        Attending(nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=p, batch_first=True)),
        sentences,
    ),
    "lstm": lambda p: (Reader(nn.LSTM(WIDTH, 6, num_layers=2, dropout=p, batch_first=True), out=6), sentences),
    "gru": lambda p: (Reader(nn.GRU(WIDTH, 6, num_layers=2, dropout=p, batch_first=True), out=6), sentences),
    "rnn": lambda p: (Reader(nn.RNN(WIDTH, 6, num_layers=2, dropout=p, batch_first=True), out=6), sentences),
}


@pytest.mark.parametrize("name", DROPPING)
def test_stacked_equals_loop_with_dropout_off(name):
    model, data = fresh(lambda: DROPPING[name](0.0))
    _, stacked, loop = moved(model, data())
    assert apart(stacked, loop) < 1e-5


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "loop"])
@pytest.mark.parametrize("name", DROPPING)
def test_dropout_gives_the_same_bits_again_and_each_client_its_own(name, stacked):
    sizes = (20, 20)
    model, data = fresh(lambda: DROPPING[name](0.4))
    pool = data(sizes)
    for column in pool.columns.values():
        column[20:] = column[:20]
    recipe = Recipe(batch_size=20, epochs=1, lr=0.1)
    training = trainer(model, pool, stacked=stacked, sizes=sizes, recipe=recipe)
    together = widths(training)
    weights = training.layout.flatten(model)
    rows = []
    for seed in range(2):
        torch.manual_seed(seed)
        trained = training.train(np.arange(2), weights, 1)
        assert not trained.failures
        rows.append(trained.updates.rows)
    assert torch.equal(*rows)
    assert apart(rows[0][0], rows[0][1]) > 1e-2  # one full batch of equal data: only what is dropped differs
    assert (max(together) > 1) == stacked
    assert not torch.equal(training.train(np.arange(2), weights, 2).updates.rows, rows[0])


# What cannot be stacked, and why.


class Packing(Reader):
    """Sentences of their real lengths, as torch packs them."""

    def apply_layer(self, layer, x):
        packed = pack_padded_sequence(x, torch.full((len(x),), LENGTH), batch_first=True)
        return layer(packed)[1][0].transpose(0, 1)


class Deciding(Reader):
    """Goes one way or the other, as its inputs are."""

    def forward(self, x):
        return super().forward(x) if float(x.float().mean()) > 0 else super().forward(-x)


@pytest.mark.parametrize(
    ("made", "data", "reason"),
    [
        (lambda: Packing(nn.LSTM(WIDTH, 6, batch_first=True), out=6), sentences, "RunError: nn.LSTM: a PackedSeq"),
        (Deciding, sentences, "vmap cannot trace it"),
        (lambda: dense(nn.RReLU()), numbers, "vmap cannot trace it: .*rrelu"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, CLASSES))),
            numbers,
            "vmap cannot trace it",
        ),
        (lambda: Reader(scale_grad_by_freq=True), sentences, "RunError: nn.Embedding: scale_grad"),
        (lambda: Reader(sparse=True), sentences, "vmap cannot trace it|sparse"),
    ],
    ids=["packed sequence", "branch on data", "rrelu", "spectral_norm", "by freq", "sparse"],
)
def test_what_cannot_be_stacked_trains_in_a_loop_and_says_why(made, data, reason):
    execution = assembled(made, data).execution
    assert execution.name == "loop"
    assert re.search(reason, execution.reason)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "gru_cell"])
def test_recurrent_layers_are_stacked_of_their_own_accord(name):
    execution = assembled(OF_WORDS[name], sentences).execution
    assert (execution.name, execution.reason) == ("stacked", "two clients trained both ways agree")


def assembled(made, data):
    """A small experiment with this model, as far as its execution is decided."""
    sizes = (25, 25, 25, 25)
    columns = {name: column.numpy() for name, column in data(sizes).columns.items()}
    source = fedsim.Source(train=columns, test=columns, clients=np.repeat(np.arange(len(sizes)), sizes))
    experiment = fedsim.Experiment(
        name="layers",
        rounds=1,
        data={"source": source, "partition": "natural", "proxy": 0},
        model=lambda: fresh(made),
        client={"epochs": 1, "batch_size": 10, "lr": 0.1},
        strategy={"clients_per_round": 2},
    )
    return assemble(experiment)
