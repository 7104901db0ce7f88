"""Models by name. A model is a public function annotated ``-> nn.Module``; its keyword arguments are settings."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
