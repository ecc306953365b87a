"""tools/gpu_check.sh without a GPU, and how tools/gpu_check.py judges runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu_check import BF16_TOLERANCE, TOLERANCE, falls, losses, same

ROOT = Path(__file__).resolve().parents[2]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script on a machine whose GPUs are hidden."""
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), "--python", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = check("--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "no CUDA device here" in done.stderr and "--cpu-rehearsal" in done.stderr


def test_a_dry_run_prints_every_command_and_runs_none(tmp_path):
    done = check("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith((sys.executable, "env "))]
    assert sum("launch/pretrain.py" in command for command in commands) == 5
    assert any("train.dtype=bf16" in command for command in commands)
    gpu, cpu = (command for command in commands if "train.dtype=fp32" in command)
    assert cpu.startswith("env CUDA_VISIBLE_DEVICES= ") and not gpu.startswith("env")
    # The same run otherwise.
    assert cpu.removeprefix("env CUDA_VISIBLE_DEVICES= ").replace("fp32_cpu", "fp32_gpu") == gpu
    ours, theirs = (command for command in commands if "attention.backend=" in command)
    assert theirs == ours.replace("_ours", "_te").replace("backend=ring", "backend=transformer_engine")
    assert any("-m pytest -q -m gpu" in command for command in commands)
    assert sum("--slice internvl26b" in command for command in commands) == 2
    assert not any(tmp_path.glob("runs/*")) and not any(tmp_path.glob("*.log"))
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert sum("tools/bench/preflight.py" in command for command in commands) == 1
    assert len(table) == 10 and all("SKIPPED" in line for line in table[1:])


@pytest.mark.parametrize(("arguments", "message"), [
    (["--nonsense"], "unknown option --nonsense"),
    (["--out"], "--out needs a value"),
    (["--python", "/nowhere/python"], "cannot import torch"),
])  # fmt: skip
def test_a_wrong_option_is_told_from_a_failure(arguments, message):
    done = check(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_help_names_every_option():
    text = check("--help").stdout
    for option in ("--python", "--out", "--wheelhouse", "--limit", "--dry-run", "--cpu-rehearsal"):
        assert option in text


def test_losses_are_the_same_up_to_the_order_of_sums():
    reference = [5.482454432, 4.797283595, 4.597864486]
    assert same(reference, reference)[0]
    # What other instructions of the same CPU make of it, see TOLERANCE.
    assert same(reference, [5.482454425, 4.797282721, 4.597865695])[0]
    assert not same(reference, [*reference[:2], reference[2] * (1 + 2 * TOLERANCE)])[0]
    assert not same(reference, reference[:2])[0]
    rounded = [loss * (1 + BF16_TOLERANCE / 2) for loss in reference]
    assert same(reference, rounded, BF16_TOLERANCE)[0] and not same(reference, rounded)[0]
    assert not same(reference, [*reference[:2], float("nan")])[0]


def test_a_loss_has_to_fall_and_to_stay_finite():
    assert falls([5.0, 4.0, 4.1, 3.0, 2.0])[0]
    assert not falls([2.0, 3.0, 4.0, 4.1, 5.0])[0]
    assert not falls([5.0, float("inf"), 1.0])[0]


def test_a_run_without_metrics_is_a_failure(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "falls", str(tmp_path / "metrics.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "wrote no metrics" in done.stdout
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 3.0 - i}) + "\n" for i in range(2)))
    assert losses(tmp_path / "metrics.jsonl") == [3.0, 2.0]
    assert subprocess.run(command, capture_output=True).returncode == 0
