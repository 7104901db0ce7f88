"""Example-level differential privacy on the client (Abadi et al. 2016, "Deep learning with differential privacy",
Algorithm 1), through Opacus: its per-example gradients, its clipping and noise, its accountants.

A step's gradient is ``(sum_i g_i min(1, C / ||g_i||) + N(0, (sigma C)^2 I)) / L`` over the examples of its batch, ``L``
the (expected) batch size. Imported only where it is used: Opacus takes seconds to load.
"""

from __future__ import annotations

import functools
import math
import warnings
from types import MappingProxyType

import torch
from opacus.accountants import create_accountant
from opacus.accountants.rdp import RDPAccountant
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clients import randomness
from clients.batches import Work
from clients.hooks import Variables
from clients.objective import Buffers, Objective
from clients.recipe import DpSgd
from clients.task import Batch

#: Opacus' own orders and larger ones, which low noise rates and few releases need.
_ALPHAS = [*RDPAccountant.DEFAULT_ALPHAS, 80, 96, 128, 192, 256, 512, 1024]


class PrivateExecutor:
    """One client at a time, each example's gradient clipped, noise added to their sum.

    Every example counts alike: weights that a task gives to examples would couple them, and are left out.

    Args:
        objective: what each client minimises; its model gets Opacus' hooks.
        dp: clipping norm and noise.
    """

    def __init__(self, objective: Objective, dp: DpSgd):
        self.objective, self.shuffled = objective, dp.sampling == "shuffle"
        self.layout = objective.layout.all
        named = dict(objective.module.model.named_parameters())
        self.parameters = {slot.name: named[slot.name] for slot in self.layout}
        self.module = GradSampleModule(objective.module, loss_reduction="mean", strict=False)
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.parameters.values(), lr=1.0),  # never takes a step: the block's optimiser does
            noise_multiplier=dp.noise_multiplier,
            max_grad_norm=dp.max_grad_norm,
            expected_batch_size=1,
        )

    def begin(self, client: int, round: int, seed: int, expected: float) -> None:
        """Before a client's first step: keys its noise; ``expected`` is its expected batch size under Poisson sampling.

        Shuffled batches have sizes that no example decides (a zeroed-out one still takes its place), so they are
        divided by their own, as in plain training.
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
        for slot in self.layout:
            self.parameters[slot.name].data = rows[0, slot.slice].view(slot.shape).to(slot.dtype)
        self.optimizer.zero_grad(set_to_none=True)
        one = {name: column[0] for name, column in batch.items()}
        size = len(next(iter(one.values())))
        if self.shuffled:
            self.optimizer.expected_batch_size = size
        reported = torch.zeros(1, dtype=rows.dtype)
        if size:
            here = Variables(v.weights, {name: value[0] for name, value in v.client.items()}, v.server, v.round)
            with torch.enable_grad(), warnings.catch_warnings():
                # Inputs are data: that no gradient flows to them is as it should be.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                descended, values = self.objective.each(self.module(one), one, here)
                descended.mean().backward()
            reported = values.mean().reshape(1)
        for parameter in self.parameters.values():
            if getattr(parameter, "grad_sample", None) is None:  # an empty batch, or nothing that the loss reaches
                setattr(parameter, "grad_sample", parameter.new_zeros(size, *parameter.shape))  # noqa: B010
        self.optimizer.pre_step()
        for slot in self.layout:
            private = self.parameters[slot.name].grad
            assert private is not None
            grads[0, slot.slice].view(slot.shape).copy_(private)
        return reported


def check_private(model: nn.Module) -> list[str]:
    """What in a model cannot be made private, one line each with its mend."""
    problems = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            problems.append(
                f"client.dp_sgd: batch norm ({name or 'the model'!r}) mixes examples, so no single one's influence can"
                ' be bounded; set model.norm = "group", or use'
                ' clients.normalization.replace_batch_norm(model, "group")'
            )
        elif type(module) in ModuleValidator.VALIDATORS:
            problems += [
                f"client.dp_sgd: Opacus cannot bound what an example does to {type(module).__name__}"
                f" ({name or 'the model'!r}); model = opacus.validators.ModuleValidator.fix(model) puts one of its own"
                " layers there"
                for _ in ModuleValidator.VALIDATORS[type(module)](module)
            ]
    return problems


def releases(dp: DpSgd, done: Work, batch_size: int) -> tuple[float, int]:
    """``(sampling rate, number of releases)`` of one client's work in a round, as the accountant counts them.

    Under Poisson sampling every step is a release at rate ``batch_size / examples``; neighbours differ by one example
    added or removed. Shuffled batches are disjoint within an epoch, so an example is in one release an epoch, at rate
    1; neighbours have an example replaced by nothing (zero-out), since a removed one would move all others.
    """
    examples, per_epoch, steps = (int(part[0]) for part in (done.examples, done.per_epoch, done.steps))
    if dp.sampling == "poisson":
        return min(1.0, batch_size / examples), steps
    return 1.0, -(-steps // per_epoch)


@functools.lru_cache(maxsize=4096)
def spent(dp: DpSgd, rate: float, count: int) -> float:
    """Epsilon at the recipe's delta after so many releases, by Opacus' accountant; infinite without noise."""
    if not count:
        return 0.0
    if not dp.noise_multiplier:
        return math.inf
    accountant = create_accountant(mechanism=dp.accountant)
    accountant.history = [(dp.noise_multiplier, rate, count)]
    with warnings.catch_warnings():
        # The largest or smallest order was the best: the bound holds, and another order would tighten it a little.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="opacus")
        if dp.accountant == "rdp":
            return float(accountant.get_epsilon(dp.delta, alphas=_ALPHAS))
        return float(accountant.get_epsilon(dp.delta))
