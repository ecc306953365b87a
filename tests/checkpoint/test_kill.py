"""A run that is killed again and again has the loss curve of the one that was left alone, to the last bit."""

import contextlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamed.checkpoint import list_checkpoints
from tests.launch.command import SMALL, Running, start, torchrun

EVERY_STEPS = 3
SECONDS = 120  # until something has to have happened

Start = Callable[..., Running]


def command(runs: Path, steps: int) -> tuple[str, ...]:
    return (*SMALL, f"run.dir={runs}", f"train.steps={steps}", f"checkpoint.every_steps={EVERY_STEPS}",
            "optim.warmup_steps=5")


def curve(folder: Path) -> list[dict[str, Any]]:
    """Everything in the metrics that is not a measured time or size. JSON keeps every bit of a float."""
    keys = ("step", "loss", "loss_text", "loss_answer", "grad_norm", "lr", "tokens", "labels", "frames")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line.get(key) for key in keys} for line in lines]


def complete_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(job: Running, holds: Callable[[], bool]) -> bool:
    """Whether it came to hold before the run ended."""
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, job.log.read_text()
        if not job.is_running():
            return False
        time.sleep(0.001)
    return True


def finish(job: Running, steps: int) -> None:
    code, output = job.wait(timeout_s=60 + steps)
    assert code == 0, output


def kill_in_training(job: Running, folder: Path, draw: random.Random) -> None:
    """A random number of lines of metrics and some time after the run began to train, wherever it is then."""
    path = folder / "metrics.jsonl"
    earlier = path.stat().st_ino if path.exists() else None
    # A run that goes on replaces the file by one with the lines up to its checkpoint, and appends to it.
    wait_until(job, lambda: path.exists() and path.stat().st_ino != earlier)
    lines = complete_lines(path) + draw.randint(1, 8)
    wait_until(job, lambda: complete_lines(path) >= lines)
    time.sleep(draw.uniform(0.0, 0.1))
    job.kill_tree()


def kill_in_save(job: Running, folder: Path, draw: random.Random) -> None:
    """While a checkpoint is being written: after its folder is there, and before it has its name."""
    earlier = unfinished(folder)
    wait_until(job, lambda: bool(unfinished(folder) - earlier))
    time.sleep(draw.uniform(0.0, 0.01))
    job.kill_tree()


def unfinished(folder: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when the run was killed: names and inodes."""
    found = set()
    for path in folder.glob("checkpoints/*.unfinished"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


@pytest.mark.parametrize(("start_run", "num_kills"), [(start, None), (torchrun, 2)])
def test_a_killed_run_repeats_the_uninterrupted_one(start_run, num_kills, tmp_path, request):
    num_kills = num_kills or request.config.getoption("--kills")
    steps = 5 + 4 * num_kills if num_kills > 2 else 15  # about as many as it gets on between the kills
    draw = random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start_run(tmp_path / "whole.log", *command(whole, steps)), steps)
    folder, num_in_save, num_resumed = killed / "fmri", 0, 0
    for number in range(num_kills):
        has_checkpoint = bool(list_checkpoints(folder / "checkpoints"))
        log = tmp_path / f"killed{number}.log"
        job = start_run(log, *command(killed, steps))
        (kill_in_save if number % 3 == 1 else kill_in_training)(job, folder, draw)
        assert "complete" not in log.read_text(), "the run was over before the last kill"
        num_resumed += "going on from" in log.read_text()
        num_in_save += bool(unfinished(folder))
        # What there was is there still.
        assert list_checkpoints(folder / "checkpoints") or not has_checkpoint
    finish(start_run(tmp_path / "killed.log", *command(killed, steps)), steps)
    assert num_resumed >= num_kills // 2 and num_in_save >= (num_kills + 1) // 3
    assert [line["step"] for line in curve(folder)] == list(range(1, steps + 1))
    assert curve(folder) == curve(whole / "fmri")
    # Nothing half-written stays.
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (whole / "fmri" / "checkpoints").iterdir())
