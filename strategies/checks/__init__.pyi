from .check import Check, CheckContext, Findings

__all__ = ["Check", "CheckContext", "Findings"]
