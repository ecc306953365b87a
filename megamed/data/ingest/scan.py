"""The first half of an ingest: what every file below the sources is."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from megamed.data.ingest.archives import MAX_DEPTH, Chain, Container
from megamed.data.ingest.journal import Journal, Known, Line
from megamed.data.ingest.pool import Ended, Item, Pool, Task
from megamed.data.ingest.progress import Progress
from megamed.data.ingest.quarantine import Row, row
from megamed.data.ingest.sources import Found, Walk, is_litter
from megamed.data.ingest.tasks import LOOK_AGAIN, Seen, Spot, refused_line, seen
from megamed.data.readers import Refusal

_BATCH = 64
_TOO_DEEP = Refusal("nested-archives", "it is an archive in archives", "unpack the outer one, and give the folder")


@dataclass
class Files:
    """What a scan found.

    Attributes:
        buckets: by what they have in common, the journal's lines about headers that may become one series: offsets
            and lengths in turn.
        chains: of archives, by path.
        rows: files that are refused.
        reports: files that hold reports.
        kinds: regular files by what they are, the members of archives included.
    """

    buckets: dict[str, array[int]] = field(default_factory=dict)
    chains: dict[str, Chain] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    reports: list[Found] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def place_of(self, path: str) -> tuple[Chain, str]:
        """The archive that a path leads into, and the name there; an empty chain for a file outside archives."""
        folder = os.path.dirname(path)
        while folder != os.path.dirname(folder):
            if folder in self.chains:
                return self.chains[folder], path[len(folder) + 1 :]
            folder = os.path.dirname(folder)
        return (), ""


@dataclass
class _Batch:
    """Files that a worker looks at, and how many it has."""

    spots: list[Spot]
    folder: str
    num_done: int = 0
    alone: bool = False


class Scan:
    """Looks at files, each once, as far as the journal does not know them.

    Args:
        walk: gives the files.
        journal: what is known, and where the rest is noted.
        pool: of workers with a `Toolbox`.
        seconds: for one file.
        num_bytes: for one file.
        progress: told about each file.
    """

    def __init__(self, walk: Walk, journal: Journal, pool: Pool, seconds: float, num_bytes: int, progress: Progress):
        self._walk, self._journal, self._pool, self._progress = walk, journal, pool, progress
        self._seconds, self._num_bytes = seconds, num_bytes
        self._sources: deque[Iterator[Spot]] = deque([map(Spot, walk)])
        self._put_back: list[Spot] = []
        self._indexes: list[tuple[str, list[str]]] = []
        self._num_batches = 0
        self.files = Files()
        self.tracebacks: list[str] = []

    def run(self) -> Files:
        """Look at everything."""
        while True:
            while self._pool.hungry and (spots := self._next()):
                self._submit(spots)
            if self._pool.idle:
                break
            for event in self._pool.wait():
                self._hear(event)
        self.files.rows += [row(path, refusal) for path, refusal in self._walk.refused]
        self.files.kinds["hidden"] += self._walk.num_ignored
        self._check_references()
        return self.files

    def _next(self) -> list[Spot]:
        """The next files that the journal does not know, of one archive or of none; empty at the end."""
        spots: list[Spot] = []
        while len(spots) < _BATCH:
            spot = self._next_spot()
            if spot is None:
                break
            if spots and spots[0].chain != spot.chain:
                self._put_back.append(spot)
                break
            known = self._journal.find(spot.found)
            if known is None or known.bucket == LOOK_AGAIN:
                spots.append(spot)
            else:
                self._take(spot, known)
        return spots

    def _next_spot(self) -> Spot | None:
        if self._put_back:
            return self._put_back.pop()
        while self._sources:
            spot = next(self._sources[0], None)
            if spot is not None:
                return spot
            self._sources.popleft()
        return None

    def _submit(self, spots: list[Spot], alone: bool = False) -> None:
        batch = _Batch(spots, f"scan.{self._num_batches}", alone=alone)
        self._num_batches += 1
        self._pool.submit(Task("scan", (spots, batch.folder), self._seconds, self._num_bytes, note=batch))

    def _hear(self, event: Item | Ended) -> None:
        note = event.task.note
        if isinstance(event, Item):
            if isinstance(note, _Batch):
                spot = note.spots[note.num_done]
                note.num_done += 1
                self._take_new(spot, event.value)
            else:
                self._take_new(note, seen(note.found, event.value))
        elif event.refusal is not None:
            if event.traceback:
                self.tracebacks.append(event.traceback)
            if isinstance(note, _Batch):
                self._retry(note, event.refusal, event.killed)
            else:
                self._take_refused(note, event.refusal, lasting=not event.killed)

    def _retry(self, batch: _Batch, refusal: Refusal, killed: bool) -> None:
        """A batch broke off: go on behind the file that it was at.

        Where a decoder crashed, a file before may have upset it; the file is looked at once more, alone.
        """
        guilty, *rest = batch.spots[batch.num_done :]
        if refusal.code == "decoder-crashed" and not batch.alone:
            self._submit([guilty], alone=True)
        else:
            self._take_refused(guilty, refusal, lasting=not killed and refusal.code != "memory-limit")
        if rest:
            self._submit(rest)

    def _take_refused(self, spot: Spot, refusal: Refusal, lasting: bool) -> None:
        """A file that died of a limit is looked at again in the next run, which may have another."""
        if lasting:
            self._take_new(spot, seen(spot.found, refused_line(refusal)))
        else:
            self._count("refused")
            self.files.rows.append(row(spot.found.path, refusal))

    def _take_new(self, spot: Spot, what: Seen) -> None:
        if what.kind == "archive" and "members" not in (line := json.loads(what.text)):
            chain = _chain(spot, line)
            if len(chain) > MAX_DEPTH:
                self._take_refused(spot, _TOO_DEEP, lasting=True)
            else:
                self._pool.submit(Task("list_archive", chain, self._seconds, self._num_bytes, note=spot))
            return
        known = self._journal.find(spot.found)
        if known is None or self._journal.read(known.place) != json.loads(what.text):
            known = Known(self._journal.add_file(spot.found, what.bucket, what.text), what.bucket)
        self._take(spot, known)

    def _take(self, spot: Spot, known: Known) -> None:
        """A file that has its line."""
        if known.bucket not in ("", LOOK_AGAIN):
            self._count("series")
            self.files.buckets.setdefault(known.bucket, array("q")).extend(known.place)
            return
        line, path = self._journal.read(known.place), spot.found.path
        self._count(line["kind"])
        if line["kind"] == "refused":
            self.files.rows.append(row(path, Refusal(*line["refusal"])))
        elif line["kind"] == "index":
            self._indexes.append((path, line["references"]))
        elif line["kind"] == "report":
            self.files.reports.append(spot.found)
        elif line["kind"] == "archive":
            self.files.chains[path] = _chain(spot, line)
            self.files.rows += [row(f"{path}/{name}", Refusal(*why)) for name, why in line["refused"]]
            self._count("refused", len(line["refused"]))
            self._sources.append(self._members(spot, line))

    def _members(self, spot: Spot, line: Line) -> Iterator[Spot]:
        """Files in an archive; they are as old as it is."""
        chain = self.files.chains[spot.found.path]
        for name, size in line["members"]:
            if any(map(is_litter, name.split("/"))):
                self._count("hidden")
            else:
                yield Spot(Found(f"{spot.found.path}/{name}", size, spot.found.mtime_ns), chain, name)

    def _count(self, kind: str, num_files: int = 1) -> None:
        self.files.kinds[kind] += num_files
        self._progress.add(num_files)

    def _check_references(self) -> None:
        """Note files that the index of a medium names, and that are not there."""
        folded: set[str] = set()
        for index, references in self._indexes:
            folder = os.path.dirname(index)
            for reference in references:
                path = f"{folder}/{reference}"
                if not os.path.normpath(path).startswith(f"{folder}/"):
                    refusal = Refusal("outside-reference", "the medium's index names it, and it lies outside",
                                      "give its folder as a source, too")  # fmt: skip
                elif any(self._journal.knows(f"{above}/{reference}") for above in _folders(folder)):
                    continue  # an index may lie further down than it was made for
                else:  # a medium's names are capitals, which some systems show in small letters
                    folded = folded or set(map(str.casefold, self._journal.paths()))
                    if path.casefold() in folded:
                        continue
                    refusal = Refusal("missing-reference", "the medium's index names it, and it is not there",
                                      "copy the whole medium")  # fmt: skip
                self.files.rows.append(row(path, refusal))


def _folders(folder: str) -> Iterator[str]:
    """A folder, and those that it lies in."""
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]


def _chain(spot: Spot, line: Line) -> Chain:
    """Of the archive that a file is."""
    return (*spot.chain, Container(line["archive"], spot.member or spot.found.path))
