"""A strategy: a composition of the user's own that goes by one name."""

from __future__ import annotations

from typing import Any

import strategies


class SlowAndRandom(strategies.Strategy):
    """Clients take part by their own coin; the server moves by momentum."""

    def __init__(self, share: float = 0.4, momentum: float = 0.5, **parts: Any):
        mine = {
            "sampling": strategies.Poisson(fraction=share),
            "server_optimizer": strategies.server_optimizers.SGD(lr=0.5, momentum=momentum),
        }
        super().__init__(**{**mine, **parts})
