"""A series in memory, whatever it was read from, and what is kept of its header.

Shape suffixes: T volumes in time, S slices, H and W pixels of a slice.

Canonical orientation: slices stay the slices that were acquired, so that a frame is one contiguous stretch of the
file; axes are only flipped and swapped, never resampled. In a slice the reader sees what a workstation shows:

| plane | rows run (H) | columns run (W) | slices run (S) |
|---|---|---|---|
| axial | front to back | right to left of the patient | feet to head |
| coronal | head to feet | right to left | front to back |
| sagittal | head to feet | front to back | right to left |

An oblique stack takes the plane that its slice normal is nearest to.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

SCHEMA_VERSION = 1

Kind = Literal["volume", "run", "image"]
Plane = Literal["axial", "coronal", "sagittal", "none"]

# What voxels may be stored as: the smallest of these that holds every value exactly, float32 otherwise.
DTYPES = ("uint8", "int16", "uint16", "float32")

# Percentiles of a series that are measured once, at ingest, so that training never reads a whole volume to scale it.
PERCENTILES = (0.5, 1.0, 50.0, 99.0, 99.5)


@dataclass
class SeriesInfo:
    """What is kept of a series beside its voxels: no name, identifier, date or free text.

    Attributes:
        modality: DICOM's code (CT, MR, PT, CR, DX, MG, US, ...), `OT` where it is not known.
        kind: `volume` (slices in space), `run` (volumes in time) or `image` (pictures without geometry).
        plane: which way the slices lie; `none` for images.
        shape: of the voxels: T, S, H, W, and 3 behind them for colour.
        dtype: of the voxels.
        units: `HU`, `Bq/ml`, ... as the header says them in DICOM's codes; `a.u.` where values have no unit.
        affine: voxel index (W, H, S) to mm in RAS, the NIfTI convention; 4 rows of 4. Of an irregular stack the best
            regular one. The identity for images.
        spacing_mm: distance between voxels along W, H and S (S: the median, 0 for a single slice of unknown extent).
        slice_positions_mm: where each slice lies along the normal of the stack, the first at 0; None where
            the affine says the same to a tenth of a millimetre.
        gantry_tilt_deg: angle between the stack's direction and the slices' normal, degrees.
        repetition_time_s: seconds from one volume of a run to the next.
        body_part: DICOM's code in capitals (CHEST, BRAIN), empty where it is not known.
        keywords: medical terms of its descriptions, sorted, of those that `megamed.data.keywords` lists.
        laterality: `L`, `R`, `B` or empty.
        view_position: of a projection (PA, AP, LL, MLO, ...) or empty.
        contrast: whether a contrast agent was given; None where the header does not say.
        echo_time_ms, flip_angle_deg, field_strength_t: of MR; None elsewhere.
        b_values: of diffusion MR, one a volume; empty elsewhere.
        part: what tells this stack from the others of its DICOM series ("echo 2"); empty where it is the only one.
        inverted: values were inverted so that more is brighter (MONOCHROME1).
        windows: (centre, width) pairs that the header proposes, in the units of the voxels.
        percentiles: values at `PERCENTILES`, by their text ("99.5").
        notes: what is unusual about the stack, one sentence each ("2 slices are missing").
        provenance: keyed hash of the source's voxels and geometry; the same series ingested twice has the same one.
    """

    modality: str = "OT"
    kind: Kind = "image"
    plane: Plane = "none"
    shape: tuple[int, ...] = ()
    dtype: str = "int16"
    units: str = "a.u."
    affine: tuple[tuple[float, ...], ...] = tuple(tuple(float(i == j) for j in range(4)) for i in range(4))
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 0.0)
    slice_positions_mm: tuple[float, ...] | None = None
    gantry_tilt_deg: float = 0.0
    repetition_time_s: float | None = None
    body_part: str = ""
    keywords: tuple[str, ...] = ()
    laterality: str = ""
    view_position: str = ""
    contrast: bool | None = None
    echo_time_ms: float | None = None
    flip_angle_deg: float | None = None
    field_strength_t: float | None = None
    b_values: tuple[float, ...] = ()
    part: str = ""
    inverted: bool = False
    windows: tuple[tuple[float, float], ...] = ()
    percentiles: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, keys in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SeriesInfo:
        """The inverse of `to_json`; keys of later versions are passed over.

        Raises:
            TypeError: a value has a shape that the field cannot have.
        """
        known = {f.name for f in fields(cls)}
        return cls(**{key: _as_tuples(value) for key, value in values.items() if key in known})


@dataclass(eq=False)
class Series:
    """Voxels in canonical orientation and what is known of them.

    Attributes:
        voxels_TSHW: in the units of `info.units`, more is brighter; with a last axis of 3 for colour.
        info: its `shape`, `dtype` and `affine` are those of the voxels.
    """

    voxels_TSHW: np.ndarray
    info: SeriesInfo


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
