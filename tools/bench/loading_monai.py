"""MONAI's side of tools/bench/loading.py: the frames that megamed makes, by MONAI's readers, transforms and data sets.

Every form is given what is known to make it faster while its frames stay the same: slices are laid one after another
before anything is computed, the normalisation is part of the windows' ranges, and tensors shed their metadata.

Shape suffixes: S slices, C channels, H and W pixels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from megamed.data.frames import Window
from megamed.data.frames.reference import NORMAL_SCALE, NORMAL_SHIFT

KEY = "frames"


@dataclass(frozen=True)
class Form:
    """A way to make the frames.

    Attributes:
        name: for people.
        stage: `cold` from DICOM files, `warm` from volumes on a disk, `other` for comparison alone.
        dataset: makes the data set of some series.
    """

    name: str
    stage: str
    dataset: Callable[[Sequence[int]], Any]


def forms(folders: Sequence[Path], windows: Sequence[Sequence[Window]], size: int, scratch: Path) -> list[Form]:
    """All forms. Item i of a data set is series `order[i]`.

    Args:
        folders: of the series' DICOM files.
        windows: of the three channels of each series.
        size: edge of a frame in pixels.
        scratch: a folder for volumes and caches.
    """
    from monai.data import CacheDataset, Dataset, PersistentDataset
    from monai.transforms import Compose

    finish = Compose(_windows_and_resize(size))
    cold = [_read("PydicomReader")] + ([_read("ITKReader")] if importlib.util.find_spec("itk") else [])
    volumes = [_save(folder, number, scratch) for number, folder in enumerate(folders)]

    def items(order: Sequence[int], paths: Sequence[Path]) -> list[dict[str, Any]]:
        return [{KEY: str(paths[i]), **_ranges(windows[i])} for i in order]

    def from_files(read: Any, paths: Sequence[Path]) -> Callable[[Sequence[int]], Any]:
        return lambda order: Dataset(items(order, paths), Compose([read, finish]))

    def persistent(order: Sequence[int]) -> Any:
        kept: Any = PersistentDataset(items(order, folders), cold[0], cache_dir=scratch / "persistent")
        return Dataset(kept, finish)

    def finished(order: Sequence[int]) -> Any:
        return PersistentDataset(items(order, folders), Compose([cold[0], finish]), cache_dir=scratch / "finished")

    def in_memory(order: Sequence[int]) -> Any:
        series = items(range(len(folders)), folders)
        kept = CacheDataset(series, cold[0], progress=False, num_workers=1, copy_cache=False)
        return Dataset([kept[i] for i in order], finish)

    arrays, niftis = zip(*volumes, strict=True)
    return [
        *(Form(name, "cold", from_files(read, folders))
          for name, read in zip(("PydicomReader", "ITKReader"), cold, strict=False)),
        Form("volumes as .npy", "warm", from_files(_read_array(), arrays)),
        Form("volumes as .nii", "warm", from_files(_read("NibabelReader"), niftis)),
        Form("PersistentDataset of volumes", "warm", persistent),
        Form("CacheDataset of volumes, in memory", "other", in_memory),
        Form("PersistentDataset of finished frames", "other", finished),
    ]


def loader(form: Form, order: Sequence[int], workers: int) -> DataLoader:
    """A PyTorch DataLoader that yields one series after another, and keeps its workers from epoch to epoch."""
    return DataLoader(form.dataset(order), batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def _ranges(windows: Sequence[Window]) -> dict[str, Any]:
    return {"windows": [list(window) for window in windows]}


def _slices_first(volume: Any) -> torch.Tensor:
    """[1, W, H, S] as readers give it to [S, 1, H, W] as frames want it."""
    return torch.as_tensor(volume).as_subclass(torch.Tensor).permute(3, 0, 2, 1).contiguous()


def _read(reader: str) -> Any:
    """From files to slices from the feet up, the front of the head up, the patient's right on the left."""
    from monai.transforms import Compose, Lambdad, LoadImaged, Orientationd

    return Compose([
        LoadImaged(KEY, reader=reader, image_only=True, ensure_channel_first=True),
        Orientationd(KEY, axcodes="LPS", labels=None),
        Lambdad(KEY, _slices_first),
    ])


def _read_array() -> Any:
    from monai.transforms import Compose, Lambdad, LoadImaged

    def plain(volume: Any) -> torch.Tensor:
        return torch.as_tensor(volume).as_subclass(torch.Tensor)[:, None]

    return Compose([LoadImaged(KEY, reader="NumpyReader", image_only=True), Lambdad(KEY, plain)])


def _windows_and_resize(size: int) -> list[Any]:
    """Three windows, normalised, and an antialiased resize: MONAI's own Resized does not weigh all pixels."""
    from monai.transforms import Lambda, Lambdad

    def windows(item: dict[str, Any]) -> dict[str, Any]:
        from monai.transforms import ScaleIntensityRange

        channels = [
            ScaleIntensityRange(low, high, shift, scale + shift, clip=True)(item[KEY])
            for (low, high), scale, shift in zip(item["windows"], NORMAL_SCALE, NORMAL_SHIFT, strict=True)
        ]
        return {KEY: torch.cat([torch.as_tensor(channel) for channel in channels], dim=1)}

    def resize(frames_SCHW: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(frames_SCHW, (size, size), mode="bilinear", antialias=True)

    return [Lambda(windows), Lambdad(KEY, resize)]


def _save(folder: Path, number: int, scratch: Path) -> tuple[Path, Path]:
    """The volume that MONAI reads from a folder, as int16 where it holds it: a `.npy` [S, H, W] and a NIfTI file."""
    import nibabel
    from monai.transforms import Compose, LoadImaged, Orientationd

    read = Compose([LoadImaged(KEY, reader="PydicomReader", image_only=True, ensure_channel_first=True),
                    Orientationd(KEY, axcodes="LPS", labels=None)])
    volume = read({KEY: str(folder)})[KEY]
    values_WHS = volume[0].numpy()
    if np.array_equal(values_WHS, values_WHS.astype(np.int16)):
        values_WHS = values_WHS.astype(np.int16)
    array, nifti = scratch / f"{number}.npy", scratch / f"{number}.nii"
    np.save(array, np.ascontiguousarray(values_WHS.transpose(2, 1, 0)))
    nibabel.save(nibabel.Nifti1Image(values_WHS, np.asarray(volume.affine)), nifti)
    return array, nifti
