"""The experts' router: scores, what a token's specialties make of them, the choice, and what is counted of it.

Shapes: S tokens of a row that this rank holds, B = 1, T = S * B, H hidden size, E experts, K experts of a token,
P specialties, Q pools.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megamed.models.moe.balance import move_bias, pool_balance_share, z_loss_share
from megamed.models.moe.config import MoEConfig
from megamed.models.moe.pools import GENERAL, Pools
from megamed.models.moe.statistics import LayerStatistics


def routing_mask(padding_BS: Tensor, specialty_BS: Tensor, num_specialties: int) -> Tensor:
    """What routers are told of each token: bool [B, S, 1 + P], whether it is padding, and which specialties it has.

    Megatron hands it on, layer by layer and through recomputation, as the padding mask that it is an extension of:
    so every router has the specialties of its own microbatch and its own part of the row.

    Args:
        padding_BS: bool.
        specialty_BS: int64, bit i for the i-th specialty.
        num_specialties: P.
    """
    bit_P = torch.arange(num_specialties, device=specialty_BS.device)
    return torch.cat([padding_BS[..., None], (specialty_BS[..., None] >> bit_P & 1).bool()], dim=-1)


def in_turns(experts_R: Tensor, num_tokens: int, top_k: int) -> Tensor:
    """Experts for tokens that nothing speaks for [T, K]: one after the other, and from the first again."""
    turn_TK = torch.arange(num_tokens * top_k, device=experts_R.device).view(-1, top_k)
    return experts_R[turn_TK % len(experts_R)]


class PoolMasks:
    """Which expert belongs where, as tensors on one device.

    Attributes:
        member_QE: 1 where expert e is in pool q.
        own_PE: 1 where expert e is in the pool of specialty p.
        general_E: True for the experts of the general pool.
    """

    def __init__(self, pools: Pools, device: torch.device):
        def rows(names: tuple[str, ...]) -> Tensor:
            table = [[float(owner == name) for owner, _ in pools.order] for name in names]
            return torch.tensor(table, device=device).view(len(names), pools.num_experts)

        self.member_QE, self.own_PE = rows(pools.names), rows(pools.specialties)
        self.general_E = rows((GENERAL,))[0].bool()


def initial_prior(moe: MoEConfig) -> Tensor:
    """What priors start at [P, E]: `prior_init` for the experts of a specialty's own pool and of the general one.

    Which pool an expert is in is told by the configuration alone, so this needs no draw.
    """
    masks = PoolMasks(moe.resolved, torch.device("cpu"))
    return moe.prior_init * (masks.own_PE + masks.general_E)


class Router(TopKRouter):
    """A top-k router over pools of experts; without pools, the usual one.

    Its weight and how it is made and sharded are Megatron's. The choice is not: Megatron's knows hidden states alone,
    and balances all experts against each other.

    Args:
        moe: the settings.
        config, others: what Megatron gives its routers.
    """

    def __init__(self, moe: MoEConfig, config: TransformerConfig, **others: Any):
        super().__init__(config=config, **others)
        self.moe, self.pools = moe, moe.resolved
        self.weight.is_router = True  # type: ignore[attr-defined]
        self.statistics: LayerStatistics | None = None
        self._masks: PoolMasks | None = None
        if moe.routing == "soft":
            self.prior = nn.Parameter(initial_prior(moe).to(config.params_dtype))
            self.prior.is_router = True  # type: ignore[attr-defined]
            # Each tensor-parallel rank has the gradient of its own tokens.
            self.prior.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if moe.balance == "bias":
            del self.expert_bias  # None, since it is not Megatron's to move
            self.register_buffer("expert_bias", torch.zeros(self.pools.num_experts))

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            input: hidden states [S, B, H].
            padding_mask: what `routing_mask` makes, transposed: bool [S, B, 1 + P]; or [S, B] without specialties.

        Returns:
            Weights of the chosen experts [T, E], fp32, 0 for the others and for padding; and the choice, bool [T, E].
        """
        logits_TE = self.gating(input).flatten(0, -2)
        real_T, called_TP = self.tokens(logits_TE, padding_mask)
        masks = self._masks_on(logits_TE.device)
        if self.moe.routing == "soft":
            prior_TE = called_TP.float() @ self.prior.float()
            # Else the general pool would have as many priors as a token has specialties, and win against each of them.
            share_T1 = called_TP.sum(1, keepdim=True).clamp(min=1).reciprocal()
            logits_TE = logits_TE + prior_TE * torch.where(masks.general_E, share_T1, 1.0)
        keeps_record = self.training and torch.is_grad_enabled()  # not in the first pass of recomputation
        if keeps_record and self.moe.z_loss_coeff:
            share = z_loss_share(logits_TE, real_T, self.tp_cp_group)
            self._record().z_loss += share.detach()
            logits_TE = MoEAuxLossAutoScaler.apply(logits_TE, share * self.moe.z_loss_coeff)
        if self.moe.routing == "hard":
            open_TE = (called_TP.float() @ masks.own_PE).bool() | masks.general_E | ~called_TP.any(1, keepdim=True)
            logits_TE = logits_TE.masked_fill(~open_TE, float("-inf"))
        scores_TE = logits_TE.softmax(-1) if self.moe.score_function == "softmax" else logits_TE.sigmoid()
        probs_TE, picked_TE = self._choose(logits_TE, scores_TE, real_T)
        if keeps_record:
            picked_real_TE = picked_TE & real_T[:, None]
            self._record().add(picked_real_TE, scores_TE, called_TP, real_T)
            if self.moe.balance == "aux_loss" and self.moe.aux_loss_coeff:
                share = pool_balance_share(scores_TE, picked_real_TE, masks.member_QE, self.tp_cp_group)
                self._record().load_balancing_loss += share.detach()
                probs_TE = MoEAuxLossAutoScaler.apply(probs_TE, share * self.moe.aux_loss_coeff)
        return probs_TE, picked_TE

    def tokens(self, logits_TE: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a padding mask says: which tokens are real [T], and their specialties [T, P]."""
        num_tokens, num_specialties = len(logits_TE), len(self.pools.specialties)
        if mask is not None and mask.dim() == 3:
            told = mask.flatten(0, 1)
            return ~told[:, 0], told[:, 1:]
        none = torch.zeros(num_tokens, num_specialties, dtype=torch.bool, device=logits_TE.device)
        return ~none.new_zeros(num_tokens) if mask is None else ~mask.flatten(), none

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, real_T: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, E] and the choice [T, E]."""
        top_k, is_softmax = self.moe.top_k, self.moe.score_function == "softmax"
        with torch.no_grad():
            basis_TE = logits_TE
            if self.moe.balance == "bias":
                basis_TE = (scores_TE + self.expert_bias).masked_fill(logits_TE == float("-inf"), float("-inf"))
            chosen_TK = basis_TE.topk(top_k, dim=-1).indices
            # Padding looks alike and would all go to the same experts; in turns it burdens none more than another.
            turn_TK = in_turns(torch.arange(self.pools.num_experts, device=real_T.device), len(real_T), top_k)
            chosen_TK = torch.where(real_T[:, None], chosen_TK, turn_TK)
            picked_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, chosen_TK, True)
        if is_softmax and top_k > 1:
            logits_TK = logits_TE.gather(1, chosen_TK)
            weights_TK = logits_TK.masked_fill(~real_T[:, None], 0.0).softmax(-1)
        else:
            weights_TK = scores_TE.gather(1, chosen_TK)
            if top_k > 1:
                weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK.masked_fill(~real_T[:, None], 0.0)
        return torch.zeros_like(logits_TE).scatter(1, chosen_TK, weights_TK), picked_TE

    def _masks_on(self, device: torch.device) -> PoolMasks:
        if self._masks is None or self._masks.member_QE.device != device:
            self._masks = PoolMasks(self.pools, device)
        return self._masks

    def _record(self) -> LayerStatistics:
        if self.statistics is None:
            self.statistics = LayerStatistics(len(self.pools.specialties), self.pools.num_experts, self.weight.device)
        return self.statistics

    def move_bias(self, picks_E: Tensor) -> None:
        """balance=bias: move the experts' bias after a step.

        Args:
            picks_E: choices of the global batch's tokens in this layer, on any device.
        """
        if self.moe.balance == "bias":
            bias_E = self.expert_bias
            assert isinstance(bias_E, Tensor)
            member_QE = self._masks_on(bias_E.device).member_QE
            move_bias(bias_E, picks_E.to(bias_E.device), member_QE, self.moe.bias_update_rate)
