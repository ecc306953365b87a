"""Language model weights to and from published decoders: Llama, Qwen2, Qwen3, Qwen3-MoE, Mixtral, Phi-3, InternLM2.

Ours are the names and whole tensors of Megatron's `GPTModel`, built without Transformer Engine in one
process. InternLM2 is named as in its authors' release, which is also the language half of the 26B InternVL
checkpoints, the others as in transformers' files.

What is more than a renaming:

- q, k and v are one matrix whose rows are grouped: for each key/value head, its query heads, then its key,
  then its value. InternLM2 stores them so already; Phi-3 has one matrix too, of all queries, keys and values.
- gate and up of the SwiGLU MLP are one matrix, gate first.
- The vocabulary is padded with rows of zeros, which never take part (`megamed.models.language.model`).
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from megamed.models.language.config import LanguageConfig
from megamed.models.weight_map import Grouped, Line, Padded, Table, to_ours, to_theirs
from megamed.utils import UserError

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3", "internlm2"]

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER, _THEIRS = "decoder.layers.{i}", "model.layers.{i}"
_EXPERT = f"{_LAYER}.mlp.experts.local_experts.{{e}}"
# Old checkpoints carry these buffers; their values follow from `rotary`.
_LEFT_OUT = ("rotary_emb.inv_freq",)

# One name of ours and one of theirs each, `.weight` of a layer.
_PLAIN = {
    "input_layernorm": "input_layernorm",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc2": "mlp.down_proj",
}
_INTERNLM2 = {
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "attention.wqkv",
    "self_attention.linear_proj": "attention.wo",
    "pre_mlp_layernorm": "ffn_norm",
    "mlp.linear_fc2": "feed_forward.w2",
}
# Gate and up, down, and router of a mixture of experts.
_EXPERTS = {
    "qwen3_moe": ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "mlp.experts.{e}.down_proj", "mlp.gate"),
    "mixtral": (
        "block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3", "block_sparse_moe.experts.{e}.w2",
        "block_sparse_moe.gate",
    ),
}  # fmt: skip


def table(config: LanguageConfig, family: Family) -> Table:
    """A decoder's table, with names within its causal language model (`model.layers.0...`, `lm_head.weight`).

    Args:
        config: the model's sizes.
        family: whose names they are.
    """
    ends = {
        _EMBEDDING: "model.tok_embeddings.weight" if family == "internlm2" else "model.embed_tokens.weight",
        _OUTPUT: "output.weight" if family == "internlm2" else "lm_head.weight",
    }
    tied = {ends[_OUTPUT]: ends[_EMBEDDING]} if config.tie_embeddings else {}
    words = Padded(config.vocab_size, config.padded_vocab_size)
    return Table(
        (
            *(
                Line(ours, (theirs,), words, "vocab_size")
                for ours, theirs in ends.items()
                if not (tied and ours == _OUTPUT)
            ),
            *_layer(config, family),
            Line("decoder.final_layernorm.weight", ("model.norm.weight",)),
        ),
        tied,
        _LEFT_OUT,
    )


def _layer(config: LanguageConfig, family: Family) -> Iterator[Line]:
    names = _INTERNLM2 if family == "internlm2" else _PLAIN
    for ours, theirs in names.items():
        yield Line(f"{_LAYER}.{ours}.weight", (f"{_THEIRS}.{theirs}.weight",))
    head_dim = config.kv_channels
    widths = (config.num_heads // config.num_kv_heads * head_dim, head_dim, head_dim)
    heads = "num_heads, num_kv_heads and head_dim"
    fc1 = f"{_LAYER}.mlp.linear_fc1.weight"
    if family == "internlm2":
        yield Line(fc1, tuple(f"{_THEIRS}.feed_forward.{part}.weight" for part in ("w1", "w3")))
    elif family == "phi3":
        qkv = Grouped(config.num_kv_heads, widths, fused=True)
        yield Line(f"{_LAYER}.self_attention.linear_qkv.weight", (f"{_THEIRS}.self_attn.qkv_proj.weight",), qkv, heads)
        yield Line(fc1, (f"{_THEIRS}.mlp.gate_up_proj.weight",))
    else:
        qkv = Grouped(config.num_kv_heads, widths)
        for kind in ("weight", "bias"):
            theirs_3 = tuple(f"{_THEIRS}.self_attn.{part}_proj.{kind}" for part in "qkv")
            yield Line(f"{_LAYER}.self_attention.linear_qkv.{kind}", theirs_3, qkv, heads)
        yield Line(fc1, tuple(f"{_THEIRS}.mlp.{part}_proj.weight" for part in ("gate", "up")))
    if experts := _EXPERTS.get(family):
        gate, up, down, router = (f"{_THEIRS}.{name}.weight" for name in experts)
        yield Line(f"{_EXPERT}.linear_fc1.weight", (gate, up))
        yield Line(f"{_EXPERT}.linear_fc2.weight", (down,))
        yield Line(f"{_LAYER}.mlp.router.weight", (router,))


def from_hf(state_dict: Mapping[str, Tensor], config: LanguageConfig, family: Family) -> dict[str, Tensor]:
    """State dict of a published causal language model to that of a `GPTModel`.

    Args:
        state_dict: names within the causal language model.
        config: the model's sizes.
        family: whose names they are.

    Raises:
        UserError: a name that the family does not have, a missing part of a fused weight, or a size that is
            not the configuration's.
    """
    lines = table(config, family)
    for name, other in lines.repeats.items():
        if name in state_dict and not torch.equal(state_dict[name], state_dict.get(other, state_dict[name])):
            raise UserError(
                "the checkpoint's output layer differs from its embedding: set model.language.tie_embeddings=false"
            )
    return to_ours(lines, state_dict)


def to_hf(state_dict: Mapping[str, Tensor], config: LanguageConfig, family: Family) -> dict[str, Tensor]:
    """State dict of a `GPTModel` to that of a published causal language model: the inverse of `from_hf`.

    Args:
        state_dict: Megatron's names; its `_extra_state` entries are left out.
        config: the model's sizes.
        family: whose names to give.

    Raises:
        UserError: a name that the family does not have.
    """
    ours = {name: tensor for name, tensor in state_dict.items() if not name.endswith("_extra_state")}
    return to_theirs(table(config, family), ours)
