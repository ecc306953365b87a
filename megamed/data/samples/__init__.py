"""Samples: conversations with pictures, films and studies, one JSON object a line."""

from megamed.data.samples.file import SampleFile, load
from megamed.data.samples.from_reports import from_reports
from megamed.data.samples.parse import Problem, parse
from megamed.data.samples.schema import FrameChoice, Message, Sample, StudyRef

__all__ = ["FrameChoice", "Message", "Problem", "Sample", "SampleFile", "StudyRef", "from_reports", "load", "parse"]
