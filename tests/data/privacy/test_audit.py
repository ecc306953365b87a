"""The search for identities finds them wherever they hide, and only them."""

import gzip
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pydicom
import pytest
import torch

from megamed.data.privacy.audit import _STRETCH, find_identity, identifying_values

NAME, NUMBER, DATE = "Brömmelhaupt", "73519264", "19570312"


def _parquet(path, text):
    parquet.write_table(pa.table({"a": ["x" * 9, text], "b": [1, 2]}), path, compression="zstd")


def _zip(path, text):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", "filling " * 99 + text)


@pytest.mark.parametrize("write", [
    lambda path, text: path.write_text(f"so {text}."),
    lambda path, text: path.write_bytes(text.encode("latin-1")),
    lambda path, text: path.write_text(json.dumps({"a": text})),
    lambda path, text: np.save(path.open("wb"), np.array([text, "y"])),
    lambda path, text: np.savez_compressed(path.open("wb"), a=np.array([text])),
    lambda path, text: torch.save({"meta": text, "w": torch.zeros(99)}, path),
    lambda path, text: gzip.open(path, "wt").write(text),
    lambda path, text: path.write_bytes(b"\xff" * (_STRETCH - 3) + text.encode("utf-16-le")),
    _parquet, _zip,
])
def test_every_container_is_looked_through(tmp_path, write):
    path = tmp_path / "output"
    write(path, NAME)
    assert {hit.value for hit in find_identity([NAME, "Quisenberry"], [tmp_path])} == {NAME}
    write(path, "nobody")
    assert find_identity([NAME], [tmp_path]) == []


def test_names_of_files_count_and_numbers_only_alone(tmp_path):
    (tmp_path / NUMBER).mkdir()
    assert [hit.place for hit in find_identity([NUMBER], [tmp_path])] == ["name"]
    path = tmp_path / "values.txt"
    path.write_text(f"0.{NUMBER} a{NUMBER} {NUMBER}1 born 1957-03-12")
    assert [hit.value for hit in find_identity([NUMBER, DATE], [path])] == [DATE]
    path.write_text(f"[{NUMBER}]")
    assert [(hit.value, hit.place) for hit in find_identity([NUMBER, DATE], [path])] == [(NUMBER, "1")]


def test_values_that_identify_are_collected_from_everywhere(tmp_path):
    dataset = pydicom.Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName = "Brömmelhaupt^Käthe=字"
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.826.0.1.77"
    dataset.BodyPartExamined, dataset.StudyDescription, dataset.SeriesDescription = "HEAD", "HEAD", "Follow up"
    dataset.PatientID, dataset.StudyID, dataset.SliceThickness, dataset.PatientAge = NUMBER, "2157", "1.25", "067Y"
    nested = pydicom.Dataset()
    nested.PersonAddress = "Lindenweg 4"
    dataset.PersonIdentificationCodeSequence = [nested]
    block = dataset.private_block(0x0011, "WARD CREATOR", create=True)
    block.add_new(1, "UN", b"Nurse Ottilie ")
    block.add_new(2, "UN", bytes(range(9)))
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    (tmp_path / "b.txt").write_text("no DICOM")
    assert identifying_values([tmp_path / "a.dcm", tmp_path / "b.txt"]) == {
        "Brömmelhaupt^Käthe=字", "Brömmelhaupt^Käthe", "Brömmelhaupt", "Käthe", "1.2.826.0.1.77", "Follow up",
        NUMBER, "067Y", "Lindenweg 4", "WARD CREATOR", "Nurse Ottilie",
        f"PYDICOM {pydicom.__version__}", pydicom.uid.PYDICOM_IMPLEMENTATION_UID,
    }
