"""Numbers that go from file to file as they are: the system copies them, and this program never has them in memory.

Formats of checkpoints differ in names and headers, and in the order of rows; the numbers between are the same bytes.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view

from megamed.utils import UserError

# At a time, so that there is something to say in between, and a stop is heeded.
_COPY_BYTES, _BUFFER_BYTES = 2**26, 2**23
# Of these nothing but the target is the cause.
_OF_THE_TARGET = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Span:
    """Bytes of a file that are bytes of a tensor.

    Attributes:
        file: its path, for messages.
        descriptor: of the file, open for reading.
        start: of the first byte in it.
        count: how many.
        place: of the first byte in the tensor.
    """

    file: str
    descriptor: int
    start: int
    count: int
    place: int


def joined(spans: Iterable[Span]) -> Iterator[Span]:
    """The same bytes in as few spans as they fit in."""
    last: Span | None = None
    for span in spans:
        if (
            last is not None
            and span.descriptor == last.descriptor
            and span.start - last.start == span.place - last.place == last.count
        ):
            last = replace(last, count=last.count + span.count)
        else:
            if last is not None:
                yield last
            last = span
    if last is not None:
        yield last


def copy_spans(spans: Iterable[Span], descriptor: int, begin: int, advance: Callable[[int], Any]) -> None:
    """Copy spans to where a tensor lies in a file that is being written.

    Args:
        spans: of the tensor.
        descriptor: of the file.
        begin: of the tensor in it.
        advance: is told of bytes that were copied.

    Raises:
        UserError: a span's file ends too early or cannot be read.
        OSError: the target cannot be written.
    """
    copy = _copy_in_kernel
    for span in joined(spans):
        done = 0
        while done < span.count:
            count = min(span.count - done, _COPY_BYTES)
            try:
                copied = copy(span, span.start + done, count, descriptor, begin + span.place + done)
            except OSError as error:
                if error.errno in _OF_THE_TARGET or copy is _copy_by_hand:
                    raise
                copy = _copy_by_hand  # file systems that know no other way; and it tells whose fault it is
                continue
            if copied == 0:
                raise UserError(f"{span.file}: became shorter while it was read; fetch it again")
            done += copied
            advance(copied)


def _copy_in_kernel(span: Span, start: int, count: int, target: int, place: int) -> int:
    if not hasattr(os, "copy_file_range"):  # Linux has it
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.copy_file_range(span.descriptor, target, count, start, place)


def _copy_by_hand(span: Span, start: int, count: int, target: int, place: int) -> int:
    try:
        data = os.pread(span.descriptor, min(count, _BUFFER_BYTES), start)
    except OSError as error:
        raise UserError(f"{span.file}: cannot be read ({error.strerror})") from error
    return os.pwrite(target, data, place)


def leave_room(file: IO[bytes], shape: Iterable[int], dtype: torch.dtype) -> tuple[int, int]:
    """Write a tensor as `torch.save` does, with zeros in the place of its numbers, which take no disk yet.

    Args:
        file: takes it at its end; open for reading, too.
        shape: of the tensor.
        dtype: of the tensor.

    Returns:
        Bytes of it all, and where in the file the numbers belong.
    """
    offset = file.tell()
    with torch.serialization.skip_data():
        torch.save(torch.empty(tuple(shape), dtype=dtype), file)  # memory that nobody touches is none
    file.flush()
    length = file.tell() - offset
    return length, _numbers(file, offset, length)


def find_tensor(file: IO[bytes], offset: int, length: int) -> tuple[Tensor, int]:
    """What `torch.save` wrote of a tensor, without its numbers.

    Args:
        file: open for reading.
        offset: where it was written to.
        length: bytes of it all.

    Returns:
        A tensor of its shape, type and strides, with memory that is not filled; and where in the file its storage is.
    """
    with torch.serialization.skip_data():
        found = torch.load(_view(file, offset, length), map_location="cpu", weights_only=True)
    return found, _numbers(file, offset, length)


def _numbers(file: IO[bytes], offset: int, length: int) -> int:
    reader: Any = torch._C.PyTorchFileReader(_view(file, offset, length))  # which opens a file on its own in torch.load
    return offset + int(reader.get_record_offset("data/0"))


def _view(file: IO[bytes], offset: int, length: int) -> Any:
    return _create_file_view(file, offset, length)  # type: ignore[arg-type]  # a file that can seek is one
