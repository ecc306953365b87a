"""What a data source is built from: the run or the store, the tokenizer, and the shape of a sample."""

from dataclasses import dataclass, field
from typing import Literal

from megamed.data.frames import FramesConfig, LoaderConfig, validate_frames, validate_loader
from megamed.utils import UserError

# Thirds of a stretch, a drift and a temporal SNR need at least this many volumes.
FEWEST_VOLUMES = 3


REPORTS, FACTS = "reports", "facts"
"""As a data set's path: the store's own samples, which its reports make, and questions about its series."""


@dataclass
class DatasetConfig:
    """One of several data sets.

    Attributes:
        name: names it in logs and checkpoints.
        path: a JSON Lines file of samples; `reports` for those that the store's reports make; or `facts` for questions
            about what the store knows of its series.
        weight: how many of its samples come, relative to the other data sets'.
    """

    name: str
    path: str
    weight: float = 1.0


@dataclass
class PackingConfig:
    """How samples share rows.

    Attributes:
        rows_per_block: rows' worth of samples that are packed together. More of them fill rows better, and take longer
            before the first step.
        max_documents: most samples of a row; null for no bound, 1 gives each a row of its own.
    """

    rows_per_block: int = 32
    max_documents: int | None = None


@dataclass
class DataConfig:
    """Where the samples come from and what they look like.

    With a `store` or `datasets` they show studies, pictures and films; without, stretches of one fMRI run.

    Attributes:
        path: the fMRI run: a NIfTI file, a folder of DICOM files, or `nibabel:functional.nii`,
            the small real run that nibabel ships.
        tokenizer: `bytes` (256 bytes and the special tokens), or a folder with a Hugging Face
            `tokenizer.json`.
        seq_length: tokens in one packed row.
        seed: seed of the samples; with the microbatch's index it decides everything that is drawn.
        min_volumes: volumes in the shortest stretch of the run that a sample shows.
        max_volumes: volumes in the longest one.
        held_out: share that training never shows: of the run's volumes, at its end; of the store's patients.
        questions: question-answer pairs in a sample (fewer where fewer make sense).
        text_only: share of the samples without frames.
        store: the volume store, which tools/ingest.py makes.
        datasets: samples; where none are given, those of the store's reports, or `facts` where it has none.
        too_long: what becomes of a sample that is longer than a row: `fewer_frames` shows as many as fit, spread
            evenly; `skip` leaves it out; `refuse` ends the run. Text is never cut.
        packing: how samples share rows.
        frames: which frames of a study are shown, and how.
        loader: how pixels get onto the device.
        accept_changes: go on from a checkpoint though the data, or settings that decide about rows, have changed.
    """

    path: str = "nibabel:functional.nii"
    tokenizer: str = "bytes"
    seq_length: int = 512
    seed: int = 1234
    min_volumes: int = 3
    max_volumes: int = 8
    held_out: float = 0.25
    questions: int = 3
    text_only: float = 0.05
    store: str = ""
    datasets: list[DatasetConfig] = field(default_factory=list)
    too_long: Literal["fewer_frames", "skip", "refuse"] = "fewer_frames"
    packing: PackingConfig = field(default_factory=PackingConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    accept_changes: bool = False


def validate(config: DataConfig) -> None:
    """Check every value that the config alone can judge.

    Raises:
        UserError: a value is out of its range; the message names the key, the value and the range.
    """
    packing, names = config.packing, [dataset.name for dataset in config.datasets]
    rules = (
        ("path", config.path, bool(config.path), "a NIfTI file, a DICOM folder or nibabel:functional.nii"),
        ("tokenizer", config.tokenizer, bool(config.tokenizer), "'bytes' or a folder with tokenizer.json"),
        ("seq_length", config.seq_length, config.seq_length >= 2, "at least 2"),
        ("seed", config.seed, config.seed >= 0, "0 or more"),
        ("min_volumes", config.min_volumes, config.min_volumes >= FEWEST_VOLUMES,
         f"at least {FEWEST_VOLUMES}, because a stretch is asked about in thirds"),
        ("max_volumes", config.max_volumes, config.max_volumes >= config.min_volumes,
         f"at least data.min_volumes = {config.min_volumes}"),
        ("held_out", config.held_out, 0.0 <= config.held_out < 1.0, "from 0 to below 1"),
        ("questions", config.questions, config.questions >= 1, "at least 1"),
        ("text_only", config.text_only, 0.0 <= config.text_only <= 1.0, "from 0 to 1"),
        ("packing.rows_per_block", packing.rows_per_block, packing.rows_per_block >= 1, "at least 1"),
        ("packing.max_documents", packing.max_documents, packing.max_documents is None or packing.max_documents >= 1,
         "at least 1, or null"),
        *((f"datasets[{i}].weight", d.weight, d.weight > 0, "above 0") for i, d in enumerate(config.datasets)),
        *((f"datasets[{i}].name", d.name, is_name(d.name), "of letters, digits, - and _")
          for i, d in enumerate(config.datasets)),
        ("datasets", names, len(set(names)) == len(names), "a list in which each name comes once"),
    )
    for key, value, holds, wanted in rules:
        if not holds:
            raise UserError(f"data.{key} is {value!r}; it has to be {wanted}", everywhere=True)
    validate_frames(config.frames)
    validate_loader(config.loader)


def is_name(text: str) -> bool:
    """Whether a text can name a data set: it stands in front of line numbers in logs."""
    return text.replace("-", "").replace("_", "").isalnum()
