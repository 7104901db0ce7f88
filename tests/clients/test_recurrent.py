from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

from clients.errors import RunError
from clients.recurrent import unroll_recurrent

# vmap warns where it runs an operation client by client for want of a rule.
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")

T, B, FEATURES, HIDDEN = 5, 3, 4, 6
EXACT = {"rtol": 0, "atol": 1e-12}


LAYERS = {
    "lstm": lambda **settings: nn.LSTM(FEATURES, HIDDEN, **settings),
    "lstm_projected": lambda **settings: nn.LSTM(FEATURES, HIDDEN, proj_size=2, **settings),
    "gru": lambda **settings: nn.GRU(FEATURES, HIDDEN, **settings),
    "rnn_tanh": lambda **settings: nn.RNN(FEATURES, HIDDEN, **settings),
    "rnn_relu": lambda **settings: nn.RNN(FEATURES, HIDDEN, nonlinearity="relu", **settings),
}
CELLS = {
    "lstm": lambda **settings: nn.LSTMCell(FEATURES, HIDDEN, **settings),
    "gru": lambda **settings: nn.GRUCell(FEATURES, HIDDEN, **settings),
    "rnn_tanh": lambda **settings: nn.RNNCell(FEATURES, HIDDEN, **settings),
    "rnn_relu": lambda **settings: nn.RNNCell(FEATURES, HIDDEN, nonlinearity="relu", **settings),
}
SHAPES = [
    dict(zip(("num_layers", "bidirectional", "batch_first", "bias"), choice, strict=True))
    for choice in itertools.product((1, 2, 3), (False, True), (False, True), (False, True))
]


def pair(make, **settings):
    """Torch's own layer in float64, and a copy of it that is unrolled."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        own = make(dtype=torch.float64, **settings)
    return own, unroll_recurrent(copy.deepcopy(own))


def draw(*shape):
    made = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=made, dtype=torch.float64)


def inputs(layer, batched):
    """A sequence and first states as the layer takes them."""
    sequence = draw(B, T, FEATURES) if layer.batch_first else draw(T, B, FEATURES)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [draw(rows, B, layer.proj_size or HIDDEN), draw(rows, B, HIDDEN)]
    if not batched:
        sequence = sequence[0] if layer.batch_first else sequence[:, 0]
        states = [state[:, 0] for state in states]
    return sequence, tuple(states) if isinstance(layer, nn.LSTM) else states[0]


def flat(results):
    """The tensors of nested tuples, in order."""
    return [results] if isinstance(results, torch.Tensor) else [part for inner in results for part in flat(inner)]


def outputs_and_gradients(module, *arguments):
    """All results, and the gradients of a sum of them (unequally weighted) by parameter and by input."""
    arguments = [a if isinstance(a, torch.Tensor) else tuple(a) for a in arguments]
    leaves = [leaf.clone().requires_grad_() for leaf in flat(arguments)]
    again = iter(leaves)
    rebuilt = [next(again) if isinstance(a, torch.Tensor) else tuple(next(again) for _ in a) for a in arguments]
    results = module(*rebuilt)
    weighted = sum(((place + 1) * result * result.sin()).sum() for place, result in enumerate(flat(results)))
    return results, torch.autograd.grad(weighted, [*module.parameters(), *leaves])


def assert_same(found, expected):
    assert len(flat(found)) == len(flat(expected))
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, **EXACT)


@pytest.mark.parametrize("settings", SHAPES, ids=lambda s: "-".join(str(int(value)) for value in s.values()))
@pytest.mark.parametrize("kind", LAYERS)
def test_an_unrolled_layer_is_torchs_layer(kind, settings):
    own, unrolled = pair(LAYERS[kind], **settings)
    for batched in (True, False):
        sequence, states = inputs(own, batched)
        for arguments in ((sequence,), (sequence, states)):
            assert_same(outputs_and_gradients(unrolled, *arguments), outputs_and_gradients(own, *arguments))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_an_unrolled_cell_is_torchs_cell(kind, bias):
    own, unrolled = pair(CELLS[kind], bias=bias)
    for shape in ((B,), ()):
        states = (draw(*shape, HIDDEN), draw(*shape, HIDDEN).flip(-1))
        states = states if kind == "lstm" else states[0]
        for arguments in ((draw(*shape, FEATURES),), (draw(*shape, FEATURES), states)):
            assert_same(outputs_and_gradients(unrolled, *arguments), outputs_and_gradients(own, *arguments))


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_falls_between_layers_and_in_training_only(kind):
    own, unrolled = pair(LAYERS[kind], num_layers=3, dropout=0.4, bidirectional=True)
    sequence, states = inputs(own, True)
    found = {}
    for name, module in (("own", own), ("unrolled", unrolled)):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            found[name] = outputs_and_gradients(module, sequence, states)
    assert_same(found["unrolled"], found["own"])

    own.eval()
    unrolled.eval()
    kept = outputs_and_gradients(own, sequence, states)
    assert_same(outputs_and_gradients(unrolled, sequence, states), kept)
    assert not torch.allclose(flat(kept)[0], flat(found["own"])[0])


@pytest.mark.parametrize("settings", SHAPES[-4:] + SHAPES[:1], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_stack_of_unrolled_layers_is_a_loop_over_torchs(kind, settings):
    own, unrolled = pair(LAYERS[kind], **settings)
    sequence, states = inputs(own, True)
    check_stack(own, unrolled, (sequence, states))
    check_stack(own, unrolled, (sequence,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_a_stack_of_unrolled_cells_is_a_loop_over_torchs(kind, bias):
    own, unrolled = pair(CELLS[kind], bias=bias)
    states = (draw(B, HIDDEN), draw(B, HIDDEN).flip(0))
    check_stack(own, unrolled, (draw(B, FEATURES), states if kind == "lstm" else states[0]))


def check_stack(own, unrolled, arguments, clients=4):
    """Results, and gradients by parameter, of several clients at once against one after another."""
    parameters = {name: parameter.detach() for name, parameter in own.named_parameters()}
    stacked = {name: torch.stack([p * (1 + n / 10) for n in range(clients)]) for name, p in parameters.items()}
    many = torch.utils._pytree.tree_map(lambda a: torch.stack([a * (1 + n / 10) for n in range(clients)]), arguments)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in stacked.items()}
    found = torch.vmap(lambda tensors, given: functional_call(unrolled, tensors, given))(leaves, many)
    gradients = torch.autograd.grad(sum((part * part.sin()).sum() for part in flat(found)), list(leaves.values()))
    for client in range(clients):
        one = {name: tensor[client].clone().requires_grad_() for name, tensor in stacked.items()}
        results = functional_call(own, one, torch.utils._pytree.tree_map(lambda a: a[client], many))  # noqa: B023
        assert_same([part[client] for part in flat(found)], results)
        expected = torch.autograd.grad(sum((part * part.sin()).sum() for part in flat(results)), list(one.values()))
        assert_same([gradient[client] for gradient in gradients], expected)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(FEATURES, HIDDEN, num_layers=2, bidirectional=True)
        self.cells = nn.ModuleList([nn.GRUCell(FEATURES, HIDDEN), nn.GRUCell(FEATURES, HIDDEN)])
        self.head = nn.Linear(2 * HIDDEN, 2)


def test_parameters_keep_their_names_their_places_and_their_memory():
    model = Tagger()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    places = {name: id(module) for name, module in model.named_modules()}
    assert unroll_recurrent(model) is model
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert {name: id(module) for name, module in model.named_modules()} == places
    assert isinstance(model.recurrent, nn.LSTM)
    assert isinstance(model.cells[1], nn.GRUCell)
    assert type(model.head) is nn.Linear


def test_no_other_layer_is_touched_and_twice_is_once():
    model, other = Tagger(), Tagger()
    unroll_recurrent(model)
    kinds = [type(module) for module in model.modules()]
    assert type(other.recurrent) is nn.LSTM
    assert type(nn.LSTM(1, 1)) is nn.LSTM
    assert [type(module) for module in unroll_recurrent(model).modules()] == kinds


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_unrolled_too_and_has_weights_of_its_own(copied):
    _, unrolled = pair(LAYERS["gru"], num_layers=2)
    again, sequence = copied(unrolled), draw(T, B, FEATURES)
    assert type(again) is type(unrolled)
    assert_same(again(sequence), unrolled(sequence))
    with torch.no_grad():
        again.weight_ih_l1.zero_()
    assert not torch.equal(again(sequence)[0], unrolled(sequence)[0])


class Twice(nn.LSTM):
    """A layer of the user's own: torch's, with twice the outputs."""

    def forward(self, input, hx=None):
        output, last = super().forward(input, hx)
        return 2 * output, last


def test_a_subclass_keeps_its_own_forward():
    own, unrolled = pair(lambda **settings: Twice(FEATURES, HIDDEN, **settings))
    sequence, states = inputs(own, True)
    assert isinstance(unrolled, Twice)
    assert_same(copy.deepcopy(unrolled)(sequence, states), own(sequence, states))
    check_stack(own, unrolled, (sequence, states))


def test_functional_call_may_bring_another_dtype():
    own, unrolled = pair(LAYERS["lstm"])
    tensors = {name: parameter.detach().float() for name, parameter in own.named_parameters()}
    sequence = draw(T, B, FEATURES).float()
    output, _ = functional_call(unrolled, tensors, (sequence,))
    assert output.dtype == torch.float32
    assert torch.allclose(output, functional_call(own, tensors, (sequence,))[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_relu"])
def test_a_packed_sequence_is_refused_with_what_to_do(kind):
    _, unrolled = pair(LAYERS[kind])
    packed = pack_padded_sequence(draw(T, B, FEATURES), [5, 3, 2])
    with pytest.raises(RunError, match=r'PackedSequence.*client\.execution = "loop"'):
        unrolled(packed)


@pytest.mark.parametrize(
    "given",
    [
        lambda: (draw(2, T, B, FEATURES),),
        lambda: (draw(T, B, FEATURES + 1),),
        lambda: (draw(T, B, FEATURES), draw(1, B + 1, HIDDEN)),
        lambda: (draw(T, B, FEATURES), draw(B, HIDDEN)),
        lambda: (draw(T, FEATURES), draw(1, B, HIDDEN)),
        lambda: (draw(T, B, FEATURES), draw(2, B, HIDDEN)),
    ],
    ids=["4d", "features", "batch", "states of no batch", "batch of states", "layers"],
)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_what_torch_refuses_is_refused(kind, given):
    arguments = given()
    if kind == "lstm" and len(arguments) == 2:
        arguments = (arguments[0], (arguments[1], arguments[1]))
    for module in pair(LAYERS[kind]):
        with pytest.raises((ValueError, RuntimeError)):
            module(*arguments)
