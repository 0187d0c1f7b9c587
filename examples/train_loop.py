"""Perceiver AR in plain PyTorch: train on one file's bytes, measure on its end, generate.

    python examples/train_loop.py [FILE] [SECONDS]

Without a file it reads Python's own argparse. For real runs there is `perceiver-ar train`.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from perceiver_ar import PerceiverAR, PerceiverARConfig, generate, next_token_loss
from perceiver_ar.config import OptimConfig
from perceiver_ar.optim import lr_factor, make_optimizer

file = sys.argv[1] if len(sys.argv) > 1 else argparse.__file__
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 30.0

data = torch.tensor(list(Path(file).read_bytes()))
train, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]

config = PerceiverARConfig(vocab_size=256, context_length=1024, num_latents=256, dim=128, num_layers=3, num_heads=2)
torch.manual_seed(0)
model = PerceiverAR(config)
rule = OptimConfig()
optimizer = make_optimizer(model, rule)
T, N = config.context_length, config.num_latents


def batch(source: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows: tokens (size, T), and the next token of each of the last N positions (size, N)."""
    starts = torch.randint(len(source) - T, (size,))
    windows = torch.stack([source[s : s + T + 1] for s in starts])
    return windows[:, :-1], windows[:, -N:]


start = time.time()
while (progress := (time.time() - start) / seconds) < 1:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_factor(rule, progress)
    tokens, labels = batch(train, 4)
    loss = next_token_loss(model(tokens, prefix_len=T - N), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"\r{progress:4.0%}  {loss.item() / math.log(2):.3f} bits per byte", end="", file=sys.stderr)

model.eval()
with torch.no_grad():
    tokens, labels = batch(held_out, 16)
    loss = next_token_loss(model(tokens, prefix_len=T - N), labels)
print(f"\nheld out: {loss.item() / math.log(2):.3f} bits per byte", file=sys.stderr)
new = generate(model, train[:100][None], max_new_tokens=200, temperature=0.8, seed=0)
print(bytes(new[0].tolist()).decode(errors="replace"))
