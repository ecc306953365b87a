"""Folders are read and given back at any layout: each rank its own part, and the same bytes in the end."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megamed.checkpoint.hf.convert import export_folder, import_folder
from megamed.checkpoint.hf.source import Source
from megamed.checkpoint.hf.start import model_of_folder
from megamed.models.vlm import VLMConfig
from tests.checkpoint.hf.folders import native, release, save
from tests.checkpoint.small_models import build

SP = {"tensor": 2, "sequence": True}
LAYOUTS = [
    ("internvl_chat", "internlm2", 2, SP, {"pipeline": 2}),
    ("internvl", "qwen2", 4, {"tensor": 2, "pipeline": 2}, {}),
    ("internvl", "qwen3_moe", 2, {"expert": 2}, SP),
]


def _start(folder: str, run: str, layout: dict[str, Any], checkpoint: str | None) -> int:
    """Start from a folder, or from a checkpoint, and save; bytes of the folder that this rank read."""
    config = model_of_folder(Path(folder), VLMConfig())
    _, manager = build(config, Path(run) / "checkpoints", layout, dtype="bf16")
    original, read = Source._read_bytes, 0

    def count(self: Source, file: str, offset: int, out: torch.Tensor) -> None:
        nonlocal read
        read += out.numel() * out.element_size()
        original(self, file, offset, out)

    Source._read_bytes = count  # type: ignore[method-assign]
    try:
        manager.start_from(checkpoint, folder if checkpoint is None else None)
    finally:
        Source._read_bytes = original  # type: ignore[method-assign]
    manager.save(1, 4)
    return read


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("family", "decoder", "num_ranks", "layout", "other"), LAYOUTS)
def test_at_any_layout_the_same_bytes(
    family: str, decoder: str, num_ranks: int, layout: dict[str, Any], other: dict[str, Any], tmp_path: Path, ranks: Any
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    if family == "internvl":
        save(native(decoder), folder, torch.bfloat16)
    else:
        release(folder, decoder, torch.bfloat16)
    # Straight from the folder, and then through another layout.
    read = ranks.run(_start, num_ranks, str(folder), str(tmp_path / "a"), layout, None)
    ranks.run(_start, 2 if other else 1, str(folder), str(tmp_path / "b"), other, str(tmp_path / "a"))
    # Through a checkpoint, at the layout.
    import_folder(folder, tmp_path / "imported", {})
    ranks.run(_start, num_ranks, str(folder), str(tmp_path / "c"), layout, str(tmp_path / "imported"))
    for run in "abc":
        export_folder(tmp_path / run / "checkpoints" / "step_00000001", tmp_path / f"{run}-hf")
        assert contents(tmp_path / f"{run}-hf") == contents(folder), run
    # No rank reads the language model of the others. Rows of a part of the columns are read whole.
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert max(read) < total
    if layout.get("pipeline") == 2:
        assert max(read) < 0.75 * total


def test_an_export_at_the_end_and_of_each_checkpoint(tmp_path: Path, ranks: Any) -> None:
    (tmp_path / "hf").mkdir()
    save(native("qwen2"), tmp_path / "hf", torch.float32)
    ranks.run(_train, 2, str(tmp_path / "hf"), str(tmp_path / "run"))
    exports = tmp_path / "run" / "hf_export"
    assert sorted(path.name for path in exports.iterdir()) == ["step_00000001", "step_00000002"]
    first, second = (contents(exports / f"step_0000000{n}") for n in "12")
    assert first.keys() == second.keys() == contents(tmp_path / "hf").keys()
    assert first == contents(tmp_path / "hf"), "nothing was trained before the first one"
    assert {name for name in first if first[name] != second[name]} == {x for x in first if x.endswith(".safetensors")}


def _train(folder: str, run: str) -> None:
    config = model_of_folder(Path(folder), VLMConfig())
    job, manager = build(config, Path(run) / "checkpoints", {}, dtype="fp32")
    manager.config.export_hf_each = True
    manager.start_from(None, folder)
    manager.save(1, 4)
    with torch.no_grad():
        for part in job.model.parts:
            for parameter in part.parameters():
                parameter.add_(1e-3)
    manager.save(2, 8)
    manager.export()
