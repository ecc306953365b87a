"""Frames: which of a study are shown, through which windows, and their pixels on the device."""

from megamed.data.frames.spec import MOSAIC, StudyFrame, Window

__all__ = ["MOSAIC", "StudyFrame", "Window"]
