"""fedsim simulates federated learning. ``fedsim.run()`` runs the embedded digits experiment.

``fedsim.strategies`` and ``fedsim.clients`` are the packages ``strategies`` and ``clients``, their submodules included.
Names are imported when they are first used, so that ``import fedsim`` costs no more than it must.
"""

from __future__ import annotations

import lazy_loader

from fedsim import siblings

siblings.install()

import clients  # noqa: E402
import strategies  # noqa: E402

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["clients", "strategies"]
