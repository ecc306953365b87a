"""Pictures and films as users give them: what their headers say, and their pixels.

They are decoded on the CPU, by Pillow and PyAV, before DALI sees them: so every kind of picture works (DALI's own
decoder fails on 16-bit JPEG 2000), and pixels do not depend on which loader makes the frame.

Shape suffixes: C channels (1 grey, 3 colour), H and W pixels.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from megamed.utils import UserError
from megamed.utils.optional import require

ARRAY = ".npy"
FILMS = (".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
PICTURES = (".png", ".jpg", ".jpeg", ".jp2", ".bmp", ".tif", ".tiff", ".webp", ".gif")

# Pillow's modes of one value a pixel, and what holds those values; all else is shown as RGB.
_GREY = {"1": "uint8", "L": "uint8", "I;16": "uint16", "I;16L": "uint16", "I;16B": "uint16", "I": "int32",
         "F": "float32"}
_ORIENTATION = 0x0112  # of Exif
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class PictureHeader:
    """What is known of a picture file without its pixels.

    Attributes:
        height, width: pixels, as shown.
        pages: pictures in the file.
        is_8bit: whether values are from 0 to 255.
    """

    height: int
    width: int
    pages: int
    is_8bit: bool


def picture_header(path: str) -> PictureHeader:
    """Read a picture's header.

    Raises:
        UserError: there is no such file, or it is no picture that Pillow reads.
    """
    with _opened(path) as image:
        width, height = image.size
        if image.getexif().get(_ORIENTATION) in _SIDEWAYS:
            width, height = height, width
        return PictureHeader(height, width, getattr(image, "n_frames", 1), _GREY.get(image.mode, "uint8") == "uint8")


def page_times(path: str, pages: int) -> list[float] | None:
    """When each page of an animation begins, seconds; None where pages have no durations."""
    times, now = [], 0.0
    with _opened(path) as image:
        for page in range(pages):
            image.seek(page)
            duration = image.info.get("duration")
            if not duration:
                return None
            times.append(now)
            now += duration / 1000
    return times


def read_picture(path: str, page: int) -> np.ndarray:
    """Pixels of one page, turned as its Exif orientation says.

    Returns:
        [C, H, W], uint8, uint16 or float32.

    Raises:
        UserError: as `picture_header`, or the file is damaged.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        image.seek(page)
        shown: Any = ImageOps.exif_transpose(image)
        if shown.mode not in _GREY:
            shown = shown if shown.mode == "RGB" else shown.convert("RGB")
            return np.stack([np.asarray(band) for band in shown.split()])
        if shown.mode == "1":
            shown = shown.convert("L")
        values_HW = np.asarray(shown)
    if values_HW.dtype == np.int32:
        fits = 0 <= values_HW.min() and values_HW.max() <= np.iinfo(np.uint16).max
        values_HW = values_HW.astype(np.uint16 if fits else np.float32)
    return np.ascontiguousarray(values_HW, dtype=values_HW.dtype.newbyteorder("="))[None]


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    from PIL import Image

    mend = "give a picture that Pillow reads (PNG, JPEG, TIFF, ...)"
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such picture; correct its path") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error}); {mend}") from error


@dataclass(frozen=True)
class FilmHeader:
    """What is known of a film without its pictures: how many, and how many a second."""

    num_frames: int
    rate: float


def film_header(path: str) -> FilmHeader:
    """Read a film's header.

    Raises:
        UserError: PyAV is not installed, or it cannot read the file.
    """
    with _film(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or Fraction(25)
        num_frames = stream.frames
        if not num_frames:  # some containers do not say: by the film's length
            known = stream.duration and stream.duration * stream.time_base
            num_frames = int((known or Fraction(container.duration or 0, 10**6)) * rate)
        if num_frames < 1:
            raise UserError(f"{path} has no pictures; give another film")
        return FilmHeader(num_frames, float(rate))


@contextmanager
def _film(path: str) -> Iterator[Any]:
    av = require("av", f"The film {path}", "pip install 'megamed[video]'")
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no pictures; give a film")
            yield container
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path} cannot be read as a film ({error}); give a film that FFmpeg reads") from error


class Film:
    """Pictures of a film by number, decoded from its beginning on; what is asked for in order is decoded once.

    A picture is always the one that decoding from the beginning gives, so it does not depend on what was read before.
    """

    def __init__(self, path: str):
        self.path = path
        self._lock = threading.Lock()
        self._wanted: Counter[int] = Counter()
        self._kept: dict[int, np.ndarray] = {}
        self._pictures: Iterator[np.ndarray] | None = None
        self._next = 0
        self._last: np.ndarray | None = None

    def want(self, indices: Sequence[int]) -> None:
        """Say what will be read soon; pictures passed on the way to another are kept for that."""
        with self._lock:
            self._wanted.update(indices)

    def read(self, index: int) -> np.ndarray:
        """Picture number `index`, uint8 [3, H, W]; the last one where the film ends before it.

        Raises:
            UserError: the film cannot be decoded.
        """
        with self._lock:
            picture = self._kept[index] if index in self._kept else self._decode_to(index)
            self._wanted[index] -= 1
            if self._wanted[index] <= 0:
                del self._wanted[index]
                self._kept.pop(index, None)
            return picture

    def _decode_to(self, index: int) -> np.ndarray:
        if self._pictures is None or index < self._next - 1:
            self._pictures, self._next, self._last = self._decode(), 0, None
        while self._next <= index:
            following = next(self._pictures, None)
            if following is None:  # the header promised more than there is
                break
            self._last = following
            if self._wanted[self._next] > 0:
                self._kept[self._next] = following
            self._next += 1
        if self._last is None:
            raise UserError(f"{self.path} has no pictures; give another film")
        return self._last

    def _decode(self) -> Iterator[np.ndarray]:
        with _film(self.path) as container:
            for frame in container.decode(video=0):
                yield np.ascontiguousarray(frame.to_ndarray(format="rgb24").transpose(2, 0, 1))


def is_film(path: str) -> bool:
    """Whether a file is a film, by its name."""
    return Path(path).suffix.lower() in FILMS
