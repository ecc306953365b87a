"""Which pictures may hold a name in their pixels.

BurnedInAnnotation (0028,0301) says it, where it is written; most objects do not have it, and then nobody knows. What
counts as clean without it is decided here:

| object | the tag says NO | no tag |
|---|---|---|
| CT, MR, PET, NM: slices | used | used: scanners reconstruct them, text is kept in overlays |
| CR, DX, MG, XA and other X-rays, PRIMARY | used | used |
| the same, SECONDARY (processed or annotated elsewhere) | used | refused |
| photographs, PRIMARY | used | used |
| the same, SECONDARY; endoscopy | used | refused: its processors write the patient's name into the picture |
| ultrasound | used | refused |
| secondary captures: pictures of screens and films | used | refused |

YES is refused everywhere, and so are recognisable visual features (0028,0302), whatever else the header says.
"""

from __future__ import annotations

from megamed.data.readers.base import Refusal
from megamed.data.readers.dicom.codes import ENDOSCOPIC, ObjectKind

_REVIEW = "look at the picture, black out what names a person, and set BurnedInAnnotation to NO"


def check_pixels_name_nobody(
    kind: ObjectKind, sop_class: str, secondary: bool, burned_in: str, recognizable: str
) -> None:
    """Apply the table.

    Args:
        kind: what the object is.
        sop_class: its class.
        secondary: value 2 of ImageType is SECONDARY.
        burned_in: BurnedInAnnotation, empty where it is missing.
        recognizable: RecognizableVisualFeatures, empty where it is missing.

    Raises:
        Refusal: somebody may be named, or be recognised.
    """
    if burned_in == "YES":
        raise Refusal("burned-in-annotation", "the header says that text is burnt into the pixels", _REVIEW)
    if recognizable == "YES":
        raise Refusal("recognizable", "the header says that a person can be recognised", "leave the picture out")
    if burned_in == "NO":
        return
    if kind == "capture":
        raise Refusal("secondary-capture", "a picture of a screen or film, which may have a name in it", _REVIEW)
    if kind == "ultrasound":
        raise Refusal("ultrasound", "an ultrasound picture, which may have a name in it", _REVIEW)
    if sop_class == ENDOSCOPIC or (secondary and kind != "stack"):
        raise Refusal("burned-in-unknown", "a picture that may have text burnt into it", _REVIEW)
