"""Which device this process computes on, and the Megatron that fits it.

Every other module gets Megatron by importing `megamed.runtime` first (its `__init__` calls
`prepare_megatron`), so that the CPU backend is in place before the first Megatron import.
"""

import importlib
import importlib.util
import os
import sys

import torch

from megamed.runtime import cpu_backend
from megamed.utils.log import quiet_imports
from megamed.utils.optional import hidden, hide_unrelated_apex


def prepare_megatron() -> None:
    """Make `import megatron.core` work here: with CUDA as it is, without it through the CPU backend."""
    hide_unrelated_apex()
    # Megatron would import Weights & Biases, which takes a while, for timers that nobody here uses.
    with quiet_imports(), hidden("wandb"):
        if not torch.cuda.is_available():
            _hide_transformer_engine()
            cpu_backend.enable()
        # Without Transformer Engine, 0.16.1 names this function without having imported it.
        moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        importlib.import_module("megatron.core.models.gpt.gpt_model")  # here, where its warnings are quiet
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def _hide_transformer_engine() -> None:
    """Without a GPU, Megatron would take Transformer Engine's optimizer for tensors on the CPU."""
    if importlib.util.find_spec("transformer_engine") is not None:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def device_type() -> str:
    """`"cuda"` or `"cpu"`."""
    return "cpu" if cpu_backend.is_enabled() else "cuda"


def current_device() -> torch.device:
    """The device of this rank; the meta device inside `meta_device`."""
    if device_type() == "cpu":
        return cpu_backend.answer()
    return torch.device("cuda", torch.cuda.current_device())


def set_device() -> torch.device:
    """Take this rank's GPU (LOCAL_RANK), if there is one."""
    if device_type() == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return current_device()


def default_dtype() -> torch.dtype:
    """What the model computes in: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device_type() == "cuda" else torch.float32


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: a GPU is present and the package is installed."""
    return device_type() == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def peak_memory_bytes() -> int:
    """Peak memory of this process: what PyTorch allocated on the GPU, or the resident set on a CPU."""
    if device_type() == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synchronize() -> None:
    """Wait for the GPU's queue; nothing on a CPU."""
    if device_type() == "cuda":
        torch.cuda.synchronize()
