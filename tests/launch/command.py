"""Runs launch/pretrain.py the ways a user does: with torchrun, or as one process, with or without a terminal.

The one process is forked from a server that has imported megamed already, which saves most of its start-up;
what runs in it is the script itself.
"""

import contextlib
import fcntl
import multiprocessing as mp
import os
import pty
import runpy
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "pretrain.py"

# A run that is over in a second or two, and writes nothing that a test does not look at.
SMALL = ("+exp=fmri", "train.microbatches=2", "eval.held_out=false", "wandb.mode=disabled",
         "model.language.num_layers=2", "model.vision.num_layers=1")

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["megamed.testing.preload", "megamed.eval"])


@dataclass
class Streams:
    """Paths for standard input, output and error; None is a stream that is closed."""

    stdin: str | None = os.devnull
    stdout: str | None = os.devnull
    stderr: str | None = os.devnull


class Running:
    """A job under way.

    Args:
        process: what was started, the leader of a session of its own.
        log: what it printed, both streams in one.
    """

    def __init__(self, process: Any, log: Path):
        self.process, self.log, self.began = process, log, time.monotonic()

    def send(self, signal_number: int) -> None:
        """Send a signal to the job's process group, as a terminal does."""
        os.killpg(self.process.pid, signal_number)

    def kill_tree(self) -> None:
        """SIGKILL to the process, all that it started, and all that those started, at one moment."""
        tree = [self.process.pid, *descendants(self.process.pid)]
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def wait(self, timeout_s: float = 90.0) -> tuple[int, str]:
        """The exit code (negative for a signal) and what was printed, once it has ended."""
        if isinstance(self.process, subprocess.Popen):
            code = self.process.wait(timeout_s)
        else:
            self.process.join(timeout_s)
            code = self.process.exitcode
            assert code is not None, f"still running after {timeout_s} s:\n{self.log.read_text()}"
        return code, self.log.read_text(errors="replace").replace("\r", "\n")

    def is_running(self) -> bool:
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is None
        return bool(self.process.is_alive())


def start(
    log: Path, *args: str, streams: Streams | None = None, env: dict[str, str] | None = None, script: Path = SCRIPT
) -> Running:
    """Start the script as a job of one process.

    Args:
        log: file for what it prints.
        args: its arguments.
        streams: others than no input and output to the log.
        env: variables to set.
        script: what to run.
    """
    streams = streams or Streams(stdout=str(log), stderr=str(log))
    log.touch()
    process = _CONTEXT.Process(target=_become, args=(str(script), list(args), streams, env or {}), daemon=True)
    process.start()
    return Running(process, log)


def run(log: Path, *args: str, **options: Any) -> tuple[int, str]:
    """Run the script as a job of one process; arguments as for `start`. Returns exit code and output."""
    return start(log, *args, **options).wait()


def torchrun(
    log: Path,
    *args: str,
    ranks: int = 2,
    script: Path = SCRIPT,
    stdin: Any = subprocess.DEVNULL,
    output: Any = None,
    background: bool = False,
    env: dict[str, str] | None = None,
) -> Running:
    """Start the script with torchrun, as a shell does: in a session whose terminal is `stdin`, if that is one.

    Args:
        log: file for what it prints, unless `output` is given.
        args: the script's arguments.
        ranks: processes.
        script: what to run.
        stdin, output: open files.
        background: with a shell's `&`.
        env: variables to set.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), str(script), *args]

    if background:
        command = ["bash", "-c", 'set -m; "$@" & wait $!', "bash", *command]

    def take_terminal() -> None:
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    log.touch()
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=stdin,
            stdout=output or file,
            stderr=output or subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=take_terminal,
            env={**os.environ, **(env or {})},
        )
    return Running(process, log)


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they did."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, ()))
    for child in found:
        found.extend(children.get(child, ()))
    return found


def errors(output: str) -> list[str]:
    """The lines in which megamed says what was wrong."""
    return [line for line in output.splitlines() if "megamed: error" in line and "traceback :" not in line]


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, str]]:
    """A terminal: the end at which a person types and reads, and the path of the other end."""
    person, job = pty.openpty()
    fcntl.ioctl(job, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    try:
        yield person, os.ttyname(job)
    finally:
        os.close(person)
        os.close(job)


def read_until(person: int, text: str, timeout_s: float = 60.0) -> str:
    """What appears on the terminal up to `text`."""
    seen, end = "", time.monotonic() + timeout_s
    while text not in seen:
        assert select.select([person], [], [], max(0.0, end - time.monotonic()))[0], f"no {text!r} in {seen!r}"
        seen += os.read(person, 4096).decode(errors="replace")
    return seen


def _become(script: str, args: list[str], streams: Streams, env: dict[str, str]) -> None:
    os.setsid()
    for number, path in enumerate((streams.stdin, streams.stdout, streams.stderr)):
        if path is None:
            os.close(number)
            continue
        # Without O_NOCTTY: a terminal becomes that of the new session, as at a login.
        handle = os.open(path, os.O_RDWR | (os.O_APPEND | os.O_CREAT if number else 0))
        if handle != number:
            os.dup2(handle, number)
            os.close(handle)
    # As Python's start-up makes them.
    sys.stdin = open(0) if streams.stdin else None  # type: ignore[assignment]
    sys.stdout = open(1, "w") if streams.stdout else None  # type: ignore[assignment]
    sys.stderr = open(2, "w", buffering=1) if streams.stderr else None  # type: ignore[assignment]
    os.chdir(ROOT)
    os.environ.update(env)
    sys.argv = [script, *args]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # multiprocessing's servers ignore it
    runpy.run_path(script, run_name="__main__")
