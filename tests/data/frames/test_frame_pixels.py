"""Pixels: the reference against torch and Pillow, DALI against the reference, and what they must not depend on."""

import importlib
import logging
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from megamed.data.frames import MOSAIC, FramesConfig, LoaderConfig, StudyFrame
from megamed.data.frames import loader as loaders
from megamed.data.frames.config import AugmentConfig
from megamed.data.frames.loader import build_loader, num_threads
from megamed.data.frames.plan import plan_image
from megamed.data.frames.raw import mosaic
from megamed.data.frames.reference import resize_matrix
from megamed.data.frames.spec import IMAGENET_MEAN, IMAGENET_STD
from megamed.utils import UserError

CT = ((-1350.0, 150.0), (-125.0, 225.0), (-500.0, 1300.0))
BYTE = ((0.0, 255.0),) * 3
SIZE = 56

# On white noise from black to white, in units of the normalised frame (black to white is 4.4):
# both sides place pixels in float32, to some 1e-5 of one;
LINEAR = 3e-4
# DALI interpolates its cubic kernel in a table of steps of 1/32: each weight is off by up to 5 / 32^2 / 8 = 6e-4;
CUBIC = 1.2e-2
# DALI's warp on a CPU adds up places along a row in float32: off by up to 0.005 pixels at its end.
VARIED = 3e-2


def shown(frames_NCHW):
    """Back to 0 to 1."""
    return frames_NCHW * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


def make(config=None, size=SIZE, **loader):
    return build_loader(config or FramesConfig(), LoaderConfig(**{"backend": "numpy", **loader}), size)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> list[StudyFrame]:
    """Frames of all types and kinds, in no order."""
    folder, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    found = []
    for dtype in ("int16", "uint16", "uint8", "float32"):
        for height, width in ((64, 64), (SIZE, SIZE), (21, 34), (301, 300), (150, 40)):
            if dtype == "float32":
                values = rng.normal(0, 500, (2, 5, height, width)).astype(np.float32)
            else:
                low, high = (-1500, 3000) if dtype == "int16" else (0, min(3000, np.iinfo(dtype).max))
                values = rng.integers(low, high, (2, 5, height, width)).astype(dtype)
            path, windows = str(folder / f"{dtype}{height}.npy"), BYTE if dtype == "uint8" else CT
            np.save(path, values)
            found += [
                StudyFrame(path, 1, (2, 2, 2), windows),
                StudyFrame(path, 0, (2, 2, 2), windows, fit="stretch"),
                StudyFrame(path, 0, (1, 2, 3), (windows[0],) * 3),
                StudyFrame(path, 0, (0, 0, 1), (windows[1],) * 3),
                StudyFrame(path, 0, (4, 4, 4), (windows[1],) * 3),
                StudyFrame(path, 1, (MOSAIC,) * 3, (windows[0],) * 3),
                StudyFrame(path, 0, (1, 1, 1), windows, (3.3, 4.4, 11.7, 15.2), "stretch"),
                StudyFrame(path, 0, (1, 1, 1), windows, (0.0, width - 9.5, height - 2.5, 9.5), "stretch"),
                StudyFrame(path, 0, (1, 1, 1), windows, (2.0, 3.5, 11.0, 12.0), "pad"),
            ]
    np.save(folder / "colour.npy", rng.integers(0, 255, (1, 2, 61, 93, 3)).astype(np.uint8))
    found += [StudyFrame(str(folder / "colour.npy"), 0, (1, 1, 1), BYTE, fit=fit) for fit in ("pad", "stretch")]
    for name, picture in {
        "rgb.png": Image.fromarray(rng.integers(0, 255, (61, 93, 3)).astype(np.uint8)),
        "grey.png": Image.fromarray(rng.integers(0, 255, (93, 61)).astype(np.uint8)),
        "deep.png": Image.fromarray(rng.integers(0, 60000, (93, 61)).astype(np.uint16)),
    }.items():
        picture.save(folder / name)
        found += plan_image(folder / name, FramesConfig(max_tiles=4), SIZE).frames
    return [found[i] for i in rng.permutation(len(found))]


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("varied", [False, True])
def test_dali_makes_what_the_reference_says(frames, interpolation, varied):
    augment = AugmentConfig(enabled=varied, rotate_deg=20.0, noise=0.1)
    config = FramesConfig(interpolation=interpolation, augment=augment)
    seeds = [i % 5 if i % 7 else None for i in range(len(frames))] if varied else None
    wanted = make(config, threads=1).load(frames, seeds)
    found = make(config, backend="dali", batch=7).load(frames, seeds)
    assert found.shape == (len(frames), 3, SIZE, SIZE) and found.dtype == torch.float32
    tolerance = {"linear": LINEAR, "cubic": CUBIC}[interpolation]
    torch.testing.assert_close(found, wanted, atol=VARIED if varied else tolerance, rtol=0)
    if varied:
        plain = make(config).load(frames)
        moved = (plain - wanted).abs().amax((1, 2, 3)) > 0.05
        assert moved.tolist() == [seed is not None for seed in seeds]


@pytest.mark.parametrize("backend", ["numpy", "dali"])
def test_a_frame_depends_on_nothing_but_itself(frames, backend):
    config = FramesConfig(augment=AugmentConfig(enabled=True))
    seeds = list(range(len(frames)))
    all_at_once = make(config, backend=backend).load(frames, seeds)
    loader = make(config, backend=backend, batch=3, threads=1)
    assert loader.load([]).shape == (0, 3, SIZE, SIZE)
    for few in ([5], [9, 2, 2, 40], list(range(30, 41))):
        assert torch.equal(loader.load([frames[i] for i in few], [seeds[i] for i in few]), all_at_once[few])
    made: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda n=n: made.update({n: loader.load(frames[n : n + 8], seeds[n : n + 8])}))
               for n in (0, 8, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(part, all_at_once[n : n + 8]) for n, part in made.items()) and len(made) == 3


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("height", [40, 56, 97, 300])
def test_resizing_is_torchs_but_at_the_edges(tmp_path, interpolation, height):
    values = np.random.default_rng(1).integers(-1500, 2000, (1, 1, height, height)).astype(np.int16)
    np.save(tmp_path / "v.npy", values)
    frame = StudyFrame(str(tmp_path / "v.npy"), 0, (0, 0, 0), CT)
    found = shown(make(FramesConfig(interpolation=interpolation)).load([frame]))[0]
    planes = [((torch.from_numpy(values[0].astype(np.float32)) - low) / (high - low)).clamp(0, 1) for low, high in CT]
    mode = {"linear": "bilinear", "cubic": "bicubic"}[interpolation]
    wanted = F.interpolate(torch.stack(planes, 1), (SIZE, SIZE), mode=mode, antialias=True)[0].clamp(0, 1)
    # A kernel reaches 2 pixels of the output far, and 2 of the input, which are 2.8 of the output, where it is smaller.
    inner = (..., slice(3, -3), slice(3, -3))
    # Weights in float32 there, in float64 here.
    torch.testing.assert_close(found[inner], wanted[inner], atol=1e-4, rtol=0)
    # At the edge torch leaves out what is beyond, here and in DALI the edge goes on: noise shows it, a flank would not.
    assert (found - wanted).abs().max() < 0.35


def test_the_resize_matrix():
    # A box that is the output's size, half a pixel off: the mean of two neighbours.
    matrix = resize_matrix(6, 1.5, 3.0, 3, "linear")
    np.testing.assert_allclose(matrix[0], [0, 0.5, 0.5, 0, 0, 0], atol=1e-12)
    for interpolation in ("linear", "cubic"):
        for num_in, num_out in ((5, 9), (300, 10), (7, 7), (9, 5)):
            matrix = resize_matrix(num_in, 0, num_in, num_out, interpolation)
            np.testing.assert_allclose(matrix.sum(1), 1)
            if num_out != 5:  # a ramp stays the same ramp, but where a kernel's samples are of uneven number
                wanted = (np.arange(num_out) + 0.5) * num_in / num_out - 0.5
                np.testing.assert_allclose((matrix @ np.arange(num_in))[3:-3], wanted[3:-3], atol=1e-9)


@pytest.mark.parametrize("size", [(448, 448), (300, 200), (1000, 700), (1344, 500), (97, 640)])
def test_tiles_are_those_of_transformers(tmp_path, size):
    module = importlib.import_module("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    processor = module.GotOcr2ImageProcessorPil(
        crop_to_patches=True, size={"height": 448, "width": 448}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    # Structures of a few pixels, as pictures have, and some noise.
    rng, (height, width) = np.random.default_rng(2), size
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 9 + i) * np.cos(columns / 7 - i) for i in range(3)]
    values = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))
    picture = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    picture.save(tmp_path / "p.png")
    wanted = torch.tensor(np.stack(processor(picture)["pixel_values"]))
    planned = plan_image(tmp_path / "p.png", FramesConfig())
    found = make(size=448).load(planned.frames)
    assert found.shape == wanted.shape
    grey_levels = (shown(found) - shown(wanted)).abs() * 255
    # Pillow rounds to whole grey levels after each axis; at the picture's edges it leaves out what is beyond.
    assert grey_levels.median() < 0.4 and grey_levels[..., 8:-8, 8:-8].max() < 1.5 and grey_levels.max() < 5
    # With Pillow's own rounding nothing is left but that of fp32 sums and products.
    same = make(FramesConfig(interpolation="pillow"), size=448).load(planned.frames)
    torch.testing.assert_close(same, wanted.to(same.dtype), atol=2e-6, rtol=0)


def test_pillow_is_for_pictures_of_8_bits_alone(frames):
    arrays = [frame for frame in frames if frame.path.endswith(".npy")]
    others = [frame for frame in arrays if np.load(frame.path, mmap_mode="r").dtype != np.uint8]
    assert len(others) > 10
    found = [make(FramesConfig(interpolation=name)).load(others) for name in ("pillow", "cubic")]
    # Of the whole slice instead of a part of it: sums of other blocks, in fp32.
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="interpolation=pillow is nothing that DALI does; set data.loader"):
        make(FramesConfig(interpolation="pillow"), backend="dali")


def test_windows_come_before_resizing_and_padding_is_dark(tmp_path):
    values = np.zeros((1, 1, 4, 2), np.int16)
    values[..., 0] = 3000  # metal beside water
    np.save(tmp_path / "v.npy", values)
    frame = StudyFrame(str(tmp_path / "v.npy"), 0, (0, 0, 0), ((-100.0, 100.0), (0.0, 3000.0), (-1000.0, -500.0)))
    found = shown(make(FramesConfig(interpolation="linear"), size=4).load([frame]))[0]
    # Columns: padding, metal, water, padding.
    wanted = [[0, 1, 0.5, 0], [0, 1, 0, 0], [0, 1, 1, 0]]
    torch.testing.assert_close(found[:, 0], torch.tensor(wanted), atol=1e-5, rtol=0)
    halved = shown(make(FramesConfig(interpolation="linear"), size=1).load([replace(frame, fit="stretch")]))[0]
    # 3000 counts as 100 through the first window: the mean is 0.75, not the 1 that (3000 + 0) / 2 would be.
    torch.testing.assert_close(halved[:, 0, 0], torch.tensor([0.75, 0.5, 1.0]), atol=1e-5, rtol=0)


def test_mosaic_lies_row_by_row_in_the_smallest_square():
    volume = np.arange(5, dtype=np.int16)[:, None, None] + np.ones((5, 2, 3), np.int16)
    tiled = mosaic(volume)
    assert tiled.shape == (6, 6)
    assert tiled[::2, ::3].tolist() == [[1, 2], [3, 4], [5, -32768]]


def test_adjacent_slices_and_box_are_where_they_should_be(tmp_path):
    values = np.arange(5 * 8 * 8, dtype=np.uint16).reshape(1, 5, 8, 8)
    np.save(tmp_path / "v.npy", values)
    window = ((0.0, 1000.0),) * 3
    loader = make(FramesConfig(interpolation="linear"), size=4)
    frame = StudyFrame(str(tmp_path / "v.npy"), 0, (0, 1, 2), window, (4.0, 2.0, 4.0, 4.0), "stretch")
    found = shown(loader.load([frame, replace(frame, slices=(4, 4, 4), fit="pad")])) * 1000
    np.testing.assert_allclose(found[0], values[0, :3, 4:8, 2:6], atol=1e-3)
    np.testing.assert_allclose(found[1], np.stack([values[0, 4, 4:8, 2:6]] * 3), atol=1e-3)


def test_faults_are_lines_and_the_loader_goes_on(tmp_path):
    good = np.full((1, 2, 8, 8), 7, np.int16)
    for name, values in {"good": good, "fortran": np.asfortranarray(good), "flat": np.zeros((8, 8))}.items():
        np.save(tmp_path / f"{name}.npy", values)
    whole = (tmp_path / "good.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(whole[:-100])
    (tmp_path / "none.npy").write_bytes(b"\0" * 300)
    frame = StudyFrame(str(tmp_path / "good.npy"), 0, (0, 0, 0), ((0.0, 10.0),) * 3)
    for backend in ("numpy", "dali"):
        loader = make(backend=backend)
        wanted = loader.load([frame])
        for name, slices, message in (
            ("missing", (0, 0, 0), "there is no such file; ingest its series again"),
            ("fortran", (0, 0, 0), r"write it as \[T, S, H, W\]"),
            ("flat", (0, 0, 0), r"has shape \(8, 8\)"),
            ("none", (0, 0, 0), "cannot be read as an array"),
            ("short", (1, 1, 1), "is cut short"),
            ("good", (2, 2, 2), "has 1 volumes of 2 slices; slice 2 of volume 0"),
        ):
            with pytest.raises(UserError, match=message):
                loader.load([frame, replace(frame, path=str(tmp_path / f"{name}.npy"), slices=slices)])
        assert torch.equal(loader.load([frame]), wanted)


def test_which_loader_is_taken(monkeypatch, caplog):
    assert isinstance(build_loader(FramesConfig(), LoaderConfig(), SIZE), loaders.NumpyLoader)
    assert type(make(backend="dali")).__name__ == "DaliLoader"
    with pytest.raises(UserError, match="data.loader.gds reads into a GPU's memory, and there is no GPU; set data"):
        make(backend="auto", gds=True)
    monkeypatch.setattr(loaders, "optional_import", lambda name: None)
    caplog.set_level(logging.INFO, "megamed.data")
    assert isinstance(build_loader(FramesConfig(), LoaderConfig(), SIZE, "cuda"), loaders.NumpyLoader)
    assert "nvidia-dali is not installed; frames are made by NumPy on the CPU" in caplog.text
    monkeypatch.setattr(loaders, "DALI", "nvidia.dali_of_old")
    with pytest.raises(UserError, match="data.loader.backend=dali needs nvidia.dali_of_old, which is not"):
        make(backend="dali")
    caplog.clear()
    build_loader(FramesConfig(augment=AugmentConfig(enabled=True, flip_lr=True)), LoaderConfig(), SIZE)
    assert "what reports say of sides is wrong then" in caplog.text


def test_threads_are_this_ranks_share(monkeypatch):
    monkeypatch.setattr(loaders.os, "sched_getaffinity", lambda pid: range(12))
    for ranks, wanted in (("1", 8), ("4", 3), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert num_threads(LoaderConfig()) == wanted
    assert num_threads(LoaderConfig(threads=5)) == 5


def test_a_picture_is_decoded_once_for_all_its_tiles(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((300, 100, 3), np.uint8)).save(tmp_path / "p.png")
    frames = plan_image(tmp_path / "p.png", FramesConfig(thumbnail=False), 50).frames
    opened: list[str] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(Path(path).name) or real(path))
    assert len(frames) == 12 and make().load(frames).shape[0] == 12
    assert opened == ["p.png"]


def test_memory_is_used_again_when_nothing_refers_to_it(frames):
    loader = make()
    first = loader.load(frames[:6])
    place, one = first.data_ptr(), first[3]
    wanted = first.clone()
    assert loader.load(frames[6:12]).data_ptr() != place
    assert torch.equal(first, wanted)
    del first
    assert loader.load(frames[6:12]).data_ptr() != place  # a part of it is still in use
    assert torch.equal(one, wanted[3])
    del one
    again = [loader.load(frames[:6]) for _ in range(2)]
    assert place in [frames_NCHW.data_ptr() for frames_NCHW in again]
    assert all(torch.equal(frames_NCHW, wanted) for frames_NCHW in again)
