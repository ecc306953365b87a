"""Published models at full size, on the meta device: every name and shape, and the number of parameters to the last.

The reference is transformers' own model of the same sizes. InternLM2 is the Llama there that it is but for names.
"""

import math
from typing import Any

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megamed.checkpoint.hf.names import name_of
from megamed.checkpoint.rewrite import Piece, one_process, outline
from megamed.models.families import family_of
from megamed.models.families.internvl.config import write_config
from megamed.models.vlm import VLMConfig
from tests.models.families.published import CHATS, NATIVES

Shapes = dict[str, tuple[int, ...]]


def ours(model: VLMConfig) -> Shapes:
    """Our parameters, with the vocabulary's padding."""
    with one_process() as mesh:
        pieces = [piece for piece in outline(model, mesh, torch.bfloat16) if isinstance(piece, Piece)]
    return {name_of(p.name, p.stack): p.whole[len(p.stack) :] for p in pieces}


def theirs(config: dict[str, Any], model: VLMConfig, names: tuple[str, ...] = ()) -> Shapes:
    """The tensors of a folder that follow from our parameters."""
    family = family_of(config)
    table, found = family.table(model, family.decoder_of(config), names), {}
    for name, shape in ours(model).items():
        line = table.of_ours(name)
        assert line is not None, name
        for other, rows in zip(line.theirs, line.line.joined(shape[0]).sizes(), strict=True):
            assert other not in found
            found[other] = (rows, *shape[1:])
    return found


def of_transformers(config: dict[str, Any]) -> Shapes:
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(InternVLConfig(**config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def size(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("name", NATIVES)
def test_names_and_shapes_of_transformers(name: str) -> None:
    config = NATIVES[name]
    wanted = of_transformers({**config, "tie_word_embeddings": False})
    model = family_of(config).read_config(config, ())
    found = theirs(config, model, tuple(wanted))
    experts = {key: wanted.pop(key) for key in list(wanted) if ".mlp.experts." in key}
    fused = {key: found.pop(key) for key in list(found) if ".mlp.experts." in key}
    assert found == wanted
    # Modules have the experts of a layer in one tensor, files one by one.
    assert size(fused) == size(experts)
    if experts:
        layers, per_layer = model.language.num_layers, 3 * model.language.moe.num_experts
        assert len(fused) == layers * per_layer
        assert fused["model.language_model.layers.47.mlp.experts.127.gate_proj.weight"] == (768, 2048)


@pytest.mark.parametrize("name", CHATS)
def test_the_releases_have_as_many_parameters(name: str) -> None:
    config = CHATS[name]
    model = family_of(config).read_config(config, ())
    found = theirs(config, model)
    assert size(found) == size(of_transformers(write_config(model, 0, "bfloat16")))
    # Of the releases' own code: names of the tower, of the projector, and of the language model's ends.
    layers, hidden = model.vision.num_layers, model.vision.hidden_size
    assert found[f"vision_model.encoder.layers.{layers - 1}.attn.qkv.weight"] == (3 * hidden, hidden)
    assert ("vision_model.encoder.layers.0.attn.q_norm.weight" in found) == (hidden == 3200)
    assert found["mlp1.1.weight"] == (model.language.hidden_size, 4 * hidden)
    output = "output" if config["llm_config"]["model_type"] == "internlm2" else "lm_head"
    assert found[f"language_model.{output}.weight"] == (model.language.vocab_size, model.language.hidden_size)


def test_the_sizes_that_were_published() -> None:
    """By the releases' model cards, in billions."""
    sizes = {name: size(theirs(config, family_of(config).read_config(config, ()))) for name, config in CHATS.items()}
    assert {name: round(number / 1e9, 1) for name, number in sizes.items()} == {
        "InternVL-Chat-V1-5": 25.5, "InternVL2-8B": 8.1, "InternVL2_5-26B": 25.5, "InternVL3-8B": 7.9,
        "InternVL3-78B": 78.4, "InternVL3_5-8B": 8.5, "InternVL3_5-30B-A3B": 30.8,
    }  # fmt: skip
