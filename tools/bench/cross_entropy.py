"""Time the language-model head and its loss, forward and backward, and what memory they take: chunks beside a whole.

    python tools/bench/cross_entropy.py                  on a CPU: ratios, on a GPU: milliseconds and GiB, too
    python tools/bench/cross_entropy.py --tokens 76800   a CT of 300 slices

Whole logits are `F.cross_entropy` of one `F.linear`, in fp32 as Megatron's loss has them. Turn by turn in one
process, on the same tensors, so that what slows the machine down slows both; the losses of both sides are compared
first. Memory is what is allocated at the peak beyond the arguments: on a GPU by its allocator, on a CPU by
torch's profiler.

Shapes: S tokens, H hidden size, V words.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

# Tokens, hidden size, vocabulary, tokens of a chunk: in proportion to InternVL-26B's on a CPU, and itself on a GPU.
SIZES = {"cpu": (2048, 512, 7552, 128), "cuda": (16384, 6144, 92672, None)}
# The losses of both sides are sums in another order; in bf16 the whole logits are rounded to 8 bits, too.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {device: f"{tokens}, {hidden}, {vocab}" for device, (tokens, hidden, vocab, _) in SIZES.items()}
    parser.add_argument("--tokens", type=int, help=f"S (default with H and V: {sizes['cpu']}; GPU: {sizes['cuda']})")
    parser.add_argument("--hidden", type=int, help="H")
    parser.add_argument("--vocab", type=int, help="V")
    parser.add_argument("--chunk-tokens", type=int, help="tokens of a chunk (default: 128; GPU: what megamed takes)")
    parser.add_argument("--labelled", type=float, nargs="+", default=[1.0, 0.01], metavar="SHARE",
                        help="shares of the tokens that have a label, from 0 to 1 (default: 1 0.01)")
    parser.add_argument("--repetitions", type=int, default=20, help="timed turns of each side (default: 20)")
    parser.add_argument("--warmup", type=int, default=2, help="turns before them (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
                        help="of the hidden states and the weight; auto: fp32 on a CPU, bf16 on a GPU")
    return parser.parse_args(arguments)


def peak_bytes(step: Callable[[], Any]) -> int:
    """Bytes allocated at the peak of a step, beyond what was there before."""
    import torch

    from megamed.runtime import device_type

    if device_type() == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    peak = now = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def steps(share: float, args: argparse.Namespace, dtype: str) -> dict[str, Callable[[int], Any]]:
    """Forward and backward of each side on one row, in which the labelled tokens are the last ones."""
    import torch
    import torch.nn.functional as F

    from megamed.ops.cross_entropy import IGNORED_LABEL, chunked_cross_entropy
    from megamed.runtime import current_device

    device, kind = current_device(), {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    generator = torch.Generator(device=device).manual_seed(1)
    hidden_SH = torch.randn(args.tokens, args.hidden, generator=generator, device=device).to(kind).requires_grad_()
    weight_VH = torch.randn(args.vocab, args.hidden, generator=generator, device=device).mul_(args.hidden**-0.5)
    weight_VH = weight_VH.to(kind).requires_grad_()
    labels_S = torch.randint(args.vocab, (args.tokens,), generator=generator, device=device)
    labels_S[: args.tokens - round(share * args.tokens)] = IGNORED_LABEL

    def whole() -> torch.Tensor:
        logits_SV = F.linear(hidden_SH, weight_VH).float()
        return F.cross_entropy(logits_SV, labels_S, reduction="none", ignore_index=IGNORED_LABEL)

    def chunked() -> torch.Tensor:
        return chunked_cross_entropy(hidden_SH, weight_VH, labels_S, chunk_tokens=args.chunk_tokens)

    with torch.no_grad():
        difference = (whole() - chunked()).abs().max().item()
    if difference > TOLERANCE[dtype]:
        raise RuntimeError(f"the sides differ: by {difference} in the loss of a token")

    def step(losses: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(losses().sum(), (hidden_SH, weight_VH))

    return {"whole logits": lambda _: step(whole), "chunked": lambda _: step(chunked)}


def main(args: argparse.Namespace) -> None:
    import torch
    from train_step import environment, ratio, take_turns

    from megamed import runtime

    torch.set_num_threads(args.threads)
    on_gpu = runtime.device_type() == "cuda"
    defaults = SIZES[runtime.device_type()]
    for name, default in zip(("tokens", "hidden", "vocab", "chunk_tokens"), defaults, strict=True):
        setattr(args, name, getattr(args, name) or default)
    dtype = args.dtype if args.dtype != "auto" else "bf16" if on_gpu else "fp32"
    print(environment())
    print(f"{args.tokens} tokens, hidden size {args.hidden}, {args.vocab} words, {dtype}, "
          f"chunks of {args.chunk_tokens or 'the default size'}; fp32 logits of the row: "
          f"{args.tokens * args.vocab * 4 / 2**20:.1f} MiB")
    for share in args.labelled:
        sides = steps(share, args, dtype)
        peaks = {name: peak_bytes(partial(step, 0)) for name, step in sides.items()}
        times = take_turns(sides, args.warmup, args.repetitions)
        # A GPU works while the CPU waits; on a CPU processor time does not count what else the machine does.
        seconds = {name: times[name].wall if on_gpu else times[name].cpu for name in sides}
        faster = "{:.2f} ({:.2f} to {:.2f})".format(*ratio(seconds["whole logits"], seconds["chunked"]))
        smaller = peaks["whole logits"] / peaks["chunked"]
        print(f"{share:.0%} labelled: chunked has {faster} times the speed, and 1/{smaller:.2f} of the peak memory")
        for name in sides:
            figures = f"{peaks[name] / 2**20:10.1f} MiB"
            if on_gpu:
                figures += f" {1e3 * statistics.median(seconds[name]):10.2f} ms"
            print(f"  {name:14s}{figures}")


if __name__ == "__main__":
    parsed = parse()  # before the imports, so that --help and a misspelt option answer at once
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    from megamed.runtime.process import run

    run(lambda: main(parsed))
