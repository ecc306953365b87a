"""tools/bench/packing.py runs, at its smallest. Nothing here looks at how fast anything was."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model.language.num_layers=1", "model.vision.num_layers=1", "train.microbatches=1")


def bench(*arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "bench" / "packing.py")]
    command += ["--repetitions", "2", "--warmup", "1", *arguments, *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packed_and_padded_have_the_same_loss_and_are_timed():
    output = bench("--batch", "8")
    shares = {name: float(share) for name, share in re.findall(r"^  (\w+): (\d+\.\d)% of the", output, re.MULTILINE)}
    # The tool itself refuses to compare sides whose losses are further apart than 1e-5.
    assert shares["packed"] > 95 > shares["padded"] > 10, output
    assert len(re.findall(r"^packed has \d+\.\d\d \(.*\) times the tokens a second", output, re.MULTILINE)) == 2


def test_the_wait_is_a_share_of_the_step():
    output = bench("--wait", "data.frames.choice.at_most=4")
    shares = re.findall(r"^(prefetch|no prefetch): (\d+\.\d\d)% of the time of 2 steps", output, re.MULTILINE)
    assert [name for name, _ in shares] == ["prefetch", "no prefetch"]
    assert all(0 < float(share) < 100 for _, share in shares[1:])
