"""Time training on packed rows beside padded batches, or look for how long a training step waits for its data.

    python tools/bench/packing.py                        packed against padded, on a mix of short X-ray samples
    python tools/bench/packing.py --wait                 the share of a step that waits, on a store made for it
    python tools/bench/packing.py --wait --store STORE   the same on a store of yours

Padded batches are what the common collator makes: so many samples in the order in which they come, each filled up to
the longest of them. Both sides train the same tiny InternVL with the same kernels on the same samples and frames, turn
by turn in one process, and have to have the same loss. Tokens are those of the samples; padding does not count.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONF = Path(__file__).resolve().parents[2] / "conf"

# Of the X-ray samples: how many of 100, pictures, fewest and most words of the answer. The tiny model has 4 tokens a
# picture where InternVL has 256, and a token a letter: with these words samples are about a quarter as long as they
# are there (300, 340, 660 and 1270 tokens), and so in the same proportions to each other.
MIX = (
    (60, 1, 1, 4),  # a question, an answer of a few words
    (25, 1, 4, 9),  # an impression
    (10, 2, 14, 22),  # a report of two views
    (5, 4, 35, 50),  # a report that compares with an earlier study
)
# Of the store that --wait makes: series, slices, edge in pixels.
SERIES, SLICES, EDGE = 6, 40, 512


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as for launch/pretrain.py")
    parser.add_argument("--repetitions", type=int, default=20, help="timed steps of each side (default: 20)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the training (default: 1)")
    parser.add_argument("--batch", type=int, default=16, help="samples of a padded batch (default: 16)")
    parser.add_argument("--wait", action="store_true", help="measure the wait for data")
    parser.add_argument("--store", type=Path, help="with --wait: a volume store (default: one made for it)")
    return parser.parse_args(arguments)


def write_xrays(folder: Path, count: int) -> Path:
    """Pictures, and samples about them: as many of each kind as `MIX` says, shuffled."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(1)
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(folder / f"{number}.png")
    kinds = rng.permutation(np.repeat(np.arange(len(MIX)), [round(share * count / 100) for share, *_ in MIX]))
    words = ("no", "focal", "consolidation", "effusion", "or", "pneumothorax", "heart", "size", "is", "normal")
    lines = []
    for _, pictures, fewest, most in (MIX[kind] for kind in kinds):
        answer = " ".join(rng.choice(words, int(rng.integers(fewest, most + 1))))
        turns = [{"role": "user", "content": "What does it show?"}, {"role": "assistant", "content": answer}]
        images = [f"{int(rng.integers(8))}.png" for _ in range(pictures)]
        lines.append(json.dumps({"messages": turns, "images": images}) + "\n")
    path = folder / "xrays.jsonl"
    path.write_text("".join(lines))
    return path


def write_store(folder: Path) -> Path:
    """A store of CT series of random voxels."""
    import numpy as np

    from megamed.data.privacy import Pseudonyms
    from megamed.data.readers import Identity
    from megamed.data.series import Series, SeriesInfo
    from megamed.data.store import StoreWriter, VolumeStore, write_series

    store, pseudonyms = VolumeStore.create(folder / "store"), Pseudonyms(b"a key for benchmarks")
    shape = (1, SLICES, EDGE, EDGE)
    with StoreWriter(store) as writer:
        for number in range(SERIES):
            voxels = np.random.default_rng(number).integers(-1000, 1000, shape).astype(np.int16)
            info = SeriesInfo("CT", "volume", "axial", shape, units="HU", body_part="CHEST", spacing_mm=(0.7, 0.7, 5.0))
            name = pseudonyms.of("series", str(number))
            identity = Identity(f"patient{number}", f"study{number}", name)
            writer.commit(write_series(store.root, name, identity, Series(voxels, info), pseudonyms))
    return store.root


def build(overrides: Sequence[str], steps: int) -> tuple[Any, Any, Any]:
    """The job, its source and the tokenizer of +exp=ct with some overrides."""
    from megamed import data, runtime, train
    from megamed.config import compose, load

    config = load(train.JobConfig, compose(CONF, "pretrain", ["+exp=ct", f"train.steps={steps}", *overrides]))
    mesh = runtime.build_mesh(config.parallel, config.ulysses)
    runtime.seed_everything(config.train.seed, mesh.data_rank)
    job = train.build_job(config, mesh)
    tokenizer = data.load_tokenizer(config.data.tokenizer)
    tokens_per_frame = job.model.vision.module.tokens_per_frame
    return job, data.build_source(config.data, tokenizer, config.model.vision.image_size, tokens_per_frame), tokenizer


def padded(documents: Sequence[Any], pad_id: int) -> Any:
    """A batch in which each document is as long as the longest."""
    from megamed.data import pack

    longest = max(len(document.tokens) for document in documents)
    return pack(documents, longest * len(documents), pad_id, document_multiple=longest)


def split(row: Any) -> list[Any]:
    """The documents of a packed row."""
    from megamed.data import Document

    documents, frames = [], iter(row.frames)
    is_visual = {int(position): place for place, position in enumerate(row.visual_positions)}
    per_frame = len(is_visual) // max(1, len(row.frames))
    for name, start, end in zip(row.sample_ids, row.cu_seqlens.tolist(), row.cu_seqlens.tolist()[1:], strict=False):
        tokens = row.tokens_S[start:end].tolist()
        kinds = [0, *row.loss_kind_S[start : end - 1].tolist()]
        visual = [position - start for position in range(start, end) if position in is_visual]
        own = [next(frames) for _ in range(len(visual) // max(1, per_frame))]
        documents.append(Document(name, tokens, kinds, visual, own))
    return documents


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Packed rows beside padded batches."""
    from train_step import environment, ratio, take_turns

    samples = write_xrays(folder, 2000)
    settings = ["data.store=", f"data.datasets=[{{name: xrays, path: {samples}}}]", "data.packing.rows_per_block=8"]
    job, source, tokenizer = build([*settings, *args.overrides], 1)
    count = job.config.train.microbatches
    steps = [[source.microbatch(s * count + i) for i in range(count)] for s in range(3)]
    pixels = {frame: source.load_frames([frame])[0] for step in steps for row in step for frame in row.frames}

    def load(frames: Sequence[Any]) -> Any:
        """Frames that were made before: what is timed is training."""
        import torch

        return torch.stack([pixels[frame] for frame in frames])

    others = []
    for step in steps:
        documents = sorted((d for row in step for d in split(row)), key=lambda document: document.sample_id)
        batches = [documents[i : i + args.batch] for i in range(0, len(documents), args.batch)]
        others.append([padded(batch, tokenizer.pad_id) for batch in batches])
    losses = [job.stepper.gradients(rows[0], load).loss for rows in (steps, others)]
    # The same samples: what is left is rounding, of fp32 or of bf16 (8 bits).
    if abs(losses[0] / losses[1] - 1) > (1e-5 if job.dtype.itemsize == 4 else 1e-2):
        raise RuntimeError(f"the sides differ: the loss is {losses[0]} packed and {losses[1]} padded")
    sides: dict[str, Callable[[int], Any]] = {
        "packed": lambda turn: job.stepper.train(steps[turn % 3], load, job.optimizer),
        "padded": lambda turn: job.stepper.train(others[turn % 3], load, job.optimizer),
    }
    times = take_turns(sides, args.warmup, args.repetitions)
    tokens = sum(row.num_real for step in steps for row in step)
    lengths = [end - start for step in steps for row in step for start, end in bounds(row)]
    print(environment())
    print(f"{len(lengths) / 3:.0f} samples a step, of {min(lengths)} to {max(lengths)} tokens, half of them below "
          f"{statistics.median(lengths):.0f}; {tokens / 3:.0f} tokens a step; loss before the first: {losses[0]:.6f}")
    for name, rows in (("packed", steps), ("padded", others)):
        room = sum(len(row.tokens_S) for step in rows for row in step)
        print(f"  {name}: {tokens / room:.1%} of the positions are samples, in {sum(map(len, rows)) / 3:.0f} "
              f"{'rows' if name == 'packed' else 'batches'} a step")
    for clock in ("wall", "cpu"):
        middle, low, high = ratio(getattr(times["padded"], clock), getattr(times["packed"], clock))
        print(f"packed has {middle:.2f} ({low:.2f} to {high:.2f}) times the tokens a second, by {clock} time")


def bounds(row: Any) -> list[tuple[int, int]]:
    """Where the documents of a row without fill begin and end."""
    ends = row.cu_seqlens.tolist()
    return list(zip(ends, ends[1:], strict=False))[: len(row.sample_ids)]


def wait(args: argparse.Namespace, folder: Path) -> None:
    """The share of training steps that waits for data, with a thread ahead and without."""
    from train_step import environment

    from megamed import runtime, train

    class Waits:
        """Keeps how long each step took, and waited."""

        def __init__(self) -> None:
            self.seconds: list[tuple[float, float]] = []

        def start(self, step: int) -> None: ...

        def after_step(self, event: Any) -> None:
            self.seconds.append((event.data_seconds, event.seconds))

        def end(self) -> None: ...

    store = args.store or write_store(folder)
    steps = args.warmup + args.repetitions
    print(environment())
    for name, most in (("prefetch", None), ("no prefetch", 0)):
        ahead = [] if most is None else [f"data.loader.prefetch_frames={most}"]
        runtime.destroy_mesh()
        job, source, _ = build([f"data.store={store}", *args.overrides, *ahead], steps)
        waits = Waits()
        train.fit(job, source, [waits], 0)
        timed = waits.seconds[args.warmup :]
        shares = [waited / seconds for waited, seconds in timed]
        total = sum(waited for waited, _ in timed) / sum(seconds for _, seconds in timed)
        print(f"{name}: {total:.2%} of the time of {len(timed)} steps is waiting for data; of one step "
              f"{min(shares):.2%} to {max(shares):.2%}, half of them below {statistics.median(shares):.2%}")


def main(args: argparse.Namespace) -> None:
    import torch

    from megamed import runtime
    from megamed.utils import log

    torch.set_num_threads(args.threads)
    log.setup(0, level="ERROR")
    runtime.start()
    with tempfile.TemporaryDirectory() as folder:
        (wait if args.wait else compare)(args, Path(folder))


if __name__ == "__main__":
    parsed = parse()  # before the imports, so that --help and a misspelt option answer at once
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    from megamed.runtime.process import run

    run(lambda: main(parsed))
