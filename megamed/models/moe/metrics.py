"""The auxiliary losses that routers record during a step.

Each value is a rank's share, before its coefficient: summed over the tensor-parallel ranks it is the
loss of the microbatch.
"""

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils

AUX_LOSSES = ("load_balancing_loss", "z_loss")


def record_loss(name: str, share: torch.Tensor, layer_number: int | None, num_layers: int) -> None:
    """Add a share to what Megatron's own routers record under the same roof."""
    if hasattr(moe_utils, "save_to_aux_losses_tracker"):  # megatron-core 0.16
        moe_utils.save_to_aux_losses_tracker(name, share, layer_number, num_layers)
    else:
        _tracker().record(name, share, layer_number, num_layers)


def take_recorded_losses() -> dict[str, torch.Tensor]:
    """This rank's shares, summed over its layers and microbatches; clears the record."""
    if hasattr(moe_utils, "get_moe_layer_wise_logging_tracker"):  # megatron-core 0.16
        entries = moe_utils.get_moe_layer_wise_logging_tracker()
        recorded = {name: entry["values"] for name, entry in entries.items()}
    else:
        entries = _tracker().metrics
        recorded = {name: entry.values for name, entry in entries.items()}
    # Emptied, not zeroed: an entry has the depth of the model that made it, and holds process groups.
    entries.clear()
    return {name: recorded[name].sum().double() for name in AUX_LOSSES if name in recorded}


def _tracker() -> Any:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    return get_moe_metrics_tracker()
