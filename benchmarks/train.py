"""Forward and backward of a training step: ours through `compat.lucidrains` beside perceiver-ar-pytorch.

    make benchmark ARGS="--contexts 4096,16384 --repeats 5"

Same weights, same tokens; both run in one process, in turns, so that whatever else the machine does hits both. Prints
seconds (median, min, max) and the ratio of the medians as a Markdown table.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from perceiver_ar_pytorch import PerceiverAR as Theirs  # pyright: ignore[reportMissingImports]  # extra: bench

from perceiver_ar.compat.lucidrains import PerceiverAR as Ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="4096,16384", help="context lengths, with commas between")
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8, help="self-attention layers")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="ours under bfloat16 autocast; theirs stays float32")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {platform.machine()}, {where}, ours in {'bf16' if args.bf16 else 'float32'}\n")
    print("| context | perceiver-ar-pytorch, s | ours, s | ours / theirs |\n|---|---|---|---|")
    for context in map(int, args.contexts.split(",")):
        settings = {
            "num_tokens": 256,
            "dim": args.dim,
            "depth": args.depth,
            "heads": args.dim // 64,
            "max_seq_len": context,
            "cross_attn_seq_len": context - args.latents,
        }
        torch.manual_seed(0)
        theirs, ours = Theirs(**settings).to(device), Ours(**settings).to(device)
        ours.load_state_dict(theirs.state_dict())
        tokens = torch.randint(1, 256, (args.batch, context + 1), device=device)
        a, b = in_turns([partial(step, theirs, tokens, False), partial(step, ours, tokens, args.bf16)], args.repeats)
        ratio = statistics.median(b) / statistics.median(a)
        print(f"| {context:,} | {spread(a)} | {spread(b)} | {ratio:.2f} |", flush=True)


def step(model: torch.nn.Module, tokens: torch.Tensor, bf16: bool) -> None:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        loss = model(tokens[:, :-1], labels=tokens[:, 1:])
    loss.backward()
    model.zero_grad()
    if tokens.is_cuda:
        torch.cuda.synchronize()


def in_turns(calls: list[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Seconds of each call, `repeats` times in turns, after one unmeasured turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, measured in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                measured.append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} ... {max(seconds):.2f})"


if __name__ == "__main__":
    main()
