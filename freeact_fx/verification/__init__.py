"""``freeact_fx.verify`` and its result."""

from .result import Finding, Unchecked, Verification
from .walk import verify

__all__ = ["Finding", "Unchecked", "Verification", "verify"]
