"""The table and the contact sheet of a store."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megamed.data.readers import Identity
from megamed.data.series import Series, SeriesInfo
from megamed.data.store import StoreWriter, VolumeStore, write_series
from megamed.data.store.inspect import contact_sheet, describe
from megamed.utils import UserError
from tests.data.store.stores import PSEUDONYMS, name

CELL = 192


def small_store(root: Path) -> VolumeStore:
    """A CT whose middle slice has a bright quarter at the upper left, an MR run, and a picture in colour."""
    ct = np.full((1, 3, 8, 8), -1000, np.int16)
    ct[0, 1, :4, :4] = 300
    run = np.arange(4 * 2 * 6 * 6, dtype=np.float32).reshape(4, 2, 6, 6)
    picture = np.zeros((1, 1, 4, 8, 3), np.uint8)
    picture[..., 0] = 255
    space = SeriesInfo(modality="CT", kind="volume", plane="axial", body_part="CHEST", units="HU")
    series = [
        replace(space, spacing_mm=(0.5, 0.5, 5.0), windows=((0.0, 400.0),)),
        replace(space, spacing_mm=(0.7, 1.4, 1.0), windows=((0.0, 400.0),)),
        SeriesInfo(modality="MR", kind="run", plane="coronal", spacing_mm=(3.0, 3.0, 4.0),
                   percentiles={"1.0": 2.0, "99.0": 280.0}),
        SeriesInfo(),
    ]
    store = VolumeStore.create(root)
    with StoreWriter(store) as writer:
        for number, (info, voxels) in enumerate(zip(series, [ct, ct, run, picture], strict=True)):
            info = replace(info, shape=voxels.shape, dtype=voxels.dtype.name)
            identity = Identity("patient", f"study{number}", name(number))
            folder = write_series(root, name(number), identity, Series(voxels, info), PSEUDONYMS)
            writer.commit(folder)
    return store


def test_the_table(tmp_path):
    store = small_store(tmp_path)
    assert [line.split() for line in describe(store).splitlines()] == [
        "modality body part plane kind series studies slices mm in plane mm between GB".split(),
        "CT CHEST axial volume 2 2 3 0.5 to 0.7 1 to 5 7.68e-07".split(),
        "MR - coronal run 1 1 2 3 4 1.15e-06".split(),
        "OT - none image 1 1 - - - 9.6e-08".split(),
        "all 4 4 2 to 3 0.5 to 3 1 to 5 2.02e-06".split(),
    ]
    rows = describe(store, series=True).splitlines()
    assert [row.split()[0] for row in rows[1:]] == sorted(name(number) for number in range(4))
    [run] = [row for row in rows if name(2) in row]
    assert run.split()[1:] == "MR - coronal run 4 x 2 x 6 x 6 3 x 3 x 4 float32 a.u. 1.15e-06 -".split()
    assert len({len(row) for row in rows}) == 1
    everything = describe(store) + describe(store, series=True)
    assert "patient" not in everything and "study0" not in everything
    empty = VolumeStore.create(tmp_path / "empty")
    assert describe(empty).splitlines()[1].split() == "all 0 0 - - - 0".split()
    assert contact_sheet(empty, tmp_path / "empty.png") == 0


def test_the_contact_sheet(tmp_path):
    store = small_store(tmp_path)
    assert contact_sheet(store, tmp_path / "sheet.png") == 4
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    order = [record.series for record in store.records()]
    step = CELL + 8

    def cell(number: int) -> np.ndarray:
        left = 8 + order.index(name(number)) * step
        return sheet[8 : 8 + CELL, left : left + CELL].astype(int)

    first = cell(0)
    assert (first[40, 40] == 255).all() and (first[40, 150] == 0).all() and (first[150, 40] == 0).all()
    # Twice as high as it is wide, in mm, and so narrower than its cell, whose ground shows.
    narrow = cell(1)
    assert (narrow[96, 20] == 24).all() and (narrow[40, 70] == 255).all() and (narrow[96, 180] == 24).all()
    assert cell(2)[:, :, 0].std() > 1
    colour = cell(3)
    assert colour[96, 96].tolist() == [255, 0, 0] and (colour[10, 96] == 24).all()
    # Something is written below each.
    for number in range(4):
        left = 8 + order.index(name(number)) * step
        assert sheet[8 + CELL :, left : left + CELL].max() > 100
    assert contact_sheet(store, tmp_path / "two.png", max_series=2) == 2
    assert Image.open(tmp_path / "two.png").width == 2 * step + 8
    (store.record(order[0]).folder / "voxels.npy").unlink()
    with pytest.raises(UserError, match="voxels.npy is missing"):
        contact_sheet(store, tmp_path / "sheet.png")
