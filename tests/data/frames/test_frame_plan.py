"""From a series, a picture or a film to frames, their labels and the line that says what is shown."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megamed.data.frames import MOSAIC, FramesConfig, StudyFrame
from megamed.data.frames.config import ChoiceConfig
from megamed.data.frames.plan import plan_image, plan_series, plan_video
from megamed.data.samples.schema import FrameChoice, StudyRef
from megamed.data.series import SeriesInfo
from megamed.utils import UserError

PERCENTILES = {"0.5": 3.0, "1.0": 5.0, "50.0": 100.0, "99.0": 900.0, "99.5": 950.0}
CT = SeriesInfo(modality="CT", kind="volume", plane="axial", shape=(1, 10, 512, 512), units="HU", body_part="CHEST",
                spacing_mm=(0.7, 0.7, 2.5), contrast=True, percentiles=PERCENTILES)
MR = SeriesInfo(modality="MR", kind="volume", plane="sagittal", shape=(1, 4, 64, 64), spacing_mm=(1, 1, 3.3),
                body_part="KNEE", laterality="L", part="echo 2", echo_time_ms=80.0, percentiles=PERCENTILES)
RUN = SeriesInfo(modality="MR", kind="run", plane="axial", shape=(20, 6, 32, 32), spacing_mm=(3, 3, 3.3),
                 repetition_time_s=2.0, echo_time_ms=30.0, percentiles=PERCENTILES)
XRAY = SeriesInfo(modality="DX", kind="image", shape=(1, 1, 3000, 2000), dtype="uint16", body_part="CHEST",
                  view_position="PA", windows=((2000.0, 1000.0),), percentiles=PERCENTILES)
REF = StudyRef("s")
CONFIG = FramesConfig()


def plan(info, config=CONFIG, **ref):
    return plan_series(info, "v.npy", replace(REF, **ref), config)


def test_ct_through_three_windows():
    planned = plan(CT)
    assert planned.header == ("CT, chest, axial, with contrast agent, 10 slices, 2.5 mm apart, pixels of 0.70 x 0.70 mm"
                              ", windows lung/mediastinum/bone")
    assert planned.labels[:2] == ["z=0.0 mm", "z=2.5 mm"] and len(planned.frames) == 10
    windows = ((-1350.0, 150.0), (-125.0, 225.0), (-500.0, 1300.0))
    assert planned.frames[3] == StudyFrame("v.npy", 0, (3, 3, 3), windows)
    head = plan(replace(CT, body_part="HEAD"))
    assert head.frames[0].windows == ((0.0, 80.0), (-32.5, 182.5), (-500.0, 1300.0))
    assert head.header.endswith("windows brain/subdural/bone")
    own = plan(CT, windows=("liver", (40.0, 400.0), "soft_tissue"))
    assert own.frames[0].windows == ((-45.0, 105.0), (-160.0, 240.0), (-147.5, 227.5))
    assert own.header.endswith("windows liver/40±200/soft tissue")


def test_ct_with_neighbouring_slices_as_channels():
    planned = plan(CT, FramesConfig(ct_channels="adjacent"))
    assert [frame.slices for frame in planned.frames[:2]] == [(0, 0, 1), (0, 1, 2)]
    assert planned.frames[-1].slices == (8, 9, 9)
    assert {frame.windows for frame in planned.frames} == {((-1350.0, 150.0),) * 3}
    assert planned.header.endswith("window lung, neighbouring slices as channels")


def test_frames_are_chosen():
    planned = plan(CT, frames=FrameChoice(range_mm=(5, 20), every=2, at_most=2))
    assert planned.labels == ["z=5.0 mm", "z=20.0 mm"] and [f.slices[0] for f in planned.frames] == [2, 8]
    assert ", 2 of 10 slices, " in planned.header
    assert len(plan(CT, FramesConfig(choice=ChoiceConfig(at_most=3))).frames) == 3
    irregular = plan(replace(CT, slice_positions_mm=(0, 1, 2, 3, 4, 5, 6, 7, 8, 15.0)))
    assert irregular.labels[-1] == "z=15.0 mm" and "1.0 to 7.0 mm apart" in irregular.header
    with pytest.raises(UserError, match="frames.range_s: a series without time"):
        plan(CT, frames=FrameChoice(range_s=(0, 1)))


def test_series_without_a_scale_of_their_own_take_percentiles():
    mr = plan(MR)
    assert mr.header == ("MR, knee, left, sagittal, echo 2, 4 slices, 3.3 mm apart, pixels of 1.00 x 1.00 mm, TE 80 ms")
    assert mr.frames[0].windows == ((3.0, 950.0),) * 3
    assert plan(MR, FramesConfig(mr_percentiles=(1.0, 99.0))).frames[0].windows[0] == (5.0, 900.0)
    assert plan(replace(MR, modality="PT", units="BQML")).frames[0].windows[0] == (0.0, 950.0)
    assert plan(replace(MR, percentiles=dict.fromkeys(PERCENTILES, 7.0))).frames[0].windows[0] == (7.0, 8.0)
    assert plan(MR, windows=((100.0, 50.0),)).frames[0].windows == ((75.0, 125.0),) * 3
    with pytest.raises(UserError, match="windows by name are for CT in HU, and a series of MR"):
        plan(MR, windows=("brain",))
    with pytest.raises(UserError, match="no percentiles beside its voxels; ingest it again"):
        plan(replace(MR, percentiles={}))


def test_run_as_mosaics():
    planned = plan(RUN)
    assert planned.header == "MR, axial, 20 volumes, 3.3 mm apart, pixels of 3.00 x 3.00 mm, TR 2 s, TE 30 ms"
    assert planned.frames[2] == StudyFrame("v.npy", 2, (MOSAIC,) * 3, ((3.0, 950.0),) * 3)
    assert planned.labels[:3] == ["t=0.0 s", "t=2.0 s", "t=4.0 s"] and len(planned.frames) == 20
    some = plan(RUN, frames=FrameChoice(range_s=(4, 30), every=3))
    assert [frame.volume for frame in some.frames] == [2, 5, 8, 11, 14]
    without_time = plan(replace(RUN, repetition_time_s=None, b_values=(0.0,) + (1000.0,) * 19))
    assert without_time.labels[:2] == ["b=0 s/mm2", "b=1000 s/mm2"]
    with pytest.raises(UserError, match="set data.frames.run to 'slices'"):
        plan(RUN, frames=FrameChoice(range_mm=(0, 1)))


def test_run_as_slices():
    slices = FramesConfig(run="slices")
    planned = plan(RUN, slices)
    # 64 frames hold ten whole volumes of six slices.
    assert len(planned.frames) == 60 and {f.volume for f in planned.frames} == {0, 2, 4, 6, 8, 11, 13, 15, 17, 19}
    assert planned.labels[7] == "t=4.0 s z=3.3 mm" and planned.frames[7].slices == (1, 1, 1)
    assert "10 of 20 volumes, 6 slices each" in planned.header
    part = plan(RUN, slices, frames=FrameChoice(range_mm=(3, 7), range_s=(0, 3), at_most=None))
    assert [(f.volume, f.slices[0]) for f in part.frames] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [f.slices[0] for f in plan(RUN, slices, frames=FrameChoice(at_most=2)).frames] == [0, 5]


def test_xray_in_tiles_through_the_headers_window():
    planned = plan(XRAY)
    assert planned.header == "DX, chest, PA"
    assert planned.labels == [*(f"tile {r},{c}" for r in (1, 2, 3) for c in (1, 2)), "whole"]
    assert planned.frames[1].box == (0.0, 1000.0, 1000.0, 1000.0) and planned.frames[-1].box is None
    assert {frame.windows for frame in planned.frames} == {((1500.0, 2500.0),) * 3}
    assert {frame.fit for frame in planned.frames} == {"stretch"}
    assert plan(replace(XRAY, windows=())).frames[0].windows[0] == (3.0, 950.0)
    small = plan(replace(XRAY, shape=(1, 1, 400, 400)))
    assert small.labels == [""] and small.frames[0].box is None
    colour = plan(replace(XRAY, modality="US", shape=(1, 1, 400, 400, 3), dtype="uint8"))
    assert colour.frames[0].windows == ((0.0, 255.0),) * 3
    cine = plan(replace(XRAY, modality="US", shape=(30, 1, 60, 80), dtype="uint8"))
    assert cine.labels[1] == "picture 2" and "30 pictures" in cine.header
    assert [frame.volume for frame in cine.frames] == list(range(30))
    assert len(plan(XRAY, FramesConfig(thumbnail=False, max_tiles=2)).frames) == 2


def test_pictures(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (900, 450, 3), np.uint8)).save(tmp_path / "c.png")
    planned = plan_image(tmp_path / "c.png", CONFIG)
    assert planned.header == "" and len(planned.frames) == 3 and planned.frames[0].windows[0] == (0.0, 255.0)
    Image.fromarray(rng.integers(100, 4000, (400, 400)).astype(np.uint16)).save(tmp_path / "g.png")
    low, high = plan_image(tmp_path / "g.png", CONFIG).frames[0].windows[0]
    assert 100 <= low < 150 and 3950 < high <= 4000
    sideways = Image.new("RGB", (900, 450))
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "s.jpg", exif=exif)
    assert [f.box for f in plan_image(tmp_path / "s.jpg", CONFIG).frames[:2]] == [(0, 0, 450, 450), (450, 0, 450, 450)]
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        plan_image(tmp_path / "bad.png", CONFIG)
    with pytest.raises(UserError, match="there is no such picture"):
        plan_image(tmp_path / "none.png", CONFIG)


def test_films(tmp_path):
    pages = [Image.new("L", (20, 10), 10 * i) for i in range(6)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=500)
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, page in enumerate(pages):
        page.save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    np.save(tmp_path / "a.npy", np.zeros((6, 10, 20, 3), np.uint8))

    gif = plan_video(tmp_path / "a.gif", CONFIG, FrameChoice(range_s=(0.5, 2.5), every=2))
    assert gif.labels == ["t=0.5 s", "t=1.5 s", "t=2.5 s"] and [f.volume for f in gif.frames] == [1, 3, 5]
    assert gif.header == "film, 3 of 6 pictures"
    for source in (tmp_path / "a.tif", tmp_path / "a.npy"):
        assert [f.volume for f in plan_video(source, CONFIG, FrameChoice(at_most=3)).frames] == [0, 3, 5]
    for source in (folder, [folder / f"{i}.png" for i in range(6)]):
        planned = plan_video(source, CONFIG)
        assert [f.path for f in planned.frames] == [str(folder / f"{i}.png") for i in range(6)]
        assert planned.labels[0] == "picture 1"
    with pytest.raises(UserError, match="frames.range_s: what is shown has no such positions"):
        plan_video(folder, CONFIG, FrameChoice(range_s=(0, 1)))
    with pytest.raises(UserError, match="has no pictures"):
        plan_video([], CONFIG)
