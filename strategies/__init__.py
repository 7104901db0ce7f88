"""How a server chooses, combines, protects and judges: strategies made of small parts.

Names are imported when they are first used; ``import strategies`` imports no torch.
"""

import lazy_loader

from strategies import kinds as kinds

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
