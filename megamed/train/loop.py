"""The training loop. Everything that is not a step is a callback."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from megamed.data import Microbatch, MicrobatchSource
from megamed.data.specialties import drop_specialties
from megamed.train.faults import Faults
from megamed.train.job import Job
from megamed.train.meter import row_flops, step_flops, sum_over_replicas
from megamed.train.prefetch import Prefetcher
from megamed.train.step import BadStep, StepReport


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
    is_skipped: bool = False
    """Its gradient was not applied."""
    skipped: int = 0
    """Steps of the run whose gradient was not applied."""


class Callback(Protocol):
    """Something that happens beside the training. Every rank calls every callback."""

    def start(self, step: int) -> None:
        """Before the first step; `step` were taken by earlier runs."""

    def after_step(self, event: StepEvent) -> None:
        """After each step."""

    def end(self) -> None:
        """After the last step, and only if no step failed."""


def fit(
    job: Job,
    source: MicrobatchSource,
    callbacks: Sequence[Callback],
    start_step: int,
    start_position: int | None = None,
    faults: Faults | None = None,
) -> None:
    """Train from `start_step` to the job's last step.

    Args:
        job: the placed model and what trains it.
        source: the data; each step takes the next n rows, n the microbatches of the global batch.
        callbacks: called in this order.
        start_step: steps already taken.
        start_position: rows already consumed; None for n a step.
        faults: judges steps; by default they end the run if they are not finite.

    Raises:
        RollBack: the policy says so.
        UserError: a step is bad, and the policy says to stop.
    """
    faults = faults or Faults(job.config.train.faults)
    mesh, count, model = job.mesh, job.config.train.microbatches, job.config.model
    offset = 0 if start_position is None else start_position - start_step * count
    for callback in callbacks:
        callback.start(start_step)

    def rows(step: int) -> list[Microbatch]:
        shares = source.share(step * count + offset, count, mesh.data_size, partial(row_flops, model))
        mine = [(index, source.microbatch(index)) for index in shares[mesh.data_rank]]
        dropout, seed = model.language.moe.specialty_dropout, job.config.train.seed
        return [drop_specialties(microbatch, dropout, seed, index) for index, microbatch in mine]

    steps, most_frames = range(start_step, job.config.train.steps), job.config.data.loader.prefetch_frames
    with Prefetcher(steps, rows, job.phase.own_passes, source.load_frames, most_frames) as prefetcher:
        for step in steps:
            began, waited = time.perf_counter(), prefetcher.seconds
            microbatches = prefetcher.rows(step)
            lr = job.optimizer.param_groups[0]["lr"]
            try:
                report = job.stepper.train(microbatches, prefetcher.load, job.optimizer, faults.judge)
                is_skipped = False
                job.scheduler.step(1)
            except BadStep as bad:
                faults.handle(step + 1, (step + 1) * count + offset, bad, microbatches, mesh)
                report, is_skipped = bad.report, True
            event = StepEvent(
                step=step + 1,
                position=(step + 1) * count + offset,
                report=report,
                lr=float(lr),
                is_skipped=is_skipped,
                skipped=faults.skipped,
                flops=sum_over_replicas(float(step_flops(model, microbatches)), mesh),
                seconds=time.perf_counter() - began,
                data_seconds=prefetcher.seconds - waited,
            )
            for callback in callbacks:
                callback.after_step(event)
    for callback in callbacks:
        callback.end()
