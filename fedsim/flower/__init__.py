"""Flower apps on fedsim's engines: an in-process grid, workers that call ClientApps, and ``simulate``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
