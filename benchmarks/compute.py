"""Few latents or many, for the same arithmetic? Networks of one size, after equally many FLOPs, on held-out text.

    make benchmark BENCH=compute ARGS="books/train.txt --validation books/validation.txt"

With as many latents as context, every token goes through all layers: a dense Transformer, here with the same code, as
its first layer then is the cross-attention over the latents alone. With fewer, a step's targets cost less, and each of
them has a longer context. Every step has `--targets` targets, and there are as many steps as `--flops` allow
(`perceiver_ar.costs`). Bits per byte are those of the same held-out bytes, with at most --context and at least
--context - 256 bytes before each. A seed is one of weights and of windows.
"""

import argparse
import tempfile
import time

import torch
from common import DEVICE, machine, train

from perceiver_ar import PerceiverAR, PerceiverARConfig
from perceiver_ar.config import DataConfig, OptimConfig
from perceiver_ar.costs import costs
from perceiver_ar.data.modalities import make_codec
from perceiver_ar.data.sampler import TrainingWindows
from perceiver_ar.data.sources import find_files, standard_library
from perceiver_ar.data.tokens import prepare
from perceiver_ar.evaluation import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="text to train on; none: Python's own source")
    parser.add_argument("--validation", nargs="*", help="text to measure on; none: a share of the files")
    parser.add_argument("--latents", default="512,2048,8192", help="numbers of latents, with commas between")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=7, help="self-attention layers, behind one of cross-attention")
    parser.add_argument("--flops", type=float, default=4e13, help="of the training")
    parser.add_argument("--targets", type=int, default=8192, help="of each step")
    parser.add_argument("--seeds", default="0", help="with commas between")
    parser.add_argument("--held_out", type=int, default=16384, help="bytes to score")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = find_files(args.paths) if args.paths else standard_library()
        codec = make_codec("text", DataConfig(), sources)
        unseen = find_files(args.validation) if args.validation else None
        training, held_out = prepare(sources, codec, folder, validation_sources=unseen, progress=False)
        assert held_out is not None
        print(
            f"{machine()}; dim {args.dim}, {args.depth} + 1 layers, context {args.context:,}, {args.flops:.1e} FLOPs\n"
        )
        print("| latents | FLOPs per target | steps | targets | seconds | bits per byte | seed |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for seed in map(int, args.seeds.split(",")):
            for latents in map(int, args.latents.split(",")):
                config = codec.fit(
                    PerceiverARConfig(
                        context_length=args.context,
                        num_latents=latents,
                        dim=args.dim,
                        num_layers=args.depth,
                        num_heads=args.dim // 64,
                    )
                )
                per_target = costs(config).training_flops / latents
                steps = round(args.flops / per_target / args.targets)
                torch.manual_seed(seed)
                model, windows = PerceiverAR(config).to(DEVICE), TrainingWindows(training, args.context, latents, seed)
                began = time.perf_counter()
                train(model, OptimConfig(), windows, steps, args.targets // latents, micro_batch=1)
                seconds = time.perf_counter() - began
                scored = evaluate(
                    model,
                    held_out.tokens,
                    stride=256,
                    first_target=args.context,
                    max_tokens=args.held_out,
                    byte_lengths=codec.byte_lengths(),
                    batch_size=1,
                )
                print(
                    f"| {latents:,} | {per_target / 1e6:.1f}M | {steps} | {steps * args.targets:,} | {seconds:.0f} | "
                    f"{scored.bits_per_byte:.3f} | {seed} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
