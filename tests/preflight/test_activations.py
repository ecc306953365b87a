"""What a step takes by running it without memory is what it takes when it is run: on many layouts, each rank."""

from typing import Any

import pytest

from megamed.models.language import AttentionConfig
from megamed.preflight.activations import Peak, filled_row, peak_of_rank, step_peak
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.train import JobConfig, build_job

SEQ_LENGTH, MICROBATCHES = 256, 4
SP, PP, CP = {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}
# Ranks, layout, changes of the model.
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process, recompute": (1, {}, {"recompute": True}),
    "frames in flight": (1, {}, {"frames_in_flight": 4}),
    "TP2 + SP": (2, SP, {}),
    "PP2, interleaved": (2, {**PP, "virtual_pipeline": 2}, {}),
    "CP2": (2, CP, {}),
    "TP2 + SP x PP2 x CP2, recompute": (8, {**SP, **PP, **CP}, {"recompute": True}),
}


def job(name: str) -> JobConfig:
    num_ranks, layout, changes = LAYOUTS[name]
    config = JobConfig()
    config.model = tiny_vlm()
    config.model.language.recompute = changes.get("recompute", False)
    config.model.vision.recompute = changes.get("recompute", False)
    config.model.frames_in_flight, config.model.frames_per_pass = changes.get("frames_in_flight"), 2
    config.parallel = ParallelConfig(**layout)
    config.attention = AttentionConfig(ulysses=1)
    config.data.seq_length, config.train.dtype = SEQ_LENGTH, "fp32"
    config.validate(num_ranks)
    return config


def source() -> SyntheticSource:
    return SyntheticSource(SEQ_LENGTH, plan=((20, 0, 6), (0, 0), (30,), (7, 2)))


def _really(name: str) -> Peak:
    config = job(name)
    mesh = build_mesh(config.parallel, config.ulysses, config.document_multiple)
    seed_everything(1, mesh.data_rank)
    built = build_job(config, mesh)
    rows, count = source(), MICROBATCHES // mesh.data_size
    mine = [rows.microbatch(mesh.data_rank * count + i) for i in range(count)]
    return step_peak(built.model, built.phase, mesh, mine, rows.load_frames, 1.0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_step_that_is_run_without_memory_takes_as_much(name: str, ranks: Any) -> None:
    num_ranks = LAYOUTS[name][0]
    wanted = ranks.run(_really, num_ranks, name)
    config = job(name)
    for rank in sorted({0, num_ranks // 2, num_ranks - 1}):
        peak = wanted[rank]
        mine = [source().microbatch(i) for i in range(MICROBATCHES)]
        found = peak_of_rank(config, rank, num_ranks, mine)
        # The bar is 10 %. The same operations are run; on a CPU, indices that stay on the host count as the device's,
        # and with models as small as these they are some percent.
        assert found.most == pytest.approx(peak.most, rel=0.05)
        assert found.phases["language"] == pytest.approx(peak.phases["language"], rel=0.05)
        # Pixels of a frame, which are a tenth of all here, may come from memory that torch did not allocate.
        assert found.phases["vision, forward"] == pytest.approx(peak.phases["vision, forward"], rel=0.12)
        # Gloo's threads let go of what they sent when they come to it.
        assert found.phases["vision, backward"] == pytest.approx(peak.phases["vision, backward"], rel=0.25)


def test_recomputation_takes_less() -> None:
    def most(name: str, **changes: Any) -> int:
        config = job(name)
        for key, value in changes.items():
            setattr(config.model.language, key, value)
        rows = [source().microbatch(i) for i in range(MICROBATCHES)]
        return peak_of_rank(config, 0, LAYOUTS[name][0], rows).phases["language"]

    assert most("one process, recompute") < 0.6 * most("one process, recompute", recompute=False)


def test_a_row_is_filled_with_frames_and_text() -> None:
    config = job("one process, recompute")
    row = filled_row(config, frame_tokens=4)
    assert row.num_real == len(row.tokens_S) == SEQ_LENGTH and len(row.cu_seqlens) == 2
    assert len(row.frames) * 4 == len(row.visual_positions) <= SEQ_LENGTH - 16
    assert int(row.loss_kind_S.count_nonzero()) == SEQ_LENGTH - 1 - len(row.visual_positions)
