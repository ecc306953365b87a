"""The padded vocabulary takes no part in the loss, whichever ranks hold it.

That one process computes the loss of transformers is in test_language_parity.py.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megamed import runtime
from megamed.models.language import AttentionConfig, LanguageConfig, Packing, build_language_chunks
from megamed.parallel.init import init_language
from megamed.testing.ranks import RankPool

NUM_TOKENS = 12


def losses(config: LanguageConfig, tensor: int) -> tuple[Tensor, list[float]]:
    """Each token's loss, and the gradients of this rank's padded rows of the output layer."""
    parallel = runtime.ParallelConfig(tensor=tensor)
    mesh = runtime.build_mesh(parallel)
    runtime.seed_everything(1, 0)
    (model,) = build_language_chunks(config, AttentionConfig(), mesh, torch.float32)
    init_language([model], 3, 0.3, config.num_layers)
    tokens_BS = torch.arange(NUM_TOKENS)[None]
    bounds = torch.tensor([0, NUM_TOKENS], dtype=torch.int32)
    packing = Packing.of_row(bounds)
    out = model(tokens_BS, tokens_BS, None, labels=tokens_BS.flip(1), packed_seq_params=packing)
    out.mean().backward()
    weight = model.output_layer.weight
    first = mesh.language.tp.rank() * len(weight)
    padded = [grad.abs().max().item() for i, grad in enumerate(weight.grad) if first + i >= config.vocab_size]
    return out.detach(), padded


@pytest.mark.parametrize("vocab_size", [30, 100, 128])
def test_padding_is_no_token_at_any_layout(vocab_size: int, ranks: RankPool) -> None:
    """30 of 128 rows: with 4 ranks, one has 30 tokens of 32 and three have padding alone."""
    config = LanguageConfig(
        vocab_size=vocab_size, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=4, intermediate_size=32
    )
    ((whole, padded),) = ranks.run(losses, 1, config, 1)
    sharded = ranks.run(losses, 4, config, 4)
    for rank_losses, _ in sharded:
        # float32, sums in another order; some 1e-7 is seen.
        torch.testing.assert_close(rank_losses, whole, rtol=1e-5, atol=1e-5)
    assert len(padded) == sum(len(part) for _, part in sharded) == 128 - vocab_size
    assert not any(padded) and not any(any(part) for _, part in sharded)
    # Tokens below 30 have the same weights whatever the vocabulary: with fewer rivals each is likelier.
    if vocab_size < 128:
        ((wider, _),) = ranks.run(losses, 1, replace(config, vocab_size=128), 1)
        assert (whole < wider).all()
