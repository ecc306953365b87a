"""The language model: Megatron's `GPTModel`, set up as InternLM2, Qwen2.5, Qwen3 or Llama."""

from megamed.models.language.config import LanguageConfig
from megamed.models.language.model import build_language_chunks

__all__ = ["LanguageConfig", "build_language_chunks"]
