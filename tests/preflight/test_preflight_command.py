"""tools/preflight.py: the published 26B model on 64 GPUs, what does not fit, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest

from megamed.preflight import load_cluster
from megamed.utils import UserError
from tools.preflight import CONF, main

# InternLM2-20B at tensor 4 x pipeline 2, and the frame encoder, which every rank has whole.
LANGUAGE, ENCODER = 2.483e9, 5.54e9 + 116e6


def preflight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["preflight.py", *map(str, arguments)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = main()
    output = capsys.readouterr()
    return code, output.out + output.err


def test_internvl26b_on_64_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = tmp_path / "x.json"
    code, output = preflight(monkeypatch, capsys, "+exp=internvl26b", "cluster=h100x64", "--json", numbers)
    assert code == 0 and "64 GPUs (H100-80GB) = tensor 4 x pipeline 2 x context 1 x data 8" in output
    ranks = json.loads(numbers.read_text())["ranks"]
    assert list(ranks) == ["0", "32"]
    for held in ranks.values():
        assert held["weights"] == pytest.approx(2 * (LANGUAGE + ENCODER), rel=0.01)
        assert held["gradients"] == 2 * held["weights"], "fp32, in buffers of the same padding"
        # The encoder's state is shared by all 64 ranks, the language model's by its 8 replicas.
        assert held["optimizer"] == pytest.approx(12 * (LANGUAGE / 8 + ENCODER / 64), rel=0.01)


def test_what_cannot_fit_is_told_with_a_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("+exp=internvl26b", "--gpus", 8, "--memory", 80)
    code, output = preflight(monkeypatch, capsys, *asked)
    assert code == 1 and "GiB before any activation; raise parallel.tensor (now 4)" in output
    code, output = preflight(monkeypatch, capsys, *asked, "optim.distributed=false")
    assert code == 1 and "set optim.distributed=true" in output


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (("+exp=internvl26b",), "name the GPUs: cluster=NAME of conf/cluster/, or --gpus N --memory GIB"),
        (("+exp=internvl26b", "cluster=h100x63"), "there is no h100x63.yaml"),
        (("+exp=internvl26b", "--gpus", 12, "--memory", 80), "12"),
        (("+exp=internvl26b", "cluster=h100x64", "parallel.tensr=2"), "did you mean parallel.tensor"),
    ]:
        code, output = preflight(monkeypatch, capsys, *arguments)
        assert code == 2 and message in output and "Traceback" not in output, output


def test_every_cluster_loads(tmp_path: Path) -> None:
    for path in (CONF / "cluster").glob("*.yaml"):
        cluster = load_cluster(CONF, path.stem)
        assert path.stem.endswith(f"x{cluster.gpus}") and cluster.gpu and cluster.reserved_gib < cluster.memory_gib
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "x.yaml").write_text("gpu: X\ngpus: 0\n")
    with pytest.raises(UserError, match="x.yaml: gpus is 0, and has to be above 0"):
        load_cluster(tmp_path, "x")
