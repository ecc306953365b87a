"""tools/needle.py and its ranks: the data, one short training at two layouts, and the plot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamed.data import LOSS_KINDS, load_tokenizer
from tools.needle import differences, plot
from tools.needle_rank import HELD_OUT, NUM_FRAMES, PLAN, NeedleSource, learn

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


@pytest.fixture
def source() -> NeedleSource:
    return NeedleSource(1, load_tokenizer("bytes"))


def test_rows_are_a_function_of_seed_and_index(source: NeedleSource) -> None:
    again, other = (NeedleSource(seed, source.tokenizer) for seed in (1, 2))
    again.microbatch(0)
    row = source.microbatch(5)
    assert torch.equal(again.microbatch(5).tokens_S, row.tokens_S)
    assert torch.equal(again.load_frames(row.frames[:9]), source.load_frames(row.frames)[:9])
    assert not torch.equal(source.microbatch(6).tokens_S, row.tokens_S)
    assert not torch.equal(other.microbatch(5).tokens_S, row.tokens_S)


def test_the_answer_is_the_number_behind_the_one_marked_frame(source: NeedleSource) -> None:
    row = source.microbatch(3)
    labelled = (row.loss_kind_S == LOSS_KINDS.index("answer")).nonzero().flatten().tolist()
    assert len(labelled) == len(PLAN) == len(row.sample_ids)
    # The mark is the only thing in a frame that is brighter than 3 standard deviations over many pixels.
    marked = (source.load_frames(row.frames) == 3.0).flatten(1).any(1)
    bounds = row.cu_seqlens.tolist()
    for start, end, place in zip(bounds, bounds[1:], labelled, strict=False):
        assert start <= place < end
        inside = (row.visual_positions >= start) & (row.visual_positions < end)
        assert marked[inside].sum() == 1
        behind = row.visual_positions[inside & marked] + 1
        assert row.labels_S[place] == row.tokens_S[behind]


def test_held_out_documents_are_whole_series_of_their_own(source: NeedleSource) -> None:
    needles = source.held_out(40)
    for needle in needles:
        assert [frame.index for frame in needle.frames] == list(range(NUM_FRAMES))
        assert min(frame.first for frame in needle.frames) >= HELD_OUT
    for needle in needles[:3]:
        marked = (source.load_frames(needle.frames) == 3.0).flatten(1).any(1)
        assert marked.nonzero().flatten().tolist() == needle.answer
    # 40 draws of 256 places; that fewer than 30 differ has a chance of less than 1e-6.
    assert len({needle.answer[0] for needle in needles}) >= 30


def test_context_ranks_give_the_losses_of_one(ranks) -> None:
    one = ranks.run(learn, 1, 1, 1, STEPS, 1, 2, 4)[0]
    two = ranks.run(learn, 2, 2, 1, STEPS, 1, 2, 4)
    assert two[0]["losses"] == two[1]["losses"] and len(one["losses"]) == STEPS
    # fp32 sums in another order, over three steps of warm-up: 1e-7 or less is what is seen.
    assert max(differences(one["losses"], two[0]["losses"])) < 1e-5
    assert [step for step, _ in one["accuracy"]] == [2, 3]
    nudged = ranks.run(learn, 1, 1, 1, 1, 1, 2, 4, True)[0]
    assert 0 < differences(one["losses"][:1], nudged["losses"])[0] < 1e-5


def needle(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "needle.py"), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_tool_trains_and_draws_and_draws_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "needle.svg"
    done = needle("--context", "1", "--steps", "2", "--asked", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "| context 1 | " in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["needle.json", "needle.svg"]
    assert len(json.loads((tmp_path / "needle.json").read_text())["curves"][0]["losses"]) == 2
    drawn = out.read_text()
    out.unlink()
    assert needle("--replot", "--out", str(out)).returncode == 0
    assert out.read_text() == drawn


def test_a_plot_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    out = tmp_path / "needle.svg"
    out.write_text("old")

    def break_off(self: object, path: Path, **_: object) -> None:
        path.write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", break_off)
    curve = {"ring": 1, "ulysses": 1, "nudged": False, "losses": [2.0, 1.0], "accuracy": [[2, 0.5]]}
    with pytest.raises(OSError, match="no space"):
        plot([curve], out)
    assert out.read_text() == "old"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--context", "0"], "--context"),
    (["--out", "needle.txt"], "must end in .svg or .png"),
    (["--replot", "--out", "nowhere/needle.svg"], "nowhere/needle.json is missing"),
])  # fmt: skip
def test_a_wrong_option_is_one_line(arguments: list[str], message: str) -> None:
    done = needle(*arguments)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
