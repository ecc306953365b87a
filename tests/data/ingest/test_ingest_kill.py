"""Killed at any moment, with all its processes, an ingest goes on where it was: the store is the same to the byte."""

import contextlib
import gzip
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from tests.launch.command import descendants
from tests.real_data import SHARED, needs

TOOL = Path(__file__).resolve().parents[3] / "tools" / "ingest.py"
NUM_KILLS, SEED = 20, 0
KEY = "5e" * 32 + "\n"


def command(source: Path, store: Path) -> list[str]:
    return [sys.executable, str(TOOL), str(source), "--out", str(store), "--workers", "2",
            "--key", str(source.parent / "project.key")]


def files_of(store: Path) -> dict[str, bytes]:
    """Content by path; the lock alone is no part of what a store is."""
    return {path.relative_to(store).as_posix(): path.read_bytes()
            for path in store.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """DICOM of real studies as files and in an archive, a run, pictures, reports, and files that are refused."""
    folder = tmp_path_factory.mktemp("killed") / "source"
    folder.mkdir()
    (folder.parent / "project.key").write_text(KEY)
    (folder.parent / "project.key").chmod(0o600)
    for file in sorted((SHARED / "fmri_dicom" / "dicoms").iterdir())[:70]:
        os.link(file, folder / file.name) if file.stat().st_dev == folder.stat().st_dev else \
            shutil.copy(file, folder / file.name)
    with zipfile.ZipFile(folder / "head.zip", "w") as archive:
        for file in sorted((SHARED / "ct_head_ge" / "In" / "GE").iterdir()):
            archive.write(file, f"head/{file.name}")
    for name in ("MR_small.dcm", "CT_small.dcm", "MR_truncated.dcm", "test-SR.dcm"):
        shutil.copy(str(get_testdata_file(name)), folder / name)
    tests = Path(nibabel.__file__).parent / "tests" / "data"
    shutil.copy(tests / "functional.nii", folder)
    (folder / "anatomical.nii.gz").write_bytes(gzip.compress((tests / "anatomical.nii").read_bytes(), mtime=0))
    for i in range(60):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{i}.png")
    rows = "".join(f"picture{i}.png,The lungs are clear {i}.\n" for i in range(0, 60, 3))
    (folder / "reports.csv").write_text(f"image,findings\n{rows}")
    return folder


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to the command and to all that it started, at one moment."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP)  # so that it starts nothing more
    for pid in (*descendants(process.pid), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@needs("fmri_dicom", "ct_head_ge")
def test_killed_twenty_times_it_makes_the_same_store(source):
    whole, killed = source.parent / "whole", source.parent / "killed"
    began = time.monotonic()
    done = subprocess.run(command(source, whole), capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    expected = files_of(whole)
    assert {"index.parquet", "samples.jsonl", "store.json", "summary.json"} < expected.keys()
    assert len(expected) >= 60

    rng, log, num_kills = random.Random(SEED), source.parent / "log", 0
    seen: set[str] = set()
    with log.open("wb") as file:
        while num_kills < NUM_KILLS:
            with subprocess.Popen(command(source, killed), stdout=file, stderr=file) as process:
                try:  # a run that is not killed is through in this time, or sooner where an earlier one had begun
                    code = process.wait(rng.uniform(0, 1) * seconds)
                except subprocess.TimeoutExpired:
                    kill_tree(process)
                    num_kills += 1
                    seen.add(state_of(killed))
                    continue
            assert code == 0 and files_of(killed) == expected, log.read_text()
            shutil.rmtree(killed)
            shutil.rmtree(killed.with_name("killed.private"))
    done = subprocess.run(command(source, killed), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(killed) == expected
    tables = [folder.with_name(f"{folder.name}.private") / "quarantine.csv" for folder in (whole, killed)]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert not list(killed.with_name("killed.private").glob("tmp*")) and not list((killed / ".unfinished").iterdir())
    # Kills came at various moments.
    assert len(seen) >= 3, seen


def state_of(store: Path) -> str:
    """How far a killed ingest had come."""
    if not store.exists():
        return "nothing"
    if (store / "summary.json").exists():
        return "summary"
    return f"{min(len(list(store.glob('series/*/*'))), 3)} series"
