"""One rank of the needle test, which tools/needle.py starts: the data, the training, the held-out answers.

A document is a stretch of a series of 256 frames of noise, each followed by its number in the series. One frame
carries a mark, a bright square; the answer at the end of the document is that frame's number. To give it, the
model has to encode every frame, to see the mark, to find it again over the whole document, and to copy what
stands beside it: whatever is lost or misplaced between context ranks shows.

Shape suffixes: N frames, C channels, H and W pixels.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megamed import runtime
from megamed.data import Document, FrameRef, Microbatch, TextTokenizer, load_tokenizer, pack
from megamed.data.batch import ANSWER
from megamed.generate import greedy
from megamed.models.language import AttentionConfig, LanguageConfig, RotaryConfig
from megamed.models.projector import ProjectorConfig
from megamed.models.vision import VisionConfig
from megamed.models.vlm import VLMConfig
from megamed.optim import OptimConfig
from megamed.train import Job, JobConfig, build_job
from megamed.utils import log

# Frames of the series; a number is one token of the byte tokenizer.
NUM_FRAMES = 256
# Frames of each document of a packed row, in an order drawn anew for each row. Without the short ones, whose
# answers are sooner found, the loss stays at chance for thousands of steps.
PLAN = (256, 64, 64, *[16] * 4, *[4] * 16, *[2] * 16)
# One visual token a frame: 2 x 2 patches.
IMAGE_SIZE, PATCH_SIZE = 14, 7
MARK_SIZE, MARK_VALUE = 10, 3.0  # pixels; in standard deviations of the noise
QUESTION = "?"
# Numbers of documents that training never reaches.
HELD_OUT = 2**40
# Share of the held-out documents that is asked during training; after it all are.
SHARE_ASKED = 1 / 4


@dataclass(frozen=True)
class Needle:
    """A held-out document up to its answer, as `megamed.generate.greedy` takes it, and the true answer."""

    prompt_tokens: list[int]
    visual_positions: list[int]
    frames: list[FrameRef]
    answer: list[int]
    specialties: int = 0


@functools.lru_cache(maxsize=4096)
def draw(seed: int, document: int, num_frames: int) -> tuple[int, int]:
    """Number of a document's first frame, and of the marked one."""
    rng = np.random.default_rng((seed, 0, document))
    first = int(rng.integers(NUM_FRAMES - num_frames + 1))
    return first, first + int(rng.integers(num_frames))


class NeedleSource:
    """Packed rows by number, a function of the seed and the number alone.

    In a `FrameRef` of it, `first` is the document's number, `num_volumes` its frames, `index` the frame's number.

    Args:
        seed: decides every draw.
        tokenizer: makes the tokens.
    """

    def __init__(self, seed: int, tokenizer: TextTokenizer):
        self.seed, self.tokenizer = seed, tokenizer
        lengths = [len(self.document(i, count).tokens) for i, count in enumerate(PLAN)]
        # A multiple of 64 divides into the chunks of up to 32 context ranks.
        self.seq_length = -(-sum(lengths) // 64) * 64

    def document(self, number: int, num_frames: int) -> Document:
        """One document; its last two tokens are the answer and the end of the turn."""
        first, marked = draw(self.seed, number, num_frames)
        refs = [FrameRef(number, num_frames, i) for i in range(first, first + num_frames)]
        document = Document(f"needle-{number}", frames=refs)
        document.add([self.tokenizer.im_start_id])
        for ref in refs:
            document.visual_positions.append(len(document.tokens))
            document.add([self.tokenizer.img_context_id, ref.index])
        document.add([*self.tokenizer.encode(QUESTION), self.tokenizer.im_end_id, self.tokenizer.im_start_id])
        document.add([marked], ANSWER)
        document.add([self.tokenizer.im_end_id])
        return document

    def microbatch(self, index: int) -> Microbatch:
        """Row number `index`."""
        order = np.random.default_rng((self.seed, 1, index)).permutation(len(PLAN)).tolist()
        documents = [self.document(index * len(PLAN) + i, PLAN[i]) for i in order]
        return pack(documents, self.seq_length, self.tokenizer.pad_id)

    def load_frames(self, frames: Sequence[FrameRef]) -> Tensor:
        """frames_NCHW: noise, and the mark somewhere in a marked frame."""
        pixels_NCHW = np.empty((len(frames), 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
        for pixels_CHW, ref in zip(pixels_NCHW, frames, strict=True):
            rng = np.random.default_rng((self.seed, 2, ref.first, ref.index))
            rng.standard_normal(out=pixels_CHW, dtype=np.float32)
            if draw(self.seed, ref.first, ref.num_volumes)[1] == ref.index:
                y, x = rng.integers(IMAGE_SIZE - MARK_SIZE + 1, size=2)
                pixels_CHW[:, y : y + MARK_SIZE, x : x + MARK_SIZE] = MARK_VALUE
        return torch.from_numpy(pixels_NCHW)

    def held_out(self, count: int) -> list[Needle]:
        """The first `count` whole series that training never shows."""
        documents = [self.document(HELD_OUT + i, NUM_FRAMES) for i in range(count)]
        return [Needle(d.tokens[:-2], d.visual_positions, d.frames, d.tokens[-2:-1]) for d in documents]


def job_config(ring: int, ulysses: int, steps: int, seed: int, source: NeedleSource) -> JobConfig:
    """A two-layer model of 150,000 parameters, in fp32, over ring x ulysses context ranks."""
    config = JobConfig()
    config.model = VLMConfig(
        name="needle",
        vision=VisionConfig(
            image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, hidden_size=32, num_layers=1, num_heads=2,
            intermediate_size=64, qkv_bias=True, qk_norm=False, norm="layer_norm",
        ),
        projector=ProjectorConfig(vision_hidden_size=32, language_hidden_size=64),
        language=LanguageConfig(
            vocab_size=source.tokenizer.vocab_size, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
            head_dim=32, intermediate_size=128, qk_norm=True, tie_embeddings=True, rotary=RotaryConfig(base=1e4),
        ),
        frames_per_pass=1024,
    )  # fmt: skip
    config.parallel = runtime.ParallelConfig(context=ring * ulysses)
    config.attention = AttentionConfig(ring=ring, ulysses=ulysses)
    config.data.seq_length = source.seq_length
    config.optim = OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=50, weight_decay=0.0)
    config.train.steps, config.train.seed, config.train.microbatches = steps, seed, 1
    config.train.dtype = "fp32"
    return config


def num_right(job: Job, source: NeedleSource, needles: Sequence[Needle], blank: bool = False) -> int:
    """Answers that are exactly right; `blank` shows frames that are all zero. Collective."""

    def zeros(frames: Sequence[FrameRef]) -> Tensor:
        return torch.zeros(len(frames), 3, IMAGE_SIZE, IMAGE_SIZE)

    load: Callable[[Sequence[FrameRef]], Tensor] = zeros if blank else source.load_frames
    tokenizer = source.tokenizer
    answers = greedy(
        job.model, job.phase, job.mesh, needles, load, source.seq_length, tokenizer.vocab_size, max_new_tokens=1,
        end_id=tokenizer.im_end_id, pad_id=tokenizer.pad_id,
    )  # fmt: skip
    return sum(answer == needle.answer for answer, needle in zip(answers, needles, strict=True))


@torch.no_grad()
def nudge(job: Job) -> None:
    """Move every weight to the next larger fp32 number: a change as small as that of sums in another order."""
    for part in job.model.parts:
        for parameter in part.parameters():
            parameter.copy_(parameter.nextafter(torch.full_like(parameter, torch.inf)))
    job.optimizer.reload_model_params()


def learn(
    ring: int, ulysses: int, steps: int, seed: int, every: int, asked: int, nudged: bool = False
) -> dict[str, Any]:
    """Train, and ask `asked` held-out documents at the end, and some of them every so many steps. Collective.

    Args:
        ring, ulysses: context ranks; their product is the world size.
        steps: optimizer steps.
        seed: of weights and data.
        every: steps between evaluations.
        asked: held-out documents.
        nudged: start from nudged weights.

    Returns:
        The curve, the same on every rank: the training loss of each step, [step, share of right answers] of
        each evaluation, right answers after the last step, and right ones with blank frames.
    """
    source = NeedleSource(seed, load_tokenizer("bytes"))
    config = job_config(ring, ulysses, steps, seed, source)
    config.validate(dist.get_world_size())
    mesh = runtime.build_mesh(config.parallel, config.ulysses)
    runtime.seed_everything(seed, mesh.data_rank)
    job = build_job(config, mesh)
    if nudged:
        nudge(job)
    losses: list[float] = []
    accuracy: list[tuple[int, float]] = []
    needles = source.held_out(asked)
    some = needles[: max(int(asked * SHARE_ASKED), 1)]
    began, hidden = time.perf_counter(), True if dist.get_rank() else None  # None: where there is no terminal
    bar = tqdm(range(steps), desc=f"context {ring} x {ulysses}", unit="step", disable=hidden, file=sys.stderr)
    for step in bar:
        report = job.stepper.train([source.microbatch(step)], source.load_frames, job.optimizer)
        job.scheduler.step(1)
        losses.append(report.loss)
        if (step + 1) % every == 0 and step + 1 < steps:
            accuracy.append((step + 1, num_right(job, source, some) / len(some)))
            bar.set_postfix(loss=f"{report.loss:.3f}", right=f"{accuracy[-1][1]:.0%}")
    right = num_right(job, source, needles)
    accuracy.append((steps, right / asked))
    return {
        "ring": ring,
        "ulysses": ulysses,
        "nudged": nudged,
        "losses": losses,
        "accuracy": accuracy,
        "right": right,
        "blank": num_right(job, source, needles, blank=True),
        "asked": asked,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("ring", "ulysses", "steps", "seed", "every", "asked"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--nudged", action="store_true")
    parser.add_argument("--curve", type=Path, required=True, help="where rank 0 writes the curve, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    log.setup(runtime.global_rank(), level="WARNING")
    runtime.start()
    curve = learn(args.ring, args.ulysses, args.steps, args.seed, args.every, args.asked, args.nudged)
    if runtime.global_rank() == 0:
        args.curve.write_text(json.dumps(curve))


if __name__ == "__main__":
    runtime.run(main)
