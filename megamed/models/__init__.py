"""Model families: vision tower, projector, language model, experts, and the VLM that they make up."""

import megamed.runtime  # noqa: F401  makes Megatron importable, before the modules below import it
