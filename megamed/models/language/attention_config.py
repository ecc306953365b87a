"""Settings of attention over packed rows: which implementation, and how context ranks share a row."""

from dataclasses import dataclass
from typing import Literal

from megamed.models.language.config import LanguageConfig
from megamed.ops.ulysses import kv_copies, pick_split
from megamed.runtime import ParallelConfig
from megamed.utils import UserError


@dataclass
class AttentionConfig:
    """Attention of the language model's layers. context = ring x ulysses."""

    backend: Literal["auto", "ring", "transformer_engine", "ring_flash_attn"] = "auto"
    """Who computes it: megamed's ring attention (also auto's choice), Transformer Engine's context parallelism, or
    the zigzag variable-length attention of the ring-flash-attn library."""
    ring: int | None = None
    """Context ranks that pass blocks of keys and values round; None takes what `ulysses` leaves."""
    ulysses: int | None = None
    """Context ranks that trade their part of the sequence for a part of the heads; None is picked from the heads."""
    kernel: Literal[
        "auto", "math", "cpu_flash", "torch_flash", "cudnn", "flash_attn", "flash_attn_3", "flash_attn_4"
    ] = "auto"  # fmt: skip
    """What computes one block of the ring."""
    transformer_engine_comm: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    """How Transformer Engine's context parallelism communicates."""

    def validate(self, language: LanguageConfig, parallel: ParallelConfig) -> None:
        """Check what does not depend on the machine.

        Raises:
            UserError: names the keys that do not fit each other.
        """
        self.split(language, parallel, ranks_per_node=parallel.tensor * parallel.context)
        if self.is_ours:
            return
        if parallel.use_ring_attention:
            raise UserError(
                f"parallel.use_ring_attention=true and attention.backend={self.backend} contradict each other; "
                "leave one of them out",
                everywhere=True,
            )
        if language.kv_channels % 8 or language.kv_channels > 256:
            raise UserError(
                f"attention.backend={self.backend} takes heads whose width is a multiple of 8 up to 256, and "
                f"model.language.head_dim is {language.kv_channels}; choose attention.backend=auto",
                everywhere=True,
            )
        if self.backend == "ring_flash_attn" and parallel.context == 1:
            raise UserError(
                "attention.backend=ring_flash_attn passes keys and values round over context ranks, of which "
                "parallel.context=1 has one; choose attention.backend=auto",
                everywhere=True,
            )

    @property
    def is_ours(self) -> bool:
        """Whether megamed's own ring attention computes it, and not another library."""
        return self.backend in ("auto", "ring")

    def document_multiple(self, parallel: ParallelConfig) -> int:
        """What the length of every packed document has to be a multiple of.

        Both libraries deal a document out in 2 x context chunks of one length; ours takes any length.
        """
        return 1 if self.is_ours or parallel.context == 1 else 2 * parallel.context

    def split(self, language: LanguageConfig, parallel: ParallelConfig, ranks_per_node: int) -> tuple[int, int]:
        """(ring, ulysses), picked where not set.

        Args:
            language: for its heads, of which each tensor-parallel rank has a part.
            parallel: for the context size.
            ranks_per_node: what is picked keeps the all-to-all of Ulysses, which nothing hides, inside a node.

        Raises:
            UserError: the two do not make up parallel.context, or the heads do not divide.
        """
        context = parallel.context
        heads, kv_heads = language.num_heads // parallel.tensor, language.num_kv_heads // parallel.tensor
        ring, ulysses = self._asked_split(context)
        if ring is None and ulysses is None:
            return pick_split(context, heads, kv_heads, max_ulysses=max(ranks_per_node // parallel.tensor, 1))
        for name, size in (("ring", ring), ("ulysses", ulysses)):
            if size is not None and (size < 1 or context % size):
                raise UserError(
                    f"attention.{name}={size} does not divide parallel.context={context}; context = ring x ulysses",
                    everywhere=True,
                )
        ring = ring or context // (ulysses or 1)
        ulysses = ulysses or context // ring
        if ring * ulysses != context:
            raise UserError(
                f"attention.ring={ring} x attention.ulysses={ulysses} = {ring * ulysses}, but "
                f"parallel.context={context}; set one of the two to null to have it picked",
                everywhere=True,
            )
        if not self.is_ours and kv_heads % ulysses:
            raise UserError(
                f"attention.transformer_engine_comm={self.transformer_engine_comm} shares the {kv_heads} key/value "
                f"heads of a tensor-parallel rank out over {ulysses} context ranks, which does not divide; choose p2p",
                everywhere=True,
            )
        kv_copies(heads, kv_heads, ulysses)
        return ring, ulysses

    def _asked_split(self, context: int) -> tuple[int | None, int | None]:
        """`ring` and `ulysses` as set, or what another library's way of communicating makes of the context ranks."""
        comm = self.transformer_engine_comm if self.backend == "transformer_engine" else "a ring"
        if self.is_ours or comm == "a2a+p2p":
            return self.ring, self.ulysses
        ring, ulysses = (1, context) if comm == "a2a" else (context, 1)
        if self.ring not in (None, ring) or self.ulysses not in (None, ulysses):
            raise UserError(
                f"attention.backend={self.backend} communicates by {comm}, which is attention.ring={ring} x "
                f"attention.ulysses={ulysses} at parallel.context={context}; set both to null",
                everywhere=True,
            )
        return ring, ulysses
