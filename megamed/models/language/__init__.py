"""The language model: Megatron's `GPTModel`, set up as InternLM2, Qwen2.5, Qwen3 or Llama."""

from megamed.models.language.attention import Packing
from megamed.models.language.attention_config import AttentionConfig
from megamed.models.language.backends import check_backend
from megamed.models.language.config import LanguageConfig
from megamed.models.language.model import build_language_chunks
from megamed.models.language.rotary import RotaryConfig

__all__ = [
    "AttentionConfig",
    "LanguageConfig",
    "Packing",
    "RotaryConfig",
    "build_language_chunks",
    "check_backend",
]
