"""What operations ask of a GPU and of its links, counted one by one as they are dispatched.

FLOPs are those of torch's own formulas (`torch.utils.flop_counter`), a multiplication with its addition as 2, and half
of them where attention is causal. Bytes of an operation are those of the tensors that it reads and of those that it
writes, views for nothing. Of a transfer it is what this rank sends in the algorithms that NCCL uses for long messages:
in a ring of n ranks, (n - 1) / n of the whole tensor for a gather or a scatter, twice that for a reduction to all.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from megamed.preflight.shapes import tensors_of

# Kinds of operations.
PRODUCTS, ATTENTION, OTHERS = "matrix products", "attention", "other operations"

_ATEN = torch.ops.aten
_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: (4, 0),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (10, 1),
}
"""FLOPs of an entry of the scores and of the heads' width, and where among the arguments q, k, v begin. Backward: the
scores once more, and four products."""
# They read as much as they give, not all that they are given.
_GATHERING = {_ATEN.embedding, _ATEN.index, _ATEN.index_select, _ATEN.gather}
# They write nothing, or only say how something is to be seen.
_FREE = {_ATEN.empty, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided, _ATEN.empty_like}
_FREE |= {_ATEN.detach, _ATEN._unsafe_view, _ATEN._reshape_alias, _ATEN.set_}


@dataclass
class Amount:
    """FLOPs and bytes."""

    flops: float = 0.0
    moved: float = 0.0
    """Bytes read and written."""

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.flops + other.flops, self.moved + other.moved)

    def __mul__(self, factor: float) -> "Amount":
        return Amount(self.flops * factor, self.moved * factor)


@dataclass
class Sent:
    """Transfers of one kind over one axis."""

    calls: float = 0.0
    sent: float = 0.0
    """Bytes that this rank sends."""

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.calls + other.calls, self.sent + other.sent)

    def __mul__(self, factor: float) -> "Sent":
        return Sent(self.calls * factor, self.sent * factor)


@dataclass
class Work:
    """Of a phase of the step, on one rank.

    Attributes:
        computed: by kind of operation.
        transfers: by axis and operation ("gather", "scatter", "reduce", "all-to-all", "send", "broadcast").
    """

    computed: dict[str, Amount] = field(default_factory=dict)
    transfers: dict[tuple[str, str], Sent] = field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        return Work(_sum(self.computed, other.computed, Amount()), _sum(self.transfers, other.transfers, Sent()))

    def __mul__(self, factor: float) -> "Work":
        return Work(
            {key: x * factor for key, x in self.computed.items()},
            {key: x * factor for key, x in self.transfers.items()},
        )

    @property
    def flops(self) -> float:
        """Of all operations."""
        return sum(amount.flops for amount in self.computed.values())

    def count(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Count an operation that is no transfer."""
        packet = func._overloadpacket
        if packet in _FREE or func.is_view:
            return
        if packet in _ATTENTION:
            kind, flops = ATTENTION, _attention_flops(packet, args, kwargs)
        elif packet in flop_registry:
            kind, flops = PRODUCTS, flop_registry[packet](*args, **kwargs, out_val=result)
        else:
            kind, flops = OTHERS, 0
        amount = self.computed.setdefault(kind, Amount())
        amount.flops += flops
        amount.moved += _moved(packet, (args, kwargs), result)

    def transfer(self, func: Any, args: Sequence[Any], axis_of: Callable[[dist.ProcessGroup, str], str]) -> None:
        """Count a transfer.

        Args:
            func, args: of torch's `c10d` operators.
            axis_of: name of the axis, by process group and operation.
        """
        packet = func._overloadpacket.__name__
        if packet not in _TRANSFERS:
            return
        name, whole, share = _TRANSFERS[packet]
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(boxed)
        size = sum(tensor.nbytes for tensor in tensors_of(args[whole]))
        sent = self.transfers.setdefault((axis_of(group, name), name), Sent())
        sent.calls += 1
        sent.sent += size * share(group.size())


def _sum(left: dict[Any, Any], right: dict[Any, Any], none: Any) -> dict[Any, Any]:
    return {key: left.get(key, none) + right.get(key, none) for key in {**left, **right}}


def _part(size: int) -> float:
    return (size - 1) / size


def _all(size: int) -> float:
    return 1.0


def _twice(size: int) -> float:
    return 2 * (size - 1) / size


# By name of the operator: what it is called here, the argument that is the whole tensor, how much of it a rank sends.
_TRANSFERS: dict[str, tuple[str, int, Callable[[int], float]]] = {
    "allreduce_": ("reduce", 0, _twice),
    "allreduce_coalesced_": ("reduce", 0, _twice),
    "_allgather_base_": ("gather", 0, _part),
    "allgather_": ("gather", 0, _part),
    "allgather_into_tensor_coalesced_": ("gather", 0, _part),
    "_reduce_scatter_base_": ("scatter", 1, _part),
    "reduce_scatter_": ("scatter", 1, _part),
    "reduce_scatter_tensor_coalesced_": ("scatter", 1, _part),
    "alltoall_base_": ("all-to-all", 1, _part),
    "alltoall_": ("all-to-all", 1, _part),
    "send": ("send", 0, _all),
    "broadcast_": ("broadcast", 0, _all),
}


def _attention_flops(packet: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    of_entry, first = _ATTENTION[packet]
    q, k = args[first : first + 2]
    batch, heads, queries, width = q.shape
    # Forward: q, k, v, dropout, causal. Backward: gradient, q, k, v, output, log-sum-exp, dropout, causal.
    place = 7 if first else 4
    causal = args[place] if len(args) > place else kwargs.get("is_causal", False)
    flops = of_entry * batch * heads * queries * k.shape[2] * width
    return flops / 2 if causal else flops


def _moved(packet: Any, inputs: Any, result: Any) -> float:
    """Bytes read and written; an input that is written to counts twice."""
    if packet in _GATHERING:
        return 2 * _size(tensors_of(result))
    return _size(tensors_of(inputs)) + _size(tensors_of(result))


def _size(tensors: Iterable[Tensor]) -> float:
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
