"""A model whose specialists are in memory while they are called.

With `routing=hard`, a token is sent to the experts of its own pools and of the general pool. The others need not be
in memory: a study of the chest is read by a part of the model. Attention, norms, embeddings, routers, dense layers,
shared experts, the general pool and the frame encoder always are; a specialty's experts are read from the checkpoint
when they are called, and leave when others need their room.

Shapes: T tokens of this rank, E experts, K experts of a token, P specialties.
"""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megamed.checkpoint.card import model_of
from megamed.checkpoint.specialists import as_stored, check_names, with_moe
from megamed.checkpoint.state import weights_state
from megamed.checkpoint.weights import Weights, fill_state
from megamed.models.language import AttentionConfig, build_language_chunks
from megamed.models.moe import GENERAL, Router
from megamed.models.moe.router import in_turns
from megamed.models.vlm import FrameEncoder, VLMConfig
from megamed.runtime import Mesh, current_device
from megamed.utils import UserError

_EXPERTS = ".mlp.experts."


class Unwrapped(nn.Module):
    """A part of a model in the place of Megatron's DDP around it: for what runs forward alone.

    Attributes:
        module: the part.
        config: Megatron's configuration of it, where it has one.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.config = module, getattr(module, "config", None)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As the part itself."""
        return self.module(*arguments, **named)


class SpecialistLoader:
    """A model of a checkpoint, for inference, with the pools in memory that were called.

    It has the parts of a placed model (`language`, `vision`, `parts`), which the language phase, the vision phase and
    `megamed.generate` take. Every rank has its own experts of each pool, so with expert parallelism all ranks call the
    same pools; no call is collective.

    A token that calls a pool which is not in memory ends with an error: nothing is read in the middle of a forward
    pass. So does a token without specialties, unless all pools are in memory: it chooses from all experts.

    Args:
        checkpoint: its folder; of a model with pools.
        mesh: the layout.
        attention: how attention is computed.
        dtype: of weights and activations; None for the one in the checkpoint.
        most_pools: pools beside the general one that may be in memory together; None for no bound.
        most_bytes: what their experts may take of this rank's memory; None for no bound.

    Raises:
        UserError: the checkpoint is damaged, has no pools, or pools that hard routing cannot do with.
    """

    def __init__(
        self,
        checkpoint: Path,
        mesh: Mesh,
        attention: AttentionConfig | None = None,
        dtype: torch.dtype | None = None,
        most_pools: int | None = None,
        most_bytes: int | None = None,
    ):
        self._weights = Weights(checkpoint)
        self.config = _with_hard_routing(as_stored(model_of(checkpoint), self._weights), checkpoint)
        self.pools = self.config.language.moe.resolved
        self.most_pools, self.most_bytes, self._mesh = most_pools, most_bytes, mesh
        self._resident: list[str] = []  # the least recently called first
        dtype = dtype or self._weights.dtype("language.embedding.word_embeddings.weight")
        with _experts_on_meta():
            chunks = build_language_chunks(self.config.language, attention or AttentionConfig(), mesh, dtype)
        with torch.device("meta"):
            encoder = FrameEncoder(self.config.vision, self.config.projector).to(dtype)
        encoder.to_empty(device=current_device())
        self.language, self.vision = [Unwrapped(chunk) for chunk in chunks], Unwrapped(encoder)
        self._experts = [
            _LocalExperts(module, self.pools.order)
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, SequentialMLP)
        ]
        for experts in self._experts:
            for name in self.pools.specialties:
                experts.leave(name)
            experts.enter(GENERAL)
        for part in self.parts:
            part.to(current_device()).eval().requires_grad_(False)
        self._read(lambda owner: owner in (None, GENERAL))
        self._watch_routers(chunks)

    @property
    def parts(self) -> list[Unwrapped]:
        """Everything that has parameters."""
        return [*self.language, self.vision]

    @property
    def resident(self) -> tuple[str, ...]:
        """Pools in memory beside the general one, the least recently called first."""
        return tuple(self._resident)

    @property
    def resident_bytes(self) -> int:
        """Memory of this rank that these pools' experts take."""
        return sum(self.pool_bytes(name) for name in self._resident)

    def pool_bytes(self, name: str) -> int:
        """Memory that a pool's experts take on this rank."""
        return sum(experts.num_bytes(name) for experts in self._experts)

    def call(self, names: Collection[str]) -> None:
        """Have these pools in memory; the general one always is. Only experts that are missing are read.

        Others stay as long as there is room, and leave in the order in which they were last called.

        Raises:
            UserError: there is no such pool, these alone are more than may be in memory, or the checkpoint is damaged.
        """
        ordered = [name for name in dict.fromkeys(names) if name != GENERAL]
        check_names(ordered, dict.fromkeys(self.pools.specialties))
        if not self._fits(ordered):
            raise UserError(
                f"pools {', '.join(ordered)} take {sum(map(self.pool_bytes, ordered)):,} bytes on this rank; allowed "
                f"are {' and '.join(self._say_bounds())}"
            )
        kept = [name for name in self._resident if name not in ordered]
        while not self._fits([*kept, *ordered]):
            self._leave(kept.pop(0))
        missing = [name for name in ordered if name not in self._resident]
        try:
            for experts in self._experts:
                for name in missing:
                    experts.enter(name)
            self._read(lambda owner: owner in missing)
        except BaseException:
            for name in missing:
                self._leave(name)
            raise
        self._resident = [*kept, *ordered]

    def _leave(self, name: str) -> None:
        for experts in self._experts:
            experts.leave(name)
        self._resident = [other for other in self._resident if other != name]

    def _fits(self, names: list[str]) -> bool:
        within_number = self.most_pools is None or len(names) <= self.most_pools
        return within_number and (self.most_bytes is None or sum(map(self.pool_bytes, names)) <= self.most_bytes)

    def _say_bounds(self) -> Iterator[str]:
        if self.most_pools is not None:
            yield f"{self.most_pools} pools"
        if self.most_bytes is not None:
            yield f"{self.most_bytes:,} bytes"

    def _read(self, wanted: Any) -> None:
        """Read parameters from the checkpoint: those of experts whose pool is wanted, and the rest for None."""
        state = weights_state([chunk.module for chunk in self.language], self.vision.module, self._mesh)

        def is_wanted(tensor: ShardedTensor) -> bool:
            return wanted(self.pools.order[tensor.global_offset[0]][0] if _EXPERTS in tensor.key else None)

        fill_state(self._weights, state, is_wanted)

    def _watch_routers(self, chunks: list[Any]) -> None:
        routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
        for number, router in enumerate(routers):
            router.register_forward_hook(partial(self._after_router, is_first=not number), with_kwargs=True)
        for experts in self._experts:
            experts.module.register_forward_pre_hook(self._before_experts)

    def _after_router(
        self,
        router: Router,
        args: tuple[Any, ...],
        named: dict[str, Any],
        output: tuple[Tensor, Tensor],
        is_first: bool,
    ) -> tuple[Tensor, Tensor]:
        """Refuse tokens whose experts are not in memory, and send padding to experts that are."""
        if len(self._resident) == len(self.pools.specialties):
            return output
        probs_TE, picked_TE = output
        mask = args[1] if len(args) > 1 else named.get("padding_mask")
        real_T, called_TP = router.tokens(probs_TE, mask)
        if is_first:
            self._refuse_missing(real_T, called_TP)
        here = [number for number, (owner, _) in enumerate(self.pools.order) if owner in (*self._resident, GENERAL)]
        here_R, top_k = torch.tensor(here, device=probs_TE.device), router.moe.top_k
        if len(here) < top_k:
            raise UserError(f"padding needs top_k={top_k} experts in memory, and {len(here)} are: call a pool first")
        padding_TE = torch.zeros_like(picked_TE).scatter_(1, in_turns(here_R, len(real_T), top_k), True)
        return probs_TE, torch.where(real_T[:, None], picked_TE, padding_TE)

    def _refuse_missing(self, real_T: Tensor, called_TP: Tensor) -> None:
        called_P = (called_TP & real_T[:, None]).any(0)
        has_none = (real_T & ~called_TP.any(1)).any()
        *called, none = torch.cat([called_P, has_none[None]]).tolist()
        missing = [n for n, is_called in zip(self.pools.specialties, called, strict=True) if is_called]
        missing = [name for name in missing if name not in self._resident]
        if missing:
            raise UserError(f"a token calls {', '.join(missing)}, which is not in memory; call(...) it first")
        if none:
            absent = [name for name in self.pools.specialties if name not in self._resident]
            raise UserError(
                "a token without specialties chooses from all experts, and those of "
                f"{', '.join(absent)} are not in memory; give the study its specialties, or call(...) all pools"
            )

    def _before_experts(self, module: SequentialMLP, args: tuple[Any, ...]) -> None:
        """What routers of other ranks sent: tokens of a pool that was called there, and not here."""
        experts = next(experts for experts in self._experts if experts.module is module)
        for owner, count in zip(experts.owners, args[1].tolist(), strict=True):
            if count and owner not in (*self._resident, GENERAL):
                raise UserError(f"tokens of {owner} came, which is not in memory on this rank; all ranks call the same")


class _LocalExperts:
    """One layer's experts of this rank: in memory, or in their shape alone.

    Args:
        module: of them.
        order: of all experts: pool, and number in it.
    """

    def __init__(self, module: SequentialMLP, order: tuple[tuple[str, int], ...]):
        self.module = module
        first = module.ep_group.rank() * module.num_local_experts
        self.owners = [owner for owner, _ in order[first : first + module.num_local_experts]]

    def enter(self, name: str) -> None:
        """Give a pool's experts memory, with whatever is in it."""
        for layer in self._layers(name):
            _set_weight(layer, torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device=current_device()))

    def leave(self, name: str) -> None:
        """Take a pool's experts their memory. No token comes to them: what they compute of none has the right shape."""
        for layer in self._layers(name):
            nothing = torch.full((1,), float("nan"), dtype=layer.weight.dtype, device=current_device())
            _set_weight(layer, nothing.expand(layer.weight.shape))

    def num_bytes(self, name: str) -> int:
        """Memory that a pool's experts take when they are there."""
        return sum(layer.weight.numel() * layer.weight.element_size() for layer in self._layers(name))

    def _layers(self, name: str) -> Iterator[Any]:
        for owner, expert in zip(self.owners, self.module.local_experts, strict=True):
            if owner == name:
                yield from (expert.linear_fc1, expert.linear_fc2)


def _set_weight(layer: nn.Module, value: Tensor) -> None:
    """Put another tensor in the place of a weight, which may be on another device; what Megatron noted of it stays."""
    old = layer.weight
    new = nn.Parameter(value, requires_grad=False)
    vars(new).update(vars(old))
    layer.weight = new


def _with_hard_routing(config: VLMConfig, checkpoint: Path) -> VLMConfig:
    moe = config.language.moe
    if not moe.pools:
        raise UserError(f"{checkpoint}: its model has no pools of experts, so none can be called")
    # A prior is not used with hard routing, and is left in the checkpoint.
    return with_moe(config, replace(moe, routing="hard"))


@contextlib.contextmanager
def _experts_on_meta() -> Iterator[None]:
    """Inside it, layers of experts are built without memory for their weights."""
    original = SequentialMLP.__init__

    def build(self: SequentialMLP, *arguments: Any, **named: Any) -> None:
        with _OnMeta():
            original(self, *arguments, **named)

    SequentialMLP.__init__ = build  # type: ignore[method-assign]
    try:
        yield
    finally:
        SequentialMLP.__init__ = original  # type: ignore[method-assign]


class _OnMeta(TorchFunctionMode):
    """Tensors that are made inside are on the meta device, whatever device is asked for."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in torch.utils._device._device_constructors():
            kwargs = {**(kwargs or {}), "device": "meta"}
        return function(*args, **(kwargs or {}))
