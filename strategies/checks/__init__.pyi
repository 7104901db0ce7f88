from .canary_audit import CanaryAudit
from .check import Check, CheckContext, Findings

__all__ = ["CanaryAudit", "Check", "CheckContext", "Findings"]
