"""Writes a checkpoint of weights alone in one process, one parameter after the other.

A model larger than the host's memory can be written so: each parameter is made when it is its turn, and forgotten.
What is written is readable at any layout, as every checkpoint is.
"""

import contextlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, WriteItem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from tqdm import tqdm

from megamed.checkpoint.card import CARD, describe_model
from megamed.checkpoint.state import weights_state
from megamed.checkpoint.writer import reason_of, write_file
from megamed.models.language import AttentionConfig, build_language_chunks
from megamed.models.vlm import FrameEncoder, VLMConfig
from megamed.runtime import Mesh, ParallelConfig, build_mesh, destroy_mesh, meta_device, seed_everything, start, stop
from megamed.utils import UserError
from megamed.utils.files import sync

# Beside its numbers, what a tensor takes in the file: torch's own header and alignment, and its entry in the index.
_BYTES_PER_TENSOR = 4096

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
    target: Path, pieces: list[Piece | str], make: Make, card: dict[str, Any], beside: Mapping[str, str]
) -> int:
    """Write a checkpoint. Until it is complete it has another name; what was there under its own is replaced then.

    It takes memory for the parameter that is being made and a copy of the piece that is being written.

    Args:
        target: its folder.
        pieces: what it holds, from `outline`.
        make: makes the parameters, in the order of their names; called once for each.
        card: what it says of itself.
        beside: further text files, by name.

    Returns:
        Bytes that were written.

    Raises:
        UserError: the disk is full or not writable. What was written is removed.
    """
    aside, discarded = (target.with_name(f"{target.name}.{word}") for word in ("unfinished", "discarded"))
    tensors = sorted((p for p in pieces if isinstance(p, Piece)), key=lambda p: (p.name, p.offsets))
    total, maker = sum(piece.num_bytes for piece in tensors), _Maker(make)
    try:
        _clean(target, aside, discarded)
        _need_space(target, total + _BYTES_PER_TENSOR * (len(pieces) + 256))
        aside.mkdir(parents=True)
        with tqdm(total=total, unit="B", unit_scale=True, desc="write", disable=not sys.stderr.isatty()) as bar:
            maker.advance = bar.update
            _write(aside, tensors, [key for key in pieces if isinstance(key, str)], maker)
        torch.save({}, aside / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(aside))
        for name, text in beside.items():
            write_file(aside / name, text.encode())
        write_file(aside / CARD, json.dumps(card, indent=1).encode())
        sync(aside)
        if target.exists():
            os.rename(target, discarded)
        os.rename(aside, target)
        sync(target.parent)
        shutil.rmtree(discarded, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch's writer turns the system's error into a RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        if maker.is_making:
            raise
        free_mib = shutil.disk_usage(_existing(target)).free >> 20  # torch does not always say that a disk is full
        raise UserError(
            f"--to {target}: cannot be written ({reason_of(error)}; {free_mib} MiB free there); free space, or name a "
            "folder on another disk"
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return total


def _clean(target: Path, aside: Path, discarded: Path) -> None:
    """Remove what a killed run left; one that was killed between its renames had moved the target away."""
    if discarded.exists() and not target.exists():
        os.rename(discarded, target)
    for leftover in (aside, discarded):
        if leftover.exists():
            shutil.rmtree(leftover)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _need_space(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(_existing(target.parent)).free
    if free < num_bytes:
        raise UserError(
            f"--to {target}: takes {num_bytes / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there; free "
            "space, or name a folder on another disk"
        )


def _write(aside: Path, tensors: list[Piece], objects: list[str], maker: "_Maker") -> None:
    """Write the pieces to one file, with their index."""
    index: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
    for piece in tensors:
        properties, whole = TensorProperties(dtype=piece.dtype), torch.Size(piece.whole)
        chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
        stored = index.setdefault(piece.name, TensorStorageMetadata(properties, whole, []))
        place = MetadataIndex(piece.name, piece.offsets, len(stored.chunks))
        stored.chunks.append(chunk)
        maker.pieces[place] = piece
        items.append(WriteItem(place, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, whole)))
    writer = _Writer(aside, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(items))])
    results = writer.write_data(plan, maker).wait()  # type: ignore[arg-type]
    writer.finish(Metadata(index), [results])


class _Writer(FileSystemWriter):
    """torch's writer, which leaves out where it wrote: a path may hold a user's name."""

    def storage_meta(self) -> None:
        return None


class _Maker:
    """What torch's writer asks for the data of an item, just before it writes it."""

    def __init__(self, make: Make):
        self.make, self.is_making = make, False
        self.advance: Callable[[int], Any] = lambda num_bytes: None
        self.pieces: dict[MetadataIndex, Piece] = {}
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
            self.is_making = True
            self._last = (key, self.make(*key))
            self.is_making = False
        self.advance(piece.num_bytes)
        return piece.of(self._last[1])

