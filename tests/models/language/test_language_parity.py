"""Megatron's GPTModel against transformers' decoders with the same random weights: values and gradients.

Shapes: S tokens of a packed row, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megamed.models.language import AttentionConfig, LanguageConfig, Packing, build_language_chunks
from megamed.models.language.hf import Family, from_hf, to_hf
from megamed.models.language.rotary import RotaryConfig
from megamed.models.projector import ProjectorConfig
from megamed.models.projector import hf as projector_hf
from megamed.models.vision import VisionConfig
from megamed.models.vision import hf as vision_hf
from megamed.models.vlm import FrameEncoder, embed_with_visual_tokens
from megamed.runtime import Mesh
from megamed.utils import UserError

# Both sides compute in float32 with values of order 1, and differ in the order of sums only (one product for
# q, k and v, one for gate and up; norms and attention written differently): some 1e-6 after three layers.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
VOCAB_SIZE = 250  # padded to 256
LENGTHS = (13, 9)
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A decoder of transformers, and ours of the same sizes."""

    family: Family
    theirs: Callable[[], PreTrainedModel]
    ours: LanguageConfig


def case(
    family: Family,
    ours: dict,
    theirs: dict,
    *,
    kv_heads: int,
    head_dim: int,
    rotary_base: float,
    norm_eps: float,
    tied: bool,
    stretch: dict | None = None,
) -> Case:
    """A tiny pair; `ours` and `theirs` are further settings of each side, `stretch` of our RoPE."""
    their_names = {"scaling": "rope_type", "original_max_positions": "original_max_position_embeddings"}
    their_stretch = {their_names.get(name, name): value for name, value in (stretch or {}).items()}
    model, config = CLASSES[family]
    their_config = config(
        vocab_size=VOCAB_SIZE, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, intermediate_size=80, rms_norm_eps=norm_eps, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": rotary_base, **their_stretch},
        tie_word_embeddings=tied, **theirs,
    )  # fmt: skip
    our_config = LanguageConfig(
        vocab_size=VOCAB_SIZE, hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=kv_heads,
        head_dim=head_dim, intermediate_size=80, norm_eps=norm_eps, max_positions=64, tie_embeddings=tied,
        rotary=RotaryConfig(rotary_base, **(stretch or {})), **ours,
    )  # fmt: skip
    return Case(family, lambda: model(their_config), our_config)


CLASSES: dict[Family, tuple[type, type]] = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
# Heads, key/value heads, head width, RoPE base, epsilon and tying differ from case to case.
CASES = {
    "llama": case(
        "llama", {}, {"head_dim": 16},
        kv_heads=2, head_dim=16, rotary_base=5e5, norm_eps=1e-5, tied=False,
    ),
    "qwen2-bias-tied": case(
        "qwen2", {"qkv_bias": True}, {},
        kv_heads=1, head_dim=12, rotary_base=1e6, norm_eps=1e-6, tied=True,
    ),
    "qwen2-bias-every-head": case(
        "qwen2", {"qkv_bias": True}, {},
        kv_heads=4, head_dim=12, rotary_base=1e4, norm_eps=1e-6, tied=False,
    ),
    "qwen3-norm": case(
        "qwen3", {"qk_norm": True}, {"head_dim": 16},
        kv_heads=2, head_dim=16, rotary_base=1e6, norm_eps=1e-3, tied=False,
    ),
    "qwen3-norm-tied": case(
        "qwen3", {"qk_norm": True}, {"head_dim": 8},
        kv_heads=2, head_dim=8, rotary_base=1e4, norm_eps=1e-6, tied=True,
    ),
    "qwen2-yarn": case(
        "qwen2", {"qkv_bias": True}, {},
        kv_heads=2, head_dim=12, rotary_base=100.0, norm_eps=1e-6, tied=True,
        stretch=dict(scaling="yarn", factor=4.0, original_max_positions=16, beta_fast=2.0, beta_slow=0.25),
    ),
    "llama-llama3": case(
        "llama", {}, {"head_dim": 16},
        kv_heads=2, head_dim=16, rotary_base=100.0, norm_eps=1e-5, tied=False,
        stretch=dict(
            scaling="llama3", factor=4.0, original_max_positions=16, low_freq_factor=0.25, high_freq_factor=1.0
        ),
    ),
}  # fmt: skip


def randomise(module: nn.Module) -> None:
    """Random values everywhere, so that no parameter can be swapped or forgotten unnoticed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.5 + 0.2 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.dim() != 3 else 1
                parameter.copy_(noise / fan_in**0.5)


def their_model(chosen: Case) -> PreTrainedModel:
    model = chosen.theirs()
    randomise(model)
    return model


def our_model(config: LanguageConfig, weights: Weights, mesh: Mesh) -> GPTModel:
    (model,) = build_language_chunks(config, AttentionConfig(), mesh, torch.float32)
    model.load_state_dict(weights)
    return model


def pair(chosen: Case, mesh: Mesh) -> tuple[GPTModel, PreTrainedModel]:
    theirs = their_model(chosen)
    return our_model(chosen.ours, from_hf(theirs.state_dict(), chosen.ours, chosen.family), mesh), theirs


def packing(lengths: Sequence[int]) -> Packing:
    return Packing.of_row(torch.tensor([0, *lengths]).cumsum(0))


def documents(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def run_ours(model: GPTModel, texts: Sequence[Tensor], labels_BS: Tensor | None = None) -> Tensor:
    """Logits [S, V] of all documents packed into one row, or losses [S] if there are labels."""
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    lengths = [len(text) for text in texts]
    tokens_BS = torch.cat(list(texts))[None]
    out = model(tokens_BS, positions[None], None, labels=labels_BS, packed_seq_params=packing(lengths))
    return out[0] if labels_BS is not None else out[0, :, :VOCAB_SIZE]


def run_theirs(model: PreTrainedModel, texts: Sequence[Tensor]) -> Tensor:
    """Logits [S, V], each document run on its own, one after the other."""
    return torch.cat([model(text[None], use_cache=False).logits[0] for text in texts])


def gradients(module: nn.Module) -> Weights:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in found.values())
    return found


def assert_same_gradients(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        # Relative to the largest entry: an entry near 0 is a difference of large terms. So is all of the bias of
        # k, whose gradient without rotation is 0: hence twice the 1e-5 that would do for the others.
        assert (grad - expected[name]).abs().max() <= 2e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS], ids=["one", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name: str, lengths: tuple[int, ...], mesh: Mesh) -> None:
    ours, theirs = pair(CASES[name], mesh)
    texts = documents(lengths)
    out, expected = run_ours(ours, texts), run_theirs(theirs, texts)
    assert expected.shape == (sum(lengths), VOCAB_SIZE) and 0.3 < expected.std() < 3
    torch.testing.assert_close(out, expected, **TOLERANCE)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_same_gradients(to_hf(gradients(ours), CASES[name].ours, CASES[name].family), gradients(theirs))


@pytest.mark.parametrize("name", CASES)
def test_training_loss_equals_transformers(name: str, mesh: Mesh) -> None:
    """The padded vocabulary takes no part: neither in the loss nor in the gradient."""
    ours, theirs = pair(CASES[name], mesh)
    with torch.no_grad():
        for parameter in ours.parameters():
            if len(parameter) == CASES[name].ours.padded_vocab_size:
                parameter[VOCAB_SIZE:] = 1.0
    texts = documents(LENGTHS)
    labels = torch.cat(documents([sum(LENGTHS)]))
    losses = run_ours(ours, texts, labels[None])
    expected = F.cross_entropy(run_theirs(theirs, texts), labels, reduction="none")
    torch.testing.assert_close(losses, expected, **TOLERANCE)
    losses.mean().backward()
    expected.mean().backward()
    assert_same_gradients(to_hf(gradients(ours), CASES[name].ours, CASES[name].family), gradients(theirs))
    for parameter in ours.parameters():
        if len(parameter) == CASES[name].ours.padded_vocab_size:
            assert not parameter.grad[VOCAB_SIZE:].any()


def test_ntk_equals_transformers_dynamic_at_its_length(mesh: Mesh) -> None:
    """With `max_position_embeddings` 64, factor 2 and 96 tokens, `dynamic` lets the base grow by 2 * 96 / 64 - 1."""
    plain, growth = CASES["llama"], 2.0
    config = plain.theirs().config
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": plain.ours.rotary.base}
    theirs = LlamaForCausalLM(config)
    randomise(theirs)
    rotary = replace(plain.ours.rotary, scaling="ntk", factor=growth)
    ours = our_model(replace(plain.ours, rotary=rotary), from_hf(theirs.state_dict(), plain.ours, "llama"), mesh)
    texts = documents([96])
    torch.testing.assert_close(run_ours(ours, texts), run_theirs(theirs, texts), **TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        {"rotary": RotaryConfig(base=1e4)},
        {"rotary": RotaryConfig(5e5, "ntk", 2.0)},
        {"rotary": RotaryConfig(5e5, "yarn", 4.0, 8)},
        {"norm_eps": 1e-2},
    ],
)
def test_the_comparison_sees_what_no_weight_shows(change: dict, mesh: Mesh) -> None:
    chosen = CASES["llama"]
    right, theirs = pair(chosen, mesh)
    weights = from_hf(theirs.state_dict(), chosen.ours, chosen.family)
    wrong = our_model(replace(chosen.ours, **change), weights, mesh)
    texts = documents(LENGTHS)
    assert (run_ours(wrong, texts) - run_ours(right, texts)).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_weights_round_trip(name: str, mesh: Mesh) -> None:
    chosen = CASES[name]
    ours, theirs = pair(chosen, mesh)
    state = dict(theirs.state_dict())
    if chosen.ours.tie_embeddings:
        del state["lm_head.weight"]  # the embedding again; files do not hold it
    back = to_hf(ours.state_dict(), chosen.ours, chosen.family)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    again = from_hf(back, chosen.ours, chosen.family)
    assert again.keys() == {key for key, tensor in ours.state_dict().items() if tensor is not None}
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in again.items())


def as_internlm2(state: Weights, num_layers: int, kv_heads: int, head_dim: int) -> Weights:
    """A Llama's weights in the layout of InternLM2: the rows of `wqkv` go by key/value head."""
    names = {
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    }  # fmt: skip
    result = {
        "model.tok_embeddings.weight": state["model.embed_tokens.weight"],
        "model.norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in (f"model.layers.{i}." for i in range(num_layers)):
        for theirs, internlm in names.items():
            result[f"{layer}{internlm}.weight"] = state[f"{layer}{theirs}.weight"]
        query, key, value = (state[f"{layer}self_attn.{part}_proj.weight"] for part in ("q", "k", "v"))
        heads_per_group = len(query) // len(key)
        rows = []
        for group in range(kv_heads):
            for head in range(group * heads_per_group, (group + 1) * heads_per_group):
                rows.append(query[head * head_dim : (head + 1) * head_dim])
            rows.append(key[group * head_dim : (group + 1) * head_dim])
            rows.append(value[group * head_dim : (group + 1) * head_dim])
        result[f"{layer}attention.wqkv.weight"] = torch.cat(rows)
    return result


def test_internlm2_is_a_llama_with_grouped_weights(mesh: Mesh) -> None:
    config = CASES["llama"].ours
    theirs = their_model(CASES["llama"])
    state = as_internlm2(theirs.state_dict(), config.num_layers, config.num_kv_heads, 16)
    ours = our_model(config, from_hf(state, config, "internlm2"), mesh)
    texts = documents(LENGTHS)
    torch.testing.assert_close(run_ours(ours, texts), run_theirs(theirs, texts), **TOLERANCE)
    back = to_hf(ours.state_dict(), config, "internlm2")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    chosen = CASES["llama"]
    state = their_model(chosen).state_dict()
    with pytest.raises(UserError, match="model.norm.bias in the checkpoint is unknown"):
        from_hf({**state, "model.norm.bias": torch.zeros(48)}, chosen.ours, "llama")
    without_key = {name: tensor for name, tensor in state.items() if "layers.1.self_attn.k_proj" not in name}
    with pytest.raises(UserError, match=r"lacks model.layers.1.self_attn.k_proj.weight, a part of decoder"):
        from_hf(without_key, chosen.ours, "llama")
    with pytest.raises(UserError, match="250 rows in the checkpoint, 251 by .*: check vocab_size"):
        from_hf(state, replace(chosen.ours, vocab_size=251), "llama")
    with pytest.raises(UserError, match="check num_heads, num_kv_heads and head_dim"):
        from_hf(state, replace(chosen.ours, head_dim=12), "llama")
    with pytest.raises(UserError, match="tie_embeddings=false"):
        from_hf(state, replace(chosen.ours, tie_embeddings=True), "llama")
    old = {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert from_hf(old, chosen.ours, "llama").keys() == from_hf(state, chosen.ours, "llama").keys()


VISION = VisionConfig(
    hidden_size=48, num_layers=2, num_heads=3, intermediate_size=80, image_size=56, qkv_bias=True,
    qk_norm=False, norm="layer_norm",
)  # fmt: skip
IMAGE_TOKEN = VOCAB_SIZE - 1


def their_internvl(text: Case) -> InternVLForConditionalGeneration:
    vision = InternVLVisionConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80, image_size=56,
        attention_bias=True,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config=text.theirs().config, image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=text.ours.tie_embeddings,
    )  # fmt: skip
    model = InternVLForConditionalGeneration(config)
    randomise(model)
    return model


def within(values: Weights, prefix: str, instead: str = "") -> Weights:
    """Those values whose names have the prefix, with another one instead."""
    found = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return {instead + name: value for name, value in found.items()}


def split_internvl(values: Weights) -> tuple[Weights, Weights, Weights]:
    """An InternVL's values for vision tower, projector and language model, named as each is alone."""
    return (
        within(values, "model.vision_tower."),
        within(values, "model.multi_modal_projector."),
        within(values, "model.language_model.", "model.") | within(values, "lm_head.", "lm_head."),
    )


@pytest.mark.parametrize("name", ["qwen2-bias-every-head", "qwen3-norm-tied"])
def test_the_whole_model_equals_transformers(name: str, mesh: Mesh) -> None:
    chosen = CASES[name]
    theirs = their_internvl(chosen)
    vision, projector, language = split_internvl(theirs.state_dict())
    encoder = FrameEncoder(VISION, ProjectorConfig(vision_hidden_size=48, language_hidden_size=48))
    encoder.vision_tower.load_state_dict(vision_hf.from_hf(vision))
    encoder.projector.load_state_dict(projector_hf.from_hf(projector))
    ours = our_model(chosen.ours, from_hf(language, chosen.ours, chosen.family), mesh)

    frames_NCHW = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    text = documents([20])[0] % IMAGE_TOKEN
    text[3:7] = text[10:14] = IMAGE_TOKEN  # four visual tokens a frame
    positions_BS, (places,) = torch.arange(20)[None], torch.where(text == IMAGE_TOKEN)
    embedded_SBH = embed_with_visual_tokens(ours, text[None], positions_BS, encoder(frames_NCHW), places)
    out = ours(text[None], positions_BS, None, decoder_input=embedded_SBH, packed_seq_params=packing([20]))
    expected = theirs(input_ids=text[None], pixel_values=frames_NCHW, use_cache=False).logits
    torch.testing.assert_close(out[..., :VOCAB_SIZE], expected, **TOLERANCE)

    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (out[..., :VOCAB_SIZE] * weight).sum().backward()
    (expected * weight).sum().backward()
    vision, projector, language = split_internvl(gradients(theirs))
    # By our names, where q, k and v are one: the gradient of the bias of k alone is 0 but for rounding.
    assert_same_gradients(gradients(encoder.vision_tower), vision_hf.from_hf(vision))
    assert_same_gradients(projector_hf.to_hf(gradients(encoder.projector)), projector)
    assert_same_gradients(to_hf(gradients(ours), chosen.ours, chosen.family), language)
