"""Time training steps with experts beside dense models: with the same active and with the same total parameters.

    python tools/bench/moe.py                        on a CPU: narrow layers, ratios
    python tools/bench/moe.py --hidden 6144 --width 8192 --heads 48 --kv-heads 8 --layers 1 --tokens 8192   on one GPU

For each number of experts there are three sides beside the dense model with the same active parameters (its MLP is as
wide as the experts that one token uses): the mixture, the mixture with Megatron's experts one after the other, and a
dense model with as many parameters as the mixture. Experts are four pools with soft routing, and every document calls
one. A step is forward, backward, gradient clipping and AdamW of a language model on text. Sides run turn by turn in one
process, so that what slows the machine down slows all of them.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

POOLS = ("general", "chest", "neuro", "breast")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32], metavar="N",
                        help="numbers of experts of a layer, multiples of 4 (default: 4 8 16 32)")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token (default: 2)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (default: 512)")
    parser.add_argument("--width", type=int, default=640, help="width of one expert (default: 640)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: 8)")
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads (default: 2)")
    parser.add_argument("--layers", type=int, default=2, help="layers (default: 2)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="words (default: 1024)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a row (default: 4096)")
    parser.add_argument("--documents", type=int, default=8, help="documents of a row (default: 8)")
    parser.add_argument("--rows", type=int, default=1, help="rows of a step, one after the other (default: 1)")
    parser.add_argument("--repetitions", type=int, default=10, help="timed steps of each side (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--no-total", action="store_true", help="leave out dense models with the same total parameters")
    parser.add_argument("--grouped", action="store_true", help="also Transformer Engine's grouped products")
    args = parser.parse_args()
    if any(number < len(POOLS) or number % len(POOLS) for number in args.experts):
        parser.error(f"--experts: {len(POOLS)} pools need multiples of {len(POOLS)}")
    return args


@dataclass(frozen=True)
class Side:
    """A model that is trained, and what there is to say of it."""

    step: Callable[[int], Any]
    num_parameters: int
    flops: int


def build(args: argparse.Namespace, mesh: Any, width: int, num_experts: int, sequential: bool, grouped: bool) -> Side:
    """A language model with optimizer and data.

    Args:
        args: sizes.
        mesh: of one process.
        width: of a layer's MLP, or of one expert.
        num_experts: of a layer; 0 for a dense model.
        sequential: Megatron computes the experts, one after the other.
        grouped: Transformer Engine computes them.
    """
    import torch
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megamed import runtime, train
    from megamed.models.moe import BatchedExperts
    from megamed.train.meter import step_flops

    config = job_config(args, width, num_experts, grouped)
    config.validate(1)
    runtime.seed_everything(config.train.seed, mesh.data_rank)
    job = train.build_job(config, mesh)
    found = [m for chunk in job.model.language for m in chunk.modules() if isinstance(m, BatchedExperts)]
    if len(found) != bool(num_experts and not grouped) * args.layers:
        raise RuntimeError(f"{len(found)} of {args.layers} layers compute their experts together")
    for module in found if sequential else ():
        module.__class__ = SequentialMLP
    row = text(args)

    def step(turn: int) -> None:
        job.stepper.train([row] * args.rows, lambda frames: torch.empty(0, 3, 14, 14), job.optimizer)

    parameters = sum(p.numel() for chunk in job.model.language for p in chunk.parameters())
    return Side(step, parameters, step_flops(config.model, [row] * args.rows))


def job_config(args: argparse.Namespace, width: int, num_experts: int, grouped: bool) -> Any:
    """Everything a job is built from; the vision tower is the smallest there is, and sees no frame."""
    from megamed import runtime
    from megamed.models.language import LanguageConfig
    from megamed.models.moe import MoEConfig, PoolConfig
    from megamed.models.projector import ProjectorConfig
    from megamed.models.vision import VisionConfig
    from megamed.models.vlm import VLMConfig
    from megamed.optim import OptimConfig
    from megamed.train import JobConfig

    moe = MoEConfig()
    if num_experts:
        pools = {name: PoolConfig(num_experts // len(POOLS)) for name in POOLS}
        moe = MoEConfig(pools=pools, routing="soft", top_k=args.top_k, intermediate_size=width, z_loss_coeff=1e-3)
    config = JobConfig()
    config.model = VLMConfig(
        name="experts",
        vision=VisionConfig(
            image_size=14, patch_size=7, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8,
            qkv_bias=True, qk_norm=False, norm="layer_norm",
        ),
        projector=ProjectorConfig(vision_hidden_size=8, language_hidden_size=args.hidden),
        language=LanguageConfig(
            vocab_size=args.vocabulary, hidden_size=args.hidden, num_layers=args.layers, num_heads=args.heads,
            num_kv_heads=args.kv_heads, intermediate_size=width, moe=replace(moe, grouped_gemm=grouped),
        ),
    )  # fmt: skip
    config.data.seq_length = args.tokens
    config.optim = OptimConfig(lr=1e-4, warmup_steps=0)
    config.train.microbatches = args.rows
    config.train.dtype = "bf16" if runtime.device_type() == "cuda" else "fp32"
    return config


def text(args: argparse.Namespace) -> Any:
    """A row of documents of random words, all of them labels; each document calls one pool, or none."""
    import torch

    from megamed.data import Document, pack
    from megamed.data.batch import ANSWER

    generator = torch.Generator().manual_seed(1)
    length = args.tokens // args.documents
    documents = []
    for number in range(args.documents):
        words = torch.randint(1, args.vocabulary, (length,), generator=generator).tolist()
        document = Document(specialties=(1 << number % len(POOLS)) & ((1 << len(POOLS) - 1) - 1))
        document.add(words, ANSWER)
        documents.append(document)
    return pack(documents, args.tokens, pad_id=0)


def main(args: argparse.Namespace) -> None:
    import torch
    from train_step import environment, say, take_turns

    from megamed import runtime
    from megamed.utils import log

    torch.set_num_threads(args.threads)
    log.setup(0, level="WARNING")
    runtime.start()
    mesh = runtime.build_mesh(runtime.ParallelConfig(), 1)
    active = args.top_k * args.width
    say("building the models")
    sides = {"dense": build(args, mesh, active, 0, False, False)}
    for number in args.experts:
        sides[f"{number}"] = build(args, mesh, args.width, number, False, False)
        sides[f"{number} sequential"] = build(args, mesh, args.width, number, True, False)
        if args.grouped:
            sides[f"{number} grouped"] = build(args, mesh, args.width, number, False, True)
        if not args.no_total:
            sides[f"{number} total"] = build(args, mesh, args.width * number, 0, False, False)
    times = take_turns({name: side.step for name, side in sides.items()}, args.warmup, args.repetitions)
    print(environment())
    print(f"{args.layers} layers, hidden size {args.hidden}, experts {args.width} wide, top {args.top_k}; "
          f"{args.rows} rows of {args.tokens} tokens a step; {sides['dense'].num_parameters:,} parameters are active")
    if runtime.device_type() == "cuda":
        report_speeds(args, sides, times)
    report_ratios(args, sides, times)


def report_ratios(args: argparse.Namespace, sides: dict[str, Side], times: dict[str, Any]) -> None:
    """Print what a mixture's step takes beside the others, by the clock that other programs disturb least."""
    from train_step import ratio

    from megamed.runtime import device_type

    clock = "cpu" if device_type() == "cpu" else "wall"

    def beside(one: str, other: str) -> str:
        if one not in times or other not in times:
            return "not measured"
        middle, low, high = ratio(getattr(times[one], clock), getattr(times[other], clock))
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    print(f"\nratios of {'processor' if clock == 'cpu' else 'wall'} time: median, smallest and largest turn\n")
    columns = ["experts", "parameters", "step / dense, same active", "dense, same total / step",
               "one after the other / together"] + ["together / grouped"] * args.grouped
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for number in args.experts:
        name = f"{number}"
        cells = [name, f"{sides[name].num_parameters:,}", beside(name, "dense"), beside(f"{name} total", name),
                 beside(f"{name} sequential", name)] + [beside(name, f"{name} grouped")] * args.grouped
        print(f"| {' | '.join(cells)} |")


def report_speeds(args: argparse.Namespace, sides: dict[str, Side], times: dict[str, Any]) -> None:
    """Print speeds as such: of a GPU, on which nothing else runs."""
    import torch

    from megamed import train

    peak = train.matmul_peak(torch.bfloat16)
    print(f"\nbf16, matrix products reach {peak / 1e12:.0f} TFLOP/s\n")
    print("| model | parameters | step, ms | tokens/s | model TFLOP/s | MFU |\n|---|---|---|---|---|---|")
    for name, side in sides.items():
        median = statistics.median(times[name].wall)
        print(f"| {name} | {side.num_parameters:,} | {1e3 * median:.1f} ({1e3 * min(times[name].wall):.1f} to "
              f"{1e3 * max(times[name].wall):.1f}) | {args.rows * args.tokens / median:.0f} | "
              f"{side.flops / median / 1e12:.1f} | {side.flops / median / peak:.1%} |")


if __name__ == "__main__":
    parsed = parse()  # before the imports, so that --help and a misspelt option answer at once
    if not parsed.grouped:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # all sides have the same other layers
    from megamed.runtime.process import run

    run(lambda: main(parsed))
