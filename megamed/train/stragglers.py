"""`stragglers.jsonl`: ranks that are slower than the others, and thereby slow all of them down.

In a step all ranks wait for each other many times, so its time does not tell who is late. Two things a rank does by
itself: it encodes its frames, always the same work for a frame, which tells a slow GPU (hot, throttled, shared); and
it waits for its own data, which tells a slow disk or a busy host. Both are summed over some steps and compared.
"""

import logging
import os
import socket
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamed.parallel import VisionPhase
from megamed.runtime import Stopwatch, current_device
from megamed.train.config import JobConfig
from megamed.train.loop import StepEvent
from megamed.train.step_log import StepLog

log = logging.getLogger(__name__)

# A rank is named if it takes so many times what the median one takes for a frame ...
SLOW = 1.2
# ... or waits for data for more than this share of the steps' time, and others do not.
WAITS = 0.1


class Stragglers:
    """Compares ranks every `train.straggler_steps` steps. Each line of the file: `step`, the last of those steps;
    `steps`, how many; `encode_seconds`, of a frame, the median rank's and the slowest's; `data_share`, of the steps'
    time that the median rank and the one that waits longest wait for data; `slow`, the ranks that are named.

    Args:
        path: the file.
        config: the job's settings.
        phase: the vision phase, whose passes are measured.
    """

    def __init__(self, path: Path, config: JobConfig, phase: VisionPhase):
        self.log, self.phase, self.every = StepLog(path), phase, config.train.straggler_steps
        self._encoding = Stopwatch()
        self._nodes: list[str] = []
        self._forget()

    def _forget(self) -> None:
        self._steps, self._frames, self._data, self._seconds = 0, 0, 0.0, 0.0

    def start(self, step: int) -> None:
        if not self.every:
            return
        self.log.start(step)
        self._forget()
        self.phase.passes.stopwatch = self._encoding
        self._encoding.take()  # of steps that a run went back from
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        self._nodes = names

    def after_step(self, event: StepEvent) -> None:
        if not self.every:
            return
        self._steps += 1
        self._frames += self.phase.num_encoded
        self._data += event.data_seconds
        self._seconds += event.seconds
        if event.step % self.every == 0:
            self._compare(event.step)

    def _compare(self, step: int) -> None:
        mine = torch.tensor(
            [self._encoding.take(), self._frames, self._data, self._seconds], device=current_device()
        )
        all_R4 = mine.new_empty(dist.get_world_size(), 4)
        dist.all_gather_into_tensor(all_R4.flatten(), mine)
        encode, frames, data, seconds = all_R4.double().T.tolist()
        found = compare(encode, frames, data, seconds)
        for slow in found["slow"]:
            slow["node"] = self._nodes[slow["rank"]]
            if self.log.file:
                log.warning("rank %(rank)d on %(node)s is slow: %(what)s", slow)
        self.log.write({"step": step, "steps": self._steps, **found})
        self._forget()

    def end(self) -> None:
        self.log.close()


def compare(encode: list[float], frames: list[float], data: list[float], seconds: list[float]) -> dict[str, Any]:
    """Which ranks are slow.

    Args:
        encode: seconds of each rank's encoding.
        frames: that it encoded.
        data: seconds that it waited for data.
        seconds: of its steps.
    """
    per_frame = {rank: taken / count for rank, (taken, count) in enumerate(zip(encode, frames, strict=True)) if count}
    waits = [waited / whole for waited, whole in zip(data, seconds, strict=True)]
    slow = []
    median = statistics.median_low(per_frame.values()) if per_frame else 0.0
    for rank, taken in per_frame.items():
        if taken > SLOW * median:
            slow.append({"rank": rank, "what": f"encodes a frame in {taken / median:.2f} times what others take"})
    usual = statistics.median_low(waits)
    for rank, share in enumerate(waits):
        if share > max(WAITS, 2 * usual):
            slow.append({"rank": rank, "what": f"waits for data for {share:.0%} of its time, others for {usual:.0%}"})
    return {
        "encode_seconds": [round(median, 6), round(max(per_frame.values(), default=0.0), 6)],
        "data_share": [round(usual, 4), round(max(waits), 4)],
        "slow": slow,
    }
