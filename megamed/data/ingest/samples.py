"""The last part of an ingest: reports that lie among the sources, and `samples.jsonl` made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megamed.data.ingest.pool import Item, Pool, Task
from megamed.data.ingest.quarantine import Row, row
from megamed.data.ingest.scan import Files
from megamed.data.privacy import Pseudonyms
from megamed.data.readers import Refusal
from megamed.data.reports import Report, image_keys, image_names
from megamed.data.samples import from_reports
from megamed.data.store import VolumeStore
from megamed.data.store.index import replace

SAMPLES = "samples.jsonl"


def read_reports(pool: Pool, files: Files, seconds: float, num_bytes: int) -> tuple[list[Report], list[Row], list[str]]:
    """Reports of all files, entries that are refused, and tracebacks of what was raised by mistake.

    Args:
        pool: of workers with a `Toolbox`.
        files: of the scan.
        seconds, num_bytes: for one file.
    """
    reports: list[Report] = []
    rows: list[Row] = []
    tracebacks: list[str] = []
    for number, path in enumerate(files.reports):
        order = path, {path: files.place_of(path)}, f"reports.{number}"
        pool.submit(Task("read_reports", order, seconds, num_bytes, note=path))
    while not pool.idle:
        for event in pool.wait():
            path = event.task.note
            if isinstance(event, Item):
                reports += event.value.reports
                rows += [_row(path, line, refusal) for line, refusal in event.value.refused]
            elif event.refusal is not None:
                rows.append(row(path, event.refusal))
                tracebacks.append(event.traceback)
    return reports, rows, tracebacks


def write_samples(
    store: VolumeStore, reports: list[Report], files: Iterable[tuple[str, str]], pseudonyms: Pseudonyms
) -> tuple[int, list[Row]]:
    """Write `samples.jsonl` anew.

    Lines that were there stay, unless a report is about the same series, or one of their series is gone.

    Args:
        store: with all its series.
        reports: of this run.
        files: path and series of every file; looked at if a report names files.
        pseudonyms: of the project.

    Returns:
        Lines that the file has now, and the reports whose study is not in the store.
    """
    named = {key for report in reports for key in report.images}
    images = image_names(_of_names(files, named, pseudonyms), pseudonyms) if named else {}
    new, unmatched = from_reports(reports, store.records(), images)
    path = store.root / SAMPLES
    told_of = {_series(line) for line in new}
    old = [line for line in _lines(path) if _series(line) not in told_of]
    kept = [line for line in old if all(series in store for series in _series(line))]
    texts = {json.dumps(line, sort_keys=True): json.dumps(line, ensure_ascii=False) for line in [*kept, *new]}
    if texts or path.exists():
        aside = path.with_name(f".{SAMPLES}")
        aside.write_text("".join(f"{texts[key]}\n" for key in sorted(texts)), encoding="utf-8")
        replace(aside, path)
    no_study = Refusal("no-study", "a report of a study that is not in the store", "ingest the study, too")
    return len(texts), [_row(os.fspath(report.path), report.line, no_study) for report in unmatched]


def _row(path: str, line: int, refusal: Refusal) -> Row:
    """An entry of a file of reports."""
    return row(path, Refusal(refusal.code, f"line {line}: {refusal.reason}", refusal.mend))


def _of_names(
    files: Iterable[tuple[str, str]], named: set[str], pseudonyms: Pseudonyms
) -> Iterator[tuple[str, str]]:
    """The files that reports name; of a million files, what all could be called would fill the memory."""
    return (file for file in files if not named.isdisjoint(image_keys(pseudonyms, file[0])))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


def _series(line: dict[str, Any]) -> tuple[str, ...]:
    return tuple(study["series"] for study in line["studies"])
