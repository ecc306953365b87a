"""Writes a checkpoint in a thread while training goes on.

Megatron 0.16 writes in forked processes. A fork of a process that runs threads of its own (gloo, a
tracker, an allocator) may copy a lock in its locked state, and then hangs for good. A thread writes as fast,
since serialisation and disk leave the interpreter's lock, and cannot.
"""

import hashlib
import os
import queue
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megamed.runtime import current_device


class BackgroundWriter:
    """Carries out one save request of Megatron's at a time. Every method is collective."""

    def __init__(self) -> None:
        self._request: AsyncRequest | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._sums: dict[str, str] = {}
        self.sums: dict[str, str] = {}
        """SHA-256 of the files that all ranks wrote in the last save, by name."""
        # In the place of a queue in a process of its own, which nobody needs where a thread writes.
        filesystem_async._results_queue = queue.Queue()

    def start(self, request: AsyncRequest) -> None:
        """Copy what has to be written, and start writing it."""
        assert self._request is None, "one save at a time"
        self._request, self._sums = request, {}
        if request.async_fn is not None:  # else this rank has nothing to write
            transforms = request.async_fn.args[0]  # type: ignore[attr-defined]
            buckets = _staged(request)
            self._thread = threading.Thread(target=self._write, args=(transforms, buckets, request.async_fn_args[2]))
            self._thread.start()

    def finish(self, wait: bool) -> None:
        """Finish the open save, once all ranks have written.

        Args:
            wait: wait for that; else return at once if some rank is still writing.

        Raises:
            OSError: some rank could not write; with that rank's reason, on every rank.
            CheckpointingException: what all ranks wrote does not make a checkpoint.
        """
        if self._request is None:
            return
        if wait and self._thread is not None:
            self._thread.join()
        is_writing = self._thread is not None and self._thread.is_alive()
        state = torch.tensor([is_writing, self._error is not None], device=current_device(), dtype=torch.int32)
        dist.all_reduce(state)
        num_writing, num_failed = state.tolist()
        if num_writing:
            return
        request, self._request, self._thread = self._request, None, None
        if num_failed:
            reasons: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(reasons, None if self._error is None else reason_of(self._error))
            raise OSError(next(reason for reason in reasons if reason))
        sums: list[dict[str, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(sums, self._sums)
        self.sums = {name: digest for part in sums for name, digest in part.items()}
        for finalize in request.finalize_fns:
            finalize()

    def _write(self, transforms: list[Any], buckets: list[Any], results: "queue.Queue[Any]") -> None:
        try:
            results.put({index: _write_bucket(transforms, index, bucket) for index, bucket in enumerate(buckets)})
            paths = [Path(bucket[0]) for bucket in buckets]
            self._sums = {path.name: digest_of(path) for path in paths}
        except Exception as error:  # raised on every rank by `finish`
            self._error = error


def reason_of(error: BaseException) -> str:
    """On one line, what the system said if it said something, else what the innermost error says."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    system = next((e for e in chain if isinstance(e, OSError)), None)
    if system is not None:
        return system.strerror or str(system)
    lines = str(chain[-1]).strip().splitlines()
    return (lines[-1] if lines else type(chain[-1]).__name__).partition(". ")[0][:200]


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a file, to the disk itself."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _staged(request: AsyncRequest) -> list[Any]:
    """The buckets to write, with tensors that training does not touch: copies in host memory."""
    buckets = request.preload_fn() if request.preload_fn is not None else request.async_fn_args[1]
    owned = request.preload_fn is not None and current_device().type == "cuda"
    return [
        (path, key, (chunks, [(item, tensor if owned else tensor.clone()) for item, tensor in tensors]))
        for path, key, (chunks, tensors) in buckets
    ]


def _write_bucket(transforms: list[Any], index: int, bucket: Any) -> Any:
    replies: queue.Queue[Any] = queue.Queue()
    count: queue.Queue[int] = queue.Queue()
    count.put(index)
    FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, replies, count, use_fsync=True)
    _, reply = replies.get()
    if isinstance(reply, Exception):
        raise reply
    return reply
