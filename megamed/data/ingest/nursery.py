"""The process that workers are forked from, and what a worker does.

Decoders are C code that reads hostile files: it may crash, hang, or ask for all the memory there is. So each worker
is a process that may be killed at any time and is replaced in milliseconds, because it is forked from a process that
has imported everything and has a single thread: the nursery. Whoever started that, `megamed.data.ingest.pool`,
speaks with it over a socket of packets, and with each worker over a socket of its own.

Nothing survives the one who started it: the nursery kills its workers and ends when its socket closes, and workers
are killed by the kernel when the nursery dies.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from megamed.data.readers import Refusal

_PR_SET_PDEATHSIG = 1
_LARGEST_PACKET = 1 << 16

# What decoders leave behind, in caches and in pieces of free memory, would add to what the next task may take.
_MOST_LEFT_BEHIND = 64 << 20

FORK, KILL = b"F", b"K"
"""What the nursery is asked: to fork a worker for the socket that comes along, to kill the worker of a number."""


def main(control_fd: int) -> NoReturn:
    """Import what workers need, then fork and bury them until the other side goes.

    Args:
        control_fd: a socket of packets. The first packet that comes is JSON: `path` for modules, `toolbox` as
            `module:class`, and its `arguments`. The first answer is {"ready": pid} or {"error": traceback}.
    """
    control = socket.socket(fileno=control_fd)
    try:
        setup = json.loads(control.recv(_LARGEST_PACKET))
        sys.path[:] = setup["path"]
        module, _, name = setup["toolbox"].partition(":")
        toolbox = getattr(importlib.import_module(module), name)(**setup["arguments"])
    except BaseException:
        control.send(json.dumps({"error": traceback.format_exc()[-_LARGEST_PACKET // 2 :]}).encode())
        os._exit(1)
    _be_silent()
    # A decoder's memory on disk would be a patient's picture.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None)
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"ready": os.getpid()}).encode())
    _serve(control, toolbox, libc)


def _serve(control: socket.socket, toolbox: Any, libc: ctypes.CDLL) -> NoReturn:
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    while True:
        ready: list[int] = select.select([control.fileno(), wake_read], [], [])[0]
        if wake_read in ready:
            os.read(wake_read, 4096)
            for pid, status, peak in _buried(children):
                control.send(json.dumps({"ended": pid, "code": status, "peak": peak}).encode())
        if control.fileno() not in ready:
            continue
        request, fds, _, _ = socket.recv_fds(control, _LARGEST_PACKET, 1)
        if not request:
            for pid in children:
                _kill_group(pid)
            for pid in children:
                os.waitpid(pid, 0)
            os._exit(0)
        if request == FORK:
            nursery = os.getpid()
            pid = os.fork()
            if pid == 0:
                control.close()
                os.close(wake_read)
                os.close(wake_write)
                _become_worker(fds[0], toolbox, libc, nursery)
            os.close(fds[0])
            children.add(pid)
            control.send(json.dumps({"born": pid}).encode())
        elif request[:1] == KILL and int(request[1:]) in children:
            _kill_group(int(request[1:]))


def _buried(children: set[int]) -> Iterator[tuple[int, int, int]]:
    """Workers that have ended: pid, exit code (negative for a signal), largest resident memory in bytes."""
    while children:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _kill_group(pid)  # what it had started
        if pid in children:
            children.remove(pid)
            yield pid, os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # a worker that was just born has no group of its own yet
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _become_worker(fd: int, toolbox: Any, libc: ctypes.CDLL, nursery: int) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == nursery:
            _work(Connection(fd), toolbox)
    finally:
        os._exit(1)


def _work(connection: Connection, toolbox: Any) -> None:
    """Do one task after another: (method, payload, bytes that it may take) comes in, messages go out.

    Messages are ("begun",), then ("item", value) for each thing that the method yields, then the closing one:
    "done", "refused", "failed" or "no-space", the refusal or the exception's name, a traceback, and whether this
    process goes on. It does not after an exception that no reader means to raise: who knows what is left; nor where
    much memory is.
    """
    own_pid, own_bytes = os.getpid(), _data_bytes()
    while True:
        try:
            method, payload, num_bytes = connection.recv()
        except EOFError:
            return
        connection.send(("begun",))
        _limit_memory(num_bytes)
        try:
            for item in getattr(toolbox, method)(payload):
                if os.getpid() != own_pid:  # a reader forked, and this is the copy
                    os._exit(0)
                connection.send(("item", item))
            closing: tuple[Any, ...] = ("done", None, "", True)
        except Refusal as refusal:
            closing = ("refused", refusal, "", True)
        except MemoryError:
            closing = ("refused", out_of_memory(num_bytes), "", False)
        except BaseException as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            kind = "no-space" if full else "failed"
            closing = (kind, type(error).__name__, traceback.format_exc(), False)
        if os.getpid() != own_pid:
            os._exit(0)
        _limit_memory(None)
        goes_on = closing[-1] and _data_bytes() - own_bytes < _MOST_LEFT_BEHIND
        connection.send((*closing[:-1], goes_on))
        if not goes_on:
            return


def out_of_memory(num_bytes: int) -> Refusal:
    """Why a task that asked for more than it may have is refused."""
    return Refusal(
        "memory-limit",
        f"decoding needs more than the {num_bytes / 2**20:,.0f} MiB that it may take",
        "raise --max-memory, or lower --workers, if the file is what it says",
    )


def _limit_memory(num_bytes: int | None) -> None:
    """Let this process take so many bytes more than it has now; None is as many as it may by the system's limit."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = hard if num_bytes is None else _data_bytes() + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _data_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it (Linux 4.7 and later)."""
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"VmData:"):
                return int(line.split()[1]) * 1024
    raise OSError("no VmData in /proc/self/status")


def _be_silent() -> None:
    """What decoders print may quote a file's header: nobody gets to see it."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    os.close(nothing)
