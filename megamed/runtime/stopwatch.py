"""Measures what a device does between two points of the program, without waiting for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megamed.runtime.device import device_type


class Stopwatch:
    """Sums the time of stretches of work: on a GPU by its own events, on a CPU by the clock."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what is started within."""
        if device_type() == "cpu":
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield
        events[1].record()
        self._events.append(events)

    def take(self) -> float:
        """Seconds since the last time; waits until the last stretch has ended."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds
