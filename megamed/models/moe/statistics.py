"""What one router counts during a step.

Shapes: T tokens of this rank, P specialties, R = P + 2 rows (the specialties, tokens without any, all tokens),
E experts.
"""

import torch
from torch import Tensor


class LayerStatistics:
    """One router's counts since they were last taken.

    Attributes:
        picks_RE: choices by specialty and expert; a token with two specialties is in both rows, and once in the last.
        entropy: of the scores, summed over real tokens, nats.
        load_balancing_loss, z_loss: this rank's shares, before their coefficients; summed over the ranks of a row and
            over microbatches.
    """

    def __init__(self, num_specialties: int, num_experts: int, device: torch.device):
        # fp64 counts exactly, and is summed over ranks together with the rest.
        self.picks_RE = torch.zeros(num_specialties + 2, num_experts, dtype=torch.float64, device=device)
        self.entropy, self.load_balancing_loss, self.z_loss = torch.zeros(3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, picked_TE: Tensor, scores_TE: Tensor, called_TP: Tensor, real_T: Tensor) -> None:
        """Count the choices of some tokens.

        Args:
            picked_TE: bool, False for padding.
            scores_TE: above 0 where an expert can be chosen.
            called_TP: bool, the tokens' specialties.
            real_T: bool, False for padding.
        """
        called_TP = called_TP & real_T[:, None]
        none_T = real_T & ~called_TP.any(1)
        rows_TR = torch.cat([called_TP, none_T[:, None], real_T[:, None]], dim=1)
        self.picks_RE += torch.stack([(picked_TE & row_T[:, None]).sum(0) for row_T in rows_TR.unbind(1)])
        shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        self.entropy += (torch.special.entr(shares_TE).sum(-1) * real_T).sum()
