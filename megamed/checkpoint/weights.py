"""Reads weights from a checkpoint part by part: one expert, one layer, or this rank's share of everything.

Neither a process group nor the rest of the checkpoint is needed: what is asked for is read, into memory that is
there already. The format is that of torch's distributed checkpoints, which Megatron writes.
"""

import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megamed.checkpoint.spans import Span, find_tensor
from megamed.checkpoint.writer import reason_of
from megamed.utils import UserError

# The norm before the experts goes by either name: Megatron's layers without Transformer Engine use the first.
_NORM, _NORM_OF_TE = ".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."
_LAYER = re.compile(r"(.*\.layers\.)(\d+)\.(.*)")

# What the metadata of weights are made of; a pickle that names anything else is not opened.
_MADE_OF = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
}  # fmt: skip


class Weights:
    """The weights in a checkpoint.

    A name is a parameter's key in the checkpoint. Where a checkpoint stacks its layers in one tensor (dense models),
    a layer's parameter is also found under the name that it has where they are not stacked.

    Args:
        checkpoint: its folder.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self._files: dict[Path, IO[bytes]] = {}
        self._found: dict[MetadataIndex, int | None] = {}
        try:
            with open(checkpoint / ".metadata", "rb") as file:
                metadata: Metadata = _Unpickler(file).load()
            self._tensors = {
                key: tensor
                for key, tensor in metadata.state_dict_metadata.items()
                if isinstance(tensor, TensorStorageMetadata) and key.startswith(("language.", "vision."))
            }
            self._reader = FileSystemReader(checkpoint)
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        except Exception as error:  # damaged files raise whatever their bytes lead to
            raise self._damaged(error) from error

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter. Experts are stacked along its first axis."""
        key, stack = self._need(name)
        return tuple(self._tensors[key].size[len(stack) :])

    def dtype(self, name: str) -> torch.dtype:
        """Type that a parameter is stored in."""
        return self._tensors[self._need(name)[0]].properties.dtype

    def read(self, name: str, *stack: int, dtype: torch.dtype | None = None) -> Tensor:
        """A whole parameter, in host memory.

        Args:
            name: of the parameter.
            stack: its place along the first axes: the expert.
            dtype: None for the one that it is stored in.
        """
        tensor = torch.empty(self.shape(name)[len(stack) :], dtype=dtype or self.dtype(name))
        self.fill([(name, (*stack, *[0] * tensor.dim()), tensor)])
        return tensor

    def fill(self, parts: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> None:
        """Read parts of parameters into tensors, which may be on any device and of another type.

        Args:
            parts: a name, where in the parameter the part begins, and the tensor. Its shape may lack leading axes, in
                which the part then has the extent 1.

        Raises:
            UserError: a parameter is missing, its shape is another, or the files are damaged.
        """
        items: list[ReadItem] = []
        targets: list[Tensor] = []
        for name, offsets, tensor in parts:
            key, stack = self._need(name)
            offsets = (*stack, *offsets)
            sizes = (*[1] * (len(offsets) - tensor.dim()), *tensor.shape)
            whole = self._tensors[key].size
            if len(whole) != len(sizes) or any(o + n > w for o, n, w in zip(offsets, sizes, whole, strict=True)):
                raise UserError(f"{self.checkpoint}: {key} is {tuple(whole)} there, of another model")
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            number = str(len(targets))  # of the target: several may be parts of one parameter
            targets.append(tensor.detach()[(None,) * (len(offsets) - tensor.dim())])
            found = create_read_items_for_chunk_list(key, self._tensors[key], [chunk])
            if sum(math.prod(item.lengths) for item in found) != tensor.numel():
                raise UserError(f"{self.checkpoint}: {key} is there in part only; take another checkpoint")
            items += [replace(item, dest_index=MetadataIndex(number)) for item in found]
        try:
            self._reader.read_data(LoadPlan(items), _Targets(targets)).wait()
        except Exception as error:
            raise self._damaged(error) from error

    def spans(self, name: str, stack: tuple[int, ...], first: int, last: int, row: int) -> list[Span] | None:
        """Where rows of a parameter are in the files.

        Args:
            name: of the parameter.
            stack: its place along the first axes: the expert.
            first, last: which rows, to before the last.
            row: of what is made of them, which the first is.

        Returns:
            Bytes that hold all of them, or None where they do not lie so: parts of rows are apart.

        Raises:
            UserError: a parameter is missing, or the files are damaged.
        """
        key, layers = self._need(name)
        stack, stored = (*layers, *stack), self._tensors[key]
        rows, width, spans = len(stack), math.prod(stored.size[len(stack) + 1 :]), []
        if rows >= len(stored.size):
            return None
        for number, chunk in enumerate(stored.chunks):
            inner = [place - start for place, start in zip(stack, chunk.offsets[:rows], strict=True)]
            if any(not 0 <= place < size for place, size in zip(inner, chunk.sizes[:rows], strict=True)):
                continue
            start, stop = max(chunk.offsets[rows], first), min(chunk.offsets[rows] + chunk.sizes[rows], last)
            if start >= stop:
                continue
            if chunk.sizes[rows + 1 :] != stored.size[rows + 1 :]:
                return None
            found = self._numbers(MetadataIndex(key, chunk.offsets, number), chunk.sizes)
            if found is None:
                return None
            before = 0
            for place, size in zip([*inner, start - chunk.offsets[rows]], chunk.sizes[: rows + 1], strict=True):
                before = before * size + place
            row_bytes = width * stored.properties.dtype.itemsize
            place = (row + start - first) * row_bytes
            file, descriptor, begin = found
            spans.append(Span(file, descriptor, begin + before * row_bytes, (stop - start) * row_bytes, place))
        if sum(span.count for span in spans) != (last - first) * width * stored.properties.dtype.itemsize:
            raise UserError(f"{self.checkpoint}: {key} is there in part only; take another checkpoint")
        return spans

    def _numbers(self, index: MetadataIndex, sizes: torch.Size) -> tuple[str, int, int] | None:
        """Path and descriptor of the file that has a chunk, and where in it; None where its values are not in order."""
        try:
            stored = self._reader.storage_data[index]
            path = self.checkpoint / stored.relative_path
            if path not in self._files:
                self._files[path] = open(path, "rb")
            file = self._files[path]
            if index not in self._found:
                tensor, begin = find_tensor(file, stored.offset, stored.length)
                # Megatron and torch write no others.
                in_order = tensor.is_contiguous() and tensor.shape == sizes and not tensor.storage_offset()
                self._found[index] = begin if in_order else None
        except Exception as error:
            raise self._damaged(error) from error
        place = self._found[index]
        return None if place is None else (str(path), file.fileno(), place)

    def _find(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Key in the checkpoint, and the place along the axis of layers if they are stacked."""
        for key in (name, name.replace(_NORM, _NORM_OF_TE), name.replace(_NORM_OF_TE, _NORM)):
            if key in self._tensors:
                return key, ()
            if found := _LAYER.fullmatch(key):
                stacked, number = found[1] + found[3], int(found[2])
                if stacked in self._tensors and number < self._tensors[stacked].size[0]:
                    return stacked, (number,)
        return None

    def _need(self, name: str) -> tuple[str, tuple[int, ...]]:
        found = self._find(name)
        if found is None:
            raise UserError(f"{self.checkpoint}: has no weights {name}; it is of another model, or incomplete")
        return found

    def _damaged(self, error: BaseException) -> UserError:
        return UserError(f"{self.checkpoint}: cannot be loaded ({reason_of(error)}); take another checkpoint")


def fill_state(weights: Weights, state: dict, wanted: Callable[[ShardedTensor], bool]) -> None:
    """Read what a sharded state dict has of a model's weights, in place.

    Args:
        weights: of the same model, at any layout.
        state: its data are views of the parameters; changed by this.
        wanted: which of its tensors are read; the others are left as they are.
    """
    apply_factories(state)
    # Beside tensors there is quantisation state of Transformer Engine, which nothing here uses.
    tensors = [tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]
    weights.fill((tensor.key, tensor.global_offset, tensor.data) for tensor in tensors if wanted(tensor))


class _Targets(LoadPlanner):
    """Tells torch's reader where what it reads goes."""

    def __init__(self, targets: list[Tensor]):
        self.targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self.targets[int(read_item.dest_index.fqn)]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(axis, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is in its place."""

    def set_up_planner(self, *_: Any, **__: Any) -> None: ...
    def create_local_plan(self) -> LoadPlan: ...  # type: ignore[empty-body]
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]: ...  # type: ignore[empty-body]
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan: ...  # type: ignore[empty-body]
    def load_bytes(self, read_item: ReadItem, value: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    """Opens metadata, and nothing that could do more than be metadata."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _MADE_OF.get(module, ()):
            raise pickle.UnpicklingError(f"its metadata name {module}.{name}, which weights do not need")
        return super().find_class(module, name)
