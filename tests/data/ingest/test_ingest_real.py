"""Real studies from end to end: folders, archives, NIfTI, pictures and reports; every file is accounted for."""

import csv
import gzip
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from megamed.data.ingest.engine import run
from megamed.data.privacy import Pseudonyms, load_or_create_key
from megamed.data.samples import load
from megamed.data.samples.validate import validate
from megamed.data.store import VolumeStore
from megamed.utils import UserError
from tests.real_data import SHARED, needs

REAL = ("fmri_dicom", "ct_head_ge", "ct_phantom", "mr_transfer_syntaxes")
FMRI, CT, PHANTOM = SHARED / "fmri_dicom" / "dicoms", SHARED / "ct_head_ge" / "In" / "GE", SHARED / "ct_phantom"
SLICES = PHANTOM / "In" / "Philips" / "S21570" / "S2010"
MR = SHARED / "mr_transfer_syntaxes" / "In"
NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"
XML = """<eCitation><uId id="CXR7"/><Abstract><AbstractText Label="FINDINGS">Lungs are clear.</AbstractText></Abstract>
<parentImage id="CXR7_IM-1"/></eCitation>"""


def uid(folder: Path) -> str:
    """The study of the images in a folder; their names have numbers, those of indexes have none."""
    return pydicom.dcmread(next(folder.glob("*[0-9]*")), stop_before_pixels=True).StudyInstanceUID


def table(store: Path) -> list[dict[str, str]]:
    with open(f"{store}.private/quarantine.csv", newline="") as file:
        return list(csv.DictReader(file))


def sums(store: Path) -> dict[str, str]:
    return {record.series: record.sha256 for record in VolumeStore(store).records()}


def ingest(store: Path, *sources: Path, **options):
    """One run; the number of files that there are is the number that it counts."""
    outcome = run(sources, store, workers=2, progress=False, **options)
    assert json.loads((store / "summary.json").read_text()) == {
        name: getattr(outcome, name) for name in ("studies", "series", "frames", "num_bytes", "samples", "refused")
    }
    return outcome


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32), dtype=np.uint8)).save(path)


def write_small(folder: Path) -> None:
    """NIfTI with what lies beside it, pictures, reports of each kind, and files that are of no use."""
    folder.mkdir()
    shutil.copy(NIBABEL / "functional.nii", folder / "run_bold.nii")
    (folder / "run_bold.json").write_text('{"RepetitionTime": 2.5, "PatientName": "Doe"}')
    (folder / "run_bold.bvec").write_text("0 0 0\n")
    (folder / "alone.json").write_text('{"RepetitionTime": 2.5}')
    nibabel.save(nibabel.Nifti1Pair(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4)), folder / "half.img")
    (folder / "half.img").rename(folder.parent / "half.img")
    for number, name in enumerate(["chest_1.png", "CXR7_IM-1.png", "same.png"]):
        write_picture(folder / name, min(number, 1))
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "notes.txt").write_text("notes")
    (folder / "list.json").write_text(json.dumps([
        {"StudyInstanceUID": uid(FMRI), "findings": "A run.", "impression": "Visual cortex is active."},
        {"findings": "Nobody knows what this is about."},
    ]))
    (folder / "lines.jsonl").write_text("\n".join([
        json.dumps({"filename": "x/chest_1.png", "report": "FINDINGS: Clear.\nIMPRESSION: Normal."}), "{broken",
        json.dumps({"StudyInstanceUID": "1.2.3.4", "findings": "Elsewhere."}),
    ]))
    (folder / "table.csv").write_text(f"StudyInstanceUID;report\n{uid(CT)};Thick slices of a head.\n")
    (folder / "article.xml").write_text(XML)
    (folder / "cut.json").write_text('[{"StudyInstanceUID": "1.2", "findings": "x"')


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    write_small(folder / "small")
    # Three of nine that are the same volume under other instance UIDs.
    (folder / "copies").mkdir()
    for name in ("1.dcm", "2.dcm", "3.dcm"):
        shutil.copy(MR / name, folder / "copies")
    sources = [FMRI, CT, PHANTOM, folder / "small", folder / "copies"]
    return folder, sources, ingest(folder / "store", *sources)


@needs(*REAL)
def test_every_file_is_accounted_for(first):
    folder, sources, outcome = first
    there = [Path(top) / name for source in sources for top, _, names in os.walk(source) for name in names]
    assert outcome.files == len(there) and outcome.kinds == {
        "series": 630 + 28 + 28 + 1 + 2, "report": 4, "sidecar": 2, "index": 1, "hidden": 1,
        "refused": sum(path.name == "LICENSE" for path in there) + 5 + 3,  # of no use in "small", and three copies
    }
    rows = [(Path(row["file"]).name, row["code"], row["reason"].partition(":")[0]) for row in table(folder / "store")]
    plain = "several slices lie at one place with the same number and time"
    no_format = "it is of no format that is read"
    assert sorted(rows) == sorted([
        *((path.name, "unknown-format", no_format) for path in there if path.name == "LICENSE"),
        ("notes.txt", "unknown-format", no_format),
        *((f"{n}.dcm", "unclear-order", plain) for n in (1, 2, 3)),
        ("alone.json", "lone-sidecar", "it holds no reports, and no NIfTI file of its name lies beside it"),
        ("half.hdr", "missing-file", "the .img of this .hdr is missing"),
        ("same.png", "duplicate", "the same picture is there under another name"),
        ("cut.json", "report-json", "a file of reports that is no JSON, from line 1 on"),
        ("list.json", "report-of-nothing", "line 2"), ("lines.jsonl", "report-json", "line 2"),
        ("lines.jsonl", "no-study", "line 3"),
    ])
    assert {str(path) for path in there} >= {row["file"] for row in table(folder / "store")}
    assert sum(outcome.refused.values()) == len(rows) and all(row["mend"] for row in table(folder / "store"))
    assert (outcome.new_series, outcome.series, outcome.known_series, outcome.samples) == (6, 6, 0, 4)
    assert outcome.frames == 630 + 28 + 28 + 20 * 3 + 2 and outcome.studies == 4
    shapes = sorted(record.info.shape for record in VolumeStore(folder / "store").records())
    assert shapes == [(1, 1, 32, 32), (1, 1, 32, 32), (1, 28, 512, 512), (1, 28, 512, 512), (18, 35, 80, 80),
                      (20, 3, 21, 17)]
    assert VolumeStore(folder / "store").verify() == []
    said = json.loads((folder / "store" / "store.json").read_text())
    assert said["deidentified"]["dates"] == "dropped" and len(said["key"]) == 20
    assert {path.name for path in (folder / "store.private").iterdir()} == {
        "project.key", "quarantine.csv", "reports.jsonl", "scan.jsonl"}


@needs(*REAL)
def test_reports_become_samples_of_their_series(first):
    folder, _, _ = first
    store = VolumeStore(folder / "store")
    pseudonyms = Pseudonyms(load_or_create_key(folder / "store.private" / "project.key"))
    samples = list(load(store.root / "samples.jsonl"))
    assert list(validate(store.root / "samples.jsonl", store)) == []
    told = {sample.messages[1].content: [store.record(study.series) for study in sample.studies] for sample in samples}
    assert sorted(told) == ["Findings: A run.\nImpression: Visual cortex is active.",
                            "Findings: Clear.\nImpression: Normal.", "Lungs are clear.", "Thick slices of a head."]
    studies = {records[0].study for records in told.values()}
    assert {pseudonyms.of("study", uid(FMRI)), pseudonyms.of("study", uid(CT)), ""} == studies
    assert told["Lungs are clear."][0].accession == pseudonyms.of("accession", "CXR7_IM-1")


@needs(*REAL)
def test_what_is_known_is_not_read_again_and_stays(first):
    folder, sources, outcome = first
    before, samples = sums(folder / "store"), (folder / "store" / "samples.jsonl").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (folder / "store" / "series").rglob("*")}
    rows, size = table(folder / "store"), (folder / "store.private" / "scan.jsonl").stat().st_size
    again = ingest(folder / "store", *sources)
    assert (again.new_series, again.known_series, again.samples) == (0, 6, 4)
    assert (again.kinds, again.refused, table(folder / "store")) == (outcome.kinds, outcome.refused, rows)
    assert (folder / "store" / "samples.jsonl").read_bytes() == samples
    assert (folder / "store.private" / "scan.jsonl").stat().st_size == size

    more = folder / "more"
    write_picture(more / "new.png", 7)
    shutil.copy(MR / "1.dcm", more)
    (more / "late.csv").write_text(f"StudyInstanceUID,findings\n{uid(SLICES)},A phantom.\n")
    added = ingest(folder / "store", more)
    assert (added.new_series, added.known_series, added.series, added.samples) == (2, 0, 8, 5)
    assert added.kinds == {"series": 2, "report": 1} and added.refused == outcome.refused
    assert before.items() <= sums(folder / "store").items()
    assert set(samples.splitlines()) < set((folder / "store" / "samples.jsonl").read_bytes().splitlines())
    assert table(folder / "store") == rows
    assert {path: path.stat().st_mtime_ns for path in times if path.is_file()}.items() <= times.items()

    # What lies beside a file may come later.
    shutil.copy(NIBABEL / "functional.nii", folder / "small" / "alone.nii")
    (folder / "half.img").rename(folder / "small" / "half.img")
    late = ingest(folder / "store", folder / "small")
    assert late.kinds["sidecar"] == 3 and late.series == added.series + 1 and late.refused["duplicate"] == 2
    assert not {"lone-sidecar", "missing-file"} & set(late.refused)


def test_reports_may_come_before_or_after_their_study_and_in_any_run(tmp_path):
    store, pictures, texts = tmp_path / "store", tmp_path / "pictures", tmp_path / "texts"
    for place in ("p1/s1/a.png", "p1/s2/b.png", "plain/c.png"):
        write_picture(pictures / place, len(place) + ord(place[-5]))
    texts.mkdir()
    (texts / "one.jsonl").write_text('{"study": "s1", "findings": "One."}\n{"study": "s2", "findings": "Two."}\n'
                                     '{"image": "c.png", "findings": "Sea \\ud800."}\n')
    (texts / "more.csv").write_text("study_id,report\n1,Addendum.\n")

    def answers() -> list[str]:
        return sorted(sample.messages[1].content for sample in load(store / "samples.jsonl"))

    assert ingest(store, texts).refused == {"no-study": 4} and not (store / "samples.jsonl").exists()
    assert ingest(store, pictures / "p1").refused == {"no-study": 1} and answers() == ["Addendum.", "One.", "Two."]
    assert ingest(store, pictures / "plain").refused == {} and answers() == ["Addendum.", "One.", "Sea ?.", "Two."]
    whole = (store / "samples.jsonl").read_bytes()
    # A study that gets one series more is told of once.
    write_picture(pictures / "p1/s1/later.png", 99)
    ingest(store, pictures / "p1/s1")
    assert len(answers()) == 4 and [len(sample.studies) for sample in load(store / "samples.jsonl")].count(2) == 2
    ingest(tmp_path / "other", pictures, texts, key=tmp_path / "store.private" / "project.key")
    assert (store / "samples.jsonl").read_bytes() == (tmp_path / "other" / "samples.jsonl").read_bytes() != whole
    # A file that was edited counts as it is now, one that is gone from its source does no longer.
    (texts / "one.jsonl").write_text('{"study": "s1", "findings": "Once more."}\n')
    (texts / "more.csv").unlink()
    assert ingest(store, texts).refused == {} and answers() == ["Once more."]
    (tmp_path / "store.private" / "reports.jsonl").unlink()
    with pytest.raises(UserError, match=r"is missing or damaged; restore it from a backup, or move samples.jsonl away"):
        ingest(store, texts)
    assert answers() == ["Once more."]


@needs(*REAL)
def test_archives_are_folders(first, tmp_path):
    """The same series under the same names, and who it is of by the folders in an archive."""
    folder, _, _ = first
    pack = tmp_path / "pack"
    write_picture(pack / "files/p10/p10000032/s50414267/a.png", 3)
    write_picture(pack / "train/patient00001/study1/view1_frontal.png", 4)
    image = nibabel.load(NIBABEL / "functional.nii")
    data = np.asarray(image.dataobj)
    (pack / "sub-01/ses-02/func").mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(data, image.affine), pack / "sub-01/ses-02/func/sub-01_ses-02_bold.nii.gz")
    (pack / "sub-01/ses-02/func/sub-01_ses-02_bold.json").write_text('{"RepetitionTime": 2.5}')
    nibabel.save(nibabel.Nifti1Pair(data[..., 0], image.affine), pack / "pair.img")
    (pack / "pair2.hdr").write_bytes((pack / "pair.hdr").read_bytes())
    (pack / "pair2.img.gz").write_bytes(gzip.compress((pack / "pair.img").read_bytes()[:-2] + b"\1\1"))
    (pack / "lost.hdr").write_bytes((pack / "pair.hdr").read_bytes())
    (pack / "mimic.csv").write_text("study_id,text\n50414267,FINDINGS: clear.\n")
    with zipfile.ZipFile(tmp_path / "fmri.zip", "w") as archive:
        for path in sorted(FMRI.iterdir()):
            archive.write(path, f"deep/er/{path.name}")
    with zipfile.ZipFile(tmp_path / "pack.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in pack.rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(pack))
    with tarfile.open(tmp_path / "nested.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "pack.zip", "./inner/pack.zip")
    key = folder / "store.private" / "project.key"
    num_members = sum(path.is_file() for path in pack.rglob("*"))
    kinds = {"series": 2 + 1 + 4, "report": 1, "sidecar": 1, "refused": 1}
    stores = {}
    for name, sources, more in (
        ("folder", [pack], {}), ("zip", [tmp_path / "fmri.zip", tmp_path / "pack.zip"], {"series": 630, "archive": 2}),
        ("nested", [tmp_path / "nested.tar.gz"], {"archive": 2}),
    ):
        outcome = ingest(tmp_path / name, *sources, key=key)
        assert outcome.kinds == {kind: kinds.get(kind, 0) + more.get(kind, 0) for kind in {*kinds, *more}}
        assert outcome.files == num_members + sum(more.values()) and outcome.refused == {"missing-file": 1}
        assert not list((tmp_path / f"{name}.private" / "tmp").glob("*")) and outcome.samples == 1
        stores[name] = sums(tmp_path / name)
        owners = {record.series: (record.patient, record.study, record.info.repetition_time_s)
                  for record in VolumeStore(tmp_path / name).records() if record.series in sums(tmp_path / "folder")}
        pseudonyms = Pseudonyms(load_or_create_key(key))
        for patient, study in (("p10000032", "s50414267"), ("patient00001", "patient00001/study1")):
            assert (pseudonyms.of("patient", patient), pseudonyms.of("study", study), None) in owners.values()
        bids = pseudonyms.of("patient", "sub-01"), pseudonyms.of("study", "sub-01_ses-02"), 2.5
        assert bids in owners.values()
    assert stores["folder"] == stores["nested"] and len(stores["folder"]) == 5
    fmri = {name: total for name, total in stores["zip"].items() if name not in stores["folder"]}
    assert fmri.items() <= sums(folder / "store").items() and len(fmri) == 1


@needs(*REAL)
def test_a_store_keeps_its_key_and_dates(first, tmp_path):
    folder, sources, _ = first
    load_or_create_key(tmp_path / "other.key")
    for options, message in (
        ({"dates": "shift"}, "ingest with --dates drop"), ({"key": tmp_path / "other.key"}, "that one by --key FILE"),
    ):
        with pytest.raises(UserError, match=message):
            ingest(folder / "store", *sources, **options)
