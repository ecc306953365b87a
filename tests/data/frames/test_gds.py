"""GPUDirect Storage: which stretch of which file is read, with a stand-in for cuFile. Not measured on a GPU."""

import os

import numpy as np
import pytest
import torch

from megamed.data.frames import MOSAIC, FramesConfig, LoaderConfig, StudyFrame
from megamed.data.frames import dali_loader as module
from megamed.data.frames.gds import DirectReader
from megamed.data.frames.loader import build_loader
from megamed.data.frames.raw import RawReader
from megamed.utils import UserError

CT = ((-1350.0, 150.0), (-125.0, 225.0), (-500.0, 1300.0))


class File:
    """What torch's GdsFile does, into a CPU's memory."""

    opened: list[str] = []

    def __init__(self, path: str, flags: int):
        assert flags == os.O_RDONLY
        self.path = path
        File.opened.append(path)

    def load_storage(self, storage, offset: int) -> None:
        data = np.fromfile(self.path, np.uint8, storage.nbytes(), offset=offset)
        storage.copy_(torch.from_numpy(data).untyped_storage())


@pytest.fixture
def volume(tmp_path) -> tuple[str, np.ndarray]:
    values = np.random.default_rng(0).integers(0, 4000, (2, 5, 12, 12)).astype(np.uint16)
    np.save(tmp_path / "v.npy", values)
    return str(tmp_path / "v.npy"), values


def test_slices_in_one_piece_are_read_directly(volume):
    path, values = volume
    reader, direct = RawReader(), DirectReader(torch.device("cpu"), None, File)
    for slices, first, count in (((3, 3, 3), 3, 1), ((1, 2, 3), 1, 3)):
        stretch = reader.stretch(StudyFrame(path, 1, slices, CT))
        assert stretch is not None and stretch.shape == (count, 12, 12)
        found = direct.read(stretch)
        assert found.dtype == torch.uint16
        np.testing.assert_array_equal(found.numpy(), values[1, first : first + count])
    assert File.opened.count(path) == 1
    # Ends of a stack, mosaics, tiles and what has to be padded go the other way.
    for frame in (StudyFrame(path, 0, (0, 0, 1), CT), StudyFrame(path, 0, (MOSAIC,) * 3, CT),
                  StudyFrame(path, 0, (1, 1, 1), CT, (0.0, 0.0, 4.0, 4.0), "stretch"),
                  StudyFrame("p.png", 0, (0, 0, 0), CT)):
        assert reader.stretch(frame) is None
    with pytest.raises(UserError, match="slice 5 of volume 1"):
        reader.stretch(StudyFrame(path, 1, (5, 5, 5), CT))


def test_the_loader_takes_either_way(volume, monkeypatch):
    path, _ = volume
    monkeypatch.setattr(module, "DirectReader", lambda device, stream: DirectReader(device, stream, File))
    frames = [StudyFrame(path, 1, (s, s, s), CT) for s in range(5)] + [StudyFrame(path, 0, (MOSAIC,) * 3, CT)]
    direct = build_loader(FramesConfig(), LoaderConfig(backend="dali", gds=True), 8)
    read = [direct._read(place, frame, None) for place, frame in enumerate(frames)]
    assert [item.kind.is_direct for item in read] == [True] * 5 + [False]
    plain = [RawReader().read(frame, lambda length: 0) for frame in frames]
    for item, raw in zip(read, plain, strict=True):
        np.testing.assert_array_equal(np.asarray(item.raw.voxels_CHW), raw.voxels_CHW)
        assert (item.raw.windows, item.raw.box) == (raw.windows, raw.box)


def test_what_is_missing_is_said(volume):
    with pytest.raises(UserError, match="there is no GPU; set data.loader.gds=false"):
        DirectReader(torch.device("cpu"), None)

    def refuse(path, flags):
        raise RuntimeError("cuFileHandleRegister failed")

    stretch = RawReader().stretch(StudyFrame(volume[0], 0, (0, 0, 0), CT))
    with pytest.raises(UserError, match="GPUDirect Storage .cuFileHandleRegister failed.; it needs .*gds=false"):
        DirectReader(torch.device("cpu"), None, refuse).read(stretch)
