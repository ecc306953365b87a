"""Frames as tensors on the device: which loader is taken, and the one by NumPy.

Shape suffixes: N frames, C channels, H and W pixels.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megamed.data.frames import reference
from megamed.data.frames.augment import Augmentation, draw
from megamed.data.frames.config import AugmentConfig, FramesConfig, LoaderConfig, validate_frames, validate_loader
from megamed.data.frames.raw import RawReader
from megamed.data.frames.spec import FrameLoader, Seeds, StudyFrame
from megamed.utils import UserError
from megamed.utils.optional import optional_import, require

logger = logging.getLogger("megamed.data")

DALI = "nvidia.dali"
INSTALL_DALI = "pip install nvidia-dali-cuda130"

# Of the last frames, memory that is kept for the next ones.
_KEPT_BYTES = 1 << 28

# More do not make a rank's frames any sooner than its GPU takes them.
_MOST_THREADS = 8

def build_loader(
    frames: FramesConfig, loader: LoaderConfig, size: int, device: torch.device | str = "cpu"
) -> FrameLoader:
    """The loader that the configuration asks for.

    Args:
        frames: how frames are made.
        loader: by what.
        size: edge of a frame in pixels.
        device: where frames are wanted.

    Raises:
        UserError: a value out of its range, or what is asked for is not there: DALI, a GPU for `gds`.
    """
    validate_frames(frames)
    validate_loader(loader)
    device = torch.device(device)
    if frames.augment.enabled and frames.augment.flip_lr:
        logger.warning("data.frames.augment.flip_lr mirrors left and right: what reports say of sides is wrong then")
    wanted = loader.backend
    if frames.interpolation == "pillow":
        if wanted == "dali" or loader.gds:
            raise UserError(
                "data.frames.interpolation=pillow is nothing that DALI does; set data.loader.backend=numpy, gds=false",
                everywhere=True,
            )
        wanted = "numpy"
    if wanted == "auto" and not loader.gds:
        wanted = "numpy"
        if device.type == "cuda":
            wanted = "dali" if optional_import(DALI) is not None else "numpy"
            if wanted == "numpy":
                logger.info("nvidia-dali is not installed; frames are made by NumPy on the CPU (%s)", INSTALL_DALI)
    if wanted == "numpy":
        return NumpyLoader(frames, size, device, num_threads(loader), loader.pinned)
    require(DALI, "data.loader.backend=dali", INSTALL_DALI)
    from megamed.data.frames.dali_loader import DaliLoader  # DALI is optional

    return DaliLoader(frames, loader, size, device, num_threads(loader))


def num_threads(config: LoaderConfig) -> int:
    """Threads of this rank: what is set, or its share of the cores that it may use with the ranks beside it."""
    if config.threads:
        return config.threads
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))


def augmentation_of(config: AugmentConfig, frame: StudyFrame, seed: int | None, size: int) -> Augmentation | None:
    """What is drawn for a frame; None where it is shown as it is."""
    return draw(config, seed, frame, size) if config.enabled and seed is not None else None


class NumpyLoader:
    """A `FrameLoader` by NumPy alone, a frame a thread.

    Args:
        config: how frames are made.
        size: edge of a frame in pixels.
        device: where frames are wanted.
        threads: that read and make frames.
        pinned: make frames for a GPU in page-locked memory.
    """

    def __init__(self, config: FramesConfig, size: int, device: torch.device, threads: int, pinned: bool):
        self._config, self._size, self._device = config, size, device
        self._pinned = pinned and device.type == "cuda"
        self._margin = partial(reference.margin, size=size, interpolation=config.interpolation)
        self._reader = RawReader()
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="frames")
        self._memory = _Memory()
        self._lock = threading.Lock()

    def load(self, frames: Sequence[StudyFrame], seeds: Seeds = None) -> Tensor:
        """See `FrameLoader.load`."""
        size = self._size
        if self._pinned:
            frames_NCHW = torch.empty(len(frames), 3, size, size, pin_memory=True)
        else:
            frames_NCHW = torch.from_numpy(self._memory.take(len(frames), 3, size, size))
        array_NCHW = frames_NCHW.numpy()

        def make(indices: Iterator[int]) -> None:
            for index in indices:
                frame = frames[index]
                change = augmentation_of(self._config.augment, frame, seeds[index] if seeds else None, size)
                raw = self._reader.read(frame, self._margin)
                reference.pixels(raw, self._config.interpolation, change, array_NCHW[index])

        with self._lock:
            self._reader.expect(frames)
            # Threads take frames from one iterator: a task for each frame would cost more than its reading.
            indices = iter(range(len(frames)))
            tasks = [self._pool.submit(make, indices) for _ in range(self._threads)]
            for task in wait(tasks).done:
                task.result()
        return frames_NCHW.to(self._device)


class _Memory:
    """Hands out memory, and takes it back when nothing refers to it any more.

    New memory of this size has to be cleared by the system first, which takes as long as a third of the arithmetic.
    """

    def __init__(self) -> None:
        self._free: np.ndarray | None = None

    def take(self, *shape: int) -> np.ndarray:
        """A float32 array of no particular values."""
        num_values = math.prod(shape)
        memory, self._free = self._free, None
        if memory is None or not num_values <= memory.size <= 2 * num_values:
            memory = np.empty(num_values, np.float32)
        array = memory[:num_values].reshape(shape)
        if memory.nbytes <= _KEPT_BYTES:
            weakref.finalize(array, self._take_back, memory).atexit = False
        return array

    def _take_back(self, memory: np.ndarray) -> None:
        self._free = memory
