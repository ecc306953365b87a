"""What ingest knows already of files and series, so that a run that was stopped goes on where it was.

`scan.jsonl` in the private folder has one JSON object a line, each after the CRC-32 of its text in eight hexadecimal
digits; lines are only ever appended, the last one about a file or series counts. A line that was cut short by a kill,
or is damaged, counts as not there. In memory stay a path and some 50 bytes a file: headers are read from the file
again when a series is put together.

The first line has a stamp. Under another stamp (another version of the readers, say) the lines mean nothing.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from megamed.data.ingest.sources import Found

VERSION = 1
_FLUSH_S = 2.0

Line = dict[str, Any]


class Place(NamedTuple):
    """Where a line lies in the journal."""

    offset: int
    length: int


class Known(NamedTuple):
    """A file that was looked at: its line, and its `bucket`, empty where it is part of no series."""

    place: Place
    bucket: str


class Journal:
    """See the module. A context manager.

    Args:
        path: the file.
        stamp: of the readers and options.
    """

    def __init__(self, path: Path, stamp: str):
        self.path = path
        self._rows: dict[str, int] = {}
        self._offsets, self._lengths = array("q"), array("i")
        self._sizes, self._mtimes = array("q"), array("q")
        self._buckets, self._bucket_numbers, self._bucket_names = array("i"), {"": 0}, [""]
        self.series: dict[str, Place] = {}
        """Series that are done or refused, by name."""
        head = {"version": VERSION, "stamp": stamp}
        end = self._load(head) if path.exists() else 0
        self._file: IO[bytes] = open(path, "r+b" if end else "w+b")
        self._file.truncate(end)
        self._end = end
        self._file.seek(end)
        self._flushed = time.monotonic()
        if not end:
            self._write(json.dumps(head).encode())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def knows(self, path: str) -> bool:
        """Whether there is a line about a file of this path."""
        return path in self._rows

    def paths(self) -> Iterator[str]:
        """Of all files that there are lines about."""
        return iter(self._rows)

    def find(self, found: Found) -> Known | None:
        """The line about a file, if the file is what it was then."""
        row = self._rows.get(found.path)
        if row is None or (self._sizes[row], self._mtimes[row]) != (found.size, found.mtime_ns):
            return None
        place = Place(self._offsets[row], self._lengths[row])
        return Known(place, self._bucket_names[self._buckets[row]])

    def add_file(self, found: Found, bucket: str, text: bytes) -> Place:
        """Append a line about a file: JSON with its path, size, time and bucket as `f`, `s`, `m` and `b`."""
        place = self._write(text)
        self._keep_file(found, bucket, place)
        return place

    def add_series(self, name: str, values: Line) -> None:
        """Append a line about a series."""
        self.series[name] = self._write(json.dumps({"series": name, **values}).encode())

    def read(self, place: Place) -> Line:
        """A line."""
        self.flush()
        return read_line(self._file.fileno(), place)

    def flush(self) -> None:
        """Have lines where other processes, and the next run, see them."""
        self._file.flush()
        self._flushed = time.monotonic()

    def _write(self, text: bytes) -> Place:
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        self._file.write(line)
        place = Place(self._end + 9, len(text))
        self._end += len(line)
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()
        return place

    def _keep_file(self, found: Found, bucket: str, place: Place) -> None:
        row = self._rows.setdefault(found.path, len(self._sizes))
        if row == len(self._sizes):
            for column in (self._offsets, self._lengths, self._sizes, self._mtimes, self._buckets):
                column.append(0)
        self._offsets[row], self._lengths[row] = place
        self._sizes[row], self._mtimes[row] = found.size, found.mtime_ns
        number = self._bucket_numbers.setdefault(bucket, len(self._bucket_names))
        if number == len(self._bucket_names):
            self._bucket_names.append(bucket)
        self._buckets[row] = number

    def _load(self, head: Line) -> int:
        """Take in what is there; returns where the next line goes, 0 where the journal begins anew."""
        end = 0
        with open(self.path, "rb") as file:
            for number, (place, values) in enumerate(_lines(file)):
                if number == 0:
                    if values != head:
                        return 0
                elif "f" in values:
                    self._keep_file(Found(values["f"], values["s"], values["m"]), values["b"], place)
                elif "series" in values:
                    self.series[values["series"]] = place
                end = place.offset + place.length + 1
        return end


def read_line(fd: int, place: Place) -> Line:
    """A line of an open journal."""
    values: Line = json.loads(os.pread(fd, place.length, place.offset))
    return values


def _lines(file: IO[bytes]) -> Iterator[tuple[Place, Line]]:
    """Whole lines. A damaged first line ends it: nothing is then known of the others."""
    offset = 0
    for line in file:
        text = line[9:-1]
        if line[8:9] == b" " and line[-1:] == b"\n" and line[:8] == b"%08x" % zlib.crc32(text):
            yield Place(offset + 9, len(text)), json.loads(text)
        elif offset == 0:
            return
        offset += len(line)
