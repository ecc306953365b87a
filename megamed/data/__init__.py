"""Data: from what a scanner wrote to packed training rows, frames and held-out questions.

What stands here is loaded when it is first used, so that ingest and its worker processes do without torch.
"""

# ruff: noqa: F401
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamed.data.batch import (
        LOSS_KINDS,
        QA,
        Document,
        Frame,
        Microbatch,
        conversation,
        pack,
        prompt,
    )
    from megamed.data.config import DataConfig, DatasetConfig, PackingConfig, validate
    from megamed.data.fmri.facts import RunFacts, measure
    from megamed.data.fmri.mosaic import mosaic_frames
    from megamed.data.fmri.questions import QUESTIONS, Question, ask
    from megamed.data.fmri.run import FmriRun, read_run
    from megamed.data.fmri.source import FmriSource, FrameRef
    from megamed.data.source import HeldOutItem, MicrobatchSource
    from megamed.data.stream.build import build_source
    from megamed.data.stream.source import StudySource
    from megamed.data.tokenizer import TextTokenizer, load_tokenizer

# Which module has what.
_MODULES = {
    "batch": ("LOSS_KINDS", "QA", "Document", "Frame", "Microbatch", "conversation", "pack", "prompt"),
    "config": ("DataConfig", "DatasetConfig", "PackingConfig", "validate"),
    "fmri.facts": ("RunFacts", "measure"),
    "fmri.mosaic": ("mosaic_frames",),
    "fmri.questions": ("QUESTIONS", "Question", "ask"),
    "fmri.run": ("FmriRun", "read_run"),
    "fmri.source": ("FmriSource", "FrameRef"),
    "source": ("HeldOutItem", "MicrobatchSource"),
    "stream.build": ("build_source",),
    "stream.source": ("StudySource",),
    "tokenizer": ("TextTokenizer", "load_tokenizer"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
