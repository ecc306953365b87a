"""A run as its parcels: the mean signal of each part of an atlas in time, a carpet of parcels by volumes.

After Power, "A simple but useful way to assess fMRI scan qualities", NeuroImage 154, 2017, with parcels for voxels.

Shape suffixes: T volumes, S slices, H and W pixels, P parcels; X, Y, Z voxels of the atlas.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megamed.data.frames.raw import ArrayFile
from megamed.data.series import SeriesInfo
from megamed.utils import UserError

logger = logging.getLogger("megamed.data")

# Changes when a carpet of the same run and atlas would have other values.
_VERSION = 1


def carpet(info: SeriesInfo, voxels_path: Path, atlas: Path, cache: Path) -> tuple[Path, int]:
    """Percent signal change of each parcel against its own mean in time, computed once.

    Parcels are in the order of their numbers, all that the atlas has, so that a row is the same parcel in every run;
    one that lies outside the run, or has no signal, is 0 throughout.

    Args:
        info: of the run.
        voxels_path: its voxels.
        atlas: NIfTI file of whole numbers, 0 outside.
        cache: folder where the result is kept; made where it is not there.

    Returns:
        A `.npy` file, float32 [1, 1, P, T], and P.

    Raises:
        UserError: the atlas cannot be read, is none, or lies elsewhere than the run.
    """
    labels_XYZ, affine, digest = _read_atlas(str(atlas))
    numbers = np.unique(labels_XYZ)
    numbers = numbers[numbers != 0]
    source = info.provenance or f"{voxels_path} {voxels_path.stat().st_mtime_ns}"
    key = hashlib.sha256(repr((_VERSION, digest, source, info.shape, info.affine)).encode()).hexdigest()[:32]
    path = cache / f"{key}.npy"
    if not path.is_file():
        parcels_SHW = _on_grid_of(info, labels_XYZ, affine, atlas)
        change_PT = percent_change(voxels_path, parcels_SHW, numbers)
        num_outside = int(len(numbers) - np.isin(numbers, parcels_SHW).sum())
        if num_outside:
            logger.info("%d of the atlas's %d parcels lie outside a run; they are shown as unchanged",
                        num_outside, len(numbers))
        _write(path, change_PT[None, None])
    return path, len(numbers)


def percent_change(voxels_path: Path, parcels_SHW: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """float32 [P, T]: 100 * (mean of the parcel / its mean in time - 1), 0 where that is not above 0."""
    voxels = ArrayFile(str(voxels_path))
    num_volumes, num_slices = voxels.shape[:2]
    # Numbers that the atlas has may be large and far between: count by their rank, the last for outside.
    ranks = np.searchsorted(numbers, parcels_SHW)
    inside = parcels_SHW != 0
    ranks = np.where(inside, ranks, len(numbers)).reshape(-1)
    sizes = np.bincount(ranks, minlength=len(numbers) + 1)[:-1]
    mean_PT = np.zeros((len(numbers), num_volumes))
    for volume in range(num_volumes):
        values = voxels.read(volume, 0, num_slices).reshape(-1)
        sums = np.bincount(ranks, weights=values, minlength=len(numbers) + 1)[:-1]
        np.divide(sums, sizes, out=mean_PT[:, volume], where=sizes > 0)
    level_P1 = mean_PT.mean(axis=1, keepdims=True)
    change_PT = np.zeros_like(mean_PT)
    np.divide(mean_PT, level_P1, out=change_PT, where=level_P1 > 0)
    return np.where(level_P1 > 0, 100 * (change_PT - 1), 0).astype(np.float32)


@lru_cache(maxsize=2)
def _read_atlas(path: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Numbers, affine, and a hash of the file."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    key = f"data.frames.atlas={path}"
    try:
        image: Any = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{key}: there is no such file; correct the path", everywhere=True) from None
    except (ImageFileError, OSError, ValueError, EOFError) as error:
        raise UserError(f"{key} cannot be read ({error}); give a NIfTI file", everywhere=True) from error
    if values.ndim > 3 and values.size == np.prod(values.shape[:3]):
        values = values.reshape(values.shape[:3])
    if values.ndim != 3:
        raise UserError(f"{key} has shape {values.shape}; give one volume with a number for each parcel (of an atlas "
                        "of probabilities, its most probable parcels)", everywhere=True)
    if not np.isfinite(values).all() or (values != np.rint(values)).any() or not values.any():
        raise UserError(f"{key} has values that are no whole numbers, or nothing but 0; give a number for each parcel "
                        "and 0 outside", everywhere=True)
    return values.astype(np.int64), np.asarray(image.affine, float), digest


def _on_grid_of(info: SeriesInfo, labels_XYZ: np.ndarray, affine: np.ndarray, atlas: Path) -> np.ndarray:
    """The number of the parcel in which the middle of each of a run's voxels lies, [S, H, W]."""
    if len(info.shape) != 4:
        raise UserError(f"a run has shape {list(info.shape)}; parcels need values of one channel, [T, S, H, W]")
    num_slices, height, width = info.shape[1:]
    to_atlas = np.linalg.inv(affine) @ np.array(info.affine)
    parcels_SHW = np.zeros((num_slices, height, width), np.int64)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    for index in range(num_slices):
        places = np.stack([columns, rows, np.full_like(rows, index), np.ones_like(rows)]).reshape(4, -1)
        x, y, z = np.rint(to_atlas[:3] @ places).astype(np.int64)
        num_x, num_y, num_z = labels_XYZ.shape
        inside = (0 <= x) & (x < num_x) & (0 <= y) & (y < num_y) & (0 <= z) & (z < num_z)
        parcels_SHW[index].reshape(-1)[inside] = labels_XYZ[x[inside], y[inside], z[inside]]
    if not parcels_SHW.any():
        raise UserError(f"data.frames.atlas={atlas} has no parcel where a run lies; give an atlas in the space of the "
                        "run (both in MNI space, say), or register the run to it first")
    return parcels_SHW


def _write(path: Path, values: np.ndarray) -> None:
    """All of the file or nothing of it, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, values)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
