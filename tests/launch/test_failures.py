"""What can go wrong while a run is under way: full disks, ranks that fail or are killed, Ctrl-C."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamed.checkpoint import list_checkpoints
from tests.launch.command import SCRIPT, SMALL, Running, descendants, errors, run, start, torchrun
from tests.small_disk import mounted

# Runs the script with a rank that fails in its third step.
FAILING = """
import os, runpy, signal
import megamed.train.step as step

original, taken = step.Stepper.train, []

def train(self, *args):
    taken.append(1)
    if len(taken) == 3 and os.environ["RANK"] == os.environ["FAILING_RANK"]:
        if os.environ["FAILURE"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError("broken on purpose")
    return original(self, *args)

step.Stepper.train = train
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 28 MB."""
    with mounted(tmp_path / "disk", "28m") as folder:
        yield folder


def fill(folder: Path, leave: int) -> Path:
    """Fill a disk up to some bytes."""
    path = folder / "filler"
    # The run under test writes there, too, and may take the last bytes first.
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        file.write(b"\0" * max(0, shutil.disk_usage(folder).free - leave))
    return path


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for(job: Running, holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert job.is_running() and time.monotonic() < end, job.log.read_text()
        time.sleep(0.05)


def root_cause(output: str) -> str:
    """The end of torchrun's report."""
    return output.partition("Root Cause")[2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_up_ends_nothing_before_the_last_step(ranks, small_disk, tmp_path):
    """Ranks meet, too, while another program has torchrun's usual port."""
    args = (*SMALL, f"run.dir={small_disk}/runs", "checkpoint.every_steps=1", "checkpoint.keep_last=0")
    with contextlib.ExitStack() as stack:
        if ranks == 1:
            code, output = run(tmp_path / "log", *args, "train.steps=30")
        else:
            other = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                other.bind(("", 29500))
                other.listen()
            code, output = torchrun(tmp_path / "log", *args, "train.steps=30").wait()
            assert "No space left on device" in root_cause(output)
    folder = small_disk / "runs" / "fmri"
    kept = list_checkpoints(folder / "checkpoints")
    last = int(kept[-1].name.removeprefix("step_"))
    assert 1 < last < 29
    # Each save that fails is said, and the last one, without which the weights would be lost, ends the run.
    refused = "cannot be written (No space left on device; "
    intact = "MiB free there); free space or set run.dir to another disk; earlier checkpoints are intact, the last is "
    warnings = [line for line in output.splitlines() if "WARNING" in line and refused in line]
    says = f"{intact}{kept[-1].name}; training goes on"
    assert len(warnings) == 29 - last and all(says in line for line in warnings), output
    assert code != 0 and len(errors(output)) == 1 and refused in errors(output)[0], output
    assert f"step_{30:08d}: " in errors(output)[0] and "run again; earlier checkpoints are intact" in errors(output)[0]
    assert "Traceback" not in output.partition("torch/distributed/elastic")[0]
    assert steps(folder) == list(range(1, 31))
    # What had been written of those that did not fit is gone, and the run goes on once there is room.
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [path.name for path in kept]
    shutil.rmtree(kept[0])
    code, output = run(tmp_path / "again", *args[:-1], "checkpoint.keep_last=1", f"train.steps={last + 2}")
    assert code == 0, output
    assert f"going on from {kept[-1]}" in output
    assert steps(folder) == list(range(1, last + 3))


def test_a_full_disk_at_the_start(small_disk, tmp_path):
    fill(small_disk, leave=8192)
    code, output = run(tmp_path / "log", *SMALL, f"run.dir={small_disk}/runs")
    assert code == 2 and "Traceback" not in output, output
    assert len(errors(output)) == 1 and "cannot be written (No space left on device" in errors(output)[0]


def test_a_disk_that_something_else_fills_and_frees_again(small_disk, tmp_path):
    """Metrics and checkpoints that find no room come later; then the run is asked to stop, and saves."""
    job = start(tmp_path / "log", *SMALL, f"run.dir={small_disk}/runs", "train.steps=4000", "checkpoint.every_steps=20")
    folder = small_disk / "runs" / "fmri"
    wait_for(job, lambda: list_checkpoints(folder / "checkpoints"))
    filler = fill(small_disk, leave=0)
    said = ("training goes on", "metrics.jsonl: cannot be written (No space left on device)")
    wait_for(job, lambda: all(text in job.log.read_text() for text in said))
    assert list_checkpoints(folder / "checkpoints")
    filler.unlink()
    job.send(signal.SIGUSR1)
    code, output = job.wait()
    assert code == 0 and "Traceback" not in output and not errors(output), output
    assert output.count("its lines are kept in memory until there is room") == 1
    saved = list_checkpoints(folder / "checkpoints")[-1]
    taken = int(saved.name.removeprefix("step_"))
    assert f"stopping after step {taken}, as asked" in output
    assert steps(folder) == list(range(1, taken + 1)), "no line is lost, and none is cut"


@pytest.mark.parametrize(("failing_rank", "failure"), [(1, "raises"), (1, "killed")])
def test_a_rank_that_fails_ends_all_and_is_the_one_to_be_seen(failing_rank, failure, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(script=str(SCRIPT)))
    path = tmp_path / "runs" / "fmri" / "metrics.jsonl"
    job = torchrun(tmp_path / "log", *SMALL, f"run.dir={tmp_path}/runs", script=script,
                   env={"FAILING_RANK": str(failing_rank), "FAILURE": failure, "PYTHONPATH": str(SCRIPT.parents[1])})
    wait_for(job, lambda: path.exists() and path.read_text())
    tree = descendants(job.process.pid)
    assert len(tree) >= 2
    began = time.monotonic()
    code, output = job.wait()
    assert code != 0
    # Two more steps, 4 s in which rank 0 could have spoken, and torchrun's way down.
    assert time.monotonic() - began < 15
    assert not [pid for pid in tree if Path(f"/proc/{pid}").exists()]
    assert f"rank      : {failing_rank} (local_rank" in root_cause(output)
    if failure == "raises":
        assert output.count("ArithmeticError: broken on purpose") == 2  # the traceback's end, and torchrun's report
        assert f"megamed: failed [rank {failing_rank}]:" in output.splitlines()
        assert "traceback : ArithmeticError: broken on purpose" in root_cause(output)
    else:
        assert "Signal 9 (SIGKILL)" in root_cause(output)
    # Nothing of what the other rank went through when its peer was gone.
    assert "megamed: failed" not in output.replace(f"failed [rank {failing_rank}]", "")
    assert "Connection" not in output


def test_a_wrong_key_is_said_once_by_two_ranks(tmp_path):
    code, output = torchrun(tmp_path / "log", *SMALL, f"run.dir={tmp_path}/runs", "data.pth=x").wait()
    assert code != 0
    assert len(errors(output)) == 1
    assert "data.pth: no such key; did you mean data.path?" in errors(output)[0]
    assert "traceback : data.pth: no such key; did you mean data.path?" in root_cause(output)
    assert "error_handler.py" not in output or "no error file defined for parent" in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c(ranks, tmp_path):
    """A terminal sends it to the whole process group; torchrun, not in its ranks' groups, passes it on."""
    args = (*SMALL, f"run.dir={tmp_path}/runs", "train.steps=2000", "checkpoint.every_steps=2")
    job = start(tmp_path / "log", *args) if ranks == 1 else torchrun(tmp_path / "log", *args)
    folder = tmp_path / "runs" / "fmri"
    wait_for(job, lambda: list_checkpoints(folder / "checkpoints"))
    tree = descendants(job.process.pid)
    began = time.monotonic()
    job.send(signal.SIGINT)
    code, output = job.wait()
    assert time.monotonic() - began < 10
    assert code == (130 if ranks == 1 else 1)
    assert output.count("megamed: interrupted; run the same command again to go on from the last checkpoint") == 1
    assert "megamed: failed" not in output and "KeyboardInterrupt" not in output
    assert not [pid for pid in tree if Path(f"/proc/{pid}").exists()]
    last = int(list_checkpoints(folder / "checkpoints")[-1].name.removeprefix("step_"))
    code, output = run(tmp_path / "again", *args[:-2], f"train.steps={last + 1}")
    assert code == 0, output
    assert steps(folder) == list(range(1, last + 2))


def test_ctrl_c_during_the_imports(tmp_path):
    log = tmp_path / "log"
    with open(log, "w") as file:
        # A shell's background job inherits that Ctrl-C is ignored; someone at a terminal does not.
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *SMALL, f"run.dir={tmp_path}"], stderr=file, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        job = Running(process, log)
    time.sleep(0.7)
    job.send(signal.SIGINT)
    code, output = job.wait()
    assert code == -signal.SIGINT and output == ""
