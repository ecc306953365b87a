"""Folders of every family become checkpoints and come back: every file byte by byte, at any layout in between."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megamed.checkpoint.hf.convert import export_folder, import_folder
from tests.checkpoint.hf.folders import native, release, save

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16


def make(folder: Path, family: str, decoder: str, dtype: torch.dtype, **options: Any) -> Any:
    """A folder, and the model whose weights it has."""
    folder.mkdir()
    if family == "internvl_chat":
        return release(folder, decoder, dtype, **options)
    model = native(decoder, **options)
    save(model, folder, dtype)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CASES = [
    ("internvl_chat", "internlm2", BF16, {}),
    ("internvl_chat", "internlm2", FP16, {"is_large": False}),
    ("internvl_chat", "qwen2", BF16, {"is_large": False}),
    ("internvl_chat", "qwen3", BF16, {}),
    ("internvl_chat", "qwen3_moe", BF16, {"is_large": False}),
    ("internvl_chat", "llama", FP32, {}),
    ("internvl_chat", "phi3", BF16, {}),
    ("internvl", "qwen2", BF16, {}),
    ("internvl", "qwen2", FP32, {"tied": True}),
    ("internvl", "qwen3", BF16, {"is_large": True}),
    ("internvl", "qwen3_moe", BF16, {}),
    ("internvl", "llama", FP16, {}),
    ("internvl", "mixtral", BF16, {}),
]


def _there_and_back(folder: str, target: str, back: str) -> None:
    import_folder(Path(folder), Path(target), {})
    export_folder(Path(target), Path(back))


@pytest.mark.parametrize(("family", "decoder", "dtype", "options"), CASES)
def test_every_file_comes_back_byte_by_byte(
    family: str, decoder: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    make(tmp_path / "hf", family, decoder, dtype, **options)
    _there_and_back(*(str(tmp_path / name) for name in ("hf", "checkpoint", "back")))
    was, now = files(tmp_path / "hf"), files(tmp_path / "back")
    assert was.keys() == now.keys()
    assert [name for name in was if was[name] != now[name]] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "checkpoint", "hf"]
