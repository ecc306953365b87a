"""Writes a checkpoint of weights alone in one process, one parameter after the other.

A model larger than the host's memory can be written so: each parameter is made when it is its turn, and forgotten.
What is written is readable at any layout, as every checkpoint is.
"""

import contextlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, WriteItem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from tqdm import tqdm

from megamed.checkpoint.aside import written_aside
from megamed.checkpoint.card import CARD, describe_model
from megamed.checkpoint.state import weights_state
from megamed.checkpoint.writer import write_file
from megamed.models.language import AttentionConfig, build_language_chunks
from megamed.models.vlm import FrameEncoder, VLMConfig
from megamed.runtime import Mesh, ParallelConfig, build_mesh, destroy_mesh, meta_device, seed_everything, start, stop
from megamed.utils import UserError

# Beside its numbers, what a tensor takes in the file: torch's own header and alignment, and its entry in the index.
_BYTES_PER_TENSOR = 4096

# About as large is a file; a killed writing loses one of them at most.
_FILE_BYTES = 2**30
_JOURNAL = "written_"

Make = Callable[[str, tuple[int, ...]], Tensor]
"""Makes a parameter: of its name, and its place in the stack of experts, where there is one."""


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
        num_threads: files that are written at a time; `make` is then called from several threads.

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
                _write(aside, tensors, objects, make, bar.update, num_threads)
            torch.save({}, aside / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(aside))
            for name, text in beside.items():
                write_file(aside / name, text.encode())
            write_file(aside / CARD, json.dumps(card, indent=1).encode())
    except _MakingFailed as error:
        assert error.__cause__ is not None
        raise error.__cause__ from None
    return total


def _write(
    aside: Path,
    tensors: list[Piece],
    objects: list[str],
    make: Make,
    advance: Callable[[int], Any],
    num_threads: int,
) -> None:
    """Write the pieces, some to each file, with their index; files that a killed writing finished are kept."""
    index: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    places: dict[MetadataIndex, Piece] = {}
    files: list[list[WriteItem]] = [[WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]]
    sizes = [0]
    for piece in tensors:
        properties, whole = TensorProperties(dtype=piece.dtype), torch.Size(piece.whole)
        chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
        stored = index.setdefault(piece.name, TensorStorageMetadata(properties, whole, []))
        place = MetadataIndex(piece.name, piece.offsets, len(stored.chunks))
        stored.chunks.append(chunk)
        places[place] = piece
        if sizes[-1] and sizes[-1] + piece.num_bytes > _FILE_BYTES:
            files.append([])
            sizes.append(0)
        sizes[-1] += piece.num_bytes
        files[-1].append(WriteItem(place, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, whole)))
    writer = _Writer(aside, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    # As if each file were another rank's.
    plans = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(items)) for items in files])

    def write(number: int) -> list[WriteResult]:
        journal = aside / f"{_JOURNAL}{number}.json"
        if journal.is_file():
            advance(sizes[number])
            return _results(journal)
        maker = _Maker(make, places, advance)
        found = writer.write_data(plans[number], maker).wait()  # type: ignore[arg-type]
        write_file(journal, json.dumps([_plain(result) for result in found]).encode())
        return found

    with ThreadPoolExecutor(num_threads) as pool:
        jobs = [pool.submit(write, number) for number in range(len(plans))]
        try:
            results = [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    writer.finish(Metadata(index), results)
    for journal in aside.glob(f"{_JOURNAL}*.json"):
        journal.unlink()


def _plain(result: WriteResult) -> list[Any]:
    """Where torch's writer put an item, as JSON has it."""
    place, stored = result.index, result.storage_data
    offsets = None if place.offset is None else list(place.offset)
    file = (stored.relative_path, stored.offset, stored.length)
    return [place.fqn, offsets, place.index, result.size_in_bytes, *file]


def _results(journal: Path) -> list[WriteResult]:
    """The inverse of `_plain`, of a whole file."""
    found = []
    for name, offsets, number, size, path, offset, length in json.loads(journal.read_text()):
        place = MetadataIndex(name, None if offsets is None else torch.Size(offsets), number)
        found.append(WriteResult(place, size, _StorageInfo(path, offset, length)))
    return found


class _Writer(FileSystemWriter):
    """torch's writer, which leaves out where it wrote: a path may hold a user's name."""

    def storage_meta(self) -> None:
        return None


class _MakingFailed(Exception):
    """A parameter could not be made; its cause says why. The target has nothing to do with it."""


class _Maker:
    """What torch's writer asks for the data of an item, just before it writes it."""

    def __init__(self, make: Make, pieces: Mapping[MetadataIndex, Piece], advance: Callable[[int], Any]):
        self.make, self.pieces, self.advance = make, pieces, advance
        self._last: tuple[tuple[str, tuple[int, ...]], Tensor] | None = None

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        if item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # as Megatron wraps it
            return nothing
        piece = self.pieces[item.index]
        key = (piece.name, piece.stack)
        if self._last is None or self._last[0] != key:
            self._last = None  # its memory, before the next takes some
            try:
                self._last = (key, self.make(*key))
            except Exception as error:
                raise _MakingFailed from error
        self.advance(piece.num_bytes)
        return piece.of(self._last[1])
