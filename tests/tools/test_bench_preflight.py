"""tools/bench/preflight.py, on a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_preflight_is_near_what_is_measured() -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "bench" / "preflight.py"), "+exp=fmri"]
    command += ["cluster=h100", "train.microbatches=2", "data.seq_length=256"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    row = re.search(r"^\| 0 \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", done.stdout, re.MULTILINE)
    # Kernels of a GPU keep less than a CPU's operations: some tenth of all in so small a model.
    assert row and 0.7 < float(row[3]) < 1.02, done.stdout
    assert "The time of a step is compared on a GPU alone." in done.stdout
