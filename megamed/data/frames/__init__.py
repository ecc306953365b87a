"""Frames: which of a study are shown, through which windows, and their pixels on the device.

Nothing here imports torch; the loaders do (`megamed.data.frames.loader`).
"""

from megamed.data.frames.config import FramesConfig, LoaderConfig, validate_frames, validate_loader
from megamed.data.frames.spec import MOSAIC, FrameLoader, PlannedStudy, Seeds, StudyFrame, Window
from megamed.data.frames.windows import WINDOWS

__all__ = [
    "MOSAIC",
    "WINDOWS",
    "FrameLoader",
    "FramesConfig",
    "LoaderConfig",
    "PlannedStudy",
    "Seeds",
    "StudyFrame",
    "Window",
    "validate_frames",
    "validate_loader",
]
