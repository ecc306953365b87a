"""tools/bench/vision_phase.py runs, at its smallest, and its sides compute the same. Nothing here looks at speed."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megamed.utils import UserError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "bench" / "vision_phase.py"
SMALL = ["model.vision.num_layers=2", "model.language.num_layers=2", "model.vision.image_size=56"]
FRAMES, ROWS = 5, 2


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def sides_of(layout: str, overrides: list[str]) -> list[tuple[str, int, float, float, float]]:
    """One rank's view of what the tool compares before it times anything."""
    sys.path.insert(0, str(TOOL.parent))
    import vision_phase

    args = argparse.Namespace(overrides=[*SMALL, *overrides], model="internvl_tiny", frames=FRAMES, seq_length=320,
                              microbatches=ROWS, frames_in_flight=1)
    job, microbatches, sides = vision_phase.build(args, layout)
    share = vision_phase.compare(job, microbatches, sides)
    assert 0 < share < 1
    return [(s.name, s.num_encoded, s.flops, s.loss, s.grad_norm) for s in sides]


@pytest.mark.parametrize(("layout", "ranks_used", "first_stage", "overrides"), [
    ("TP2", 2, 2, []),
    ("TP2xCP2", 4, 4, ["parallel.sequence=true"]),
    ("TP2xCP2xPP2", 8, 4, []),
    ("TP2xPP2xDP2", 8, 2, []),
])
def test_every_side_computes_the_same(
    ranks: Any, layout: str, ranks_used: int, first_stage: int, overrides: list[str]
) -> None:
    found = ranks.run(sides_of, ranks_used, layout, overrides)
    assert all(other == found[0] for other in found)  # on every rank
    sides = {name: rest for name, *rest in found[0]}
    has_stages = "PP" in layout
    assert list(sides) == ["dealt", "dealt, 1 in flight", *(["first stage"] if has_stages else []), "every rank"]
    num_frames = FRAMES * ROWS
    replicas = 2 if "DP" in layout else 1
    replica = ranks_used // replicas
    again = num_frames - min(ranks_used, num_frames)  # each rank keeps one
    assert sides["dealt"][0] == num_frames
    assert sides["dealt, 1 in flight"][0] == num_frames + again
    assert sides["every rank"][0] == num_frames * replica
    if has_stages:
        assert sides["first stage"][0] == num_frames * first_stage
    frame = (sides["every rank"][1] - sides["dealt"][1]) / (num_frames * (replica - 1))
    assert frame > 0
    if again:  # a forward pass each, a third of a frame's FLOPs and more: pixels need no gradient
        extra = (sides["dealt, 1 in flight"][1] - sides["dealt"][1]) / again
        assert frame / 3 < extra < frame / 2
    for name, (_, _, loss, grad_norm) in sides.items():  # fp32: sums in another order
        assert loss == pytest.approx(sides["dealt"][2], rel=1e-5), name
        assert grad_norm == pytest.approx(sides["dealt"][3], rel=1e-5), name


def test_it_prints_a_table() -> None:
    done = bench("--layouts", "TP2", "--frames", str(FRAMES), "--seq-length", "320", "--repetitions", "1",
                 "--warmup", "0", "--frames-in-flight", "2", *SMALL)
    assert done.returncode == 0, done.stderr
    assert re.search(r"TP2: all sides have loss \d\.\d+ and gradient norm \d+\.\d+", done.stderr)
    assert f"a step of 2 documents of {FRAMES} frames a replica in rows of 320 tokens" in done.stdout
    header, _, *rows = (line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|"))
    by_side = {row[2]: dict(zip(header, row, strict=True)) for row in rows}
    assert {name: row["frames encoded"] for name, row in by_side.items()} == {
        "dealt": "10", "dealt, 2 in flight": "16", "every rank": "20",
    }
    assert float(by_side["every rank"]["FLOPs ratio"]) > 1.0 and float(by_side["every rank"]["time ratio"]) > 0
    assert re.fullmatch(r"\d+\.\d\d to \d+\.\d\d", by_side["every rank"]["spread"])


def test_what_it_cannot_do_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import vision_phase

    with pytest.raises(UserError, match="--layouts: 'XP2' cannot be read; write it like TP2xCP2xPP2"):
        vision_phase.parallel_sizes("XP2")
    with pytest.raises(UserError, match="under torchrun one layout can be measured"):
        vision_phase.measure(argparse.Namespace(layouts="TP2,TP4"))
