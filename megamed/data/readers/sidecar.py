"""What lies beside a NIfTI file and what its name says: BIDS and dcm2niix (https://bids-specification.readthedocs.io).

Of `NAME.json` the keys below count and nothing else; of words, only DICOM's codes and the terms of
`megamed.data.keywords`. Of `NAME.bval`, the numbers. Of the name only its last word, where BIDS knows it: the others
may be somebody's.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamed.data.keywords import find_keywords
from megamed.data.readers.dicom.codes import BODY_PARTS, MODALITIES, UNITS
from megamed.data.readers.paths import without_suffix

_MOST_BYTES = 4 << 20

# The last word of a name, behind `_`.
_MODALITY_OF_SUFFIX = {
    **dict.fromkeys(
        """bold cbv sbref dwi asl m0scan T1w T2w PDw T2starw FLAIR PDT2 inplaneT1 inplaneT2 angio T1rho T2star MESE
        MEGRE VFA IRT1 MP2RAGE MPM UNIT1 epi fieldmap magnitude magnitude1 magnitude2 phasediff phase1 phase2
        T1map T2map R1map R2map T2starmap R2starmap PDmap MTRmap MTsat Chimap""".split(), "MR",
    ),
    **dict.fromkeys(("ct", "CT"), "CT"),
    **dict.fromkeys(("pet", "PET"), "PT"),
}
# What the last word says of an image as a description would.
_KEYWORD_OF_SUFFIX = {
    "bold": "fmri", "dwi": "diffusion", "flair": "flair", "t1w": "t1", "t2w": "t2", "pdw": "proton density",
    "angio": "angiography", "asl": "perfusion", "pet": "pet",
}  # fmt: skip
# Keys of free text.
_DESCRIPTIONS = ("StudyDescription", "SeriesDescription", "ProtocolName", "BodyPartExamined", "BodyPart")
_LABELS = {"dseg", "probseg", "mask", "defacemask", "seg", "label", "labels", "segmentation"}
_UNITS = {unit.lower(): unit for unit in UNITS.values()}


@dataclass(frozen=True)
class Beside:
    """What is known of an image beside its header; fields as `SeriesInfo` has them, None or empty where not said.

    Attributes:
        known: values by the name of the field of `SeriesInfo`.
        notes: what cannot be read.
    """

    known: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def holds_labels(path: Path) -> bool:
    """Whether a file is by its name a mask or a segmentation (BIDS derivatives, and the usual names elsewhere)."""
    return _last_word(path) in _LABELS


def look_beside(path: Path, num_volumes: int, description: str = "") -> Beside:
    """What name, `.json` and `.bval` say of a NIfTI file.

    Args:
        path: of the image.
        num_volumes: of it; there have to be as many b-values.
        description: that its header has, of which the keywords are taken.
    """
    known: dict[str, Any] = {}
    notes = []
    if modality := _MODALITY_OF_SUFFIX.get(_last_word(path)):
        known["modality"] = modality
    sidecar = path.with_name(f"{without_suffix(path)}.json")
    if sidecar.is_file():
        try:
            known |= _of_json(json.loads(_read(sidecar)))
        except (ValueError, RecursionError):
            notes.append("the JSON file beside it cannot be read")
    of_name = _KEYWORD_OF_SUFFIX.get(_last_word(path).lower(), "")
    known["keywords"] = tuple(sorted({*known.get("keywords", ()), *find_keywords([description, of_name])}))
    b_values = path.with_name(f"{without_suffix(path)}.bval")
    if b_values.is_file():
        try:
            values = tuple(float(word) for word in _read(b_values).split())
        except ValueError:
            values = ()
        if len(values) == num_volumes and all(math.isfinite(value) and value >= 0 for value in values):
            known |= {"modality": known.get("modality", "MR"), "b_values": values}
        else:
            notes.append("the b-values beside it do not fit it")
    if known.get("modality") != "MR":
        for name in ("echo_time_ms", "flip_angle_deg", "field_strength_t", "b_values"):
            known.pop(name, None)
    return Beside(known, tuple(notes))


def _read(path: Path) -> bytes:
    """ValueError: it is larger than such a file ever is."""
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError
    return path.read_bytes()


def _last_word(path: Path) -> str:
    return without_suffix(path).rpartition("_")[2]


def _of_json(values: Any) -> dict[str, Any]:
    """ValueError: it holds no keys."""
    if not isinstance(values, dict):
        raise ValueError
    found: dict[str, Any] = {
        "modality": _code(values, "Modality", MODALITIES),
        "body_part": _code(values, "BodyPartExamined", BODY_PARTS) or _code(values, "BodyPart", BODY_PARTS),
        "keywords": find_keywords(str(values.get(name) or "") for name in _DESCRIPTIONS),
        "laterality": _code(values, "Laterality", {"L", "R", "B"}),
        "units": _UNITS.get(str(values.get("Units")).lower()),
        "repetition_time_s": _number(values, "RepetitionTime"),
        "echo_time_ms": _number(values, "EchoTime", 1000),
        "flip_angle_deg": _number(values, "FlipAngle"),
        "field_strength_t": _number(values, "MagneticFieldStrength"),
        # Which agent it was is free text.
        "contrast": True if values.get("ContrastBolusAgent") or values.get("ContrastBolusIngredient") else None,
    }
    return {name: value for name, value in found.items() if value}


def _code(values: dict[str, Any], key: str, codes: set[str]) -> str | None:
    code = str(values.get(key)).strip().upper()
    return code if code in codes else None


def _number(values: dict[str, Any], key: str, factor: float = 1) -> float | None:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        return None
    return round(float(value) * factor, 6)
