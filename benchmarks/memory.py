"""Peak memory of a training step against the context length: ours beside perceiver-ar-pytorch and a dense Transformer.

    make benchmark BENCH=memory ARGS="--contexts 65536,131072,1048576,4194304"

Every measurement is a process of its own: batch 1, float32, forward and backward twice (once from a million tokens
on). "Above the model" is the peak less what the process held with the model, its gradients and the tokens before the
first step. Tokens are uint8, one byte each. Ours is the lucidrains preset up to --learned_up_to (its position table
grows with the context), and the same with rotary positions only beyond. Seconds are those of the last step.

With --generate, of generation after prompts that fill the context but for 32 tokens, which are drawn: our default
network, not compiled.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
from common import DEVICE, machine, make_dense, make_theirs, settings
from torch import Tensor, nn

from perceiver_ar import PerceiverAR, PerceiverARConfig, next_token_loss, stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="4096,16384,65536,131072,1048576,4194304")
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8, help="self-attention layers")
    parser.add_argument("--learned_up_to", type=int, default=131072, help="longest context with a position table")
    parser.add_argument("--theirs_up_to", type=int, default=131072)
    parser.add_argument("--dense_up_to", type=int, default=8192)
    parser.add_argument("--generate", action="store_true", help="of generation instead of training")
    parser.add_argument("--prefix_chunk", type=int, help="of ours; automatic otherwise")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's default otherwise")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.worker:
        measured = (measure_generation if args.generate else measure)(args.worker, int(args.contexts), args)
        print(json.dumps(measured))
        return
    print(f"{machine()}\n")
    times = "to the first token, s | of a step, ms" if args.generate else "seconds | microseconds per token of context"
    print(f"| context | what | peak, GB | above the model, GB | {times} |")
    print("|---|---|---|---|---|---|", flush=True)
    for context in map(int, args.contexts.split(",")):
        limits = {"perceiver-ar-pytorch": args.theirs_up_to, "dense Transformer": args.dense_up_to}
        limits["ours, learned positions"], limits["ours, rotary positions"] = args.learned_up_to, 1 << 62
        if args.generate:
            limits = {"ours": 1 << 62}
        for what, limit in limits.items():
            if context > limit:
                continue
            command = [sys.executable, *sys.argv, "--worker", what, "--contexts", str(context)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                print(
                    f"| {context:,} | {what} | failed: {run.stderr.strip().splitlines()[-1][:100]} | | | |", flush=True
                )
                continue
            peak, above, seconds, other = json.loads(run.stdout.splitlines()[-1])
            print(f"| {context:,} | {what} | {peak:.2f} | {above:.2f} | {seconds:.2f} | {other:.1f} |", flush=True)


def measure_generation(what: str, context: int, args: argparse.Namespace) -> tuple[float, float, float, float]:
    """Peak and what of it is above the model, in GB, seconds to the first token and milliseconds of a step."""
    sizes = {"context_length": context, "num_latents": args.latents, "dim": args.dim, "num_layers": args.depth}
    config = PerceiverARConfig(vocab_size=256, num_heads=args.dim // 64, prefix_chunk=args.prefix_chunk, **sizes)
    model, tokens = PerceiverAR(config).to(DEVICE).eval(), torch.randint(256, (1, context - 32))
    before, clock = peak_bytes(), [time.perf_counter()]
    for step in stream(model, tokens, max_new_tokens=32, temperature=0.0):
        step.tokens.tolist()
        clock.append(time.perf_counter())
    first, *others = (b - a for a, b in pairwise(clock))
    return peak_bytes() / 1e9, (peak_bytes() - before) / 1e9, first, 1000 * median(others)


def measure(what: str, context: int, args: argparse.Namespace) -> tuple[float, float, float, float]:
    """Peak and what of it is above the model, in GB, seconds of a step and microseconds of it for each token."""
    sizes = settings(context, args.latents, args.dim, args.depth)
    tokens = torch.randint(1, 256, (1, context + 1), dtype=torch.uint8)
    N = args.latents
    labels = tokens[:, -N:].long().to(DEVICE)
    if what == "perceiver-ar-pytorch":
        model = make_theirs(sizes)
        ids = tokens.long().to(DEVICE)

        def loss() -> Tensor:
            return model(ids[:, :-1], labels=ids[:, 1:])
    elif what == "dense Transformer":
        model = make_dense(context, args.dim, args.depth)
        ids = tokens.long().to(DEVICE)

        def loss() -> Tensor:
            return model(ids[:, :-1], labels=ids[:, :-1]).loss
    else:
        rotary_only = {"position_table": "none"} if "rotary" in what else {}
        model = PerceiverAR(
            PerceiverARConfig.preset(
                "lucidrains",
                context_length=context,
                num_latents=N,
                dim=args.dim,
                num_layers=args.depth,
                num_heads=args.dim // 64,
                prefix_chunk=args.prefix_chunk,
                **rotary_only,
            )
        ).to(DEVICE)

        def loss() -> Tensor:
            return next_token_loss(model(tokens[:, :-1], context - N), labels)

    peak, above, seconds = measure_steps(model, loss, 1 if context >= 1 << 20 else 2)
    return peak, above, seconds, 1e6 * seconds / context


def measure_steps(model: nn.Module, loss: Callable[[], Tensor], steps: int) -> tuple[float, float, float]:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before, seconds = peak_bytes(), 0.0
    for _ in range(steps):
        start = time.perf_counter()
        loss().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return peak_bytes() / 1e9, (peak_bytes() - before) / 1e9, seconds


def peak_bytes() -> float:
    """Most memory so far: of the process, or allocated on the GPU."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux


if __name__ == "__main__":
    main()
