"""tools/scaling.py: points, tables and plots of a tiny model, and going on from what is there."""

import json
import sys
from pathlib import Path

import pytest

from tools.scaling import main


def test_it_computes_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "x"
    asked = ["scaling.py", "+exp=fmri", "cluster=h100", "data.seq_length=256", "--rows", "4", "--out", str(out)]
    asked += ["--layout", "tensor=2", "--layout", "pipeline=2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", [*asked, "--gpus", "4"])
    assert main() == 0
    path = out.with_suffix(".json")
    found = json.loads(path.read_text())
    strong = found["points"]["pipeline=2"]["strong"]["4"]
    # Two replicas with two rows each, and two stages.
    assert strong["idle"] == pytest.approx(1 / 3) and strong["total"] == pytest.approx(sum(strong["seconds"].values()))
    assert found["points"]["tensor=2"]["weak"]["4"]["idle"] == 0
    found["points"]["tensor=2"]["weak"]["4"]["mfu"] = 0.77
    path.write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", [*asked, "--gpus", "4", "16"])
    assert main() == 0
    output = capsys.readouterr().out
    assert "| tensor=2 | 4 |" in output and "77.0%" in output, "what was there is not computed again"
    # Eight replicas have nothing to share 4 rows by.
    points = json.loads(path.read_text())["points"]["tensor=2"]
    assert "total" in points["weak"]["16"] and "train.microbatches=4" in points["strong"]["16"]["why_not"]
    assert out.with_suffix(".svg").stat().st_size > 10_000
