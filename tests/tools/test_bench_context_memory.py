"""tools/bench/context_memory.py runs, at its smallest, and counts what is allocated."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megamed.utils import UserError
from tools.bench import context_memory

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "bench" / "context_memory.py"
MIB = 2**20


@pytest.fixture
def rank(monkeypatch):
    """The tool's modules import each other by their bare names, as from the folder they stand in."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import context_memory_rank

    return context_memory_rank


def test_the_same_step_takes_less_of_each_rank_the_more_there_are():
    small = "model.language.num_layers=2 model.vision.num_layers=1"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--tokens", "1024", "--contexts", "1", "2", "--documents",
               "3", "--markdown", *small.split()]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # 7/8 of documents of 170, 342 and 512 tokens are frames of 4: 37, 74 and 112.
    assert "a row of 1024 tokens: 3 document(s), 223 frames" in done.stdout
    header, _, *lines = (line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|"))
    one, two = (dict(zip(header, line, strict=True)) for line in lines)
    assert (two["context"], two["ring x ulysses"], two["tokens a rank"]) == ("2", "2 x 1", "512")
    # The tool stops at 1e-5; what is printed has 7 digits.
    assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-5)
    assert float(two["gradient norm"]) == pytest.approx(float(one["gradient norm"]), rel=1e-5)
    # Half of the activations; the weights, their gradients and the encoder's 64 frames in flight stay.
    assert 0.5 < float(two["share"]) < 0.8
    assert float(two["in the step, MiB"]) < 0.8 * float(one["in the step, MiB"])
    for row in (one, two):
        assert 0 < float(row["kept, MiB"]) < float(row["peak a rank, MiB"])


def test_memory_is_counted_to_the_byte(rank):
    before = torch.ones(MIB, dtype=torch.uint8)
    with rank.watched() as memory:
        kept = torch.ones(3 * MIB, dtype=torch.uint8)
        twice = kept + kept
        within = (twice.float() @ torch.ones(3 * MIB)).item()  # 4 bytes a number, twice, for as long as it takes
        del twice
    assert within == 2.0 * 3 * MIB
    # A scalar's 64 bytes, of which there are a few.
    assert memory.peak == pytest.approx((3 + 3 + 12 + 12) * MIB, abs=1024)
    assert memory.kept == pytest.approx(kept.nbytes, abs=1024)
    assert before.sum() == MIB


def test_what_another_thread_frees_is_not_kept(rank):
    changes = [(1, 10), (2, 5), (2, -5), (3, 7), (1, 20), (4, 100), (1, -20), (5, 2)]
    # The first 10 at address 1 are gone when there is something else; 7 at address 3 and 100 at 4 in the end.
    assert rank.peak_and_kept(changes, living={5}) == (20, 2)
    assert rank.peak_and_kept(changes, living={3, 5}) == (27, 9)
    assert rank.peak_and_kept([(1, 10), (1, -10), (9, -50)], living=set()) == (10, 0)  # 9 was there before


@pytest.mark.parametrize(("ring", "ulysses", "expected"), [
    (None, 1, [(1, 1), (2, 1), (8, 1)]),
    (None, 2, [(1, 1), (1, 2), (4, 2)]),
    (2, 1, [(1, 1), (2, 1), (2, 4)]),
])  # fmt: skip
def test_every_context_size_is_split_alike(ring, ulysses, expected):
    args = Namespace(ring=ring, ulysses=ulysses)
    assert [context_memory.split(context, args) for context in (1, 2, 8)] == expected
    with pytest.raises(UserError, match="--ulysses 3 does not divide --contexts 8"):
        context_memory.split(8, Namespace(ring=None, ulysses=3))


def test_another_step_is_told_from_the_same_one():
    one = {"ring": 1, "ulysses": 1, "dtype": "torch.float32", "loss": 5.0, "grad_norm": 1.0}
    context_memory.need_same(one, {**one, "loss": 5.00002})
    for name, value in (("loss", 5.0002), ("grad_norm", 0.9999), ("loss", float("nan"))):
        with pytest.raises(RuntimeError, match=f"{name} is .*not the same step"):
            context_memory.need_same(one, {**one, name: value})
