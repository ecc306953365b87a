"""NIfTI 1 and 2: `.nii`, compressed or not, and pairs of `.hdr` and `.img`.

A file has no identifiers in it. So a series is named by the file's content (`paths.fingerprint`): it is the same one
wherever the file lies. Patient and study are those of the path where it is laid out as `paths` knows. Elsewhere every
file is a patient of its own, named by the file and its folder, and the file's name without its suffix stands for the
accession number, so that a table of reports may name a study as the file is named.

The slices of a stack run along the axis that the header names (`dim_info`); where it names none, along the axis with
a single voxel, or the one with clearly the longest voxels, or the one nearest to feet-head. The affine is that of
`sform`, else of `qform`, else of the voxels' sizes alone, and then left and right are not known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.spatialimages import HeaderDataError

from megamed.data.fmri.run import is_plausible_tr
from megamed.data.orientation import canonical
from megamed.data.privacy import Pseudonyms
from megamed.data.readers import neighbours
from megamed.data.readers.base import FileHeader, Grouping, Identity, Refusal, SeriesPlan
from megamed.data.readers.nifti_file import (
    NiftiFile,
    data_path_of,
    header_path_of,
    is_nifti,
    open_nifti,
    read_voxels,
)
from megamed.data.readers.paths import fingerprint, patient_and_study, without_suffix
from megamed.data.readers.sidecar import holds_labels, look_beside
from megamed.data.series import Kind, Series, SeriesInfo
from megamed.data.voxels import percentiles

_NAMES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
_DATA_NAMES = (".img", ".img.gz")
_DICOM_MAGIC = slice(128, 132)

_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
_MILLIMETRES = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}

# A stack of thick slices is one whose slices lie further apart by so much than the pixels of a slice.
_CLEARLY_LONGER = 1.25


class NiftiReader:
    """See `megamed.data.readers.base.Reader`."""

    name = "nifti"

    def can_read(self, path: Path, head: bytes) -> bool:
        """Also of formats that are not NIfTI but take its place: they are refused with what to do about them."""
        if head[_DICOM_MAGIC] == b"DICM":
            return False
        return path.name.lower().endswith(_NAMES) or is_nifti(head) or neighbours.neighbour(path, head) is not None

    def metadata(self, path: Path, pseudonyms: Pseudonyms) -> FileHeader:
        """Read a file's header, no voxels; of an `.img` that of its `.hdr`."""
        with path.open("rb") as stream:
            head = stream.read(16)
        if known := neighbours.neighbour(path, head):
            raise Refusal("unsupported-format", f"it is {known.format}", known.mend)
        if holds_labels(path):
            raise Refusal("not-an-image", "by its name it is a mask or a segmentation", "leave it out")
        is_data = path.name.lower().endswith(_DATA_NAMES)
        header_path = header_path_of(path) if is_data else path
        if header_path is None:
            raise Refusal("missing-file", "the .hdr of this .img is missing", "put the .hdr beside it")
        file = open_nifti(header_path)
        _affine(file.header)
        files = [header_path] if file.data_path == header_path else [header_path, file.data_path]
        patient, study = patient_and_study(path)
        name = without_suffix(path)
        own = f"{path.absolute().parent.name}/{name}"
        identity = Identity(
            pseudonyms.of("patient", patient or own), pseudonyms.of("study", study or own),
            pseudonyms.of("series", f"nifti {fingerprint(files)}"),
            "" if study else pseudonyms.of("accession", name),
        )
        return FileHeader(path, self.name, identity, {"is_data": is_data, "num_voxels": file.num_voxels})

    def group(self, headers: Sequence[FileHeader]) -> Grouping:
        """One series a file or pair. A file that is there twice is one series; the other copy is refused."""
        grouping = Grouping([], [])
        planned: dict[str, Path] = {}
        ordered = sorted(headers, key=lambda header: header.path)
        data = {header.path: header for header in ordered if header.facts["is_data"]}
        for header in [header for header in ordered if not header.facts["is_data"]]:
            # Not on the disk: of what is in an archive the path alone is known here.
            beside = data.pop(data_path_of(header.path, data.__contains__) or header.path, None)
            own = (header,) if beside is None else (header, beside)
            if header.identity.series in planned:
                refusal = Refusal("duplicate", "the same file is there under another name", "keep one of them")
                grouping.refused.extend((other, refusal) for other in own)
                continue
            planned[header.identity.series] = header.path
            grouping.plans.append(SeriesPlan(self.name, header.identity, "", own, int(header.facts["num_voxels"])))
        missing = Refusal("missing-file", "the .hdr of this .img is not among the files", "give both")
        grouping.refused.extend((header, missing) for header in data.values())
        return grouping

    def read(self, plan: SeriesPlan) -> Series:
        """Scale, and turn to canonical orientation."""
        path = plan.headers[0].path
        file = open_nifti(path)
        if file.num_voxels != plan.num_voxels:
            raise Refusal("changed", "it is not the file that was looked at", "run the ingest again", path)
        try:
            voxels_TZYX, is_rounded = read_voxels(file)
        except Refusal as refusal:
            raise Refusal(refusal.code, refusal.reason, refusal.mend, file.data_path) from refusal
        affine, notes = _affine(file.header)
        if is_rounded:
            notes.append("whole numbers beyond 2^24 were rounded to float32")
        voxels_TSHW, affine, plane = canonical(voxels_TZYX.transpose(3, 2, 1, 0), affine, _slice_axis(file, affine))
        num_volumes = voxels_TSHW.shape[0]
        kind: Kind = "run" if num_volumes > 1 else "volume"
        beside = look_beside(path, num_volumes, file.header["descrip"].tobytes().decode("utf-8", "replace"))
        known = {"modality": "MR" if kind == "run" else "OT"} | beside.known
        known.setdefault("units", "HU" if known["modality"] == "CT" else "a.u.")
        repetition_time, time_notes = _repetition_time(file.header, known.pop("repetition_time_s", None))
        if kind == "run":
            known["repetition_time_s"] = repetition_time
            notes += time_notes
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        info = SeriesInfo(
            kind=kind, plane=plane, shape=voxels_TSHW.shape, dtype=voxels_TSHW.dtype.name,
            affine=tuple(tuple(row) for row in affine.tolist()),
            # Headers carry float32 noise: 0.72 mm reads 0.7200000286. Four decimals are 0.1 um.
            spacing_mm=(round(float(lengths[0]), 4), round(float(lengths[1]), 4), round(float(lengths[2]), 4)),
            gantry_tilt_deg=_tilt(affine), windows=_windows(file.header), percentiles=percentiles(voxels_TZYX),
            notes=(*plan.notes, *notes, *beside.notes), **known,
        )
        return Series(voxels_TSHW, info)


def _affine(header: Nifti1Header) -> tuple[np.ndarray, list[str]]:
    """Voxel index to mm in RAS, 4 x 4, and what is unusual about it.

    Raises:
        Refusal: no voxel has a size.
    """
    notes = []
    for code, get in (("sform_code", header.get_sform), ("qform_code", header.get_qform)):
        if header[code] > 0:
            try:
                affine = np.array(get(), dtype=np.float64)
            except (HeaderDataError, ValueError):
                affine = np.zeros((4, 4))
            if _spans_space(affine):
                break
            notes.append(f"the affine that {code.replace('code', '').strip('_')} gives does not span space")
    else:
        sizes = np.abs(header["pixdim"][1:4].astype(np.float64))
        affine = np.diag([*sizes, 1.0])
        notes.append("how its axes lie in the patient is not said; left and right may be swapped")
    try:
        unit = str(header.get_xyzt_units()[0])
    except KeyError:
        unit = "unknown"
        notes.append("its units are not valid; sizes were taken for mm")
    affine[:3] *= _MILLIMETRES[unit]
    if not _spans_space(affine):
        raise Refusal("bad-affine", "its header gives voxels no size", "write it again with a valid affine")
    return affine, notes


def _spans_space(affine: np.ndarray) -> bool:
    """As `orientation.find_turn` wants it."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.isfinite(affine).all() and lengths.all() and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6)


def _slice_axis(file: NiftiFile, affine: np.ndarray) -> int:
    named = file.header.get_dim_info()[2]
    if named is not None:
        return int(named)
    single = [axis for axis in range(3) if file.shape_XYZT[axis] == 1]
    if len(single) == 1:
        return single[0]
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    shortest, middle, longest = np.argsort(lengths, kind="stable")
    if lengths[longest] > _CLEARLY_LONGER * lengths[middle]:
        return int(longest)
    return int(np.argmax(np.round(np.abs(affine[2, :3] / lengths), 6)))


def _tilt(affine: np.ndarray) -> float:
    """Degrees between the stack's direction and the normal of its slices."""
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    across = float(np.linalg.norm(np.cross(normal, affine[:3, 2])))
    return round(math.degrees(math.atan2(across, abs(float(normal @ affine[:3, 2])))), 2)


def _windows(header: Nifti1Header) -> tuple[tuple[float, float], ...]:
    """The range that the header wants shown."""
    low, high = float(header["cal_min"]), float(header["cal_max"])
    return (((low + high) / 2, high - low),) if math.isfinite(high - low) and low < high else ()


def _repetition_time(header: Nifti1Header, stated_beside: float | None) -> tuple[float | None, list[str]]:
    """Seconds from volume to volume, and what is unusual about them.

    Converters are known to write milliseconds under the unit "sec" and the reverse. A value that no functional run
    has in the unit named is read in the unit in which it is plausible.

    Args:
        header: has the time in `pixdim[4]`, in the unit of `xyzt_units`.
        stated_beside: seconds, of the JSON file beside it.
    """
    if stated_beside is not None and is_plausible_tr(stated_beside):
        return round(stated_beside, 4), []
    try:
        unit = str(header.get_xyzt_units()[1])
    except KeyError:
        unit = "unknown"
    value = float(header["pixdim"][4])
    if unit not in ("unknown", *_SECONDS):
        return None, ["its volumes do not follow one another in time"]
    stated = "sec" if unit == "unknown" else unit
    for candidate in (stated, *_SECONDS):
        seconds = value * _SECONDS[candidate]
        if is_plausible_tr(seconds):
            corrected = f"its repetition time, {value:g} {stated}, was read as {value:g} {candidate}"
            return round(seconds, 4), [] if candidate == stated else [corrected]
    return None, ["it does not say how long a volume takes"]
