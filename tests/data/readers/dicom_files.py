"""Small DICOM files for the tests of the reader: slices whose pixels say where and when they were taken."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

from megamed.data.privacy import Pseudonyms
from megamed.data.readers import Grouping, Refusal
from megamed.data.readers.dicom import DicomReader
from megamed.data.series import Series

READER, PSEUDONYMS = DicomReader(), Pseudonyms(b"the key of the tests", dates="shift")
STORAGE = "1.2.840.10008.5.1.4.1.1."
ROWS, COLUMNS = 4, 5
SECRETS = ("Doe^Jane", "PAT-4711", "1.2.826.77", "20200102", "ACC0815", "Dr^Who")


def pixels(z: int, t: int = 0) -> np.ndarray:
    """Stored numbers of slice z of volume t: no two the same."""
    return 1000 + 500 * z + 50 * t + np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)


def image(sop_class: str, modality: str, stored: np.ndarray, **changes) -> Dataset:
    """An object with these stored numbers; a change of None takes an element away."""
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID, header.Modality = STORAGE + sop_class, generate_uid(), modality
    header.PatientName, header.PatientID, header.StudyDate = "Doe^Jane", "PAT-4711", "20200102"
    header.StudyInstanceUID, header.SeriesInstanceUID = "1.2.826.77.1", "1.2.826.77.2"
    header.AccessionNumber, header.ReferringPhysicianName, header.StudyTime = "ACC0815", "Dr^Who", "101112"
    header.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    header.Rows, header.Columns = stored.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = 8 * stored.dtype.itemsize
    header.BitsAllocated, header.BitsStored, header.HighBit = bits, bits, bits - 1
    header.PixelRepresentation = int(stored.dtype.kind == "i")
    header.PixelData = stored.tobytes()
    header["PixelData"].VR = "OW" if bits > 8 else "OB"
    return change(header, **changes)


def change(header: Dataset, **changes) -> Dataset:
    for name, value in changes.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    return header


def mr_slice(z: int = 0, t: int = 0, **changes) -> Dataset:
    """Slice z (0 at the feet) of volume t of an axial MR series: 2 x 3 x 4 mm, 1.5 s from volume to volume."""
    header = image("4", "MR", pixels(z, t).astype("<u2"))
    header.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    header.PixelSpacing, header.SliceThickness = [3, 2], 4  # between rows, between columns
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.ImagePositionPatient = [-10, -20, 5 + 4 * z]
    header.RepetitionTime, header.EchoTime = 1500, 30
    return change(header, **changes)


def ct_slice(z: int = 0, **changes) -> Dataset:
    """Slice z of a CT series; stored 1000 and more are -24 HU and more."""
    header = mr_slice(z)
    header.SOPClassUID, header.Modality = STORAGE + "2", "CT"
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.RescaleSlope, header.RescaleIntercept = 1, -1024
    del header.EchoTime, header.RepetitionTime
    return change(header, **changes)


def by_temporal_position(z: int, t: int) -> dict:
    return {"TemporalPositionIdentifier": t + 1}


def run(num_volumes: int = 4, num_slices: int = 3, how=by_temporal_position) -> list[Dataset]:
    return [mr_slice(z, t, **how(z, t)) for t in range(num_volumes) for z in range(num_slices)]


def item(**values) -> Sequence:
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return Sequence([dataset])


def frame(z: int, t: int = 0, **groups) -> Dataset:
    """Functional groups of one frame: place, and volume."""
    own = Dataset()
    own.PlanePositionSequence = item(ImagePositionPatient=[-10, -20, 5 + 4 * z])
    own.FrameContentSequence = item(TemporalPositionIndex=t + 1, StackID="1", InStackPositionNumber=z + 1)
    for name, value in groups.items():
        setattr(own, name, value)
    return own


def enhanced(frames: list[Dataset], stored: list[np.ndarray], sop_class: str = "4.1", **changes) -> Dataset:
    """An enhanced MR object; its rescale is in the shared groups, where pydicom's own rescale misses it."""
    header = image(sop_class, "MR", np.stack(stored).astype("<u2"), NumberOfFrames=len(frames), InstanceNumber=1)
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.PixelMeasuresSequence = item(PixelSpacing=[3, 2], SliceThickness=4)
    shared.PixelValueTransformationSequence = item(RescaleSlope=2, RescaleIntercept=-7, RescaleType="US")
    shared.MRTimingAndRelatedParametersSequence = item(RepetitionTime=1500, FlipAngle=70)
    shared.FrameVOILUTSequence = item(WindowCenter=300, WindowWidth=600)
    header.SharedFunctionalGroupsSequence = Sequence([shared])
    header.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return change(header, **changes)


def compress(header: Dataset, syntax: str) -> Dataset:
    """Compress the pixels, which are uncompressed."""
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.compress(syntax, generate_instance_uid=False)
    return header


def save(folder: Path, headers: list[Dataset], syntax: str = ExplicitVRLittleEndian) -> Path:
    """Write files whose names say nothing of their order."""
    folder.mkdir(exist_ok=True, parents=True)
    order = np.random.default_rng(1).permutation(len(headers)) + len(list(folder.iterdir()))
    for name, header in zip(order, headers, strict=True):
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = syntax
        little = syntax != ExplicitVRBigEndian
        header.save_as(folder / f"IM{name:04d}", enforce_file_format=True, implicit_vr=None if little else False,
                       little_endian=None if little else False)
    return folder


@dataclass
class Found:
    """What the reader makes of a folder: series by part, and refusals by code."""

    grouping: Grouping
    series: dict[str, Series]
    refused: Counter
    refusals: list[Refusal]

    @property
    def only(self) -> Series:
        (series,) = self.series.values()
        return series


def scan(folder: Path) -> tuple[list, list[Refusal]]:
    headers, refusals = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            header = READER.metadata(path, PSEUDONYMS)
            # Headers go through the scan's journal.
            headers.append(replace(header, facts=json.loads(json.dumps(header.facts))))
        except Refusal as refusal:
            refusals.append(refusal)
    return headers, refusals


def look(folder: Path) -> Found:
    """Scan, group and read a folder."""
    headers, refusals = scan(folder)
    grouping = READER.group(headers[::-1])
    refusals += [refusal for _, refusal in grouping.refused]
    series = {}
    for plan in grouping.plans:
        try:
            series[plan.part] = READER.read(plan)
            assert series[plan.part].voxels_TSHW.size == plan.num_voxels
        except Refusal as refusal:
            refusals.append(refusal)
    return Found(grouping, series, Counter(refusal.code for refusal in refusals), refusals)


def axial(volumes: list[list[np.ndarray]]) -> np.ndarray:
    """The canonical voxels of axial slices from the feet up whose rows run to the left and columns to the back."""
    return np.stack([np.stack(volume) for volume in volumes])
