"""Forward and backward of a training step: ours beside perceiver-ar-pytorch and a dense Transformer.

    make benchmark ARGS="--contexts 4096,16384,65536 --repeats 3"

Ours runs through `compat.lucidrains` with the package's weights and tokens; the dense Transformer (Llama, fused
attention) has as many layers of the same width. All run in one process, in turns, so that whatever else the machine
does hits all. Seconds are the median (min ... max). FLOPs are those of `perceiver_ar.costs` (and of
`common.dense_training_flops`), the peak is that of a square matrix product in the same type, measured before.
Targets are predictions trained per second: one per latent, and for the dense Transformer one per token.
"""

import argparse
import statistics
from functools import partial

import torch
from common import (
    DEVICE,
    dense_training_flops,
    in_turns,
    machine,
    make_dense,
    make_ours,
    make_theirs,
    product_peak,
    settings,
    spread,
    training_step,
)

from perceiver_ar.costs import costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="4096,16384,65536", help="context lengths, with commas between")
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8, help="self-attention layers")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="the package and ours under torch.compile, too")
    parser.add_argument("--dense_up_to", type=int, default=8192, help="longest context for the dense Transformer")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's default otherwise")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    peaks = {bf16: product_peak(torch.bfloat16 if bf16 else torch.float32) for bf16 in (False, True)}
    print(
        f"{machine()}; products: {peaks[False] / 1e9:,.0f} GFLOP/s in float32, {peaks[True] / 1e9:,.0f} in bfloat16\n"
    )
    print("| context | what | seconds | of the package's | targets/s | of the peak |\n|---|---|---|---|---|---|")
    for context in map(int, args.contexts.split(",")):
        sizes = settings(context, args.latents, args.dim, args.depth)
        theirs, ours = make_theirs(sizes), make_ours(sizes)
        ours.load_state_dict(theirs.state_dict())
        tokens = torch.randint(1, 256, (args.batch, context + 1), device=DEVICE)
        flops = args.batch * costs(ours.model.config).training_flops
        contenders = [
            ("perceiver-ar-pytorch", theirs, False),
            ("ours", ours, False),
            ("ours, bf16 autocast", ours, True),
        ]
        if DEVICE == "cuda":
            contenders.insert(1, ("perceiver-ar-pytorch, bf16 autocast", theirs, True))
        if args.compiled:
            for name, model, bf16 in list(contenders):
                contenders.append((f"{name}, compiled", torch.compile(model), bf16))
        rows = [
            (name, training_step(partial(model, tokens[:, :-1], labels=tokens[:, 1:]), model, bf16), bf16, flops)
            for name, model, bf16 in contenders
        ]
        if context <= args.dense_up_to:
            dense = make_dense(context, args.dim, args.depth)

            def loss(dense: torch.nn.Module = dense, tokens: torch.Tensor = tokens) -> torch.Tensor:
                return dense(tokens[:, :-1], labels=tokens[:, :-1]).loss

            flops = args.batch * dense_training_flops(context, args.dim, args.depth)
            rows += [("dense Transformer", training_step(loss, dense, False), False, flops)]
        measured = in_turns([step for _, step, _, _ in rows], args.repeats)
        theirs_median = statistics.median(measured[0])
        for (name, _, bf16, flops), seconds in zip(rows, measured, strict=True):
            median = statistics.median(seconds)
            targets = args.batch * (context if name.startswith("dense") else args.latents) / median
            figures = f"{median / theirs_median:.2f} | {targets:,.0f} | {flops / median / peaks[bf16]:.0%}"
            print(f"| {context:,} | {name} | {spread(seconds)} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
