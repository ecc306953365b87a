"""Pictures: PNG, JPEG, TIFF, BMP, WebP and GIF, by Pillow. They come as they are, text burnt into them included.

A picture is named by its content (`paths.fingerprint`), patient and study by its path where it is laid out as `paths`
knows; elsewhere they are empty, and the file's name without its suffix stands for the accession number. No key of
EXIF is looked at but the orientation.

What becomes of the pixels: grayscale stays what it is, with 16 bits where it has them; a palette is looked up; what is
transparent lies on black; other colour spaces become RGB; a colour picture whose three channels are equal is kept as
grayscale. Several frames in one file (an animation, pages, a microscope's pyramid) are refused: nothing in the file
says whether they follow one another in time or in space.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from megamed.data.privacy import Pseudonyms
from megamed.data.readers.base import FileHeader, Grouping, Identity, Refusal, SeriesPlan
from megamed.data.readers.paths import fingerprint, patient_and_study, without_suffix
from megamed.data.series import Series, SeriesInfo
from megamed.data.voxels import percentiles, to_smallest

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
_NAMES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif")
_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"GIF87a", b"GIF89a")
# Sizes of the header behind the first 14 bytes, in the versions of BMP.
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
# A mammogram has 30 million.
_MOST_PIXELS = 1 << 27

_GRAY = ("1", "L", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_DEEP = _GRAY[2:]
_WHITE_IS_ZERO, _PHOTOMETRIC = 0, 262
_ORIENTATION = 0x0112
# What undoes an EXIF orientation.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels.swapaxes(0, 1), 2),
    8: lambda pixels: np.rot90(pixels, 1),
}

_COPY = "copy or convert it again"


class ImageReader:
    """See `megamed.data.readers.base.Reader`."""

    name = "image"

    def can_read(self, path: Path, head: bytes) -> bool:
        """By its first bytes, or by a name that promises a picture."""
        if head[128:132] == b"DICM":  # its preamble may be that of a TIFF
            return False
        is_bmp = head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS
        is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
        return head.startswith(_STARTS) or is_bmp or is_webp or path.name.lower().endswith(_NAMES)

    def metadata(self, path: Path, pseudonyms: Pseudonyms) -> FileHeader:
        """Read a picture's header, no pixels."""
        with _opened(path) as image:
            num_voxels = image.width * image.height * (1 if image.mode in _GRAY else 3)
        patient, study = patient_and_study(path)
        identity = Identity(
            pseudonyms.of("patient", patient), pseudonyms.of("study", study),
            pseudonyms.of("series", f"image {fingerprint([path])}"),
            "" if study else pseudonyms.of("accession", without_suffix(path)),
        )
        return FileHeader(path, self.name, identity, {"num_voxels": num_voxels})

    def group(self, headers: Sequence[FileHeader]) -> Grouping:
        """One series a picture. One that is there twice is one series; the other copy is refused."""
        grouping = Grouping([], [])
        planned = set()
        for header in sorted(headers, key=lambda header: header.path):
            if header.identity.series in planned:
                refusal = Refusal("duplicate", "the same picture is there under another name", "keep one of them")
                grouping.refused.append((header, refusal))
                continue
            planned.add(header.identity.series)
            plan = SeriesPlan(self.name, header.identity, "", (header,), int(header.facts["num_voxels"]))
            grouping.plans.append(plan)
        return grouping

    def read(self, plan: SeriesPlan) -> Series:
        """Decode, and turn upright."""
        notes = list(plan.notes)
        with _opened(plan.headers[0].path) as image:
            if ";16" in str(getattr(image, "tile", "")) and image.mode not in _GRAY:
                notes.append("colours of 16 bits were reduced to 8")
            with _faults():
                pixels, orientation = _pixels(image)
                is_inverted = image.mode in _DEEP and _white_is_zero(image)
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise Refusal("not-finite", "it has pixels that are not finite (NaN or infinite)", "replace them")
        if is_inverted:
            pixels = np.iinfo(pixels.dtype).max - pixels
        upright = _UPRIGHT.get(orientation, np.asarray)(pixels)
        voxels_TSHW = to_smallest(upright)[None, None]
        info = SeriesInfo(
            shape=voxels_TSHW.shape, dtype=voxels_TSHW.dtype.name, inverted=is_inverted,
            percentiles=percentiles(voxels_TSHW), notes=tuple(notes),
        )
        return Series(voxels_TSHW, info)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture, its header read and within limits.

    Raises:
        Refusal: it is not one, has several frames, or is too large.
    """
    with path.open("rb") as file:
        with _faults():
            image = Image.open(file, formats=_FORMATS)
            # A camera's JPEG may carry a preview behind the picture.
            has_frames = image.format != "MPO" and getattr(image, "is_animated", False)
        if has_frames:
            raise Refusal("several-frames", "it has several frames or pages", "save each as a picture of its own")
        if image.width * image.height > _MOST_PIXELS:
            raise Refusal("too-large", "it has more than 2^27 pixels", "scale it down, or cut it into tiles")
        yield image


@contextmanager
def _faults() -> Iterator[None]:
    """What Pillow raises for a damaged picture, as a refusal."""
    try:
        with warnings.catch_warnings():
            # Of pixels beyond its limit Pillow warns, and beyond twice that it raises; the one here lies between.
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise Refusal("too-large", "it has more than 2^27 pixels", "scale it down, or cut it into tiles") from error
    except (MemoryError, Refusal):
        raise
    except Image.UnidentifiedImageError as error:
        raise Refusal("damaged", "it is named or begins like a picture, and is not one", _COPY) from error
    except Exception as error:  # Pillow has no base of its own for what it comes upon in damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, EOFError) or "truncated" in str(error):
            raise Refusal("truncated", "it is cut short", _COPY) from error
        raise Refusal("damaged", "its content is damaged", _COPY) from error


def _pixels(image: Image.Image) -> tuple[np.ndarray, int]:
    """Pixels [H, W] or [H, W, 3] as they are stored, and the EXIF orientation that is left to be undone."""
    image.load()
    orientation = 1
    with suppress(Exception):  # of a damaged EXIF block, of which a viewer would say nothing
        # After loading: TIFFs are upright then, and say so.
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    if image.mode in _DEEP:
        return np.asarray(image), orientation
    if image.mode == "LAB":
        raise Refusal("unsupported-voxels", "its colours are CIELAB", "save it as RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
    elif image.mode in _GRAY:
        return np.asarray(image.convert("L")), orientation
    pixels = np.asarray(image.convert("RGB"))
    is_gray = (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0] if is_gray else pixels, orientation


def _white_is_zero(image: Image.Image) -> bool:
    """Of a TIFF of 16 bits, which Pillow inverts only when it has 8."""
    tags = getattr(image, "tag_v2", {})
    return image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
