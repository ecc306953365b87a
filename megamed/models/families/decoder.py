"""Settings of published language models, `config.json` of transformers and of InternLM2, as ours and back."""

from collections.abc import Mapping
from typing import Any

from megamed.models.language.config import LanguageConfig
from megamed.models.language.hf import Family as Decoder
from megamed.models.language.rotary import RotaryConfig
from megamed.models.moe import MoEConfig
from megamed.utils import UserError

# By `model_type`, and by architecture where a configuration has no type.
DECODERS: dict[str, Decoder] = {
    "internlm2": "internlm2", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3_moe",
    "mixtral": "mixtral", "phi3": "phi3",
    "InternLM2ForCausalLM": "internlm2", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe", "MixtralForCausalLM": "mixtral",
    "Phi3ForCausalLM": "phi3",
}  # fmt: skip
_EXPERTS = ("qwen3_moe", "mixtral")
# What the configuration class takes where the file is silent.
_ROTARY_BASE = {"mixtral": 1e6, "internlm2": 1e4}
_NORM_EPS = {"mixtral": 1e-5, "phi3": 1e-5}
_TYPES = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}


class Values:
    """A configuration whose values are asked for by key.

    Args:
        values: of it.
        where: its place in config.json, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values, self._where = values, where

    def key(self, name: str) -> str:
        """A key as messages name it."""
        return f"config.json: {self._where}{name}"

    def need(self, *names: str) -> Any:
        """The value of the first of the keys that is there.

        Raises:
            UserError: none is.
        """
        for name in names:
            if self._values.get(name) is not None:
                return self._values[name]
        raise UserError(f"{self.key(names[0])} is missing, and decides about sizes; download the file again")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, or what stands for one that is missing or null."""
        value = self._values.get(name)
        return default if value is None else value

    def want(self, name: str, expected: Any, default: Any, why: str) -> None:
        """Check that a value is the only one that there is here.

        Raises:
            UserError: it is another.
        """
        value = self.get(name, default)
        if value not in (expected if isinstance(expected, tuple) else (expected,)):
            raise UserError(f"{self.key(name)} is {value}; {why}")


def decoder_of(values: Mapping[str, Any]) -> Decoder:
    """Whose names the weights have.

    Raises:
        UserError: a language model that there is none of here.
    """
    for name in (values.get("model_type"), *(values.get("architectures") or ())):
        if name in DECODERS:
            return DECODERS[name]
    what = (values.get("architectures") or [values.get("model_type")])[0]
    raise UserError(f"config.json: its language model is {what}; there are {', '.join(sorted(set(DECODERS.values())))}")


def read_decoder(values: Mapping[str, Any], where: str, tied: bool) -> LanguageConfig:
    """A language model's settings.

    Args:
        values: `text_config` or `llm_config`.
        where: its key, for messages, with a dot behind it.
        tied: the output layer is the embedding.

    Raises:
        UserError: it is not a model that can be built here; names the key.
    """
    x, kind = Values(values, where), decoder_of(values)
    num_heads = x.need("num_attention_heads")
    x.want("hidden_act", ("silu", "swish"), "silu", "only SwiGLU MLPs can be built")
    x.want("mlp_bias", False, False, "MLPs with biases cannot be built")
    if x.get("use_sliding_window", kind in ("mixtral", "phi3")) and x.get("sliding_window"):
        longest = x.get("max_position_embeddings", 0)
        if (window := x.get("sliding_window")) < longest:
            raise UserError(f"{x.key('sliding_window')} is {window}; attention here sees all of a document")
    if kind == "phi3":
        x.want("partial_rotary_factor", 1.0, 1.0, "a rotation of part of a head cannot be built")
    if kind == "internlm2":
        x.want("bias", False, False, "attention with biases cannot be built for InternLM2")
    elif kind != "qwen2":
        x.want("attention_bias", False, False, "a bias of the output projection cannot be built")
    return LanguageConfig(
        vocab_size=x.need("vocab_size"),
        hidden_size=x.need("hidden_size"),
        num_layers=x.need("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=x.get("num_key_value_heads", num_heads),
        head_dim=x.get("head_dim"),
        intermediate_size=x.need("intermediate_size"),
        norm_eps=x.get("rms_norm_eps", _NORM_EPS.get(kind, 1e-6)),
        rotary=_rotary(x, kind),
        max_positions=x.get("max_position_embeddings", 32768),
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        tie_embeddings=tied,
        init_std=x.get("initializer_range", 0.02),
        moe=_experts(x, kind) if kind in _EXPERTS else MoEConfig(),
    )


def _rotary(x: Values, kind: str) -> RotaryConfig:
    """RoPE, in the words of transformers 5 (`rope_parameters`) or of those before (`rope_theta`, `rope_scaling`)."""
    parameters = {**x.get("rope_scaling", {}), **x.get("rope_parameters", {})}
    base = float(parameters.get("rope_theta", x.get("rope_theta", _ROTARY_BASE.get(kind, 1e4))))
    name = parameters.get("rope_type", parameters.get("type", "default"))
    if name == "dynamic":
        # It begins behind max_position_embeddings, which is as far as the model goes here, too.
        return RotaryConfig(base)
    if name not in _TYPES:
        raise UserError(
            f"{x.key('rope_scaling')} is of type {name}, which cannot be built; there are {', '.join(_TYPES)}, dynamic"
        )
    if name == "default":
        return RotaryConfig(base)
    names = {"original_max_position_embeddings": "original_max_positions"}
    known = (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "attention_factor", "low_freq_factor", "high_freq_factor",
    )  # fmt: skip
    given = {names.get(key, key): parameters[key] for key in known if parameters.get(key) is not None}
    if name == "yarn":
        given.setdefault("original_max_positions", x.get("max_position_embeddings"))
    return RotaryConfig(base, _TYPES[name], **given)  # type: ignore[arg-type]


def _experts(x: Values, kind: str) -> MoEConfig:
    if kind == "qwen3_moe":
        x.want("norm_topk_prob", True, False, "weights of the chosen experts have a sum of 1 here")
        x.want("decoder_sparse_step", 1, 1, "experts are in every layer behind the dense ones here")
    x.want("shared_expert_intermediate_size", 0, 0, "a shared expert with a gate cannot be built")
    dense = sorted(x.get("mlp_only_layers", []))
    if dense != list(range(len(dense))):
        raise UserError(f"{x.key('mlp_only_layers')} is {dense}; only the first layers can be dense")
    return MoEConfig(
        num_experts=x.need("num_experts", "num_local_experts"),
        top_k=x.need("num_experts_per_tok"),
        intermediate_size=x.need("moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"),
        first_dense_layers=len(dense),
        aux_loss_coeff=x.get("router_aux_loss_coef", 0.001),
    )


def write_decoder(language: LanguageConfig) -> dict[str, Any]:
    """The `text_config` of transformers for a language model of ours.

    Raises:
        UserError: transformers has no such model; says why.
    """
    moe = language.moe
    kind = _kind(language)
    values: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "head_dim": language.kv_channels,
        "intermediate_size": language.intermediate_size,
        "rms_norm_eps": language.norm_eps,
        "max_position_embeddings": language.max_positions,
        "initializer_range": language.init_std,
        "hidden_act": "silu",
        "tie_word_embeddings": language.tie_embeddings,
        **_write_rotary(language.rotary),
    }
    if kind == "qwen2":
        del values["head_dim"]  # which it does not know
    if kind == "qwen3_moe":
        values |= {
            "num_experts": moe.total_experts, "moe_intermediate_size": moe.intermediate_size, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": list(range(moe.first_dense_layers)),
        }  # fmt: skip
    elif kind == "mixtral":
        values |= {"num_local_experts": moe.total_experts, "intermediate_size": moe.intermediate_size}
    if kind in _EXPERTS:
        values |= {"num_experts_per_tok": moe.top_k, "router_aux_loss_coef": moe.aux_loss_coeff}
    return values


def _kind(language: LanguageConfig) -> Decoder:
    moe = language.moe
    if language.qkv_bias and language.qk_norm:
        raise UserError("transformers has no decoder with both qkv_bias and qk_norm; keep the checkpoint as it is")
    if language.qkv_bias and language.kv_channels * language.num_heads != language.hidden_size:
        raise UserError("transformers has no decoder with qkv_bias and a head_dim other than hidden_size / num_heads")
    if not moe.total_experts:
        return "qwen2" if language.qkv_bias else "qwen3" if language.qk_norm else "llama"
    refusals = (
        (moe.routing != "free", f"routing={moe.routing}: its routers know nothing of specialties"),
        (moe.score_function != "softmax", "sigmoid scores"),
        (moe.balance == "bias", "a bias on the choice"),
        (moe.top_k < 2, "top_k=1, whose weights are not scaled to a sum of 1"),
        (moe.shared_intermediate_size > 0, "a shared expert without a gate"),
        (language.qkv_bias, "qkv_bias beside experts"),
        (moe.first_dense_layers > 0 and not language.qk_norm, "dense layers below experts without qk_norm"),
    )
    for is_so, what in refusals:
        if is_so:
            raise UserError(
                f"transformers has no decoder with {what}; take out one pool as a dense-sized model with "
                "tools/extract_specialist.py (hard routing to it alone), or keep the checkpoint as it is"
            )
    return "qwen3_moe" if language.qk_norm else "mixtral"


def _write_rotary(rotary: RotaryConfig) -> dict[str, Any]:
    names = {"original_max_positions": "original_max_position_embeddings"}
    if rotary.scaling == "ntk":
        raise UserError("transformers has no RoPE with scaling=ntk; set the larger base as model.language.rotary.base")
    values: dict[str, Any] = {"rope_theta": rotary.base, "rope_type": "default"}
    if rotary.scaling != "none":
        values["rope_type"] = rotary.scaling
        for key, value in vars(rotary).items():
            if key not in ("base", "scaling") and value is not None and value != getattr(RotaryConfig(), key):
                values[names.get(key, key)] = value
        if rotary.scaling == "llama3":
            values |= {"low_freq_factor": rotary.low_freq_factor, "high_freq_factor": rotary.high_freq_factor}
    return {"rope_parameters": values}
