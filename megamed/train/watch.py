"""Watches a rank: says that it lives, and ends it when it hangs, so that torchrun can start the job again.

A collective that one rank never joins leaves all others waiting. NCCL notices after its own time limit; a rank that
waits for a file system, or for gloo, does not. What is watched is the time from one step to the next.
"""

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamed.checkpoint import CheckpointManager, list_checkpoints
from megamed.data import MicrobatchSource
from megamed.train.callbacks import Progress, Stopped
from megamed.train.faults import Faults, RollBack
from megamed.train.job import Job
from megamed.train.loop import Callback, StepEvent, fit
from megamed.utils import UserError
from megamed.utils.files import write_text

log = logging.getLogger(__name__)

ALIVE, HANGS = "alive.json", "hangs"
EXIT_HUNG = 75  # sysexits.h: a failure that may be over next time
BEAT_SECONDS = 10.0


def fit_watched(
    job: Job,
    source: MicrobatchSource,
    callbacks: Sequence[Callback],
    manager: CheckpointManager,
    card: dict[str, Any],
    folder: Path,
) -> None:
    """Train as `fit` does, with a progress bar, a sign of life, an end to what hangs, and ways back from bad steps.

    Args:
        job, source, callbacks: as for `fit`.
        manager: of the run's checkpoints.
        card: of the one that was loaded, or what stands for it at the beginning.
        folder: of the run.
    """
    progress, watch = Progress(job.config.train.steps), Watch(folder, job.config.run.hang_minutes)
    beside: list[Callback] = [watch, progress, *callbacks, watch.resumed]
    faults, position = Faults(job.config.train.faults, folder, card.get("skipped", 0)), card["position"]
    state = "failed"
    try:
        while True:
            faults.remember(card["step"])
            try:
                fit(job, source, beside, card["step"], position, faults)
                break
            except RollBack as back:
                card, position = _go_back(manager, back.position), back.position
                source.restore(position, source.state(position))
                faults.skipped = card.get("skipped", 0)
        state = "complete"
    except Stopped:
        state = "stopped"
        raise
    finally:
        progress.close()
        watch.close(state)


def _go_back(manager: CheckpointManager, position: int) -> dict[str, Any]:
    """Load the last checkpoint again."""
    manager.wait()
    if not list_checkpoints(manager.folder):
        raise UserError(
            "there is no checkpoint yet to go back to; set train.faults.*=skip, or checkpoint.every_steps to fewer",
            everywhere=True,
        )
    card = manager.load_newest()
    if dist.get_rank() == 0:
        log.warning("going on from step %d with the data from row %d on", card["step"], position)
    return card


class Watch:
    """A callback, the first one; `resumed` is the last one, and what the others take does not count.

    Args:
        folder: of the run.
        hang_minutes: after so long without a step the rank is ended; 0 never ends it.
    """

    def __init__(self, folder: Path, hang_minutes: float):
        self.folder, self.limit = folder, 60 * hang_minutes
        self.resumed = _Resumed(self)
        self._step, self._state = 0, "starting"
        self._since: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def start(self, step: int) -> None:
        self._step = step
        if not self._thread.is_alive():
            self._thread.start()

    def after_step(self, event: StepEvent) -> None:
        self._step, self._since = event.step, None

    def end(self) -> None:
        self._since, self._state = None, "ending"

    def resume(self) -> None:
        """From here on time counts."""
        self._since, self._state = time.monotonic(), "training"

    def close(self, state: str) -> None:
        """Stop watching.

        Args:
            state: what the run is now: `complete`, `stopped` or `failed`.
        """
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._state = state
        self._say()

    def _run(self) -> None:
        interval = min(BEAT_SECONDS, self.limit / 4) if self.limit else BEAT_SECONDS
        while True:
            self._say()
            if self._over.wait(interval):
                return
            since = self._since
            if self.limit and since is not None and time.monotonic() - since > self.limit:
                self._state = "hung"
                self._say()
                self._end_hung()

    def _say(self) -> None:
        """Leave a sign of life, which nothing depends on."""
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):
                values = {"state": self._state, "step": self._step, "time": round(time.time(), 1)}
                write_text(self.folder / ALIVE, json.dumps(values) + "\n")

    def _end_hung(self) -> None:
        rank = dist.get_rank()
        path = self.folder / HANGS / f"step_{self._step + 1:08d}_rank_{rank}.txt"
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            with open(path, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        line = (
            f"megamed: rank {rank}: step {self._step + 1} has not ended in {self.limit / 60:g} minutes "
            f"(run.hang_minutes); where each thread was is in {path}. This rank ends, for torchrun to start again"
        )
        print(f"\n{line}", file=sys.stderr, flush=True)
        os._exit(EXIT_HUNG)


class _Resumed:
    """The last callback of a step."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def start(self, step: int) -> None:
        self.watch.resume()

    def after_step(self, event: StepEvent) -> None:
        self.watch.resume()

    def end(self) -> None: ...
