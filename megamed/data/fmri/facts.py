"""What can be measured in a stretch of an fMRI run: the truth behind questions and answers.

Shape suffixes: X, Y, Z voxel axes, T volumes in time, V voxels of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A voxel belongs to the head when its mean over the stretch reaches this share of the 98th
# percentile of all voxels' means: background and ghosts of an EPI lie well below, grey matter above.
HEAD_THRESHOLD = 0.25

# A drift slower than this, in percent of the mean signal per minute, counts as none.
DRIFT_THRESHOLD = 0.2

# A third counts as the brightest when its mean leads the next one by this much, in percent of the mean.
BRIGHTEST_MARGIN = 0.01

THIRDS = ("first", "middle", "last")


@dataclass(frozen=True)
class RunFacts:
    """Facts about one stretch, as shown (a stretch may be every second volume of a run).

    Attributes:
        voxel_size_mm: edge lengths of a voxel along X, Y, Z.
        repetition_time_s: seconds from one volume of the stretch to the next.
        num_volumes: volumes in the stretch.
        duration_s: `num_volumes * repetition_time_s`.
        mean_signal: mean over head and time, in the units of the file.
        temporal_snr: median over the head's voxels of mean / standard deviation in time (Murphy et
            al. 2007, doi:10.1016/j.neuroimage.2006.09.032); 0 where no voxel varies.
        drift_percent_per_min: slope of the least-squares line through the head signal.
        drift: `up`, `down`, or `none` when the slope is below `DRIFT_THRESHOLD` either way.
        brightest_third: `first`, `middle` or `last` third of the stretch, by mean head signal; `none`
            when the lead is below `BRIGHTEST_MARGIN`. Of a length that three does not divide, the
            first thirds are the longer ones.
        brightest_volume: index, from 0, of the volume with the highest head signal.
    """

    voxel_size_mm: tuple[float, float, float]
    repetition_time_s: float
    num_volumes: int
    duration_s: float
    mean_signal: float
    temporal_snr: float
    drift_percent_per_min: float
    drift: str
    brightest_third: str
    brightest_volume: int


def head_mask(mean_XYZ: np.ndarray) -> np.ndarray:
    """Voxels of the head: mean signal at or above `HEAD_THRESHOLD` of the 98th percentile.

    Args:
        mean_XYZ: mean volume of a stretch.

    Returns:
        bool [X, Y, Z]; nowhere true where that percentile is not above zero.
    """
    bright = float(np.percentile(mean_XYZ, 98))
    return (mean_XYZ >= HEAD_THRESHOLD * bright) & (mean_XYZ > 0)


def head_signal(signal_XYZT: np.ndarray, mask_XYZ: np.ndarray) -> np.ndarray:
    """Mean over the head, volume by volume: float64 [T], zeros for an empty mask."""
    if not mask_XYZ.any():
        return np.zeros(signal_XYZT.shape[3])
    return signal_XYZT[mask_XYZ].mean(axis=0, dtype=np.float64)


def measure(
    stretch_XYZT: np.ndarray, voxel_size_mm: tuple[float, float, float], repetition_time_s: float
) -> RunFacts:
    """Measure a stretch.

    Args:
        stretch_XYZT: signal of one volume or more.
        voxel_size_mm: edge lengths along X, Y, Z.
        repetition_time_s: seconds from one volume of the stretch to the next.
    """
    num_volumes = stretch_XYZT.shape[3]
    mask_XYZ = head_mask(stretch_XYZT.mean(axis=3))
    global_T = head_signal(stretch_XYZT, mask_XYZ)
    mean_signal = float(global_T.mean())
    percent_T = 100.0 * global_T / mean_signal if mean_signal > 0 else np.zeros(num_volumes)
    slope = 0.0
    if num_volumes > 1:
        minutes_T = np.arange(num_volumes) * repetition_time_s / 60.0
        slope = float(np.polyfit(minutes_T, percent_T, 1)[0])
    drift = "none" if abs(slope) < DRIFT_THRESHOLD else "up" if slope > 0 else "down"
    return RunFacts(
        voxel_size_mm=voxel_size_mm,
        repetition_time_s=repetition_time_s,
        num_volumes=num_volumes,
        duration_s=num_volumes * repetition_time_s,
        mean_signal=mean_signal,
        temporal_snr=_temporal_snr(stretch_XYZT[mask_XYZ]),
        drift_percent_per_min=slope,
        drift=drift,
        brightest_third=_brightest_third(percent_T),
        brightest_volume=int(np.argmax(global_T)),
    )


def _temporal_snr(head_VT: np.ndarray) -> float:
    mean_V = head_VT.mean(axis=1, dtype=np.float64)
    std_V = head_VT.std(axis=1, dtype=np.float64)
    # Voxels that never change (clipped or filled in) have no noise to compare with.
    varies_V = std_V > 1e-6 * mean_V
    return float(np.median(mean_V[varies_V] / std_V[varies_V])) if varies_V.any() else 0.0


def _brightest_third(percent_T: np.ndarray) -> str:
    if len(percent_T) < len(THIRDS):
        return "none"
    means = [float(part.mean()) for part in np.array_split(percent_T, len(THIRDS))]
    second, first = sorted(means)[-2:]
    return THIRDS[means.index(first)] if first - second >= BRIGHTEST_MARGIN else "none"
