"""Runs functions on several gloo ranks, in processes that start once for a whole test session.

The processes are forked from a server that has imported megamed already, so that 8 ranks cost one import.
"""

import gc
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# Each gloo group has threads that wake all the time, and Megatron's MoE layers keep theirs for good: a process with
# more of them than this is replaced. A new one costs a fork.
_MOST_THREADS = 24


class RankError(AssertionError):
    """A rank raised, died or did not answer; the message has its traceback."""


class RankPool:
    """Rank processes, started when first needed and reused by every `run`."""

    def __init__(self, timeout_s: float = 300.0):
        self.timeout_s = timeout_s
        self._workers: list[tuple[Any, Connection]] = []
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["megamed.testing.preload"])

    def run(self, function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        """Call `function(*args)` on `world_size` ranks of a new process group.

        Args:
            function: a module-level function; runs with `torch.distributed` initialised.
            world_size: number of ranks.
            args: the same for every rank; picklable.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankError: a rank raised, died, or the time ran out. All ranks are replaced.
        """
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        workers = self._workers[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(workers):
                pipe.send((sys.path, function, args, rank, world_size, os.path.join(folder, "store")))
            return self._collect(workers)

    def close(self) -> None:
        """End all rank processes."""
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _collect(self, workers: list[tuple[Any, Connection]]) -> list[Any]:
        results: dict[int, Any] = {}
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(workers)}
        deadline = time.monotonic() + self.timeout_s
        while len(results) < len(workers):
            ready = wait([p for p, r in ranks.items() if r not in results], timeout=deadline - time.monotonic())
            if not ready:
                missing = sorted(set(range(len(workers))) - set(results))
                self.close()
                raise RankError(f"ranks {missing} did not answer within {self.timeout_s} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = ranks[pipe]
                try:
                    failed, value, is_worn_out = pipe.recv()
                except EOFError:
                    failed, value, is_worn_out = True, "the process died", False
                if failed:
                    self.close()
                    raise RankError(f"rank {rank} of {len(workers)}:\n{value}")
                results[rank] = value
                if is_worn_out:
                    self._workers[rank][0].join()
                    self._workers[rank] = self._start()
        return [results[rank] for rank in range(len(workers))]


def _serve(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            path, function, args, rank, world_size, store = pipe.recv()
        except EOFError:
            return
        sys.path[:] = path
        try:
            dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
            value, failed = function(*args), False
            if dist.is_initialized():
                dist.barrier()  # who leaves early hangs up on ranks that are still making connections
        except BaseException:
            value, failed = traceback.format_exc(), True
        _leave()
        is_worn_out = len(os.listdir("/proc/self/task")) > _MOST_THREADS
        pipe.send((failed, value, is_worn_out))
        if is_worn_out:
            return


def _leave() -> None:
    import torch.distributed as dist

    from megamed.runtime import destroy_mesh

    destroy_mesh()
    if dist.is_initialized():
        dist.destroy_process_group()
    # A job's modules and groups are in cycles.
    gc.collect()
