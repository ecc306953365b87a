"""Studies of a person who does not exist, with an identity in every place where a file can have one."""

import json
import zipfile
from itertools import count
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image, PngImagePlugin
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileMetaDataset

FAMILY, GIVEN, NUMBER = "Wrzesniewskaja", "Ottokarine", "MRN7749310"
PERSON = f"{FAMILY}^{GIVEN}"
# Patient's ID, birth date and accession number are known to reports, too.
BIRTH, ACCESSION, STUDY_DATE = "19370809", "ACC55102938", "20111213"
# In names of files and folders, NIfTI headers, pictures and reports, where no rule collects them.
ELSEWHERE = {FAMILY, GIVEN, NUMBER, BIRTH, ACCESSION, STUDY_DATE, "Quokkenbruck", "Haverkampsen", "555-867-5309",
             "xylophia@example.org"}

_ROOT = "1.2.826.0.1.3680043.9.7433.5"
# What the reader has to find as it is.
_STRUCTURE = {"SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "ConcatenationUID",
              "PatientName", "PatientID", "AccessionNumber", "PatientBirthDate", "StudyDate"}


def invented(vr: str, n: int) -> str | None:
    """Value number `n` of a VR that identifies, unlike any other; None for other VRs."""
    if vr == "PN":
        return f"Zfamily{n:04d}q^Zgiven{n:04d}q"
    if vr in ("LO", "SH", "ST", "LT", "UT", "UC", "AE"):
        return f"Ztext{n:04d}q"
    if vr == "UR":
        return f"http://zhost{n:04d}q.example/"
    if vr == "UI":
        return f"{_ROOT}.{70_000 + n}"
    day = f"{1901 + n % 60}{1 + n // 60 % 12:02d}{1 + n // 720 % 28:02d}"
    clock = f"{n % 24:02d}{n // 24 % 60:02d}{n // 1440 % 60:02d}.{100_003 + n}"
    return {"DA": day, "TM": clock, "DT": f"{day}{clock}", "AS": f"{100 + n % 800}Y"}.get(vr)


def fill(dataset: Dataset, numbers: "count[int]") -> None:
    """Give every attribute of the standard whose VR identifies a value."""
    for tag, (vr, _, _, _, keyword) in sorted(DicomDictionary.items()):
        if keyword and 0x0008 <= tag >> 16 < 0x7FE0 and keyword not in _STRUCTURE:
            value = invented(vr.split(" or ")[0], next(numbers))
            if value is not None:
                dataset.add_new(tag, vr, value)


def write_ct(folder: Path, num_slices: int = 6) -> None:
    """A CT series whose every header is full of identity: public, private, nested."""
    folder.mkdir(parents=True)
    numbers = count(1)
    header = Dataset()
    fill(header, numbers)
    nested, deep = Dataset(), Dataset()
    fill(nested, numbers)
    fill(deep, numbers)
    nested.RequestAttributesSequence = [deep]
    header.ReferencedPatientSequence = [nested]
    block = header.private_block(0x0009, "ZCREATOR ONE", create=True)
    for i, vr in enumerate(("PN", "LO", "SH", "LT", "DA", "TM", "UI", "ST", "UT", "AS")):
        block.add_new(i, vr, invented(vr, next(numbers)))
    block.add_new(0x20, "UN", b"Zprivate bytes q")
    # The same in blocks of which the reader knows one element.
    for group, creator in ((0x0019, "SIEMENS MR HEADER"), (0x0043, "GEMS_PARM_01"), (0x2001, "Philips Imaging DD 001")):
        header.private_block(group, creator, create=True).add_new(0x55, "LO", invented("LO", next(numbers)))
    header.SpecificCharacterSet = "ISO_IR 192"
    header.PatientName, header.PatientID, header.PatientBirthDate = PERSON, NUMBER, BIRTH
    header.AccessionNumber, header.StudyDate = ACCESSION, STUDY_DATE
    header.StudyInstanceUID, header.SeriesInstanceUID = f"{_ROOT}.1", f"{_ROOT}.2"
    header.SOPClassUID, header.Modality = pydicom.uid.CTImageStorage, "CT"
    header.ImageType, header.BodyPartExamined = ["ORIGINAL", "PRIMARY", "AXIAL"], "CHEST"
    header.StudyDescription, header.ProtocolName = f"V.a. Lungenembolie {FAMILY}", f"LUNG_nodule^{NUMBER}"
    header.Rows = header.Columns = 16
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation = 15, 1
    header.PixelSpacing, header.SliceThickness = [0.8, 0.8], 3
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.RescaleSlope, header.RescaleIntercept = 1, 0
    pixels = np.random.default_rng(0).integers(-1000, 1000, (num_slices, 16, 16), dtype=np.int16)
    for i in range(num_slices):
        header.ImagePositionPatient, header.InstanceNumber = [0, 0, 3.0 * i], i + 1
        header.SOPInstanceUID = f"{_ROOT}.3.{i + 60_001}"
        header.PixelData = pixels[i].tobytes()
        save(header, folder / f"{FAMILY}_{i}.dcm")
    # Refused: a picture of a screen, and a file that ends early.
    header.SOPClassUID, header.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, f"{_ROOT}.3.{60_100}"
    save(header, folder / f"{GIVEN}_screen.dcm")
    whole = (folder / f"{FAMILY}_0.dcm").read_bytes()
    (folder / f"{GIVEN}_short.dcm").write_bytes(whole[:-200])


def save(dataset: Dataset, path: Path) -> None:
    """Write a DICOM file, explicit little-endian."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.SourceApplicationEntityTitle = "ZSOURCEAE"
    dataset.save_as(path, enforce_file_format=True)


def write_others(folder: Path) -> None:
    """A NIfTI file with its sidecar, a picture, an archive, and reports, all of which speak of the person."""
    folder.mkdir(parents=True)
    image = nibabel.Nifti1Image(np.arange(8**3, dtype=np.int16).reshape(8, 8, 8), np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header["descrip"], image.header["aux_file"] = f"{FAMILY} {GIVEN} apoplex", NUMBER
    image.header["intent_name"] = GIVEN
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", f"{FAMILY}, Quokkenbruck".encode()))
    nibabel.save(image, folder / f"sub-{FAMILY}_T1w.nii.gz")
    (folder / f"sub-{FAMILY}_T1w.json").write_text(json.dumps({
        "Modality": "MR", "PatientName": PERSON, "PatientID": NUMBER, "PatientBirthDate": BIRTH,
        "InstitutionName": "Quokkenbruck", "SeriesDescription": FAMILY, "BodyPartExamined": f"{GIVEN} Sella",
    }))
    words = PngImagePlugin.PngInfo()
    words.add_text("Author", f"{GIVEN} {FAMILY}")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8)).save(
        folder / f"{FAMILY}-front.png", pnginfo=words)
    with zipfile.ZipFile(folder / f"{FAMILY}.zip", "w") as archive:
        archive.writestr(f"{GIVEN}/{NUMBER}.txt", FAMILY)
    text = (f"Ms {GIVEN} {FAMILY} ({NUMBER}), born {BIRTH}, seen on 2011-12-13 by Dr. Haverkampsen, 555-867-5309, "
            "xylophia@example.org: no nodule.")
    (folder / f"{FAMILY}.json").write_text(json.dumps([
        {"patient_name": PERSON, "PatientID": NUMBER, "AccessionNumber": ACCESSION, "study_date": STUDY_DATE,
         "birth_date": BIRTH, "findings": text, "impression": f"Normal. Dictated by: {GIVEN} Haverkampsen"},
        {"PatientName": PERSON, "filename": f"{FAMILY}-front.png", "report": f"FINDINGS: {text}"},
        {"PatientName": PERSON, "findings": FAMILY},
    ]))
    (folder / f"{FAMILY}.csv").write_text(f"mrn;StudyInstanceUID;report\n{NUMBER};{_ROOT}.1;{NUMBER} is well.\n")
