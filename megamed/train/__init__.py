"""Training: the step, the loop, and what happens beside it."""

import megamed.runtime  # noqa: F401  makes Megatron importable, before the modules below import it
from megamed.train.callbacks import Checkpoints, Metrics, Stopped, Wandb, measurements
from megamed.train.config import JobConfig
from megamed.train.job import Job, build_job
from megamed.train.loop import Callback, StepEvent, fit
from megamed.train.meter import matmul_peak
from megamed.train.routing_log import RoutingLog
from megamed.train.step import Stepper, StepReport
from megamed.train.stragglers import Stragglers
from megamed.train.watch import fit_watched

__all__ = [
    "Callback",
    "Checkpoints",
    "Job",
    "JobConfig",
    "Metrics",
    "RoutingLog",
    "StepEvent",
    "StepReport",
    "Stepper",
    "Stopped",
    "Stragglers",
    "Wandb",
    "build_job",
    "fit",
    "fit_watched",
    "matmul_peak",
    "measurements",
]
