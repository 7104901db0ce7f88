"""Recurrent layers written out step by step, in operations that ``vmap`` has rules for.

Torch's own LSTM, GRU and RNN are each one kernel over all time steps, and ``vmap`` has no rule for them. Here the same
equations are products, sigmoids and hyperbolic tangents, so that many clients' recurrent layers train at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from clients.errors import RunError

#: What a cell carries from step to step: ``(h,)``, or ``(h, c)`` of an LSTM.
State = tuple[Tensor, ...]


def unroll_recurrent(model: nn.Module) -> nn.Module:
    """Lets every recurrent layer and cell of ``model`` (in place) compute what it computes step by step.

    Parameters, their names, settings, hooks and results stay as they are, up to rounding; a subclass's own ``forward``
    is kept, and reaches the steps where it calls ``super().forward``. A layer that is unrolled already is left alone.

    Args:
        model: changed in place (the class of its recurrent layers), and returned.
    """
    for module in model.modules():
        for kind, unrolled in _UNROLLED.items():
            if isinstance(module, kind) and not isinstance(module, unrolled):
                own = type(module)
                module.__class__ = unrolled if own is kind else type(own.__name__, (own, unrolled), {})
    return model


def _lstm(x: Tensor, state: State, recurrent: Tensor, bias: Tensor | None, projection: Tensor | None) -> State:
    """One step of a long short-term memory (Hochreiter and Schmidhuber 1997; forget gate, Gers et al. 2000).

    ``i, f, o = sigma(W x + b + U h + b')``, ``g = tanh(...)``, ``c <- f c + i g``, ``h <- o tanh(c)``, and
    ``h <- R h`` where there is a projection (Sak et al. 2014). Torch's gate order: ``i, f, g, o``.

    Args:
        x: the input's share ``W x + b``, ``[B, 4 H]``.
        state: ``h`` ``[B, H or P]`` and ``c`` ``[B, H]``.
        recurrent: ``U`` ``[4 H, H or P]``.
        bias: ``b'`` ``[4 H]``, or None where ``x`` holds it.
        projection: ``R`` ``[P, H]``.
    """
    h, c = state
    i, f, g, o = (x + F.linear(h, recurrent, bias)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if projection is None else F.linear(h, projection)), c


def _gru(x: Tensor, state: State, recurrent: Tensor, bias: Tensor | None, projection: Tensor | None) -> State:
    """One step of a gated recurrent unit (Cho et al. 2014), with the reset gate after the product as in torch.

    ``r, z = sigma(W x + b + U h + b')``, ``n = tanh(W_n x + b_n + r (U_n h + b'_n))``, ``h <- (1 - z) n + z h``.
    Torch's gate order: ``r, z, n``. Shapes as in :func:`_lstm`, with three gates.
    """
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h, recurrent, bias).chunk(3, dim=-1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (n + z * (h - n),)


def _tanh(x: Tensor, state: State, recurrent: Tensor, bias: Tensor | None, projection: Tensor | None) -> State:
    """One step of a simple recurrent network (Elman 1990): ``h <- tanh(W x + b + U h + b')``."""
    return ((x + F.linear(state[0], recurrent, bias)).tanh(),)


def _relu(x: Tensor, state: State, recurrent: Tensor, bias: Tensor | None, projection: Tensor | None) -> State:
    """The same with a rectifier: ``h <- max(0, W x + b + U h + b')``."""
    return ((x + F.linear(state[0], recurrent, bias)).relu(),)


_STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}


class _Layer(nn.RNNBase):
    """What unrolled layers share: everything but the equations of a step."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the layer that it stands for.

        Raises:
            RunError: for a packed sequence, whose batch gets smaller from step to step.
        """
        if isinstance(input, PackedSequence):
            raise RunError(
                f"nn.{self.mode.split('_')[0]}: a PackedSequence cannot be trained in a stack; pad the sequences and"
                ' ignore the padding in the loss, or set client.execution = "loop"'
            )
        if input.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
        first = self._first(input, hx, batched)
        given: Any = first if self.mode == "LSTM" else first[0]
        self.check_forward_args(input, given, None)

        steps = input.transpose(0, 1) if self.batch_first else input
        directions = 2 if self.bidirectional else 1
        starts, ends = list(zip(*(part.unbind(0) for part in first), strict=True)), []
        for layer in range(self.num_layers):
            found = []
            for direction in range(directions):
                place = layer * directions + direction
                outputs, end = self._run(steps, starts[place], self.all_weights[place], backwards=direction == 1)
                found.append(outputs)
                ends.append(end)
            steps = torch.cat(found, dim=-1) if self.bidirectional else found[0]
            if layer < self.num_layers - 1 and self.dropout:
                steps = F.dropout(steps, self.dropout, self.training)

        output = steps.transpose(0, 1) if self.batch_first else steps
        last = tuple(torch.stack(part) for part in zip(*ends, strict=True))
        if not batched:
            output, last = output.squeeze(0 if self.batch_first else 1), tuple(part.squeeze(1) for part in last)
        return output, last if self.mode == "LSTM" else last[0]

    def _first(self, input: Tensor, hx: Any, batched: bool) -> State:
        """The states before the first step, each ``[layers directions, B, size]``; zeros where none are given."""
        if hx is None:
            layers = self.num_layers * (2 if self.bidirectional else 1)
            batch = input.size(0) if self.batch_first else input.size(1)
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
            return tuple(torch.zeros(layers, batch, size, dtype=input.dtype, device=input.device) for size in sizes)
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        wanted = 3 if batched else 2
        for part in given:
            if part.dim() != wanted:
                raise RuntimeError(
                    f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, the initial states should also be"
                    f" {wanted}-D but got a {part.dim()}-D tensor"
                )
        return given if batched else tuple(part.unsqueeze(1) for part in given)

    def _run(self, steps: Tensor, state: State, weights: Sequence[Tensor], backwards: bool) -> tuple[Tensor, State]:
        """One direction of one layer over all ``steps`` ``[T, B, features]``: outputs ``[T, B, size]``, last state."""
        w, u, *rest = weights
        projection = rest.pop() if self.proj_size else None
        b, bias = rest or (None, None)
        if b is not None and bias is not None and self.mode != "GRU":  # a GRU's reset gate scales the second bias
            b, bias = b + bias, None
        # One product for all steps; flat, as vmap would repeat the weights for every step otherwise.
        shares = F.linear(steps.flatten(0, 1), w, b).unflatten(0, steps.shape[:2]).unbind(0)
        outputs = []
        for x in reversed(shares) if backwards else shares:
            state = _STEPS[self.mode](x, state, u, bias, projection)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs), state

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        # Torch's own looks at a list of weights that functional_call does not know.
        if self.input_size != input.size(-1):
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )


class _UnrolledLSTM(_Layer, nn.LSTM):
    pass


class _UnrolledGRU(_Layer, nn.GRU):
    pass


class _UnrolledRNN(_Layer, nn.RNN):
    pass


class _Cell(nn.RNNCellBase):
    """What unrolled cells share."""

    mode = ""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the cell that it stands for."""
        given = () if hx is None else (tuple(hx) if self.mode == "LSTM" else (hx,))
        for part in (input, *given):
            if part.dim() not in (1, 2):
                raise ValueError(f"{self.mode} cell: Expected input and states to be 1D or 2D, got {part.dim()}D")
        batched = input.dim() == 2
        if not batched:
            input, given = input.unsqueeze(0), tuple(part.unsqueeze(0) for part in given)
        zeros = torch.zeros(len(input), self.hidden_size, dtype=input.dtype, device=input.device)
        state = given or (zeros,) * (2 if self.mode == "LSTM" else 1)
        x = F.linear(input, self.weight_ih, self.bias_ih)
        state = _STEPS[self.mode](x, state, self.weight_hh, self.bias_hh, None)
        if not batched:
            state = tuple(part.squeeze(0) for part in state)
        return state if self.mode == "LSTM" else state[0]


class _UnrolledLSTMCell(_Cell, nn.LSTMCell):
    mode = "LSTM"


class _UnrolledGRUCell(_Cell, nn.GRUCell):
    mode = "GRU"


class _UnrolledRNNCell(_Cell, nn.RNNCell):
    @property
    def mode(self) -> str:  # type: ignore[override]
        return f"RNN_{self.nonlinearity.upper()}"


_UNROLLED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: _UnrolledLSTM,
    nn.GRU: _UnrolledGRU,
    nn.RNN: _UnrolledRNN,
    nn.LSTMCell: _UnrolledLSTMCell,
    nn.GRUCell: _UnrolledGRUCell,
    nn.RNNCell: _UnrolledRNNCell,
}
