"""Watches a step as it runs: the memory that is alive, and the work that is done.

Storages are counted from when an operation makes them to when nothing has them. What kernels take for themselves while
they run is not: torch does not say it.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megamed.preflight.shapes import quick_result, tensors_of
from megamed.preflight.work import Work


@dataclass
class Peak:
    """Bytes of a step beside what is held.

    Attributes:
        phases: most bytes at any time, in each phase of the step.
        parts: what they are, then.
        left: bytes at its end.
    """

    phases: dict[str, int] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    left: int = 0

    @property
    def most(self) -> int:
        """Of the whole step."""
        return max(self.phases.values())


# Collectives that write into tensors that are there, and that torch has no kernels of for the meta device.
_WITHOUT_META = {
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.allreduce_coalesced_.default,
}


class Trace(TorchDispatchMode):
    """Follows everything that is dispatched.

    Args:
        device: type of the device whose storages count.
        axis_of: name of the axis that something is sent over, by process group and operation.

    Attributes:
        now: bytes alive, by the part of the step that made them.
        peak: the most of them, by phase.
        work: by phase.
    """

    def __init__(self, device: str, axis_of: Callable[[dist.ProcessGroup, str], str]):
        super().__init__()
        self.device, self.peak = device, Peak()
        self.now: Counter[str] = Counter()
        self.work: dict[str, Work] = {}
        self._axis_of, self._phase, self._current, self._part = axis_of, "", Work(), ""
        self._sizes: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    @contextmanager
    def phase(self, name: str, part: str) -> Iterator[None]:
        """Account for a phase of the step.

        Args:
            name: of the phase.
            part: what is made in it is, by default.
        """
        before = self._phase, self._current, self._part
        self._phase, self._current, self._part = name, self.work.setdefault(name, Work()), part
        self._note()
        try:
            yield
        finally:
            self._phase, self._current, self._part = before

    @contextmanager
    def parts(self, modules: Mapping[str, Iterable[nn.Module]]) -> Iterator[None]:
        """What modules make in their forward pass is a part of its own; of a module in another, the inner one's.

        Args:
            modules: by the name of the part.
        """
        outer: list[str] = []

        def enter(name: str, *_: Any) -> None:
            outer.append(self._part)
            self._part = name

        def leave(*_: Any) -> None:
            self._part = outer.pop()

        hooks = []
        for name, members in modules.items():
            for module in members:
                hooks.append(module.register_forward_pre_hook(partial(enter, name)))
                hooks.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def count(self, tensor: Tensor) -> None:
        """Count a tensor that stands, on the host, for one of the device."""
        self._see(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*tensors_of(args), *tensors_of(kwargs)]
        # A result on the host is the device's, too, if it is made of what is.
        counts = False
        for tensor in given:
            if tensor.device.type == self.device:
                self._see(tensor.untyped_storage(), was_there=True)
            elif tensor.untyped_storage()._cdata in self._sizes:
                counts = True
        result = self._run(func, args, kwargs, given)
        for tensor in tensors_of(result):
            if counts or tensor.device.type == self.device:
                self._see(tensor.untyped_storage())
        if func.namespace == "c10d":
            self._current.transfer(func, args, self._axis_of)
        elif counts or any(x.device.type == self.device for x in given):
            self._current.count(func, args, kwargs, result)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        if self.device != "meta" or not any(x.is_meta for x in given):
            return func(*args, **kwargs)
        if func in _WITHOUT_META:
            return FakeWork().boxed()  # the handle of a collective that is over
        if func is torch.ops.aten.masked_select.default:
            values, mask = args
            return values.new_empty(int(mask.sum()))  # the mask is of even routing, which is on the host
        if not all(x.is_meta or not x.dim() for x in given) and func is not torch.ops.aten.copy_.default:
            # What stands in choices of experts is asked for by no other operation.
            args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta") if x.dim() else x, (args, kwargs))
        quick = quick_result(func, args, kwargs)
        return func(*args, **kwargs) if quick is None else quick

    def _see(self, storage: torch.UntypedStorage, was_there: bool = False) -> None:
        """Count a storage, unless it is known; one that an operation is given before any has made it counts nothing."""
        key = storage._cdata
        known = self._sizes.get(key)
        if known is not None and known[0]() is storage:
            return
        size = 0 if was_there else storage.nbytes()
        self._sizes[key] = weakref.ref(storage, partial(self._forget, key)), size, self._part
        if size:
            self.now[self._part] += size
            self._note()

    def _forget(self, key: int, reference: Any) -> None:
        known = self._sizes.get(key)
        if known is not None and known[0] is reference:
            self.now[known[2]] -= known[1]
            del self._sizes[key]

    def _note(self) -> None:
        now = self.now.total()
        if now >= self.peak.phases.get(self._phase, 0):
            self.peak.phases[self._phase], self.peak.parts[self._phase] = now, dict(self.now)
