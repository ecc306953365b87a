"""Worker processes that may crash, hang or eat memory without taking anybody along.

    with Pool(4, "megamed.data.ingest.tasks:Toolbox", {...}) as pool:
        pool.submit(Task("read", plan, seconds=600, num_bytes=2**30))
        while not pool.idle:
            for event in pool.wait(): ...

Each worker does one task at a time. A task that passes its time is ended with SIGKILL, one that passes its memory
gets a MemoryError (RLIMIT_DATA) or is killed by the system; either way its worker is replaced and its `Ended` event
says why. Workers are forked from a nursery (`megamed.data.ingest.nursery`), not from this process, which may be
large, have threads, or hold torch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from megamed.data.ingest.nursery import FORK, KILL, out_of_memory
from megamed.data.readers import Refusal

# After SIGKILL; a process that waits for a dead network disk cannot be killed, and is left behind.
_DEATH_S = 10.0
# For a process whose connection has ended to be dead, and to be known with its exit code.
_PATIENCE_S = 1.0
_NURSERY_S = 120.0

_START = "import sys; sys.path[:0] = {path!r}; from megamed.data.ingest.nursery import main; main({fd})"


@dataclass(eq=False)
class Task:
    """Something for a worker to do.

    Attributes:
        method: of the toolbox; a generator.
        payload: what it is called with.
        seconds: that it may take for each thing that it yields.
        num_bytes: that it may take beyond what an idle worker has.
        share: of the pool's memory that is kept free for it.
        note: the submitter's own, never sent.
    """

    method: str
    payload: Any
    seconds: float
    num_bytes: int
    share: int = 0
    note: Any = None


@dataclass
class Item:
    """A task yielded something."""

    task: Task
    value: Any


@dataclass
class Ended:
    """A task is over: well, if `refusal` is None.

    Attributes:
        task: it.
        refusal: why it is not done.
        killed: its worker died of it, so the refusal is not the reader's own.
        traceback: of an exception that no reader means to raise; for the private log.
    """

    task: Task
    refusal: Refusal | None = None
    killed: bool = False
    traceback: str = ""


class NoSpace(Exception):
    """A worker found the disk full."""


@dataclass(eq=False)
class _Worker:
    pid: int
    connection: Connection
    task: Task | None = None
    begun: bool = False
    deadline: float = 0.0


@dataclass
class Pool:
    """See the module.

    Args:
        size: workers.
        toolbox: `module:class`, made once, before workers are forked.
        arguments: it is made with; JSON-serialisable.
        num_bytes: memory that the tasks under way may have as their shares together.
        environment: variables set for workers.
    """

    size: int
    toolbox: str
    arguments: dict[str, Any]
    num_bytes: int
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.peak_worker_bytes = 0
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket
        self._workers: list[_Worker] = []
        self._waiting: deque[Task] = deque()
        self._codes: dict[int, int] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def submit(self, task: Task) -> None:
        """Have a task done. Its share is cut to what the pool has."""
        task.share = min(task.share, self.num_bytes)
        self._waiting.append(task)

    @property
    def hungry(self) -> bool:
        """Whether workers will soon be without work."""
        return len(self._waiting) < 2 * self.size

    @property
    def idle(self) -> bool:
        """Whether everything submitted is done."""
        return not self._waiting and not any(worker.task for worker in self._workers)

    def wait(self, seconds: float = 1.0) -> list[Item | Ended]:
        """What has happened, at the latest after `seconds`.

        Raises:
            NoSpace: a worker found the disk full.
            RuntimeError: the nursery cannot start, or has ended.
        """
        self._hand_out()
        now = time.monotonic()
        soonest = min((worker.deadline for worker in self._workers if worker.task), default=now + seconds)
        watched: list[Any] = [worker.connection for worker in self._workers]
        if self._nursery is not None:
            watched.append(self._control)
        ready = wait(watched, max(0.0, min(seconds, soonest - now))) if watched else []
        events: list[Item | Ended] = []
        if self._nursery is not None and self._control in ready:
            self._hear_nursery()
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.connection in ready or worker.pid in self._codes:
                events += self._hear(worker)
            elif worker.task and worker.deadline <= now:
                events += self._end(worker, timed_out=True)
        self._hand_out()
        return events

    def close(self) -> None:
        """Kill what is under way, and end."""
        if self._nursery is None:
            return
        self._control.shutdown(socket.SHUT_WR)
        try:
            self._nursery.wait(_DEATH_S)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()
        self._control.close()
        for worker in self._workers:
            worker.connection.close()
        self._workers, self._nursery = [], None

    def _hand_out(self) -> None:
        """Give tasks to workers: the first that fits into the memory that is free, or any where nothing runs."""
        busy = [worker for worker in self._workers if worker.task]
        free = self.num_bytes - sum(worker.task.share for worker in busy if worker.task)
        while self._waiting and len(busy) < self.size:
            place = next((i for i, task in enumerate(self._waiting) if task.share <= free), None)
            if place is None:
                return
            worker = next((worker for worker in self._workers if not worker.task), None) or self._birth()
            task = self._waiting[place]
            try:
                worker.connection.send((task.method, task.payload, task.num_bytes))
            except OSError:  # it has ended since its last task
                self._bury(worker)
                continue
            del self._waiting[place]
            worker.task, worker.begun, worker.deadline = task, False, time.monotonic() + task.seconds
            busy.append(worker)
            free -= task.share

    def _hear(self, worker: _Worker) -> list[Item | Ended]:
        """What a worker has said. One message at a time where more come, so that none waits for another."""
        events: list[Item | Ended] = []
        try:
            while worker.connection.poll():
                kind, *rest = worker.connection.recv()
                task = worker.task
                assert task is not None
                worker.deadline = time.monotonic() + task.seconds
                if kind == "begun":
                    worker.begun = True
                elif kind == "item":
                    events.append(Item(task, rest[0]))
                else:
                    worker.task = None
                    events.append(_closing(task, kind, *rest))
                    if not rest[-1]:
                        self._bury(worker)
                        return events
        except (EOFError, OSError):
            return events + self._end(worker)
        return events + (self._end(worker) if worker.pid in self._codes else [])

    def _end(self, worker: _Worker, timed_out: bool = False) -> list[Item | Ended]:
        """A worker died, or has to; what that means for its task. One that it had not begun goes to another."""
        task, patience = worker.task, 0.0 if timed_out else _PATIENCE_S
        code = self._bury(worker, patience)
        if task is None:
            return []
        if not worker.begun and not timed_out:
            self._waiting.appendleft(task)
            return []
        if timed_out:
            refusal = Refusal(
                "time-limit", f"it was not read within {task.seconds:,.0f} s", "raise --time-limit if the file is sound"
            )
        elif code == -signal.SIGKILL:  # the system, for want of memory
            refusal = out_of_memory(task.num_bytes)
        else:
            name = "it left" if code is None or code >= 0 else signal.strsignal(-code)
            refusal = Refusal("decoder-crashed", f"a decoder crashed on it ({name})", "export it again, uncompressed")
        return [Ended(task, refusal, killed=True)]

    def _bury(self, worker: _Worker, patience: float = 0.0) -> int | None:
        """Make sure that a worker is dead.

        Args:
            worker: whose connection has ended, or who has to die.
            patience: seconds in which it may die by itself.

        Returns:
            The exit code with which it died by itself; None where it was killed, or will not die.
        """
        self._workers.remove(worker)
        worker.connection.close()
        self._await_end(worker, patience)
        code = self._codes.get(worker.pid)
        if code is None:
            self._control.send(KILL + str(worker.pid).encode())
            self._await_end(worker, _DEATH_S)
        self._codes.pop(worker.pid, None)
        return code

    def _await_end(self, worker: _Worker, seconds: float) -> None:
        end = time.monotonic() + seconds
        while worker.pid not in self._codes and wait([self._control], max(0.0, end - time.monotonic())):
            self._hear_nursery()

    def _birth(self) -> _Worker:
        if self._nursery is None:
            self._start()
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [FORK], [theirs.fileno()])
        while (pid := self._hear_nursery()) is None:
            pass
        worker = _Worker(pid, Connection(ours.detach()))
        self._workers.append(worker)
        return worker

    def _hear_nursery(self) -> int | None:
        """One message of the nursery; the pid of a worker that was born, if it is that."""
        try:
            packet = self._control.recv(1 << 16)
        except ConnectionError:
            packet = b""
        if not packet:
            raise RuntimeError("the process that workers are forked from has ended")
        message = json.loads(packet)
        if "error" in message:
            raise RuntimeError(f"workers cannot start:\n{message['error']}")
        if "ended" in message:
            self._codes[message["ended"]] = message["code"]
            self.peak_worker_bytes = max(self.peak_worker_bytes, message["peak"])
        return message.get("born")

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = [entry or os.getcwd() for entry in sys.path]
        # One thread a worker: there are as many workers as cores, and a process with threads must not fork.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            self._nursery = subprocess.Popen(
                [sys.executable, "-c", _START.format(path=path, fd=theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **self.environment, **threads},
            )
        setup = {"path": path, "toolbox": self.toolbox, "arguments": self.arguments}
        self._control.send(json.dumps(setup).encode())
        if not wait([self._control], _NURSERY_S):
            raise RuntimeError(f"workers were not ready within {_NURSERY_S:.0f} s")
        self._hear_nursery()


def _closing(task: Task, kind: str, what: Any, traceback: str, goes_on: bool) -> Ended:
    """A worker's closing message.

    Raises:
        NoSpace: that is what it says.
    """
    if kind == "no-space":
        raise NoSpace
    if kind == "failed":
        refusal = Refusal("reader-failed", f"the reader raised {what}, which it should not",
                          "please report it, with errors.log beside this table")  # fmt: skip
        return Ended(task, refusal, traceback=traceback)
    return Ended(task, what)
