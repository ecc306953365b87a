"""Pictures: exact pixels in every mode, upright, and a refusal for every bad file."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megamed.data.privacy import Pseudonyms
from megamed.data.readers import FileHeader, Refusal
from megamed.data.readers.image import ImageReader
from megamed.data.series import Series

PSEUDONYMS = Pseudonyms(b"a key for tests only")
READER = ImageReader()


def header_of(path: Path) -> FileHeader:
    assert READER.can_read(path, path.read_bytes()[:1024]), path.name
    return READER.metadata(path, PSEUDONYMS)


def read(path: Path) -> Series:
    grouping = READER.group([header_of(path)])
    assert grouping.refused == []
    series = READER.read(grouping.plans[0])
    info = series.info
    assert (info.shape, info.dtype) == (series.voxels_TSHW.shape, series.voxels_TSHW.dtype.name)
    assert series.voxels_TSHW.size <= grouping.plans[0].num_voxels
    assert (info.kind, info.plane, info.modality, info.shape[:2]) == ("image", "none", "OT", (1, 1))
    return series


def refusal(path: Path) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(path)
    assert path.name not in str(caught.value) and str(path.parent) not in str(caught.value) and caught.value.mend
    return caught.value


def save(path: Path, pixels, mode: str | None = None, **options) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


DRAW = np.random.default_rng(0)
GRAY = DRAW.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = DRAW.integers(0, 65536, (5, 7), dtype=np.uint16)
COLOUR = DRAW.integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = DRAW.integers(0, 256, (5, 7, 1), dtype=np.uint8)


@pytest.mark.parametrize(("name", "pixels", "options"), [
    *((f"a.{suffix}", GRAY, {}) for suffix in ("png", "tif", "bmp")),
    *((f"a.{suffix}", COLOUR, {}) for suffix in ("png", "tif", "bmp")),
    ("a.webp", COLOUR, {"lossless": True}),
    ("a.gif", GRAY, {}),
    ("a.png", DEEP, {}),
    ("a.tiff", DEEP, {}),
    ("a.tiff", DEEP, {"compression": "tiff_lzw"}),
    ("a.tiff", DEEP.astype(">u2"), {}),
    ("a.tiff", GRAY, {"tiffinfo": {262: 0}}),  # white is zero; Pillow writes it so and reads it back
    ("a.tiff", np.arange(-3, 3, dtype=np.int32).reshape(2, 3), {}),
    ("a.tiff", DRAW.normal(size=(4, 3)).astype(np.float32), {}),
    ("a.png", GRAY > 100, {}),
    ("no suffix", COLOUR, {"format": "PNG"}),
])
def test_pixels_are_those_of_the_file(tmp_path, name, pixels, options):
    series = read(save(tmp_path / name, pixels, **options))
    expected = pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels
    np.testing.assert_array_equal(series.voxels_TSHW[0, 0], expected)
    wanted = {"int32": "int16", "bool": "uint8"}.get(pixels.dtype.name, pixels.dtype.name)
    assert series.info.dtype == wanted and series.info.notes == () and not series.info.inverted
    if pixels.ndim == 2:
        assert series.info.percentiles["50.0"] == np.sort(expected.ravel())[-(-expected.size // 2) - 1]


def test_what_cannot_be_kept_as_it_is_becomes_rgb_or_grayscale(tmp_path):
    # A palette, with and without a transparent entry.
    palette = Image.fromarray(COLOUR).quantize(16)
    np.testing.assert_array_equal(read(save(tmp_path / "p.png", palette)).voxels_TSHW[0, 0], palette.convert("RGB"))
    seen = read(save(tmp_path / "t.png", palette, transparency=0)).voxels_TSHW[0, 0]
    hidden = np.asarray(palette) == 0
    assert (seen[hidden] == 0).all() and (seen[~hidden] == np.asarray(palette.convert("RGB"))[~hidden]).all()
    # What is transparent lies on black; compositing rounds to the nearest of 255 steps.
    for base in (COLOUR, np.repeat(GRAY[..., None], 3, 2)):
        layer = Image.fromarray(np.concatenate([base, ALPHA], 2))
        found = read(save(tmp_path / "a.png", layer)).voxels_TSHW[0, 0].astype(int)
        expected = np.rint(base.astype(float) * ALPHA / 255)
        assert np.abs(found - (expected if found.ndim == 3 else expected[..., 0])).max() <= 1
        assert found.ndim == (3 if base is COLOUR else 2)
    found = read(save(tmp_path / "la.png", np.concatenate([GRAY[..., None], ALPHA], 2))).voxels_TSHW[0, 0].astype(int)
    assert found.shape == (5, 7) and np.abs(found - np.rint(GRAY * (ALPHA[..., 0] / 255))).max() <= 1
    # Three equal channels are grayscale.
    series = read(save(tmp_path / "g.png", np.repeat(GRAY[..., None], 3, 2)))
    np.testing.assert_array_equal(series.voxels_TSHW[0, 0], GRAY)
    # Ink.
    ink = Image.fromarray(np.concatenate([COLOUR, np.zeros_like(ALPHA)], 2), "CMYK")
    np.testing.assert_array_equal(read(save(tmp_path / "c.tif", ink)).voxels_TSHW[0, 0], 255 - COLOUR)
    assert read(save(tmp_path / "c.jpg", ink)).info.shape == (1, 1, 5, 7, 3)
    # JPEG loses a little, and keeps what kind it is.
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    found = read(save(tmp_path / "s.jpg", smooth, quality=95)).voxels_TSHW[0, 0]
    assert found.shape == (64, 64) and np.abs(found.astype(int) - smooth).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.webp"])
def test_pictures_stand_upright(tmp_path, name, orientation):
    # Where row 0 and column 0 of what is stored are seen (EXIF 2.3, tag 274): a picture that is told by its corners.
    places = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "LT", 6: "RT", 7: "RB", 8: "LB"}[orientation]
    upright = np.kron([[200, 40], [120, 0]], np.ones((16, 24))).astype(np.uint8)
    stored = upright.T if places[0] in "LR" else upright
    if places[0] in "BR":
        stored = stored[::-1]
    if places[1] in "BR":
        stored = stored[:, ::-1]
    if name == "a.tif":
        options = {"tiffinfo": {274: orientation}}
    else:
        exif = Image.Exif()
        exif[274] = orientation
        options = {"exif": exif, **({"lossless": True} if name == "a.webp" else {})}
    found = read(save(tmp_path / name, np.ascontiguousarray(stored), **options)).voxels_TSHW[0, 0]
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= (4 if name == "a.jpg" else 0)


def test_a_deep_picture_in_which_white_is_zero_is_inverted(tmp_path):
    series = read(save(tmp_path / "a.tif", DEEP, tiffinfo={262: 0}))
    np.testing.assert_array_equal(series.voxels_TSHW[0, 0], 65535 - DEEP)
    assert series.info.inverted


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_colours_of_16_bits_are_reduced_and_that_is_said(tmp_path):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in COLOUR.astype(np.uint16) * 257)
    (tmp_path / "a.png").write_bytes(png(7, 5, 16, 2, rows))
    series = read(tmp_path / "a.png")
    np.testing.assert_array_equal(series.voxels_TSHW[0, 0], COLOUR)
    assert series.info.notes == ("colours of 16 bits were reduced to 8",)


def cut(path: Path, to: int) -> Path:
    path.write_bytes(path.read_bytes()[:to])
    return path


def content(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
SEVERAL = {"save_all": True, "append_images": [Image.fromarray(255 - GRAY)]}


@pytest.mark.parametrize(("code", "make"), [
    ("truncated", lambda folder: cut(save(folder / "a.png", NOISE), -1500)),
    ("truncated", lambda folder: cut(save(folder / "a.jpg", NOISE), -1500)),
    ("damaged", lambda folder: cut(save(folder / "a.png", NOISE), 20)),
    ("damaged", lambda folder: content(folder / "a.jpg", b"<html>not found</html>")),
    ("damaged", lambda folder: content(folder / "a.png", b"")),
    ("several-frames", lambda folder: save(folder / "a.tif", GRAY, **SEVERAL)),
    ("several-frames", lambda folder: save(folder / "a.gif", GRAY, **SEVERAL)),
    ("several-frames", lambda folder: save(folder / "a.png", GRAY, **SEVERAL)),
    ("several-frames", lambda folder: save(folder / "a.webp", GRAY, **SEVERAL)),
    # Bombs: what the header says is enough.
    ("too-large", lambda folder: content(folder / "a.png", png(12_000, 12_000, 8, 0, b""))),
    ("too-large", lambda folder: content(folder / "a.png", png(60_000, 60_000, 8, 2, b""))),
    ("not-finite", lambda folder: save(folder / "a.tif", np.full((4, 4), np.nan, np.float32))),
    ("unsupported-voxels", lambda folder: save(folder / "a.tif", Image.new("LAB", (4, 4)))),
])
def test_a_bad_picture_is_refused_for_what_is_wrong_with_it(tmp_path, code, make):
    assert refusal(make(tmp_path)).code == code


def test_a_camera_jpeg_with_a_preview_behind_it_is_one_picture(tmp_path):
    smooth = Image.fromarray(np.add.outer(np.arange(64), np.arange(48)).astype(np.uint8))
    save(tmp_path / "a.jpg", smooth, format="MPO", save_all=True, append_images=[smooth.resize((8, 8))])
    assert read(tmp_path / "a.jpg").info.shape == (1, 1, 64, 48)


def test_whose_it_is_and_what_of_exif_is_kept(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = "MUELLER"  # description, artist
    path = tmp_path / "files" / "p10" / "p10000032" / "s50414267" / "view.jpg"
    path.parent.mkdir(parents=True)
    series = read(save(path, GRAY, exif=exif))
    assert "MUELLER" not in json.dumps(series.info.to_json())
    identity = header_of(path).identity
    assert identity.patient == PSEUDONYMS.of("patient", "p10000032")
    assert identity.study == PSEUDONYMS.of("study", "s50414267") and identity.accession == ""
    other = tmp_path / "train" / "patient00001" / "study1" / "view.jpg"
    other.parent.mkdir(parents=True)
    other.write_bytes(path.read_bytes())
    assert header_of(other).identity.patient == PSEUDONYMS.of("patient", "patient00001")
    assert header_of(other).identity.study == PSEUDONYMS.of("study", "patient00001/study1")
    loose = save(tmp_path / "chest7.png", GRAY)
    assert header_of(loose).identity.patient == header_of(loose).identity.study == ""
    assert header_of(loose).identity.accession == PSEUDONYMS.of("accession", "chest7")
    # One content, one series.
    assert header_of(other).identity.series == identity.series != header_of(loose).identity.series
    grouping = READER.group([header_of(path), header_of(other), header_of(loose)])
    assert [plan.headers[0].path for plan in grouping.plans] == [loose, path]
    [(refused, why)] = grouping.refused
    assert refused.path == other and why.code == "duplicate"


def test_what_is_no_picture_is_left_to_others(tmp_path):
    dual = b"II*\0" + bytes(124) + b"DICM" + bytes(100)
    for name, head in (("a.dcm", dual), ("a.png", dual), ("bmi.csv", b"BMI,age,sex\n21,30,f\n" * 9), ("a", b"")):
        assert not READER.can_read(tmp_path / name, head)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp", "a.gif"])
def test_no_damage_does_more_than_refuse(tmp_path, name):
    stream = io.BytesIO()
    form = {"jpg": "JPEG", "tif": "TIFF"}.get(name[2:], name[2:].upper())
    Image.fromarray(COLOUR).save(stream, form, exif=Image.Exif())
    whole = stream.getvalue()
    draw = np.random.default_rng(1)
    num_refused = 0
    for _ in range(60):
        raw = bytearray(whole)
        for _ in range(int(draw.integers(1, 4))):
            raw[int(draw.integers(len(raw)))] = int(draw.integers(256))
        raw = raw if draw.random() < 0.7 else raw[: int(draw.integers(len(raw)))]
        (tmp_path / name).write_bytes(raw)
        try:
            read(tmp_path / name)
        except Refusal:
            num_refused += 1
    assert num_refused > 5
