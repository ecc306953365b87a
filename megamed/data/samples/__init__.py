"""Samples: conversations with pictures, films and studies, one JSON object a line."""

from megamed.data.samples.schema import FrameChoice, Message, Sample, StudyRef

__all__ = ["FrameChoice", "Message", "Sample", "StudyRef"]
