"""Training: the step, the loop, and what happens beside it."""

import megamed.runtime  # noqa: F401  makes Megatron importable, before the modules below import it
from megamed.train.callbacks import Checkpoints, Metrics, Progress, Wandb, measurements
from megamed.train.config import JobConfig
from megamed.train.job import Job, build_job
from megamed.train.loop import Callback, StepEvent, fit
from megamed.train.meter import matmul_peak
from megamed.train.routing_log import RoutingLog
from megamed.train.step import Stepper, StepReport

__all__ = [
    "Callback",
    "Checkpoints",
    "Job",
    "JobConfig",
    "Metrics",
    "Progress",
    "RoutingLog",
    "StepEvent",
    "StepReport",
    "Stepper",
    "Wandb",
    "build_job",
    "fit",
    "matmul_peak",
    "measurements",
]
