"""What is read of a folder's files, and what is said of those that are damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megamed.checkpoint.hf.source import INDEX, SINGLE, Source
from megamed.utils import UserError

TENSORS = {
    "a": torch.arange(24, dtype=torch.bfloat16).view(6, 4),
    "b": torch.arange(30, dtype=torch.float32).view(5, 3, 2),
    "c": torch.tensor([1.5], dtype=torch.float16),
    "d": torch.tensor(7.0),
    "e": torch.zeros(0, 3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files with an index."""
    for number, names in ((1, "ab"), (2, "cde")):
        save_file({name: TENSORS[name] for name in names}, tmp_path / f"model-{number}.safetensors")
    weight_map = {name: f"model-{1 if name in 'ab' else 2}.safetensors" for name in TENSORS}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_whole_tensors_with_their_types(folder: Path) -> None:
    source = Source(folder)
    assert sorted(source.names) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        found = source.read(name)
        assert found.dtype == tensor.dtype == source.dtype(name) and torch.equal(found, tensor)
        assert source.shape(name) == tuple(tensor.shape)
        assert source.num_bytes(name) == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("buffer", [1, 2**20], ids=["a row at a time", "all at once"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_columns_and_other_types(
    folder: Path, dtype: torch.dtype, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megamed.checkpoint.hf.source._BUFFER_BYTES", buffer)
    source = Source(folder)
    out = torch.empty(3, 4, dtype=dtype)
    source.read_into("a", slice(2, 5), out)
    assert torch.equal(out, TENSORS["a"][2:5].to(dtype))
    out = torch.empty(2, 2, 1, dtype=dtype)
    source.read_into("b", slice(1, 3), out, (slice(1, 3), slice(0, 1)))
    assert torch.equal(out, TENSORS["b"][1:3, 1:3, :1].to(dtype))
    # Into columns of another tensor, whose rows are not next to each other in memory.
    wide = torch.zeros(6, 9, dtype=dtype)
    source.read_into("a", slice(0, 6), wide[:, 2:6])
    assert torch.equal(wide[:, 2:6], TENSORS["a"].to(dtype)) and not wide[:, :2].any() and not wide[:, 6:].any()


def test_pickles_are_read_without_running_them(tmp_path: Path) -> None:
    torch.save({name: TENSORS[name] for name in "ab"}, tmp_path / "pytorch_model.bin")
    source = Source(tmp_path)
    out = torch.empty(2, 4)
    source.read_into("a", slice(1, 3), out)
    assert torch.equal(out, TENSORS["a"][1:3].float()) and torch.equal(source.read("b"), TENSORS["b"])
    torch.save({"a": torch.nn.Linear(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: cannot be read as weights alone .*; download safetensors"):
        Source(tmp_path)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def with_header(path: Path, change: Any) -> None:
    """Write another header, of the same length."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode())
    assert len(text) == length
    path.write_bytes(data[:8] + text.encode() + data[8 + length :])


def with_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


ONE, TWO = "model-1.safetensors", "model-2.safetensors"
DAMAGE: dict[str, tuple[Any, str]] = {
    "a file is missing": (lambda f: (f / ONE).unlink(), f"{ONE}: is missing or cannot be read .*; download it again"),
    "the end is missing": (lambda f: cut(f / ONE, -5), rf"{ONE}: has [\d,]+ bytes, and [\d,]+ by its header"),
    "half of the header is missing": (lambda f: cut(f / ONE, 20), f"{ONE}: is no safetensors file, or only the begin"),
    "empty": (lambda f: cut(f / ONE, 0), f"{ONE}: is no safetensors file"),
    "no JSON": (lambda f: with_header(f / ONE, lambda t: "{" * len(t)), f"{ONE}: its header is damaged"),
    "a place that overlaps": (
        lambda f: with_header(f / ONE, lambda t: t.replace("[0,120]", "[4,120]")), f"{ONE}: its header gives b a place",
    ),
    "another shape": (
        lambda f: with_header(f / ONE, lambda t: t.replace("[5,3,2]", "[5,3,3]")), f"{ONE}: its header gives b a place",
    ),
    "an index that is none": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: is damaged"),
    "an index with more": (
        lambda f: with_index(f, lambda m: m.update(z=ONE)), f"{ONE}: lacks z, which {INDEX} says it has",
    ),
    "an index with less": (lambda f: with_index(f, lambda m: m.pop("a")), f"{ONE}: has a, which {INDEX} does not know"),
    "an index that mistakes a file": (
        lambda f: with_index(f, lambda m: m.update(a=TWO)), f"says that a is in {TWO}, and it is in {ONE}",
    ),
    "an index that leads elsewhere": (
        lambda f: with_index(f, lambda m: m.update(a="../x.safetensors")), "names ../x.safetensors, which is outside",
    ),
    "a tensor twice": (
        lambda f: save_file({"c": TENSORS["c"], "a": TENSORS["a"]}, f / TWO), f"{TWO}: has a, and {ONE} has it, too",
    ),
    "no weights": (
        lambda f: [path.unlink() for path in f.iterdir()], f"has neither {SINGLE} nor {INDEX}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_named(what: str, folder: Path) -> None:
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(UserError, match=message):
        Source(folder)


def test_a_quantised_tensor_is_named_when_it_is_asked_for(folder: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.float8_e4m3fn)}, folder / SINGLE)
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match="a is of type F8_E4M3, which is not read: the model is quantised"):
        Source(folder).dtype("a")


def test_a_file_that_became_shorter_is_named(folder: Path) -> None:
    source = Source(folder)
    with open(folder / ONE, "r+b") as file:
        file.truncate(200)
    with pytest.raises(UserError, match=f"{ONE}: became shorter while it was read"):
        source.read("a")
        source.read("b")


def test_other_files_have_another_fingerprint(folder: Path) -> None:
    before = Source(folder).fingerprint
    assert Source(folder).fingerprint == before
    save_file({name: TENSORS[name] for name in "ab"}, folder / ONE, metadata={"format": "pt"})
    assert Source(folder).fingerprint != before
