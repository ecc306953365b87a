"""Seconds of counted work, by hand, on a cluster whose numbers are round."""

from dataclasses import replace

import pytest

from megamed.models.language import AttentionConfig
from megamed.preflight import ClusterConfig, Held, Peak, Rank, Sent, Work, estimate, filled_row
from megamed.preflight.roofline import BUBBLE, ENCODER, SYNCHRONISATION, phase_seconds
from megamed.preflight.step import GRADIENTS, LANGUAGE, OPTIMIZER, PHASES, VISION_BACKWARD, VISION_FORWARD
from megamed.preflight.work import ATTENTION, OTHERS, PRODUCTS, Amount
from megamed.runtime import ParallelConfig
from megamed.testing.tiny import tiny_vlm
from megamed.train import JobConfig

# 1 TFLOP and 1 GB a second; nodes of 4.
CLUSTER = ClusterConfig(
    gpus=8, gpus_per_node=4, peak_tflops=1.0, memory_gb_s=1.0, nvlink_gb_s=10.0, network_gb_s=1.0, products=1.0,
    attention=0.5, bandwidth=1.0, latency_us=0.0,
)  # fmt: skip


def test_links() -> None:
    node, pairs, columns, world = [0, 1, 2, 3], [0, 1, 4, 5], [0, 4], list(range(8))
    assert CLUSTER.link_gb_s("gather", node) == 10 and CLUSTER.link_name(node) == "NVLink"
    # One GPU of each node has one port; two have two, one each; and four never more than NVLink's share.
    assert CLUSTER.link_gb_s("gather", columns) == 1 and CLUSTER.link_name(columns) == "network"
    assert CLUSTER.link_gb_s("scatter", pairs) == 2 and CLUSTER.link_gb_s("reduce", world) == 4
    assert replace(CLUSTER, nvlink_gb_s=3.0).link_gb_s("gather", world) == 3
    assert CLUSTER.link_gb_s("send", pairs) == 1
    # Of 7 parts that a rank sends in an all-to-all of 8, 4 leave its node.
    assert CLUSTER.link_gb_s("all-to-all", world) == pytest.approx(7 / 4)
    assert replace(CLUSTER, bandwidth=0.5).link_gb_s("gather", columns) == 0.5


def test_a_phase() -> None:
    computed = {PRODUCTS: Amount(2e12, 1e9), ATTENTION: Amount(1e12, 0), OTHERS: Amount(0, 3e9)}
    transfers = {("tensor", "gather"): Sent(2, 5e9), ("ring", "send"): Sent(6, 2.5e9)}
    groups = {"tensor": [0, 1], "ring": [0, 4, 8, 12]}
    seconds = phase_seconds(LANGUAGE, Work(computed, transfers), groups, CLUSTER)
    # Attention, at half of the peak, takes 2 s; while its last of four blocks is computed nothing is on its way.
    assert seconds == {PRODUCTS: 2, ATTENTION: 2, OTHERS: 3, "tensor": 0.5, "ring": 1.0}
    slow_memory = replace(CLUSTER, memory_gb_s=0.1)
    assert phase_seconds(LANGUAGE, Work(computed, {}), {}, slow_memory)[PRODUCTS] == pytest.approx(10)
    late = replace(CLUSTER, latency_us=1e5)
    assert phase_seconds(LANGUAGE, Work({}, transfers), groups, late)["tensor"] == pytest.approx(0.5 + 2 * 1 * 0.1)
    reduced = Work({}, {("gradients", "reduce"): Sent(1, 0.0)})
    assert phase_seconds(GRADIENTS, reduced, {"gradients": [0, 1, 2]}, late) == {SYNCHRONISATION: pytest.approx(0.4)}


def test_a_step_of_a_pipeline() -> None:
    config = JobConfig()
    config.model, config.parallel = tiny_vlm(), ParallelConfig(pipeline=4, virtual_pipeline=1, data=2)
    config.attention, config.data.seq_length, config.train.microbatches = AttentionConfig(ulysses=1), 64, 12

    def rank(language: float, vision: float) -> Rank:
        work = {phase: Work() for phase in PHASES}
        work[VISION_FORWARD] = work[VISION_BACKWARD] = Work({PRODUCTS: Amount(vision * 1e12)})
        work[LANGUAGE] = Work({PRODUCTS: Amount(language * 1e12)})
        work[GRADIENTS] = Work({}, {("gradients", "scatter"): Sent(1, 3e9)})
        work[OPTIMIZER] = Work({OTHERS: Amount(0, 0.5e9)})
        return Rank(Held(0, 0, 0), Peak({"": 0}), work, {"gradients": [0, 1]})

    row = filled_row(config)
    found = estimate(config, [rank(6, 1), rank(8, 0.5)], row, CLUSTER)
    # The last stage is the slowest in language, the first in vision. 6 microbatches, 4 stages.
    expected = {ENCODER: 2, PRODUCTS: 8, BUBBLE: 8 * 3 / 6, SYNCHRONISATION: 0.3, "optimizer": 0.5}
    assert found.seconds == pytest.approx(expected) and found.limit == PRODUCTS
    assert found.bubble == pytest.approx(3 / (6 + 3))
    assert found.tokens_per_second == 12 * 64 / found.total
    assert found.mfu == found.model_flops / (found.total * 8 * 1e12)
    config.parallel.virtual_pipeline = 2
    assert estimate(config, [rank(6, 1), rank(8, 0.5)], row, CLUSTER).seconds[BUBBLE] == pytest.approx(8 * 3 / 12)
