"""Models that came from nowhere else, and specialists: what transformers can represent it loads, the rest is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import InternVLForConditionalGeneration

from megamed.checkpoint import find_checkpoint
from megamed.checkpoint.card import describe_model, differing_key
from megamed.checkpoint.hf.convert import export_folder, import_folder, open_folder
from megamed.models.families import family_of
from megamed.models.families.internvl.config import write_config
from megamed.models.language import RotaryConfig
from megamed.models.moe import MoEConfig, PoolConfig
from megamed.models.vlm import VLMConfig
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.utils import UserError
from tests.checkpoint.hf.folders import IMAGE_TOKEN, beside, release
from tests.checkpoint.hf.test_original import TOLERANCE, asked_of, documents
from tests.checkpoint.small_models import SEQ_LENGTH, build, logits_of, save

POOLS = {"general": PoolConfig(2), "chest": PoolConfig(2)}
EXPERTS = MoEConfig(pools=POOLS, top_k=2, intermediate_size=48)


def model(**language: Any) -> VLMConfig:
    config = tiny_vlm(num_layers=2)
    config.language = replace(config.language, **{"moe": MoEConfig(), "qk_norm": False, **language})
    return config


REPRESENTED = {
    "llama": model(),
    "llama, tied": model(tie_embeddings=True),
    "qwen2": model(qkv_bias=True),
    "qwen3": model(qk_norm=True, rotary=RotaryConfig(1e4, "yarn", 4.0, original_max_positions=128)),
    "qwen3_moe": model(qk_norm=True, moe=MoEConfig(num_experts=4, intermediate_size=48, first_dense_layers=1)),
    "mixtral": model(moe=EXPERTS),
}


def _logits(config: VLMConfig, checkpoint: str) -> np.ndarray:
    job, manager = build(config, Path(checkpoint) / "unused", {}, seed=77)
    manager.start_from(checkpoint)
    return logits_of(job, (0,), SyntheticSource(SEQ_LENGTH, vocab_size=IMAGE_TOKEN))


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "mixtral"])
def test_transformers_loads_what_was_trained_here(name: str, tmp_path: Path, ranks: Any) -> None:
    config = REPRESENTED[name]
    ranks.run(save, 1, config, str(tmp_path), 5)
    checkpoint = find_checkpoint(tmp_path, "")
    with pytest.raises(UserError, match="no tokenizer with <IMG_CONTEXT> is beside it"):
        export_folder(checkpoint, tmp_path / "hf")
    (tmp_path / "tokenizer").mkdir()
    beside(tmp_path / "tokenizer")
    export_folder(checkpoint, tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]["model_type"] == name
    loaded = InternVLForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours, at = ranks.run(_logits, 1, config, str(checkpoint))[0], 0
    for index in range(2):
        for tokens, places, frames, _ in documents(index):
            with torch.no_grad():
                theirs = loaded(**asked_of(tokens, places, frames)).logits[0].numpy()
            np.testing.assert_allclose(ours[at : at + len(tokens)], theirs, atol=TOLERANCE, rtol=0)
            at += len(tokens)


@pytest.mark.parametrize("name", REPRESENTED)
def test_settings_come_back(name: str) -> None:
    config = write_config(REPRESENTED[name], IMAGE_TOKEN, "float32")
    assert config["text_config"]["model_type"] == name.partition(",")[0]
    back = family_of(config).read_config(config, ())
    wanted = REPRESENTED[name]
    if wanted.language.moe.pools:  # there they are experts without names
        wanted = replace(wanted, language=replace(wanted.language, moe=replace(EXPERTS, pools={}, num_experts=4)))
    # Widths that a decoder does not tell apart, in a model without such layers.
    if name == "mixtral":
        wanted = replace(wanted, language=replace(wanted.language, intermediate_size=48))
    now, was = describe_model(back), describe_model(wanted)
    for described in (now, was):
        described["language.head_dim"] = described["language.head_dim"] or 16
    assert differing_key(now, was) is None


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ({"moe": replace(EXPERTS, routing="soft")}, "no decoder with routing=soft.*extract_specialist.py"),
        ({"moe": replace(EXPERTS, score_function="sigmoid")}, "no decoder with sigmoid scores"),
        ({"moe": replace(EXPERTS, balance="bias")}, "no decoder with a bias on the choice"),
        ({"moe": replace(EXPERTS, top_k=1)}, "no decoder with top_k=1"),
        ({"moe": replace(EXPERTS, shared_intermediate_size=32)}, "no decoder with a shared expert without a gate"),
        ({"moe": EXPERTS, "qkv_bias": True}, "no decoder with qkv_bias beside experts"),
        ({"qk_norm": True, "qkv_bias": True}, "no decoder with both qkv_bias and qk_norm"),
        ({"rotary": RotaryConfig(1e4, "ntk", 2.0)}, "no RoPE with scaling=ntk"),
    ],
)
def test_what_transformers_has_not_is_named(language: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_config(model(**language), IMAGE_TOKEN, "float32")


def test_a_model_that_got_experts_leaves_the_releases_format(tmp_path: Path, ranks: Any) -> None:
    (tmp_path / "hf").mkdir()
    release(tmp_path / "hf", "internlm2", torch.float32)
    import_folder(tmp_path / "hf", tmp_path / "dense", {})
    dense = open_folder(tmp_path / "hf").model
    ranks.run(save, 1, replace(dense, language=replace(dense.language, moe=EXPERTS)), str(tmp_path / "run"), 3)
    (tmp_path / "dense" / "hf").rename(tmp_path / "run" / "hf")
    export_folder(find_checkpoint(tmp_path / "run", ""), tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["model_type"], config["text_config"]["model_type"], config["image_token_id"]) == (
        "internvl", "mixtral", IMAGE_TOKEN
    )  # fmt: skip
    assert not (tmp_path / "new" / "modeling.py").exists(), "code of another model"
    assert (tmp_path / "new" / "tokenizer.json").exists()
