"""Small helpers that everything else may use: errors, logging, optional imports."""

from megamed.utils.errors import UserError

__all__ = ["UserError"]
