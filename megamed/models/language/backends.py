"""The attention backends, by name.

Shapes: T tokens of the packed row that this rank holds, N query heads, G key/value heads (G divides N), D head width.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megamed.models.language.attention import BuildAttend, Packing
from megamed.models.language.attention_config import AttentionConfig
from megamed.models.language.config import LanguageConfig
from megamed.ops.kernels import KERNELS, BlockKernel, named_kernel
from megamed.ops.ulysses import context_attention
from megamed.runtime import Mesh, ParallelConfig, device_type
from megamed.utils import UserError
from megamed.utils.optional import require

# Since which Transformer Engine these take packed documents: attn_forward_func_with_cp and the classes that it calls,
# in transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py.
PACKED_SINCE = {"all_gather": (2, 18), "a2a+p2p": (2, 19)}

_INSTEAD = "or choose attention.backend=auto"


class RingAttend:
    """megamed's ring attention, with Ulysses inside."""

    def __init__(self, mesh: Mesh, kernel: BlockKernel | None, **_: Any):
        self.ring = mesh.ring if mesh.ring.size() > 1 else None
        self.ulysses = mesh.ulysses if mesh.ulysses.size() > 1 else None
        self.kernel = kernel

    def __call__(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, packing: Packing) -> Tensor:
        assert packing.plan is not None
        return context_attention(q_TND, k_TGD, v_TGD, packing.plan, self.ring, self.ulysses, kernel=self.kernel)


class TransformerEngineAttend:
    """Transformer Engine's attention with its context parallelism, in Megatron's wrapper.

    No submodule of the model: all that it would add to checkpoints is state of FP8 attention, which megamed does not
    use, so that a run can go on with another backend.

    Args:
        attention: Megatron's `TEDotProductAttention`.
        mesh: the layout.
        comm: p2p, all_gather, a2a or a2a+p2p.
        arguments: what Megatron gives the constructor of its core attention.
    """

    def __init__(self, attention: Callable[..., Any], mesh: Mesh, comm: str, **arguments: Any):
        in_two_steps = comm == "a2a+p2p"
        self.core = attention(**{**arguments, "cp_comm_type": "p2p" if in_two_steps else comm})
        if in_two_steps and mesh.config.context > 1:
            # The wrapper would take the two groups from Megatron's global state, where they are not.
            groups = [mesh.ulysses, mesh.ring]
            self.core.set_context_parallel_group(groups, self.core.cp_global_ranks, self.core.cp_stream, comm)

    def __call__(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, packing: Packing) -> Tensor:
        mask = AttnMaskType.padding_causal  # causal within documents, by its name for packed rows
        return self.core(q_TND, k_TGD, v_TGD, None, attn_mask_type=mask, packed_seq_params=packing).view(q_TND.shape)


class RingFlashAttend:
    """The zigzag ring of the ring-flash-attn library over packed documents.

    Args:
        attention: its `zigzag_ring_flash_attn_varlen_func`.
        mesh: the layout; its ring are all context ranks.
    """

    def __init__(self, attention: Callable[..., Tensor], mesh: Mesh, **_: Any):
        self.attention, self.ring = attention, mesh.ring

    def __call__(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, packing: Packing) -> Tensor:
        ranks = self.ring.size()
        assert packing.cu_seqlens_q is not None and packing.max_seqlen_q is not None
        bounds, longest = packing.cu_seqlens_q // ranks, packing.max_seqlen_q // ranks  # of this rank's part
        return self.attention(q_TND, k_TGD, v_TGD, bounds, longest, causal=True, group=self.ring)


def build_attend(config: AttentionConfig, mesh: Mesh) -> BuildAttend:
    """What makes each layer's attention.

    Args:
        config: the settings.
        mesh: the layout.

    Raises:
        UserError: the library is missing, or the documents are not packed as it wants them.
    """
    multiple = config.document_multiple(mesh.config)
    if mesh.document_multiple != multiple:
        raise UserError(
            f"attention.backend={config.backend} wants documents filled up to multiples of {multiple} tokens, which "
            "this program does not do; choose attention.backend=auto",
            everywhere=True,
        )
    if config.backend == "transformer_engine":
        attention = _transformer_engine(config, mesh.config)
        return partial(TransformerEngineAttend, attention, mesh, config.transformer_engine_comm)
    if config.backend == "ring_flash_attn":
        return partial(RingFlashAttend, _ring_flash_attn(), mesh)
    return partial(RingAttend, mesh, None if config.kernel == "auto" else KERNELS[config.kernel])


def check_backend(
    config: AttentionConfig, language: LanguageConfig, parallel: ParallelConfig, dtype: torch.dtype
) -> None:
    """Check that this machine can run the chosen backend and block kernel. Needs no process group.

    Args:
        config: the settings.
        language: for the width of its heads.
        parallel: the layout of the job.
        dtype: what the language model computes in.

    Raises:
        UserError: it cannot; says what is missing, and what to install or to choose.
    """
    if config.is_ours:
        if config.kernel != "auto":
            named_kernel(config.kernel, torch.device(device_type()), dtype, language.kv_channels)
        return
    name = f"attention.backend={config.backend}"
    if device_type() != "cuda":
        raise UserError(f"{name} needs a GPU, and there is none here; choose attention.backend=auto", everywhere=True)
    if dtype == torch.float32:
        raise UserError(f"{name} does not compute in fp32; set train.dtype=bf16, {_INSTEAD}", everywhere=True)
    if config.backend == "transformer_engine":
        _transformer_engine(config, parallel)
    else:
        _ring_flash_attn()


def _transformer_engine(config: AttentionConfig, parallel: ParallelConfig) -> Callable[..., Any]:
    """Megatron's wrapper of Transformer Engine's attention."""
    purpose = "attention.backend=transformer_engine"
    install = f"pip install --no-build-isolation 'transformer-engine[pytorch]', {_INSTEAD}"
    package = require("transformer_engine", purpose, install)
    require("transformer_engine.pytorch", purpose, install)
    needed = PACKED_SINCE.get(config.transformer_engine_comm, (0, 0))
    found = tuple(int(part) for part in package.__version__.split(".")[:2])
    if parallel.context > 1 and found < needed:
        raise UserError(
            f"attention.transformer_engine_comm={config.transformer_engine_comm} needs Transformer Engine "
            f"{needed[0]}.{needed[1]} or newer for packed documents, and {package.__version__} is installed; choose "
            "p2p or a2a, or install a newer one together with megatron-core 0.19",
            everywhere=True,
        )
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def _ring_flash_attn() -> Callable[..., Tensor]:
    """ring-flash-attn's zigzag attention over packed documents."""
    purpose = "attention.backend=ring_flash_attn"
    require("flash_attn.flash_attn_interface", purpose, f"pip install --no-build-isolation flash-attn, {_INSTEAD}")
    name = "ring_flash_attn"
    if name not in sys.modules and (spec := importlib.util.find_spec(name)) is not None:
        # The package's own __init__ does not run: ring-flash-attn 0.1.8 imports a part for transformers there, by names
        # that transformers 5 no longer has.
        sys.modules[name] = importlib.util.module_from_spec(spec)
    install = f"pip install ring-flash-attn, {_INSTEAD}"
    return require(f"{name}.zigzag_ring_flash_attn_varlen", purpose, install).zigzag_ring_flash_attn_varlen_func
