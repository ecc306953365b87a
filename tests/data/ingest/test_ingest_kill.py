"""An ingest that is killed again and again ends as one that nobody disturbed, byte for byte."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from megamed.data.privacy import load_or_create_key
from megamed.data.store import VolumeStore
from tests.data.readers.dicom_files import ct_slice, run, save
from tests.real_data import SHARED

NUM_KILLS, SEED = 20, 0
# A worker has nothing to do after its kill; a busy machine may need a moment to do it.
DEATH_S = 10.0
LONGEST_S = 120.0
TOOL = Path(__file__).resolve().parents[3] / "tools" / "ingest.py"
NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"


def write_sources(folder: Path) -> list[Path]:
    """Real studies, or small ones of the same kinds: a CT stack, a run, a zip of a stack; NIfTI, pictures, reports."""
    small, fmri, ct, phantom = (folder / name for name in ("small", "fmri", "ct", "phantom"))
    small.mkdir(parents=True)
    if SHARED.is_dir():
        ct, phantom = SHARED / "ct_head_ge" / "In" / "GE", SHARED / "ct_phantom" / "In" / "Philips" / "S21570" / "S2010"
        fmri.mkdir()
        for path in sorted((SHARED / "fmri_dicom" / "dicoms").iterdir())[:210]:
            shutil.copy(path, fmri)
    else:
        save(fmri, run(num_volumes=6, num_slices=35))
        for number, stack in enumerate((ct, phantom)):
            own = {"StudyInstanceUID": f"1.2.3.{number}", "SeriesInstanceUID": f"1.2.4.{number}"}
            save(stack, [ct_slice(z, **own) for z in range(28)])
    with zipfile.ZipFile(small / "phantom.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in sorted(phantom.iterdir()):
            archive.write(path, path.name)
    for name in ("functional.nii", "anatomical.nii", "example_nifti2.nii.gz"):
        shutil.copy(NIBABEL / name, small)
    rng = np.random.default_rng(SEED)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(small / f"chest_{number}.png")
        (small / f"notes_{number}.txt").write_text("of no use")
    (small / "cut.png").write_bytes((small / "chest_0.png").read_bytes()[:-2000])
    rows = "".join(f"chest_{number}.png,FINDINGS: Clear {number}.\n" for number in range(12))
    (small / "reports.csv").write_text(f"filename,report\n{rows}nobody.png,FINDINGS: lost.\n")
    return [ct, fmri, small]


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Callable[[Path], list[str | Path]]:
    folder = tmp_path_factory.mktemp("kill")
    sources = write_sources(folder / "sources")
    load_or_create_key(folder / "the.key")

    def of(store: Path) -> list[str | Path]:
        return [sys.executable, TOOL, *sources, "--out", store, "--workers", "2", "--key", folder / "the.key"]

    return of


def start(command: list[str | Path]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def tree(pid: int) -> list[int]:
    """A process, and those that it has started, and they."""
    pids = [pid]
    for one in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
    return pids


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which some containers leave, does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def await_death(pids: list[int]) -> None:
    end = time.monotonic() + DEATH_S
    while any(map(alive, pids)):
        assert time.monotonic() < end, "a worker lives on"
        time.sleep(0.005)


def kill(process: subprocess.Popen[bytes], whole: bool) -> None:
    """Kill the command, or with it everything that it has started, and see that all of it is dead."""
    pids = tree(process.pid)
    for pid in pids if whole else pids[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    await_death(pids)


def content(folder: Path) -> dict[str, bytes]:
    """Every file, and every folder, by its path below."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def stage(store: Path, num_series: int) -> str:
    """How far an ingest is, by what it has written."""
    journal = Path(f"{store}.private") / "scan.jsonl"
    if not journal.exists():
        return "start"
    there = sum(1 for _ in (store / "series").glob("*/*"))
    unfinished = (store / ".unfinished").is_dir() and any((store / ".unfinished").iterdir())
    if there == num_series and not unfinished:
        return "closing"
    return "reading" if there or unfinished else "scan"


def test_killed_twenty_times_it_ends_as_if_never(command, tmp_path):
    whole = tmp_path / "whole"
    began = time.monotonic()
    process = start(command(whole))
    assert process.wait(LONGEST_S) == 0, process.stderr.read()
    seconds = time.monotonic() - began
    expected, quarantine = content(whole), (tmp_path / "whole.private" / "quarantine.csv").read_bytes()
    num_series = len(VolumeStore(whole))
    assert num_series == 18 and {"index.parquet", "summary.json", "samples.jsonl", "store.json"} <= set(expected)

    rng, killed, num_stores = random.Random(SEED), Counter(), 0
    while killed.total() < NUM_KILLS:
        store = tmp_path / f"killed{num_stores}"
        num_stores += 1
        while True:
            process = start(command(store))
            if killed.total() < NUM_KILLS:
                # Kills come when a stage has begun that fewest have hit, a moment later; or whenever.
                wanted = rng.choice(["scan", "reading", "closing", ""])
                moment = rng.uniform(0, seconds if not wanted else 0.1 * seconds)
                wait_for(process, store, num_series, wanted, moment)
            else:
                process.wait(LONGEST_S)
            if process.poll() is not None:
                break
            at = stage(store, num_series)
            kill(process, whole=rng.random() < 0.5)
            killed[at] += 1
        assert process.returncode == 0, process.stderr.read()
        assert content(store) == expected
        private = Path(f"{store}.private")
        assert (private / "quarantine.csv").read_bytes() == quarantine
        assert not (private / "tmp").exists() and not any((store / ".unfinished").iterdir())
    assert min(killed[at] for at in ("scan", "reading", "closing")) > 0


def wait_for(process: subprocess.Popen[bytes], store: Path, num_series: int, wanted: str, moment: float) -> None:
    """Until an ingest is at a stage, and some seconds on; or until it ends."""
    while process.poll() is None and wanted and stage(store, num_series) != wanted:
        time.sleep(0.002)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
