from .engine import Answer, Engine, Result
from .inline import Inline
from .processes import Processes

__all__ = ["Answer", "Engine", "Inline", "Processes", "Result"]
