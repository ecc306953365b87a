"""What tools/specialisation.py trains: a task of two domains, the models that are compared, and one training of one.

A document is five words, a key of two words, and a value:

    c c c c c a b v

Which value a key has depends on the domain, alpha or beta: each has a random table of its own over the same keys, and
the tables contradict each other. Nothing can be derived, all of it has to be memorised. In the text the domain shows
in the style of the first five words alone: half of the 16 words are alpha's favourites, half beta's, and each word is a
favourite of its document's domain with a probability of 0.9. The metadata say the domain: each document has it as its
specialty, unless it is withheld.

Loss and training are the project's own; the label is the value alone. Shapes: S tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamed.data import Document, Microbatch, pack
from megamed.data.batch import ANSWER
from megamed.data.source import Cost, take_turns
from megamed.data.specialties import drop_specialties
from megamed.models.language import LanguageConfig, RotaryConfig
from megamed.models.moe import GENERAL, MoEConfig, PoolConfig
from megamed.models.projector import ProjectorConfig
from megamed.models.vision import VisionConfig
from megamed.models.vlm import VLMConfig
from megamed.optim import OptimConfig
from megamed.parallel import LanguageInput, run_schedule
from megamed.runtime import build_mesh, destroy_mesh, seed_everything
from megamed.train import Callback, Job, JobConfig, RoutingLog, StepEvent, build_job, fit

DOMAINS = ("alpha", "beta")
NUM_STYLE_WORDS, PREFIX, FAVOURITE = 16, 5, 0.9
# Words that a key's first and second word are taken from: 576 keys, 1152 values to memorise, of 32 words.
NUM_KEY_WORDS, NUM_VALUES = 24, 32
ROW_DOCUMENTS = 128
# Where each kind of word begins; the last ones name the domain, or say that it is unknown.
FIRST = np.cumsum([0, NUM_STYLE_WORDS, NUM_KEY_WORDS, NUM_KEY_WORDS, NUM_VALUES]).tolist()
NAMES, UNKNOWN = FIRST[4], FIRST[4] + len(DOMAINS)
NUM_WORDS = UNKNOWN + 1
PAD = 0

POOLS = {DOMAINS[0]: 4, DOMAINS[1]: 4, GENERAL: 2}
TOP_K, EXPERT_WIDTH, HIDDEN = 2, 8, 32
WITHHELD = 0.3
# Numbers of rows that training never reaches.
HELD_OUT, NUM_HELD_OUT = 2**40, 4
LOG_EVERY = 100


@dataclass(frozen=True)
class Arm:
    """A model, and whether its text names the domain.

    Attributes:
        name: in tables and plots.
        routing: of the mixture of experts; None for a dense model, as wide as the experts that one token uses.
        told_in_text: documents begin with a word that names the domain, or says that it is unknown where the metadata
            are withheld. What the metadata tell is then known to this model too, without pools.
        in_pools: experts are in pools and balanced within them; else they are one pool.
    """

    name: str
    routing: str | None
    told_in_text: bool = False
    in_pools: bool = True


ARMS = {
    "dense": Arm("dense", None),
    "dense-told": Arm("dense, domain named in the text", None, told_in_text=True),
    "plain": Arm("experts, one pool", "free", in_pools=False),
    "free": Arm("experts, free", "free"),
    "free-told": Arm("experts, free, domain named in the text", "free", told_in_text=True),
    "soft": Arm("specialists, soft", "soft"),
    "hard": Arm("specialists, hard", "hard"),
}


class TwoDomains:
    """Packed rows by number, a function of the seed and the number alone; the same words for every arm.

    Args:
        seed: decides tables, styles and every draw.
        told_in_text: as in `Arm`.
    """

    def __init__(self, seed: int, told_in_text: bool = False):
        self.seed, self.told_in_text = seed, told_in_text
        rng = np.random.default_rng((seed, 0))
        self.values = rng.integers(NUM_VALUES, size=(len(DOMAINS), NUM_KEY_WORDS, NUM_KEY_WORDS))
        self.favourites = rng.permutation(NUM_STYLE_WORDS).reshape(len(DOMAINS), -1)
        self.seq_length = ROW_DOCUMENTS * (PREFIX + 3 + told_in_text)

    def document(self, rng: np.random.Generator) -> Document:
        """One document, with its domain as its specialty."""
        domain, a, b = rng.integers([len(DOMAINS), NUM_KEY_WORDS, NUM_KEY_WORDS]).tolist()
        in_style = rng.random(PREFIX) < FAVOURITE
        words = self.favourites[np.where(in_style, domain, 1 - domain), rng.integers(NUM_STYLE_WORDS // 2, size=PREFIX)]
        document = Document(specialties=1 << domain)
        if self.told_in_text:
            document.add([NAMES + domain])
        document.add([*(FIRST[0] + words).tolist(), FIRST[1] + a, FIRST[2] + b])
        document.add([FIRST[3] + int(self.values[domain, a, b])], ANSWER)
        return document

    def whole(self, index: int) -> Microbatch:
        """Row number `index`, with all metadata."""
        rng = np.random.default_rng((self.seed, 1, index))
        return pack([self.document(rng) for _ in range(ROW_DOCUMENTS)], self.seq_length, PAD)

    def withhold(self, row: Microbatch, probability: float, index: int) -> Microbatch:
        """Row number `index` with some documents' metadata withheld, in the text too where it names the domain."""
        row = drop_specialties(row, probability, self.seed, index)
        if not self.told_in_text:
            return row
        unknown_S = (row.tokens_S >= NAMES) & (row.specialty_S == 0)
        return replace(row, tokens_S=row.tokens_S.masked_fill(unknown_S, UNKNOWN))

    def microbatch(self, index: int) -> Microbatch:
        """A training row. `fit` withholds the metadata by the same draw again."""
        return self.withhold(self.whole(index), WITHHELD, index)

    def held_out_rows(self, with_metadata: bool) -> list[Microbatch]:
        """Rows that training never shows: other documents of the same keys."""
        indices = range(HELD_OUT, HELD_OUT + NUM_HELD_OUT)
        return [self.withhold(self.whole(index), 1.0 - with_metadata, index) for index in indices]

    def load_frames(self, frames: Sequence[Any]) -> Tensor:
        return torch.empty(0, 3, 14, 14)

    def share(self, first: int, count: int, num_shares: int, cost: Cost) -> list[list[int]]:
        return take_turns(first, count, num_shares)

    def state(self, position: int) -> dict[str, Any]:
        return {}

    def restore(self, position: int, state: dict[str, Any]) -> None:
        pass

    def held_out(self) -> list[Any]:
        return []


def job_config(arm: Arm, seed: int, steps: int) -> JobConfig:
    """One layer, in fp32; all arms have the same attention, embeddings, learning rate and data.

    Args:
        arm: the model.
        seed: of weights and data.
        steps: of the training.
    """
    moe = MoEConfig(specialty_dropout=WITHHELD)
    if arm.routing is not None:
        sizes = POOLS if arm.in_pools else {GENERAL: sum(POOLS.values())}
        moe = MoEConfig(
            pools={name: PoolConfig(size) for name, size in sizes.items()}, routing=arm.routing,  # type: ignore[arg-type]
            top_k=TOP_K, intermediate_size=EXPERT_WIDTH, specialty_dropout=WITHHELD, log_every=LOG_EVERY,
        )  # fmt: skip
    config = JobConfig()
    config.model = VLMConfig(
        name="specialisation",
        vision=VisionConfig(
            image_size=14, patch_size=7, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8,
            qkv_bias=True, qk_norm=False, norm="layer_norm",
        ),
        projector=ProjectorConfig(vision_hidden_size=8, language_hidden_size=HIDDEN),
        language=LanguageConfig(
            vocab_size=NUM_WORDS, hidden_size=HIDDEN, num_layers=1, num_heads=2, num_kv_heads=2,
            intermediate_size=TOP_K * EXPERT_WIDTH, qk_norm=True, rotary=RotaryConfig(base=1e4), init_std=0.05, moe=moe,
        ),
    )  # fmt: skip
    config.data.seq_length = TwoDomains(seed, arm.told_in_text).seq_length
    config.optim = OptimConfig(lr=5e-3, min_lr=5e-4, warmup_steps=50, weight_decay=0.0)
    config.train.steps, config.train.seed, config.train.microbatches = steps, seed, 1
    config.train.dtype = "fp32"
    return config


def held_out_loss(job: Job, rows: Sequence[Microbatch]) -> float:
    """Mean loss of the values, nats."""

    def finish(output: Tensor, item: LanguageInput) -> tuple[Tensor, tuple[float, int]]:
        losses = output.float().flatten()[item.loss_kind_BS.flatten() == ANSWER]
        return losses.sum(), (float(losses.sum()), len(losses))

    def no_frames(frames: Sequence[Any]) -> Tensor:
        return torch.empty(0, 3, 14, 14)

    inputs = job.phase.language_inputs(rows, job.phase.forward(rows, no_frames, keep_graph=False))
    chunks = job.model.language
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        parts = run_schedule(chunks, inputs, finish, with_labels=True, train=False)
    for chunk in chunks:
        chunk.train()
    return sum(loss for loss, _ in parts) / sum(count for _, count in parts)


class HeldOutLoss:
    """Loss on held-out documents, with metadata and with metadata withheld, every so many steps.

    Args:
        job: what is trained.
        source: whose documents.
        every: steps.
    """

    def __init__(self, job: Job, source: TwoDomains, every: int):
        self.job, self.every = job, every
        self.rows = [source.held_out_rows(with_metadata) for with_metadata in (True, False)]
        self.curve: list[tuple[int, float, float]] = []
        self.metrics: dict[str, float] = {}

    def start(self, step: int) -> None:
        self._ask(step)

    def after_step(self, event: StepEvent) -> None:
        if event.step % self.every == 0 or event.step == self.job.config.train.steps:
            self._ask(event.step)

    def _ask(self, step: int) -> None:
        told, withheld = (round(held_out_loss(self.job, rows), 5) for rows in self.rows)
        self.curve.append((step, told, withheld))

    def end(self) -> None:
        pass


def settings(steps: int, every: int) -> dict[str, Any]:
    """All that a result depends on beside arm and seed."""
    return {
        "steps": steps, "every": every, "pools": POOLS, "top_k": TOP_K, "expert_width": EXPERT_WIDTH, "hidden": HIDDEN,
        "withheld": WITHHELD, "style_words": NUM_STYLE_WORDS, "prefix": PREFIX, "favourite": FAVOURITE,
        "key_words": NUM_KEY_WORDS, "values": NUM_VALUES, "documents": ROW_DOCUMENTS,
    }  # fmt: skip


def learn(
    key: str, seed: int, steps: int, every: int, routing: Path | None, tick: Callable[[], None]
) -> dict[str, Any]:
    """Train one arm from one seed, in a process that has a process group of its own.

    Args:
        key: of `ARMS`.
        seed: of weights and data; tables, rows and withheld metadata are the same for all arms.
        steps: optimizer steps.
        every: steps between two evaluations.
        routing: where to write routing.jsonl; None for nowhere.
        tick: called after each step.

    Returns:
        The arm's key, seed, parameters (all, and those that one token uses), and the curve of [step, loss with
        metadata, loss with metadata withheld].
    """
    arm = ARMS[key]
    source, config = TwoDomains(seed, arm.told_in_text), job_config(arm, seed, steps)
    config.validate(1)
    mesh = build_mesh(config.parallel, config.ulysses)
    seed_everything(seed, mesh.data_rank)
    job = build_job(config, mesh)
    held_out = HeldOutLoss(job, source, every)
    callbacks: list[Callback] = [held_out, Tick(tick)]
    if routing is not None:
        callbacks.append(RoutingLog(routing, config))
    fit(job, source, callbacks, 0)
    destroy_mesh()
    parameters = sum(p.numel() for chunk in job.model.language for p in chunk.parameters())
    idle = (sum(POOLS.values()) - TOP_K) * 3 * HIDDEN * EXPERT_WIDTH if arm.routing else 0
    return {
        "arm": key, "seed": seed, "parameters": parameters, "active_parameters": parameters - idle,
        "curve": held_out.curve,
    }  # fmt: skip


class Tick:
    """Tells someone of each step."""

    def __init__(self, tick: Callable[[], None]):
        self.tick = tick

    def start(self, step: int) -> None:
        pass

    def after_step(self, event: StepEvent) -> None:
        self.tick()

    def end(self) -> None:
        pass
