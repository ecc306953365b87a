"""Gradients that are not finite, and spikes: judged before the optimizer applies them, so the weights stay clean.

A spike is a gradient norm above a multiple of the median norm of the steps before. A median of many steps is hardly
moved by the spikes among them. What is done is a matter of policy: stop, leave the step out, or go back to the last
checkpoint and pass over the batches since, as PaLM's training did (arXiv:2204.02311, section 5.1). The samples
of the batch are kept in `faults.jsonl` of the run.
"""

import contextlib
import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megamed.data import Microbatch
from megamed.runtime import Mesh
from megamed.train.config import FaultsConfig
from megamed.train.step import BadStep
from megamed.utils import UserError

log = logging.getLogger(__name__)

FAULTS = "faults.jsonl"
What = Literal["not_finite", "spike"]


class RollBack(Exception):
    """The run goes back to its last checkpoint.

    Attributes:
        position: microbatches of the data consumed, the offending ones included: the next ones come then.
    """

    def __init__(self, position: int):
        super().__init__(position)
        self.position = position


class Faults:
    """Judges steps, and says what becomes of bad ones; the same on every rank, since losses and norms are.

    Args:
        config: the policy.
        folder: of the run; None keeps no record.
        skipped: steps that earlier starts left out.
    """

    def __init__(self, config: FaultsConfig, folder: Path | None = None, skipped: int = 0):
        self.config, self.folder, self.skipped = config, folder, skipped
        self._norms: deque[float] = deque(maxlen=config.window)
        self._bad: deque[int] = deque(maxlen=config.most)

    def remember(self, step: int) -> None:
        """Take the norms of earlier steps from the run's metrics. Collective."""
        norms: list[Any] = [[]]
        if dist.get_rank() == 0 and self.folder is not None:
            norms = [_norms(self.folder / "metrics.jsonl", step)]
        dist.broadcast_object_list(norms)
        self._norms.clear()
        self._norms.extend(norms[0])

    @property
    def limit(self) -> float:
        """Largest gradient norm that is no spike; infinite while too few steps are known, and without a policy."""
        if self.config.spike == "none" or len(self._norms) < self.config.min_steps:
            return math.inf
        return self.config.spike_factor * statistics.median(self._norms)

    def judge(self, loss: float, norm: float) -> What | None:
        """What is wrong with a step, by its loss and gradient norm; None for nothing."""
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return "not_finite"
        if norm > self.limit:
            return "spike"
        self._norms.append(norm)
        return None

    def handle(self, step: int, position: int, bad: BadStep, microbatches: Sequence[Microbatch], mesh: Mesh) -> None:
        """Do with a bad step what the policy says; returns if it is to be left out. Collective.

        Args:
            step: its number.
            position: microbatches of the data consumed with it.
            bad: the step.
            microbatches: of this replica.
            mesh: the layout.

        Raises:
            RollBack: go back to the last checkpoint.
            UserError: the run ends; because of the policy, or of too many bad steps.
        """
        policy = self.config.spike if bad.what == "spike" else self.config.not_finite
        worst = len(self._bad) == self.config.most and step - self._bad[0] < self.config.window
        done = "stop" if worst else policy
        self._bad.append(step)
        self._record(step, bad, done, microbatches, mesh)
        why = f"step {step}: {bad}"
        if dist.get_rank() == 0 and done != "stop":
            log.warning("%s; %s (%s has its samples)", why, _SAID[done], FAULTS)
        if done == "rollback":
            raise RollBack(position)
        if done == "stop":
            often = f"more than {self.config.most} in {self.config.window} steps (train.faults.most); " if worst else ""
            raise UserError(
                f"{why}; {often}the weights are those of step {step - 1}. Lower optim.lr, look at the samples of this "
                f"step in {FAULTS}, or set train.faults.{bad.what}=skip or rollback; then run again to go on from the "
                "last checkpoint",
                everywhere=True,
            )
        self.skipped += 1

    def _record(self, step: int, bad: BadStep, done: str, microbatches: Sequence[Microbatch], mesh: Mesh) -> None:
        mine = mesh.data_rank, [row.sample_ids for row in microbatches]
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, mine)
        if dist.get_rank() or self.folder is None:
            return
        rows = [row for _, rows in sorted(dict(everybody).items()) for row in rows]
        values = {
            "step": step, "what": bad.what, "done": done, "loss": _number(bad.report.loss),
            "grad_norm": _number(bad.report.grad_norm), "limit": _number(self.limit), "samples": rows,
        }  # fmt: skip
        try:
            with open(self.folder / FAULTS, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self.folder / FAULTS, error.strerror)


_SAID = {"skip": "its gradient is not applied", "rollback": "going back to the last checkpoint"}


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else str(value)


def _norms(path: Path, step: int) -> list[float]:
    """Gradient norms of earlier steps; lines that a kill cut short are left out, as is a file that cannot be read."""
    found = []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            values = json.loads(line)
            if values["step"] <= step and not values.get("skipped"):
                found.append(float(values["grad_norm"]))
    return found
