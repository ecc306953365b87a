"""tools/bench/ring_attention.py runs, at its smallest. Nothing here looks at how fast anything was."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megamed.utils import UserError
from tools.bench import ring_attention

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "bench" / "ring_attention.py"
SMALL = ("--shapes", "4:2:16", "--tokens", "32", "--repetitions", "2", "--markdown")
RATIO = r"(\d+\.\d\d) \((\d+\.\d\d) to (\d+\.\d\d)\)"


def bench(*arguments: str, processes: int = 1, gpu: bool = False) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-W", "ignore", *(torchrun if processes > 1 else []), str(SCRIPT), *arguments]
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **hidden}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def rows(output: str) -> list[dict[str, str]]:
    """The Markdown table of an output."""
    header, _, *lines = (line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("|"))
    return [dict(zip(header, line, strict=True)) for line in lines]


def need_ratios(row: dict[str, str]) -> None:
    for column in ("forward", "forward + backward"):
        found = re.fullmatch(RATIO, row[column])
        assert found is not None, row
        middle, low, high = map(float, found.groups())
        assert 0 <= low <= middle <= high and high > 0, row


@pytest.fixture
def blocks(monkeypatch):
    """The tool's modules import each other by their bare names, as from the folder they stand in."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import ring_blocks

    return ring_blocks


def test_one_process_plays_all_ranks_and_computes_what_the_fused_call_does():
    # The tool itself stops where the sides differ by more than rounding.
    done = bench(*SMALL, "--shards", "4", "--documents", "1", "3", "--kernels", "cpu_flash", "math")
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert [(row["documents"], row["kernel"]) for row in found] == [
        ("1", "cpu_flash"), ("1", "math"), ("3", "cpu_flash"), ("3", "math")
    ]  # fmt: skip
    for row in found:
        assert row["heads"] == "4:2:16" and row["tokens a shard"] == "32"
        need_ratios(row)
        assert float(row["slowest rank"]) > 0
        assert re.fullmatch(r"-?\d+\.\d% \(-?\d+\.\d to -?\d+\.\d\)", row["outside the kernels"]), row
        assert not any("TFLOP" in column for column in row), "on a CPU only ratios are printed"


def test_torchruns_processes_are_the_ring_and_its_splits():
    done = bench(*SMALL, "--documents", "3", processes=2)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert [row["ring x ulysses"] for row in found] == ["2 x 1", "1 x 2"]
    for row in found:
        need_ratios(row)


def test_what_cannot_be_measured_is_one_line():
    done = bench(*SMALL, "--kernels", "fast")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("megamed: error: --kernels fast is none of math,")


def test_only_what_can_run_is_compared(blocks, capsys):
    assert [k.name for k in ring_attention.named_kernels(["math", "cudnn"], torch.float32, 16)] == ["math"]
    assert "left out: cudnn" in capsys.readouterr().err
    with pytest.raises(UserError, match="can run here"):
        ring_attention.named_kernels(["cudnn"], torch.float32, 16)


def test_splits_divide_processes_and_heads():
    assert ring_attention.splits(None, num_ranks=8, num_kv_heads=2) == [1, 2]
    assert ring_attention.splits([4], num_ranks=8, num_kv_heads=8) == [4]
    with pytest.raises(UserError, match="--ulysses 4 does not divide 8 processes and 2 key/value heads"):
        ring_attention.splits([4], num_ranks=8, num_kv_heads=2)


def test_flops_are_half_of_full_attention(blocks):
    heads = blocks.Heads(num_heads=2, num_kv_heads=1, head_dim=8)
    # Documents of 3 and 2 tokens; scores and weighted sums, a multiplication and an addition each:
    # 2 heads x 2 products x 2 x (9 + 4) x 8 / 2.
    assert blocks.forward_flops(np.array([0, 3, 5]), heads) == 416
    # A million tokens of Llama-8B; more than 32 bits hold.
    assert blocks.forward_flops(np.array([0, 2**20]), blocks.Heads(32, 8, 128)) == 2 * 2**40 * 2**12


def test_documents_fill_the_row_and_are_uneven(blocks):
    assert blocks.document_bounds(1, 64).tolist() == [0, 64]
    assert blocks.document_bounds(3, 60).tolist() == [0, 10, 30, 60]
    assert blocks.document_bounds(4, 64).tolist() == [0, 6, 19, 38, 64]  # none divides by the chunks of 8 ranks


def test_heads_that_do_not_fit_are_left_out(blocks, monkeypatch):
    whole, length = blocks.Heads(32, 8, 128), 2**16
    needed = {n: blocks.needed_bytes(length, 8, whole.of_groups(n), 2) for n in (2, 4, 8)}
    # q, k, v, their gradients, the output and its gradient at least.
    assert needed[8] > length * 128 * (4 * 32 + 4 * 8) * 2
    memory = {"free": 0.0}
    monkeypatch.setattr(ring_attention, "free_bytes", lambda: memory["free"])
    for room, groups in ((needed[8], 8), (needed[8] - 1, 4), (needed[4] - 1, 2)):
        memory["free"] = (room + 0.5) / ring_attention.MEMORY_SHARE
        assert ring_attention.measured_heads(whole, length, 8, 2, multiple=1).num_kv_heads == groups
    memory["free"] = 1e15
    # Memory for a million tokens, but seconds and seconds of work.
    assert ring_attention.measured_heads(whole, 2**20, 8, 2, multiple=1) == blocks.Heads(4, 1, 128)
    assert ring_attention.measured_heads(whole, 2**20, 8, 2, multiple=4) == blocks.Heads(16, 4, 128)
    memory["free"] = 1e6
    with pytest.raises(UserError, match="choose fewer --tokens"):
        ring_attention.measured_heads(whole, length, 8, 2, multiple=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_speeds_are_absolute():
    done = bench("--shapes", "8:2:128", "--tokens", "1024", "--documents", "1", "3", "--kernels", "torch_flash",
                 "--repetitions", "2", "--markdown", gpu=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row in rows(done.stdout):
        need_ratios(row)
        assert float(row["fused, TFLOP/s"]) > 0 and float(row["ring, TFLOP/s"]) > 0
