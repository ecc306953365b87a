"""Data: from an fMRI run on disk to packed training rows, frames and held-out questions."""

from megamed.data.batch import LOSS_KINDS, Document, FrameRef, Microbatch, conversation, pack, prompt
from megamed.data.config import DataConfig, validate
from megamed.data.facts import RunFacts, measure
from megamed.data.fmri import FmriSource
from megamed.data.frames import mosaic_frames
from megamed.data.questions import QA, QUESTIONS, Question, ask
from megamed.data.source import HeldOutItem, MicrobatchSource
from megamed.data.tokenizer import TextTokenizer, load_tokenizer
from megamed.data.volumes import FmriRun, read_run

__all__ = [
    "LOSS_KINDS",
    "QA",
    "QUESTIONS",
    "DataConfig",
    "Document",
    "FmriRun",
    "FmriSource",
    "FrameRef",
    "HeldOutItem",
    "Microbatch",
    "MicrobatchSource",
    "Question",
    "RunFacts",
    "TextTokenizer",
    "ask",
    "conversation",
    "load_tokenizer",
    "measure",
    "mosaic_frames",
    "pack",
    "prompt",
    "read_run",
    "validate",
]
