"""Settings of the mixture-of-experts layers."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megamed.data.specialties import MatchRule, Specialty
from megamed.models.moe.pools import GENERAL, Pools


@dataclass
class PoolConfig:
    """A pool of experts, and which studies call it.

    The pool named `general` is called by every token, and has neither rules nor labels.
    """

    num_experts: int = 1
    match: list[MatchRule] = field(default_factory=list)
    """A series that one of these rules holds for calls the pool."""
    labels: list[str] = field(default_factory=list)
    """What a sample may call the pool by, beside its name, in its field `specialties`."""


@dataclass
class MoEConfig:
    """Experts in place of the dense MLP. With neither `num_experts` nor `pools` every layer is dense."""

    num_experts: int = 0
    """Experts of a plain mixture; 0 where `pools` say how many there are."""
    pools: dict[str, PoolConfig] = field(default_factory=dict)
    """Named pools of experts (specialists)."""
    routing: Literal["free", "soft", "hard"] = "free"
    """What a token's specialties decide. free: nothing. soft: a prior, learned in each layer for each specialty, is
    added to the router's scores. hard: experts of the specialties' pools and of the pool `general` alone can be
    chosen. A token without specialty chooses from all experts, with its scores alone."""
    specialty_dropout: float = 0.1
    """Share of training samples whose specialties are withheld, so that studies without metadata route well."""
    prior_init: float = 2.0
    """soft: what the prior of a specialty starts at for its own pool's experts, in units of the router's logits; 0 for
    the others."""
    top_k: int = 2
    """Experts each token is sent to."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores. Those of the chosen experts are then scaled to a sum of 1, but for top_k=1."""
    intermediate_size: int = 1024
    """Width of one expert's SwiGLU MLP."""
    shared_intermediate_size: int = 0
    """Width of the expert that sees every token; 0 for none."""
    first_dense_layers: int = 0
    """Layers at the bottom that stay dense."""
    balance: Literal["aux_loss", "bias"] = "aux_loss"
    """How experts of one pool are kept equally busy: by a loss, or by a bias on the choice (and by nothing, with
    aux_loss_coeff=0). Pools are never balanced against each other."""
    aux_loss_coeff: float = 0.01
    """Weight of the load-balancing loss (Switch Transformer, arXiv:2101.03961, within each pool), averaged over
    microbatches; without meaning with balance=bias."""
    bias_update_rate: float = 1e-3
    """balance=bias: what an expert's bias moves by after each step (DeepSeek-V3, arXiv:2412.19437)."""
    z_loss_coeff: float = 0.0
    """Weight of the router's z-loss (ST-MoE, arXiv:2202.08906)."""
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """Megatron's token dispatcher; flex needs DeepEP."""
    log_every: int = 50
    """Steps between two lines of `routing.jsonl`, each with the routing of the steps since the one before."""

    @property
    def resolved(self) -> Pools:
        """The pools with their experts' numbers; a plain mixture is one pool."""
        return Pools({name: pool.num_experts for name, pool in self.pools.items()} or {GENERAL: self.num_experts})

    @property
    def total_experts(self) -> int:
        """Experts of a layer; 0 for a dense model."""
        return self.resolved.num_experts

    @property
    def specialties(self) -> tuple[Specialty, ...]:
        """What the data path matches studies with, in the order of `Pools.specialties`."""
        return tuple(
            Specialty(name, tuple(self.pools[name].match), tuple(self.pools[name].labels))
            for name in self.resolved.specialties
            if name in self.pools
        )

    def to_mcore(self, num_layers: int) -> dict[str, Any]:
        """Fields of Megatron's `TransformerConfig` for these layers; empty for a dense model."""
        if not self.total_experts:
            return {}
        dense = self.first_dense_layers
        return dict(
            num_moe_experts=self.total_experts,
            moe_router_topk=self.top_k,
            moe_ffn_hidden_size=self.intermediate_size,
            moe_shared_expert_intermediate_size=self.shared_intermediate_size or None,
            moe_layer_freq=[0] * dense + [1] * (num_layers - dense),
            moe_router_load_balancing_type="aux_loss" if self.aux_loss_coeff else "none",
            moe_aux_loss_coeff=self.aux_loss_coeff,
            moe_z_loss_coeff=self.z_loss_coeff or None,
            moe_router_dtype="fp32",
            moe_token_dispatcher_type=self.dispatcher,
            moe_grouped_gemm=False,
        )
