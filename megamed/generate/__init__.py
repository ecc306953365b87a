"""Decoding with a placed model, at any layout."""

import megamed.runtime  # noqa: F401  makes Megatron importable, before the modules below import it
from megamed.generate.greedy import Prompt, greedy

__all__ = ["Prompt", "greedy"]
