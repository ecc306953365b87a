"""What every reader offers, and what passes between reading, grouping and ingest.

A file goes through three steps, each of which may refuse it: `metadata` looks at its header alone, `group` decides
which files are one series, `read` decodes that series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megamed.data.privacy import Pseudonyms
from megamed.data.series import Series


class Refusal(Exception):
    """A file or a series cannot be used. Says why and what to do, without a word of what the file says of a person.

    Args:
        code: a short name for counting ("truncated").
        reason: what is wrong, one sentence part without a full stop.
        mend: what to do about it.
        file: which file of a series is to blame, where one is.
    """

    def __init__(self, code: str, reason: str, mend: str, file: Path | None = None):
        super().__init__(f"{reason}; {mend}")
        self.code, self.reason, self.mend, self.file = code, reason, mend, file

    def __reduce__(self) -> Any:
        return Refusal, (self.code, self.reason, self.mend, self.file)


@dataclass(frozen=True)
class Identity:
    """Whose series it is, in pseudonyms; an empty text where the source does not say.

    Attributes:
        patient, study, series, accession: keyed hashes.
        study_date: shifted, `YYYYMMDD`, or empty where dates are dropped.
    """

    patient: str = ""
    study: str = ""
    series: str = ""
    accession: str = ""
    study_date: str = ""


@dataclass(frozen=True)
class FileHeader:
    """What the scan keeps of a file.

    Attributes:
        path: the file.
        reader: name of the reader that can read it.
        identity: whose it is.
        facts: what the reader's `group` needs: numbers, short codes and lists of them, JSON-serialisable; no identity.
    """

    path: Path
    reader: str
    identity: Identity
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SeriesPlan:
    """Files that make one series.

    Attributes:
        reader: name of the reader.
        identity: whose it is.
        part: tells apart what one DICOM series holds several of ("axial 64x64 TE 30 ms"); empty where a source can
            only ever be one. With `identity.series` it names the series for ever, so it must not depend on which
            other files are there.
        headers: of the files, in the order in which `read` wants them.
        num_voxels: that `read` will return, for limits and the order of work.
        notes: what is unusual, for `SeriesInfo.notes`.
        label: what tells it from the others of its series that are there, for `SeriesInfo.part`; empty where it is
            the only one.
    """

    reader: str
    identity: Identity
    part: str
    headers: tuple[FileHeader, ...]
    num_voxels: int
    notes: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Grouping:
    """What `group` makes of the files of one source: series, and files that are part of none."""

    plans: list[SeriesPlan]
    refused: list[tuple[FileHeader, Refusal]]


class Reader(Protocol):
    """Reads one family of file formats. Stateless; methods run in worker processes that may be killed."""

    name: str

    def can_read(self, path: Path, head: bytes) -> bool:
        """Whether a file is of this family, by its first 1024 bytes and its name. Never raises."""
        ...

    def metadata(self, path: Path, pseudonyms: Pseudonyms) -> FileHeader:
        """Read a file's header, no pixels.

        Raises:
            Refusal: the file cannot be used whatever lies beside it.
        """
        ...

    def group(self, headers: Sequence[FileHeader]) -> Grouping:
        """Sort files into series; every header ends up in a plan or among the refused. Deterministic, any order in."""
        ...

    def read(self, plan: SeriesPlan) -> Series:
        """Decode a series, all of it or nothing.

        Raises:
            Refusal: it cannot be decoded, or is not what its headers said.
        """
        ...
