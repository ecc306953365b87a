"""From a DICOM description through the store to the pools that a series calls."""

import os
import subprocess
import sys
from pathlib import Path

import pydicom
import yaml

from megamed.data.ingest.engine import run
from megamed.data.keywords import terms
from megamed.data.specialties import MatchRule, Specialties, Specialty
from megamed.data.store import VolumeStore
from tests.data.readers import dicom_files as dicom

ROOT = Path(__file__).resolve().parents[3]
MOE = yaml.safe_load((ROOT / "conf" / "model" / "moe" / "specialists.yaml").read_text())
POOLS = {
    name: Specialty(name, tuple(MatchRule(**rule) for rule in pool.get("match", ())))
    for name, pool in MOE["pools"].items()
}


def write(folder: Path, number: int, slices: list[pydicom.Dataset], **changes: object) -> None:
    folder.mkdir(parents=True)
    for i, header in enumerate(slices):
        dicom.change(header, SeriesInstanceUID=f"1.2.826.77.{number}", SpecificCharacterSet="ISO_IR 192", **changes)
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        header.save_as(folder / f"{i}.dcm", enforce_file_format=True)


def test_descriptions_call_pools(tmp_path: Path) -> None:
    source, store = tmp_path / "source", tmp_path / "store"
    ct = [dicom.ct_slice(z) for z in range(3)]
    frames = [dicom.frame(z) for z in range(3)]
    multi = dicom.enhanced(frames, [dicom.pixels(z) for z in range(3)])
    secret = "Wrzesniewskaja 20140425"
    write(source / "a", 11, ct, StudyDescription=f"V.a. Lungenembolie {secret}", ProtocolName="LUNG_NODULE")
    write(source / "b", 12, [multi], SeriesDescription=f"Schädel-MRT Schlaganfall {secret}", PatientName="Knee^Liver")
    # A body part that is none of DICOM's codes, and descriptions that name nothing.
    picture = dicom.ct_slice(0)
    write(source / "c", 13, [picture], BodyPartExamined="KNIEGELENK", StudyDescription=[secret, "spine"])
    write(source / "d", 14, [dicom.ct_slice(0)], StudyDescription=secret, OperatorsName="Breast^Brain")
    run([source], store, workers=1, progress=False)

    specialties = Specialties([pool for name, pool in POOLS.items() if name != "general"])
    names = [specialty.name for specialty in specialties.known]
    found = {}
    for record in VolumeStore(store).records():
        called = specialties.of_series(record.info)
        found[record.info.keywords] = {name for i, name in enumerate(names) if called >> i & 1}
    assert found == {
        ("lung nodule", "pulmonary embolism"): {"chest"},
        ("brain", "stroke"): {"neuro"},
        ("knee", "spine"): {"musculoskeletal"},
        (): set(),
    }
    # The owner's folder has none of it, either: the text ends where it is read.
    written = b"".join(path.read_bytes() for path in tmp_path.glob("store*/**/*") if path.is_file())
    assert b"pulmonary embolism" in written and b"Wrzesniewskaja" not in written and b"20140425" not in written


def test_the_pools_that_ship_ask_for_terms_that_are_looked_for() -> None:
    rules = [rule for pool in POOLS.values() for rule in pool.rules]
    assert [rule.unknown_keyword() for rule in rules if rule.unknown_keyword()] == []
    asked = [word for rule in rules for word in rule.keywords]
    assert len(asked) > 30 and set(asked) <= set(terms().values()), "terms themselves, so that they are easy to find"


def test_the_command_prints_the_list_and_what_a_text_names() -> None:
    def command(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, ROOT / "tools" / "ingest.py", "keywords", *words], capture_output=True, text=True,
            check=True, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        return done.stdout

    assert command("CT HEAD W/O contrast, Mrs Doe").split("\n") == ["head", "without contrast", ""]
    assert command("Mrs Doe") == "none\n"
    lines = command().splitlines()
    assert [line.partition(":")[0] for line in lines] == sorted(set(terms().values()))
