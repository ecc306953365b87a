"""What the scan keeps of a DICOM file: enough to sort it into a stack and to read its pixels without a second look.

All of it is plain values: it travels through JSON. No identifier, no name, no date.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from megamed.data.readers.base import FileHeader, Refusal

AGAIN = "copy or export the file again"
LOCALIZER = Refusal("localizer", "a localizer, which only shows where slices were planned", "leave it out")


class Frame(NamedTuple):
    """One slice: a file, one of its frames, or one tile of a mosaic.

    Attributes:
        number: of the frame in the file, from 0.
        tile: of the mosaic, from 0; -1 where the frame is one slice.
        position: of the centre of the first pixel, mm in LPS.
        orientation: direction cosines of a row and of a column, LPS.
        spacing: between rows and between columns, mm.
        thickness: distance to the next slice where the header says one, or the slice's thickness, mm; 0 for unknown.
        slope, intercept: what makes values of stored numbers.
        echo_ms: echo time; None where there is none.
        b_value: s/mm2; None where the slice is not of a diffusion series.
        types: words of ImageType that tell apart what must not lie in one stack; digits for those of no standard.
        stack: of an enhanced object, empty otherwise.
        temporal: number of the volume, as the header says it.
        dimensions: of an enhanced object, its dimension indices but for those that say where a slice lies.
        acquisition: number.
        acquired_s, content_s: seconds since midnight.
        trigger_ms: since the R wave, or since a run began.
        reference_ms: PET, since the series began.
        instance: number.
    """

    number: int
    tile: int = -1
    position: tuple[float, ...] = ()
    orientation: tuple[float, ...] = ()
    spacing: tuple[float, ...] = ()
    thickness: float = 0.0
    slope: float = 1.0
    intercept: float = 0.0
    echo_ms: float | None = None
    b_value: float | None = None
    types: tuple[str, ...] = ()
    stack: str = ""
    temporal: int | None = None
    dimensions: tuple[int, ...] = ()
    acquisition: int | None = None
    acquired_s: float | None = None
    content_s: float | None = None
    trigger_ms: float | None = None
    reference_ms: float | None = None
    instance: int | None = None


@dataclass
class Facts:
    """One file.

    Attributes:
        kind: `ObjectKind` of the standard's class.
        instance: keyed hash of the object's UID.
        syntax: transfer syntax of the pixels.
        size: of the file in bytes.
        digest: of the bytes before the pixels.
        offset, length: of the pixels in the file (in what is inflated, of a deflated one); length -1 is undefined.
        swapped: 8-bit pixels in big-endian 16-bit words.
        rows, columns: of a frame; of a tile where the file is a mosaic.
        grid: columns of tiles of a mosaic, 0 where the file is none.
        samples, photometric, planar, allocated, stored, high_bit, signed: as the Image Pixel module has them.
        num_frames: in the file.
        lookup: the file has a Modality LUT.
        padding: lowest and highest stored number that stands for no measurement.
        windows: (centre, width).
        concatenation: keyed hash of its UID, number in it, how many there are; empty where the file is whole.
        three_d: MR acquisition in 3D.
        repetition_ms: MR repetition time.
        frames: the slices.
    """

    kind: str
    modality: str
    instance: str
    syntax: str
    size: int
    digest: str
    offset: int
    length: int
    swapped: bool
    rows: int
    columns: int
    samples: int
    photometric: str
    planar: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool
    num_frames: int
    grid: int = 0
    lookup: bool = False
    padding: tuple[int, ...] = ()
    windows: tuple[tuple[float, ...], ...] = ()
    units: str = "a.u."
    body_part: str = ""
    keywords: tuple[str, ...] = ()
    laterality: str = ""
    view: str = ""
    contrast: bool | None = None
    flip_deg: float | None = None
    field_t: float | None = None
    repetition_ms: float | None = None
    three_d: bool = False
    original: bool = True
    concatenation: tuple[Any, ...] = ()
    frames: list[Frame] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "frames": [list(frame) for frame in self.frames]}

    @classmethod
    def of(cls, header: FileHeader) -> Facts:
        """The inverse of `to_json`, whether or not the values went through JSON."""
        values = {f.name: header.facts[f.name] for f in fields(cls)}
        values["frames"] = [Frame(*map(_as_tuple, frame)) for frame in values["frames"]]
        return cls(**values)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
