"""Language model weights to and from published decoders: Llama, Qwen2, Qwen3 and InternLM2.

Ours are the names and whole tensors of Megatron's `GPTModel`, built without Transformer Engine in one
process. Llama, Qwen2 and Qwen3 are named as in transformers; InternLM2 as in its authors' release, which is
also the language half of the 26B InternVL checkpoints.

What is more than a renaming:

- q, k and v are one matrix whose rows are grouped: for each key/value head, its query heads, then its key,
  then its value. InternLM2 stores them so already.
- gate and up of the SwiGLU MLP are one matrix, gate first.
- The vocabulary is padded with rows of zeros, which never take part (`megamed.models.language.model`).
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megamed.models.language.config import LanguageConfig
from megamed.models.weight_map import Rename, to_ours, to_theirs
from megamed.utils import UserError

Family = Literal["llama", "qwen2", "qwen3", "internlm2"]

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER, _ATTENTION, _MLP = (f"decoder.layers.{{i}}{part}" for part in ("", ".self_attention", ".mlp"))
_THEIRS = "model.layers.{i}"

# `q`, `k` and `v` are not names of Megatron's: they stand for the parts of `linear_qkv`, see `_join_qkv`.
TRANSFORMERS = (
    Rename(_EMBEDDING, ("model.embed_tokens.weight",)),
    Rename(f"{_LAYER}.input_layernorm.weight", (f"{_THEIRS}.input_layernorm.weight",)),
    *(
        Rename(f"{_ATTENTION}.{part}.{kind}", (f"{_THEIRS}.self_attn.{part}_proj.{kind}",))
        for part in ("q", "k", "v")
        for kind in ("weight", "bias")
    ),
    Rename(f"{_ATTENTION}.q_layernorm.weight", (f"{_THEIRS}.self_attn.q_norm.weight",)),
    Rename(f"{_ATTENTION}.k_layernorm.weight", (f"{_THEIRS}.self_attn.k_norm.weight",)),
    Rename(f"{_ATTENTION}.linear_proj.weight", (f"{_THEIRS}.self_attn.o_proj.weight",)),
    Rename(f"{_LAYER}.pre_mlp_layernorm.weight", (f"{_THEIRS}.post_attention_layernorm.weight",)),
    Rename(f"{_MLP}.linear_fc1.weight", (f"{_THEIRS}.mlp.gate_proj.weight", f"{_THEIRS}.mlp.up_proj.weight")),
    Rename(f"{_MLP}.linear_fc2.weight", (f"{_THEIRS}.mlp.down_proj.weight",)),
    Rename("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rename(_OUTPUT, ("lm_head.weight",)),
)

INTERNLM2 = (
    Rename(_EMBEDDING, ("model.tok_embeddings.weight",)),
    Rename(f"{_LAYER}.input_layernorm.weight", (f"{_THEIRS}.attention_norm.weight",)),
    Rename(f"{_ATTENTION}.linear_qkv.weight", (f"{_THEIRS}.attention.wqkv.weight",)),
    Rename(f"{_ATTENTION}.linear_proj.weight", (f"{_THEIRS}.attention.wo.weight",)),
    Rename(f"{_LAYER}.pre_mlp_layernorm.weight", (f"{_THEIRS}.ffn_norm.weight",)),
    Rename(
        f"{_MLP}.linear_fc1.weight",
        (f"{_THEIRS}.feed_forward.w1.weight", f"{_THEIRS}.feed_forward.w3.weight"),
    ),
    Rename(f"{_MLP}.linear_fc2.weight", (f"{_THEIRS}.feed_forward.w2.weight",)),
    Rename("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rename(_OUTPUT, ("output.weight",)),
)

TABLES: dict[Family, tuple[Rename, ...]] = {
    "llama": TRANSFORMERS,
    "qwen2": TRANSFORMERS,
    "qwen3": TRANSFORMERS,
    "internlm2": INTERNLM2,
}


def from_hf(state_dict: Mapping[str, Tensor], config: LanguageConfig, family: Family) -> dict[str, Tensor]:
    """State dict of a published causal language model to that of a `GPTModel`.

    Args:
        state_dict: names within the causal language model (`model.layers.0...`, `lm_head.weight`).
        config: the model's sizes.
        family: whose names they are.

    Raises:
        UserError: a name that the family does not have, a missing part of a fused weight, or a size that is
            not the configuration's.
    """
    # Old checkpoints carry these buffers; their values follow from `rotary`.
    weights = {name: x for name, x in state_dict.items() if not name.endswith("rotary_emb.inv_freq")}
    ours = _join_qkv(to_ours(TABLES[family], weights), config)
    if config.tie_embeddings and (output := ours.pop(_OUTPUT, None)) is not None:
        if not torch.equal(output, ours.get(_EMBEDDING, output)):
            raise UserError(
                "the checkpoint's output layer differs from its embedding: "
                "set model.language.tie_embeddings=false"
            )
    for name in (_EMBEDDING, _OUTPUT):
        if name in ours:
            _need_rows(name, ours[name], config.vocab_size, "vocab_size")
            ours[name] = F.pad(ours[name], (0, 0, 0, config.padded_vocab_size - config.vocab_size))
    return ours


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
    for name in (_EMBEDDING, _OUTPUT):
        if name in ours:
            ours[name] = ours[name][: config.vocab_size]
    table = TABLES[family]
    return to_theirs(table, ours if table is INTERNLM2 else _split_qkv(ours, config))


def _sizes(config: LanguageConfig) -> tuple[int, int]:
    """Rows of a key/value head's queries, and of its key (or value)."""
    head_dim = config.kv_channels
    return config.num_heads // config.num_kv_heads * head_dim, head_dim


def _join_qkv(ours: dict[str, Tensor], config: LanguageConfig) -> dict[str, Tensor]:
    """Replace each `q`, `k` and `v` by their `linear_qkv`."""
    groups, (query_rows, head_dim) = config.num_kv_heads, _sizes(config)
    result: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        layer, found, kind = name.partition(".self_attention.q.")
        if found:
            parts = []
            for part, rows in (("q", query_rows), ("k", head_dim), ("v", head_dim)):
                part_name = f"{layer}.self_attention.{part}.{kind}"
                if part_name not in ours:
                    raise UserError(f"the checkpoint lacks {part_name}: check that all its files are there")
                _need_rows(part_name, ours[part_name], groups * rows, "num_heads, num_kv_heads and head_dim")
                parts.append(ours[part_name].unflatten(0, (groups, rows)))
            result[f"{layer}.self_attention.linear_qkv.{kind}"] = torch.cat(parts, dim=1).flatten(0, 1)
        elif ".self_attention.k." not in name and ".self_attention.v." not in name:
            result[name] = tensor
    return result


def _split_qkv(ours: dict[str, Tensor], config: LanguageConfig) -> dict[str, Tensor]:
    """Replace each `linear_qkv` by its `q`, `k` and `v`."""
    groups, (query_rows, head_dim) = config.num_kv_heads, _sizes(config)
    result: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        layer, found, kind = name.partition(".self_attention.linear_qkv.")
        if found:
            parts = tensor.unflatten(0, (groups, -1)).split((query_rows, head_dim, head_dim), dim=1)
            for part, rows in zip(("q", "k", "v"), parts, strict=True):
                result[f"{layer}.self_attention.{part}.{kind}"] = rows.flatten(0, 1)
        else:
            result[name] = tensor
    return result


def _need_rows(name: str, tensor: Tensor, rows: int, keys: str) -> None:
    if len(tensor) != rows:
        raise UserError(
            f"{name} has {len(tensor)} rows in the checkpoint, {rows} by model.language: check {keys}"
        )
