"""Samples of reports: the study is shown, the report is the answer."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from megamed.data.reports import Report
from megamed.data.store import SeriesRecord

# Ways to ask for what the report has. Which one a study gets hangs on the study alone.
_ASKED = {
    ("findings", "impression"): (
        "Write the report of this study: findings, then impression.",
        "Report this study.",
        "What does this study show, and what is your impression?",
        "Describe the findings and conclude with an impression.",
    ),
    ("findings",): ("Describe the findings.", "What does this study show?", "Write the findings of the report."),
    ("impression",): ("What is your impression?", "Sum up this study.", "Write the impression of the report."),
    ("report",): ("Write the report of this study.", "Report this study.", "Read this study."),
}
_CONTEXT = ("indication", "comparison")
_PLANES = ("axial", "coronal", "sagittal", "none")
# A tag that stands in a report by chance would be taken for one.
_TAG = re.compile(r"<(image|video|study)>")


def from_reports(
    reports: Iterable[Report], records: Iterable[SeriesRecord], images: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], list[Report]]:
    """Lines of `samples.jsonl`, one for each report whose study is in the store.

    A report belongs to the series of its study; where it names none that is there, to those of its accession number;
    else to those made of the files it names; else, where dates are kept (shifted), to its patient's study of that day,
    if there is one only.

    Args:
        reports: of any files, in any order.
        records: the store's.
        images: series by `reports.image_keys` of the files they were made of, from `reports.image_names`.

    Returns:
        The lines, in an order that hangs on their content alone, each once; and the reports whose study is not there.
    """
    series = _Series(records, images or {})
    lines: dict[str, dict[str, Any]] = {}
    unmatched = []
    for report in reports:
        found = series.of(report)
        if not found:
            unmatched.append(report)
            continue
        line = _sample(report, [record.series for record in found])
        lines[json.dumps(line, sort_keys=True)] = line
    return [lines[key] for key in sorted(lines)], unmatched


class _Series:
    """The store's series, by all that a report may say of them."""

    def __init__(self, records: Iterable[SeriesRecord], images: Mapping[str, str]):
        self._images = images
        self._by_name: dict[str, SeriesRecord] = {}
        self._by_study: dict[str, list[SeriesRecord]] = defaultdict(list)
        self._by_accession: dict[str, list[SeriesRecord]] = defaultdict(list)
        self._by_day: dict[tuple[str, str], list[SeriesRecord]] = defaultdict(list)
        for record in records:
            self._by_name[record.series] = record
            if record.study:
                self._by_study[record.study].append(record)
            if record.accession:
                self._by_accession[record.accession].append(record)
            if record.patient and record.study_date:
                self._by_day[record.patient, record.study_date].append(record)

    def of(self, report: Report) -> list[SeriesRecord]:
        """The series that a report is about, in the order in which they are shown; none where that cannot be told."""
        found = self._by_study.get(report.study) or self._by_accession.get(report.accession)
        if found:
            return sorted(found, key=_order)
        named = [record for image in report.images for record in self._named(image)]
        if named:
            return list({record.series: record for record in named}.values())
        that_day = self._by_day.get((report.patient, report.study_date), [])
        return sorted(that_day, key=_order) if len({record.study for record in that_day}) == 1 else []

    def _named(self, image: str) -> list[SeriesRecord]:
        """The series made of a file, if there is one only."""
        record = self._by_name.get(self._images.get(image, ""))
        found = [record] if record is not None else self._by_accession.get(image, [])
        return found if len(found) == 1 else []


def _order(record: SeriesRecord) -> tuple[Any, ...]:
    """By what a series is, and by its name where two are alike."""
    info = record.info
    return info.modality, _PLANES.index(info.plane), info.part, -math.prod(info.shape[:2]), record.series


def _sample(report: Report, series: list[str]) -> dict[str, Any]:
    sections = {name: _TAG.sub(r"\1", text) for name, text in report.sections.items()}
    answered = tuple(name for name in ("findings", "impression") if name in sections) or ("report",)
    ways = _ASKED[answered]
    asked = ways[hashlib.sha256(" ".join(series).encode()).digest()[0] % len(ways)]
    context = [f"{name.capitalize()}: {sections[name]}" for name in _CONTEXT if name in sections]
    answer = sections[answered[0]] if len(answered) == 1 else \
        "\n".join(f"{name.capitalize()}: {sections[name]}" for name in answered)
    return {
        "messages": [
            {"role": "user", "content": "<study>" * len(series) + "\n".join([*context, asked])},
            {"role": "assistant", "content": answer},
        ],
        "studies": [{"series": name} for name in series],
    }
