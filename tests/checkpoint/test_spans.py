"""Bytes that the system copies from file to file are those that would have been read and written."""

import errno
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megamed.checkpoint import spans
from megamed.checkpoint.spans import Span, copy_spans, find_tensor, joined, leave_room
from megamed.checkpoint.weights import Weights
from megamed.checkpoint.writer import write_file
from megamed.utils import UserError
from tests.small_disk import mounted


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_neighbours_are_one() -> None:
    parts = [Span("a", 3, 10, 4, 0), Span("a", 3, 14, 6, 4), Span("a", 3, 21, 1, 10), Span("a", 3, 22, 1, 12)]
    assert list(joined(parts)) == [Span("a", 3, 10, 10, 0), *parts[2:]]
    assert list(joined([Span("a", 3, 0, 4, 0), Span("b", 4, 4, 4, 4)])) != [Span("a", 3, 0, 8, 0)]
    assert list(joined([])) == []


@pytest.mark.parametrize("failing", [None, errno.EXDEV, errno.EOPNOTSUPP, "none"])
def test_a_tensor_is_put_together_in_a_file(failing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if failing == "none":
        monkeypatch.delattr(os, "copy_file_range")
    elif failing:
        def refuse(*_: Any) -> int:
            raise OSError(failing, os.strerror(failing))
        monkeypatch.setattr(os, "copy_file_range", refuse)  # fmt: skip
    monkeypatch.setattr(spans, "_COPY_BYTES", 1000)
    theirs = torch.randn(40, 100, dtype=torch.bfloat16)
    (tmp_path / "source").write_bytes(b"header" + bytes_of(theirs))
    # Rows 30 to 39, then 10 to 29; the last 5 are not covered, as those that a vocabulary is padded with.
    expected = torch.cat([theirs[30:], theirs[10:30], theirs.new_zeros(5, 100)])
    told: list[int] = []
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "wb+") as target:
        torch.save([None], target)
        offset = target.tell()
        length, begin = leave_room(target, expected.shape, expected.dtype)
        name, descriptor = source.name, source.fileno()
        parts = [Span(name, descriptor, 6 + 30 * 200, 2000, 0), Span(name, descriptor, 6 + 10 * 200, 4000, 2000)]
        copy_spans(parts, target.fileno(), begin, told.append)
        target.seek(offset + length)
        torch.save(theirs, target)
        target.flush()
        assert sum(told) == 6000 and len(told) >= 6
        found, place = find_tensor(target, offset, length)
        assert place == begin and (found.shape, found.dtype) == (expected.shape, expected.dtype)
    written = (tmp_path / "target").read_bytes()
    for part, tensor in ((written[offset : offset + length], expected), (written[offset + length :], theirs)):
        assert bytes_of(torch.load(io.BytesIO(part), weights_only=True)) == bytes_of(tensor)


def test_whose_fault_it_is_is_said(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(10))
    with open(tmp_path / "short", "rb") as source, open(tmp_path / "target", "wb") as target:
        with pytest.raises(UserError, match=r"short: became shorter while it was read"):
            copy_spans([Span(source.name, source.fileno(), 4, 10, 0)], target.fileno(), 0, print)
        # A descriptor that cannot be read, of a folder: the system refuses both ways.
        folder = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(UserError, match=r"short: cannot be read \(Is a directory\)"):
            copy_spans([Span(source.name, folder, 0, 10, 0)], target.fileno(), 0, print)
        os.close(folder)
    with mounted(tmp_path / "disk", "64k") as disk, open(tmp_path / "large", "wb+") as source:
        source.truncate(2**20)
        with open(disk / "target", "wb") as target, pytest.raises(OSError, match="No space left"):
            copy_spans([Span(source.name, source.fileno(), 0, 2**20, 0)], target.fileno(), 0, lambda count: None)


def write_checkpoint(folder: Path, key: str, whole: Tensor, chunks: list[tuple[tuple[int, ...], Tensor]]) -> Weights:
    """As ranks write it, each its chunks: of what they are, and where each begins."""
    stored = TensorStorageMetadata(TensorProperties(dtype=whole.dtype), whole.shape, [])
    places = {}
    with open(folder / "__0_0.distcp", "wb") as file:
        for number, (offsets, chunk) in enumerate(chunks):
            begin = file.tell()
            torch.save(chunk, file)
            stored.chunks.append(ChunkStorageMetadata(torch.Size(offsets), chunk.shape))
            places[MetadataIndex(key, offsets, number)] = _StorageInfo("__0_0.distcp", begin, file.tell() - begin)
    write_file(folder / ".metadata", pickle.dumps(Metadata({key: stored}, storage_data=places)))
    return Weights(folder)


def read(parts: list[Span], num_bytes: int) -> bytes:
    out = bytearray(num_bytes)
    for part in parts:
        out[part.place : part.place + part.count] = os.pread(part.descriptor, part.count, part.start)
    return bytes(out)


def test_rows_of_stacked_layers_that_ranks_share(tmp_path: Path) -> None:
    whole = torch.randn(4, 6, 5)  # layers, rows, columns
    chunks = [((layer, row, 0), whole[layer : layer + 2, row : row + 3].clone()) for layer in (0, 2) for row in (0, 3)]
    weights = write_checkpoint(tmp_path, "language.decoder.layers.fc1.weight", whole, chunks)
    for layer in range(4):
        for first, last in ((0, 6), (2, 4), (4, 5)):
            parts = weights.spans(f"language.decoder.layers.{layer}.fc1.weight", (), first, last, 7)
            assert parts is not None and min(part.place for part in parts) == 7 * 20
            rows = last - first
            assert read(parts, (7 + rows) * 20)[140:] == bytes_of(whole[layer, first:last])


def test_rows_that_are_apart_are_made(tmp_path: Path) -> None:
    whole = torch.randn(6, 8)
    (tmp_path / "columns").mkdir()
    columns = [((0, start), whole[:, start : start + 4].clone()) for start in (0, 4)]
    assert write_checkpoint(tmp_path / "columns", "vision.w", whole, columns).spans("vision.w", (), 0, 6, 0) is None
    (tmp_path / "turned").mkdir()
    turned = [((0, 0), torch.randn(8, 6).t())]
    assert write_checkpoint(tmp_path / "turned", "vision.w", whole, turned).spans("vision.w", (), 0, 6, 0) is None
    (tmp_path / "half").mkdir()
    half = write_checkpoint(tmp_path / "half", "vision.w", whole, [((0, 0), whole[:3].clone())])
    assert half.spans("vision.w", (), 0, 3, 0) is not None
    with pytest.raises(UserError, match=r"vision\.w is there in part only"):
        half.spans("vision.w", (), 0, 6, 0)
