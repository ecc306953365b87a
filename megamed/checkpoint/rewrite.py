"""Writes a checkpoint of weights alone in one process, one parameter after the other.

A model larger than the host's memory can be written so: each parameter is made when it is its turn, and forgotten.
What is written is readable at any layout, as every checkpoint is.
"""

import contextlib
import json
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from tqdm import tqdm

from megamed.checkpoint.aside import IDENTITY, written_aside
from megamed.checkpoint.card import CARD, describe_model
from megamed.checkpoint.spans import Span, copy_spans, leave_room
from megamed.checkpoint.state import weights_state
from megamed.checkpoint.sums import write_sums
from megamed.checkpoint.writer import digest_of, write_file
from megamed.models.language import AttentionConfig, build_language_chunks
from megamed.models.vlm import FrameEncoder, VLMConfig
from megamed.runtime import Mesh, ParallelConfig, build_mesh, destroy_mesh, meta_device, seed_everything, start, stop
from megamed.utils import UserError

# Beside its numbers, what a tensor takes in the file: torch's own header and alignment, and its entry in the index.
_BYTES_PER_TENSOR = 4096

# About as large is a file; a killed writing loses one of them at most.
_FILE_BYTES = 2**30
_JOURNAL = "written_sums_"

Make = Callable[[str, tuple[int, ...]], Tensor]
"""Makes a parameter: of its name, and its place in the stack of experts, where there is one."""

Find = Callable[["Piece"], Sequence[Span] | None]
"""Where the bytes of a piece are, to be copied as they are; what none covers is zeros. None: it has to be made."""


@dataclass(frozen=True)
class Piece:
    """Part of a parameter that is stored by itself."""

    name: str
    """The parameter's key in the checkpoint."""
    stack: tuple[int, ...]
    """Its place along the leading axes (the expert), which `make` is told of."""
    offsets: tuple[int, ...]
    """Where the piece begins, along all axes."""
    sizes: tuple[int, ...]
    whole: tuple[int, ...]
    """Shape of what the key has, with leading axes."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    def of(self, parameter: Tensor) -> Tensor:
        """This piece of its parameter, alone in its memory, and with leading axes."""
        stacked = len(self.stack)
        assert parameter.shape == self.whole[stacked:], f"{self.name}: {tuple(parameter.shape)}, not {self.whole}"
        region = tuple(slice(o, o + n) for o, n in zip(self.offsets[stacked:], self.sizes[stacked:], strict=True))
        return parameter[region].to(self.dtype).reshape(self.sizes).contiguous()


@contextlib.contextmanager
def one_process() -> Iterator[Mesh]:
    """The mesh of a program that runs as one process, without a GPU, and computes nothing in parallel."""
    start()
    try:
        mesh = build_mesh(ParallelConfig())
        seed_everything(0, 0)  # Megatron's layers want random states, which nothing draws from
        yield mesh
    finally:
        destroy_mesh()
        stop()


def outline(config: VLMConfig, mesh: Mesh, dtype: torch.dtype) -> list[Piece | str]:
    """What a checkpoint of a model holds, without its numbers: pieces, and keys of what layers may keep beside them.

    Args:
        config: the model.
        mesh: of one process, which uses no GPU.
        dtype: of the weights.
    """
    with meta_device():
        chunks = build_language_chunks(config.language, AttentionConfig(), mesh, dtype)
        encoder = FrameEncoder(config.vision, config.projector).to(dtype)
        state = weights_state(chunks, encoder, mesh)
        apply_factories(state)
    found: list[Piece | str] = []
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            stacked = value.prepend_axis_num
            offsets = tuple(value.global_offset)
            sizes = (*[1] * stacked, *value.local_shape)
            found.append(Piece(value.key, offsets[:stacked], offsets, sizes, tuple(value.global_shape), value.dtype))
        elif isinstance(value, ShardedObject):
            found.append(value.unique_key)
    return found


def make_card(config: VLMConfig, versions: dict[str, str]) -> dict[str, Any]:
    """The card of a checkpoint that has weights alone."""
    return {
        "format": 1,
        "model": describe_model(config),
        "layout": {**asdict(ParallelConfig()), "data": 1},
        "optimizer": {},
        "versions": versions,
        "weights_only": True,
        "has_checksums": True,
        "step": 0,
        "position": 0,
        "data": {},
        "world_size": 1,
    }


def check_target(target: Path, overwrite: bool) -> None:
    """Check that a checkpoint may be written there.

    Raises:
        UserError: there is something already that may not be replaced.
    """
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not (target / CARD).is_file()):
        raise UserError(f"--to {target}: is there, and is no checkpoint, so it is not replaced; name another folder")
    if any(target.iterdir()) and not overwrite:
        raise UserError(f"--to {target}: is there already; name another folder, or replace it with --overwrite")


def write_weights(
    target: Path,
    pieces: list[Piece | str],
    make: Make,
    card: dict[str, Any],
    beside: Mapping[str, str],
    identity: str | None = None,
    prepare: Callable[[Path], Any] = lambda aside: None,
    num_threads: int = 1,
    find: Find = lambda piece: None,
) -> int:
    """Write a checkpoint. Until it is complete it has another name; what was there under its own is replaced then.

    Each thread takes memory for the parameter that is being made and a copy of the piece that is being written.

    Args:
        target: its folder.
        pieces: what it holds, from `outline`.
        make: makes the parameters; by one thread in the order of their names, once for each.
        card: what it says of itself.
        beside: further text files, by name.
        identity: what it is made of and how; a killed writing of the same identity is gone on with. None begins anew.
        prepare: puts further files into the folder that it is given.
        num_threads: files that are written at a time; `make` and `find` are then called from several threads.
        find: says of a piece where its bytes are, and it is copied and not made.

    Returns:
        Bytes of weights.

    Raises:
        UserError: the disk is full or not writable. What was written is removed.
    """
    tensors = sorted((p for p in pieces if isinstance(p, Piece)), key=lambda p: (p.name, p.offsets))
    objects = [key for key in pieces if isinstance(key, str)]
    total = sum(piece.num_bytes for piece in tensors)
    try:
        with written_aside(target, total + _BYTES_PER_TENSOR * (len(pieces) + 256), identity) as aside:
            prepare(aside)
            with tqdm(total=total, unit="B", unit_scale=True, desc="write", disable=not sys.stderr.isatty()) as bar:
                sums = _write(aside, tensors, objects, make, find, bar.update, num_threads)
            torch.save({}, aside / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(aside))
            for name, text in beside.items():
                write_file(aside / name, text.encode())
            write_file(aside / CARD, json.dumps(card, indent=1).encode())
            write_sums(aside, sums, leaves=IDENTITY)
    except _MakingFailed as error:
        assert error.__cause__ is not None
        raise error.__cause__ from None
    return total


def _write(
    aside: Path,
    tensors: list[Piece],
    objects: list[str],
    make: Make,
    find: Find,
    advance: Callable[[int], Any],
    num_threads: int,
) -> dict[str, str]:
    """Write the pieces, some to each file, with their index; files that a killed writing finished are kept.

    Returns:
        SHA-256 of the files, by name.
    """
    index: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    files: list[list[tuple[MetadataIndex, Piece | None]]] = [[(MetadataIndex(key), None) for key in objects]]
    sizes = [0]
    for piece in tensors:
        chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
        new = TensorStorageMetadata(TensorProperties(dtype=piece.dtype), torch.Size(piece.whole), [])
        stored = index.setdefault(piece.name, new)
        place = MetadataIndex(piece.name, piece.offsets, len(stored.chunks))
        stored.chunks.append(chunk)
        if sizes[-1] and sizes[-1] + piece.num_bytes > _FILE_BYTES:
            files.append([])
            sizes.append(0)
        sizes[-1] += piece.num_bytes
        files[-1].append((place, piece))

    sums: dict[str, str] = {}

    def write(number: int) -> dict[MetadataIndex, _StorageInfo]:
        path = aside / f"__{number}_0.distcp"  # as torch names them, as if each were another rank's
        journal = aside / f"{_JOURNAL}{number}.json"
        if journal.is_file():
            advance(sizes[number])
            written = json.loads(journal.read_text())
            sums[path.name] = written["sha256"]
            return _places(written["items"])
        found = {}
        maker = _Maker(make)
        with open(path, "wb+") as file:
            for place, piece in files[number]:
                offset = file.tell()
                _write_item(file, piece, maker, find, advance)
                found[place] = _StorageInfo(path.name, offset, file.tell() - offset)
            file.flush()
            os.fsync(file.fileno())
        sums[path.name] = digest_of(path)
        written = {"sha256": sums[path.name], "items": [_plain(*item) for item in found.items()]}
        write_file(journal, json.dumps(written).encode())
        return found

    with ThreadPoolExecutor(num_threads) as pool:
        jobs = [pool.submit(write, number) for number in range(len(files))]
        try:
            places = {place: stored for job in jobs for place, stored in job.result().items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    # Without where it is written: a path may hold a user's name.
    metadata = Metadata(index, storage_data=places, version=CURRENT_DCP_VERSION)
    write_file(aside / ".metadata", pickle.dumps(metadata))
    for journal in aside.glob("written_*.json"):
        journal.unlink()
    return sums


def _write_item(
    file: IO[bytes], piece: Piece | None, maker: "_Maker", find: Find, advance: Callable[[int], Any]
) -> None:
    """Write a piece at the end of a file; None is what a layer may keep beside its parameters, which is nothing."""
    if piece is None:
        torch.save([None], file)  # as Megatron wraps it
        return
    spans = find(piece)
    if spans is not None:
        end = file.tell()
        length, begin = leave_room(file, piece.sizes, piece.dtype)
        copy_spans(spans, file.fileno(), begin, advance)
        file.seek(end + length)
    else:
        torch.save(maker(piece), file)
        advance(piece.num_bytes)


def _plain(place: MetadataIndex, stored: _StorageInfo) -> list[Any]:
    """Where an item is, as JSON has it."""
    offsets = None if place.offset is None else list(place.offset)
    return [place.fqn, offsets, place.index, stored.relative_path, stored.offset, stored.length]


def _places(items: list[list[Any]]) -> dict[MetadataIndex, _StorageInfo]:
    """The inverse of `_plain`, of a whole file."""
    found = {}
    for name, offsets, number, path, offset, length in items:
        place = MetadataIndex(name, None if offsets is None else torch.Size(offsets), number)
        found[place] = _StorageInfo(path, offset, length)
    return found


class _MakingFailed(Exception):
    """A parameter could not be made; its cause says why. The target has nothing to do with it."""


class _Maker:
    """Makes pieces, of one parameter after the other, which is kept while its pieces are asked for."""

    def __init__(self, make: Make):
        self.make = make
        self._last: tuple[tuple[str, tuple[int, ...]], Tensor] | None = None

    def __call__(self, piece: Piece) -> Tensor:
        key = (piece.name, piece.stack)
        if self._last is None or self._last[0] != key:
            self._last = None  # its memory, before the next takes some
            try:
                self._last = (key, self.make(*key))
            except Exception as error:
                raise _MakingFailed from error
        part = piece.of(self._last[1])
        # Of a view, torch.save writes all the memory that it is in.
        return part if part.untyped_storage().nbytes() == piece.num_bytes else part.clone()
