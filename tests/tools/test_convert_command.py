"""tools/convert.py: import, verify, export as a user types them, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.hf.folders import native, release, save

ROOT = Path(__file__).resolve().parents[2]


def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code, and what was printed."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    from tools.convert import main

    try:
        code = main()
    except SystemExit as end:
        code = int(end.code or 0)
    output = capsys.readouterr()
    return code, output.out + output.err


@pytest.mark.parametrize(("family", "decoder"), [("internvl_chat", "internlm2"), ("internvl_chat", "qwen3_moe"),
                                                 ("internvl", "qwen2")])  # fmt: skip
def test_there_back_and_compared(
    family: str, decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, checkpoint = tmp_path / "hf", tmp_path / "checkpoint"
    folder.mkdir()
    if family == "internvl":
        save(native(decoder), folder, torch.float32)
    else:
        release(folder, decoder, torch.float32)
    code, output = convert(monkeypatch, capsys, "import", folder, "--to", checkpoint, "--layout", "tensor=2,pipeline=2")
    assert code == 0 and f"init.hf={folder}" in output and "2 + 2 layers" in output
    assert (checkpoint / "model.yaml").read_text().startswith("name: internvl")
    code, output = convert(monkeypatch, capsys, "verify", folder, checkpoint)
    assert code == 0, output
    rows = [line.split("|") for line in output.splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == ["tensors", "logits, picture and text", "logits, text alone"]
    assert rows[0][2] == rows[0][3] and float(rows[0][4]) == 0.0
    # fp32 sums in another order; TOLERANCE of tests/checkpoint/hf/test_original.py.
    assert all(0 < float(row[4]) < 5e-5 for row in rows[1:])
    code, _ = convert(monkeypatch, capsys, "export", checkpoint, "--to", tmp_path / "back")
    assert code == 0
    assert (tmp_path / "back" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_difference_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, checkpoint = tmp_path / "hf", tmp_path / "checkpoint"
    folder.mkdir()
    release(folder, "internlm2", torch.bfloat16)
    assert convert(monkeypatch, capsys, "import", folder, "--to", checkpoint)[0] == 0
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.attention.wqkv.weight"
    tensors[name][3, 5] += 0.5
    save_file(tensors, folder / "model.safetensors")
    code, output = convert(monkeypatch, capsys, "verify", folder, checkpoint, "--no-logits")
    assert code == 1 and f"{name}: differs by up to 0.5" in output and output.count("differs by") == 1


def test_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, checkpoint = tmp_path / "hf", tmp_path / "checkpoint"
    folder.mkdir()
    release(folder, "internlm2", torch.bfloat16)
    for arguments, message in [
        (("import", folder, "--to", checkpoint, "--layout", "tensr=2"), "'tensr=2' is no axis=size; did you mean"),
        (("import", folder, "--to", checkpoint, "--layout", "tensor=4"), "parallel.tensor=4 does not divide"),
        (("import", tmp_path / "none", "--to", checkpoint), "has no config.json that can be read"),
        (("import", folder, "--to", folder), "hf: is there, and is no checkpoint, so it is not replaced"),
        (("export", tmp_path / "none", "--to", tmp_path / "x"), "CKPT=.*none: is no folder"),
    ]:
        code, output = convert(monkeypatch, capsys, *arguments)
        assert code == 2 and output.splitlines()[-1].startswith("megamed: error: "), output
        assert re.search(message, output), output
    assert not checkpoint.exists()
    assert convert(monkeypatch, capsys, "import", folder, "--to", checkpoint)[0] == 0
    code, output = convert(monkeypatch, capsys, "import", folder, "--to", checkpoint)
    assert code == 2 and "replace it with --overwrite" in output
    assert convert(monkeypatch, capsys, "import", folder, "--to", checkpoint, "--overwrite")[0] == 0
    code, output = convert(monkeypatch, capsys, "export", checkpoint, "--to", folder)
    assert code == 2 and "is there already; name another folder, or replace it with --overwrite" in output
    assert json.loads((folder / "config.json").read_text())["model_type"] == "internvl_chat"
    assert "import" in convert(monkeypatch, capsys, "--help")[1]
