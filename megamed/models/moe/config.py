"""Settings of the mixture-of-experts layers."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class MoEConfig:
    """Experts in place of the dense MLP. `num_experts = 0` keeps every layer dense."""

    num_experts: int = 0
    top_k: int = 2
    """Experts each token is sent to."""
    intermediate_size: int = 1024
    """Width of one expert's SwiGLU MLP."""
    shared_intermediate_size: int = 0
    """Width of the expert that sees every token; 0 for none."""
    first_dense_layers: int = 0
    """Layers at the bottom that stay dense."""
    aux_loss_coeff: float = 0.01
    """Weight of the load-balancing loss (Switch Transformer, arXiv:2101.03961), averaged over microbatches."""
    z_loss_coeff: float = 0.0
    """Weight of the router's z-loss (ST-MoE, arXiv:2202.08906)."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"

    def to_mcore(self, num_layers: int) -> dict[str, Any]:
        """Fields of Megatron's `TransformerConfig` for these layers; empty for a dense model."""
        if not self.num_experts:
            return {}
        dense = self.first_dense_layers
        return dict(
            num_moe_experts=self.num_experts,
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
