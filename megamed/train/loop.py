"""The training loop. Everything that is not a step is a callback."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megamed.data import Frame, MicrobatchSource
from megamed.train.job import Job
from megamed.train.meter import step_flops, sum_over_replicas
from megamed.train.step import StepReport
from megamed.utils import UserError


@dataclass(frozen=True)
class StepEvent:
    """One finished step, the same on every rank but for its times."""

    step: int
    """Optimizer steps taken, this one included."""
    position: int
    """Microbatches of the data consumed, over all replicas."""
    report: StepReport
    lr: float
    seconds: float
    data_seconds: float
    """Part of it that this rank waited for data."""
    flops: float
    """Model FLOPs of the global batch."""


class Callback(Protocol):
    """Something that happens beside the training. Every rank calls every callback."""

    def start(self, step: int) -> None:
        """Before the first step; `step` were taken by earlier runs."""

    def after_step(self, event: StepEvent) -> None:
        """After each step."""

    def end(self) -> None:
        """After the last step, and only if no step failed."""


class _TimedSource:
    """Adds up the time that a source took."""

    def __init__(self, source: MicrobatchSource):
        self.source = source
        self.seconds = 0.0

    def load(self, frames: Sequence[Frame]) -> Tensor:
        start = time.perf_counter()
        loaded = self.source.load_frames(frames)
        self.seconds += time.perf_counter() - start
        return loaded


def fit(job: Job, source: MicrobatchSource, callbacks: Sequence[Callback], start_step: int) -> None:
    """Train from `start_step` to the job's last step.

    Args:
        job: the placed model and what trains it.
        source: the data; step s takes rows s * n to (s + 1) * n - 1, n the microbatches of the global batch.
        callbacks: called in this order.
        start_step: steps already taken.
    """
    mesh, count = job.mesh, job.config.train.microbatches
    for callback in callbacks:
        callback.start(start_step)
    for step in range(start_step, job.config.train.steps):
        began = time.perf_counter()
        timed = _TimedSource(source)
        microbatches = [
            source.microbatch(step * count + i) for i in range(mesh.data_rank, count, mesh.data_size)
        ]
        timed.seconds += time.perf_counter() - began
        lr = job.optimizer.param_groups[0]["lr"]
        try:
            report = job.stepper.train(microbatches, timed.load, job.optimizer)
        except FloatingPointError as error:
            raise UserError(
                f"step {step + 1}: {error}; the weights are those of step {step}. Lower optim.lr or look at the "
                "data of this step, then run again to go on from the last checkpoint",
                everywhere=True,
            ) from error
        job.scheduler.step(1)
        flops = sum_over_replicas(float(step_flops(job.config.model, microbatches)), mesh)
        event = StepEvent(
            step=step + 1,
            position=(step + 1) * count,
            report=report,
            lr=float(lr),
            seconds=time.perf_counter() - began,
            data_seconds=timed.seconds,
            flops=flops,
        )
        for callback in callbacks:
            callback.after_step(event)
    for callback in callbacks:
        callback.end()

