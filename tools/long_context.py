"""Which layout carries a long document: memory and time of a training step on NVIDIA H200s, computed, not measured.

    python tools/long_context.py --model internvl26b --tokens 1048576 --gpus 8 64 256
    python tools/long_context.py model.language.moe.num_experts=8 --model internvl26b --tokens 76800 --gpus 64

Prints Markdown. Every layout that megamed accepts is weighed: tensor x pipeline x context with context = ring x
ulysses, expert parallelism where the model has experts, and one replica (data = 1). What is counted, and from where
the numbers of the hardware are: docs/long_context.md.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megamed.utils.command import positive

if TYPE_CHECKING:
    from tools.layout_costs import Machine, Plan, Task, Work

CONF = Path(__file__).resolve().parents[1] / "conf"
GB = 1e9
# Beside the best layout.
NUM_ALTERNATIVES = 3


def fraction(text: str) -> float:
    """A number above 0, and at most 1."""
    if not 0 < float(text) <= 1:
        raise ValueError(text)
    return float(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as for launch/pretrain.py")
    parser.add_argument("--model", default="internvl26b", help="a name in conf/model (default: internvl26b)")
    parser.add_argument("--tokens", type=positive, default=2**20, help="of a document (default: 1048576)")
    parser.add_argument("--documents", type=positive, default=1, help="of a step, each a microbatch (default: 1)")
    parser.add_argument("--gpus", type=positive, nargs="+", default=[8, 64, 256], help="(default: 8 64 256)")
    assumed = parser.add_argument_group("assumptions, to be replaced by what is measured (defaults in the output)")
    assumed.add_argument("--attention", type=fraction, help="fraction of the peak that a block of attention reaches")
    assumed.add_argument("--products", type=fraction, help="the same for the language model's matrix products")
    assumed.add_argument("--encoder", type=fraction, help="the same for the frame encoder")
    assumed.add_argument("--links", type=fraction, help="fraction of a link's bandwidth that transfers reach")
    return parser.parse_args()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, then an empty line."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def what_is_counted(task: "Task", work: "Work", num_encoder: int, num_language: int, machine: "Machine") -> str:
    """The task, its FLOPs, and what is assumed."""
    text = task.tokens - task.num_frames * task.frame_tokens
    return (
        f"# {task.model.name}, documents of {task.tokens:,} tokens\n\n"
        f"{task.num_frames:,} frames of {task.frame_tokens} tokens and {text:,} tokens of text; {task.documents} a "
        f"step. Language model {num_language / GB:.2f} billion parameters, frame encoder {num_encoder / GB:.2f}.\n"
        "All numbers are computed; **not yet measured on a GPU**.\n\n"
        + table(
            ["of a document, forward", "PFLOP"],
            [
                ["attention, causal", number(work.attention / 1e15)],
                ["language model's matrix products", number(work.products / 1e15)],
                ["frame encoder", number(work.encoder / 1e15)],
                ["model FLOPs of everything, forward and backward", number(work.model / 1e15)],
            ],
        )
        + table(
            ["H200", "", "reached (assumed)"],
            [
                ["peak, bf16 dense", f"{machine.peak / 1e12:.0f} TFLOP/s",
                 f"attention {machine.attention:.0%}, matrix products {machine.products:.0%}, "
                 f"encoder {machine.encoder:.0%}"],
                ["memory's bandwidth", f"{machine.memory_bandwidth / 1e12:.1f} TB/s", f"{machine.links:.0%}"],
                ["NVLink, of a GPU in one direction", f"{machine.nvlink / GB:.0f} GB/s", f"{machine.links:.0%}"],
                ["InfiniBand NDR, of a GPU", f"{machine.infiniband / GB:.0f} GB/s", f"{machine.links:.0%}"],
                ["memory", f"{machine.memory / GB:.0f} GB",
                 f"all but {machine.reserved / GB:.0f} GB for CUDA, NCCL and fragmentation"],
            ],
        )
    )  # fmt: skip


def chosen(plans: Sequence["Plan"], machine: "Machine") -> list["Plan"]:
    """The best layout and some that differ from it in more than ring and ulysses, each at its best split of those."""
    kept: dict[object, Plan] = {}
    for plan in plans:
        p = plan.layout.parallel
        if plan.fits(machine) == plans[0].fits(machine):
            kept.setdefault((p.tensor, p.pipeline, p.expert, p.expert_tensor), plan)
    return list(kept.values())[: 1 + NUM_ALTERNATIVES]


def report(task: "Task", work: "Work", plans: Sequence["Plan"], machine: "Machine", largest: int) -> str:
    """What one number of GPUs can do.

    Args:
        task, work: what is trained.
        plans: of all layouts, the best first.
        machine: the GPUs.
        largest: tokens of the largest document that fits.
    """
    best, gpus = plans[0], plans[0].layout.num_ranks
    room = (machine.memory - machine.reserved) / GB
    lines = f"## {gpus} GPUs\n\n"
    if not best.fits(machine):
        lines += (
            f"**Does not fit**: of {len(plans)} layouts, the smallest needs {best.total_memory / GB:.0f} GB on a rank "
            f"of {room:.0f}. The largest document that fits has {largest:,} tokens.\n\n"
        )
    rows = []
    for plan in chosen(plans, machine):
        seconds = plan.total_seconds
        mfu = work.model * task.documents / (seconds * gpus * machine.peak)
        rate = task.tokens * task.documents / seconds
        rows.append([plan.layout.name, number(plan.total_memory / GB), number(seconds), f"{rate:,.0f}", f"{mfu:.0%}"])
    head = ["tensor", "pipeline", "context = ring x ulysses", "GB of a rank", "s a step", "tokens/s", "MFU"]
    lines += table(head, rows)
    lines += table(
        ["memory of the first line", "GB"],
        [[name, number(part / GB)] for name, part in best.memory.items()],
    )
    if not best.fits(machine):
        return lines
    parts = sorted(best.seconds.items(), key=lambda item: -item[1])
    lines += table(
        ["time of the first line", "s", "share"],
        [[name, number(part), f"{part / best.total_seconds:.1%}"] for name, part in parts if part],
    )
    name, part = parts[0]
    return lines + (
        f"Limit: {name}, {part / best.total_seconds:.0%} of the step; memory is filled to "
        f"{best.total_memory / GB / room:.0%} of {room:.0f} GB.\n\n"
    )


def traffic(splits: Mapping[tuple[int, int], Sequence[float]]) -> str:
    """Bytes that a rank sends for the attention of one document, where all ranks are context ranks."""
    rows = [
        [f"{ring * ulysses} = {ring} x {ulysses}", *map(number, (here / GB, there / GB, (here + there) / GB, *seconds))]
        for (ring, ulysses), (here, there, *seconds) in splits.items()
    ]
    head = ["context = ring x ulysses", "ring, GB", "all-to-all, GB", "together, GB"]
    return table([*head, "s on links", "s of them not hidden", "s of merging"], rows)


def main(args: argparse.Namespace) -> None:
    """Print the report."""
    import layout_costs as costs

    from megamed.config import compose, load
    from megamed.runtime import ParallelConfig
    from megamed.train import JobConfig

    job = load(JobConfig, compose(CONF, "pretrain", [f"model={args.model}", *args.overrides]))
    job.model.validate()
    names = ("attention", "products", "encoder", "links")
    machine = costs.Machine(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    task = costs.Task(job.model, args.tokens, args.documents)
    work, num_encoder = costs.count_work(task), costs.encoder_parameters(job.model)
    num_language = sum(costs.rank_parameters(job.model.language, ParallelConfig(), 0))
    print(what_is_counted(task, work, num_encoder, num_language, machine), end="")
    for gpus in args.gpus:
        plans = costs.plans(task, gpus, machine)
        largest = task.tokens if plans[0].fits(machine) else costs.largest_document(task, gpus, machine)
        print(report(task, work, plans, machine, largest), end="")
    print("## Attention of a document over context ranks alone: what a rank sends\n")
    for gpus in args.gpus:
        print(traffic(costs.context_splits(task, gpus, machine)), end="")


if __name__ == "__main__":
    parsed = parse()  # before the imports, so that --help and a misspelt option answer at once
    from megamed.runtime.process import run

    run(lambda: main(parsed))
