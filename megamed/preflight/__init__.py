"""What a job takes, before it is started: any rank of any world size, built without memory on one machine."""

import megamed.runtime  # noqa: F401  makes Megatron importable, before the modules below import it
from megamed.preflight.before import alone_without_gpu, check_before_start
from megamed.preflight.cluster import ClusterConfig, load_cluster
from megamed.preflight.estimate import estimate_rank
from megamed.preflight.held import Held, built_rank, held_by
from megamed.preflight.job import Assessment, assess, quieten, room
from megamed.preflight.roofline import Estimate, estimate, transfer_seconds
from megamed.preflight.search import layouts, search
from megamed.preflight.step import (
    LANGUAGE,
    PARTS,
    VISION_BACKWARD,
    VISION_FORWARD,
    Rank,
    filled_row,
    trace_rank,
    trace_step,
)
from megamed.preflight.trace import Peak
from megamed.preflight.work import Sent, Work

__all__ = [
    "LANGUAGE",
    "PARTS",
    "VISION_BACKWARD",
    "VISION_FORWARD",
    "Assessment",
    "ClusterConfig",
    "Estimate",
    "Held",
    "Peak",
    "Rank",
    "Sent",
    "Work",
    "alone_without_gpu",
    "assess",
    "built_rank",
    "check_before_start",
    "estimate",
    "estimate_rank",
    "filled_row",
    "held_by",
    "layouts",
    "load_cluster",
    "quieten",
    "room",
    "search",
    "trace_rank",
    "trace_step",
    "transfer_seconds",
]
