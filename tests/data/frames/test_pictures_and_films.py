"""Picture files and films: all that Pillow reads, turned as it should be; films by number, whatever was read before."""

import numpy as np
import pytest
import torch
from PIL import Image

from megamed.data.frames import FramesConfig, LoaderConfig
from megamed.data.frames.loader import build_loader
from megamed.data.frames.pictures import Film, film_header, read_picture
from megamed.data.frames.plan import plan_video
from megamed.data.samples.schema import FrameChoice
from megamed.utils import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (7, 9)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (7, 9, 3)).astype(np.uint8)
DEEP = RNG.integers(0, 65536, (7, 9)).astype(np.uint16)


@pytest.mark.parametrize(("name", "picture", "wanted"), [
    ("grey.png", Image.fromarray(GREY), GREY[None]),
    ("colour.png", Image.fromarray(COLOUR), COLOUR.transpose(2, 0, 1)),
    ("deep.png", Image.fromarray(DEEP), DEEP[None]),
    ("deep.tif", Image.fromarray(DEEP.astype(">u2")), DEEP[None]),
    ("long.tif", Image.fromarray(DEEP.astype(np.int32)), DEEP[None]),
    ("below.tif", Image.fromarray(DEEP.astype(np.int32) - 70000), DEEP[None].astype(np.float32) - 70000),
    ("float.tif", Image.fromarray(DEEP.astype(np.float32) / 4), DEEP[None].astype(np.float32) / 4),
    ("bits.png", Image.fromarray(GREY > 99), np.where(GREY > 99, np.uint8(255), np.uint8(0))[None]),
    ("palette.png", Image.fromarray(GREY).convert("P"), np.stack([GREY] * 3)),
    ("alpha.png", Image.fromarray(np.dstack([COLOUR, GREY])), COLOUR.transpose(2, 0, 1)),
])
def test_modes(tmp_path, name, picture, wanted):
    picture.save(tmp_path / name)
    found = read_picture(str(tmp_path / name), 0)
    assert found.dtype == wanted.dtype and found.dtype.isnative and found.flags.c_contiguous
    np.testing.assert_array_equal(found, wanted)


def test_orientation_and_pages(tmp_path):
    turned = Image.fromarray(COLOUR)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(tmp_path / "t.png", exif=exif)
    np.testing.assert_array_equal(read_picture(str(tmp_path / "t.png"), 0), np.rot90(COLOUR, -1).transpose(2, 0, 1))
    pages = [Image.fromarray(GREY + np.uint8(i)) for i in range(3)]
    pages[0].save(tmp_path / "p.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_picture(str(tmp_path / "p.tif"), 2), GREY[None] + np.uint8(2))
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_picture(str(tmp_path / "p.tif"), 3)
    (tmp_path / "cut.png").write_bytes((tmp_path / "t.png").read_bytes()[:120])
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_picture(str(tmp_path / "cut.png"), 0)


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> str:
    """Forty pictures, five a second, each with its number's brightness."""
    av = pytest.importorskip("av")
    path = str(tmp_path_factory.mktemp("film") / "film.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(40):
            picture = np.full((48, 64, 3), 6 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_film(film):
    header = film_header(film)
    assert header.num_frames == 40 and header.rate == 5
    planned = plan_video(film, FramesConfig(), FrameChoice(range_s=(2, 6), every=4))
    assert planned.labels == ["t=2.0 s", "t=2.8 s", "t=3.6 s", "t=4.4 s", "t=5.2 s", "t=6.0 s"]
    loader = build_loader(FramesConfig(interpolation="linear"), LoaderConfig(threads=2), 16)
    frames = loader.load(planned.frames)
    brightness = frames[:, 0, 8, 8] * 0.229 + 0.485
    wanted = torch.tensor([6 * frame.volume / 255 for frame in planned.frames])
    torch.testing.assert_close(brightness, wanted, atol=0.02, rtol=0)  # the codec's loss
    backwards = [planned.frames[i] for i in (5, 0, 3, 3)]
    assert torch.equal(loader.load(backwards), frames[[5, 0, 3, 3]])


def test_a_film_is_decoded_once_where_it_can_be(film, monkeypatch):
    opened = []
    real = Film._decode
    monkeypatch.setattr(Film, "_decode", lambda self: opened.append(1) or real(self))
    reader = Film(film)
    reader.want([3, 7, 20])
    pictures = {i: reader.read(i) for i in (20, 3, 7)}
    assert len(opened) == 1 and not reader._kept
    np.testing.assert_array_equal(reader.read(3), pictures[3])  # not said before: from the beginning again
    assert len(opened) == 2
    np.testing.assert_array_equal(reader.read(99), reader.read(39))  # a header may promise more than there is


def test_film_faults(tmp_path, monkeypatch):
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a film"):
        plan_video(tmp_path / "bad.mp4", FramesConfig())
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r"needs av, .*pip install 'megamed\[video\]'"):
        plan_video(tmp_path / "bad.mp4", FramesConfig())
