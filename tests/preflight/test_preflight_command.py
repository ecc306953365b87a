"""tools/preflight.py: the published 26B model on 64 GPUs, what does not fit, and what it refuses."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megamed.preflight import load_cluster
from megamed.utils import UserError
from tools.preflight import CONF, main

# InternLM2-20B at tensor 4 x pipeline 2, and the frame encoder, which every rank has whole.
LANGUAGE, ENCODER = 2.483e9, 5.54e9 + 116e6
SHORT = ("data.seq_length=256", "train.microbatches=2", "model.language.num_layers=2")


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
    # A few short rows, since what a step takes is not looked at here.
    few = ("train.microbatches=8", "data.seq_length=1024")
    code, output = preflight(monkeypatch, capsys, "+exp=internvl26b", "cluster=h100x64", *few, "--json", numbers)
    assert code == 0
    assert "64 GPUs (H100-80GB) = tensor 4 x pipeline 2 x context 1 (ring 1 x Ulysses 1) x data 8" in output
    (layout,) = json.loads(numbers.read_text())["layouts"]
    assert list(layout["ranks"]) == ["0", "32"] and layout["fits"] and 0.05 < layout["mfu"] < 0.6
    for rank in layout["ranks"].values():
        held = rank["held"]
        phases = ["vision, forward", "language", "gradients", "vision, backward", "optimizer"]
        assert sorted(rank["peak"]["phases"]) == sorted(rank["work"]) == sorted(phases)
        assert held["weights"] == pytest.approx(2 * (LANGUAGE + ENCODER), rel=0.01)
        assert held["gradients"] == 2 * held["weights"], "fp32, in buffers of the same padding"
        # The encoder's state is shared by all 64 ranks, the language model's by its 8 replicas.
        assert held["optimizer"] == pytest.approx(12 * (LANGUAGE / 8 + ENCODER / 64), rel=0.01)


def test_what_does_not_fit_is_told_with_what_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # 6 GiB are set aside. The tiny model's step takes some 30 MiB, most of it activations of frames.
    asked = ("+exp=fmri", *SHORT, "--gpus", 1, "--memory")
    code, output = preflight(monkeypatch, capsys, *asked, 7)
    assert code == 0 and "It fits." in output
    code, output = preflight(monkeypatch, capsys, *asked, 6.02)
    assert code == 1 and "does not fit: rank 0 takes 0.03 GiB; it fits with model.frames_in_flight=" in output
    mend = output.rpartition("it fits with ")[2].splitlines()[0].split()
    assert preflight(monkeypatch, capsys, *asked, 6.02, *mend)[0] == 0
    code, output = preflight(monkeypatch, capsys, *asked, 6.001)
    assert code == 1 and "no single change helps: look at all layouts with --search" in output


def test_the_best_layout_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = tmp_path / "x.json"
    experts = ("model.language.moe.num_experts=2", "model.language.moe.intermediate_size=64")
    asked = ("+exp=fmri", "--gpus", 2, "--memory", 7, *SHORT, *experts)
    code, output = preflight(monkeypatch, capsys, *asked, "--search", "--jobs", 1, "--json", numbers)
    assert code == 0
    found = json.loads(numbers.read_text())["layouts"]
    seconds = [sum(layout["seconds"].values()) for layout in found]
    assert seconds == sorted(seconds) and len(found) > 4
    sizes = {tuple(x["layout"][key] for key in ("tensor", "pipeline", "context", "expert")) for x in found}
    assert {(1, 1, 1, 1), (1, 1, 1, 2), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 2, 2)} <= sizes
    best = output.rpartition("The fastest: ")[2].splitlines()[0].split()
    assert "parallel.tensor=1" in best
    code, output = preflight(monkeypatch, capsys, *asked, *best)
    assert code == 0 and "It fits." in output


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (("+exp=internvl26b",), "name the GPUs: cluster=NAME of conf/cluster/ (h100x64, say), or --gpus N"),
        (("+exp=internvl26b", "cluster=h101x64"), "there is no h101.yaml in"),
        (("+exp=internvl26b", "--gpus", 12, "--memory", 80), "12"),
        (("+exp=internvl26b", "cluster=h100x64", "parallel.tensr=2"), "did you mean parallel.tensor"),
    ]:
        code, output = preflight(monkeypatch, capsys, *arguments)
        assert code == 2 and message in output and "Traceback" not in output, output


def test_every_cluster_loads(tmp_path: Path) -> None:
    for path in (CONF / "cluster").glob("*.yaml"):
        cluster = load_cluster(CONF, path.stem)
        assert cluster.gpu and cluster.reserved_gib < cluster.memory_gib
        assert load_cluster(CONF, f"{path.stem}x640") == replace(cluster, gpus=640)
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "x.yaml").write_text("gpu: X\ngpus: 0\n")
    with pytest.raises(UserError, match="x.yaml: gpus is 0, and has to be above 0"):
        load_cluster(tmp_path, "x")
    # A file's own name wins over a count.
    (tmp_path / "cluster" / "minex48.yaml").write_text("gpu: X\ngpus: 47\n")
    assert load_cluster(tmp_path, "minex48").gpus == 47
