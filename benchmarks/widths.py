"""Does a learning rate that is best for a narrow network suit a wide one? Short trainings at several of each.

    make benchmark BENCH=widths ARGS="--dims 128,256,512 --factors 0.25,0.5,1,2,4"

Trains on Python's own source, byte by byte, with few layers and short contexts, and prints held-out bits per byte. A
factor multiplies the default learning rates: of Muon and AdamW, or of one of them. In each row the best is bold: the
default transfers where it is in the same column, or costs little there.
"""

import argparse
import math
import tempfile
import time
from dataclasses import replace

import torch
from common import DEVICE, loss, machine, train

from perceiver_ar import PerceiverAR, PerceiverARConfig
from perceiver_ar.config import DataConfig, OptimConfig
from perceiver_ar.data.modalities import make_codec
from perceiver_ar.data.sampler import TrainingWindows
from perceiver_ar.data.sources import standard_library
from perceiver_ar.data.tokens import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default="128,256,512", help="widths, with commas between")
    parser.add_argument("--factors", default="0.25,0.5,1,2,4", help="of the default learning rates")
    parser.add_argument("--part", choices=["both", "muon", "adamw"], default="both", help="whose rate is multiplied")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    factors = [float(factor) for factor in args.factors.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        sources = standard_library()
        codec = make_codec("text", DataConfig(), sources)
        train, held_out = prepare(sources, codec, folder, seed=args.seed, progress=False)
        assert held_out is not None
        print(f"{machine()}; {args.steps} steps, factors of the learning rate of {args.part}\n")
        print(f"| dim | {' | '.join(args.factors.split(','))} |\n|{'---|' * (len(factors) + 1)}", flush=True)
        for dim in map(int, args.dims.split(",")):
            config = codec.fit(
                PerceiverARConfig(context_length=256, num_latents=64, dim=dim, num_layers=2, num_heads=dim // 64)
            )
            windows, unseen = (TrainingWindows(tokens, 256, 64, args.seed) for tokens in (train, held_out))
            began = time.perf_counter()
            bits = [train_once(config, rule(factor, args.part), windows, unseen, args) for factor in factors]
            cells = [f"**{value:.3f}**" if value == min(bits) else f"{value:.3f}" for value in bits]
            print(f"| {dim} | {' | '.join(cells)} | {time.perf_counter() - began:.0f} s", flush=True)


def rule(factor: float, part: str) -> OptimConfig:
    default = OptimConfig()
    muon, adamw = (factor if part in ("both", name) else 1.0 for name in ("muon", "adamw"))
    return replace(default, muon_lr=muon * default.muon_lr, lr=adamw * default.adamw_lr)


def train_once(
    config: PerceiverARConfig,
    rule: OptimConfig,
    windows: TrainingWindows,
    unseen: TrainingWindows,
    args: argparse.Namespace,
) -> float:
    """Bits per byte on 256 held-out windows, after training."""
    torch.manual_seed(args.seed)
    model = PerceiverAR(config).to(DEVICE)
    train(model, rule, windows, args.steps, 8)
    with torch.no_grad():
        losses = [loss(model.eval(), unseen.batch(first, 64)).item() for first in range(0, 256, 64)]
    return sum(losses) / len(losses) / math.log(2)


if __name__ == "__main__":
    main()
