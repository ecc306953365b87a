"""Frames by NVIDIA DALI: on a GPU everything but the reading, on a CPU the same operators.

Threads read raw voxels and pass them, as they are stored, to a pipeline that windows, resizes, varies and normalises
them. `reference.py` says what comes out. Frames of one pass may have any shapes; the pipeline is made once and holds
nothing from one pass to the next: each frame brings along all that its pixels depend on.

DALI's own readers go over a list of files that is fixed when the pipeline is built. Here every step asks for other
slices of other files, hence an external source.

Shape suffixes: N frames, P planes (1 or 3), C channels, H and W pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, math, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from megamed.data.frames import reference
from megamed.data.frames.augment import Augmentation
from megamed.data.frames.config import FramesConfig, LoaderConfig
from megamed.data.frames.gds import DirectReader
from megamed.data.frames.loader import augmentation_of
from megamed.data.frames.raw import RawFrame, RawReader, raw_frame
from megamed.data.frames.spec import Seeds, StudyFrame

_INTERPOLATION = {"linear": types.DALIInterpType.INTERP_LINEAR, "cubic": types.DALIInterpType.INTERP_CUBIC}


@dataclass(frozen=True)
class _Kind:
    """What frames of one pipeline have in common.

    Attributes:
        dtype: of the voxels.
        planes: that are resized.
        is_varied: whether there is an augmentation.
        is_direct: whether the voxels are on the GPU already.
    """

    dtype: str
    planes: int
    is_varied: bool
    is_direct: bool


@dataclass(frozen=True, eq=False)
class _Item:
    """A frame on its way: its place in the result, what was read of it, its augmentation."""

    place: int
    raw: RawFrame
    change: Augmentation | None

    @property
    def kind(self) -> _Kind:
        voxels = self.raw.voxels_CHW
        return _Kind(str(voxels.dtype), len(self.raw.windows), self.change is not None, isinstance(voxels, Tensor))


class DaliLoader:
    """A `FrameLoader` by DALI.

    Args:
        config: how frames are made.
        loader: by what.
        size: edge of a frame in pixels.
        device: where frames are wanted, and made.
        threads: that read, and as many of DALI's.

    Raises:
        UserError: GPUDirect Storage is asked for and not there.
    """

    def __init__(self, config: FramesConfig, loader: LoaderConfig, size: int, device: torch.device, threads: int):
        self._config, self._loader, self._size, self._device = config, loader, size, device
        self._threads = threads
        self._margin = partial(reference.margin, size=size, interpolation=config.interpolation)
        self._reader = RawReader()
        # A stream of its own: on the one that training uses, frames made ahead would wait for the step under way.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._direct = DirectReader(device, self._stream) if loader.gds else None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="frames")
        self._pipelines: dict[_Kind, Pipeline] = {}
        self._lock = threading.Lock()

    def load(self, frames: Sequence[StudyFrame], seeds: Seeds = None) -> Tensor:
        """See `FrameLoader.load`."""
        consumer = torch.cuda.current_stream(self._device) if self._stream else None
        with self._lock, torch.cuda.stream(self._stream):
            frames_NCHW = torch.empty(len(frames), 3, self._size, self._size, device=self._device)
            self._fill(frames_NCHW, frames, seeds)
        if consumer:  # the memory is another stream's: it must not be taken again while this one works on it
            frames_NCHW.record_stream(consumer)
        return frames_NCHW

    def _fill(self, frames_NCHW: Tensor, frames: Sequence[StudyFrame], seeds: Seeds) -> None:
        """Read and make frames, `batch` at a time: the next ones are read while DALI works on these."""

        def read(place: int) -> _Item:
            return self._read(place, frames[place], seeds[place] if seeds else None)

        self._reader.expect(frames)
        step = self._loader.batch
        ahead = [self._pool.submit(read, place) for place in range(min(step, len(frames)))]
        for first in range(0, len(frames), step):
            items = [future.result() for future in ahead]
            following = range(first + step, min(first + 2 * step, len(frames)))
            ahead = [self._pool.submit(read, place) for place in following]
            by_kind: dict[_Kind, list[_Item]] = {}
            for item in items:
                by_kind.setdefault(item.kind, []).append(item)
            for kind, alike in by_kind.items():
                self._make(kind, alike, frames_NCHW)

    def _read(self, place: int, frame: StudyFrame, seed: int | None) -> _Item:
        change = augmentation_of(self._config.augment, frame, seed, self._size)
        stretch = self._reader.stretch(frame) if self._direct else None
        if self._direct is None or stretch is None:
            return _Item(place, self._reader.read(frame, self._margin), change)
        return _Item(place, raw_frame(frame, self._direct.read(stretch), None), change)

    def _make(self, kind: _Kind, items: list[_Item], frames_NCHW: Tensor) -> None:
        """Send frames of one kind through their pipeline, and put them into their places."""
        if kind not in self._pipelines:
            self._pipelines[kind] = self._build(kind)
        pipeline = self._pipelines[kind]
        try:
            (made,) = pipeline.run(self._stream, **_inputs(items, kind.is_varied))
        except BaseException:  # what DALI raises leaves a pipeline that cannot be used again
            del self._pipelines[kind]
            raise
        made_NCHW = torch.empty(len(items), *frames_NCHW.shape[1:], device=self._device)
        feed_ndarray(made.as_tensor(), made_NCHW, cuda_stream=self._stream)
        frames_NCHW[torch.tensor([item.place for item in items], device=self._device)] = made_NCHW
        if self._stream:  # DALI writes over what it made in its next pass
            self._stream.synchronize()

    def _build(self, kind: _Kind) -> Pipeline:
        on_gpu = self._device.type == "cuda"
        device_id = (self._device.index or 0) if on_gpu else None
        pipeline = Pipeline(
            batch_size=self._loader.batch, num_threads=self._threads, device_id=device_id, prefetch_queue_depth=1
        )

        def given(name: str, **options: Any) -> Any:
            return fn.external_source(name=name, **options)

        def here(node: Any) -> Any:
            return node.gpu() if on_gpu else node

        with pipeline:
            if kind.is_direct:
                voxels = given("voxels", layout="CHW", device="gpu", no_copy=True)
            else:  # where a GPU is to read them, DALI's threads copy them into page-locked memory
                voxels = here(given("voxels", layout="CHW", no_copy=True))
            planes: Any = math.clamp(voxels * here(given("scale")) + here(given("shift")), 0.0, 1.0)
            planes = fn.resize(
                planes, size=[self._size, self._size], interp_type=_INTERPOLATION[self._config.interpolation],
                antialias=True, roi_start=given("box_start"), roi_end=given("box_end"),
            )
            if self._config.interpolation == "cubic":
                planes = math.clamp(planes, 0.0, 1.0)
            if kind.is_varied:
                planes = fn.transpose(planes, perm=[1, 2, 0], output_layout="HWC")
                planes = fn.warp_affine(planes, matrix=given("matrix"), fill_value=0.0)
                planes = (planes ** here(given("gamma")) - 0.5) * here(given("contrast")) + here(given("level"))
                planes = math.clamp(planes + here(given("noise")), 0.0, 1.0)
                planes = fn.transpose(planes, perm=[2, 0, 1], output_layout="CHW")
            scale, shift = (np.array(values, np.float32).reshape(3, 1, 1)
                            for values in (reference.NORMAL_SCALE, reference.NORMAL_SHIFT))
            device = "gpu" if on_gpu else "cpu"
            pipeline.set_outputs(planes * types.Constant(scale, device=device) + types.Constant(shift, device=device))
        pipeline.build()
        return pipeline


def _inputs(items: Sequence[_Item], is_varied: bool) -> dict[str, list[Any]]:
    """What a pipeline is given, by name."""

    def column(*values: float) -> np.ndarray:
        return np.array(values, np.float32).reshape(-1, 1, 1)

    inputs: dict[str, list[Any]] = {
        "voxels": [item.raw.voxels_CHW for item in items],
        "scale": [column(*(1 / (high - low) for low, high in item.raw.windows)) for item in items],
        "shift": [column(*(-low * (1 / (high - low)) for low, high in item.raw.windows)) for item in items],
        "box_start": [np.array(item.raw.box[:2], np.float32) for item in items],
        "box_end": [np.add(item.raw.box[:2], item.raw.box[2:], dtype=np.float32) for item in items],
    }
    if is_varied:
        changes = [item.change for item in items if item.change is not None]
        inputs |= {
            "matrix": [change.matrix for change in changes],
            "gamma": [column(change.gamma) for change in changes],
            "contrast": [column(change.contrast) for change in changes],
            "level": [column(0.5 + change.brightness) for change in changes],
            "noise": [change.noise_HW[..., None] for change in changes],
        }
    return inputs
