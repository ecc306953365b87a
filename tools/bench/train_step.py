"""Time one training step: forward, backward, gradient clipping, AdamW.

    python tools/bench/train_step.py                      a tiny InternVL, beside plain PyTorch with transformers
    python tools/bench/train_step.py --slice internvl26b  a part of InternVL-26B at its real widths, on one GPU

Runs in one process, on the GPU where there is one. Side by side means turn by turn in one process, on the
same weights, documents and frames, so that what slows the machine down slows both.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

CONF = Path(__file__).resolve().parents[2] / "conf"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as for launch/pretrain.py")
    parser.add_argument("--repetitions", type=int, default=30, help="timed steps of each side (default: 30)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
                        help="auto: fp32 beside transformers and on a CPU, bf16 for a slice on a GPU")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="also write where the time goes, in Markdown")
    parser.add_argument("--markdown", action="store_true", help="print the result as rows of docs/performance.md")
    parser.add_argument("--no-transformer-engine", action="store_true", help="do without it where it is installed")
    part = parser.add_argument_group("a slice of a large model")
    part.add_argument("--slice", metavar="MODEL", help="a name in conf/model, such as internvl26b")
    part.add_argument("--layers", type=int, help="vision layers and language layers (default: what fits in memory)")
    part.add_argument("--tiny-widths", action="store_true", help="narrow layers and few patches, to try it on a CPU")
    part.add_argument("--seq-length", type=int, default=8192, help="tokens of a packed row (default: 8192)")
    part.add_argument("--microbatches", type=int, default=2, help="packed rows of a step (default: 2)")
    part.add_argument("--frames", type=int, default=14, help="frames of a document, two documents a row (default: 14)")
    return parser.parse_args()


def environment() -> str:
    """Hardware and versions, in a line."""
    import megatron.core
    import torch
    import transformers

    from megamed.runtime import device_type, has_transformer_engine

    if device_type() == "cuda":
        machine = f"one {torch.cuda.get_device_name()}"
    else:
        machine = f"{os.cpu_count()}-core {platform.machine()} machine, {torch.get_num_threads()} thread"
    return (
        f"{machine}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"megatron-core {megatron.core.__version__}, transformers {transformers.__version__}, "
        f"Transformer Engine {'on' if has_transformer_engine() else 'off'}"
    )


@dataclass
class Times:
    """Seconds of one side's steps, turn by turn."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Processor time of this process: what a step costs, whatever else the machine does meanwhile."""


def take_turns(sides: dict[str, Callable[[int], Any]], warmup: int, repetitions: int) -> dict[str, Times]:
    """Time each side's steps turn by turn: A B A B ...

    Args:
        sides: a step each, called with the number of the turn.
        warmup: turns that do not count.
        repetitions: turns that count.
    """
    from tqdm import tqdm

    from megamed.runtime import synchronize

    times = {name: Times() for name in sides}
    for turn in tqdm(range(warmup + repetitions), desc="steps", unit="turn", disable=None, file=sys.stderr):
        for name, step in sides.items():
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            step(turn)
            synchronize()
            if turn >= warmup:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def ratio(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Throughput of ours over theirs: median, smallest and largest of the turns."""
    ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def compare(args: argparse.Namespace) -> None:
    """The tiny model beside transformers."""
    import torch
    from plain_torch import LAYOUTS, PlainTrainer, batches, build_model, copy_weights

    from megamed import data, runtime, train
    from megamed.config import compose, load

    dtype = "fp32" if args.dtype == "auto" else args.dtype
    overrides = ["+exp=fmri", "optim.warmup_steps=0", f"train.dtype={dtype}", *args.overrides]
    config = load(train.JobConfig, compose(CONF, "pretrain", overrides))
    say("building both models")
    mesh = runtime.build_mesh(config.parallel, config.ulysses)
    runtime.seed_everything(config.train.seed, mesh.data_rank)
    job = train.build_job(config, mesh)
    tokenizer = data.load_tokenizer(config.data.tokenizer)
    tokens_per_frame = job.model.vision.module.tokens_per_frame
    fmri = data.read_run(config.data.path)
    source = data.FmriSource(fmri, config.data, tokenizer, config.model.vision.image_size, tokens_per_frame)
    count = config.train.microbatches
    steps = [[source.microbatch(s * count + i) for i in range(count)] for s in range(3)]
    frames = {tuple(m.frames): source.load_frames(m.frames) for step in steps for m in step}

    def load_frames(refs: Sequence[data.FrameRef]) -> torch.Tensor:
        """Frames that were made before: what is timed is training."""
        if tuple(refs) not in frames:
            frames[tuple(refs)] = source.load_frames(refs)
        return frames[tuple(refs)]

    theirs = build_model(config.model, tokenizer.img_context_id).to(runtime.current_device())
    copy_weights(job.model, config.model, theirs)
    plain = PlainTrainer(theirs, config.optim, load_frames, job.dtype)
    kinds = [i for i, name in enumerate(data.LOSS_KINDS) if job.stepper.weights[name] > 0]
    num_labels = [sum(int(torch.isin(m.loss_kind_S, torch.tensor(kinds)).sum()) for m in step) for step in steps]
    laid_out = {
        layout: [batches(step, layout, kinds, runtime.current_device()) for step in steps] for layout in LAYOUTS
    }
    with torch.no_grad():
        expected = sum(plain.loss(b).item() for b in laid_out["padded rows"][0]) / num_labels[0]
    found = job.stepper.gradients(steps[0], load_frames).loss
    # The same function: what is left is rounding, of fp32 or of bf16 (8 bits).
    tolerance = 1e-5 if job.dtype == torch.float32 else 1e-2
    if abs(found / expected - 1) > tolerance:
        raise RuntimeError(f"the sides differ: megamed's loss is {found}, transformers' {expected}")

    def ours(turn: int) -> None:
        job.stepper.train(steps[turn % 3], load_frames, job.optimizer)

    sides: dict[str, Callable[[int], Any]] = {"megamed": ours}
    for layout in LAYOUTS:
        sides[layout] = partial(plain_step, plain, laid_out[layout], num_labels)
    times = take_turns(sides, args.warmup, args.repetitions)
    tokens = sum(m.num_real for step in steps for m in step) / len(steps)
    print(environment())
    print(f"{tokens:.0f} tokens a step in {count} rows of {config.data.seq_length}; loss before the first step: "
          f"megamed {found:.6f}, transformers {expected:.6f}")
    report_comparison(times, tokens, args.markdown)
    if args.profile:
        write_profile(args.profile, job, ours, sides)


def plain_step(plain: Any, laid_out: Sequence[Any], num_labels: Sequence[int], turn: int) -> None:
    plain.step(laid_out[turn % len(laid_out)], num_labels[turn % len(laid_out)])


def report_comparison(times: dict[str, Times], tokens: float, markdown: bool) -> None:
    """Print each side's speed and megamed's throughput over it, by both clocks."""
    from megamed.runtime import device_type

    clocks = ("wall", "cpu") if device_type() == "cpu" else ("wall",)  # a GPU works while the CPU waits
    ours = times["megamed"]
    if not markdown:
        median = statistics.median(ours.wall)
        print(f"{'megamed':28s} {1e3 * median:8.1f} ms  {tokens / median:8.0f} tokens/s")
    for name in list(times)[1:]:
        theirs = times[name]
        ratios = [ratio(getattr(theirs, clock), getattr(ours, clock)) for clock in clocks]
        if markdown:
            cells = [f"{middle:.2f} | {low:.2f} to {high:.2f}" for middle, low, high in ratios]
            print(f"| {name} | {' | '.join(cells)} |")
        else:
            median = statistics.median(theirs.wall)
            texts = [f"{clock} {r[0]:.2f} ({r[1]:.2f} to {r[2]:.2f})" for clock, r in zip(clocks, ratios, strict=True)]
            print(f"{'transformers, ' + name:28s} {1e3 * median:8.1f} ms  {tokens / median:8.0f} tokens/s  "
                  f"megamed/transformers: {', '.join(texts)}")
    best = min(list(times)[1:], key=lambda name: statistics.median(getattr(times[name], clocks[-1])))
    middle = [f"{ratio(getattr(times[best], clock), getattr(ours, clock))[0]:.2f} by {clock} time" for clock in clocks]
    print(f"megamed / transformers at its best ({best}): {', '.join(middle)}")


def measure_slice(args: argparse.Namespace) -> None:
    """A part of a large model by itself."""
    from slices import build_slice

    from megamed import runtime, train
    from megamed.train.meter import step_flops

    built = build_slice(CONF, args)
    job, config = built.job, built.job.config.model
    num_parameters = sum(p.numel() for part in job.model.parts for p in part.parameters())
    name = f"{args.slice}, {config.vision.num_layers} + {config.language.num_layers} layers"
    say(f"{name}: {num_parameters:,} parameters; measuring the matrix-product peak")
    peak = train.matmul_peak(job.dtype)
    say(f"{peak / 1e12:.2f} TFLOP/s; training")

    def step(turn: int) -> None:
        job.stepper.train(built.microbatches, built.load_frames, job.optimizer)

    times = take_turns({name: step}, args.warmup, args.repetitions)[name].wall
    median = statistics.median(times)
    flops = step_flops(config, built.microbatches)
    num_tokens = sum(m.num_real for m in built.microbatches)
    num_frames = sum(len(m.frames) for m in built.microbatches)
    values = {
        "layers": f"{config.vision.num_layers} + {config.language.num_layers}",
        "parameters": f"{num_parameters:,}",
        "type": str(job.dtype).removeprefix("torch."),
        "recompute": "on" if config.language.recompute else "off",
        "Transformer Engine": "on" if built.transformer_engine else "off",
        "step": f"{1e3 * median:.1f} ms ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})",
        "tokens/s": f"{num_tokens / median:.0f}",
        "frames/s": f"{num_frames / median:.1f}",
        "model TFLOP/s": f"{flops / median / 1e12:.2f}",
        "matmul peak TFLOP/s": f"{peak / 1e12:.2f}",
        "MFU": f"{flops / median / peak:.1%}",
        "peak memory": f"{runtime.peak_memory_bytes() / 2**30:.1f} GiB",
    }
    print(environment())
    print(f"{num_tokens} tokens and {num_frames} frames a step in {len(built.microbatches)} rows of {args.seq_length}")
    if args.markdown:
        print(f"| {' | '.join(values)} |\n|{'---|' * len(values)}\n| {' | '.join(values.values())} |")
    else:
        print("\n".join(f"{key:20s} {value}" for key, value in values.items()))
    if args.profile:
        write_profile(args.profile, job, step, {"megamed": step})


def write_profile(path: Path, job: Any, ours: Callable[[int], Any], sides: dict[str, Callable[[int], Any]]) -> None:
    """Phases of megamed's step, and the top operators of every side, to a Markdown file."""
    from breakdown import operator_table, phase_table, phases, top_operators

    say("profiling")
    parts = [environment(), phase_table(phases(job, lambda: ours(0), repetitions=9))]
    for name, step in sides.items():
        parts.append(f"## {name}\n\n" + operator_table(top_operators(lambda step=step: step(0), 3, 25)))
    path.write_text("# Where the time of a step goes\n\n" + "\n\n".join(parts) + "\n")
    say(f"profile: {path}")


def main(args: argparse.Namespace) -> None:
    import torch

    from megamed import runtime
    from megamed.utils import log

    torch.set_num_threads(args.threads)
    log.setup(0, level="WARNING")
    runtime.start()
    if args.slice:
        measure_slice(args)
    else:
        compare(args)


if __name__ == "__main__":
    parsed = parse()  # before the imports, so that --help and a misspelt option answer at once
    # Before Megatron looks for it; and transformers' weights have no place in its modules.
    if parsed.no_transformer_engine or not parsed.slice:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    from megamed.runtime.process import run

    run(lambda: main(parsed))
