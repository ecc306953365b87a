"""A file of samples, of any length: only where its lines begin is kept, a line is read when it is asked for."""

from __future__ import annotations

import io
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megamed.data.samples.objects import fill
from megamed.data.samples.parse import parse
from megamed.data.samples.schema import Sample
from megamed.utils import UserError

logger = logging.getLogger(__name__)

_CHUNK = 1 << 24
# From this size on the index is kept in a file beside the samples, so that ranks and later runs need not make it anew.
_KEEP_BYTES = 1 << 26
# First in the index file: one more with every change of its layout.
_VERSION = 1

Progress = Callable[[int, int], None]


class SampleFile:
    """Samples of a JSON Lines file by number. Empty lines do not count, but keep their line numbers.

    It may be used from several threads, and after a fork; pickled, it opens the file again.

    Args:
        path: the file.
        file: the file, opened.
        starts: byte at which each line begins, int64, and the file's size behind them.
        numbers: of the lines, from 1; None where no line is empty.
    """

    def __init__(self, path: Path, file: io.FileIO, starts: np.ndarray, numbers: np.ndarray | None):
        self.path = path
        self._file, self._starts, self._numbers = file, starts, numbers
        self._state = _state(file)

    @property
    def folder(self) -> Path:
        """What the paths in the samples are relative to."""
        return self.path.parent

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`, from 0, with its boxes written into its text.

        Raises:
            UserError: the line cannot be used, or the file has changed since it was opened.
        """
        number = self.line_number(index)
        sample, faults = fill(parse(self.line(index), number, str(self.path)), self.folder)
        if faults:
            key, what, mend = faults[0]
            raise UserError(f"{self.path}:{number}: {key}: {what}; {mend}")
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def line(self, index: int) -> bytes:
        """A sample's line as it stands in the file."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        # Read, and not mapped: a mapped file that somebody cuts short ends the process.
        content = os.pread(self._file.fileno(), end - start, start)
        if _state(self._file) != self._state:
            raise UserError(f"{self.path} has changed since it was opened; start again, and write new samples to a "
                            "new file")
        return content.partition(b"\n")[0]

    def line_number(self, index: int) -> int:
        """The number of a sample's line, from 1."""
        return index + 1 if self._numbers is None else int(self._numbers[index])

    def __reduce__(self) -> Any:
        return load, (self.path,)


def load(path: str | Path, progress: Progress | None = None) -> SampleFile:
    """Open a file of samples.

    The first time a large file is opened it is read once to find its lines, at the speed of the disk; the result is
    kept in `.NAME.lines.npy` beside it where that can be written, and made again when size or time of the file change.

    Args:
        path: JSON Lines, one sample each, as `schema` and `variants` describe it.
        progress: is told, while lines are searched for, how many bytes are done, and of how many.

    Raises:
        UserError: there is no such file, it has no sample, or is no JSON Lines.
    """
    path = Path(path)
    try:
        file = io.FileIO(path)
    except OSError as error:
        raise UserError(f"{path}: the samples cannot be read ({error.strerror}); give a JSON Lines file") from None
    head = os.pread(file.fileno(), 1024, 0).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        raise UserError(f"{path} is one JSON list; make JSON Lines of it: jq -c '.[]' {path} > {path.stem}.jsonl")
    if head.startswith((b"\x1f\x8b", b"PK", b"BZh", b"(\xb5/\xfd")):
        raise UserError(f"{path} is compressed; unpack it, since samples are read in any order")
    starts, numbers = _index(path, file, progress)
    if len(starts) == 1:
        raise UserError(f"{path} has no samples; write one JSON object a line")
    return SampleFile(path, file, starts, numbers)


def _index(path: Path, file: io.FileIO, progress: Progress | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Where lines begin, and their numbers where they do not count up, from the file beside it or newly made."""
    state = _state(file)
    kept = path.with_name(f".{path.name}.lines.npy")
    if state[0] >= _KEEP_BYTES:
        with suppress(OSError, ValueError, EOFError):
            values = np.load(kept, mmap_mode="r", allow_pickle=False)
            if values[:3].tolist() == [_VERSION, *state]:
                count = int(values[3])
                numbers = values[5 + count :]
                return values[4 : 5 + count], numbers if len(numbers) else None
        if progress is None:
            logger.info("looking for the lines of %.1f GB of samples", state[0] / 1e9)
    starts, some_numbers = _find_lines(file, state[0], progress)
    if state[0] >= _KEEP_BYTES:
        aside = kept.with_name(f"{kept.name}.{secrets.token_hex(4)}")
        header = [_VERSION, *state, len(starts) - 1]
        # Where the folder cannot be written to, each process makes its own.
        with suppress(OSError):
            with open(aside, "wb") as output:
                np.save(output, np.concatenate([np.array(header, dtype=np.int64), starts,
                                                np.array([] if some_numbers is None else some_numbers, np.int64)]))
            os.replace(aside, kept)
    return starts, some_numbers


def _find_lines(file: io.FileIO, size: int, progress: Progress | None) -> tuple[np.ndarray, np.ndarray | None]:
    breaks = []
    for start in range(0, size, _CHUNK):
        chunk = np.frombuffer(os.pread(file.fileno(), _CHUNK, start), dtype=np.uint8)
        breaks.append(np.flatnonzero(chunk == 10) + start)
        if progress is not None:
            progress(min(start + _CHUNK, size), size)
    ends = np.concatenate([np.array([], dtype=np.int64), *breaks])
    if size and (not len(ends) or ends[-1] != size - 1):
        ends = np.append(ends, size)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    lengths = ends - starts
    empty = lengths == 0
    for i in np.flatnonzero(lengths == 1):
        empty[i] = os.pread(file.fileno(), 1, int(starts[i])) == b"\r"
    numbers = np.flatnonzero(~empty) + 1 if empty.any() else None
    return np.append(starts[~empty], size), numbers


def _state(file: io.FileIO) -> tuple[int, int]:
    """Size and time of last change."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
