"""Encoding frames in passes: a bound on the activations that are alive, and the same gradients whatever the bound.

Shapes: N frames, R rows (visual tokens), D their width.
"""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megamed.data import FrameRef
from megamed.models.vlm import FrameEncoder, VLMConfig, init_frame_encoder
from megamed.parallel.frame_passes import FramePasses
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.testing.whole import merge, shards
from megamed.train import JobConfig, build_job
from megamed.train.run import check_values, describe
from megamed.utils import UserError

FRAMES_PER_PASS = 2


class Watched:
    """A tiny frame encoder that notes what it is given, and a loader that notes what it is asked for."""

    def __init__(self, frames_per_pass: int, frames_in_flight: int | None, recompute: bool = False):
        config = tiny_vlm()
        config.vision.recompute = recompute
        self.encoder = FrameEncoder(config.vision, config.projector)
        init_frame_encoder(self.encoder, seed=1)
        self.source = SyntheticSource()
        self.asked: list[FrameRef] = []
        self.encoded: list[int] = []
        """Frames of each call of the encoder."""
        self.outputs: list[weakref.ref[Tensor]] = []
        self.encoder.register_forward_pre_hook(lambda _, inputs: self.encoded.append(len(inputs[0])))
        self.encoder.register_forward_hook(lambda *call: self.outputs.append(weakref.ref(call[2])))
        self.passes = FramePasses(
            self.encoder, self.encoder.tokens_per_frame, 64, torch.float32, frames_per_pass, frames_in_flight
        )

    def load(self, frames: Sequence[FrameRef]) -> Tensor:
        self.asked += frames
        return self.source.load_frames(frames)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.encoder.named_parameters() if p.grad is not None}


def references(count: int) -> list[FrameRef]:
    return [FrameRef(first=0, num_volumes=count, index=i) for i in range(count)]


def row_gradients(count: int, watched: Watched) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count * watched.encoder.tokens_per_frame, 64, generator=generator)


class SavedBytes:
    """Counts what autograd graphs hold besides weights: now, and at most."""

    def __init__(self, model: nn.Module):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.now = self.peak = 0

    def hooks(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor)

    def _pack(self, tensor: Tensor) -> Any:
        box = _Box(tensor)
        if tensor.untyped_storage().data_ptr() not in self.weights:
            size = tensor.numel() * tensor.element_size()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(box, self._drop, size)
        return box

    def _drop(self, size: int) -> None:
        self.now -= size


class _Box:
    """Holds a tensor for a graph; unlike the tensor, nothing else holds it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()  # an operation's own output would hold the graph that holds the box


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("in_flight", [1, 2, 3, 4, 10, 11, 100])
def test_gradients_do_not_depend_on_the_bound(in_flight: int, recompute: bool) -> None:
    count = 11
    found = {}
    for bound in (None, in_flight):
        watched = Watched(FRAMES_PER_PASS, bound, recompute)
        rows_RD = watched.passes.forward(references(count), watched.load)
        watched.passes.backward(row_gradients(count, watched))
        found[bound] = {"rows": rows_RD, **watched.gradients()}
    assert found[None].keys() == found[in_flight].keys() and len(found[None]) > 20
    for name, expected in found[None].items():
        if in_flight >= FRAMES_PER_PASS:  # the same passes, summed in the same order
            assert torch.equal(found[in_flight][name], expected), name
        else:  # smaller passes: fp32 sums over 11 frames in another order
            torch.testing.assert_close(found[in_flight][name], expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_one_graph_over_all_frames() -> None:
    count = 7
    watched = Watched(FRAMES_PER_PASS, 3)
    rows_RD = watched.passes.forward(references(count), watched.load)
    watched.passes.backward(row_gradients(count, watched))

    whole = Watched(count, None)
    expected_RD = whole.encoder(whole.load(references(count)))
    expected_RD.backward(row_gradients(count, whole))
    # fp32, frames batched differently.
    torch.testing.assert_close(rows_RD, expected_RD.detach(), rtol=1e-5, atol=1e-6)
    for name, gradient in whole.gradients().items():
        torch.testing.assert_close(watched.gradients()[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("in_flight", "again"), [(None, []), (11, []), (20, []), (4, [2, 2, 2, 1]), (5, [2, 2, 2, 1]),
                                                  (10, [1]), (2, [2, 2, 2, 2, 1])])
def test_frames_beyond_the_bound_are_encoded_twice_and_loaded_once(in_flight: int | None, again: list[int]) -> None:
    watched = Watched(FRAMES_PER_PASS, in_flight)
    rows_RD = watched.passes.forward(references(11), watched.load)
    assert watched.encoded == [2, 2, 2, 2, 2, 1]
    assert not rows_RD.requires_grad
    watched.passes.backward(row_gradients(11, watched))
    assert watched.encoded[6:] == again
    assert watched.asked == references(11)


def test_a_pass_is_never_larger_than_the_bound() -> None:
    watched = Watched(64, 3)
    watched.passes.forward(references(8), watched.load)
    assert watched.encoded == [3, 3, 2]


def peak_bytes(count: int, in_flight: int | None, recompute: bool = False, per_pass: int = FRAMES_PER_PASS) -> int:
    watched = Watched(per_pass, in_flight, recompute)
    saved = SavedBytes(watched.encoder)
    with saved.hooks():
        watched.passes.forward(references(count), watched.load)
        watched.passes.backward(row_gradients(count, watched))
    assert saved.now == 0, "a graph is left over"
    return saved.peak


@pytest.mark.parametrize("recompute", [False, True])
def test_no_more_frames_are_alive_than_the_bound(recompute: bool) -> None:
    a_frame = peak_bytes(1, None, recompute, per_pass=1)
    of_layers = 2 * 17 * 32 * 4  # an input of 17 tokens for each of two layers; all else is many times that
    assert of_layers < a_frame and (a_frame > 10 * of_layers) != recompute
    assert peak_bytes(20, None, recompute) == 20 * a_frame
    for in_flight in (2, 4, 6):
        for count in (in_flight, in_flight + 1, 20, 41):  # however long the study
            assert peak_bytes(count, in_flight, recompute) == in_flight * a_frame
    assert peak_bytes(20, 5, recompute) == 4 * a_frame  # whole passes of 2
    assert peak_bytes(20, 1, recompute) == a_frame


def test_the_rows_are_the_callers_alone() -> None:
    watched = Watched(FRAMES_PER_PASS, 4)
    rows = weakref.ref(watched.passes.forward(references(9), watched.load))
    assert rows() is None
    assert len(watched.outputs) == 5 and all(output() is None for output in watched.outputs)
    watched.passes.backward(row_gradients(9, watched))
    assert len(watched.gradients()) > 20


@pytest.mark.parametrize("in_flight", [None, 4])
def test_nothing_is_kept_for_evaluation(in_flight: int | None) -> None:
    watched = Watched(FRAMES_PER_PASS, in_flight)
    saved = SavedBytes(watched.encoder)
    with saved.hooks():
        rows_RD = watched.passes.forward(references(9), watched.load, keep_graph=False)
    assert saved.peak == 0 and not rows_RD.requires_grad
    expected_RD = Watched(FRAMES_PER_PASS, None).passes.forward(references(9), watched.load)
    assert torch.equal(rows_RD, expected_RD)
    assert sum(watched.encoded) == 9


def test_what_one_step_left_is_gone_in_the_next() -> None:
    """A forward pass without its backward pass, as when an evaluation or an error comes between."""
    watched = Watched(FRAMES_PER_PASS, 4)
    saved = SavedBytes(watched.encoder)
    with saved.hooks():
        watched.passes.forward(references(8), watched.load)
        kept = saved.now
        watched.passes.forward(references(8), watched.load)
        assert 0 < saved.peak == kept == saved.now
        watched.passes.backward(row_gradients(8, watched))
    assert saved.now == 0


@pytest.mark.parametrize("in_flight", [None, 1])
def test_no_frame_is_no_call(in_flight: int | None) -> None:
    watched = Watched(FRAMES_PER_PASS, in_flight)
    rows_RD = watched.passes.forward([], watched.load)
    assert rows_RD.shape == (0, 64)
    watched.passes.backward(rows_RD)
    assert not watched.asked and not watched.encoded and not watched.gradients()


def train(parallel: dict[str, Any], in_flight: int | None, distributed: bool) -> dict[str, Any]:
    """One rank's loss, gradients of two steps, and frames that its encoder saw, with one frame a pass."""
    config = JobConfig()
    config.model = small(in_flight)
    config.parallel = ParallelConfig(**parallel)
    config.data.seq_length = 64
    config.optim.distributed = distributed
    mesh = build_mesh(config.parallel, config.ulysses)
    seed_everything(1, mesh.data_rank)
    job = build_job(config, mesh)
    seen = []
    job.model.vision.module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    source, losses, gradients = SyntheticSource(), [], []
    for step in range(2):
        microbatches = [source.microbatch(4 * step + i) for i in range(4)]
        report = job.stepper.gradients(microbatches, source.load_frames)
        losses.append(report.loss)
        gradients.append(shards(job.model, gradients=True))
        assert report.num_encoded == report.num_frames
    card = describe(config, mesh)["model"]
    return {"losses": losses, "gradients": gradients, "seen": sum(seen), "card": card}


def small(in_flight: int | None) -> VLMConfig:
    model = tiny_vlm(num_layers=2)
    model.frames_per_pass, model.frames_in_flight = 1, in_flight
    return model


@pytest.mark.parametrize(("ranks_used", "parallel", "distributed"),
                         [(1, {}, False), (4, {"tensor": 2, "pipeline": 2}, True)], ids=["one process", "TP2 x PP2"])
def test_a_step_sums_the_gradients_of_many_passes(
    ranks: Any, ranks_used: int, parallel: dict[str, Any], distributed: bool
) -> None:
    """Through Megatron's DDP, whose hooks add each pass to `main_grad`: bit for bit, whatever the bound."""
    kept = ranks.run(train, ranks_used, parallel, None, distributed)
    bounded = ranks.run(train, ranks_used, parallel, 2, distributed)
    assert bounded[0]["losses"] == kept[0]["losses"]
    for step in range(2):
        found = merge([rank["gradients"][step] for rank in bounded])
        expected = merge([rank["gradients"][step] for rank in kept])
        vision = [name for name in expected if name.startswith("vision.")]
        assert len(vision) > 20 and all(np.abs(expected[name]).max() > 0 for name in vision)
        for name, value in expected.items():
            assert np.array_equal(found[name], value), name
    num_frames = 2 * 16  # two steps
    assert sum(rank["seen"] for rank in kept) == num_frames
    assert sum(rank["seen"] for rank in bounded) == 2 * num_frames - 2 * 2 * ranks_used  # two are kept by each rank
    # A run goes on with another bound: it says nothing about the weights.
    assert bounded[0]["card"] == kept[0]["card"]


def test_the_bound_is_one_frame_or_more() -> None:
    config = JobConfig()
    config.model.frames_in_flight = 0
    with pytest.raises(UserError, match=r"model\.frames_in_flight=0 has to be 1 or more"):
        check_values(config)
    config.model.frames_in_flight = None
    check_values(config)
