"""What a reader gets of a run: one self-contained page, or its tables as files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
