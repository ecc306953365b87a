"""What of a DICOM header may be read, and what becomes of it: a whitelist, over the basic profile of PS3.15 Annex E.

The profile (Table E.1-1) names what has to go, and lets everything else stay. Here nothing stays but what `TABLE`
names: a reader asks for these attributes alone, so what a scanner invents tomorrow is never read. Of a file's values
only those go on that have a place in `SeriesInfo` or `Identity`: numbers, code strings, pseudonyms.

Actions of Table E.1-1: X remove, Z empty or a value of no meaning, D a value of no meaning, U replace a UID
consistently, C clean, K keep; several with a stroke between them depend on the object. An attribute that the table
does not have may be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydicom.datadict import tag_for_keyword

Kept = Literal["pseudonym", "date", "number", "code", "terms", "code and terms", "flag", "order", "filter"]

# What becomes of a value, in words, for the documentation.
MEANING: dict[Kept, str] = {
    "pseudonym": "a keyed hash stands for it",
    "date": "dropped, or shifted by one patient's own number of days",
    "number": "the number, or what is computed from it",
    "code": "a code string, where it is one of those that are known",
    "terms": "which terms of a closed list it has",
    "code and terms": "a code string, where it is one of those that are known, and which terms of a closed list it has",
    "flag": "only whether there is one",
    "order": "only differences between the files of a series",
    "filter": "decides whether and how a file is read; not kept",
}

_DATES = "Retain Longitudinal Temporal Information With Modified Dates"
_DESCRIPTORS = "Clean Descriptors"
_PRIVATE = "Retain Safe Private"


@dataclass(frozen=True)
class Rule:
    """One attribute.

    Attributes:
        tag: group and element in one number; of a private attribute with 10 for its block (0x00191028).
        keyword: DICOM's, or a name for a private attribute.
        kept: what becomes of its value.
        action: of the basic profile; empty where Table E.1-1 does not have the attribute.
        option: of the profile, under which it may be kept this way; empty where the basic profile allows it.
        creator: private creator of a private attribute.
    """

    tag: int
    keyword: str
    kept: Kept
    action: str = ""
    option: str = ""
    creator: str = ""


def _rules(kept: Kept, keywords: str, action: str = "", option: str = "") -> list[Rule]:
    """Attributes by DICOM's keywords."""
    return [Rule(_tag(keyword), keyword, kept, action, option) for keyword in keywords.split()]


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return int(tag)


TABLE: tuple[Rule, ...] = (
    *_rules("pseudonym", "SOPInstanceUID ConcatenationUID StudyInstanceUID SeriesInstanceUID", "U"),
    *_rules("pseudonym", "AccessionNumber PatientName", "Z"),
    *_rules("pseudonym", "PatientID", "Z/D"),
    *_rules("date", "StudyDate", "Z", _DATES),
    *_rules("date", "SeriesDate", "X/D", _DATES),
    *_rules("date", "AcquisitionDate", "X/Z", _DATES),
    *_rules("order", "AcquisitionTime", "X/Z", _DATES),
    *_rules("order", "ContentTime", "Z/D", _DATES),
    *_rules("order", "AcquisitionDateTime", "X/Z/D", _DATES),
    *_rules("order", "FrameAcquisitionDateTime FrameReferenceDateTime", "D", _DATES),
    *_rules("terms", "StudyDescription SeriesDescription", "X", _DESCRIPTORS),
    *_rules("terms", "ProtocolName", "X/D", _DESCRIPTORS),
    *_rules("flag", "ContrastBolusAgent", "Z/D", _DESCRIPTORS),
    *_rules("flag", "ContrastBolusAgentSequence"),
    *_rules("code and terms", "BodyPartExamined"),
    *_rules("code", """Modality Laterality ImageLaterality FrameLaterality ViewPosition Units
            RescaleType"""),
    *_rules("order", """SeriesNumber AcquisitionNumber FrameAcquisitionNumber InstanceNumber InConcatenationNumber
            InConcatenationTotalNumber TemporalPositionIdentifier TemporalPositionIndex TriggerTime
            NominalCardiacTriggerDelayTime FrameReferenceTime StackID InStackPositionNumber DimensionIndexPointer
            DimensionIndexValues SliceVector ImageType FrameType ComplexImageComponent SliceLocation"""),
    *_rules("number", """Rows Columns NumberOfFrames RescaleSlope RescaleIntercept WindowCenter WindowWidth
            ImagePositionPatient ImageOrientationPatient PixelSpacing ImagerPixelSpacing NominalScannedPixelSpacing
            SliceThickness SpacingBetweenSlices EchoTime EffectiveEchoTime RepetitionTime FlipAngle
            MagneticFieldStrength DiffusionBValue PixelData"""),
    *_rules("filter", """TransferSyntaxUID MediaStorageSOPClassUID SOPClassUID SpecificCharacterSet BurnedInAnnotation
            RecognizableVisualFeatures MRAcquisitionType SamplesPerPixel PhotometricInterpretation PlanarConfiguration
            BitsAllocated BitsStored HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit
            ModalityLUTSequence LUTDescriptor LUTData RedPaletteColorLookupTableDescriptor
            GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor
            RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
            SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
            SegmentedBluePaletteColorLookupTableData"""),
    # Sequences are kept for what stands in them, by the rules above.
    *_rules("filter", """SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence FrameContentSequence
            PixelMeasuresSequence PlanePositionSequence PlaneOrientationSequence PixelValueTransformationSequence
            FrameVOILUTSequence FrameAnatomySequence MREchoSequence MRDiffusionSequence
            MRTimingAndRelatedParametersSequence MRImageFrameTypeSequence CTImageFrameTypeSequence
            PETFrameTypeSequence CardiacSynchronizationSequence DimensionIndexSequence DetectorInformationSequence"""),
    Rule(0x0019100A, "number of tiles of a mosaic", "number", "X", _PRIVATE, "SIEMENS MR HEADER"),
    Rule(0x0019100C, "b-value", "number", "X", _PRIVATE, "SIEMENS MR HEADER"),
    Rule(0x00291010, "CSA image header: tiles, b-value, normal", "number", "X", _PRIVATE, "SIEMENS CSA HEADER"),
    Rule(0x00431039, "b-value", "number", "X", _PRIVATE, "GEMS_PARM_01"),
    Rule(0x0043102F, "magnitude, phase, real or imaginary", "order", "X", _PRIVATE, "GEMS_PARM_01"),
    Rule(0x20011003, "b-value", "number", "X", _PRIVATE, "Philips Imaging DD 001"),
)

_PUBLIC = frozenset(rule.tag for rule in TABLE if not rule.creator)
# Private blocks lie where a file puts them: only group and last byte are sure.
_IN_BLOCKS = frozenset((rule.tag >> 16, rule.tag & 0xFF) for rule in TABLE if rule.creator)
_WITH_BLOCKS = frozenset(group for group, _ in _IN_BLOCKS)


def may_read(tag: int) -> bool:
    """Whether a reader may ask for an attribute: one of `TABLE`, or a private creator's name in a group of it."""
    group, element = tag >> 16, tag & 0xFFFF
    if group % 2 == 0:
        return tag in _PUBLIC
    if 0x10 <= element <= 0xFF:
        return group in _WITH_BLOCKS
    return (group, element & 0xFF) in _IN_BLOCKS


def markdown() -> str:
    """`TABLE` for the documentation."""
    lines = ["| tag | attribute | PS3.15 | option | what becomes of it |", "|---|---|---|---|---|"]
    for rule in sorted(TABLE, key=lambda rule: rule.tag):
        group, element = f"{rule.tag >> 16:04X}", f"{rule.tag & 0xFFFF:04X}"
        name = f"{rule.creator}: {rule.keyword}" if rule.creator else rule.keyword
        tag = f"({group},xx{element[2:]})" if rule.creator else f"({group},{element})"
        lines.append(f"| {tag} | {name} | {rule.action or '-'} | {rule.option or '-'} | {MEANING[rule.kept]} |")
    return "\n".join(lines) + "\n"
