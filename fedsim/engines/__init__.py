"""Where clients are trained: an ordered map with a broadcast, in this process or in many."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
