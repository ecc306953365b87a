"""What is read of a frame: its voxels as they are stored, cut and tiled, and nothing more.

Shape suffixes: T volumes, S slices, C channels, H and W pixels.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from megamed.data.frames.pictures import ARRAY, Film, is_film, read_picture
from megamed.data.frames.spec import MOSAIC, StudyFrame, Window
from megamed.utils import UserError

T = TypeVar("T")

# Open arrays and films, and decoded pictures, that are kept for the frames that follow.
_OPEN_ARRAYS, _OPEN_FILMS, _PICTURES = 64, 4, 4

# NumPy parses headers with `ast.literal_eval`, which CPython 3.11 does not allow two threads at a time: once in a great
# while it raises SystemError (https://github.com/python/cpython/issues/106905).
_parsing = threading.Lock()

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class RawFrame:
    """A frame before its windows.

    Attributes:
        voxels_CHW: as stored, one channel where all three show the same slice, three otherwise: an array, or a tensor
            on the device where they were read straight into its memory.
        windows: of each plane that is resized: one where all channels are the same picture, three otherwise.
        box: what of `voxels_CHW` becomes the frame: top, left, height, width in pixels.
    """

    voxels_CHW: Any
    windows: tuple[Window, ...]
    box: Box


@dataclass(frozen=True)
class Stretch:
    """Where a frame's voxels lie in its file, in one piece.

    Attributes:
        path: the file.
        offset: of the first byte.
        shape: C, H, W.
        dtype: of the voxels.
    """

    path: str
    offset: int
    shape: tuple[int, int, int]
    dtype: np.dtype


class ArrayFile:
    """A `.npy` file [T, S, H, W] or [T, S, H, W, 3], slices of which are read without the rest.

    Also [T, H, W], and uint8 [T, H, W, 3]: pictures in time. Reads go by position and share no state, so that any
    thread may read; unlike a mapped file, one on a network file system is read in one request a slice.

    Raises:
        UserError: there is no such file, or it is no array of that kind.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            self._file = open(path, "rb")
            version = np.lib.format.read_magic(self._file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            with _parsing:
                shape, fortran_order, self.dtype = read(self._file)
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file; ingest its series again") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as an array ({error}); ingest its series again") from error
        self._offset = self._file.tell()
        if len(shape) == 3:
            shape = (shape[0], 1, *shape[1:])
        elif len(shape) == 4 and shape[3] == 3 and self.dtype == np.uint8:
            shape = (shape[0], 1, *shape[1:])
        if len(shape) not in (4, 5) or fortran_order or (len(shape) == 5 and shape[4] != 3):
            raise UserError(f"{path} has shape {shape}; write it as [T, S, H, W] or [T, S, H, W, 3] in C order")
        self.shape: tuple[int, ...] = shape

    @property
    def is_colour(self) -> bool:
        return len(self.shape) == 5

    def stretch(self, volume: int, first: int, count: int) -> Stretch:
        """Where consecutive slices lie.

        Raises:
            UserError: the array does not have them.
        """
        num_volumes, num_slices = self.shape[:2]
        if not (0 <= volume < num_volumes and 0 <= first and first + count <= num_slices):
            raise UserError(f"{self.path} has {num_volumes} volumes of {num_slices} slices; slice {first} of volume "
                            f"{volume} is asked for: plan the frames again, from the series as it is now")
        slice_bytes = int(np.prod(self.shape[2:])) * self.dtype.itemsize
        offset = self._offset + (volume * num_slices + first) * slice_bytes
        height, width = self.shape[2:4]
        return Stretch(self.path, offset, (count, height, width), self.dtype)

    def read(self, volume: int, first: int, count: int = 1) -> np.ndarray:
        """Consecutive slices of a volume, [count, H, W] or [count, H, W, 3].

        Raises:
            UserError: the array does not have them, or the file is cut short.
        """
        offset = self.stretch(volume, first, count).offset
        values = np.empty((count, *self.shape[2:]), self.dtype)
        view, done = values.reshape(-1).view(np.uint8).data, 0
        while done < values.nbytes:
            num_bytes = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if num_bytes == 0:
                raise UserError(f"{self.path} is cut short; ingest its series again")
            done += num_bytes
        return values.astype(self.dtype.newbyteorder("="), copy=False)


class RawReader:
    """Reads raw frames; any thread may. What several frames share is opened and decoded once, and then let go."""

    def __init__(self) -> None:
        self._arrays: Cache[ArrayFile] = Cache(_OPEN_ARRAYS)
        self._films: Cache[Film] = Cache(_OPEN_FILMS)
        self._pictures: Cache[np.ndarray] = Cache(_PICTURES)

    def expect(self, frames: Iterable[StudyFrame]) -> None:
        """Say which frames will be read, so that a film is decoded once for all of them."""
        wanted: dict[str, list[int]] = {}
        for frame in frames:
            if is_film(frame.path):
                wanted.setdefault(frame.path, []).append(frame.volume)
        for path, indices in wanted.items():
            self._film(path).want(indices)

    def stretch(self, frame: StudyFrame) -> Stretch | None:
        """Where a frame's voxels lie in one piece that is the frame as it is; None where they do not."""
        if not frame.path.endswith(ARRAY) or frame.slices[0] == MOSAIC or frame.box is not None:
            return None
        array = self._array(frame.path)
        first, count = frame.slices[0], len(set(frame.slices))
        in_one_piece = count == 1 or frame.slices == (first, first + 1, first + 2)
        needs_padding = frame.fit == "pad" and array.shape[2] != array.shape[3]
        if array.is_colour or not in_one_piece or needs_padding:
            return None
        return array.stretch(frame.volume, first, count)

    def read(self, frame: StudyFrame, margin: Callable[[float], int]) -> RawFrame:
        """A frame's voxels.

        Args:
            frame: which.
            margin: pixels beyond a box that its resizing takes in, by the box's edge in pixels.

        Raises:
            UserError: a file is missing, damaged, or does not have the frame.
        """
        if frame.box is None:
            voxels_CHW = self._voxels(frame)
        else:  # several tiles are cut out of one picture
            key = (frame.path, frame.volume, frame.slices)
            voxels_CHW = self._pictures.get(key, lambda: self._voxels(frame))
        box = frame.box
        if frame.fit == "pad":
            voxels_CHW, box = squared(voxels_CHW if box is None else _whole_pixels(voxels_CHW, box)), None
        elif box is not None:
            voxels_CHW, box = _cropped(voxels_CHW, box, margin)
        return raw_frame(frame, voxels_CHW, box)

    def _voxels(self, frame: StudyFrame) -> np.ndarray:
        """All of a frame's picture, [C, H, W]."""
        if is_film(frame.path):
            return self._film(frame.path).read(frame.volume)
        if not frame.path.endswith(ARRAY):
            return read_picture(frame.path, frame.volume)
        array = self._array(frame.path)
        low, middle, high = frame.slices
        if low == MOSAIC:
            return mosaic(array.read(frame.volume, 0, array.shape[1]))[None]
        if array.is_colour:
            return np.ascontiguousarray(array.read(frame.volume, low)[0].transpose(2, 0, 1))
        if low == middle == high:
            return array.read(frame.volume, low)
        if low + 2 == middle + 1 == high:
            return array.read(frame.volume, low, 3)
        return np.concatenate([array.read(frame.volume, index) for index in frame.slices])

    def _array(self, path: str) -> ArrayFile:
        return self._arrays.get(path, lambda: ArrayFile(path))

    def _film(self, path: str) -> Film:
        return self._films.get(path, lambda: Film(path))


def raw_frame(frame: StudyFrame, voxels_CHW: Any, box: Box | None) -> RawFrame:
    """What was read of a frame; without a box, all of it is shown."""
    channels, height, width = voxels_CHW.shape
    is_grey = channels == 1 and len(set(frame.windows)) == 1
    windows = frame.windows[:1] if is_grey else frame.windows
    return RawFrame(voxels_CHW, windows, box or (0.0, 0.0, float(height), float(width)))


class Cache(Generic[T]):
    """The last few things made, by key; made once where several threads ask at the same time."""

    def __init__(self, size: int):
        self._size = size
        self._lock = threading.Lock()
        self._made: OrderedDict[Hashable, Future[T]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            future = self._made.get(key)
            if future is None:
                mine = self._made[key] = Future()
                while len(self._made) > self._size:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
        if future is not None:
            return future.result()
        try:
            mine.set_result(make())
        except BaseException as error:
            with self._lock:  # the file may be mended by the next time
                if self._made.get(key) is mine:
                    del self._made[key]
            mine.set_exception(error)
            raise
        return mine.result()


def mosaic(volume_SHW: np.ndarray) -> np.ndarray:
    """The slices of a volume, row by row from the top left, in a square as small as can be.

    What no slice covers has the smallest value that the type has, which every window makes 0.

    Returns:
        [H, W] with H equal to W.
    """
    num_slices, height, width = volume_SHW.shape
    columns = min(range(1, num_slices + 1), key=lambda n: max(n * width, -(-num_slices // n) * height))
    rows = -(-num_slices // columns)
    tiled_HW = np.full((rows * height, columns * width), _smallest(volume_SHW.dtype), volume_SHW.dtype)
    for index, slice_HW in enumerate(volume_SHW):
        top, left = index // columns * height, index % columns * width
        tiled_HW[top : top + height, left : left + width] = slice_HW
    return squared(tiled_HW[None])[0]


def squared(voxels_CHW: np.ndarray) -> np.ndarray:
    """Padded to a square, evenly, with the smallest value that the type has."""
    channels, height, width = voxels_CHW.shape
    if height == width:
        return voxels_CHW
    edge = max(height, width)
    square = np.full((channels, edge, edge), _smallest(voxels_CHW.dtype), voxels_CHW.dtype)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[:, top : top + height, left : left + width] = voxels_CHW
    return square


def _smallest(dtype: np.dtype) -> float:
    return float(np.finfo(dtype).min) if dtype.kind == "f" else int(np.iinfo(dtype).min)


def _whole_pixels(voxels_CHW: np.ndarray, box: Box) -> np.ndarray:
    """A box, its edges moved outwards to whole pixels."""
    top, left, height, width = box
    rows = slice(max(0, math.floor(top)), math.ceil(top + height))
    return np.ascontiguousarray(voxels_CHW[:, rows, max(0, math.floor(left)) : math.ceil(left + width)])


def _cropped(voxels_CHW: np.ndarray, box: Box, margin: Callable[[float], int]) -> tuple[np.ndarray, Box]:
    """What the resizing of a box takes in, and where the box lies in it."""
    top, left, height, width = box
    rows, columns = voxels_CHW.shape[1:]
    first_row, last_row = _reach(top, height, rows, margin)
    first_column, last_column = _reach(left, width, columns, margin)
    cropped = voxels_CHW[:, first_row:last_row, first_column:last_column]
    return np.ascontiguousarray(cropped), (top - first_row, left - first_column, height, width)


def _reach(start: float, length: float, size: int, margin: Callable[[float], int]) -> tuple[int, int]:
    beyond = margin(length)
    return max(0, math.floor(start) - beyond), min(size, math.ceil(start + length) + beyond)
