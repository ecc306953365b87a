"""What a data source is built from: the run, the tokenizer, and the shape of a sample."""

from dataclasses import dataclass

from megamed.utils import UserError

# Thirds of a stretch, a drift and a temporal SNR need at least this many volumes.
FEWEST_VOLUMES = 3


@dataclass
class DataConfig:
    """Where the samples come from and what they look like.

    Attributes:
        path: the fMRI run: a NIfTI file, a folder of DICOM files, or `nibabel:functional.nii`,
            the small real run that nibabel ships.
        tokenizer: `bytes` (256 bytes and the special tokens), or a folder with a Hugging Face
            `tokenizer.json`.
        seq_length: tokens in one packed row.
        seed: seed of the samples; with the microbatch's index it decides everything that is drawn.
        min_volumes: volumes in the shortest stretch of the run that a sample shows.
        max_volumes: volumes in the longest one.
        held_out: share of the run's volumes, at its end, that training never shows.
        questions: question-answer pairs in a sample (fewer where fewer make sense).
        text_only: share of the samples without frames.
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


def validate(config: DataConfig) -> None:
    """Check every value that the config alone can judge.

    Raises:
        UserError: a value is out of its range; the message names the key, the value and the range.
    """
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
    )
    for key, value, holds, wanted in rules:
        if not holds:
            raise UserError(f"data.{key} is {value!r}; it has to be {wanted}", everywhere=True)
