"""Example-level differential privacy on the client (Abadi et al. 2016, "Deep learning with differential privacy",
Algorithm 1), through Opacus: its per-example gradients, its clipping and noise, its accountants.

A step's gradient is ``(sum_i g_i min(1, C / ||g_i||) + N(0, (sigma C)^2 I)) / L`` over the examples of its batch, ``L``
the (expected) batch size. Imported only where it is used: Opacus takes a second to load.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from opacus.accountants import create_accountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from opacus.accountants.rdp import RDPAccountant
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import ParametrizationList

from clients import randomness
from clients.batches import Work
from clients.errors import RequestError, RunError
from clients.hooks import Variables
from clients.objective import Buffers, Objective
from clients.recipe import DpSgd
from clients.task import Batch

#: Opacus' own orders and larger ones, which low noise rates and few releases need.
_ORDERS = [*RDPAccountant.DEFAULT_ALPHAS, 80, 96, 128, 192, 256, 512, 1024]

#: Above it the accountant's grid takes seconds, then gigabytes, and the exact number no longer matters.
_LARGEST_PRV = 50.0


class _GradientsByExample(GradSampleModule):
    """Opacus' module, with its backward hooks on the outputs of layers instead of around the layers.

    Around them, autograd forbids to change an output in place, as ``nn.ReLU(inplace=True)`` and ``x += y`` do.
    """

    def add_hooks(self, **settings: Any) -> None:
        super().add_hooks(**settings)
        self.settings = {name: settings[name] for name in ("loss_reduction", "batch_first")}
        for around in self.autograd_grad_sample_hooks[1::2]:  # each layer has a forward and a backward one
            around.remove()

    def capture_activations_hook(self, module: nn.Module, forward_input: Any, _forward_output: Any) -> None:
        before = len(vars(module).get("activations", ()))
        super().capture_activations_hook(module, forward_input, _forward_output)
        if len(vars(module).get("activations", ())) > before and isinstance(_forward_output, Tensor):
            _forward_output.register_hook(functools.partial(self._arrived, module))

    def _arrived(self, module: nn.Module, gradient: Tensor) -> None:
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:  # which Opacus' rule trains as well
            (words,) = module.activations[-1]  # type: ignore[index]
            gradient = gradient.masked_fill((words == module.padding_idx)[..., None], 0.0)
        self.capture_backprops_hook(module, None, (gradient,), **self.settings)

    def forget(self) -> None:
        """Drops what a pass that failed, or did not come back through every layer, left in the hooks."""
        for module in self.iterate_submodules(self._module):
            vars(module).pop("activations", None)
            vars(module).pop("max_batch_len", None)
        for parameter in self.parameters():
            vars(parameter).pop("_current_grad_sample", None)
            parameter._forward_counter = 0


class PrivateExecutor:
    """One client at a time, each example's gradient clipped, noise added to their sum.

    Every example counts alike: weights that a task gives to examples would couple them, and are left out. An example
    whose gradient is not finite cannot be clipped, and counts as a gradient of zero.

    Args:
        objective: what each client minimises; its model gets Opacus' hooks.
        dp: clipping norm and noise.
    """

    def __init__(self, objective: Objective, dp: DpSgd):
        self.objective, self.shuffled = objective, dp.sampling == "shuffle"
        self.layout = objective.layout.all
        named = dict(objective.module.model.named_parameters())
        self.parameters: dict[str, Any] = {slot.name: named[slot.name] for slot in self.layout}
        self.module = _GradientsByExample(objective.module, loss_reduction="sum", strict=False)
        self.padding = _padding(objective.module)
        self.examined = False
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.parameters.values(), lr=1.0),  # never takes a step: the block's optimiser does
            noise_multiplier=dp.noise_multiplier,
            max_grad_norm=dp.max_grad_norm,
            expected_batch_size=1,
        )

    def begin(self, client: int, round: int, seed: int, expected: float) -> None:
        """Before a client's first step: keys its noise; ``expected`` is its expected batch size under Poisson sampling.

        Shuffled batches have sizes that no example decides (a zeroed-out one still takes its place), so each is divided
        by its own, as in plain training.
        """
        self.optimizer.generator = randomness.generator(seed, "dp_sgd", round, client)
        self.optimizer.expected_batch_size = expected

    def gradients(
        self,
        rows: Tensor,
        grads: Tensor,
        batch: Batch,
        mask: Tensor | None,
        v: Variables,
        statistics: Buffers = MappingProxyType({}),
    ) -> Tensor:
        """As every executor; ``mask`` is None (a batch holds its examples alone, or none), and so are statistics.

        Raises:
            RequestError: where the model or the loss mixes examples, or Opacus cannot tell their gradients apart.
        """
        for slot in self.layout:
            self.parameters[slot.name].data = rows[0, slot.slice].view(slot.shape).to(slot.dtype)
        one = {name: column[0] for name, column in batch.items()}
        here = v.select(0)
        size, reported = len(next(iter(one.values()))), torch.zeros(1, dtype=rows.dtype)
        if size:
            if not self.examined and (pair := _pair(one)) is not None:
                self.examined = self._examine(pair, here)
            reported = self._backward(one, here).mean().reshape(1)
            self._bound()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            for parameter in self.parameters.values():
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)
        if self.shuffled:
            self.optimizer.expected_batch_size = size
        self.optimizer.pre_step()
        for weight, place in self.padding:
            weight.grad[place] = 0.0
        for slot in self.layout:
            grads[0, slot.slice].view(slot.shape).copy_(self.parameters[slot.name].grad)
        return reported

    def _backward(self, batch: Batch, v: Variables) -> Tensor:
        """Leaves each example's gradient in ``grad_sample`` ``[B, *shape]``; returns the losses ``[B]``."""
        self.optimizer.zero_grad(set_to_none=True)
        self.module.forget()
        with torch.enable_grad():
            descended, reported = self.objective.each(self.module(batch), batch, v)
            try:
                descended.sum().backward()
            except Exception as error:
                raise RunError(
                    "client.dp_sgd: Opacus cannot tell the gradients of this model's examples apart"
                    f" ({type(error).__name__}: {error}); it knows the layers of opacus.grad_sample and opacus.layers"
                ) from error
        size = len(descended)
        for name, parameter in self.parameters.items():
            if parameter.grad_sample is not None:
                continue
            # A call of the layer that the loss does not reach keeps Opacus waiting for its part.
            found = vars(parameter).pop("_current_grad_sample", None)
            if found is None and bool(_gradient(parameter).any()):
                raise RunError(
                    f"client.dp_sgd: Opacus finds no gradients by example for the parameter {name!r}; its layer must be"
                    " called with tensors, in training mode, and give one tensor"
                )
            parameter.grad_sample = parameter.new_zeros(size, *parameter.shape) if found is None else found
        return reported

    def _bound(self) -> None:
        """Puts zeros in the place of gradients of examples that are not finite."""
        # Their sum, which autograd has found as well, is finite only where every one is.
        sums = [parameter.grad.sum() for parameter in self.parameters.values() if parameter.grad is not None]
        if bool(torch.isfinite(torch.stack(sums)).all()):
            return
        each = [parameter.grad_sample for parameter in self.parameters.values()]
        finite = torch.stack([torch.isfinite(sample).flatten(1).all(1) for sample in each]).all(0)
        for sample in each:
            sample[~finite] = 0.0

    def _examine(self, pair: Batch, v: Variables) -> bool:
        """Tries with two examples whether each one's gradient is its own; weights, buffers and draws stay as they are.

        Clipping bounds what an example does only if no other example's gradient depends on it; a user's ``forward`` or
        loss decides that, and not only its layers. False where gradients that are not finite leave it open.
        """
        twice = {name: column[[0, 0]] for name, column in pair.items()}
        with torch.random.fork_rng(devices=[]):
            one, sums, buffers = self._tried(pair, v)
            if not all(bool(torch.isfinite(gradient).all()) for gradient in (*sums.values(), *one.values())):
                return False
            _check_sums(one, sums)
            others, _, changed = self._tried(twice, v)
        moved = _norm(one[name][0] - others[name][0] for name in one)
        if not moved <= 1e-4 * _norm(one.values()):
            raise RequestError(
                "client.dp_sgd: the gradient of one example depends on the others in its batch, so none's influence can"
                " be bounded; the model or the loss mixes examples (by a mean over the batch, say): let it treat each"
                " one alone"
            )
        for (name, _), mine, other in zip(self.objective.module.model.named_buffers(), buffers, changed, strict=True):
            if not torch.equal(mine, other):
                raise RequestError(
                    f"client.dp_sgd: the model's buffer {name!r} follows the examples, without clipping or noise; leave"
                    " it out of training"
                )
        return True

    def _tried(self, batch: Batch, v: Variables) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
        """A pass that leaves nothing behind: gradients by example and autograd's, by name, and the buffers after it."""
        draws, before = torch.get_rng_state(), [dict(module._buffers) for module in self.module.modules()]
        values = [buffer.clone() for buffer in self.module.buffers()]
        self._backward(batch, v)
        after = [buffer.clone() for buffer in self.module.buffers()]
        for module, buffers in zip(self.module.modules(), before, strict=True):
            module._buffers.update(buffers)
        for buffer, value in zip(self.module.buffers(), values, strict=True):
            buffer.copy_(value)
        torch.set_rng_state(draws)
        samples = {name: parameter.grad_sample for name, parameter in self.parameters.items()}
        return samples, {name: _gradient(parameter) for name, parameter in self.parameters.items()}, after


def _padding(model: nn.Module) -> list[tuple[Any, int]]:
    """Weights with a row that nothing trains, and so no noise should: an embedding's padding, unless they are tied."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return [
        (module.weight, module.padding_idx)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
        if module.weight.requires_grad and holders[id(module.weight)] == 1
    ]


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Autograd's own gradient, dense."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in tensors))


def _check_sums(samples: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
    """Compares Opacus' gradients of two examples with autograd's gradient of their sum."""
    scale = _norm(sums.values())
    for name, sample in samples.items():
        if len(sample) != 2:
            said = f"{len(sample)} gradients for 2 examples; its layer's inputs must have examples as first dimension"
        elif float((sample.sum(0) - sums[name]).norm()) > 1e-3 * float(sums[name].norm()) + 1e-5 * scale:
            said = "gradients by example that do not add up to the batch's; it has no rule for how its layer is used"
        else:
            continue
        raise RequestError(f"client.dp_sgd: for the parameter {name!r} Opacus finds {said}")


def _pair(batch: Batch) -> Batch | None:
    """The first two examples that differ."""
    size = len(next(iter(batch.values())))
    for other in range(1, size):
        if any(not torch.equal(column[0], column[other]) for column in batch.values()):
            return {name: column[[0, other]] for name, column in batch.items()}
    return None


def check_private(model: nn.Module) -> list[str]:
    """What in a model cannot be made private, one line each with its mend.

    What only a ``forward`` shows, the first step finds out.
    """
    return [line for name, module in model.named_modules() for line in _refused(module, name or "the model")]


def _refused(module: nn.Module, name: str) -> Iterator[str]:
    kind, says = type(module), f"client.dp_sgd: {type(module).__name__} ({name!r})"
    if isinstance(module, _BatchNorm):
        yield (
            f"client.dp_sgd: batch norm ({name!r}) mixes examples, so no example's influence can be bounded; set"
            ' model.norm = "group", or use clients.normalization.replace_batch_norm(model, "group")'
        )
    elif isinstance(module, _InstanceNorm) and module.track_running_stats:
        yield f"{says} keeps statistics of the examples without noise; set track_running_stats = False"
    elif not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return
    elif known := next((known for known in kind.__mro__ if known in ModuleValidator.VALIDATORS), None):
        fixed = kind in ModuleValidator.FIXERS
        mend = "opacus.validators.ModuleValidator.fix(model)" if fixed else "one of the layers in opacus.layers"
        for error in ModuleValidator.VALIDATORS[known](module):
            yield f"{says}: {' '.join(str(error).split())} It is {mend}"
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        own = next(base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch."))
        yield f"{says} is one kernel, which does not tell examples apart; use opacus.layers.DP{own}"
    elif isinstance(module, nn.EmbeddingBag):
        yield f"{says}: Opacus' rule counts a word once that a bag holds twice; use the mean or sum of an nn.Embedding"
    elif isinstance(module, nn.Embedding) and module.max_norm is not None:
        yield f"{says} with max_norm changes its weights by the words that examples have, without noise; leave it out"
    elif isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        yield f"{says} with scale_grad_by_freq counts words over examples; leave it out"
    elif isinstance(module, _ConvNd) and module.padding_mode != "zeros":
        yield f'{says}: Opacus has no rule for padding_mode = "{module.padding_mode}"; use "zeros"'
    elif isinstance(module, ParametrizationList):
        yield f"{says}: Opacus has no rule for weights that are computed from others; remove the parametrization"
    elif kind not in GradSampleModule.GRAD_SAMPLERS and (cause := _not_traceable(module)):
        yield (
            f"{says} has parameters of its own, whose gradients Opacus finds by calling it anew for every example, and"
            f" it {cause}; put those parameters into a module of their own"
        )


def _not_traceable(module: nn.Module) -> str:
    """Why Opacus cannot call a module for every example apart; empty where nothing speaks against it."""
    if any(True for _ in module.buffers()):
        return "has buffers"
    if any(isinstance(inner, _DropoutNd) and inner.p > 0 for inner in module.modules()):
        return "has dropout"
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed) > 1:
        return "needs several inputs"
    return ""


def releases(dp: DpSgd, done: Work, batch_size: int) -> tuple[float, int]:
    """``(sampling rate, number of releases)`` of one client's work in a round, as the accountant counts them.

    Neighbours have one example replaced by nothing, a gradient of zero (zero-out; Kairouz et al. 2021, "Practical and
    private (deep) learning without sampling or shuffling"): how many examples a client holds, and with it rate, steps
    and divisor, is no secret. The sum of clipped gradients then moves by at most ``C``, once for every release that the
    example is in.

    Under Poisson sampling every step is a release, at rate ``batch_size / examples``. Shuffled batches are disjoint
    within an epoch, whatever the examples are, so an example is in one release an epoch, at rate 1; all other steps of
    the epoch compute on what was released. An epoch that was begun counts whole, and every round begins a new one.

    Args:
        dp: the mechanism.
        done: the client's work, ``[1]``.
        batch_size: examples a step.
    """
    examples, per_epoch, steps = (int(part[0]) for part in (done.examples, done.per_epoch, done.steps))
    if not steps:
        return 1.0, 0
    if dp.sampling == "poisson":
        return min(1.0, batch_size / examples), steps
    return 1.0, -(-steps // per_epoch)


@functools.lru_cache(maxsize=4096)
def spent(dp: DpSgd, rate: float, count: int) -> float:
    """Epsilon at the recipe's delta after so many releases, by Opacus' accountants; infinite without noise.

    ``rdp``: Renyi divergences (Mironov 2017), converted as by Balle et al. (2020). ``prv``: the upper estimate of the
    composed privacy loss (Gopi et al. 2021) to within 0.01, or the former bound where that is lower or above 50.
    """
    if not count:
        return 0.0
    if not dp.noise_multiplier:
        return math.inf
    divergences = _divergences(dp.noise_multiplier, rate) * count
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        # Where the first or last order is the best, the bound holds, and another order would tighten it a little.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        epsilon = get_privacy_spent(orders=_ORDERS, rdp=divergences, delta=dp.delta)[0]
        if dp.accountant == "prv" and epsilon <= _LARGEST_PRV:
            accountant = create_accountant(mechanism="prv")
            accountant.history = [(dp.noise_multiplier, rate, count)]
            epsilon = min(epsilon, accountant.get_epsilon(dp.delta))
    return float(epsilon)


@functools.lru_cache(maxsize=4096)
def _divergences(noise_multiplier: float, rate: float) -> np.ndarray:
    """The Renyi divergence of one release at each order; those of many releases add."""
    return np.asarray(compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=1, orders=_ORDERS))
