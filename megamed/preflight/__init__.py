"""What a job takes, before it is started: any rank of any world size, built without memory on one machine."""

import megamed.runtime  # noqa: F401  makes Megatron importable, before the modules below import it
from megamed.preflight.activations import Peak, filled_row, peak_of_rank
from megamed.preflight.cluster import ClusterConfig, load_cluster
from megamed.preflight.held import Held, held_by, held_by_rank, stage_ranks

__all__ = [
    "ClusterConfig",
    "Held",
    "Peak",
    "filled_row",
    "held_by",
    "held_by_rank",
    "load_cluster",
    "peak_of_rank",
    "stage_ranks",
]
