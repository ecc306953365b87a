"""Checkpoints made of checkpoints: a dense model as specialists, dense models as pools, some pools of a model.

Each of the three classes makes one parameter of the new model at a time, of parameters that it reads when it needs
them: `megamed.checkpoint.rewrite` writes them.

Shapes: E experts, P specialties, W width of an expert, H hidden size.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megamed.checkpoint.weights import Weights
from megamed.config.load import did_you_mean
from megamed.models.moe import GENERAL, MoEConfig, Pools, initial_prior
from megamed.models.vlm import VLMConfig
from megamed.utils import UserError

Draw = Callable[[str, tuple[int, ...]], Tensor]
"""Initial values of a parameter, of its name within the language model and its shape."""

_PREFIX = "language."
_MLP = re.compile(r"(.*\.layers\.\d+\.mlp\.)(experts\.experts|shared_experts)\.(linear_fc[12])\.weight")
_ROUTER = re.compile(r".*\.mlp\.router\.(weight|prior|expert_bias)")


@dataclass(frozen=True)
class Variation:
    """What makes copies of an expert differ.

    Attributes:
        noise: standard deviation of what is added to an expert's weights, relative to theirs.
        reinit: share of an expert's neurons that are drawn anew, with mean and standard deviation of the weights they
            had (Drop-Upcycling, arXiv:2502.19261).
        seed: decides both, for each expert of each layer by its name.
    """

    noise: float = 0.0
    reinit: float = 0.0
    seed: int = 1234

    def of(self, weight: Tensor, layer: str, part: str, expert: int) -> Tensor:
        """An expert's own version of a matrix: linear_fc1 [2 W, H], gate above up, or linear_fc2 [H, W]."""
        if not self.noise and not self.reinit:
            return weight
        varied = weight.float().clone()
        neurons = varied.unflatten(0, (2, -1)) if part == "linear_fc1" else varied.t()[None]  # [matrices, W, H]
        generator = self._generator(f"{layer}{part}[{expert}]")
        if self.noise:
            for matrix in neurons:
                draw = torch.randn(matrix.shape, generator=generator)
                matrix += draw * (self.noise * matrix.std())
        if self.reinit:
            width = neurons.shape[1]
            # The same neurons in all matrices of an expert.
            order = torch.randperm(width, generator=self._generator(f"{layer}[{expert}]"))
            chosen = order[: round(self.reinit * width)]
            for matrix in neurons:
                before = matrix[chosen]
                draw = torch.randn(before.shape, generator=generator)
                matrix[chosen] = draw * before.std() + before.mean()
        return varied

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}:variation:{name}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Upcycle:
    """The parameters of a mixture of experts that computes what a dense model does (unless it is varied).

    Every expert is the dense MLP: the weights of a token's experts sum to 1, so it does not matter which they are. A
    shared expert takes some of the MLP's neurons and every routed one the others; or each routed expert has them all,
    and the shared one starts with an output of zero.

    Args:
        dense: the dense model's weights.
        config: the new model, as `with_experts` makes it.
        variation: of the experts.
        draw: initial values of routers, and of a shared expert that starts at zero.
    """

    def __init__(self, dense: Weights, config: VLMConfig, variation: Variation, draw: Draw):
        self.dense, self.variation = dense, variation
        self._moe, self._routers = config.language.moe, _Routers(config.language.moe, config.language.hidden_size, draw)
        self._draw, self._hidden_size = draw, config.language.hidden_size
        # Neurons of the dense MLP that are the shared expert's.
        self._shared = config.language.intermediate_size - config.language.moe.intermediate_size
        self._read = _Latest(dense.read)

    def __call__(self, name: str, stack: tuple[int, ...]) -> Tensor:
        """A parameter by its name in the new checkpoint, and its expert."""
        if router := _ROUTER.fullmatch(name):
            return self._routers(name, router[1])
        if not (mlp := _MLP.fullmatch(name)):
            return self.dense.read(name)
        layer, kind, part = mlp.groups()
        if kind == "shared_experts" and not self._shared:
            return self._zero_shared(name, part)
        whole = self._read(f"{layer}{part}.weight")
        if kind == "shared_experts":
            return _neurons(whole, part, slice(0, self._shared))
        return self.variation.of(_neurons(whole, part, slice(self._shared, None)), layer, part, stack[0])

    def _zero_shared(self, name: str, part: str) -> Tensor:
        """The shared expert that changes nothing: it learns, since its first matrix is not zero."""
        width = self._moe.shared_intermediate_size
        if part == "linear_fc2":
            return torch.zeros(self._hidden_size, width)
        return self._draw(name.removeprefix(_PREFIX), (2 * width, self._hidden_size))


class Merge:
    """The parameters of a mixture whose pools are dense models, trained separately from one ancestor.

    Branch-Train-MiX (arXiv:2403.07816): their MLPs become experts, all else is averaged.

    Args:
        sources: the dense models' weights, by pool.
        config: the new model.
        variation: of the experts.
        draw: initial values of routers.
    """

    def __init__(self, sources: Mapping[str, Weights], config: VLMConfig, variation: Variation, draw: Draw):
        self.sources, self.variation = sources, variation
        self._order = config.language.moe.resolved.order
        self._routers = _Routers(config.language.moe, config.language.hidden_size, draw)

    def __call__(self, name: str, stack: tuple[int, ...]) -> Tensor:
        """A parameter by its name in the new checkpoint, and its expert."""
        if router := _ROUTER.fullmatch(name):
            return self._routers(name, router[1])
        if mlp := _MLP.fullmatch(name):
            layer, _, part = mlp.groups()
            weight = self.sources[self._order[stack[0]][0]].read(f"{layer}{part}.weight")
            return self.variation.of(weight, layer, part, stack[0])
        first, *others = self.sources.values()
        total = first.read(name, dtype=torch.float32)
        for source in others:
            total += source.read(name, dtype=torch.float32)
        return total / len(self.sources)


class Extract:
    """The parameters of a model with some pools of another; what is not an expert's or a router's is the same.

    Args:
        weights: of the model with all pools.
        pools: its pools.
        kept: the pools of the new model, as `some_pools` makes them.
    """

    def __init__(self, weights: Weights, pools: Pools, kept: Pools):
        self.weights = weights
        # By the new number of an expert and of a specialty, the old one.
        self._experts = [pools.members[name][i] for name, i in kept.order]
        self._specialties = [pools.specialties.index(name) for name in kept.specialties]

    def __call__(self, name: str, stack: tuple[int, ...]) -> Tensor:
        """A parameter by its name in the new checkpoint, and its expert."""
        if stack:
            return self.weights.read(name, self._experts[stack[0]])
        whole = self.weights.read(name)
        if router := _ROUTER.fullmatch(name):
            return whole[self._specialties][:, self._experts] if router[1] == "prior" else whole[self._experts]
        return whole


def with_moe(config: VLMConfig, moe: MoEConfig) -> VLMConfig:
    """A model's settings with others of its experts."""
    return replace(config, language=replace(config.language, moe=moe))


def with_experts(dense: VLMConfig, moe: MoEConfig, source: str) -> VLMConfig:
    """A dense model's settings with experts in the place of its MLPs.

    Args:
        dense: the model.
        moe: the experts.
        source: where the model is from, for messages.

    Raises:
        UserError: it is not dense, or such experts would not compute what its MLPs do.
    """
    language = dense.language
    if language.moe.total_experts:
        raise UserError(
            f"{source}: has experts already ({language.moe.resolved}); name the checkpoint of a dense model. Pools are "
            "taken out of a mixture with tools/extract_specialist.py"
        )
    width, own, shared = language.intermediate_size, moe.intermediate_size, moe.shared_intermediate_size
    if own + shared != width and own != width:
        beside = f", or of {width - shared} beside the shared one of {shared}" if 0 < shared < width else ""
        raise UserError(
            f"experts of width {own} cannot compute what the dense MLP of width {width} does; take experts of "
            f"{width}{beside}"
        )
    return with_moe(dense, moe)


def need_exact_weights(moe: MoEConfig) -> None:
    """Check that the weights of a token's experts sum to 1.

    Raises:
        UserError: they do not.
    """
    if moe.top_k == 1:
        raise UserError(
            "with top_k=1 an expert's output is scaled by its probability, and the new model would not compute what "
            "the dense one does; take --top-k 2 or more"
        )


def some_pools(config: VLMConfig, names: Sequence[str], source: str) -> VLMConfig:
    """A model's settings with some of its pools: those that are named, and the general one.

    Args:
        config: the model.
        names: pools to keep.
        source: where the model is from, for messages.

    Raises:
        UserError: it has no pools, or not these, or fewer experts would be left than a token is sent to.
    """
    moe = config.language.moe
    if not moe.pools:
        what = f"its {moe.num_experts} experts are in no pools" if moe.num_experts else "it has no experts"
        raise UserError(f"{source}: {what}, so none can be taken out; name the checkpoint of a model with pools")
    check_names(names, moe.pools)
    kept = {name: pool for name, pool in moe.pools.items() if name in names or name == GENERAL}
    smaller = replace(moe, pools=kept)
    if not smaller.resolved.specialties:
        smaller = replace(smaller, routing="free")  # there is nothing left that could be called
    if smaller.total_experts < moe.top_k:
        raise UserError(
            f"--pools {' '.join(names)}: {smaller.total_experts} experts would be left, and tokens are sent to "
            f"top_k={moe.top_k}; keep further pools ({', '.join(n for n in moe.pools if n not in kept)})"
        )
    return with_moe(config, smaller)


def as_stored(config: VLMConfig, weights: Weights) -> VLMConfig:
    """A model's settings with those that make its routers keep what they have in a checkpoint; no card has them.

    Args:
        config: the model.
        weights: in the checkpoint.
    """
    kept = {name.rpartition(".")[2] for name in weights if ".router." in name}
    moe = replace(
        config.language.moe,
        routing="soft" if "prior" in kept else "free",
        balance="bias" if "expert_bias" in kept else "aux_loss",
    )
    return with_moe(config, moe)


def check_names(names: Sequence[str], pools: Mapping[str, object]) -> None:
    """Check that there are pools of these names, each named once.

    Raises:
        UserError: there are not; with the nearest name.
    """
    for number, name in enumerate(names):
        if name not in pools:
            hint = did_you_mean(name, pools) or f"there are: {', '.join(pools)}"
            raise UserError(f"there is no pool {name}; {hint}")
        if name in names[:number]:
            raise UserError(f"pool {name} is named twice")


class _Routers:
    """Routers of a new mixture."""

    def __init__(self, moe: MoEConfig, hidden_size: int, draw: Draw):
        self._moe, self._hidden_size, self._draw = moe, hidden_size, draw

    def __call__(self, name: str, kind: str) -> Tensor:
        pools = self._moe.resolved
        if kind == "weight":
            return self._draw(name.removeprefix(_PREFIX), (pools.num_experts, self._hidden_size))
        if kind == "expert_bias":
            return torch.zeros(pools.num_experts)
        return initial_prior(self._moe)


class _Latest:
    """Reads parameters, and keeps the last one: experts of one layer follow each other."""

    def __init__(self, read: Callable[[str], Tensor]):
        self._read, self._name = read, ""
        self._tensor: Tensor | None = None

    def __call__(self, name: str) -> Tensor:
        if self._tensor is None or name != self._name:
            self._tensor = None
            self._name, self._tensor = name, self._read(name)
        return self._tensor


def _neurons(weight: Tensor, part: str, chosen: slice) -> Tensor:
    """Some neurons of an MLP: rows of both halves of linear_fc1, columns of linear_fc2."""
    if part == "linear_fc2":
        return weight[:, chosen]
    return weight.unflatten(0, (2, -1))[:, chosen].flatten(0, 1)
