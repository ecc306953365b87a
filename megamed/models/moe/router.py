"""The experts' router: Megatron's top-k router with a z-loss that is the same at every layout."""

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megamed.models.moe.metrics import record_loss


class Router(TopKRouter):
    """Megatron averages the z-loss over each tensor-parallel rank's own tokens and then over ranks. With
    padding at the end of the row the ranks hold different numbers of real tokens, and the mean of means is
    not the mean. Here each rank adds its share of one mean over the whole row.
    """

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the z-loss (ST-MoE, arXiv:2202.08906) to the logits' gradient.

        Args:
            logits: [tokens of this rank, experts].
            padding_mask: [tokens of this rank], True where a token is padding.
        """
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not (self.training and torch.is_grad_enabled()):
            return logits
        squared = torch.logsumexp(logits, dim=-1).square()
        if padding_mask is not None:
            squared = squared * ~padding_mask
            count = (~padding_mask).sum()
        else:
            count = torch.tensor(squared.numel(), device=squared.device)
        dist.all_reduce(count, group=self.tp_cp_group)
        share = squared.sum() / count.clamp(min=1)
        record_loss("z_loss", share, self.layer_number, self.config.num_layers)
        return MoEAuxLossAutoScaler.apply(logits, share * coeff)
