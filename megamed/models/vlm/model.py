"""Where the two halves meet: text embeddings with visual tokens in their places.

Shapes: S tokens of the packed row that this rank embeds, B = 1, H hidden size, R visual tokens.
"""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor


def embed_with_visual_tokens(
    model: GPTModel, tokens_BS: Tensor, position_BS: Tensor, rows_RH: Tensor, index_R: Tensor
) -> Tensor:
    """The decoder's input on the first pipeline stage.

    Args:
        model: the first stage; its embedding splits the sequence under sequence parallelism.
        tokens_BS: the whole packed row, placeholders where visual tokens go.
        position_BS: positions, restarting in every document.
        rows_RH: the visual tokens that fall into this rank's part of the sequence.
        index_R: where they go within that part.

    Returns:
        Embeddings [S, 1, H] of this rank's part.
    """
    text_SBH = model.embedding(input_ids=tokens_BS, position_ids=position_BS)
    if len(rows_RH) == 0:
        return text_SBH
    return torch.index_copy(text_SBH[:, 0], 0, index_R, rows_RH.to(text_SBH.dtype)).unsqueeze(1)
