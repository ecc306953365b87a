"""Ingest from end to end: scan, put series together, read them, and say what came of it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Literal

import megamed
from megamed.data.ingest import archives, quarantine
from megamed.data.ingest.journal import Journal, Line, Place
from megamed.data.ingest.options import Limits, Outcome, memory_to_use
from megamed.data.ingest.pool import Ended, Item, NoSpace, Pool, Task
from megamed.data.ingest.progress import Progress
from megamed.data.ingest.samples import Reports
from megamed.data.ingest.scan import Scan
from megamed.data.ingest.sources import Walk, roots
from megamed.data.ingest.tasks import Grouped, Planned, ReadOrder, files_of
from megamed.data.privacy import Pseudonyms
from megamed.data.privacy.declaration import declaration
from megamed.data.privacy.keys import load_or_create_key, private_folder
from megamed.data.readers import Refusal
from megamed.data.store import StoreWriter, VolumeStore
from megamed.data.store.index import folder_of, replace, series_folders
from megamed.data.store.record import read_record
from megamed.data.store.writer import UNFINISHED
from megamed.utils import UserError

READERS = (
    "megamed.data.readers.dicom:DicomReader",
    "megamed.data.readers.nifti:NiftiReader",
    "megamed.data.readers.image:ImageReader",
)
SUMMARY = "summary.json"

# A header is read in milliseconds; what takes longer hangs, or a disk does.
_SCAN_S = 60.0
# What a reader takes for each voxel: file, decoded, as numbers with a fraction, as stored; and beside all voxels.
_BYTES_A_VOXEL, _BYTES_A_TASK = 16, 256 << 20
# Of a plan, before anything is decoded: what the voxels take as 32-bit numbers.
_LEAST_BYTES_A_VOXEL = 4
_HEADERS_A_TASK = 1000


def run(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    key: str | os.PathLike[str] | None = None,
    dates: Literal["drop", "shift"] = "drop",
    limits: Limits | None = None,
    readers: Sequence[str] = READERS,
    progress: bool = True,
) -> Outcome:
    """Put everything below the sources into a volume store. Called again after a kill, it goes on where it was.

    Args:
        sources: folders and files.
        out: the store; made where it is not there. Beside it lies `OUT.private`.
        workers: processes; None is one a core that this process may use.
        key: the project key's file; None is the one in the private folder, made where it is not there.
        dates: drop them, or shift them by a number of days that is one patient's own.
        limits: what a file may cost.
        readers: `module:class` of each, in the order in which they are asked.
        progress: whether bars are shown on standard error.

    Raises:
        UserError: a source is not there, nothing in them is of use, the store cannot be written, its key is
            missing or another one.
    """
    try:
        return _Ingest(sources, Path(os.path.abspath(out)), key, dates, limits or Limits()).run(
            workers or len(os.sched_getaffinity(0)), readers, progress
        )
    except (NoSpace, OSError) as error:
        if isinstance(error, NoSpace) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{os.fspath(out)}: the disk is full; free space there, and run the same command again to "
                            "go on") from error  # fmt: skip
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{os.fspath(out)}: cannot be written ({error.strerror}); give another folder") from error
        raise


class _Ingest:
    """One run; arguments as for `run`."""

    def __init__(
        self,
        sources: Sequence[str | os.PathLike[str]],
        out: Path,
        key: str | os.PathLike[str] | None,
        dates: Literal["drop", "shift"],
        limits: Limits,
    ):
        self.began = time.monotonic()
        self.roots = roots(sources)
        self.store = VolumeStore.create(out)
        self.private = private_folder(out)
        self.private.mkdir(mode=0o700, exist_ok=True)
        self.key = self._key(Path(key) if key else self.private / "project.key")
        self.pseudonyms = Pseudonyms(self.key, dates)
        self.limits = limits
        self.num_bytes = limits.num_bytes or memory_to_use()
        self.temporary = self.private / "tmp"
        self.rows: list[quarantine.Row] = []
        self.outcome = Outcome(quarantine=self.private / quarantine.NAME)

    def run(self, workers: int, readers: Sequence[str], progress: bool) -> Outcome:
        with ExitStack() as stack:
            self.writer = stack.enter_context(StoreWriter(self.store))
            self.store.declare(declaration(self.pseudonyms.dates), self.pseudonyms.fingerprint())
            archives.clear(self.temporary)
            self.temporary.mkdir()
            stack.callback(archives.clear, self.temporary)
            stamp = self._stamp(readers)
            self.reports = Reports(self.private, self.store.root, self.pseudonyms, stamp)
            self.journal = stack.enter_context(Journal(self.private / "scan.jsonl", stamp))
            self.pool = stack.enter_context(Pool(
                workers, "megamed.data.ingest.tasks:Toolbox", self._toolbox(readers), self.num_bytes,
                {"TMPDIR": str(self.temporary)},
            ))  # fmt: skip
            self.each = max(self.num_bytes // workers, _BYTES_A_TASK)
            with Progress("scan", "file", None, progress) as bar:
                walk = Walk(self.roots, [str(self.store.root), str(self.private)])
                scan = Scan(walk, self.journal, self.pool, min(_SCAN_S, self.limits.seconds), self.each, bar)
                self.files = scan.run()
            self._log(scan.tracebacks)
            self.rows += self.files.rows
            spool = stack.enter_context(tempfile.TemporaryFile(dir=self.temporary))
            plans = _Plans(spool)
            num_rows = len(self.rows)
            self._group(plans)
            self._read(plans, progress)
            num_unread = len({row.file for row in self.rows[num_rows:]})
            rows, tracebacks = self.reports.update(
                self.pool, self.files, self.roots, self.limits.seconds, self.each
            )  # fmt: skip
            self.rows += rows
            self._count_kinds(num_unread, len(rows))
            self._log(tracebacks)
            self.pool.close()
            self.writer.write_index()
            return self._finish(plans)

    def _group(self, plans: _Plans) -> None:
        """Turn the headers of each bucket into series to read."""
        waiting = _in_batches(self.files.buckets)
        while True:
            while self.pool.hungry and (batch := next(waiting, None)):
                self._submit_group(batch)
            if self.pool.idle:
                return
            for event in self.pool.wait():
                buckets: list[list[Place]] = event.task.note
                if isinstance(event, Item):
                    done: Grouped = event.value
                    del buckets[0]
                    for planned in done.plans:
                        self._refuse_loser(plans.add(planned))
                    self.rows += [quarantine.row(path, refusal) for path, refusal in done.refused]
                elif event.refusal is not None:
                    self._log([event.traceback])
                    paths = [self.journal.read(place)["f"] for place in buckets.pop(0)]
                    self.rows += [quarantine.row(path, event.refusal) for path in paths]
                    if buckets:
                        self._submit_group(buckets)

    def _submit_group(self, buckets: list[list[Place]]) -> None:
        self.journal.flush()
        self.pool.submit(Task("group", list(buckets), self.limits.seconds, self.each, note=buckets))

    def _refuse_loser(self, planned: Planned | None) -> None:
        if planned is not None:
            self._refuse(planned, Refusal(
                "duplicate-series", "other files among the sources hold the same series, with as many voxels or more",
                "remove one of them",
            ))  # fmt: skip

    def _read(self, plans: _Plans, progress: bool) -> None:
        """Read what the store does not have, the largest series first."""
        waiting = iter(plans)
        with Progress("read", "series", len(plans), progress) as bar:
            while True:
                while self.pool.hungry and (planned := next(waiting, None)):
                    if self._is_to_be_read(planned):
                        self._submit_read(planned)
                    else:
                        bar.add()
                if self.pool.idle:
                    return
                for event in self.pool.wait():
                    planned = event.task.note.planned
                    if isinstance(event, Item):
                        self.writer.commit(Path(event.value.folder))
                        self.journal.add_series(planned.name, {"sum": planned.sum})
                        self.outcome.new_series += 1
                        bar.add(num_slices=event.value.num_frames)
                    elif event.refusal is not None:
                        self._take_unread(event, event.refusal)
                        bar.add()

    def _is_to_be_read(self, planned: Planned) -> bool:
        """Whether a series is neither in the store nor beyond limits; who is not to be read gets a reason."""
        known: Line = {}
        if planned.name in self.journal.series:
            known = self.journal.read(self.journal.series[planned.name])
        if known.get("sum") == planned.sum and "refusal" in known:
            code, reason, mend, file = known["refusal"]
            self._refuse(planned, Refusal(code, reason, mend, Path(file) if file else None))
            return False
        folder = folder_of(self.store.root, planned.name)
        if folder.is_dir():
            num_stored = _num_voxels(folder)
            if known.get("sum") == planned.sum or not known and num_stored == planned.num_voxels:
                self.outcome.known_series += 1
                return False
            if planned.num_voxels < num_stored:
                self._refuse(planned, Refusal(
                    "smaller-than-stored", "the store has this series with more voxels",
                    "remove the series from the store if these files are right",
                ))  # fmt: skip
                return False
        if refusal := self._beyond_limits(planned):
            self._refuse(planned, refusal)
            return False
        return True

    def _beyond_limits(self, planned: Planned) -> Refusal | None:
        if planned.num_voxels > self.limits.num_voxels:
            return Refusal("voxel-limit", f"it would have {planned.num_voxels:,} voxels",
                           "raise --max-voxels if the file is sound")  # fmt: skip
        if planned.num_voxels * _LEAST_BYTES_A_VOXEL > self.num_bytes:
            return Refusal("memory-limit", f"its {planned.num_voxels:,} voxels are more than memory may hold",
                           "raise --max-memory if the file is sound")  # fmt: skip
        return None

    def _submit_read(self, planned: Planned) -> None:
        packed = {path: place for path in files_of(planned) if (place := self.files.place_of(path))[0]}
        order = ReadOrder(planned, packed, f"read.{planned.name}")
        share = min(_BYTES_A_TASK + _BYTES_A_VOXEL * planned.num_voxels, self.num_bytes)
        self.pool.submit(
            Task("read", order, self.limits.seconds, max(self.each, share), share=share, note=order)
        )

    def _take_unread(self, event: Ended, refusal: Refusal) -> None:
        """A series could not be read."""
        order: ReadOrder = event.task.note
        self._log([event.traceback])
        self._refuse(order.planned, refusal)
        for rest in (self.store.root / UNFINISHED).glob(f"{order.planned.name}.*"):
            shutil.rmtree(rest, ignore_errors=True)
        archives.clear(self.temporary / order.folder)
        if not event.killed and not event.traceback and refusal.code != "memory-limit":
            words = (refusal.code, refusal.reason, refusal.mend, refusal.file and str(refusal.file))
            self.journal.add_series(order.planned.name, {"sum": order.planned.sum, "refusal": words})

    def _refuse(self, planned: Planned, refusal: Refusal) -> None:
        """List all files of a series: the one to blame with the reason, the others with its name."""
        paths = files_of(planned)
        guilty = refusal.file and str(refusal.file)
        others = refusal
        if guilty in paths and len(paths) > 1:
            others = Refusal("series-refused", f"its series is refused for {guilty}: {refusal.reason}", refusal.mend)
        self.rows += [quarantine.row(path, refusal if path == guilty else others) for path in paths]

    def _count_kinds(self, num_series: int, num_reports: int) -> None:
        """Count what became of files; so many with a sound header, and files of reports, were refused later."""
        kinds = self.files.kinds
        kinds["series"] -= num_series
        kinds["report"] -= num_reports
        kinds["refused"] += num_series + num_reports
        self.outcome.kinds = {kind: count for kind, count in sorted(kinds.items()) if count}

    def _finish(self, plans: _Plans) -> Outcome:
        """Write samples and tables, and count."""
        outcome, store = self.outcome, VolumeStore(self.store.root)
        outcome.samples, rows = self.reports.write(store, ((planned.name, files_of(planned)) for planned in plans))
        self.rows += rows
        outcome.refused = dict(sorted(quarantine.write(
            self.private, self.rows, self.roots, self.reports.files()).items()))
        table = store.index.table
        outcome.studies = len(set(table["study"].to_pylist()) - {""})
        outcome.series = len(table)
        outcome.frames = sum(
            volumes * slices
            for volumes, slices in zip(table["num_volumes"].to_pylist(), table["num_slices"].to_pylist(), strict=True)
        )
        outcome.num_bytes = sum(table["num_bytes"].to_pylist())
        _write_summary(self.store.root, outcome)
        outcome.seconds = time.monotonic() - self.began
        if not outcome.new_series + outcome.known_series + outcome.kinds.get("report", 0):
            raise UserError(
                f"nothing in the sources is of use: {outcome.files:,} files, of which {len(set(self.rows)):,} are "
                f"refused; see {outcome.quarantine}"
            )
        return outcome

    def _key(self, path: Path) -> bytes:
        if not path.exists() and next(series_folders(self.store.root), None) is not None:
            raise UserError(f"{path}: the key of this store is missing; restore it from a backup, or name it by "
                            "--key FILE")  # fmt: skip
        return load_or_create_key(path)

    def _toolbox(self, readers: Sequence[str]) -> dict[str, object]:
        return {
            "readers": list(readers), "key": self.key.hex(), "dates": self.pseudonyms.dates,
            "store": str(self.store.root), "journal": str(self.private / "scan.jsonl"),
            "folder": str(self.temporary), "file_bytes": self.limits.file_bytes,
        }  # fmt: skip

    def _stamp(self, readers: Sequence[str]) -> str:
        """What the journal's lines depend on beside the files: the readers, their version, the key and dates."""
        digest = hashlib.sha256(repr((megamed.__version__, list(readers), self.pseudonyms.fingerprint())).encode())
        data = Path(__file__).resolve().parents[1]
        for code in ("readers/**/*.py", "reports/**/*.py", "privacy/**/*.py", "ingest/**/*.py", "keywords.py"):
            for path in sorted(data.glob(code)):
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def _log(self, tracebacks: Iterable[str]) -> None:
        """Keep what a reader raised by mistake, where nobody but the owner sees it."""
        if texts := [f"{text}\n" for text in tracebacks if text]:
            with open(self.private / "errors.log", "a") as file:
                file.writelines(texts)


class _Plans:
    """Series to read, the largest first. In memory stay a few numbers a series, the rest is in a file.

    Args:
        spool: the file, empty.
    """

    def __init__(self, spool: IO[bytes]):
        self._spool, self._end = spool, 0
        self._places: dict[str, tuple[int, str, str, int, int]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Planned]:
        order = sorted(self._places, key=lambda name: (-self._places[name][0], name))
        return map(self._get, order)

    def add(self, planned: Planned) -> Planned | None:
        """Take a series in. Of two with one name the larger is kept, or the first by path; returns the other."""
        loser = None
        if planned.name in self._places:
            held = self._get(planned.name)
            if (-held.num_voxels, held.first) < (-planned.num_voxels, planned.first):
                return planned
            loser = held
        self._spool.seek(self._end)
        self._spool.write(planned.plan)
        self._places[planned.name] = (
            planned.num_voxels, planned.sum, planned.first, self._end, len(planned.plan)
        )  # fmt: skip
        self._end += len(planned.plan)
        return loser

    def _get(self, name: str) -> Planned:
        num_voxels, total, first, offset, length = self._places[name]
        self._spool.seek(offset)
        return Planned(name, num_voxels, total, first, self._spool.read(length))


def _in_batches(buckets: dict[str, array[int]]) -> Iterator[list[list[Place]]]:
    """Buckets, several small ones together."""
    batch: list[list[Place]] = []
    num_headers = 0
    for numbers in buckets.values():
        batch.append([Place(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)])
        num_headers += len(batch[-1])
        if num_headers >= _HEADERS_A_TASK:
            yield batch
            batch, num_headers = [], 0
    if batch:
        yield batch


def _num_voxels(folder: Path) -> int:
    """Of a stored series; 0 where it is damaged, so that it is read again."""
    count = 1
    try:
        for length in read_record(folder).info.shape:
            count *= length
    except UserError:
        return 0
    return count


def _write_summary(root: Path, outcome: Outcome) -> None:
    names = ("studies", "series", "frames", "num_bytes", "samples", "refused")
    counts = {name: getattr(outcome, name) for name in names}
    aside = root / f".{SUMMARY}"
    aside.write_text(json.dumps(counts, indent=2) + "\n")
    replace(aside, root / SUMMARY)
