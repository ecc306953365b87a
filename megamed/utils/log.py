"""Logging: one line a message, on standard error, with rank 0 alone saying what all would say."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

HANDLER = "megamed"

# What Megatron-core says while it is imported about packages that are optional, and that megamed
# reports itself where they matter. Matched from the message's first character.
IMPORT_WARNINGS = (
    r"Transformer Engine and Apex are not installed\. Falling back to ",
    r"Apex is not installed\. Falling back to Torch Norm",
    r"absl\.logging is not installed\. Using logging\.getLogger",
)
# What Megatron's calls bring up while a model is built and trained: newer names of torch functions that
# Megatron calls by their old ones, and reads of `.grad` that it means.
RUN_WARNINGS = (
    (r"full scope is deprecated", UserWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
)
# torch, when it finds a CUDA toolkit without a GPU.
TORCH_EXTENSION_LOGGER = "torch.utils.cpp_extension"
TORCH_EXTENSION_MESSAGE = "No CUDA runtime is found"


def setup(rank: int, level: int | str = logging.INFO) -> None:
    """Set up logging for this process; a second call replaces the first.

    Rank 0 logs megamed's messages from `level` up, every other rank only warnings and worse, each
    line with its rank in front. Other libraries log warnings and worse on every rank.

    Args:
        rank: this process's rank in the world.
        level: the lowest level that rank 0 shows, as `logging` names or numbers it.
    """
    prefix = f"[rank {rank}] " if rank > 0 else ""
    handler = logging.StreamHandler()
    handler.set_name(HANDLER)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == HANDLER]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for message, category in RUN_WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    own = logging.getLogger("megamed")
    own.setLevel(level)
    if rank > 0:
        own.setLevel(max(own.level, logging.WARNING))


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Drop the messages of Megatron's and torch's import that a user cannot act on, and only those."""
    torch_logger = logging.getLogger(TORCH_EXTENSION_LOGGER)
    torch_logger.addFilter(_is_actionable)
    try:
        with warnings.catch_warnings():
            for message in IMPORT_WARNINGS:
                warnings.filterwarnings("ignore", message, UserWarning, module=r"megatron[._]")
            yield
    finally:
        torch_logger.removeFilter(_is_actionable)


def _is_actionable(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(TORCH_EXTENSION_MESSAGE)
