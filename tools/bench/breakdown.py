"""Where the time of a training step goes: its phases, and the operators that take most."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megamed.runtime import device_type, synchronize
from megamed.train import Job

PHASES = (
    "vision forward",
    "language forward",
    "language backward",
    "vision backward",
    "frames and exchange",
    "optimizer",
)


class Stopwatch:
    """Adds up seconds under names. The GPU's queue is empty whenever it looks at the clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []

    def start(self, name: str) -> None:
        synchronize()
        self._open.append((name, time.perf_counter()))

    def stop(self) -> None:
        synchronize()
        name, start = self._open.pop()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def is_inside(self, name: str) -> bool:
        """Whether this name is being timed."""
        return any(open_name == name for open_name, _ in self._open)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start(name)
            result = function(*args, **kwargs)
            self.stop()
            return result

        return timed


@contextmanager
def _watched(job: Job, watch: Stopwatch) -> Iterator[None]:
    """Time the job's parts for a while: the two phases and their models, and the gradients as a whole."""
    phase, stepper = job.phase, job.stepper
    encoder = phase.passes.encoder
    timed = watch.around("encoder", encoder)
    # Frames beyond model.frames_in_flight come a second time, as a part of the vision backward.
    phase.passes.encoder = lambda frames: encoder(frames) if watch.is_inside("vision backward") else timed(frames)
    phase.forward = watch.around("vision phase", phase.forward)  # type: ignore[method-assign]
    phase.backward = watch.around("vision backward", phase.backward)  # type: ignore[method-assign]
    stepper.gradients = watch.around("gradients", stepper.gradients)  # type: ignore[method-assign]
    hooks = []
    for chunk in job.model.language:
        hooks.append(chunk.module.register_forward_pre_hook(lambda *_: watch.start("language forward")))
        hooks.append(chunk.module.register_forward_hook(lambda *_: watch.stop()))
    try:
        yield
    finally:
        phase.passes.encoder = encoder
        del phase.forward, phase.backward, stepper.gradients  # the class's own again
        for hook in hooks:
            hook.remove()


def phases(job: Job, step: Callable[[], Any], repetitions: int) -> dict[str, float]:
    """Seconds of a step by `PHASES`, averaged.

    "language backward" holds what the schedule does around it: the reduction of gradients, counting the
    loss; "frames and exchange" loading frames, planning and the all-to-all of visual tokens; "vision
    backward" their gradients' way back, and frames that are encoded again; "optimizer" the norm, clipping,
    AdamW and gathering of parameters.
    """
    watch = Stopwatch()
    with _watched(job, watch):
        for _ in range(repetitions):
            watch.start("step")
            step()
            watch.stop()
    total = {name: seconds / repetitions for name, seconds in watch.seconds.items()}
    encoder = total.get("encoder", 0.0)  # no frame, no call
    measured = {
        "vision forward": encoder,
        "language forward": total["language forward"],
        "language backward": total["gradients"]
        - total["vision phase"]
        - total["language forward"]
        - total["vision backward"],
        "vision backward": total["vision backward"],
        "frames and exchange": total["vision phase"] - encoder,
        "optimizer": total["step"] - total["gradients"],
    }
    return {name: measured[name] for name in PHASES}


def top_operators(step: Callable[[], Any], repetitions: int, count: int) -> list[tuple[str, float, float]]:
    """The operators with the most time of their own on the device that computes.

    Returns:
        Name, calls a step, and seconds a step, longest first; the last entry, "all others", is the rest.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = device_type() == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repetitions):
            step()
        synchronize()
    events: Any = profiler.key_averages()
    time_of = "self_cpu_time_total"
    if on_gpu:  # its kernels alone: the operators that launch them carry the same time again
        time_of = "self_device_time_total"
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    rows = [(e.key, e.count / repetitions, getattr(e, time_of) / 1e6 / repetitions) for e in events]
    rows.sort(key=lambda row: -row[2])
    others = rows[count:]
    return [*rows[:count], ("all others", sum(row[1] for row in others), sum(row[2] for row in others))]


def phase_table(seconds: dict[str, float]) -> str:
    """`phases` as a Markdown table."""
    total = sum(seconds.values())
    lines = [f"| {name} | {1e3 * value:.1f} | {value / total:.1%} |" for name, value in seconds.items()]
    return "\n".join(["| phase | ms | share |", "|---|---|---|", *lines])


def operator_table(rows: list[tuple[str, float, float]]) -> str:
    """`top_operators` as a Markdown table."""
    total = sum(row[2] for row in rows)
    lines = [f"| `{name[:60]}` | {calls:.0f} | {1e3 * t:.2f} | {t / total:.1%} |" for name, calls, t in rows]
    return "\n".join(["| operator | calls | ms | share |", "|---|---|---|---|", *lines])
