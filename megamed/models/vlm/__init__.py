"""The vision-language model: frame encoder, language model, and the merge of their tokens."""

from megamed.models.vlm.config import VLMConfig
from megamed.models.vlm.encoder import FrameEncoder, init_frame_encoder
from megamed.models.vlm.model import embed_with_visual_tokens

__all__ = ["FrameEncoder", "VLMConfig", "embed_with_visual_tokens", "init_frame_encoder"]
