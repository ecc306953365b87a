"""tools/bench/cross_entropy.py runs, at its smallest. Nothing here looks at how fast anything was."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_both_sides_are_timed_and_weighed():
    options = "--tokens 256 --hidden 16 --vocab 512 --chunk-tokens 16 --labelled 1 0.1 0 --repetitions 1 --warmup 0"
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "bench" / "cross_entropy.py"), *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "256 tokens, hidden size 16, 512 words, fp32, chunks of 16; fp32 logits of the row: 0.5 MiB" in done.stdout
    for share in ("100%", "10%", "0%"):
        line = rf"^{share} labelled: chunked has \d+\.\d\d \(.*\) times the speed, and 1/(\d+\.\d\d) of the peak"
        found = re.search(line, done.stdout, re.MULTILINE)
        assert found is not None, done.stdout
        # Whole: logits of 256 x 512, their softmax and its gradient. Chunked: a sixteenth of one, and two gradients.
        assert float(found[1]) > 5
