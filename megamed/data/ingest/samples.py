"""The last part of an ingest: reports that lie among the sources, and `samples.jsonl` made of them.

`reports.jsonl` in the private folder has the reports of every file that was ever read for the store, scrubbed and under
pseudonyms, and the keys of the pictures that reports may name. Each run makes `samples.jsonl` anew of all of them and
of all series of the store. So it does not matter in which run a report came and in which its study. A file that has
changed is read again, and one that is gone from a source that is given again is forgotten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megamed.data.ingest.pool import Item, Pool, Task
from megamed.data.ingest.quarantine import Row, is_in, row
from megamed.data.ingest.scan import Files
from megamed.data.privacy import Pseudonyms
from megamed.data.readers import Refusal
from megamed.data.reports import Report, image_keys
from megamed.data.samples import from_reports
from megamed.data.store import VolumeStore
from megamed.data.store.index import replace
from megamed.utils import UserError

SAMPLES, REPORTS = "samples.jsonl", "reports.jsonl"
VERSION = 1

_NO_STUDY = Refusal("no-study", "a report of a study that is not in the store", "ingest the study, too")


@dataclass
class _File:
    """What was read from a file of reports, and what tells whether it has changed since."""

    size: int
    mtime_ns: int
    stamp: str
    reports: list[Report] = field(default_factory=list)
    refused: list[tuple[int, Refusal]] = field(default_factory=list)


class Reports:
    """See the module.

    Args:
        private: the private folder.
        store: the store.
        pseudonyms: of the project.
        stamp: of what reads reports.

    Raises:
        UserError: there are samples, and the file with their reports is missing or damaged.
    """

    def __init__(self, private: Path, store: Path, pseudonyms: Pseudonyms, stamp: str):
        self._path, self._samples, self._pseudonyms, self._stamp = private / REPORTS, store / SAMPLES, pseudonyms, stamp
        self._head = {"version": VERSION, "key": pseudonyms.fingerprint()}
        self._files: dict[str, _File] = {}
        self._keys: dict[str, set[str]] = {}
        try:
            is_ours = self._load()
        except (ValueError, KeyError, TypeError):
            is_ours, self._files, self._keys = False, {}, {}
        if not is_ours and self._samples.exists():
            raise UserError(f"{self._path}, of which {self._samples} was made, is missing or damaged; restore it from "
                            f"a backup, or move {SAMPLES} away and ingest all reports again")

    def update(
        self, pool: Pool, files: Files, roots: Iterable[str], seconds: float, num_bytes: int
    ) -> tuple[list[Row], list[str]]:
        """Read what is new among the files of a scan, and forget what is gone.

        Args:
            pool: of workers with a `Toolbox`.
            files: of the scan.
            roots: its sources.
            seconds, num_bytes: for one file.

        Returns:
            Files that are refused as a whole, and tracebacks of what was raised by mistake.
        """
        there, roots = {found.path for found in files.reports}, tuple(roots)
        self._files = {path: file for path, file in self._files.items()
                       if path in there or not any(is_in(path, root) for root in roots)}
        rows: list[Row] = []
        tracebacks: list[str] = []
        for number, found in enumerate(files.reports):
            known = self._files.get(found.path)
            if known is None or (known.size, known.mtime_ns, known.stamp) != (*found[1:], self._stamp):
                order = found.path, {found.path: files.place_of(found.path)}, f"reports.{number}"
                self._files[found.path] = _File(found.size, found.mtime_ns, self._stamp)
                pool.submit(Task("read_reports", order, seconds, num_bytes, note=found))
        while not pool.idle:
            for event in pool.wait():
                found = event.task.note
                if isinstance(event, Item):
                    self._files[found.path].reports += event.value.reports
                    self._files[found.path].refused += event.value.refused
                elif event.refusal is not None:  # looked at again in the next run
                    del self._files[found.path]
                    rows.append(row(found.path, event.refusal))
                    tracebacks.append(event.traceback)
        return rows, tracebacks

    def write(self, store: VolumeStore, plans: Iterable[tuple[str, list[str]]]) -> tuple[int, list[Row]]:
        """Keep the reports, and write `samples.jsonl` anew.

        Args:
            store: with all its series.
            plans: name and files of each series of this run.

        Returns:
            Lines of `samples.jsonl`, and the entries of all files that are refused or whose study is not in the store.
        """
        reports = [report for path in sorted(self._files) for report in self._files[path].reports]
        self._name(plans, {key for report in reports for key in report.images})
        if self._files or self._path.exists():
            _write(self._path, map(json.dumps, self._lines()))
        lines, unmatched = from_reports(reports, store.records(), self._images())
        if lines or self._samples.exists():
            _write(self._samples, sorted(json.dumps(line, ensure_ascii=False) for line in lines))
        rows = [_entry(path, *refused) for path, file in self._files.items() for refused in file.refused]
        return len(lines), rows + [_entry(os.fspath(report.path), report.line, _NO_STUDY) for report in unmatched]

    def files(self) -> set[str]:
        """Paths of all files whose reports are kept."""
        return set(self._files)

    def _name(self, plans: Iterable[tuple[str, list[str]]], named: set[str]) -> None:
        """Note by which keys reports may name series: the one file of a series; of several, those that are named."""
        for name, paths in plans:
            if len(paths) == 1 or named:
                keys = {key for path in paths for key in image_keys(self._pseudonyms, path)}
                if keys := keys if len(paths) == 1 else keys & named:
                    self._keys.setdefault(name, set()).update(keys)

    def _images(self) -> dict[str, str]:
        """Series by key; a key that two series have says nothing."""
        images: dict[str, str] = {}
        ambiguous = set()
        for name, keys in self._keys.items():
            for key in keys:
                if images.setdefault(key, name) != name:
                    ambiguous.add(key)
        return {key: name for key, name in images.items() if key not in ambiguous}

    def _load(self) -> bool:
        """Whether there is a file under this key.

        Raises:
            ValueError, KeyError, TypeError: it is damaged.
        """
        try:
            lines = map(json.loads, self._path.read_bytes().splitlines())
        except FileNotFoundError:
            return False
        if next(lines, None) != self._head:
            return False
        path, file = "", _File(0, 0, "")
        for line in lines:
            if "series" in line:
                self._keys[line["series"]] = set(line["keys"])
            elif "file" in line:
                path, file = line["file"], _File(line["size"], line["mtime_ns"], line["stamp"])
                self._files[path] = file
            elif "refusal" in line:
                file.refused.append((line["line"], Refusal(*line["refusal"])))
            else:
                file.reports.append(Report(**{**line, "images": tuple(line["images"]), "path": Path(path)}))
        return True

    def _lines(self) -> Iterator[dict[str, Any]]:
        yield self._head
        for name in sorted(self._keys):
            yield {"series": name, "keys": sorted(self._keys[name])}
        for path, file in sorted(self._files.items()):
            yield {"file": path, "size": file.size, "mtime_ns": file.mtime_ns, "stamp": file.stamp}
            for line, refusal in file.refused:
                yield {"line": line, "refusal": (refusal.code, refusal.reason, refusal.mend)}
            for report in file.reports:
                yield {name: value for name, value in asdict(report).items() if name != "path"}


def _entry(path: str, line: int, refusal: Refusal) -> Row:
    """An entry of a file of reports."""
    return row(path, Refusal(refusal.code, f"line {line}: {refusal.reason}", refusal.mend))


def _write(path: Path, lines: Iterable[str]) -> None:
    aside = path.with_name(f".{path.name}")
    with open(aside, "w", encoding="utf-8", errors="replace") as file:  # half a pair of surrogates is no text
        file.writelines(f"{line}\n" for line in lines)
    replace(aside, path)
