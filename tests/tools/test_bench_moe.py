"""tools/bench/moe.py runs, at its smallest. Nothing here looks at how fast anything was."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "bench" / "moe.py"), *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_side_is_timed():
    sizes = "--hidden 32 --width 16 --heads 2 --kv-heads 2 --layers 1 --vocabulary 128 --tokens 128 --documents 4"
    done = bench(f"{sizes} --experts 4 8 --repetitions 1 --warmup 1")
    assert done.returncode == 0, done.stderr
    # Two tables of 128 words, attention of 4 x 32 x 32, an MLP of 3 x 32 x 32, three norms.
    active = 2 * 128 * 32 + 4 * 32 * 32 + 3 * 32 * 32 + 3 * 32
    assert f"{active:,} parameters are active" in done.stdout
    for experts in (4, 8):
        # In place of the MLP: experts, a router, and a prior for each of three specialties.
        total = active - 3 * 32 * 32 + experts * (3 * 32 * 16 + 32 + 3)
        line = rf"^\| {experts} \| {total:,} \|( \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\) \|){{3}}$"
        assert re.search(line, done.stdout, re.MULTILINE), done.stdout


def test_pools_have_to_divide():
    done = bench("--experts 6")
    assert done.returncode == 2 and "4 pools need multiples of 4" in done.stderr
