"""Files of reports: which they are, and what stands in them.

| format | what it looks like |
|---|---|
| JSON | one object, or a list of them; keys as in `record.ALIASES` |
| JSON Lines | an object a line |
| CSV | a row of headings; `,`, `;`, tab or `|` between columns; UTF-8, with or without a byte-order mark |
| XML | Open-i's `eCitation`: `AbstractText` with a `Label`, `parentImage` with the id of a picture |

A file that cannot be read is refused as a whole; an entry that cannot be used is refused alone.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megamed.data.privacy import Pseudonyms
from megamed.data.readers.base import Refusal
from megamed.data.reports.base import Reading, Report
from megamed.data.reports.record import is_report, to_report

# What is read at once is bounded, whatever the file says: lines and rows, and files that are one value.
MAX_LINE = 1 << 22
MAX_WHOLE = 1 << 28
MAX_XML = 1 << 24
# What is looked at to tell reports from other files of the same formats (a sidecar of BIDS, say).
_LOOK = 1 << 16
_ENDINGS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".xml": "xml"}
_KEY = re.compile(r'"([^"\\\n]{1,40})"\s*:')
_UTF_8 = Refusal("report-encoding", "a file of reports that is not UTF-8", "turn it into UTF-8, with iconv for example")

Entry = tuple[int, dict[str, Any] | Refusal]


def can_read(path: Path, head: bytes) -> bool:
    """Whether a file holds reports, by its name, its first bytes, and where need be its first 64 KiB. Never raises.

    Args:
        path: the file.
        head: its first 1024 bytes.
    """
    kind = _ENDINGS.get(path.suffix.lower(), "")
    if not kind:
        return False
    if kind == "xml":
        return b"<eCitation" in head
    if kind != "csv" and not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"[")):
        return False
    try:
        with open(path, "rb") as file:
            text = file.read(_LOOK).decode("utf-8-sig", errors="replace")
    except OSError:
        return False
    if kind == "csv":
        return any(is_report(row) for row in _headings(text).values())
    return is_report(_KEY.findall(text))


def read(path: Path, pseudonyms: Pseudonyms) -> Reading:
    """The reports of a file, scrubbed and with pseudonyms for identifiers.

    Raises:
        Refusal: the file cannot be read; what it gives as its line is where that was seen.
    """
    entries: dict[str, Callable[[Path], Iterator[Entry]]] = {
        "json": _json, "jsonl": _json_lines, "csv": _csv, "xml": _xml,
    }
    reports: list[Report] = []
    refused: list[tuple[int, Refusal]] = []
    for line, entry in entries[_ENDINGS[path.suffix.lower()]](path):
        try:
            if isinstance(entry, Refusal):
                raise entry
            reports.append(to_report(entry, pseudonyms, path, line))
        except Refusal as refusal:
            refused.append((line, refusal))
    return Reading(reports, refused)


def _json(path: Path) -> Iterator[Entry]:
    try:
        values = json.loads(_whole(path, MAX_WHOLE))
    except (ValueError, RecursionError) as error:
        if not isinstance(error, json.JSONDecodeError):
            raise Refusal("report-json", "a file of reports that is no JSON", "mend it") from None
        if error.msg == "Extra data":  # one object after another
            yield from _json_lines(path)
            return
        raise Refusal("report-json", f"a file of reports that is no JSON, from line {error.lineno} on",
                      "mend it, or give one object a line as .jsonl") from None
    for number, value in enumerate(values if isinstance(values, list) else [values], 1):
        yield number, value if isinstance(value, dict) else _no_object()


def _json_lines(path: Path) -> Iterator[Entry]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                raise Refusal("report-line", f"line {number} has more than 4 MiB", "give one report a line")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                yield number, Refusal("report-json", "a line that is no JSON", "write one JSON object a line, in UTF-8")
                continue
            yield number, value if isinstance(value, dict) else _no_object()


def _no_object() -> Refusal:
    return Refusal("report-json", "an entry that is no object", 'give {"findings": ..., "StudyInstanceUID": ...}')


def _csv(path: Path) -> Iterator[Entry]:
    csv.field_size_limit(MAX_LINE)
    begins = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            start = file.read(_LOOK)
            rows_by = {mark: row for mark, row in _headings(start).items() if is_report(row)}
            if not rows_by:
                raise Refusal("report-columns", "a table without columns for a report and what it is about",
                              "name columns findings, impression or report, and StudyInstanceUID or accession")
            mark = max(rows_by, key=lambda mark: len(rows_by[mark]))
            file.seek(0)
            rows = csv.reader(_bounded(file), delimiter=mark, strict=True)
            headings = next(rows)
            begins = rows.line_num + 1
            for row in rows:
                if len(row) == len(headings):
                    yield begins, dict(zip(headings, row, strict=True))
                elif row:
                    what = f"a row of {len(row)} columns under {len(headings)} headings"
                    yield begins, Refusal("report-columns", what, "put such texts in double quotes")
                begins = rows.line_num + 1
    except UnicodeDecodeError:
        raise _UTF_8 from None
    except csv.Error:
        raise Refusal("report-csv", f"a table that cannot be read from line {begins} on",
                      "put texts in double quotes, and close each of them") from None


def _bounded(file: io.TextIOBase) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE and not line.endswith("\n"):
            raise Refusal("report-line", f"line {number} has more than 4 MiB", "give one report a row")
        yield line


def _headings(text: str) -> dict[str, list[str]]:
    """The first row, by what might stand between columns."""
    first = text.splitlines()[:1]
    found = {}
    for mark in ",;\t|":
        try:
            found[mark] = next(csv.reader(first, delimiter=mark), [])
        except csv.Error:
            continue
    return found


def _xml(path: Path) -> Iterator[Entry]:
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    try:
        root = fromstring(_whole(path, MAX_XML), forbid_dtd=True)
    except ParseError as error:
        line, _ = error.position
        raise Refusal("report-xml", f"a report that is no XML, from line {line} on", "copy it again") from None
    except (DefusedXmlException, ValueError, LookupError):
        raise Refusal("report-xml", "a report in XML with definitions of its own", "leave it out") from None
    if root.tag != "eCitation":
        raise Refusal("report-xml", "a report in XML, but not Open-i's", "turn it into JSON or CSV")
    record: dict[str, Any] = {"images": [image.get("id") for image in root.iter("parentImage")]}
    for part in root.iter("AbstractText"):
        label = part.get("Label", "report")
        record[label] = [*record.get(label, []), "".join(part.itertext())]
    study = root.find("uId")
    if study is not None:
        record["study"] = study.get("id")
    yield 1, record


def _whole(path: Path, at_most: int) -> bytes:
    with open(path, "rb") as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise Refusal("report-too-large", f"a file of more than {at_most >> 20} MiB that has to be read as a whole",
                      "give one report a line as .jsonl, or a row as .csv")
    return content
