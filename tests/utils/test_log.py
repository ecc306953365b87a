"""Logging by rank, and the import messages that are kept off the screen."""

import logging
import subprocess
import sys

import pytest

from megamed.utils import log


@pytest.fixture(autouse=True)
def clean():
    root, own = logging.getLogger(), logging.getLogger("megamed")
    levels = root.level, own.level
    yield
    root.setLevel(levels[0])
    own.setLevel(levels[1])
    for handler in [handler for handler in root.handlers if handler.get_name() == log.HANDLER]:
        root.removeHandler(handler)


def say_everything():
    logging.getLogger("megamed.train").debug("detail")
    logging.getLogger("megamed.train").info("loss 3.1")
    logging.getLogger("megamed.train").warning("slow")
    logging.getLogger("another.library").info("chatter")
    logging.getLogger("another.library").warning("trouble")


def said(capsys):
    """The lines on standard error, without their times."""
    return [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]


def test_rank_0_says_what_all_would_say(capsys):
    log.setup(0)
    say_everything()
    assert said(capsys) == ["INFO loss 3.1", "WARNING slow", "WARNING trouble"]


def test_other_ranks_only_warn_and_say_who_they_are(capsys):
    log.setup(3, "DEBUG")
    say_everything()
    assert said(capsys) == ["[rank 3] WARNING slow", "[rank 3] WARNING trouble"]


def test_the_level_can_be_chosen(capsys):
    log.setup(0, "DEBUG")
    say_everything()
    assert said(capsys)[:2] == ["DEBUG detail", "INFO loss 3.1"]
    log.setup(1, logging.ERROR)
    say_everything()
    assert said(capsys) == ["[rank 1] WARNING trouble"]


def test_a_second_setup_replaces_the_first(capsys):
    log.setup(0)
    log.setup(0)
    logging.getLogger("megamed").info("once")
    assert said(capsys) == ["INFO once"]


def test_megatrons_import_is_quiet_and_other_warnings_are_not():
    script = """
import warnings
from megamed.utils.log import quiet_imports
with quiet_imports():
    import megatron.core
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    warnings.warn("Apex is not installed. Falling back to Torch Norm")
    warnings.warn_explicit("another message", UserWarning, "spec.py", 1, module="megatron.core.spec")
warnings.warn_explicit("Apex is not installed. Falling back to Torch Norm", UserWarning, "end.py", 1,
                       module="megatron.core.end")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # Of the imports nothing; of the rest, the known message from elsewhere, an unknown one from Megatron,
    # and a known one after the block.
    assert [line.partition("UserWarning: ")[2] for line in done.stderr.splitlines()] == [
        "Apex is not installed. Falling back to Torch Norm", "another message",
        "Apex is not installed. Falling back to Torch Norm"]


def test_torchs_notice_of_a_toolkit_without_a_gpu_is_dropped(caplog):
    torch_logger = logging.getLogger(log.TORCH_EXTENSION_LOGGER)
    notice = "No CUDA runtime is found, using CUDA_HOME='/usr/local/cuda'"
    with log.quiet_imports():
        torch_logger.warning(notice)
        torch_logger.warning("the compiler is too old")
    torch_logger.warning(notice)
    assert caplog.messages == ["the compiler is too old", notice]
