"""Optimizers and schedules."""

import megamed.runtime  # noqa: F401  makes Megatron importable, before the modules below import it
from megamed.optim.build import build_optimizer, build_scheduler, clip_by_total_norm
from megamed.optim.config import OptimConfig

__all__ = ["OptimConfig", "build_optimizer", "build_scheduler", "clip_by_total_norm"]
