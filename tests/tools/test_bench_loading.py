"""tools/bench/loading.py runs, at its smallest, and both sides make the same frames. Nothing here looks at speed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_form_makes_the_same_frames_and_is_timed():
    pytest.importorskip("monai")
    options = "--synthetic 3 40 --size 28 --series 2 --workers 0 --repetitions 1 --warmup 0"
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "bench" / "loading.py"), *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "6 slices a turn from 1 series, frames of 28 x 28" in done.stdout
    assert re.search(r"frames of both sides are at most \de-0\d apart", done.stdout), done.stdout
    for name in ("cold: PydicomReader", "warm: volumes as .npy", "warm: volumes as .nii",
                 "warm: PersistentDataset of volumes", "other: CacheDataset of volumes, in memory",
                 "other: PersistentDataset of finished frames"):
        line = rf"^ *\d+\.\d\d \(.*\) times .* of MONAI, {re.escape(name)}, 0 workers, by processor time \d+\.\d\d"
        assert re.search(line, done.stdout, re.MULTILINE), done.stdout
    for stage in ("cold, 0 workers", "warm"):
        assert re.search(rf"^megamed, {stage} has .* times the speed of MONAI at its best, ", done.stdout, re.MULTILINE)
