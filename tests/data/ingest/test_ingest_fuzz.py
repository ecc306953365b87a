"""2,000 damaged, lying and malicious files in one ingest: none stops it, none is taken for what it is not."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from megamed.data.readers.dicom.parse import quiet
from megamed.data.series import Series
from megamed.data.store import SeriesRecord, VolumeStore
from tests.data.ingest.bombs import BOMBS
from tests.data.ingest.mutations import DICOM, FRAMES, FRAMES_RLE, NIFTI, Mutant, mutants, sound
from tools.reader_tables import compared, dicom_difference

COUNT, SEED = 2000, 0
TOOL = Path(__file__).resolve().parents[3] / "tools" / "ingest.py"

# Alone on two cores it takes 10 s, which a busy machine may make three times as many; a hang takes for ever.
LONGEST_S = 120
MAX_MEMORY = 384 << 20
# An idle worker has 120 MiB with its libraries, and one task may take all of MAX_MEMORY on top.
WORKER_BYTES = (120 << 20) + MAX_MEMORY
# 110 MiB of libraries, and no more for 2,000 files than what the journal keeps.
PARENT_BYTES = 160 << 20

# A process counts what its parent had when it began: this one, without torch, must not be that parent.
_LAUNCHER = """
import json, os, sys, time
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
peak = 0
while not (ended := os.wait4(pid, os.WNOHANG))[0]:
    with open(f"/proc/{pid}/status") as file:
        peak = next((int(line.split()[1]) for line in file if line.startswith("VmHWM:")), peak)
    time.sleep(0.05)
print(json.dumps([os.waitstatus_to_exitcode(ended[1]), peak << 10, ended[2].ru_maxrss << 10]))
"""


@dataclass
class Fuzzed:
    """What came of the ingest.

    Attributes:
        mutants: by path.
        refused: code by path.
        identities: of the files that are series, as the journal has them.
        records: of the store.
        shown: on the console.
        parent_bytes, largest_bytes: peaks of resident memory of the command, and of all its processes.
    """

    store: Path
    mutants: dict[str, Mutant]
    shown: str = ""
    code: int = -1
    parent_bytes: int = 0
    largest_bytes: int = 0
    seconds: float = 0.0
    refused: dict[str, str] = field(default_factory=dict)
    owners: dict[tuple[str, ...], list[str]] = field(default_factory=lambda: defaultdict(list))
    records: list[SeriesRecord] = field(default_factory=list)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    source = folder / "source"
    source.mkdir()
    result = Fuzzed(folder / "store", {})
    for mutant in mutants(COUNT, SEED):
        (source / mutant.name).write_bytes(mutant.content)
        result.mutants[str(source / mutant.name)] = mutant
    _ingest(result, source, folder / "console")
    with open(folder / "store.private" / "quarantine.csv", newline="") as file:
        result.refused = {row["file"]: row["code"] for row in csv.DictReader(file)}
    for text in (folder / "store.private" / "scan.jsonl").read_text().splitlines():
        line = json.loads(text[9:])
        if line.get("kind") == "series" and line["f"] not in result.refused:
            patient, study, _, accession, _ = line["identity"]
            result.owners[patient, study, accession].append(line["f"])
    result.records = list(VolumeStore(folder / "store").records())
    return result


def _ingest(result: Fuzzed, source: Path, console: Path) -> None:
    """Run the command; its peaks of memory are the kernel's."""
    command = [TOOL, source, "--out", result.store, "--workers", "2", "--time-limit", "3",
               "--max-memory", str(MAX_MEMORY)]  # fmt: skip
    began = time.monotonic()
    with console.open("wb") as file, subprocess.Popen(
        [sys.executable, "-S", "-c", _LAUNCHER, sys.executable, *command], stdout=subprocess.PIPE, stderr=file,
        start_new_session=True,
    ) as launcher:
        try:
            said, _ = launcher.communicate(timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
            raise
    result.code, result.parent_bytes, result.largest_bytes = json.loads(said)
    result.seconds, result.shown = time.monotonic() - began, console.read_text()


def test_it_ends_as_always_and_within_its_memory(fuzzed):
    assert fuzzed.code == 0, fuzzed.shown
    assert fuzzed.parent_bytes < PARENT_BYTES and fuzzed.largest_bytes < WORKER_BYTES
    assert str(fuzzed.store.parent / "source") not in fuzzed.shown and "Traceback" not in fuzzed.shown
    # No reader raised what it does not mean to raise.
    assert not (fuzzed.store.with_name("store.private") / "errors.log").exists()
    assert not list(fuzzed.store.with_name("store.private").glob("tmp*"))
    assert VolumeStore(fuzzed.store).verify() == [] and not list((fuzzed.store / ".unfinished").iterdir())


def test_every_file_is_in_a_series_or_refused(fuzzed):
    accepted = {path for paths in fuzzed.owners.values() for path in paths}
    spoken_of = {*accepted, *fuzzed.refused}
    assert not accepted & {*fuzzed.refused}
    # An archive that could be listed is spoken of by its members.
    archives = {path for path in fuzzed.mutants if path not in spoken_of}
    assert all(any(path.startswith(f"{archive}/") for path in spoken_of) for archive in archives)
    assert all(Path(archive).suffix == ".zip" for archive in archives)
    members = {path for path in spoken_of if path not in fuzzed.mutants}
    assert all(any(path.startswith(f"{archive}/") for archive in archives) for path in members)
    # Each accepted file is a series of its own, and what tells the series apart is there in each.
    assert {(r.patient, r.study, r.accession) for r in fuzzed.records} == {*fuzzed.owners}
    assert len(fuzzed.records) == len(accepted) > COUNT // 4


def test_bombs_are_refused_and_sound_neighbours_taken(fuzzed):
    codes = {}
    for path, code in fuzzed.refused.items():
        name, _, member = path.partition("source/")[2].partition("/")
        if name[5:] in BOMBS:
            codes[f"{name[5:]}/{member}" if member else name[5:]] = code
    overlapping = {name: code for name, code in codes.items() if name.startswith("overlapping")}
    assert {*overlapping.values()} == {"archive-bomb"}
    assert codes.pop("countless.zip/inner.zip") in ("time-limit", "memory-limit")
    assert {name: code for name, code in codes.items() if name not in overlapping} == {
        "rows.dcm": "truncated", "frames.dcm": "truncated", "rle.dcm": "memory-limit", "jpeg.dcm": "memory-limit",
        "jls.dcm": "memory-limit", "j2k.dcm": "memory-limit", "deflated.dcm": "memory-limit", "dim.nii": "too-large",
        "large.nii.gz": "memory-limit", "longer.nii.gz": "damaged", "offset.nii.gz": "damaged",
        "twice.nii.gz": "not-nifti", "size.png": "too-large", "dense.png": "memory-limit",
        "ratio.zip/zeros.nii": "archive-bomb", "nested.zip/4.zip/3.zip": "nested-archives",
        "lying.zip/a.nii": "damaged-archive", "damaged.zip/0.dcm": "damaged-archive", "bomb.tar.bz2": "empty",
    }
    accepted = [path for paths in fuzzed.owners.values() for path in paths if "damaged.zip/" in path]
    assert sorted(Path(path).name for path in accepted) == ["1.dcm", "2.dcm", "3.dcm"]


def test_each_series_is_what_another_decoder_makes_of_the_file(fuzzed):
    faults = []
    with quiet():
        for record in fuzzed.records:
            (path,) = fuzzed.owners[record.patient, record.study, record.accession]
            series = Series(np.asarray(record.open()), record.info)
            if path in fuzzed.mutants:
                fault = difference(series, fuzzed.mutants[path], Path(path))
            else:
                archive, _, member = path.rpartition("/")
                with zipfile.ZipFile(archive) as file:
                    fault = dicom_difference(series, io.BytesIO(file.read(member)))
            faults += [(Path(path).name, fault)] if fault else []
    assert not faults


def difference(series: Series, mutant: Mutant, path: Path) -> float | str:
    """What is wrong with a series, as another decoder sees the file; nothing, if it is right."""
    if mutant.kind == "truncated" and not is_whole(mutant):
        return "cut, and taken"
    if mutant.seed in NIFTI:
        # Voxels that are scaled are rounded to float32.
        return max(found if found > 2**-24 else 0 for found in compared(series, path)[:1])
    if mutant.seed not in DICOM:
        return picture_difference(series, path)
    try:
        found = dicom_file_difference(series, mutant.seed, straightened(path))
    except Exception:
        # An element that pydicom asks for is lost, or the file is damaged behind the pixels. Nothing was made up.
        return dicom_file_difference(series, mutant.seed, mended(mutant))
    if mutant.seed == "SC_rgb_jpeg_dcmtk.dcm" and found:
        # JPEG has no checksum: what a picture with damaged bits shows differs between versions of libjpeg.
        found = float(np.abs(series.voxels_TSHW[0, 0] - np.int64(pixel_array(path, decoding_plugin="gdcm"))).max())
    return found


def dicom_file_difference(series: Series, seed: str, content: io.BytesIO) -> float:
    if seed in (FRAMES, FRAMES_RLE):
        stored = pydicom.dcmread(content).pixel_array.astype(np.int64)
        return float(np.abs(series.voxels_TSHW[0] - (2 * stored - 7)).max())
    found = dicom_difference(series, content)
    # Nothing else that is installed decodes JPEG of 12 bits.
    return 0.0 if seed == "JPGExtended.dcm" and np.isnan(found) else found


def is_whole(mutant: Mutant) -> bool:
    """Whether all pixels are there, and what was cut off lay behind them."""
    whole = sound(mutant.seed, int(mutant.name[:4]))
    if mutant.seed in DICOM:
        with quiet():
            found, expected = (pydicom.dcmread(io.BytesIO(content)) for content in (mutant.content, whole))
        return "PixelData" in found and found.PixelData == expected.PixelData
    if mutant.seed in NIFTI:
        return False
    found, expected = (np.asarray(Image.open(io.BytesIO(content))) for content in (mutant.content, whole))
    return bool((found == expected).all())


def mended(mutant: Mutant) -> io.BytesIO:
    """The sound file with the pixels of the damaged one."""
    whole = sound(mutant.seed, int(mutant.name[:4]))
    if len(whole) != len(mutant.content):
        return io.BytesIO(whole)
    pixels = pydicom.dcmread(io.BytesIO(whole)).PixelData
    start = whole.find(pixels)
    end = start + len(pixels)
    return io.BytesIO(whole[:start] + mutant.content[start:end] + whole[end:])


def straightened(path: Path) -> io.BytesIO:
    """A DICOM file with the bits that are none of a number by BitsStored and HighBit (PS3.5, 8.1.1) taken away.

    pydicom does not look at HighBit.
    """
    dataset = pydicom.dcmread(path)
    syntax, allocated, stored = dataset.file_meta.TransferSyntaxUID, dataset.BitsAllocated, dataset.BitsStored
    if stored == allocated or dataset.SamplesPerPixel > 1 or (syntax.is_encapsulated and syntax != RLELossless):
        return io.BytesIO(path.read_bytes())
    high = dataset.HighBit if stored - 1 <= dataset.HighBit < allocated else stored - 1
    dataset.BitsStored = allocated
    pixels = dataset.pixel_array
    pixels = (pixels.astype(pixels.dtype.newbyteorder("=")) << (allocated - 1 - high)) >> (allocated - stored)
    list(dataset)  # each element gets its VR, which an implicit data set does not have
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.set_pixel_data(pixels, dataset.PhotometricInterpretation, allocated, generate_instance_uid=False)
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, implicit_vr=False, little_endian=True, force_encoding=True)
    file.seek(0)
    return file


def picture_difference(series: Series, path: Path) -> float | str:
    image = Image.open(path)
    pixels = np.asarray(image if image.mode.startswith(("I", "L")) else image.convert("RGB"))
    found = series.voxels_TSHW[0, 0]
    if found.ndim < pixels.ndim:  # a picture of three equal channels
        pixels = pixels[..., 0]
    if found.shape != pixels.shape:
        return f"{found.shape} and not {pixels.shape}"
    return float(np.abs(found.astype(np.int64) - pixels).max())
