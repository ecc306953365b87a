"""What workers do: look at files, list archives, put series together, read them. Runs where it may be killed.

Paths travel as text, since a name need not be UTF-8, and a member of an archive has the path that it would have if
the archive were a folder.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from megamed.data import reports
from megamed.data.ingest.archives import Chain, Member, Unpacker, kind_of
from megamed.data.ingest.journal import Line, Place, read_line
from megamed.data.ingest.sources import Found, is_index_name, unreadable
from megamed.data.privacy import Pseudonyms
from megamed.data.readers import FileHeader, Grouping, Identity, Reader, Refusal, SeriesPlan
from megamed.data.reports import Reading
from megamed.data.store import series_id, write_series

HEAD_BYTES = 1024

# What a NIfTI file may need beside it, by the end of the names: the rest of the name is the same.
_NIFTI = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
_BESIDE = (".hdr", ".hdr.gz", ".img", ".img.gz", ".json", ".bval")
# Of these, the ones that are no image; with what nobody reads but belongs there.
_SIDECARS = (".json", ".bval", ".bvec")
_REPORTS_A_MESSAGE = 500
_LONE = Refusal("lone-sidecar", "it holds no reports, and no NIfTI file of its name lies beside it",
                "put it beside its image, or leave it out")
LOOK_AGAIN = "beside"
_FOR_WHAT_IS_BESIDE = (_LONE.code, "missing-file")

# The class of an index of a medium, with the start of the element behind it, as the meta information has it.
_INDEX_CLASS = b"1.2.840.10008.1.3.10\x02\0"


Packed = dict[str, tuple[Chain, str]]
"""Files by path: the archive that each lies in, and its name there; an empty chain for none."""


class Spot(NamedTuple):
    """A file to look at; a member of an archive has the archive's chain and its name there."""

    found: Found
    chain: Chain = ()
    member: str = ""


class Seen(NamedTuple):
    """What a file is: its line of the journal, and what the ingest itself needs of it."""

    kind: Literal["series", "refused", "index", "archive", "report", "sidecar"]
    bucket: str
    text: bytes


class Planned(NamedTuple):
    """A series to be read.

    Attributes:
        name: of the series in the store.
        num_voxels: as planned.
        sum: of the sizes and times of its files; another one means that it has to be read again.
        first: path of its first file.
        plan: pickled.
    """

    name: str
    num_voxels: int
    sum: str
    first: str
    plan: bytes


class Grouped(NamedTuple):
    """What became of a bucket of headers."""

    plans: list[Planned]
    refused: list[tuple[str, Refusal]]


class ReadOrder(NamedTuple):
    """A series to read, where its files lie in archives, and a name for a temporary folder."""

    planned: Planned
    packed: Packed
    folder: str


def files_of(planned: Planned) -> list[str]:
    """Paths of a series' files."""
    plan: SeriesPlan = pickle.loads(planned.plan)
    return [os.fspath(header.path) for header in plan.headers]


class Stored(NamedTuple):
    """A series that was read: its folder in the store's part for unfinished ones."""

    folder: str
    num_frames: int
    num_bytes: int


class Toolbox:
    """See `megamed.data.ingest.pool`: each method is a generator.

    Args:
        readers: `module:class` of each, in the order in which they are asked.
        key: of the project, in hexadecimal digits.
        dates: as `Pseudonyms` has it.
        store: the store's folder.
        journal: the journal's path.
        folder: private and temporary.
        file_bytes: the largest file.
    """

    def __init__(
        self,
        readers: Sequence[str],
        key: str,
        dates: Literal["drop", "shift"],
        store: str,
        journal: str,
        folder: str,
        file_bytes: int,
    ):
        self._readers = {reader.name: reader for reader in map(load_reader, readers)}
        self._pseudonyms = Pseudonyms(bytes.fromhex(key), dates)
        self._store, self._journal, self._folder = Path(store), journal, Path(folder)
        self._file_bytes = file_bytes
        self._unpacker = Unpacker(self._folder / "archives", file_bytes)

    def scan(self, order: tuple[Sequence[Spot], str]) -> Iterator[Seen]:
        """What each file is, in their order.

        Args:
            order: the files, and the name of a temporary folder that nobody else uses.
        """
        spots, name = order
        with self._temporary(name) as folder:
            for spot in spots:
                path = spot.found.path
                try:
                    with self._unpacked(folder, {path: (spot.chain, spot.member)}) as paths:
                        line = self._look(spot, paths.get(path, Path(path)))
                except Refusal as refusal:
                    line = refused_line(refusal)
                except OSError as error:
                    line = refused_line(_unreadable(error))
                yield seen(spot.found, line)

    def list_archive(self, chain: Chain) -> Iterator[Line]:
        """The journal's line about an archive."""
        members: list[tuple[str, int]] = []
        refused: list[tuple[str, Any]] = []
        for name, member in self._unpacker.members(chain):
            if isinstance(member, Member):
                members.append((name, member.size))
            else:
                refused.append((name, refused_line(member)["refusal"]))
        if not members and not refused:
            raise Refusal("empty", "it is an archive without files", "pack it again")
        yield {"kind": "archive", "archive": chain[-1].kind, "members": members, "refused": refused}

    def group(self, buckets: Sequence[Sequence[Place]]) -> Iterator[Grouped]:
        """Make series of files of which each bucket's belong together."""
        fd = os.open(self._journal, os.O_RDONLY)
        try:
            for places in buckets:
                lines = [read_line(fd, place) for place in places]
                yield self._group([header_of(line) for line in lines], {line["f"]: line for line in lines})
        finally:
            os.close(fd)

    def read(self, order: ReadOrder) -> Iterator[Stored]:
        """Decode a series and write it where the store can take it from."""
        plan: SeriesPlan = pickle.loads(order.planned.plan)
        with self._temporary(order.folder) as folder, self._unpacked(folder, order.packed) as paths:
            unpacked = tuple(
                replace(header, path=paths.get(os.fspath(header.path), header.path)) for header in plan.headers
            )
            try:
                series = self._readers[plan.reader].read(replace(plan, headers=unpacked))
            except (Refusal, OSError) as error:
                refusal = _unreadable(error) if isinstance(error, OSError) else error
                origins = {path: Path(origin) for origin, path in paths.items()}
                file = refusal.file and origins.get(refusal.file, refusal.file)
                raise Refusal(refusal.code, refusal.reason, refusal.mend, file) from error
        place = write_series(self._store, order.planned.name, plan.identity, series, self._pseudonyms)
        shape = series.voxels_TSHW.shape
        yield Stored(str(place), shape[0] * shape[1], series.voxels_TSHW.nbytes)

    def read_reports(self, order: tuple[str, Packed, str]) -> Iterator[Reading]:
        """The reports of a file, some at a time.

        Args:
            order: the file's path, where it lies, and the name of a temporary folder.
        """
        path, packed, name = order
        with self._temporary(name) as folder, self._unpacked(folder, packed) as paths:
            reading = reports.read(paths.get(path, Path(path)), self._pseudonyms)
        own = [replace(report, path=Path(path)) for report in reading.reports]
        yield Reading([], reading.refused)
        for first in range(0, len(own), _REPORTS_A_MESSAGE):
            yield Reading(own[first : first + _REPORTS_A_MESSAGE], [])

    def _look(self, spot: Spot, path: Path) -> Line:
        """What a file is, as the journal keeps it.

        Raises:
            Refusal: it cannot be used.
        """
        found = spot.found
        if not found.size:
            raise Refusal("empty", "it has no content", "copy it again")
        if found.size > self._file_bytes:
            size = f"it has {found.size / 2**30:,.1f} GiB"
            raise Refusal("too-large", size, "split it, or raise the limit if it is sound")
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        if kind := kind_of(path.name, head):
            return {"kind": "archive", "archive": kind}
        if head[128:132] == b"DICM" and (is_index_name(path.name) or _INDEX_CLASS in head):
            return {"kind": "index", "references": _references(path)}
        for reader in self._readers.values():
            if reader.can_read(path, head):
                header = reader.metadata(path, self._pseudonyms)
                return {"kind": "series", "reader": reader.name, "identity": astuple(header.identity),
                        "facts": header.facts}
        if reports.can_read(path, head):
            return {"kind": "report"}
        if path.suffix.lower() in _SIDECARS:
            if self._has_image(spot):
                return {"kind": "sidecar"}
            raise _LONE
        raise Refusal("unknown-format", "it is of no format that is read", "convert it to DICOM, NIfTI or PNG")

    def _has_image(self, spot: Spot) -> bool:
        """Whether a NIfTI file of the same name lies beside a file."""
        stem, _ = os.path.splitext(spot.member if spot.chain else spot.found.path)
        images = [stem + suffix for suffix in _NIFTI]
        return any(self._unpacker.has(spot.chain, image) if spot.chain else os.path.isfile(image) for image in images)

    def _group(self, headers: Sequence[FileHeader], lines: dict[str, Line]) -> Grouped:
        reader = self._readers[headers[0].reader]
        grouping = reader.group(headers)
        plans = [_planned(plan, lines) for plan in grouping.plans]
        return Grouped(plans, [(os.fspath(header.path), refusal) for header, refusal in _complete(grouping, headers)])

    @contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        """A folder that is made when something is unpacked into it, and removed at the end."""
        folder = self._folder / name
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _unpacked(self, folder: Path, packed: Packed) -> Iterator[dict[str, Path]]:
        """Members of archives as files, for a while, with what they need beside them.

        A reader may take from a path whose file it is, so that it has all of its folders below the temporary one.

        Args:
            folder: a temporary one.
            packed: files; those outside archives are passed over.
        """
        paths: dict[str, Path] = {}
        targets: dict[Path, tuple[Chain, str]] = {}
        for path, (chain, member) in packed.items():
            if chain:
                paths[path] = folder / path.lstrip("/")
                targets[paths[path]] = chain, member
                for beside in beside_of(member):
                    if self._unpacker.has(chain, beside):
                        targets[paths[path].with_name(os.path.basename(beside))] = chain, beside
        try:
            for target, (chain, member) in targets.items():
                self._unpacker.unpack(chain, member, target)
            yield paths
        finally:
            for target in targets:
                target.unlink(missing_ok=True)


def load_reader(name: str) -> Reader:
    """A reader by `module:class`."""
    module, _, attribute = name.partition(":")
    return cast(Reader, getattr(importlib.import_module(module), attribute)())


def seen(found: Found, line: Line) -> Seen:
    """A file's line as it goes to the journal."""
    bucket = bucket_of(line)
    values = {"f": found.path, "s": found.size, "m": found.mtime_ns, "b": bucket, **line}
    return Seen(line["kind"], bucket, json.dumps(values, separators=(",", ":")).encode())


def bucket_of(line: Line) -> str:
    """What the headers have in common that may become one series; empty for what is none.

    What a file is may depend on what lies beside it, which may be another thing in the next run: `LOOK_AGAIN`.
    """
    if line["kind"] == "series":
        return f"{line['reader']} {Identity(*line['identity']).series}"
    return LOOK_AGAIN if line["kind"] == "sidecar" or line.get("refusal", [""])[0] in _FOR_WHAT_IS_BESIDE else ""


def refused_line(refusal: Refusal) -> Line:
    """The journal's line about a file that is refused."""
    return {"kind": "refused", "refusal": (refusal.code, refusal.reason, refusal.mend)}


def header_of(line: Line) -> FileHeader:
    """What a reader said of a file."""
    return FileHeader(Path(line["f"]), line["reader"], Identity(*line["identity"]), line["facts"])


def _unreadable(error: OSError) -> Refusal:
    """The refusal of a file that the system does not give; what is no fault of the file's is raised again."""
    if error.errno is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise error
    refusal = unreadable(error)
    refusal.file = Path(os.fsdecode(error.filename)) if error.filename else None
    return refusal


def beside_of(name: str) -> list[str]:
    """Names of other files that a reader may look at when it reads this one."""
    suffix = next((suffix for suffix in _NIFTI if name.lower().endswith(suffix)), None)
    if suffix is None:
        return []
    return [other for end in _BESIDE if (other := name[: -len(suffix)] + end) != name]


def _planned(plan: SeriesPlan, lines: dict[str, Line]) -> Planned:
    files = [lines[os.fspath(header.path)] for header in plan.headers]
    state = [(line["s"], line["m"]) for line in files]
    for beside in (beside for line in files for beside in beside_of(line["f"])):
        with suppress(OSError):  # it need not be there
            status = os.stat(beside)
            state.append((status.st_size, status.st_mtime_ns))
    digest = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return Planned(series_id(plan), plan.num_voxels, digest, files[0]["f"], pickle.dumps(plan))


def _complete(grouping: Grouping, headers: Sequence[FileHeader]) -> list[tuple[FileHeader, Refusal]]:
    """What was refused, and what a reader passed over without a word."""
    spoken_of = {header.path for plan in grouping.plans for header in plan.headers}
    spoken_of.update(header.path for header, _ in grouping.refused)
    forgotten = Refusal("not-grouped", "its reader put it into no series, and gave no reason", "please report it")
    return [*grouping.refused, *((header, forgotten) for header in headers if header.path not in spoken_of)]


def _references(path: Path) -> list[str]:
    """Files that the index of a DICOM medium names, relative to its folder (PS3.3, F.3.2.2).

    Raises:
        Refusal: the index cannot be read.
    """
    import pydicom

    try:
        records = pydicom.dcmread(path)["DirectoryRecordSequence"].value
        names = [record.get("ReferencedFileID") for record in records]
    except Exception as error:  # whatever pydicom comes upon in a damaged file
        raise Refusal("damaged-index", "the index of the medium cannot be read", "none: its files are read") from error
    return ["/".join([name] if isinstance(name, str) else map(str, name)) for name in names if name]
