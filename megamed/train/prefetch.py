"""Prepares the next steps in a thread: their packed rows, and the pixels of the frames that this rank will encode.

The thread does what the training would have done itself, in the same order, and hands it over; nothing that a step
computes depends on it. It keeps no more frames than it is told, and runs no more than a few steps ahead.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megamed.data import Frame, Microbatch
from megamed.runtime import current_device, device_type

# Steps whose rows are ready before the training asks for them.
_STEPS_AHEAD = 2


class Prefetcher:
    """Steps, prepared one after another. A context manager: its thread ends with the block.

    Args:
        steps: their numbers.
        rows: this rank's rows of a step.
        passes: of a step's rows, the frames that this rank encodes, in the portions in which it will ask for them.
        load: pixels [N, C, H, W] of some frames.
        most_frames: most frames that are loaded and not yet asked for; 0 loads when it is asked, without a thread. A
            larger portion is loaded when there is nothing else.

    Attributes:
        seconds: that the training has waited so far.
    """

    def __init__(
        self,
        steps: Iterable[int],
        rows: Callable[[int], list[Microbatch]],
        passes: Callable[[Sequence[Microbatch]], list[list[Frame]]],
        load: Callable[[Sequence[Frame]], Tensor],
        most_frames: int,
    ):
        self.seconds = 0.0
        self._steps, self._rows, self._passes, self._load = list(steps), rows, passes, load
        self._most_frames = most_frames
        self._ready: deque[Any] = deque()  # rows of a step, (frames, pixels) of a portion, or what was raised
        self._num_frames = self._num_steps = 0  # ready, or being loaded
        self._changed = threading.Condition()
        self._is_closed = False
        self._device = current_device()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetcher":
        if self._most_frames:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._most_frames:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()
            self._thread.join()
        self._ready.clear()

    def rows(self, step: int) -> list[Microbatch]:
        """This rank's rows of the next step, whose number is `step`. Raises what preparing it raised."""
        began = time.perf_counter()
        microbatches = self._take() if self._most_frames else self._rows(step)
        self.seconds += time.perf_counter() - began
        return microbatches

    def load(self, frames: Sequence[Frame]) -> Tensor:
        """Pixels [N, C, H, W] of the step's next portion of frames. Raises what loading them raised."""
        began = time.perf_counter()
        if self._most_frames:
            prepared, pixels = self._take()
            if prepared != list(frames):
                raise RuntimeError("frames are asked for in another order than they were dealt")
        else:
            pixels = self._load(frames)
        self.seconds += time.perf_counter() - began
        return pixels

    def _take(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            item = self._ready[0]
            if isinstance(item, BaseException):
                raise item  # and again, should somebody ask again
            self._ready.popleft()
            if isinstance(item, tuple):
                self._num_frames -= len(item[0])
            else:
                self._num_steps -= 1
            self._changed.notify_all()
        return item

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread begins with the first one
        try:
            for step in self._steps:
                if not self._wait_until(lambda: self._num_steps < _STEPS_AHEAD):
                    return
                microbatches = self._rows(step)
                self._put(microbatches, num_steps=1)
                for frames in self._passes(microbatches):
                    if not self._wait_until(partial(self._has_room, len(frames))):
                        return
                    self._put((list(frames), self._ahead(self._load(frames))), num_frames=len(frames))
        except BaseException as error:  # the training raises it, when it gets there
            self._put(error)

    def _has_room(self, num_frames: int) -> bool:
        return self._num_frames == 0 or self._num_frames + num_frames <= self._most_frames

    def _wait_until(self, holds: Callable[[], bool]) -> bool:
        """Whether it holds now; False once the block has been left."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or holds())
            return not self._is_closed

    def _put(self, item: Any, num_frames: int = 0, num_steps: int = 0) -> None:
        with self._changed:
            self._ready.append(item)
            self._num_frames += num_frames
            self._num_steps += num_steps
            self._changed.notify_all()

    @staticmethod
    def _ahead(pixels: Tensor) -> Tensor:
        """Where they are: memory that a GPU copies from beside its work."""
        return pixels.pin_memory() if device_type() == "cuda" and pixels.device.type == "cpu" else pixels
