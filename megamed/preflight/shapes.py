"""Results of frequent operations on the meta device, without torch's checks, which take longer than all else.

A step has hundreds of thousands of operations, nearly all of a few kinds. That their arguments fit each other has been
seen wherever the same code has trained.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten
_POINTWISE = {
    getattr(_ATEN, name)
    for name in (
        "add", "sub", "mul", "div", "neg", "exp", "log", "pow", "rsqrt", "silu", "silu_backward", "gelu",
        "gelu_backward", "sigmoid", "addcmul", "masked_fill", "logaddexp", "clone", "ones_like", "zeros_like", "clamp",
        "roll", "nan_to_num",
    )
}  # fmt: skip
# In-place operations after which a tensor is seen in another way.
_RESHAPING = {"set_", "resize_", "resize_as_", "t_", "transpose_", "squeeze_", "unsqueeze_", "detach_", "as_strided_"}


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Tensors among arguments or results, and in lists of them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_of(value)
    elif isinstance(values, dict):
        yield from tensors_of(list(values.values()))


def quick_result(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation all of whose tensors are on the meta device; None where torch has to be asked.

    Args:
        func: the operator.
        args, kwargs: its arguments.
    """
    packet = func._overloadpacket
    if func._overloadname == "out":
        out = kwargs.get("out")
        return out if isinstance(out, Tensor) else None
    if not args or not isinstance(args[0], Tensor):
        return None
    first = args[0]
    name = packet.__name__
    if name.endswith("_") and not name.endswith("__") and func._schema.is_mutable:
        return None if name in _RESHAPING else first
    if packet is _ATEN.mm:
        return first.new_empty(first.shape[0], args[1].shape[1])
    if packet is _ATEN.addmm:
        return first.new_empty(args[1].shape[0], args[2].shape[1])
    if packet is _ATEN.native_layer_norm:
        rows = first.shape[: first.dim() - len(args[1])] + (1,) * len(args[1])
        return torch.empty_like(first), *(first.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if packet is _ATEN.native_layer_norm_backward:
        of_input, weight, bias = args[1], args[5], args[6]
        return tuple(
            torch.empty_like(x) if wanted else None for x, wanted in zip((of_input, weight, bias), args[7], strict=True)
        )
    if packet is _ATEN._to_copy:
        return _copied(first, kwargs)
    if packet in _POINTWISE and not _asks_for_type(kwargs) and all(_spreads(x, first) for x in tensors_of(args[1:])):
        return torch.empty_like(first) if first.is_floating_point() else None
    return None


def _copied(x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "meta" or kwargs.get("memory_format") is not None:
        return None
    return torch.empty_like(x, dtype=kwargs.get("dtype") or x.dtype)


def _asks_for_type(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("dtype") is not None or kwargs.get("memory_format") not in (None, torch.preserve_format)


def _spreads(x: Tensor, over: Tensor) -> bool:
    """Whether x has the type of another tensor, and is as large or repeated over it."""
    if x.dtype != over.dtype and x.dtype != torch.bool:
        return False
    pairs = zip(reversed(x.shape), reversed(over.shape), strict=False)
    return x.dim() <= over.dim() and all(mine in (1, other) for mine, other in pairs)
