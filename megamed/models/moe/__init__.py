"""Mixture-of-experts layers: named pools of experts, their router, balance and counts."""

from megamed.models.moe.config import MoEConfig, PoolConfig
from megamed.models.moe.experts import BatchedExperts, batched
from megamed.models.moe.metrics import AUX_LOSSES, RoutingCounts, StepStatistics, move_biases, take_statistics
from megamed.models.moe.pools import GENERAL, Pools
from megamed.models.moe.router import Router, initial_prior, routing_mask

__all__ = [
    "AUX_LOSSES",
    "GENERAL",
    "BatchedExperts",
    "MoEConfig",
    "PoolConfig",
    "Pools",
    "Router",
    "RoutingCounts",
    "StepStatistics",
    "batched",
    "initial_prior",
    "move_biases",
    "routing_mask",
    "take_statistics",
]
