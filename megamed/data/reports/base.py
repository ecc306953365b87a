"""A report as it goes on from reading: sections of scrubbed text, and pseudonyms that say which study it is about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

from megamed.data.privacy import Pseudonyms
from megamed.data.readers.base import Refusal

# In the order in which they are told.
SECTIONS = ("indication", "comparison", "technique", "findings", "impression", "report")
"""Parts of a report; `report` is all of one that has no headings."""

_ENDINGS = (".gz", ".nii", ".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


@dataclass(frozen=True)
class Report:
    """One report. Of identifiers only pseudonyms, as the store has them; empty where the source does not say.

    Attributes:
        study, accession, patient: keyed hashes.
        images: `image_keys` of the files that the report names.
        sections: text by name, of `SECTIONS`; none is empty.
        path: of the file that it was read from, which may say who somebody is: for quarantine alone.
        line: where it begins in the file, from 1; the number of the record in a JSON list.
        study_date: shifted, `YYYYMMDD`, or empty where dates are dropped.
    """

    study: str
    accession: str
    patient: str
    images: tuple[str, ...]
    sections: dict[str, str] = field(default_factory=dict)
    path: Path = Path()
    line: int = 0
    study_date: str = ""


class Reading(NamedTuple):
    """What became of a file: its reports, and the entries that cannot be used, each with its line."""

    reports: list[Report]
    refused: list[tuple[int, Refusal]]


def image_keys(pseudonyms: Pseudonyms, name: str) -> tuple[str, ...]:
    """Pseudonyms of a file by its name, whatever folder it is in: with its endings, without the last, without any.

    They are of the kind `accession`, which is what the readers of pictures and NIfTI call a file by that says nothing
    else of itself. `a/CXR1_IM-1.dcm.png` and `CXR1_IM-1` have one in common.
    """
    name = PurePath(name.replace("\\", "/")).name
    forms = [name]
    while name.lower().endswith(_ENDINGS):
        name = name[: name.rindex(".")]
        forms.append(name)
    return tuple(pseudonyms.of("accession", form) for form in forms)


def image_names(files: Iterable[tuple[str, str]], pseudonyms: Pseudonyms) -> dict[str, str]:
    """Series by the `image_keys` of their files, for `samples.from_reports`.

    A name that files of two series have says nothing (`I10` stands on every CD) and is left out.

    Args:
        files: path of a source file, and the series in the store that was made of it.
        pseudonyms: of the project.
    """
    names: dict[str, str] = {}
    ambiguous = set()
    for path, series in files:
        for key in image_keys(pseudonyms, path):
            if names.setdefault(key, series) != series:
                ambiguous.add(key)
    return {key: series for key, series in names.items() if key not in ambiguous}
