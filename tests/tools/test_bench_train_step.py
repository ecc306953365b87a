"""tools/bench/train_step.py runs, at its smallest. Nothing here looks at how fast anything was."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "bench" / "train_step.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_both_sides_compute_the_same_loss_and_are_timed(tmp_path):
    profile = tmp_path / "profile.md"
    smaller = "model.language.num_layers=1 model.vision.num_layers=1 train.microbatches=2 data.max_volumes=3"
    done = bench("--repetitions", "1", "--warmup", "0", "--profile", str(profile), *smaller.split())
    assert done.returncode == 0, done.stderr
    found = re.search(r"megamed (\d\.\d+), transformers (\d\.\d+)$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    # The tool itself refuses to compare sides that are further apart than 1e-5.
    assert abs(float(found[1]) / float(found[2]) - 1) < 1e-5
    assert re.search(r"^megamed +\d+\.\d ms +\d+ tokens/s$", done.stdout, re.MULTILINE)
    for layout in ("padded rows", "padded step", "packed rows"):
        line = rf"^transformers, {layout} .* wall \d+\.\d\d \(.*\), cpu \d+\.\d\d"
        assert re.search(line, done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^megamed / transformers at its best \(p.*: \d+\.\d\d by wall", done.stdout, re.MULTILINE)
    text = profile.read_text()
    for phase in ("vision forward", "language backward", "frames and exchange", "optimizer"):
        assert re.search(rf"^\| {phase} \| \d+\.\d \| \d+\.\d% \|$", text, re.MULTILINE), text
    assert text.count("`aten::mm`") == 4  # megamed and three layouts of transformers


def test_a_slice_reports_speed_and_memory():
    options = "--layers 1 --tiny-widths --seq-length 300 --frames 2 --microbatches 1"
    done = bench("--slice", "internvl26b", *options.split(), "--repetitions", "1", "--warmup", "0", "--markdown")
    assert done.returncode == 0, done.stderr
    # Two frames of 4 tokens and 256 of text.
    assert "264 tokens and 2 frames a step in 1 rows of 300" in done.stdout
    header, _, row = (line for line in done.stdout.splitlines() if line.startswith("|"))
    fields = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert fields["layers"] == "1 + 1" and fields["type"] == "float32" and fields["Transformer Engine"] == "off"
    assert float(fields["tokens/s"]) > 0 and float(fields["frames/s"]) > 0
    assert 0 < float(fields["MFU"].rstrip("%")) < 100
    assert fields["peak memory"].endswith("GiB")


def test_a_slice_that_cannot_be_sized_says_what_to_give():
    done = bench("--slice", "internvl26b")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("here, give --layers") and len(done.stderr.splitlines()) == 1
