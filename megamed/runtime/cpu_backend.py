"""Runs the installed, unmodified megatron-core on CPU and gloo.

Megatron-core names CUDA outright in a few dozen places: `device="cuda"` in factory functions,
`torch.cuda.current_device()`, streams and events, random-number states, the optimizer's comparison
of `tensor.type()` with "torch.cuda.FloatTensor". `enable()` answers those calls for a machine
without a GPU, from outside: nothing on disk changes, and nothing else in megamed knows of it.

It must run before the first Megatron import (two functions are chosen at import time), and refuses
to run where a GPU is present.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device

from megamed.utils import UserError

# What Megatron gets where it asks for CUDA: the CPU, or meta inside `meta_device`.
_answer = torch.device("cpu")

# Factory functions that Megatron calls with device="cuda" or pin_memory=True.
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)

_enabled = False


def is_enabled() -> bool:
    """Whether this process answers Megatron's CUDA calls on the CPU."""
    return _enabled


def enable() -> None:
    """Switch the backend on for this process; a second call does nothing.

    Raises:
        RuntimeError: a GPU is present, or Megatron is already imported.
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU backend is for machines without a GPU; this one has a GPU")
    if "megatron.core" in sys.modules:
        raise RuntimeError("the CPU backend must be enabled before the first import of megatron.core")
    _enabled = True
    _patch_factories()
    _patch_tensor_methods()
    _patch_cuda_namespace()
    _patch_all_to_all()
    _patch_unequal_parts()
    _import_megatron_without_compilation()
    _patch_megatron_random()


def answer() -> torch.device:
    """The device that things are made on here: the CPU, or the meta device inside `meta_device`."""
    return _answer


@contextlib.contextmanager
def meta_device() -> Iterator[None]:
    """Inside it, modules are built on the meta device, Megatron's too: shapes and types, without memory.

    With `torch.distributed`'s fake process group, this builds any rank of any job in one process.

    Raises:
        UserError: this process uses a GPU.
    """
    global _answer
    if not _enabled:
        raise UserError("the meta device is for processes without a GPU: set CUDA_VISIBLE_DEVICES to nothing")
    before, _answer = _answer, torch.device("meta")
    try:
        with _answer:
            yield
    finally:
        _answer = before


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _patch_factories() -> None:
    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if kwargs:
                if _is_cuda(kwargs.get("device")):
                    kwargs["device"] = _answer
                kwargs.pop("pin_memory", None)  # pinned memory exists beside a GPU only
            return factory(*args, **kwargs)

        return wrapped

    # `with torch.device("meta")` knows factories by identity and lists them on first use: list the originals.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _patch_tensor_methods() -> None:
    original_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        if isinstance(result, str) and not args and not kwargs:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron."):  # its optimizer wants "torch.cuda.FloatTensor"
                return result.replace("torch.", "torch.cuda.", 1).replace("cuda.meta.", "cuda.")
        return result

    tensor, module = torch.Tensor, torch.nn.Module
    for owner, name, method in (
        (tensor, "type", tensor_type),
        (tensor, "cuda", lambda self, *a, **k: self),
        (tensor, "pin_memory", lambda self, *a, **k: self),
        (tensor, "record_stream", lambda self, *a, **k: None),
        (module, "cuda", lambda self, *a, **k: self),
    ):
        setattr(owner, name, method)


class _Stream:
    """A stream or event on a device that runs everything in order: nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _patch_cuda_namespace() -> None:
    stream = _Stream()
    cuda: Any = torch.cuda
    # A torch.device, not an index: Megatron passes it on as `device=`, and on CPU an index means CUDA.
    cuda.current_device = lambda: _answer
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream = _Stream
    cuda.Event = _Stream
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.set_device = lambda device: None
    cuda.device_count = lambda: 1
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = lambda message: None
    cuda.nvtx.range_pop = lambda: None
    # One generator serves both roles, so that Megatron's tracker of random states stays meaningful.
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = cuda.manual_seed


def _patch_all_to_all() -> None:
    original = dist.all_to_all_single

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if hasattr(sizes, "tolist") else sizes

    @functools.wraps(original)
    def all_to_all_single(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, *a: Any, **k: Any
    ) -> Any:
        # The MoE dispatcher converts its split sizes while it copies them off the GPU, which never happens here.
        return original(output, input, as_list(output_split_sizes), as_list(input_split_sizes), *a, **k)

    dist.all_to_all_single = all_to_all_single


def _patch_unequal_parts() -> None:
    """NCCL gathers and scatters parts of unequal sizes, which experts split by tensor parallelism ask for; gloo
    takes equal ones only. An all-to-all takes both."""
    original_gather, original_scatter = dist.all_gather, dist.reduce_scatter

    def unequal(parts: list[torch.Tensor]) -> bool:
        return len({part.shape for part in parts}) > 1

    @functools.wraps(original_gather)
    def all_gather(tensor_list: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        if async_op or not unequal(tensor_list):
            return original_gather(tensor_list, tensor, group, async_op)
        sizes = [len(part) for part in tensor_list]
        whole = tensor.new_empty(sum(sizes), *tensor.shape[1:])
        copies = torch.cat([tensor] * len(sizes))
        dist.all_to_all_single(whole, copies, sizes, [len(tensor)] * len(sizes), group=group)
        for part, received in zip(tensor_list, whole.split(sizes), strict=True):
            part.copy_(received)

    @functools.wraps(original_scatter)
    def reduce_scatter(
        output: Any, input_list: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if async_op or op != dist.ReduceOp.SUM or not unequal(input_list):
            return original_scatter(output, input_list, op, group, async_op)
        sizes = [len(part) for part in input_list]
        received = output.new_empty(len(sizes) * len(output), *output.shape[1:])
        dist.all_to_all_single(received, torch.cat(input_list), [len(output)] * len(sizes), sizes, group=group)
        torch.sum(received.unflatten(0, (len(sizes), len(output))), 0, out=output)

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


def _import_megatron_without_compilation() -> None:
    """Import Megatron with its jit decorator off: on CPU, compiling each small fusion costs minutes."""
    original = torch.compile

    def no_compile(model: Any = None, **kwargs: Any) -> Any:
        return model if model is not None else (lambda function: function)

    torch.compile = no_compile
    try:
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
    finally:
        torch.compile = original


def _patch_megatron_random() -> None:
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
