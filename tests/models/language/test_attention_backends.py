"""Attention of other libraries: who may be chosen where, and what they are handed.

Neither library runs without a GPU. What runs here is everything of them that is Python, on stand-ins for their kernels:
Megatron's own wrapper of Transformer Engine on a `DotProductAttention` that expects what Transformer Engine documents,
and ring-flash-attn's own ring on a `flash_attn` that is written out.

Shapes: T tokens of a rank, S tokens of the row, N query heads, G key/value heads, D head width; of one document,
t queries and k keys.
"""

import importlib.util
import operator
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamed.models.language import AttentionConfig, LanguageConfig, backends, check_backend
from megamed.optim import OptimConfig
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.testing.whole import merge, shards
from megamed.train import JobConfig, build_job
from megamed.utils import UserError

TE, RFA = {"backend": "transformer_engine"}, {"backend": "ring_flash_attn"}
SEQ_LENGTH, MICROBATCHES = 64, 4


# ---- what is refused, in one sentence that names the key


@pytest.mark.parametrize(
    ("attention", "parallel", "language", "sentence"),
    [
        (RFA, {}, {}, "ring_flash_attn passes .* parallel.context=1 has one; choose attention.backend=auto"),
        ({**RFA, "ulysses": 2}, {"context": 4}, {}, "by a ring, which is attention.ring=4 x .*ulysses=1 at"),
        ({**TE, "ulysses": 2}, {"context": 4}, {}, "communicates by p2p, which is attention.ring=4 x .*ulysses=1 at"),
        ({**TE, "transformer_engine_comm": "all_gather", "ring": 2}, {"context": 4}, {}, "by all_gather, .*ring=4 x"),
        ({**TE, "transformer_engine_comm": "a2a", "ring": 4}, {"context": 4}, {}, "by a2a, .*ring=1 x .*ulysses=4 at"),
        ({**TE, "transformer_engine_comm": "a2a"}, {"context": 4, "tensor": 4}, {},
         "comm=a2a shares the 2 key/value heads .* over 4 context ranks, which does not divide; choose p2p"),
        ({**TE, "transformer_engine_comm": "a2a+p2p", "ulysses": 4}, {"context": 8, "tensor": 4}, {},
         "a2a\\+p2p shares the 2 key/value heads"),
        ({**TE, "transformer_engine_comm": "a2a+p2p", "ring": 3}, {"context": 8}, {},
         "ring=3 does not divide parallel.context=8"),
        (TE, {}, {"head_dim": 20}, "multiple of 8 up to 256, and model.language.head_dim is 20; choose"),
        (RFA, {"context": 2}, {"head_dim": 264}, "model.language.head_dim is 264"),
        (TE, {"context": 2, "use_ring_attention": True}, {}, "use_ring_attention=true and .* contradict"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(attention: Any, parallel: Any, language: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        AttentionConfig(**attention).validate(LanguageConfig(**language), ParallelConfig(**parallel))
    assert error.value.everywhere


@pytest.mark.parametrize(
    ("attention", "expected", "multiple"),
    [
        ({}, (1, 8), 1),
        (RFA, (8, 1), 16),
        (TE, (8, 1), 16),
        ({**TE, "transformer_engine_comm": "all_gather"}, (8, 1), 16),
        ({**TE, "transformer_engine_comm": "a2a"}, (1, 8), 16),
        ({**TE, "transformer_engine_comm": "a2a+p2p", "ulysses": 2}, (4, 2), 16),
        ({**TE, "transformer_engine_comm": "a2a+p2p"}, (1, 8), 16),
    ],
)
def test_how_context_ranks_are_used(attention: Any, expected: tuple[int, int], multiple: int) -> None:
    config, language, parallel = AttentionConfig(**attention), LanguageConfig(), ParallelConfig(context=8)
    config.validate(language, parallel)
    assert config.split(language, parallel, ranks_per_node=8) == expected
    assert config.document_multiple(parallel) == multiple
    assert config.document_multiple(ParallelConfig()) == 1


def check(attention: dict[str, Any], dtype: torch.dtype = torch.bfloat16, context: int = 2) -> None:
    check_backend(AttentionConfig(**attention), LanguageConfig(), ParallelConfig(context=context), dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU and neither library."""
    monkeypatch.setattr(backends, "device_type", lambda: "cuda")
    for name in ("transformer_engine", "transformer_engine.pytorch", "flash_attn", "ring_flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)
    return monkeypatch


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__path__ = []
    made.__dict__.update(contents)
    return made


def install_transformer_engine(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", module("transformer_engine", __version__=version))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module("transformer_engine.pytorch"))


@pytest.mark.parametrize("attention", [TE, RFA])
def test_without_a_gpu(attention: Any) -> None:
    sentence = f"attention.backend={attention['backend']} needs a GPU, and there is none here; choose .*=auto"
    with pytest.raises(UserError, match=sentence):
        check(attention)
    config = JobConfig(attention=AttentionConfig(**attention), parallel=ParallelConfig(context=2))
    with pytest.raises(UserError, match=sentence):
        config.validate(world_size=2)


@pytest.mark.parametrize("attention", [TE, RFA])
def test_in_fp32(attention: Any, gpu: Any) -> None:
    with pytest.raises(UserError, match="does not compute in fp32; set train.dtype=bf16, or choose attention.backend"):
        check(attention, torch.float32)


def test_what_is_not_installed_is_named(gpu: Any) -> None:
    with pytest.raises(UserError, match="needs transformer_engine, which is not installed; .*pip .* or choose .*=auto"):
        check(TE)
    gpu.setitem(sys.modules, "transformer_engine", module("transformer_engine", __version__="2.11.0"))
    with pytest.raises(UserError, match="needs transformer_engine.pytorch, which is not installed"):
        check(TE)
    with pytest.raises(UserError, match="needs flash_attn.flash_attn_interface, which is not .*flash-attn, or"):
        check(RFA)
    gpu.setitem(sys.modules, "flash_attn", module("flash_attn"))
    gpu.setitem(sys.modules, "flash_attn.flash_attn_interface", module("flash_attn.flash_attn_interface"))
    with pytest.raises(UserError, match="needs ring_flash_attn.*is not installed; .*pip install ring-flash-attn, or"):
        check(RFA)


@pytest.mark.parametrize(
    ("comm", "version", "fits"),
    [
        ("p2p", "2.11.0", True),
        ("a2a", "2.11.0", True),
        ("all_gather", "2.17.1", False),
        ("all_gather", "2.18.0", True),
        ("a2a+p2p", "2.18.0", False),
        ("a2a+p2p", "2.19.0", True),
        ("a2a+p2p", "3.0.0.dev0+abc", True),
    ],
)
def test_packed_documents_need_a_transformer_engine_that_takes_them(
    comm: str, version: str, fits: bool, gpu: Any
) -> None:
    install_transformer_engine(gpu, version)
    attention = {**TE, "transformer_engine_comm": comm}
    check(attention, context=1)
    if fits:
        check(attention)
    else:
        with pytest.raises(UserError, match=f"{re.escape(comm)} needs .* {version} is installed; choose p2p or a2a"):
            check(attention)


def test_ours_is_what_auto_means_whatever_is_installed(gpu: Any) -> None:
    install_transformer_engine(gpu, "2.20.2")
    for backend in ("auto", "ring"):
        check({"backend": backend}, torch.float32)
        assert AttentionConfig(backend=backend).is_ours  # type: ignore[arg-type]


def test_rows_that_do_not_divide(gpu: Any) -> None:
    install_transformer_engine(gpu, "2.11.0")
    config = JobConfig(parallel=ParallelConfig(context=4), attention=AttentionConfig(**TE))
    config.data.seq_length = 516
    config.train.dtype = "bf16"
    assert config.document_multiple == 8
    with pytest.raises(UserError, match="data.seq_length=516 has to be a multiple of 2 x parallel.context = 8 with"):
        config.validate(world_size=4)
    config.data.seq_length = 520
    config.validate(world_size=4)


def unpadded(attention: dict[str, Any]) -> str:
    mesh = build_mesh(ParallelConfig())
    mesh.config.context = 2
    try:
        backends.build_attend(AttentionConfig(**attention), mesh)
    except UserError as error:
        return str(error)
    return ""


def test_a_program_that_packs_documents_of_any_length_is_told(ranks: Any) -> None:
    (said,) = ranks.run(unpadded, 1, RFA)
    assert "ring_flash_attn wants documents filled up to multiples of 4 tokens, which this program does not do" in said


# ---- Transformer Engine's side, as documented in attn_forward_func_with_cp and DotProductAttention


class Gather(torch.autograd.Function):
    """All ranks' tokens, [S, ...]; backward sums what all ranks have to say of this rank's."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x_T) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x_T.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def tokens_of_rank(bounds: list[int], ranks: int, rank: int) -> list[int]:
    """DualChunkSwap: two of every document's 2 x ranks chunks."""
    held: list[int] = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        assert (end - start) % (2 * ranks) == 0, "documents have to be padded to multiples of 2 x ranks"
        size = (end - start) // (2 * ranks)
        for chunk in (rank, 2 * ranks - 1 - rank):
            held += range(start + chunk * size, start + (chunk + 1) * size)
    return held


def attend(q_tND: Tensor, k_kGD: Tensor, v_kGD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(values [t, N, D], log-sum-exp [N, t]) of one document's block."""
    k, v = (x.repeat_interleave(q_tND.shape[1] // x.shape[1], 1) for x in (k_kGD, v_kGD))
    scores = torch.einsum("tnd,knd->ntk", q_tND, k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("ntk,knd->tnd", scores.softmax(-1), v), scores.logsumexp(-1)


class DotProductAttention(nn.Module):
    """Takes what Transformer Engine 2.11 takes, and checks what it checks; computes the whole row on every rank."""

    def __init__(
        self, *, num_attention_heads: int, kv_channels: int, num_gqa_groups: int, attention_dropout: float,
        attn_mask_type: str, sequence_parallel: bool, tp_size: int, get_rng_state_tracker: Any, tp_group: Any,
        layer_number: int, attention_type: str, softmax_scale: float | None, cp_group: Any = None,
        cp_global_ranks: Any = None, cp_stream: Any = None, cp_comm_type: str = "p2p",
    ):  # fmt: skip
        super().__init__()
        assert attention_dropout == 0 and attention_type == "self" and attn_mask_type == "causal"
        assert tp_size == dist.get_world_size(tp_group) and softmax_scale is None
        self.heads, self.groups = num_attention_heads // tp_size, num_gqa_groups // tp_size
        self.scale = kv_channels**-0.5
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)

    def get_extra_state(self) -> Tensor:
        return torch.ones(1)

    def set_context_parallel_group(
        self, cp_group: Any, cp_global_ranks: Any, cp_stream: Any, cp_comm_type: str
    ) -> None:
        self.cp_group, self.cp_global_ranks = cp_group, cp_global_ranks
        self.cp_stream, self.cp_comm_type = cp_stream, cp_comm_type

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, qkv_format: str, attn_mask_type: str,
        cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, cu_seqlens_q_padded: None, cu_seqlens_kv_padded: None,
        max_seqlen_q: int, max_seqlen_kv: int, pad_between_seqs: None = None,
    ) -> Tensor:  # fmt: skip
        assert qkv_format == "thd" and attn_mask_type == "padding_causal" and attention_mask is None
        assert query.shape[1] == self.heads and key.shape[1] == value.shape[1] == self.groups
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        assert max_seqlen_q == max_seqlen_kv == int(cu_seqlens_q.diff().max())
        bounds = cu_seqlens_q.tolist()
        if self.cp_group is None:
            return self.whole_row(query, key, value, bounds).flatten(1)
        ranks, groups = self.cp_global_ranks, self.cp_group
        rank, size = ranks.index(dist.get_rank()), len(ranks)
        if self.cp_comm_type == "a2a+p2p":
            inner, outer = (dist.get_process_group_ranks(group) for group in groups)
            # As AttnFuncWithCPAndKVP2P finds its neighbours: the all-to-all is among neighbours in the list of ranks.
            assert inner == ranks[rank // len(inner) * len(inner) :][: len(inner)]
            assert outer == ranks[rank % len(inner) :: len(inner)]
            assert self.heads % len(inner) == self.groups % len(inner) == 0
        else:
            assert dist.get_process_group_ranks(groups) == ranks
            assert self.cp_comm_type != "a2a" or self.heads % size == self.groups % size == 0
        order = [tokens_of_rank(bounds, size, r) for r in range(size)]
        place = torch.tensor(sum(order, [])).argsort()
        row = (Gather.apply(x, CONTEXT[size])[place] for x in (query, key, value))
        return self.whole_row(*row, bounds)[order[rank]].flatten(1)

    def whole_row(self, q_SND: Tensor, k_SGD: Tensor, v_SGD: Tensor, bounds: list[int]) -> Tensor:
        rows = (x.split(np.diff(bounds).tolist()) for x in (q_SND, k_SGD, v_SGD))
        return torch.cat([attend(*qkv, causal=True, scale=self.scale)[0] for qkv in zip(*rows, strict=True)])


# The context ranks' group by its size, for the stand-in alone.
CONTEXT: dict[int, Any] = {}


@contextmanager
def transformer_engine() -> Iterator[None]:
    """Megatron's wrapper of Transformer Engine, as it is where Transformer Engine is installed."""
    import megatron.core.utils

    name = "megatron.core.extensions.transformer_engine"
    engine = MagicMock(__version__="2.20.2")
    engine.pytorch.DotProductAttention = DotProductAttention
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None and spec.origin is not None
    wrapper = importlib.util.module_from_spec(spec)
    new: dict[str, Any] = {"transformer_engine": engine, "transformer_engine.pytorch": engine.pytorch, name: wrapper}
    for part in re.findall(r"^ *from transformer_engine\.([\w.]+) import", Path(spec.origin).read_text(), re.MULTILINE):
        new[f"transformer_engine.{part}"] = operator.attrgetter(part)(engine)
    old = {name: sys.modules.get(name) for name in new}
    sys.modules.update(new)
    try:
        spec.loader.exec_module(wrapper)
        yield
    finally:
        megatron.core.utils._te_version = None
        restore(old)


def restore(modules: dict[str, ModuleType | None]) -> None:
    for name, value in modules.items():
        if value is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = value


# ---- flash-attn's side of ring-flash-attn


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    """As flash-attn 2.8 has it."""
    lengths_q, lengths_k = (x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k))
    assert sum(lengths_q) == len(q) and sum(lengths_k) == len(k) == len(v)
    assert max(lengths_q) <= max_seqlen_q and max(lengths_k) <= max_seqlen_k and window_size_left == -1
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    outs, lses = zip(*(attend(*qkv, causal, softmax_scale) for qkv in parts), strict=True)
    return torch.cat(outs), torch.cat(lses, 1).float(), None, None


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
) -> None:  # fmt: skip
    """The block's share, from the log-sum-exp over all blocks; written into dq, dk and dv."""
    lengths_q, lengths_k = (x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k))
    of_q = zip(*(x.split(lengths_q) for x in (dout, q, out, softmax_lse.t(), dq)), strict=True)
    of_k = zip(*(x.split(lengths_k) for x in (k, v, dk, dv)), strict=True)
    for (dout, q, out, lse, dq), (k, v, dk, dv) in zip(of_q, of_k, strict=True):
        repeat = q.shape[1] // k.shape[1]
        k_all, v_all = (x.repeat_interleave(repeat, 1) for x in (k, v))
        weights = (torch.einsum("tnd,knd->ntk", q, k_all) * softmax_scale - lse.t()[:, :, None]).exp()
        if causal:
            weights = weights.tril()
        dweights = torch.einsum("tnd,knd->ntk", dout, v_all) - (dout * out).sum(-1).t()[:, :, None]
        dscores = weights * dweights * softmax_scale
        dq.copy_(torch.einsum("ntk,knd->tnd", dscores, k_all))
        dk.copy_(torch.einsum("ntk,tnd->knd", dscores, q).unflatten(1, (-1, repeat)).sum(2))
        dv.copy_(torch.einsum("ntk,tnd->knd", weights, dout).unflatten(1, (-1, repeat)).sum(2))


def in_fp64(attention: Any, *qkv_and_bounds: Tensor, **options: Any) -> Tensor:
    """The library sums gradients in fp32 copies of its buffers, which in fp32 would be the buffers themselves."""
    q, k, v, bounds, longest = qkv_and_bounds
    return attention(q.double(), k.double(), v.double(), bounds, longest, **options).to(q.dtype)


@contextmanager
def flash_attn() -> Iterator[None]:
    """An environment in which ring-flash-attn finds flash-attn."""
    functions = (_flash_attn_varlen_forward, _flash_attn_varlen_backward)
    interface = module("flash_attn.flash_attn_interface", **{f.__name__: f for f in functions})
    new = {"flash_attn": module("flash_attn", flash_attn_interface=interface), interface.__name__: interface}
    old = {name: sys.modules.get(name) for name in new}
    sys.modules.update(new)
    script, load = torch.jit.script, backends._ring_flash_attn
    torch.jit.script = lambda function: function  # it cannot compile what runs Megatron on a CPU
    backends._ring_flash_attn = lambda: partial(in_fp64, load())
    try:
        yield
    finally:
        torch.jit.script, backends._ring_flash_attn = script, load
        restore(old)
        for name in [name for name in sys.modules if name.startswith("ring_flash_attn")]:
            del sys.modules[name]


# ---- a whole training step


def measure(attention: dict[str, Any], parallel: dict[str, Any], experts: int, multiple: int) -> dict[str, Any]:
    """One rank's gradients, losses and counts of a step over documents filled up to `multiple`."""
    config = JobConfig()
    config.model = tiny_vlm(experts, num_layers=2)
    config.parallel, config.attention = ParallelConfig(**parallel), AttentionConfig(**attention)
    config.optim = OptimConfig(lr=1e-2)
    config.data.seq_length, config.train.microbatches = SEQ_LENGTH, MICROBATCHES
    mesh = build_mesh(config.parallel, config.ulysses, config.document_multiple)
    CONTEXT[config.parallel.context] = mesh.language.cp
    seed_everything(1, mesh.data_rank)
    libraries = {"transformer_engine": transformer_engine, "ring_flash_attn": flash_attn}
    with libraries.get(config.attention.backend, nullcontext)():
        job = build_job(config, mesh)
        source = SyntheticSource(SEQ_LENGTH, document_multiple=multiple)
        rows = [source.microbatch(i) for i in range(mesh.data_rank, MICROBATCHES, mesh.data_size)]
        report = job.stepper.gradients(rows, source.load_frames)
    return {
        "gradients": shards(job.model, gradients=True),
        "report": report,
        "keys": sorted(job.model.language[0].module.state_dict()),
    }


has_ring_flash_attn = importlib.util.find_spec("ring_flash_attn") is not None
needs_ring_flash_attn = pytest.mark.skipif(not has_ring_flash_attn, reason="needs ring-flash-attn, as in the extra dev")


@pytest.mark.parametrize(
    ("attention", "parallel", "experts"),
    [
        (TE, {}, 0),
        (TE, {"context": 2}, 0),
        ({**TE, "transformer_engine_comm": "all_gather"}, {"context": 2, "tensor": 2, "sequence": True}, 0),
        ({**TE, "transformer_engine_comm": "a2a"}, {"context": 2}, 4),
        ({**TE, "transformer_engine_comm": "a2a+p2p", "ulysses": 2}, {"context": 4}, 0),
        ({**TE, "transformer_engine_comm": "a2a+p2p", "ulysses": 1}, {"context": 2, "pipeline": 2}, 0),
        pytest.param(RFA, {"context": 2}, 0, marks=needs_ring_flash_attn),
        pytest.param(RFA, {"context": 4}, 4, marks=needs_ring_flash_attn),
    ],
    ids=str,
)
def test_a_step_equals_one_process(attention: Any, parallel: Any, experts: int, ranks: Any) -> None:
    num_ranks = int(np.prod([parallel.get(axis, 1) for axis in ("tensor", "context", "pipeline")]))
    multiple = 2 * parallel.get("context", 1)
    found = ranks.run(measure, num_ranks, attention, parallel, experts, multiple)
    (one,) = ranks.run(measure, 1, {}, {}, experts, multiple)
    expected, gradients = merge([one["gradients"]]), merge([each["gradients"] for each in found])
    assert gradients.keys() == expected.keys()
    for name, grad in gradients.items():
        # fp32 sums in another order, as in the parity table: relative to the tensor's largest gradient.
        assert np.abs(grad - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max() + 1e-12, name
    for each in found:
        assert each["report"].loss == pytest.approx(one["report"].loss, rel=1e-5)
        assert each["report"].moe_losses == pytest.approx(one["report"].moe_losses, rel=1e-5)
        assert each["report"].num_tokens == one["report"].num_tokens < SEQ_LENGTH * MICROBATCHES
    if "pipeline" not in parallel:
        assert found[0]["keys"] == one["keys"], "a checkpoint is the same whatever the backend"


def test_filling_documents_up_changes_no_label(ranks: Any) -> None:
    """Neither the loss nor, with experts, what the router balances."""
    reports = [ranks.run(measure, 1, {}, {}, 4, multiple)[0]["report"] for multiple in (1, 8)]
    assert reports[0].num_tokens == reports[1].num_tokens and reports[0].num_labels == reports[1].num_labels
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=1e-5)  # fp32 in another order
    assert reports[1].moe_losses == pytest.approx(reports[0].moe_losses, rel=1e-5)
