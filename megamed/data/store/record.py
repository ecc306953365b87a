"""One series of a store: its name, its `series.json`, its voxels.

Of `series.json` fields are only ever added, with defaults: an older file is read by a newer megamed as it is. A change
that gives a field another meaning raises `SCHEMA_VERSION`, and `parse` then turns the older text into the newer; files
are never rewritten in place, only replaced by a new ingest.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamed.data.readers import Identity, SeriesPlan
from megamed.data.series import DTYPES, SCHEMA_VERSION, SeriesInfo
from megamed.utils import UserError

VOXELS = "voxels.npy"
HEADER = "series.json"
MEND = "delete this folder and ingest its source again"

_HEX_DIGITS = 20
_IDENTITY = ("patient", "study", "accession", "study_date")


@dataclass(frozen=True, eq=False)
class SeriesRecord:
    """A series of a store.

    Attributes:
        series: its name.
        patient, study, accession, study_date: pseudonyms, as `Identity` has them; empty where not known.
        info: what is known of the voxels.
        folder: where it lies.
        sha256: of the file `voxels_path`.
    """

    series: str
    patient: str
    study: str
    accession: str
    study_date: str
    info: SeriesInfo
    folder: Path
    sha256: str

    @property
    def voxels_path(self) -> Path:
        """The `.npy` file [T, S, H, W] or, for colour, [T, S, H, W, 3]."""
        return self.folder / VOXELS

    @property
    def num_bytes(self) -> int:
        """Of the voxels."""
        return int(np.prod(self.info.shape, dtype=np.int64)) * np.dtype(self.info.dtype).itemsize

    def open(self) -> np.ndarray:
        """The voxels, mapped into memory: only what is touched is read.

        Raises:
            UserError: the file is missing, damaged, or not what `info` says.
        """
        try:
            voxels = np.load(self.voxels_path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise damaged(self.folder, f"{VOXELS} is missing") from None
        except (OSError, ValueError, EOFError) as error:
            raise damaged(self.folder, f"{VOXELS} cannot be read ({error})") from error
        if voxels.shape != self.info.shape or voxels.dtype != np.dtype(self.info.dtype):
            raise damaged(self.folder, f"{VOXELS} is not what {HEADER} says")
        return voxels

    def to_json(self) -> str:
        """The text of `series.json`."""
        values = {"schema": SCHEMA_VERSION, "series": self.series, **{name: getattr(self, name) for name in _IDENTITY},
                  "info": self.info.to_json(), "sha256": self.sha256}
        return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def parse(text: str | bytes, folder: Path) -> SeriesRecord:
    """The inverse of `SeriesRecord.to_json`.

    Raises:
        UserError: not the text of such a file, or a later version's.
    """
    try:
        values = json.loads(text)
        schema = values["schema"]
        if schema > SCHEMA_VERSION:
            raise UserError(f"{folder}/{HEADER} has schema {schema}, this megamed reads up to {SCHEMA_VERSION}; "
                            "use the megamed that wrote the store, or a later one")
        info = SeriesInfo.from_json(values["info"])
        texts = {name: values[name] for name in ("series", *_IDENTITY, "sha256")}
        if not all(isinstance(value, str) for value in texts.values()) or info.dtype not in DTYPES:
            raise TypeError
        return SeriesRecord(**texts, info=info, folder=folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{HEADER} cannot be read") from error


def read_record(folder: Path, series: str = "") -> SeriesRecord:
    """The series of a folder.

    Args:
        folder: of a series.
        series: its name; the folder's where none is given.

    Raises:
        UserError: no `series.json`, a damaged or a later version's one, or one of another series.
    """
    try:
        text = (folder / HEADER).read_bytes()
    except FileNotFoundError:
        raise damaged(folder, f"{HEADER} is missing") from None
    record = parse(text, folder)
    if record.series != (series or folder.name):
        raise damaged(folder, f"{HEADER} is of another series")
    return record


def damaged(folder: Path, reason: str) -> UserError:
    """What to raise for a series that cannot be used."""
    return UserError(f"{folder}: {reason}; {MEND}")


def series_id(plan: SeriesPlan) -> str:
    """The name of a planned series in the store: 20 hex digits, the same whenever and wherever it is ingested."""
    return series_name(plan.identity, plan.part)


def series_name(identity: Identity, part: str) -> str:
    """As `series_id`, of a series and the part of it."""
    if not part:
        return identity.series
    return hashlib.sha256(f"{identity.series}:{part}".encode()).hexdigest()[:_HEX_DIGITS]


def is_series_name(name: str) -> bool:
    """Whether a name can be that of a series in a store, and so of a folder."""
    return re.fullmatch(rf"[0-9a-f]{{{_HEX_DIGITS}}}", name) is not None
