"""`init.hf`: sizes and tokenizer are the folder's, what decides about training stays as it is set."""

from pathlib import Path

import pytest
import torch

from megamed.train import JobConfig
from megamed.train.run import adopt_hf
from megamed.utils import UserError
from tests.checkpoint.hf.folders import release


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    release(folder, "qwen3_moe", torch.bfloat16, is_large=False)
    return folder


def test_sizes_are_the_folders_and_training_is_ours(folder: Path) -> None:
    config = JobConfig()
    config.init.hf = str(folder)
    config.model.language.recompute, config.model.frames_in_flight = True, 7
    config.model.language.moe.aux_loss_coeff = 0.5
    adopt_hf(config)
    language = config.model.language
    assert (language.hidden_size, language.num_layers, language.vocab_size, language.qk_norm) == (64, 2, 250, True)
    assert (language.moe.num_experts, language.moe.top_k, language.moe.intermediate_size) == (4, 2, 48)
    assert (config.model.vision.hidden_size, config.model.vision.qkv_bias) == (32, True)
    assert (language.recompute, config.model.frames_in_flight, language.moe.aux_loss_coeff) == (True, 7, 0.5)
    assert config.data.tokenizer == str(folder)


def test_a_tokenizer_that_is_set_stays(folder: Path) -> None:
    config = JobConfig()
    config.init.hf, config.data.tokenizer = str(folder), "elsewhere"
    adopt_hf(config)
    assert config.data.tokenizer == "elsewhere"


def test_two_beginnings_are_refused(folder: Path) -> None:
    config = JobConfig()
    config.init.hf, config.init.checkpoint = str(folder), "runs/x"
    with pytest.raises(UserError, match="init.hf and init.checkpoint are both set"):
        adopt_hf(config)


def test_without_it_nothing_changes() -> None:
    config = JobConfig()
    adopt_hf(config)
    assert config == JobConfig()
