"""The ingest command: one clear line for what a user can mend, and going on after Ctrl-C and a full disk."""

import fcntl
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.small_disk import mounted

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "tools" / "ingest.py")]
HEAVY = ("torch", "numpy", "pydicom", "nibabel", "pyarrow", "PIL", "tqdm", "multiprocessing")


def ingest(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def write_pictures(folder: Path, count: int, size: int = 16) -> None:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def make_store(folder: Path) -> Path:
    write_pictures(folder / "pictures", 1)
    assert ingest(folder / "pictures", "--out", folder / "store").returncode == 0
    return folder / "store"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 3 MB."""
    with mounted(tmp_path / "disk", "3m") as folder:
        yield folder


def test_help_is_there_at_once():
    code = ("import runpy, sys\nsys.argv = ['ingest.py', '--help']\ntry:\n"
            f"    runpy.run_path({COMMAND[1]!r}, run_name='__main__')\n"
            "except SystemExit as end:\n    assert not end.code\n"
            f"print([name for name in {HEAVY!r} if name in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n") and "130 after Ctrl-C" in out and "--max-memory SIZE" in out
    for words in ("", "--workers 0 --out y", "--max-memory a --out y", "--dates keep --out y"):
        done = ingest("x", *words.split())
        assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr


def test_bad_inputs_are_one_line_each(tmp_path, monkeypatch, capfd):
    store = make_store(tmp_path)
    for name, text in {"newer": '{"format": "megamed-volume-store", "version": 99}', "odd": '{"format": "x"'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "store.json").write_text(text)
    (tmp_path / "useless").mkdir()
    (tmp_path / "useless" / "notes.txt").write_text("notes")
    (tmp_path / "open.key").write_text("00" * 32)
    (tmp_path / "bad.key").write_text("no key")
    (tmp_path / "bad.key").chmod(0o600)
    (tmp_path / "lost").mkdir()
    shutil.copytree(store, tmp_path / "lost" / "store")
    pictures = tmp_path / "pictures"
    new = tmp_path / "new"
    cases = [
        ([tmp_path / "gone", "--out", new], "gone: no such file or folder; give sources that exist"),
        ([pictures, "--out", pictures], "is neither empty nor a volume store; give a new folder"),
        ([pictures, "--out", pictures / "0.png"], "is a file; give the folder of a volume store"),
        ([pictures, "--out", tmp_path / "newer"], "version 99, this megamed reads up to 1"),
        ([pictures, "--out", tmp_path / "odd"], "store.json cannot be read"),
        ([pictures, "--out", new, "--key", tmp_path / "open.key"], "open to others than its owner"),
        ([pictures, "--out", new, "--key", tmp_path / "bad.key"], "does not hold 64 hexadecimal digits"),
        ([pictures, "--out", store, "--dates", "shift"], "ingest with --dates drop, or make a new store"),
        ([pictures, "--out", tmp_path / "lost" / "store"], "the key of this store is missing"),
        ([tmp_path / "useless", "--out", new], "nothing in the sources is of use: 1 files, of which 1 are refused"),
        (["inspect", tmp_path / "useless"], "is not a volume store (it has no store.json)"),
        (["verify", tmp_path / "gone"], "is not a volume store"),
    ]
    spec = importlib.util.spec_from_file_location("ingest_command", COMMAND[1])
    assert spec is not None and spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for arguments, message in cases:
        monkeypatch.setattr(sys, "argv", ["ingest.py", *map(str, arguments)])
        assert command.main() == 2, arguments
        shown = capfd.readouterr()
        # Bars are drawn over one another.
        lines = [line for line in re.split(r"[\r\n]+", shown.err) if line and not re.match(r"(scan|read):", line)]
        assert len(lines) == 1 and shown.out == "", (arguments, shown)
        assert lines[0].startswith("megamed: error: ") and message in lines[0]
    with open(store / ".lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = ingest(pictures, "--out", store)
    assert done.returncode == 2 and "is being written by another process; wait until it is done" in done.stderr


def test_what_is_said_is_numbers(tmp_path):
    write_pictures(tmp_path / "SECRET", 2)
    (tmp_path / "SECRET" / "SECRET.txt").write_text("SECRET")
    done = ingest(tmp_path / "SECRET", "--out", tmp_path / "store", "--workers", "1")
    assert done.returncode == 0 and "SECRET" not in done.stdout + done.stderr
    assert "3 files in " in done.stdout and "2 series new, 0 were there" in done.stdout
    table = tmp_path / "store.private" / "quarantine.csv"
    assert f"1 files and reports refused, each with the reason in {table}:\n" in done.stdout
    assert done.stdout.endswith("1  unknown-format\n")
    done = ingest("inspect", tmp_path / "store", "--series", "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4 and (tmp_path / "sheet.png").stat().st_size > 99
    assert ingest("verify", tmp_path / "store").stdout == "2 series, 0 faults\n"
    voxels = next((tmp_path / "store").rglob("voxels.npy"))
    voxels.write_bytes(voxels.read_bytes()[:-1] + b"?")
    done = ingest("verify", tmp_path / "store")
    assert done.returncode == 1 and "the sum of the voxels is wrong; delete this folder" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_goes_on(tmp_path, number, code):
    write_pictures(tmp_path / "pictures", 100)
    command = [*COMMAND, str(tmp_path / "pictures"), "--out", str(tmp_path / "store"), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not list((tmp_path / "store").glob("series/*/*")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.001)
        process.send_signal(number)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == code and "Traceback" not in said
    assert number != signal.SIGINT or said.endswith("megamed: interrupted; run the same command again to go on\n")
    assert not list((tmp_path / "store.private" / "tmp").glob("*"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r"(\d+) series new, (\d+) were there", done.stdout)
    assert found is not None and int(found[1]) + int(found[2]) == 100 and int(found[2]) > 0
    assert ingest("verify", tmp_path / "store").stdout == "100 series, 0 faults\n"


def test_a_full_disk_is_named_and_gone_on_from(tmp_path, small_disk):
    write_pictures(tmp_path / "pictures", 4, size=1000)
    done = ingest(tmp_path / "pictures", "--out", small_disk / "store")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.endswith("store: the disk is full; free space there, and run the same command again to go on\n")
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    done = ingest(tmp_path / "pictures", "--out", small_disk / "store")
    assert done.returncode == 0, done.stderr
    assert ingest("verify", small_disk / "store").stdout == "4 series, 0 faults\n"
    assert json.loads((small_disk / "store" / "summary.json").read_text())["series"] == 4
