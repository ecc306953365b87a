"""The router: Megatron's choice where nothing is said of tokens, pools and specialties where something is."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from megamed.models.language import LanguageConfig
from megamed.models.moe import MoEConfig, PoolConfig, Pools, Router, routing_mask
from megamed.models.moe.balance import move_bias, pool_balance_share
from megamed.runtime import ParallelConfig

SIZES = {"general": 2, "chest": 4, "neuro": 2}
POOLS = Pools(SIZES)
CHEST, NEURO = POOLS.bits("chest"), POOLS.bits("neuro")
TOKENS, HIDDEN = 96, 16


def settings(**values: Any) -> MoEConfig:
    pools = {name: PoolConfig(num_experts=size) for name, size in SIZES.items()}
    return MoEConfig(**{"pools": pools, "aux_loss_coeff": 0.0, **values})


def build(moe: MoEConfig) -> Router:
    language = LanguageConfig(
        vocab_size=32, hidden_size=HIDDEN, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=32, moe=moe
    )
    group = dist.group.WORLD
    groups: Any = SimpleNamespace(tp=group, cp=group, tp_cp=group, tp_dp_cp=group)
    router = Router(moe, config=language.to_mcore(ParallelConfig(), torch.float32), pg_collection=groups)
    generator = torch.Generator().manual_seed(3)
    router.weight.data = torch.randn(router.weight.shape, generator=generator)
    router.set_layer_number(1)
    return router


def inputs() -> Tensor:
    return torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(5))


def told(specialties: list[int], num_padding: int = 0) -> Tensor:
    """A mask for as many tokens of each entry, the last of them padding."""
    specialty_BS = torch.tensor(specialties).repeat_interleave(TOKENS // len(specialties))[None]
    padding_BS = torch.arange(TOKENS)[None] >= TOKENS - num_padding
    return routing_mask(padding_BS, specialty_BS.masked_fill(padding_BS, 0), 2).transpose(0, 1)


def in_pools(picked_TE: Tensor) -> dict[str, np.ndarray]:
    return {name: picked_TE[:, list(members)].sum(1).numpy() for name, members in POOLS.members.items()}


def _megatron_side() -> list[tuple[float, bool]]:
    found = []
    for function in ("softmax", "sigmoid"):
        for top_k in (1, 2, 3):
            router = build(settings(score_function=function, top_k=top_k))
            probs, picked = router(inputs())
            logits = router.gating(inputs()).flatten(0, 1)
            want, want_picked = moe_utils.topk_routing_with_score_function(
                logits, top_k, use_pre_softmax=top_k == 1, score_function=function
            )
            found.append((float((probs - want).abs().max()), bool((picked == want_picked).all())))
    return found


def test_without_specialties_the_choice_is_megatrons(ranks: Any) -> None:
    for difference, same in ranks.run(_megatron_side, 1)[0]:
        assert same
        assert difference < 1e-6  # a softmax over the chosen, in fp32: one or two roundings


def _switch_loss() -> tuple[float, float]:
    """Difference to Megatron's loss with all experts in one pool, and of its gradient."""
    logits = [torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    picked = torch.zeros(TOKENS, 8, dtype=torch.bool).scatter_(1, logits[0].topk(2).indices, True)
    ours = pool_balance_share(logits[0].softmax(-1), picked, torch.ones(1, 8), dist.group.WORLD)
    theirs = moe_utils.switch_load_balancing_loss_func(
        logits[1].softmax(-1), picked.sum(0), TOKENS, topk=2, num_experts=8, moe_aux_loss_coeff=1.0
    )
    ours.backward()
    theirs.backward()
    gradients = [x.grad for x in logits]
    return float(ours / theirs - 1), float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())


def test_with_one_pool_the_balance_loss_is_the_usual_one(ranks: Any) -> None:
    loss, gradient = ranks.run(_switch_loss, 1)[0]
    # Sums of a hundred terms in another order.
    assert abs(loss) < 1e-5
    assert gradient < 1e-5


def _pressure() -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    member = torch.tensor([[float(pool == name) for pool, _ in POOLS.order] for name in POOLS.names])
    logits = torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(2))
    logits[:, list(POOLS.members["chest"])] += 9.0  # every token picks chest experts: bad for a global balance
    logits.requires_grad_()
    picked = torch.zeros(TOKENS, 8, dtype=torch.bool).scatter_(1, logits.topk(2).indices, True)
    loss = pool_balance_share(logits.softmax(-1), picked, member, dist.group.WORLD)
    loss.backward()
    assert logits.grad is not None
    return logits.grad.numpy(), in_pools(picked), float(loss.detach())


def test_no_pool_is_balanced_against_another(ranks: Any) -> None:
    gradient, picked, loss = ranks.run(_pressure, 1)[0]
    chest = list(POOLS.members["chest"])
    others = [e for e in range(8) if e not in chest]
    assert picked["chest"].min() == 2
    assert loss < 1.2, "1 is balanced: all tokens in one pool, evenly within it"
    # A pool without picks has no gradient, and within a pool what one expert gains another loses.
    assert np.abs(gradient[:, others]).max() < 1e-9
    # fp32 sums of four gradients of about 1e-3.
    assert np.abs(gradient[:, chest].sum(1)).max() < 1e-8
    assert np.abs(gradient[:, chest]).max() > 1e-5


def _modes() -> dict[str, dict[str, np.ndarray]]:
    mask = told([CHEST, NEURO, CHEST | NEURO, 0])
    found = {}
    for routing in ("free", "soft", "hard"):
        router = build(settings(routing=routing, prior_init=100.0))
        found[routing] = in_pools(router(inputs(), mask)[1])
    return found


def test_specialties_decide_what_they_should(ranks: Any) -> None:
    found = ranks.run(_modes, 1)[0]
    quarter = TOKENS // 4
    chest, neuro, both, none = (slice(i * quarter, (i + 1) * quarter) for i in range(4))
    assert found["free"]["neuro"][chest].any(), "metadata are ignored"
    for routing in ("soft", "hard"):
        assert not found[routing]["neuro"][chest].any()
        assert not found[routing]["chest"][neuro].any()
        assert found[routing]["chest"][both].any() and found[routing]["neuro"][both].any()
        for name in SIZES:
            assert (found[routing][name][none] == found["free"][name][none]).all(), "no specialty: scores alone"
        assert found[routing]["general"][chest].any(), "the general pool is open to all"


def _priors() -> np.ndarray:
    """Logits of a token of chest, of neuro, of both and of none, that the router's weight has nothing to say of."""
    router = build(settings(routing="soft", prior_init=2.0))
    router.weight.data.zero_()
    seen, choose = [], router._choose

    def watched(logits_TE: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(logits_TE.detach())
        return choose(logits_TE, *others)

    router._choose = watched  # type: ignore[method-assign]
    router(inputs(), told([CHEST, NEURO, CHEST | NEURO, 0]))
    return seen[0][:: TOKENS // 4].numpy()


def test_priors_favour_own_pools_and_the_general_one_alike(ranks: Any) -> None:
    logits = ranks.run(_priors, 1)[0]
    found = [{name: set(row[list(members)]) for name, members in POOLS.members.items()} for row in logits]
    assert found == [
        {"general": {2.0}, "chest": {2.0}, "neuro": {0.0}},
        {"general": {2.0}, "chest": {0.0}, "neuro": {2.0}},
        {"general": {2.0}, "chest": {2.0}, "neuro": {2.0}},
        {"general": {0.0}, "chest": {0.0}, "neuro": {0.0}},
    ]


def _padding() -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    router = build(settings(routing="hard"))
    probs, picked = router(inputs(), told([CHEST], num_padding=32))
    assert router.statistics is not None
    counts = router.statistics.picks_RE.numpy()
    return probs.detach().numpy(), picked.numpy(), counts, float(router.statistics.entropy)


def test_padding_weighs_nothing_counts_nothing_and_burdens_nobody(ranks: Any) -> None:
    probs, picked, picks_RE, entropy = ranks.run(_padding, 1)[0]
    assert not probs[-32:].any()
    load = picked[-32:].sum(0)
    assert load.min() == load.max() == 8
    rows = dict(zip(("chest", "neuro", "none", "all"), picks_RE, strict=True))
    assert rows["all"].sum() == 2 * 64 and (rows["all"] == rows["chest"]).all()
    assert (rows["all"] == picked[:-32].sum(0)).all()
    assert not rows["none"].any() and not rows["neuro"].any()
    assert 0 < entropy / 64 < np.log(6), "6 experts are open"


def test_a_bias_moves_within_its_pool() -> None:
    member = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    bias = torch.zeros(4)
    move_bias(bias, torch.tensor([1000, 1000, 5, 1]), member, 0.5)
    assert bias.tolist() == [0, 0, -0.5, 0.5], "a pool is no busier for another's being idle"


def _balancing() -> tuple[float, float]:
    """Busiest expert of the chest pool relative to its mean, before and after the biases have moved."""
    router = build(settings(routing="hard", balance="bias", bias_update_rate=0.02, score_function="sigmoid"))
    router.weight.data[list(POOLS.members["chest"])[0]] *= 4.0
    loads = []
    for _ in range(120):
        _, picked = router(inputs(), told([CHEST]))
        load = picked.sum(0)[list(POOLS.members["chest"])].double()
        loads.append(float(load.max() / load.mean()))
        router.move_bias(picked.sum(0))
    return loads[0], min(loads[-10:])


def test_biases_even_out_a_pool(ranks: Any) -> None:
    before, after = ranks.run(_balancing, 1)[0]
    assert before > 1.3
    assert after < 1.1


@pytest.mark.parametrize("ranks_of_experts", [1, 2, 4])
@pytest.mark.parametrize("sizes", [{"general": 8, "a": 4, "b": 12}, {"a": 4, "general": 4}, {"general": 16}])
def test_every_rank_has_its_share_of_every_pool(sizes: dict[str, int], ranks_of_experts: int) -> None:
    pools = Pools(sizes)
    share = pools.num_experts // ranks_of_experts
    for rank in range(ranks_of_experts):
        held = [name for name, _ in pools.order[rank * share : (rank + 1) * share]]
        assert {name: held.count(name) for name in sizes} == {n: s // ranks_of_experts for n, s in sizes.items()}
    assert sorted(number for members in pools.members.values() for number in members) == list(range(len(pools.order)))
    assert all(pools.order[number] == (name, i) for name in sizes for i, number in enumerate(pools.members[name]))
