"""Steps that a thread prepares: the same ones, no more than allowed, and their errors where they belong."""

import threading
import time
from typing import Any

import pytest
import torch

from megamed.data import Microbatch
from megamed.optim import OptimConfig
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.train import JobConfig, build_job, fit
from megamed.train.prefetch import Prefetcher
from megamed.utils import UserError

PORTION = 3


class Watched:
    """A source of numbered frames that knows how many are loaded and not yet taken, and how far it is ahead."""

    def __init__(self, frames_of_step: list[int], fails: tuple[int, str] | None = None):
        self.frames_of_step, self.fails = frames_of_step, fails
        self.loaded = self.taken = self.most_held = 0
        self.prepared: list[int] = []
        self.threads: set[str] = set()

    def rows(self, step: int) -> list[Microbatch]:
        self.threads.add(threading.current_thread().name)
        if self.fails == (step, "rows"):
            raise UserError(f"broken at {step}")
        self.prepared.append(step)
        return [step]  # type: ignore[list-item]  # what a row is, nothing here asks

    def passes(self, microbatches: Any) -> list[list[Any]]:
        (step,) = microbatches
        frames = [(step, i) for i in range(self.frames_of_step[step])]
        return [frames[i : i + PORTION] for i in range(0, len(frames), PORTION)]

    def load(self, frames: Any) -> torch.Tensor:
        if self.fails == (frames[0][0], "load"):
            raise UserError(f"broken at {frames[0][0]}")
        self.loaded += len(frames)
        self.most_held = max(self.most_held, self.loaded - self.taken)
        return torch.tensor([[float(step), i] for step, i in frames])

    def run(self, most_frames: int, pause: float = 0.0) -> list[list[Any]]:
        """What a training of all steps gets."""
        seen: list[list[Any]] = []
        steps = range(len(self.frames_of_step))
        with Prefetcher(steps, self.rows, self.passes, self.load, most_frames) as prefetcher:
            for step in steps:
                time.sleep(pause)
                microbatches = prefetcher.rows(step)
                seen.append([microbatches])
                for portion in self.passes(microbatches):
                    assert len(self.prepared) <= step + 3
                    seen[-1].append(prefetcher.load(portion).tolist())
                    self.taken += len(portion)
        assert "prefetch" not in [thread.name for thread in threading.enumerate()]
        return seen


FRAMES = [4, 0, 1, 13, 7, 0, 0, 3, 2, 2]


@pytest.mark.parametrize("most_frames", [1, 5, 64])
def test_the_same_steps_and_no_more_frames_than_allowed(most_frames):
    plain, ahead = Watched(FRAMES), Watched(FRAMES)
    expected = plain.run(0)
    assert plain.threads == {"MainThread"}
    assert ahead.run(most_frames, pause=0.002) == expected
    assert ahead.threads == {"prefetch"}
    # A portion is counted as taken here a moment after the thread may load the next.
    assert ahead.most_held <= max(most_frames, PORTION) + PORTION


@pytest.mark.parametrize("most_frames", [0, 64])
@pytest.mark.parametrize("what", ["rows", "load"])
def test_an_error_is_raised_at_its_step(what, most_frames):
    source = Watched(FRAMES, fails=(3, what))
    seen: list[int] = []
    with pytest.raises(UserError, match="^broken at 3$"):
        with Prefetcher(range(10), source.rows, source.passes, source.load, most_frames) as prefetcher:
            for step in range(10):
                microbatches = prefetcher.rows(step)
                seen.append(step)
                for portion in source.passes(microbatches):
                    prefetcher.load(portion)
    assert seen == ([0, 1, 2] if what == "rows" else [0, 1, 2, 3])
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_when_training_fails(error):
    source = Watched([50] * 100)
    with pytest.raises(error):
        with Prefetcher(range(100), source.rows, source.passes, source.load, 6) as prefetcher:
            prefetcher.rows(0)
            raise error
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
    assert source.loaded <= 12


def test_frames_in_another_order_are_refused():
    source = Watched(FRAMES)
    with pytest.raises(RuntimeError, match="another order"):
        with Prefetcher(range(10), source.rows, source.passes, source.load, 64) as prefetcher:
            prefetcher.rows(0)
            prefetcher.load([(0, 1)])


def trained(most_frames: int) -> Any:
    config = JobConfig()
    config.model = tiny_vlm()
    config.model.frames_per_pass = 3
    config.parallel = ParallelConfig(tensor=2)
    config.optim = OptimConfig(lr=1e-2)
    config.data.seq_length = 64
    config.data.loader.prefetch_frames = most_frames
    config.train.steps, config.train.microbatches = 4, 4
    mesh = build_mesh(config.parallel, config.ulysses)
    seed_everything(1, mesh.data_rank)
    job = build_job(config, mesh)
    seen: list[Any] = []

    class Keep:
        def start(self, step: int) -> None: ...
        def after_step(self, event: Any) -> None:
            seen.append((event.report.loss, event.report.grad_norm, event.position))
            assert 0 < event.data_seconds < event.seconds

        def end(self) -> None: ...

    fit(job, SyntheticSource(64), [Keep()], 0, start_position=8)
    return seen


def test_training_does_not_depend_on_the_thread(ranks):
    plain = ranks.run(trained, 2, 0)
    assert [position for _, _, position in plain[0]] == [12, 16, 20, 24]
    assert ranks.run(trained, 2, 2) == plain == ranks.run(trained, 2, 64)
