"""Small stores for tests, and an ingest that can be killed at any of its steps."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from megamed.data.privacy import Pseudonyms
from megamed.data.readers import Identity
from megamed.data.series import Series, SeriesInfo
from megamed.data.store import SeriesRecord, StoreWriter, VolumeStore, write_series, writer

PSEUDONYMS = Pseudonyms(b"a key for tests only")

# Whatever changes a file system; a process may end before any of them.
STEPS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "truncate")


def name(number: int) -> str:
    return PSEUDONYMS.of("series", f"number {number}")


def volume(number: int, slices: int = 2, **known: Any) -> Series:
    voxels = np.random.default_rng(number).integers(-1000, 1000, (1, slices, 3, 4)).astype(np.int16)
    info = SeriesInfo(modality="CT", kind="volume", plane="axial", shape=voxels.shape, dtype="int16", **known)
    return Series(voxels, info)


def add(open_writer: StoreWriter, store: VolumeStore, number: int, series: Series, study: str = "st") -> SeriesRecord:
    identity = Identity(f"patient{number}", study, name(number), "", "20010101")
    return open_writer.commit(write_series(store.root, name(number), identity, series, PSEUDONYMS))


def ingest(root: Path, slices: dict[int, int]) -> None:
    """Into a new store or one that is there: series by number, of so many slices."""
    store = VolumeStore.create(root)
    with StoreWriter(store) as open_writer:
        for number, num_slices in slices.items():
            add(open_writer, store, number, volume(number, num_slices))


def ingest_and_exit(root: Path, slices: dict[int, int], last_step: int) -> None:
    """As `ingest`, and end the process: with code 9 and no notice before step `last_step`, with 0 after all steps."""
    steps = count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == last_step:
                os._exit(9)
            return function(*args, **kwargs)
        return run

    def counted_blocks(voxels: np.ndarray) -> Iterator[Any]:
        for block in blocks(voxels):
            if next(steps) == last_step:
                os._exit(9)
            yield block

    blocks = writer._npy_blocks
    writer._npy_blocks = counted_blocks
    for step in STEPS:
        setattr(os, step, counted(getattr(os, step)))
    ingest(root, slices)
    os._exit(0)


def ingest_killed_everywhere(start: Path, killed: Path, slices: dict[int, int]) -> None:
    """Into copies of a store, `killed/0`, `killed/1`, ...: each killed one step later, the last one not at all."""
    for last_step in count():
        shutil.copytree(start, killed / str(last_step))
        child = os.fork()
        if child == 0:
            ingest_and_exit(killed / str(last_step), slices, last_step)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        assert code == 9


def tree(root: Path) -> dict[str, bytes]:
    """Every file of a store and what is in it; who wrote last does not count."""
    return {str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*")) if path.is_file() and path.name != writer.LOCK}


if __name__ == "__main__":  # a process of its own, since forks of one that runs threads may hang
    work = {int(number): num_slices for number, num_slices in json.loads(sys.argv[3]).items()}
    ingest_killed_everywhere(Path(sys.argv[1]), Path(sys.argv[2]), work)
