from .page import write_report
from .tables import FORMATS, export

__all__ = ["FORMATS", "export", "write_report"]
