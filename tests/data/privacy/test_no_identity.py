"""From ingest to a trained checkpoint: not one identifying value of the source files is in anything that is written.

Which values identify, and how they are searched for, says `megamed.data.privacy.audit`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamed.data import reports
from megamed.data.keywords import terms
from megamed.data.privacy import Pseudonyms, load_or_create_key
from megamed.data.privacy.audit import find_identity, identifying_values
from megamed.data.samples import from_reports
from megamed.data.store import VolumeStore
from tests.data.privacy.identity import ELSEWHERE, FAMILY, write_ct, write_others
from tests.launch.command import run
from tests.real_data import SHARED, needs

ROOT = Path(__file__).resolve().parents[3]
REAL = ("fmri_dicom", "ct_head_ge", "ct_phantom", "mr_transfer_syntaxes")
# Beyond the rule: words in private and coil attributes of the real studies that megamed's own output has, too. Every
# saved tokenizer has a key "normalized" and the name PreTrainedTokenizerFast; questions ask for the "Body part".
EXEMPT = {"normalized", "Fast", "Body", "Brain"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders and files to ingest, and the values in them that identify."""
    invented = tmp_path_factory.mktemp("sources") / "Quokkenbruck"
    write_ct(invented / FAMILY / "1937-08-09")
    write_others(invented / f"{FAMILY}2")
    real = [SHARED / name for name in REAL if (SHARED / name).is_dir()]
    # One of the nine encodings of one acquisition: together they are no series.
    roots = [path / "In" / "1.dcm" if path.name == "mr_transfer_syntaxes" else path for path in real]
    values = identifying_values(path for root in (invented, *real) for path in root.rglob("*") if path.is_file())
    return [invented, *roots], (values | ELSEWHERE) - EXEMPT


@pytest.fixture(scope="module")
def store(sources, tmp_path_factory):
    """The store made of them, and what the ingest printed."""
    folder = tmp_path_factory.mktemp("ingest")
    # Which patients are held out follows from their pseudonyms: with a key that is drawn, at times those with reports.
    key = folder / "store.private" / "project.key"
    key.parent.mkdir(mode=0o700)
    key.write_text("33" * 32)
    key.chmod(0o600)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "ingest.py", *sources[0], "--out", folder / "store", "--workers", "2"],
        capture_output=True, cwd=ROOT, timeout=300,
    )
    (folder / "output").write_bytes(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr
    return folder


@needs(*REAL)
def test_ingest_keeps_no_identity(sources, store):
    _, values = sources
    # A rule that let everything pass would find nothing, too.
    assert len([value for value in values if value.startswith("Z")]) > 1500
    assert len(values) > 4500 and {"Jane_Doe", "20140425", "NOTTINGHAM", "Zprivate bytes q"} <= values
    assert {hit.value for hit in find_identity(values, [store / "store.private"])} >= {FAMILY}
    assert list((store / "store" / "series").rglob("voxels.npy"))
    assert find_identity(values, [store / "store", store / "output"]) == []


@needs(*REAL)
def test_of_descriptions_only_listed_terms_are_kept(store):
    found = {(record.info.modality, record.info.keywords) for record in VolumeStore(store / "store").records()}
    assert ("CT", ("chest", "lung nodule", "pulmonary embolism")) in found
    assert ("MR", ("pituitary", "stroke", "t1")) in found
    assert {word for _, words in found for word in words} <= set(terms().values())


@needs(*REAL)
def test_reports_keep_no_identity(sources, store):
    """Reports by accession number, by study and by the name of a picture find their series, and tell nobody's name."""
    pseudonyms = Pseudonyms(load_or_create_key(store / "store.private" / "project.key"))
    paths = [path for path in sources[0][0].rglob("*") if path.is_file()]
    read_from = [path for path in paths if reports.can_read(path, path.read_bytes()[:1024])]
    assert {path.suffix for path in read_from} == {".json", ".csv"} and len(read_from) == 2
    readings = [reports.read(path, pseudonyms) for path in read_from]
    assert [refusal.code for reading in readings for _, refusal in reading.refused] == ["report-of-nothing"]
    found = [report for reading in readings for report in reading.reports]
    lines, unmatched = from_reports(found, VolumeStore(store / "store").records())
    assert (len(lines), unmatched) == (3, [])
    samples = store / "samples.jsonl"
    samples.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert samples.read_text().count("no nodule") == 2
    assert find_identity(sources[1], [samples]) == []


@needs(*REAL)
def test_training_keeps_no_identity(sources, store):
    """Metrics, tracker, configuration, tokenizer, checkpoint, and what is shown."""
    code, output = run(
        store / "training", "+exp=ct", f"data.store={store}/store", f"run.dir={store}/runs", "train.steps=1",
        "train.microbatches=1", "checkpoint.every_steps=1", "model.language.num_layers=1", "model.vision.num_layers=1",
        "data.frames.choice.at_most=2", "data.packing.rows_per_block=1",
    )
    assert code == 0, output
    files = {path.name for path in (store / "runs").rglob("*")}
    assert {"metrics.jsonl", "config.yaml", "tokenizer", "step_00000001"} <= files
    assert any(name.endswith(".wandb") for name in files)
    assert find_identity(sources[1], [store / "runs", store / "training"]) == []
