"""What the scan makes of one DICOM file: whose it is, whether it can be used, and the facts to group it by."""

from __future__ import annotations

import math
from pathlib import Path

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from megamed.data.keywords import find_keywords
from megamed.data.privacy import Pseudonyms
from megamed.data.readers.base import FileHeader, Identity, Refusal
from megamed.data.readers.dicom import codecs, codes
from megamed.data.readers.dicom.burned_in import check_pixels_name_nobody
from megamed.data.readers.dicom.elements import number, numbers, private_tags, text, texts, whole, word, words
from megamed.data.readers.dicom.facts import AGAIN, LOCALIZER, Facts, Frame
from megamed.data.readers.dicom.frames import frames_of
from megamed.data.readers.dicom.parse import UNDEFINED, Parsed, parse, quiet

_IDENTITY = (
    "SpecificCharacterSet PatientID PatientName StudyInstanceUID SeriesInstanceUID SeriesNumber SOPInstanceUID "
    "AccessionNumber StudyDate SeriesDate AcquisitionDate"
)
_IMAGE = (
    "SOPClassUID Modality ImageType Rows Columns SamplesPerPixel PhotometricInterpretation PlanarConfiguration "
    "BitsAllocated BitsStored HighBit PixelRepresentation NumberOfFrames RescaleSlope RescaleIntercept RescaleType "
    "ModalityLUTSequence PixelPaddingValue PixelPaddingRangeLimit WindowCenter WindowWidth BurnedInAnnotation "
    "RecognizableVisualFeatures Units BodyPartExamined Laterality ImageLaterality ViewPosition ContrastBolusAgent "
    "ContrastBolusAgentSequence ImagerPixelSpacing NominalScannedPixelSpacing"
)
# Free text, of which only the words that a closed list has are kept.
_DESCRIPTIONS = "StudyDescription SeriesDescription ProtocolName"
_PLACE = "ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices"
_ACQUISITION = (
    "EchoTime FlipAngle MagneticFieldStrength RepetitionTime MRAcquisitionType DiffusionBValue "
    "TemporalPositionIdentifier AcquisitionNumber AcquisitionTime ContentTime TriggerTime FrameReferenceTime "
    "InstanceNumber AcquisitionDateTime"
)
_MULTI_FRAME = (
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence DimensionIndexSequence ConcatenationUID "
    "InConcatenationNumber InConcatenationTotalNumber DetectorInformationSequence SliceVector"
)
_TAGS = [
    int(tag)
    for name in " ".join((_IDENTITY, _IMAGE, _DESCRIPTIONS, _PLACE, _ACQUISITION, _MULTI_FRAME)).split()
    if (tag := tag_for_keyword(name)) is not None
] + private_tags()

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT", "PALETTE COLOR")

# Words of ImageType by which scanners mark pictures of text among their slices.
_SCREENS = ("SCREEN SAVE", "SCREENSAVE", "SCREENSHOT", "DOSE", "DOSE INFO", "DOSE_INFO", "CT_SOM5 PROT", "CT_SOM7 PROT")

# So much of a compressed stream is looked at for its size; the marker that has it stands near the start.
_START_BYTES = 4096


def read_header(path: Path, pseudonyms: Pseudonyms, reader: str) -> FileHeader:
    """See `Reader.metadata`."""
    parsed = parse(path, _TAGS, _START_BYTES)
    try:
        with quiet():
            return FileHeader(path, reader, _identity(parsed, pseudonyms), _facts(parsed, pseudonyms).to_json())
    except (MemoryError, Refusal):
        raise
    except Exception as error:  # values of a damaged header fail in whatever way they are used
        raise Refusal("unreadable", f"the header is damaged ({type(error).__name__})", AGAIN) from None


def _identity(parsed: Parsed, pseudonyms: Pseudonyms) -> Identity:
    dataset = parsed.dataset
    patient = text(dataset, "PatientID") or text(dataset, "PatientName")
    study = text(dataset, "StudyInstanceUID")
    # A series without a UID is told apart as well as can be: by its number in the study, else it is the object alone.
    number_in_study = text(dataset, "SeriesNumber")
    series = text(dataset, "SeriesInstanceUID") or (
        f"{study}/{number_in_study}" if study and number_in_study else text(dataset, "SOPInstanceUID") or parsed.digest
    )
    date = text(dataset, "StudyDate") or text(dataset, "SeriesDate") or text(dataset, "AcquisitionDate")
    return Identity(
        patient=pseudonyms.of("patient", patient),
        study=pseudonyms.of("study", study),
        series=pseudonyms.of("series", series),
        accession=pseudonyms.of("accession", text(dataset, "AccessionNumber")),
        study_date=pseudonyms.date(patient, date),
    )


def _facts(parsed: Parsed, pseudonyms: Pseudonyms) -> Facts:
    dataset, sop_class = parsed.dataset, parsed.sop_class
    kind = _kind(parsed)
    types = words(dataset, "ImageType")
    check_pixels_name_nobody(
        kind, sop_class, "SECONDARY" in types[1:2],
        word(dataset, "BurnedInAnnotation"), word(dataset, "RecognizableVisualFeatures"),
    )
    if any(screen in types for screen in _SCREENS):
        raise Refusal("secondary-capture", "a picture of text or of a screen among the slices", "leave it out")
    facts = _pixels(parsed, kind)
    facts.instance = pseudonyms.of("instance", text(dataset, "SOPInstanceUID") or parsed.digest)
    facts.modality = word(dataset, "Modality", codes.MODALITIES) or _modality(sop_class)
    facts.original = types[:1] == ("ORIGINAL",)
    if "LOCALIZER" in types and kind == "stack":
        raise LOCALIZER
    _describe(facts, dataset)
    uid = text(dataset, "ConcatenationUID")
    if uid:
        facts.concatenation = (
            pseudonyms.of("instance", uid), whole(dataset, "InConcatenationNumber"),
            whole(dataset, "InConcatenationTotalNumber"),
        )
    if kind == "stack" and not _is_planar(sop_class, facts, types):
        if facts.photometric not in _GREY:
            raise Refusal("secondary-capture", "a coloured picture among the slices", "leave it out")
        frames_of(facts, dataset, sop_class, types)
    else:
        if facts.num_frames != 1:
            raise Refusal("film", f"a film of {facts.num_frames} frames without places", "export single pictures")
        slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
        facts.kind = kind if kind != "stack" else "projection"
        facts.frames = [Frame(0, spacing=_picture_spacing(dataset), slope=slope or 1.0, intercept=intercept or 0.0)]
    return facts


def _kind(parsed: Parsed) -> codes.ObjectKind:
    """What the object is.

    Raises:
        Refusal: no image, or none of a kind that the reader knows.
    """
    sop_class = parsed.sop_class
    kind = codes.KINDS.get(sop_class)
    if kind is not None:
        return kind
    for start, what in codes.NOT_IMAGES.items():
        if sop_class == start or (start.endswith(".") and sop_class.startswith(start)):
            raise Refusal("not-an-image", what, "leave it out")
    if not parsed.offset or word(parsed.dataset, "Modality") in codes.NOT_IMAGE_MODALITIES:
        raise Refusal("not-an-image", "a DICOM object without pixels", "leave it out")
    if not sop_class:
        raise Refusal("unsupported-class", "the header does not say what kind of image this is", AGAIN)
    raise Refusal("unsupported-class", "a kind of image that is not read", "convert it to NIfTI, or to PNG")


def _pixels(parsed: Parsed, kind: codes.ObjectKind) -> Facts:
    """The Image Pixel module (PS3.3, C.7.6.3), checked against itself and against the length of the file."""
    dataset = parsed.dataset
    if parsed.syntax not in codes.SUPPORTED:
        raise Refusal("unsupported-transfer-syntax", "the pixels are in a coding that is not read (films are such)",
                      "export the study in another transfer syntax, uncompressed or JPEG 2000")
    rows, columns = whole(dataset, "Rows"), whole(dataset, "Columns")
    samples, allocated = whole(dataset, "SamplesPerPixel") or 1, whole(dataset, "BitsAllocated")
    stored, signed = whole(dataset, "BitsStored"), whole(dataset, "PixelRepresentation")
    photometric = text(dataset, "PhotometricInterpretation").upper()
    if not parsed.offset:
        raise Refusal("no-pixels", "an image without its pixels", AGAIN)
    if (
        not rows or not columns or not allocated or not stored or signed is None or not photometric
        or not parsed.whole_numbers
    ):
        raise Refusal("unsupported-pixels", "the header does not say how the pixels are laid out", AGAIN)
    grey = samples == 1 and photometric in _GREY
    colour = (samples == 3 or (samples == 1 and photometric == "PALETTE COLOR")) and photometric in _COLOUR
    if not (grey or colour) or allocated not in (8, 16, 32) or (colour and samples == 3 and allocated != 8):
        raise Refusal("unsupported-pixels", f"pixels of {samples} x {allocated} bits of this colour are not read",
                      "export them as grey values, or as RGB of 8 bits")
    if photometric in ("YBR_RCT", "YBR_ICT") and parsed.syntax not in codes.JPEG_2000:
        raise Refusal("unsupported-pixels", "colours of JPEG 2000 in another coding", AGAIN)
    high = whole(dataset, "HighBit")
    high = stored - 1 if high is None or not stored - 1 <= high < allocated else high
    if not 1 <= stored <= allocated:
        raise Refusal("unsupported-pixels", f"{stored} bits are stored in {allocated}", AGAIN)
    planar, num_frames = whole(dataset, "PlanarConfiguration") or 0, whole(dataset, "NumberOfFrames") or 0
    if signed not in (0, 1) or planar not in (0, 1) or num_frames < 0:
        raise Refusal("unsupported-pixels", "the header lays the pixels out as the standard does not", AGAIN)
    facts = Facts(
        kind=kind, modality="", instance="", syntax=parsed.syntax, size=parsed.size, digest=parsed.digest,
        offset=parsed.offset, length=-1 if parsed.length == UNDEFINED else parsed.length,
        swapped=parsed.syntax == codes.BIG and allocated == 8 and parsed.vr == "OW",
        rows=rows, columns=columns, samples=samples, photometric=photometric,
        planar=planar, allocated=allocated, stored=stored, high_bit=high, signed=signed == 1,
        num_frames=max(num_frames, 1),
        lookup=bool(dataset.get("ModalityLUTSequence")),
    )
    if parsed.syntax in codes.NATIVE:
        _check_length(facts, parsed)
    else:
        _check_stream(facts, parsed)
    return facts


def _check_length(facts: Facts, parsed: Parsed) -> None:
    """Uncompressed pixels are as many as the header says."""
    expected = facts.num_frames * codecs.frame_bytes(facts)
    if facts.length < 0:
        raise Refusal("unsupported-transfer-syntax", "compressed pixels in a file that says they are not", AGAIN)
    if min(facts.length, parsed.available) < expected:
        raise Refusal("truncated", "the file has fewer pixels than its header says", AGAIN)
    # Some writers pad; a lie about the size is more.
    if facts.length >= min(2 * expected, expected + max(expected // 16, 64) + 1):
        raise Refusal("size-mismatch", "the file has more pixels than its header says", AGAIN)


def _check_stream(facts: Facts, parsed: Parsed) -> None:
    """A compressed stream is of the size that the header says, where its start tells."""
    if facts.length >= 0 and parsed.syntax != codes.RLE and not parsed.start.startswith(b"\xfe\xff\x00\xe0"):
        raise Refusal("unsupported-transfer-syntax", "pixels without fragments in a compressed file", AGAIN)
    stream = codecs.first_fragment(parsed.start)
    size = codecs.look(stream, facts.syntax) if stream else None
    if size is not None:
        codecs.check_size(size, facts)


def _is_planar(sop_class: str, facts: Facts, types: tuple[str, ...]) -> bool:
    """Whether an object of a class of slices is a picture: nuclear medicine that was not reconstructed."""
    return sop_class == codes.NM and not any(kind in types for kind in ("RECON TOMO", "RECON GATED TOMO"))


def _modality(sop_class: str) -> str:
    return {codes.CT: "CT", codes.MR: "MR", codes.PT: "PT", codes.NM: "NM"}.get(sop_class, "OT")


def _describe(facts: Facts, dataset: Dataset) -> None:
    """What is kept of the header for people and for text."""
    part = word(dataset, "BodyPartExamined").replace(" ", "").replace("_", "")
    facts.body_part = part if part in codes.BODY_PARTS else ""
    # A body part that is no code ("Schädel") may yet name one.
    described = (*_DESCRIPTIONS.split(), "BodyPartExamined")
    facts.keywords = find_keywords(value for name in described for value in texts(dataset, name))
    facts.laterality = word(dataset, "ImageLaterality", "LRB") or word(dataset, "Laterality", "LRB")
    facts.view = word(dataset, "ViewPosition", codes.VIEWS)
    facts.units = codes.UNITS.get(word(dataset, "Units") or word(dataset, "RescaleType"), "a.u.")
    if facts.modality == "CT" and not word(dataset, "RescaleType"):
        facts.units = "HU"  # what CT's rescale means where it does not say (PS3.3, C.8.2.1.1.2)
    agent = text(dataset, "ContrastBolusAgent").upper()
    if agent or dataset.get("ContrastBolusAgentSequence"):
        facts.contrast = agent not in ("NO", "NONE", "N", "WITHOUT", "NO CONTRAST")
    facts.flip_deg, facts.field_t = number(dataset, "FlipAngle"), _tesla(number(dataset, "MagneticFieldStrength"))
    facts.repetition_ms = number(dataset, "RepetitionTime")
    facts.three_d = word(dataset, "MRAcquisitionType") == "3D"
    centres, widths = numbers(dataset, "WindowCenter"), numbers(dataset, "WindowWidth")
    facts.windows = tuple(dict.fromkeys(pair for pair in zip(centres, widths, strict=False) if pair[1] > 0))
    padding = whole(dataset, "PixelPaddingValue")
    if padding is not None:
        limit = whole(dataset, "PixelPaddingRangeLimit")
        both = [_in_range(value, facts) for value in (padding, padding if limit is None else limit)]
        facts.padding = (min(both), max(both))


def _tesla(value: float | None) -> float | None:
    """Some scanners write Gauss: no magnet for people has 100 T, none 100 G."""
    return value / 10_000 if value is not None and value > 100 else value


def _in_range(value: int, facts: Facts) -> int:
    """A padding value written as unsigned where pixels are signed, or the other way round."""
    span = 1 << facts.allocated
    value %= span
    return value - span if facts.signed and value >= span // 2 else value


def _picture_spacing(dataset: Dataset) -> tuple[float, ...]:
    """Between rows and columns: calibrated where the header says so, else at the detector."""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        found = numbers(dataset, name, 2)
        if found and all(0 < value < math.inf for value in found):
            return found
    return ()
