"""From one record of any source, keys and values as they come, to a `Report`.

Keys are compared without case, spaces and signs (`StudyInstanceUID`, `study_instance_uid`). What `ALIASES` does not
have is not read, but for keys that speak of a person: their values are taken out of the report's text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megamed.data.privacy import Pseudonyms
from megamed.data.readers.base import Refusal
from megamed.data.reports.base import SECTIONS, Report, image_keys
from megamed.data.reports.scrub import scrub

# What a key means, by how it is written in the wild.
ALIASES: dict[str, tuple[str, ...]] = {
    "report": ("report", "text", "reporttext", "fullreport", "rawreport", "rawtext", "reportcontent", "narrative"),
    "findings": ("findings", "finding", "observations", "befund"),
    "impression": ("impression", "impressions", "conclusion", "conclusions", "opinion", "beurteilung"),
    "indication": ("indication", "indications", "clinicalindication", "clinicalinformation", "clinicalhistory",
                   "history", "reasonforexam", "reasonforexamination", "reasonforstudy"),
    "comparison": ("comparison", "comparisons", "priorstudies"),
    "technique": ("technique", "procedure", "examtechnique"),
    "study": ("studyinstanceuid", "studyuid", "studyid", "study", "uid"),
    "accession": ("accession", "accessionnumber", "accessionno", "accessionid", "accno"),
    "patient": ("patientid", "patient", "subjectid", "subject", "mrn", "pid"),
    "date": ("studydate", "examdate", "examinationdate", "date"),
    "images": ("images", "image", "imageid", "imageids", "imagename", "imagepath", "imagepaths", "imagefile",
               "filename", "filenames", "file", "path", "dicomid", "dicomids", "parentimage"),
}
_MEANING = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
_IDENTIFIERS = ("study", "accession", "patient", "images")
# Other keys whose values speak of people.
_PERSONAL = re.compile(
    r"names?|(?:\w*(?:patients?|person|first|last|middle|family|given|full|sur|birth|maiden|physicians?|doctors?|"
    r"radiologists?|operators?|technologists?|authors?|institution|hospital))names?|\w*birth(?:date|day|name)|dob|"
    r"dateofbirth|\w*(?:physicians?|doctors?|radiologists?|clinicians?|operators?|technologists?|authors?|signature|"
    r"referrer|hospital|institution|address|phone|telephone|email|mrn|ssn)|\w*(?:signed|dictated|transcribed)by|"
    r"\w*(?:patient|subject|visit|encounter|order|record|person|account|exam|insurance|series|instance)"
    r"(?:id|uid|number|no)"
)
_HEADINGS = {
    "indication": r"indications?|clinical (?:indication|information|history|details|data)|history|"
                  r"reason for (?:exam(?:ination)?|study|the exam(?:ination)?)",
    "comparison": r"comparisons?(?: stud(?:y|ies))?|prior stud(?:y|ies)",
    "technique": r"technique|procedure(?: and technique)?|protocol",
    "findings": r"findings?(?: (?:and|/) impressions?)?|observations?|befund",
    "impression": r"(?:final )?impressions?|conclusions?|opinion|beurteilung|"
                  r"recommendations?|recommendation\(s\)",
    # What follows these is no part of the report.
    "": r"examination|exam|study|final report|wet read|notification|attestation",
}
_HEADING = re.compile(
    # At the beginning of a line in any letters, within one only in capitals.
    r"(?:^|\n)[ \t]*(?P<line>" + "|".join(_HEADINGS.values()) + r")[ \t]*(?::|\n)|"
    r"(?<=\s)(?-i:(?P<inline>[A-Z][A-Z ]{5,30})):",
    re.IGNORECASE,
)
MAX_TEXT = 1 << 20
# A longer value is a text, and its words are those of any report.
MAX_KNOWN = 200


def meaning(key: str) -> str:
    """What a key stands for, one of `ALIASES`; empty where it is none of them."""
    return _MEANING.get(_plain(key), "")


def is_report(keys: Iterable[str]) -> bool:
    """Whether keys are those of reports: a text, and something that says what it is about."""
    found = {meaning(key) for key in keys}
    return bool(found & {"report", "findings", "impression"}) and bool(found & set(_IDENTIFIERS))


def to_report(record: Mapping[str, Any], pseudonyms: Pseudonyms, path: Path, line: int) -> Report:
    """A record as a report.

    Raises:
        Refusal: it has no text, names nothing that it is about, or a value is not what it should be.
    """
    values: dict[str, list[str]] = {}
    known: list[str] = []
    for key, value in record.items():
        name = meaning(key)
        personal = name in ("study", "accession", "patient", "date") or _PERSONAL.fullmatch(_plain(key)) is not None
        if not name and not personal:
            continue
        if name not in (*SECTIONS, "") and _is_nested(value):
            raise Refusal("report-nested", "an identifier that is an object", "give texts, numbers or lists of them")
        texts = list(_texts(value))
        if name:
            values.setdefault(name, []).extend(texts)
        if personal:
            known += [text for text in texts if len(text) <= MAX_KNOWN]
    sections = _sections(values)
    if not sections.keys() & {"findings", "impression", "report"}:
        raise Refusal("report-empty", "a report without text", "give findings, impression or report, or leave it out")
    if sum(map(len, sections.values())) > MAX_TEXT:
        raise Refusal("report-too-long", "a report of more than a million characters", "give one report an entry")
    if not any(values.get(name) for name in _IDENTIFIERS):
        raise Refusal("report-of-nothing", "a report that does not say which study it is about",
                      "give StudyInstanceUID, accession, patient with date, or the images' file names")
    study, accession, patient, date = (
        next(iter(values.get(name, ())), "") for name in ("study", "accession", "patient", "date")
    )
    scrubbed = {name: scrub(text, known).strip() for name, text in sections.items()}
    return Report(
        # A number alone is no UID: MIMIC-CXR's tables have 50414267 for the study in the folder s50414267.
        study=pseudonyms.of("study", f"s{study}" if study.isdecimal() else study),
        accession=pseudonyms.of("accession", accession), patient=pseudonyms.of("patient", patient),
        images=tuple(dict.fromkeys(key for image in values.get("images", ()) for key in image_keys(pseudonyms, image))),
        sections={name: text for name, text in scrubbed.items() if text}, path=path, line=line,
        study_date=pseudonyms.date(patient, re.sub(r"\D", "", date)[:8]),
    )


def split(text: str) -> dict[str, str]:
    """The sections of a report's text by its headings; all of it as `report` where there are none."""
    found: dict[str, list[str]] = {}
    name, start, any_known = "", 0, False
    for match in _HEADING.finditer(text):
        heading = (match["line"] or match["inline"]).strip()
        section = _section_of(heading)
        if section is None:
            continue
        found.setdefault(name, []).append(text[start : match.start()])
        name, start, any_known = section, match.end(), any_known or bool(section)
    found.setdefault(name, []).append(text[start:])
    if not any_known:
        return {"report": text.strip()}
    joined = {name: "\n".join(part.strip() for part in parts if part.strip()) for name, parts in found.items()}
    return {name: joined[name] for name in SECTIONS if joined.get(name)}


def _section_of(heading: str) -> str | None:
    for name, pattern in _HEADINGS.items():
        if re.fullmatch(pattern, heading, re.IGNORECASE):
            return name
    return None


def _sections(values: Mapping[str, list[str]]) -> dict[str, str]:
    """Of separate fields, or else of the text of all."""
    given = {name: "\n".join(values[name]).strip() for name in SECTIONS if values.get(name)}
    given = {name: text for name, text in given.items() if text}
    whole = given.pop("report", "")
    if whole and not given.keys() & {"findings", "impression"}:
        given = {**given, **split(whole)}
    return {name: given[name] for name in SECTIONS if name in given}


def _texts(value: Any) -> Iterator[str]:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    else:
        text = str(value).strip(" \0\t\r\n")
        if text and text.lower() not in ("nan", "none", "null", "n/a"):
            yield text


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_is_nested, value)))


def _plain(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "", key.lower())
