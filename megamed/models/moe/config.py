"""Settings of the mixture-of-experts layers."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megamed.config.load import did_you_mean
from megamed.data.keywords import terms
from megamed.data.specialties import MOST_SPECIALTIES, MatchRule, Specialty
from megamed.models.moe.pools import GENERAL, Pools
from megamed.runtime import ParallelConfig, device_type, has_transformer_engine
from megamed.utils import UserError
from megamed.utils.optional import require

_KEY = "model.language.moe"
# Pools stand in names of metrics, options and files.
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass
class PoolConfig:
    """A pool of experts, and which studies call it.

    The pool named `general` is called by every token, and has neither rules nor labels.
    """

    num_experts: int = 1
    match: list[MatchRule] = field(default_factory=list)
    """A series that one of these rules holds for calls the pool."""
    labels: list[str] = field(default_factory=list)
    """What a sample may call the pool by, beside its name, in its field `specialties`."""


@dataclass
class MoEConfig:
    """Experts in place of the dense MLP. With neither `num_experts` nor `pools` every layer is dense."""

    num_experts: int = 0
    """Experts of a plain mixture; 0 where `pools` say how many there are."""
    pools: dict[str, PoolConfig] = field(default_factory=dict)
    """Named pools of experts (specialists)."""
    routing: Literal["free", "soft", "hard"] = "free"
    """What a token's specialties decide. free: nothing. soft: a prior, learned in each layer for each specialty, is
    added to the router's scores. hard: experts of the specialties' pools and of the pool `general` alone can be
    chosen. A token without specialty chooses from all experts, with its scores alone."""
    specialty_dropout: float = 0.1
    """Share of training samples whose specialties are withheld, so that studies without metadata route well."""
    prior_init: float = 2.0
    """soft: what the prior of a specialty starts at for the experts of its own pool and of `general`, in units of the
    router's logits; 0 for the others."""
    top_k: int = 2
    """Experts each token is sent to."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores. Those of the chosen experts are then scaled to a sum of 1, but for top_k=1."""
    intermediate_size: int = 1024
    """Width of one expert's SwiGLU MLP."""
    shared_intermediate_size: int = 0
    """Width of the expert that sees every token; 0 for none."""
    first_dense_layers: int = 0
    """Layers at the bottom that stay dense."""
    balance: Literal["aux_loss", "bias"] = "aux_loss"
    """How experts of one pool are kept equally busy: by a loss, or by a bias on the choice (and by nothing, with
    aux_loss_coeff=0). Pools are never balanced against each other."""
    aux_loss_coeff: float = 0.01
    """Weight of the load-balancing loss (Switch Transformer, arXiv:2101.03961, within each pool), averaged over
    microbatches; without meaning with balance=bias."""
    bias_update_rate: float = 1e-3
    """balance=bias: what an expert's bias moves by after each step (DeepSeek-V3, arXiv:2412.19437)."""
    z_loss_coeff: float = 0.0
    """Weight of the router's z-loss (ST-MoE, arXiv:2202.08906)."""
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """Megatron's token dispatcher; flex needs GPUs and DeepEP."""
    grouped_gemm: bool = False
    """Compute a rank's experts with Transformer Engine's grouped products; without, `BatchedExperts` computes them."""
    log_every: int = 50
    """Steps between two lines of `routing.jsonl`, each with the routing of the steps since the one before."""

    @property
    def resolved(self) -> Pools:
        """The pools with their experts' numbers; a plain mixture is one pool."""
        return Pools({name: pool.num_experts for name, pool in self.pools.items()} or {GENERAL: self.num_experts})

    @property
    def total_experts(self) -> int:
        """Experts of a layer; 0 for a dense model."""
        return self.resolved.num_experts

    @property
    def specialties(self) -> tuple[Specialty, ...]:
        """What the data path matches studies with, in the order of `Pools.specialties`."""
        return tuple(
            Specialty(name, tuple(self.pools[name].match), tuple(self.pools[name].labels))
            for name in self.resolved.specialties
            if name in self.pools
        )

    def to_mcore(self, num_layers: int) -> dict[str, Any]:
        """Fields of Megatron's `TransformerConfig` for these layers; empty for a dense model."""
        if not self.total_experts:
            return {}
        dense = self.first_dense_layers
        return dict(
            num_moe_experts=self.total_experts,
            moe_router_topk=self.top_k,
            moe_router_pre_softmax=self.top_k == 1,  # or Megatron refuses
            moe_ffn_hidden_size=self.intermediate_size,
            moe_shared_expert_intermediate_size=self.shared_intermediate_size or None,
            moe_layer_freq=[0] * dense + [1] * (num_layers - dense),
            # megamed.models.moe.Router chooses and balances; what Megatron's router would read stays off.
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_router_dtype="fp32",
            moe_token_dispatcher_type=self.dispatcher,
            moe_grouped_gemm=self.grouped_gemm,
        )

    def validate(self, parallel: ParallelConfig) -> None:
        """Check pools and sizes, by themselves and against the layout.

        Raises:
            UserError: names the key, what is wrong with it and the mend.
        """
        for key, wrong in self._faults(parallel):
            raise UserError(f"{_KEY}.{key}: {wrong}", everywhere=True)

    def _faults(self, parallel: ParallelConfig) -> Iterator[tuple[str, str]]:
        """Keys and what is wrong with them."""
        if self.pools and self.num_experts:
            yield "num_experts", f"is {self.num_experts}, and the pools say how many experts there are; leave it out"
        if parallel.expert > 1 and not self.total_experts:
            yield "pools", f"parallel.expert={parallel.expert} needs experts; set {_KEY}.pools or {_KEY}.num_experts"
        if not self.total_experts:
            return
        ranges = (
            ("top_k", 1 <= self.top_k <= self.total_experts, f"from 1 to the {self.total_experts} experts"),
            ("intermediate_size", self.intermediate_size >= 1, "1 or more"),
            ("shared_intermediate_size", self.shared_intermediate_size >= 0, "0 or more"),
            ("first_dense_layers", self.first_dense_layers >= 0, "0 or more"),
            ("specialty_dropout", 0 <= self.specialty_dropout <= 1, "from 0 to 1"),
            ("aux_loss_coeff", self.aux_loss_coeff >= 0, "0 or more"),
            ("bias_update_rate", self.bias_update_rate >= 0, "0 or more"),
            ("z_loss_coeff", self.z_loss_coeff >= 0, "0 or more"),
            ("log_every", self.log_every >= 1, "1 or more"),
        )
        for key, holds, wanted in ranges:
            if not holds:
                yield key, f"is {getattr(self, key):g}, and has to be {wanted}"
        if parallel.tensor > 1 and not parallel.sequence:
            yield "pools" if self.pools else "num_experts", (
                f"experts with parallel.tensor={parallel.tensor} need parallel.sequence=true, or each tensor-parallel "
                "rank would route the same tokens"
            )
        if not self.pools and self.num_experts % parallel.expert:
            yield "num_experts", f"is {self.num_experts}, which parallel.expert={parallel.expert} does not divide"
        if not self.pools and self.routing != "free":
            yield "routing", f"is {self.routing}, which needs pools that specialties call; set {_KEY}.pools"
        yield from self._device_faults(parallel)
        yield from self._pool_faults(parallel)

    def _device_faults(self, parallel: ParallelConfig) -> Iterator[tuple[str, str]]:
        """What is not here, which Megatron would find out in the first step or replace in silence."""
        if self.grouped_gemm and not has_transformer_engine():
            yield "grouped_gemm", (
                "needs a GPU and Transformer Engine, which is not here; leave it false, or install it with: "
                "pip install --no-build-isolation transformer_engine[pytorch]"
            )
        if self.dispatcher != "flex":
            return
        if parallel.tensor * parallel.expert == 1:
            yield "dispatcher", "is flex, which needs parallel.expert or parallel.tensor above 1; use alltoall"
        if device_type() != "cuda":
            yield "dispatcher", "is flex, which needs GPUs, and none is here; use alltoall or allgather"
        try:
            require("deep_ep", f"{_KEY}.dispatcher=flex", "the steps in https://github.com/deepseek-ai/DeepEP")
        except UserError as error:
            yield "dispatcher", f"{error}; or use alltoall"

    def _pool_faults(self, parallel: ParallelConfig) -> Iterator[tuple[str, str]]:
        names = self.resolved.specialties
        if len(names) > MOST_SPECIALTIES:
            yield "pools", f"there are {len(names)} of them beside general; {MOST_SPECIALTIES} are the most"
        callers: dict[str, str] = {}
        for name, pool in self.pools.items():
            key, size = f"pools.{name}", pool.num_experts
            if not _NAME.fullmatch(name):
                yield key, "is no name for a pool: small letters, digits and _, a letter first"
            if size < 1:
                yield key, f"num_experts is {size}, and has to be 1 or more; leave the pool out if it has none"
            if size % parallel.expert:
                yield f"{key}.num_experts", (
                    f"{size} experts do not divide over parallel.expert={parallel.expert} ranks, each of which holds a "
                    f"share of every pool; make it {-(-size // parallel.expert) * parallel.expert}, or lower "
                    "parallel.expert"
                )
            if unknown := next(filter(None, (rule.unknown_keyword() for rule in pool.match)), None):
                hint = did_you_mean(unknown, terms()) or "python tools/ingest.py keywords lists them"
                yield f"{key}.match", f"{unknown!r} is no keyword that ingest looks for; {hint}"
            if name == GENERAL and (pool.match or pool.labels):
                yield key, "is called by every token, and takes neither match nor labels; give them to another pool"
            for word in (name, *pool.labels):
                other = callers.setdefault(word.lower(), name)
                if other != name:
                    yield key, f"overlaps pool {other}: both are called by the label {word}; give it to one of them"
        yield from self._hard_faults()

    def _hard_faults(self) -> Iterator[tuple[str, str]]:
        """A token has to find top_k experts among those that are open to it."""
        if self.routing != "hard":
            return
        sizes = self.resolved.sizes
        for name in self.resolved.specialties:
            num_open = sizes[name] + sizes.get(GENERAL, 0)
            if num_open < self.top_k:
                yield f"pools.{name}", (
                    f"with routing=hard its tokens choose top_k={self.top_k} of {num_open} experts (its own and the "
                    "general pool's); add experts, or lower top_k"
                )
