"""Strategies that withstand malicious clients: presets of the robust rules."""

from __future__ import annotations

from typing import Any

from clients.recipe import Count, Positive, Rate
from strategies import robust
from strategies.robust import Malicious, WeighBy
from strategies.server_optimizers import SGD
from strategies.strategy import Strategy


class _OnRows(Strategy):
    """What the presets share: their rules look at every row."""

    needs = "rows"
    composes_with = "any sampling, correction and server optimiser, and plug-ins that leave rows apart"


class Median(_OnRows):
    """The coordinate-wise median of the updates (Yin et al. 2018).

    See :class:`MedianRule`.

    Args:
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    def __init__(self, **parts: Any):
        super().__init__(**{"aggregator": robust.MedianRule(), **parts})


class TrimmedMean(_OnRows):
    """The coordinate-wise mean without f values at either end (Yin et al. 2018).

    See :class:`TrimmedMeanRule`.

    Args:
        num_malicious: f; a round needs more than 2f updates.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    def __init__(self, num_malicious: Malicious = 1, **parts: Any):
        super().__init__(**{"aggregator": robust.TrimmedMeanRule(num_malicious), **parts})


class Krum(_OnRows):
    """The update with the nearest neighbours (Blanchard et al. 2017).

    See :class:`KrumRule`.

    Args:
        num_malicious: f; a round needs 2f + 3 updates.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    def __init__(self, num_malicious: Malicious = 1, **parts: Any):
        super().__init__(**{"aggregator": robust.KrumRule(num_malicious), **parts})


class MultiKrum(_OnRows):
    """The mean of the updates with the best Krum scores (Blanchard et al. 2017).

    See :class:`MultiKrumRule`.

    Args:
        num_malicious: f; a round needs 2f + 3 updates.
        num_selected: how many are averaged; left out, n - f.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    def __init__(self, num_malicious: Malicious = 1, num_selected: Count | None = None, **parts: Any):
        super().__init__(**{"aggregator": robust.MultiKrumRule(num_malicious, num_selected), **parts})


class Bulyan(_OnRows):
    """Krum again and again, then a mean around the median (El Mhamdi et al. 2018).

    See :class:`BulyanRule`.

    Args:
        num_malicious: f; a round needs 4f + 3 updates.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    def __init__(self, num_malicious: Malicious = 1, **parts: Any):
        super().__init__(**{"aggregator": robust.BulyanRule(num_malicious), **parts})


class GeometricMedian(_OnRows):
    """RFA: the point with the least sum of distances (Pillutla et al. 2022).

    See :class:`GeometricMedianRule`.

    Args:
        weigh_by: ``examples`` as in the paper, or ``uniform``.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    def __init__(self, weigh_by: WeighBy = "examples", **parts: Any):
        super().__init__(**{"aggregator": robust.GeometricMedianRule(weigh_by), **parts})


class CenteredClipping(_OnRows):
    """Updates clipped around the last round's result (Karimireddy et al. 2021).

    See :class:`CenteredClippingRule`.

    Args:
        radius: tau; left out, the median distance to the center.
        iterations: how many in a round.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    keeps = "the last aggregate on the server"

    def __init__(self, radius: Positive | None = None, iterations: Count = 1, **parts: Any):
        super().__init__(**{"aggregator": robust.CenteredClippingRule(radius, iterations), **parts})


class NormBounding(_OnRows):
    """The mean of updates of bounded norm (Sun et al. 2019).

    See :class:`NormBoundingRule`.

    Args:
        radius: M; left out, the median norm of the round's updates.
        weigh_by: ``uniform`` or ``examples``.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    def __init__(self, radius: Positive | None = None, weigh_by: WeighBy = "uniform", **parts: Any):
        super().__init__(**{"aggregator": robust.NormBoundingRule(radius, weigh_by), **parts})


class FLTrust(_OnRows):
    """Clients weighted by their agreement with the server's own update (Cao et al. 2021).

    See :class:`FLTrustRule`.

    Needs ``data.root`` examples on the server.

    Args:
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    def __init__(self, **parts: Any):
        super().__init__(**{"aggregator": robust.FLTrustRule(), **parts})


class DnC(_OnRows):
    """Divide and conquer: drops what lies far along the main direction (Shejwalkar and Houmansadr 2021).

    See :class:`DnCRule`.

    Args:
        num_malicious: f; a round needs more than 2f updates.
        iterations: the paper's niters.
        columns: the paper's b.
        fraction: the paper's c.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    def __init__(
        self,
        num_malicious: Malicious = 1,
        iterations: Count = 5,
        columns: Count = 10_000,
        fraction: Positive = 1.0,
        **parts: Any,
    ):
        super().__init__(**{"aggregator": robust.DnCRule(num_malicious, iterations, columns, fraction), **parts})


class SignSGD(_OnRows):
    """signSGD with majority vote, x <- x + lr sign(sum_k sign(D_k)) (Bernstein et al. 2019).

    See :class:`SignMajorityRule`.

    Args:
        lr: server learning rate, how far every coordinate moves in a round.
        momentum: of the server, below 1, see :class:`SGD`.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    keeps = "momentum on the server, where it has some"
    composes_with = "any sampling and correction, and plug-ins that leave rows apart"

    def __init__(self, lr: Positive = 0.01, momentum: Rate = 0.0, **parts: Any):
        super().__init__(**{"aggregator": robust.SignMajorityRule(), "server_optimizer": SGD(lr, momentum), **parts})
