"""The language model's losses, which no logits are kept for, against Megatron's own loss of whole logits.

Shapes: S tokens of a packed row, B = 1.
"""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn

from megamed import runtime
from megamed.models.language import AttentionConfig, LanguageConfig, Packing, build_language_chunks
from megamed.models.language.model import LanguageModel
from megamed.ops.cross_entropy import IGNORED_LABEL
from megamed.parallel.init import init_language
from megamed.testing.ranks import RankPool

NUM_TOKENS, NUM_WORDS = 24, 90  # the vocabulary is padded to 128: of 4 ranks, two have padding
LABELLED = {"all": range(NUM_TOKENS), "behind": range(17, 24), "none": range(0)}
Run = tuple[Tensor, dict[str, Tensor]]


def run(model: nn.Module, labelled: range, whole_logits: bool) -> Run:
    """Losses [S], 0 where there is no label, and every gradient of their weighted sum."""
    generator = torch.Generator().manual_seed(2)
    tokens_BS, labels_BS = torch.randint(NUM_WORDS, (2, 1, NUM_TOKENS), generator=generator)
    weight_S = torch.rand(NUM_TOKENS, generator=generator)
    counts_S = torch.zeros(NUM_TOKENS)
    counts_S[list(labelled)] = 1
    if not whole_logits:
        labels_BS = labels_BS.where(counts_S > 0, IGNORED_LABEL)
    packing = Packing.of_row(torch.tensor([0, 10, NUM_TOKENS], dtype=torch.int32))
    positions_BS = torch.cat([torch.arange(10), torch.arange(14)])[None]
    model.zero_grad()
    losses_BS = model(tokens_BS, positions_BS, None, labels=labels_BS, packed_seq_params=packing)
    losses_S = losses_BS[0] * counts_S if whole_logits else losses_BS[0]
    (losses_S * weight_S).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values()), "Megatron's DDP waits for every one"
    return losses_S.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def both(config: LanguageConfig, parallel: dict[str, Any]) -> dict[str, tuple[Run, Run]]:
    """Ours and Megatron's, with the same weights, on one rank of a layout."""
    mesh = runtime.build_mesh(runtime.ParallelConfig(**parallel))
    runtime.seed_everything(1, 0)
    (model,) = build_language_chunks(config, AttentionConfig(), mesh, torch.float32)
    init_language([model], 3, 0.3, config.num_layers)
    head_calls = []
    model.output_layer.register_forward_hook(lambda *_: head_calls.append(1))
    ours = {name: run(model, labelled, whole_logits=False) for name, labelled in LABELLED.items()}
    assert not head_calls
    saved = LanguageModel._postprocess
    del LanguageModel._postprocess  # now Megatron's
    try:
        assert LanguageModel._postprocess is GPTModel._postprocess
        theirs = {name: run(model, labelled, whole_logits=True) for name, labelled in LABELLED.items()}
    finally:
        LanguageModel._postprocess = saved  # type: ignore[method-assign]
    assert len(head_calls) == len(LABELLED)
    return {name: (ours[name], theirs[name]) for name in LABELLED}


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor": 2}, {"tensor": 4}, {"tensor": 2, "sequence": True}, {"tensor": 4, "sequence": True}],
    ids=str,
)
def test_losses_and_gradients_equal_those_of_whole_logits(
    parallel: dict[str, Any], tied: bool, ranks: RankPool
) -> None:
    config = LanguageConfig(
        vocab_size=NUM_WORDS, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=4, intermediate_size=32,
        tie_embeddings=tied,
    )  # fmt: skip
    for result in ranks.run(both, parallel.get("tensor", 1), config, parallel):
        for labelled, (ours, theirs) in result.items():
            # fp32 with sums in another order; losses of about 5.
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
            assert bool(ours[0].any()) == (labelled != "none")
            assert ours[1].keys() == theirs[1].keys()
            for name, gradient in ours[1].items():
                # Relative to the largest entry: an entry near 0 is a difference of large terms.
                assert (gradient - theirs[1][name]).abs().max() <= 1e-5 * theirs[1][name].abs().max(), name
