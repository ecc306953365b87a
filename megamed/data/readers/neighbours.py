"""Formats of neuroimaging that are not NIfTI: known, so that a file of one is refused with what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Neighbour(NamedTuple):
    """A format's name, and what to do with a file of it."""

    format: str
    mend: str


_SURFACE = "leave it out: it holds surfaces or tables of vertices; give the volume that it was made from"
_STREAMLINES = "leave it out: it holds streamlines, not voxels"

# By the end of the name in small letters.
_BY_NAME = {
    (".mgz", ".mgh"): Neighbour("FreeSurfer MGH", "convert it with: mri_convert FILE OUT.nii.gz"),
    (".mnc", ".mnc.gz"): Neighbour("MINC", "convert it with: mnc2nii FILE OUT.nii"),
    (".par", ".rec"): Neighbour("Philips PAR/REC", "give the DICOM files, or convert it with dcm2niix"),
    (".head", ".brik", ".brik.gz"): Neighbour("AFNI", "convert it with: 3dAFNItoNIFTI FILE"),
    (".gii", ".gii.gz"): Neighbour("GIFTI", _SURFACE),
    (".mha", ".mhd"): Neighbour("MetaImage", "convert it to .nii.gz, for instance with SimpleITK"),
    (".dconn.nii", ".dlabel.nii", ".dscalar.nii", ".dtseries.nii", ".pconn.nii", ".pdconn.nii", ".pscalar.nii",
     ".ptseries.nii", ".dpconn.nii", ".plabel.nii", ".pconnseries.nii"): Neighbour("CIFTI", _SURFACE),
}
# By the first bytes.
_BY_START = {
    b"MATRIX": Neighbour("ECAT", "convert it to .nii.gz, for instance with nibabel or dcm2niix"),
    b"TRACK\0": Neighbour("TrackVis", _STREAMLINES),
    b"mrtrix tracks": Neighbour("MRtrix tracks", _STREAMLINES),
    b"NRRD000": Neighbour("NRRD", "convert it to .nii.gz, for instance with SimpleITK"),
    b"SIMPLE  =": Neighbour("FITS", "convert it to .nii.gz"),
}
CIFTI = _BY_NAME[next(names for names in _BY_NAME if ".dconn.nii" in names)]
ANALYZE = Neighbour("Analyze 7.5", "convert it to .nii.gz with its orientation, which Analyze does not keep, stated")


def neighbour(path: Path, head: bytes) -> Neighbour | None:
    """Which of the formats a file has, by its name and its first bytes."""
    name = path.name.lower()
    for start, known in _BY_START.items():
        if head.startswith(start):
            return known
    return next((known for ends, known in _BY_NAME.items() if name.endswith(ends)), None)
