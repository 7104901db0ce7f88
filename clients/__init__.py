"""The ground floor: weights and biases as rows, and how one client, or a stack of them, trains.

Names are imported when they are first used; ``import clients`` imports no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
