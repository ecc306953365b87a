"""The tensors of a Hugging Face folder, read where they are wanted: from safetensors, or pickles of weights alone.

Safetensors (https://github.com/huggingface/safetensors, README): 8 bytes with the length of a header in JSON, which
says of each tensor its type, shape and place; then the tensors. Nothing is mapped or cached: bytes go from the file
into the memory of the tensor that takes them.
"""

import hashlib
import json
import math
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamed.checkpoint.spans import Span
from megamed.utils import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLED = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_AGAIN = "download it again"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The safetensors library allows no larger header.
_MOST_HEADER_BYTES = 100_000_000
# Read at once where a type or place differs, so that bytes cannot go straight into the tensor.
_BUFFER_BYTES = 2**23


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        name: of it.
        dtype: safetensors' name of its type.
        shape: of it.
        start, end: bytes from the end of the header on.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        text: as it stands there, with the spaces that fill it up.
        entries: the tensors, by place.
        num_bytes: of the header with its length in front: where the tensors begin.
    """

    text: str
    entries: tuple[Entry, ...]

    @property
    def num_bytes(self) -> int:
        return 8 + len(self.text.encode())

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.num_bytes + (self.entries[-1].end if self.entries else 0)

    def encode(self) -> bytes:
        """What the file begins with."""
        text = self.text.encode()
        return len(text).to_bytes(8, "little") + text


def parse_header(text: str, file: str) -> Header:
    """Understand a header.

    Args:
        text: the JSON.
        file: its file, for messages.

    Raises:
        UserError: it is damaged.
    """
    try:
        values = json.loads(text)
        entries = sorted(
            (
                Entry(name, str(x["dtype"]), tuple(map(int, x["shape"])), *map(int, x["data_offsets"]))
                for name, x in values.items()
                if name != "__metadata__"
            ),
            key=lambda entry: (entry.start, entry.end),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: its header is damaged ({error}); {_AGAIN}") from error
    place = 0
    for entry in entries:
        dtype = DTYPES.get(entry.dtype)
        if entry.start != place or (
            dtype is not None and entry.end - entry.start != math.prod(entry.shape) * dtype.itemsize
        ):
            raise UserError(f"{file}: its header gives {entry.name} a place that it cannot have; {_AGAIN}")
        place = entry.end
    return Header(text, tuple(entries))


class Source:
    """A Hugging Face folder's tensors.

    Args:
        folder: with `model.safetensors`, or an index and its files; else with pickles.

    Raises:
        UserError: there are none, or a file is missing, damaged or not the one that the index means.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{folder}: is no folder; name the folder of a Hugging Face model")
        self.headers: dict[str, Header] = {}
        self._files: dict[str, int] = {}
        self._places: dict[str, tuple[str, Entry]] = {}
        self._pickled: dict[str, Tensor] = {}
        index = folder / INDEX
        if index.is_file():
            self._open_all(_read_index(index))
        elif (folder / SINGLE).is_file():
            self._open(SINGLE)
        elif any((folder / name).is_file() for name in _PICKLED):
            self._pickled = _unpickle(folder)
        else:
            raise UserError(
                f"{folder}: has neither {SINGLE} nor {INDEX}; download the weights as safetensors files too"
            )

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors, in the order of files and places."""
        return (*self._places, *self._pickled)

    def __contains__(self, name: str) -> bool:
        return name in self._places or name in self._pickled

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._pickled[name].shape) if name in self._pickled else self._places[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor.

        Raises:
            UserError: it is quantised, or of a type that is not read.
        """
        if name in self._pickled:
            return self._pickled[name].dtype
        file, entry = self._places[name]
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{self.folder / file}: {name} is of type {entry.dtype}, which is not read: the model is quantised; "
                "download the release in bf16"
            )
        return DTYPES[entry.dtype]

    def num_bytes(self, name: str) -> int:
        """Of a tensor."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    @property
    def fingerprint(self) -> str:
        """Tells these files from others: their headers, sizes and times of change."""
        digest = hashlib.sha256(str(self.folder.resolve()).encode())
        for name, header in self.headers.items():
            status = os.fstat(self._files[name])
            digest.update(f"{name}:{header.text}:{status.st_size}:{status.st_mtime_ns}".encode())
        for name, tensor in self._pickled.items():
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_into(name, slice(0, len(out)) if out.dim() else None, out)
        return out

    def read_into(self, name: str, rows: slice | None, out: Tensor, region: Sequence[slice] = ()) -> None:
        """Read rows of a tensor, or part of each of them.

        Args:
            name: of the tensor.
            rows: from a start to a stop; None for a tensor without axes.
            out: takes them; on any device and of any type.
            region: of the further axes; all of them where it is left out.

        Raises:
            UserError: the file ends too early, or cannot be read.
        """
        shape = self.shape(name)
        whole = all(part == slice(0, size) for part, size in zip(region, shape[1:], strict=False))
        if name in self._pickled:
            tensor = self._pickled[name]
            out.copy_(tensor if rows is None else tensor[(rows, *region)])
            return
        file, entry = self._places[name]
        dtype = self.dtype(name)
        row_bytes = (entry.end - entry.start) // max(shape[0], 1) if shape else entry.end - entry.start
        first, last = (0, 1) if rows is None else (rows.start, rows.stop)
        begin = self.headers[file].num_bytes + entry.start
        if whole and out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
            self._read_bytes(file, begin + first * row_bytes, out)
            return
        step = max(_BUFFER_BYTES // max(row_bytes, 1), 1)
        for start in range(first, last, step):
            stop = min(start + step, last)
            buffer = torch.empty((stop - start, *shape[1:]) if shape else (), dtype=dtype)
            self._read_bytes(file, begin + start * row_bytes, buffer)
            part = buffer[(slice(None), *region)] if shape and not whole else buffer
            (out[start - first : stop - first] if shape else out).copy_(part)

    def span(self, name: str, first: int, last: int, row: int) -> Span | None:
        """Where rows of a tensor are in its file; None of a pickle.

        Args:
            name: of the tensor.
            first, last: which rows, to before the last.
            row: of what is made of them, which the first is.
        """
        if name in self._pickled:
            return None
        file, entry = self._places[name]
        row_bytes = (entry.end - entry.start) // max(entry.shape[0], 1) if entry.shape else 0
        start = self.headers[file].num_bytes + entry.start + first * row_bytes
        return Span(str(self.folder / file), self._files[file], start, (last - first) * row_bytes, row * row_bytes)

    def _read_bytes(self, file: str, offset: int, out: Tensor) -> None:
        view = memoryview(out.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._files[file], [view[done:]], offset + done)
            except OSError as error:
                raise UserError(f"{self.folder / file}: cannot be read ({error.strerror})") from error
            if count == 0:
                raise UserError(f"{self.folder / file}: became shorter while it was read; {_AGAIN}")
            done += count

    def _open_all(self, weight_map: Mapping[str, str]) -> None:
        for file in dict.fromkeys(weight_map.values()):
            self._open(file)
        for name, file in weight_map.items():
            if name not in self._places:
                raise UserError(f"{self.folder / file}: lacks {name}, which {INDEX} says it has; {_AGAIN}")
            if self._places[name][0] != file:
                raise UserError(
                    f"{self.folder / INDEX}: says that {name} is in {file}, and it is in {self._places[name][0]}; "
                    f"{_AGAIN}"
                )
        for name, (file, _) in self._places.items():
            if name not in weight_map:
                raise UserError(f"{self.folder / file}: has {name}, which {INDEX} does not know; {_AGAIN}")

    def _open(self, file: str) -> None:
        path = self.folder / file
        if Path(file).name != file:
            raise UserError(f"{self.folder / INDEX}: names {file}, which is outside of the folder")
        try:
            self._files[file] = os.open(path, os.O_RDONLY)
            size = os.fstat(self._files[file]).st_size
            length = int.from_bytes(os.pread(self._files[file], 8, 0), "little")
            if size < 8 or length > min(_MOST_HEADER_BYTES, size - 8):
                raise UserError(f"{path}: is no safetensors file, or only the beginning of one; {_AGAIN}")
            text = os.pread(self._files[file], length, 8).decode()
        except OSError as error:
            raise UserError(f"{path}: is missing or cannot be read ({error.strerror}); {_AGAIN}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: its header is no text; {_AGAIN}") from error
        header = self.headers[file] = parse_header(text, str(path))
        if size != header.file_bytes:
            raise UserError(f"{path}: has {size:,} bytes, and {header.file_bytes:,} by its header; {_AGAIN}")
        for entry in header.entries:
            if entry.name in self._places:
                raise UserError(f"{path}: has {entry.name}, and {self._places[entry.name][0]} has it, too; {_AGAIN}")
            self._places[entry.name] = (file, entry)


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("it names no files")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is damaged ({error}); {_AGAIN}") from error
    return weight_map


def _unpickle(folder: Path) -> dict[str, Tensor]:
    """Tensors of `.bin` files, by reading that runs no code of theirs; data stay in the files until they are read."""
    index = folder / _PICKLED[0]
    files = dict.fromkeys(_read_index(index).values()) if index.is_file() else (_PICKLED[1],)
    found: dict[str, Any] = {}
    for file in files:
        try:
            found |= torch.load(folder / file, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{folder / file}: cannot be read as weights alone ({str(error).splitlines()[0]}); download safetensors"
            ) from error
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{folder}: {name} in its files is no tensor; download safetensors")
    return found


def tensors_of(headers: Mapping[str, Header]) -> Iterator[tuple[str, Entry]]:
    """All tensors of files."""
    for file, header in headers.items():
        for entry in header.entries:
            yield file, entry
