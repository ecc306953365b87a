"""All series of a store in one table, `index.parquet`: rebuilt from the `series.json` files, and found by name.

The file is there only where it is true: who changes the store takes it away first and writes it anew at the end. So
a store without one (an ingest is running, or was killed) is read from its folders, which takes longer.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megamed.data.series import SeriesInfo
from megamed.data.store.record import SeriesRecord, is_series_name, read_record
from megamed.utils.files import sync

# Loaded where it is used: it starts a thread, and the process that an ingest forks its workers from must have one only.
if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

INDEX = "index.parquet"
SERIES = "series"

# One more with every change of the columns: the index of another version is passed over, and written anew; the first,
# which had no keywords, is read as of series without any.
_VERSION = {b"megamed-index": b"2"}
_KEPT = ("series", "patient", "study", "accession", "study_date", "sha256", "info")
_OF_INFO = ("modality", "kind", "plane", "body_part", "laterality", "view_position", "part", "units", "dtype")


@cache
def schema() -> pa.Schema:
    """Columns of the table."""
    import pyarrow as pa

    texts = ("series", "patient", "study", "accession", "study_date", *_OF_INFO)
    return pa.schema(
        [(name, pa.string()) for name in texts]
        + [("keywords", pa.list_(pa.string()))]
        + [(name, pa.int32()) for name in ("num_volumes", "num_slices", "height", "width")]
        + [("colour", pa.bool_())]
        + [(f"spacing_{axis}_mm", pa.float64()) for axis in "whs"]
        + [("repetition_time_s", pa.float64()), ("num_bytes", pa.int64()), ("sha256", pa.string()),
           ("info", pa.string())],
        metadata=_VERSION,
    )


class Index:
    """The table in memory, rows in the order of names.

    Args:
        table: of `schema`.
        root: of the store.
    """

    def __init__(self, table: pa.Table, root: Path):
        self.table, self._root = table, root
        self._kept = table.select(_KEPT)
        self._names = _bytes(table["series"])
        studies = _bytes(table["study"])
        self._by_study = np.argsort(studies, kind="stable")
        self._studies = studies[self._by_study]

    def __len__(self) -> int:
        return len(self._names)

    def find(self, series: str) -> int | None:
        """The row of a series."""
        name = series.encode()
        row = int(np.searchsorted(self._names, name))
        return row if row < len(self) and self._names[row] == name else None

    def of_study(self, study: str) -> list[int]:
        """The rows of a study."""
        first, last = (np.searchsorted(self._studies, study.encode(), side) for side in ("left", "right"))
        return [int(row) for row in self._by_study[first:last]]

    def record(self, row: int) -> SeriesRecord:
        """A row as a record."""
        return self._record(self._kept.slice(row, 1).to_pylist()[0])

    def records(self) -> Iterator[SeriesRecord]:
        """All of them, by name."""
        for batch in self._kept.to_batches(max_chunksize=1024):
            yield from map(self._record, batch.to_pylist())

    def _record(self, values: dict[str, str]) -> SeriesRecord:
        info = SeriesInfo.from_json(json.loads(values.pop("info")))
        return SeriesRecord(**values, info=info, folder=folder_of(self._root, values["series"]))


def folder_of(root: Path, series: str) -> Path:
    """Where a series lies in a store."""
    return root / SERIES / series[:2] / series


def series_folders(root: Path) -> Iterator[Path]:
    """Folders of all series of a store, by name."""
    for shelf in sorted(os.listdir(root / SERIES)) if (root / SERIES).is_dir() else []:
        if len(shelf) == 2:
            names = sorted(os.listdir(root / SERIES / shelf))
            yield from (root / SERIES / shelf / name for name in names if is_series_name(name))


def load(root: Path) -> Index:
    """The index of a store, from its file, or from the folders where there is no usable one.

    Raises:
        UserError: the folder of a series is damaged.
    """
    table = _read(root)
    if table is None:
        table = _table(map(read_record, series_folders(root)))
    return Index(table, root)


def write(root: Path) -> None:
    """Rebuild the index file from the folders: the same bytes for the same series.

    Raises:
        UserError: the folder of a series is damaged.
    """
    import pyarrow.parquet as pq

    aside = root / f".{INDEX}"
    pq.write_table(_table(map(read_record, series_folders(root))), aside, compression="zstd")
    replace(aside, root / INDEX)


def misfits(root: Path) -> tuple[int, int] | None:
    """How many series the index file lacks, and how many it lists that are not there; None without a usable file."""
    table = _read(root)
    if table is None:
        return None
    there, listed = {folder.name for folder in series_folders(root)}, set(table["series"].to_pylist())
    return len(there - listed), len(listed - there)


def _read(root: Path) -> pa.Table | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = _with_keywords(pq.read_table(root / INDEX))
        if table.schema.equals(schema()) and _VERSION.items() <= (table.schema.metadata or {}).items():
            return table
        logger.warning("%s/%s is of another version; the series are read from their folders", root, INDEX)
    except FileNotFoundError:
        pass
    except (OSError, pa.ArrowException) as error:
        logger.warning("%s/%s cannot be read (%s); the series are read from their folders", root, INDEX, error)
    return None


def _with_keywords(table: pa.Table) -> pa.Table:
    """A table of the first version as one of this; others as they are."""
    import pyarrow as pa

    place = schema().get_field_index("keywords")
    first = {b"megamed-index": b"1"}.items() <= (table.schema.metadata or {}).items()
    if not first or not table.schema.equals(schema().remove(place)):
        return table
    none = pa.array([[]] * len(table), schema().field(place).type)
    return table.add_column(place, schema().field(place), none).replace_schema_metadata(_VERSION)


def replace(aside: Path, path: Path) -> None:
    """Put a file that was written aside in its place, so that a power cut leaves the old or the new one whole."""
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def _table(records: Iterable[SeriesRecord]) -> pa.Table:
    """Rows in the order in which they come."""
    import pyarrow as pa

    columns: dict[str, list] = {name: [] for name in schema().names}
    for record in records:
        info = record.info
        volumes, slices, height, width = info.shape[:4]
        values = {
            **{name: getattr(record, name) for name in _KEPT if name != "info"},
            **{name: getattr(info, name) for name in _OF_INFO},
            "keywords": list(info.keywords),
            "num_volumes": volumes, "num_slices": slices, "height": height, "width": width,
            "colour": len(info.shape) == 5,
            **{f"spacing_{axis}_mm": info.spacing_mm["whs".index(axis)] for axis in "whs"},
            "repetition_time_s": info.repetition_time_s, "num_bytes": record.num_bytes,
            "info": json.dumps(info.to_json(), ensure_ascii=False),
        }
        for name, value in values.items():
            columns[name].append(value)
    return pa.table(columns, schema=schema())


def _bytes(column: pa.ChunkedArray) -> np.ndarray:
    """A column of names in fixed width: 20 bytes a name where a Python text takes 69."""
    return np.array([name.encode() for name in column.to_pylist()] or [b""], dtype=np.bytes_)[: len(column)]
