"""Mixture-of-experts layers."""

from megamed.models.moe.config import MoEConfig
from megamed.models.moe.metrics import AUX_LOSSES, take_recorded_losses
from megamed.models.moe.router import Router

__all__ = ["AUX_LOSSES", "MoEConfig", "Router", "take_recorded_losses"]
