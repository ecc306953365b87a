"""Reading a volume store.

    STORE/store.json                        what this is, its version, how it was de-identified, and under which key
    STORE/series/ab/ab12.../voxels.npy      [T, S, H, W] (or [T, S, H, W, 3]), canonical orientation
    STORE/series/ab/ab12.../series.json     what is known of them
    STORE/index.parquet                     one row a series
    STORE/samples.jsonl                     samples made of reports, where there are any
    STORE/summary.json                      counts
    STORE/.unfinished/                      what is being written
    STORE/.lock                             held by who writes
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megamed.data.store import index
from megamed.data.store.index import Index
from megamed.data.store.record import MEND, SeriesRecord, read_record
from megamed.utils import UserError

FORMAT = "megamed-volume-store"
VERSION = 1

_STORE_FILE = "store.json"
ASIDE = f".{_STORE_FILE}."
"""How files begin that are to become it."""


@dataclass(frozen=True)
class Fault:
    """What `VolumeStore.verify` found: the series it is about (empty for the index), what is wrong, the mend."""

    series: str
    reason: str
    mend: str


class VolumeStore:
    """The series of a store, as they were when they were first asked for; open it again to see later ones.

    Args:
        root: the store's folder.

    Raises:
        UserError: not a store, or one of a later version.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        try:
            values = json.loads((self.root / _STORE_FILE).read_bytes())
            name, version = values["format"], int(values["version"])
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{root} is not a volume store (it has no {_STORE_FILE}); make one with "
                            "tools/ingest.py SOURCE --out STORE") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{root}/{_STORE_FILE} cannot be read; it should be "
                            f'{{"format": "{FORMAT}", "version": {VERSION}}}') from error
        if name != FORMAT:
            raise UserError(f"{root} is not a volume store; make one with tools/ingest.py SOURCE --out STORE")
        if version > VERSION:
            raise UserError(f"{root} is a volume store of version {version}, this megamed reads up to {VERSION}; "
                            "use the megamed that wrote it, or a later one")

    @classmethod
    def create(cls, root: str | Path) -> VolumeStore:
        """An empty store in a folder that does not exist or is empty; of one that is a store already, that store.

        Raises:
            UserError: the folder holds something else, or a store of a later version.
        """
        folder = Path(root)
        if not (folder / _STORE_FILE).exists():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise UserError(f"{root} is a file; give the folder of a volume store") from None
            if any(not name.startswith(".") for name in os.listdir(folder)):
                raise UserError(f"{root} is neither empty nor a volume store; give a new folder")
            with suppress(FileNotFoundError):  # another process has created it, and tidied up
                _write(folder, {"format": FORMAT, "version": VERSION})
        return cls(root)

    def declare(self, deidentified: dict[str, object], key: str) -> None:
        """Say in `store.json` how series are de-identified; of a store with series, see that it is still the same.

        Args:
            deidentified: what `privacy.declaration` has.
            key: `Pseudonyms.fingerprint`.

        Raises:
            UserError: the store was made in another way, or with another key.
        """
        values = json.loads((self.root / _STORE_FILE).read_bytes())
        if "key" not in values or next(index.series_folders(self.root), None) is None:
            _write(self.root, {**values, "deidentified": deidentified, "key": key})
        elif (was := values["deidentified"]) != deidentified:
            dates = {"dropped": "drop", "shifted": "shift"}[was["dates"]]
            mend = f"ingest with --dates {dates}, or " if was["dates"] != deidentified["dates"] else ""
            raise UserError(f"{self.root} was de-identified in another way; {mend}make a new store")
        elif values["key"] != key:
            raise UserError(f"{self.root} was made with another project key; give that one by --key FILE, or make a "
                            "new store")

    @cached_property
    def index(self) -> Index:
        """The table of all series. UserError: the folder of one is damaged."""
        return index.load(self.root)

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, series: str) -> bool:
        return self.index.find(series) is not None

    def record(self, series: str) -> SeriesRecord:
        """The series of that name.

        Raises:
            UserError: there is none.
        """
        row = self.index.find(series)
        if row is None:
            raise UserError(f"{self.root} has no series {series!r}; ingest it, or take it out of the samples")
        return self.index.record(row)

    def records(self) -> Iterator[SeriesRecord]:
        """All series, by name."""
        return self.index.records()

    def of_study(self, study: str) -> list[SeriesRecord]:
        """The series of a study, by name; none for a study that is not there."""
        return [self.index.record(row) for row in self.index.of_study(study)]

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[Fault]:
        """Read every file and compare it with its sum.

        Args:
            progress: is told, after each series, how many bytes of voxels it had and how many series there are in all.

        Returns:
            What is wrong, by name of series; nothing where all is well.
        """
        folders = list(index.series_folders(self.root))
        faults = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for num_bytes, fault in pool.map(_verify, folders):
                if fault is not None:
                    faults.append(fault)
                if progress is not None:
                    progress(num_bytes, len(folders))
        missing, gone = index.misfits(self.root) or (0, 0)
        if missing or gone:
            faults.append(Fault("", f"{index.INDEX} lacks {missing} series and lists {gone} that are not there",
                                f"delete {self.root / index.INDEX}"))
        return faults


def _write(folder: Path, values: dict[str, object]) -> None:
    aside = folder / f"{ASIDE}{os.getpid()}"  # another process may be creating it, too
    aside.write_text(json.dumps(values) + "\n")
    index.replace(aside, folder / _STORE_FILE)


def _verify(folder: Path) -> tuple[int, Fault | None]:
    num_bytes = 0
    try:
        record = read_record(folder)
        num_bytes = record.num_bytes
        record.open()
        with record.voxels_path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != record.sha256:
            return num_bytes, Fault(folder.name, f"{folder}: the sum of the voxels is wrong", MEND)
    except UserError as error:
        reason, _, mend = str(error).rpartition("; ")
        return num_bytes, Fault(folder.name, reason, mend)
    return num_bytes, None
