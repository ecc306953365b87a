"""Which source a configuration asks for, built."""

from __future__ import annotations

from collections.abc import Sequence

from megamed.data.config import DataConfig, validate
from megamed.data.fmri.run import read_run
from megamed.data.fmri.source import FmriSource
from megamed.data.series import SeriesInfo
from megamed.data.source import MicrobatchSource
from megamed.data.specialties import Specialties, Specialty
from megamed.data.tokenizer import TextTokenizer


def build_source(
    config: DataConfig, tokenizer: TextTokenizer, image_size: int, tokens_per_frame: int, document_multiple: int = 1,
    specialties: Sequence[Specialty] = (),
) -> MicrobatchSource:
    """The source of training rows and held-out questions: of a volume store and samples, or of an fMRI run.

    Args:
        config: what to build.
        tokenizer: makes the text's tokens.
        image_size: edge of a frame in pixels.
        tokens_per_frame: visual tokens of one frame.
        document_multiple: documents are filled up to a multiple of it.
        specialties: what samples may call, in the model's order.

    Raises:
        UserError: a value out of range; no store, run, series or sample; a sample that cannot be used.
    """
    validate(config)
    if config.store or config.datasets:
        from megamed.data.stream.studies import build_studies  # a run needs neither DALI nor Parquet

        return build_studies(config, tokenizer, image_size, tokens_per_frame, document_multiple, specialties)
    run = read_run(config.path)
    info = SeriesInfo(modality="MR", kind="run", body_part="BRAIN", keywords=("brain", "fmri"))
    called = Specialties(specialties).of_series(info)
    return FmriSource(run, config, tokenizer, image_size, tokens_per_frame, document_multiple, called)
