"""The formula counts what PyTorch's counter of floating-point operations sees a forward and a backward pass do.

That counter knows matrix products (`mm`, `addmm`, `bmm`) but not the fused attention kernel for CPUs, so products are
compared with it, and attention with a count of the pairs of query and key that see each other.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from reference import configs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from perceiver_ar import PerceiverAR, PerceiverARConfig, Recipe, TrainerConfig
from perceiver_ar.costs import costs, step_flops, training_bytes
from perceiver_ar.data.sampler import TrainingWindows
from perceiver_ar.training.batches import Batches

SIZES = PerceiverARConfig(vocab_size=31, context_length=24, num_latents=6, dim=16, num_layers=2, num_heads=2)
PAPER = {"vocab_size": 31, "context_length": 24, "num_latents": 6, "dim": 16, "num_layers": 3, "num_heads": 4}
NAMED = {
    "default": SIZES,
    "no local context": SIZES.replace(local_context=1),
    "position tables": SIZES.replace(position_table="learned"),
    "paper": PerceiverARConfig.preset("paper", **PAPER),
    "several cross-attentions": SIZES.replace(cross_layers=(0, 0, 2)),
    "other heads across": SIZES.replace(cross_num_heads=3, cross_head_dim=5, head_dim=7, cross_mlp_ratio=1.5),
    "narrow embeddings": SIZES.replace(embed_dim=8, query_proj=True),
    "query MLP": SIZES.replace(query_proj=True, query_mlp_layers=2),
    "learned queries": SIZES.replace(learned_queries="each"),
    "latents per position": SIZES.replace(latents_per_position=3, query_proj=True),
    "tied": SIZES.replace(tie_embeddings=True),
    "no layers": SIZES.replace(num_layers=0, cross_layers=()),
    "all latents": SIZES.replace(num_latents=24),
}  # fmt: skip


def products(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    counts = {str(operator): count for operator, count in counter.get_flop_counts().get("Global", {}).items()}
    return sum(counts.get(f"aten.{name}", 0) for name in ("mm", "addmm", "bmm", "baddbmm"))


def pairs(queries: int, keys: int) -> int:
    """How many pairs of query and key see each other: the queries are the last ones of the positions of the keys."""
    return sum(1 for r in range(queries) for k in range(keys) if k <= keys - queries + r)


def attention(config: PerceiverARConfig, context: int, latents: int) -> float:
    """Of one forward: two products of C multiply-adds for each pair of each head; half of it on the diagonal."""
    K = config.latents_per_position
    cross = K * config.heads_cross * config.width_head_cross * (pairs(latents, context) - latents / 2)
    own = K * K * config.num_heads * config.width_head * (pairs(latents, latents) - latents / 2)
    return 4 * (len(config.cross_layers) * cross + config.num_layers * own)


def assert_counted(config: PerceiverARConfig, context: int, latents: int) -> None:
    model, tokens = PerceiverAR(config).eval(), torch.zeros(1, context, dtype=torch.long)
    with torch.no_grad():
        seen = products(lambda: model(tokens, context - latents))
    assert costs(config, context, latents).forward_flops == pytest.approx(seen + attention(config, context, latents))


@pytest.mark.parametrize("name", NAMED)
def test_forward_counts_are_the_counters(name: str) -> None:
    config = NAMED[name]
    assert_counted(config, config.context_length, config.num_latents)
    assert costs(config) == costs(config, config.context_length, config.num_latents)


@settings(max_examples=25)
@given(config=configs(prefix_chunk=0))
def test_forward_counts_are_the_counters_for_any_network(config: PerceiverARConfig) -> None:
    assert_counted(config, config.context_length, config.num_latents)


@pytest.mark.parametrize(("context", "latents"), [(24, 3), (10, 6), (1, 1)])
def test_other_windows_are_counted_as_such(context: int, latents: int) -> None:
    assert_counted(SIZES, context, latents)


def test_there_are_never_more_latents_than_context() -> None:
    assert costs(SIZES, context=4) == costs(SIZES, context=4, latents=4)


@pytest.mark.parametrize("name", ["default", "several cross-attentions", "narrow embeddings"])
def test_a_backward_pass_has_two_products_for_each_of_the_forward(name: str) -> None:
    config = NAMED[name]
    model, tokens = PerceiverAR(config), torch.zeros(1, config.context_length, dtype=torch.long)
    forward = products(lambda: model(tokens))
    assert products(lambda: model(tokens).sum().backward()) == 3 * forward
    assert costs(config).training_flops == 3 * costs(config).forward_flops


@pytest.mark.parametrize("name", NAMED)
def test_context_bytes_are_those_of_the_keys_and_values(name: str) -> None:
    config = NAMED[name].replace(local_context=1)  # with more, some projections are of tokens before
    model, sizes = PerceiverAR(config).eval(), []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(output.numel() * output.element_size())

    for layer in model.cross_attention:
        layer.get_submodule("kv_proj").register_forward_hook(count)
    model(torch.zeros(1, config.context_length, dtype=torch.long))
    assert costs(config).context_bytes == costs(NAMED[name]).context_bytes == sum(sizes)


def test_blocks_cost_what_they_cost_together_but_for_attention_to_other_blocks() -> None:
    one, four = (costs(SIZES, context=100, latents=40, blocks=blocks) for blocks in (1, 4))
    width = SIZES.num_heads * SIZES.width_head
    assert one.forward_flops - four.forward_flops == SIZES.num_layers * 4 * width * 40 * 40 / 2 * (1 - 1 / 4)


def test_longer_contexts_cost_the_cross_attention_only() -> None:
    width, dim = 16, 16
    for config, projection in ((SIZES, 4 * dim * width), (SIZES.replace(position_table="learned"), 8 * dim * width)):
        short, long = costs(config, context=10_000, latents=6), costs(config, context=20_000, latents=6)
        assert long.forward_flops - short.forward_flops == 10_000 * (projection + 4 * 6 * width)
        assert long.context_bytes == 2 * short.context_bytes


@pytest.mark.parametrize("options", [{}, {"short_prefix": 1.0}, {"short_prefix": 0.0, "prefix_growth": 0.5}])
def test_a_step_costs_what_the_prefixes_of_training_cost(options: Any) -> None:
    recipe = Recipe(out="x", model=SIZES.replace(context_length=100), trainer=TrainerConfig(**options))
    N, steps = recipe.window_latents, 1000
    batches = Batches(TrainingWindows(np.arange(1000) % 31, 100, N, 0), recipe)
    lengths = [100 - batches.cut(i, (i + 0.5) / steps) for i in range(steps)]
    seen = sum(costs(recipe.model, length, N, recipe.blocks).training_flops for length in lengths) / steps
    assert step_flops(recipe) == pytest.approx(recipe.trainer.batch_size * seen, rel=0.02)
    uncut = costs(recipe.model, latents=N, blocks=recipe.blocks).training_flops
    assert step_flops(recipe, prefix_is_cut=False) == recipe.trainer.batch_size * uncut


# Memory.


def test_latents_per_position_keep_as_much_as_so_many_windows_but_for_the_logits() -> None:
    model, trainer = SIZES.replace(vocab_size=999), TrainerConfig(blocks=1)
    recipes = [Recipe(out="x", model=model.replace(latents_per_position=K), trainer=trainer) for K in (1, 3)]
    (one, one_more), (three, three_more) = ([training_bytes(recipe, 0, B) for B in (1, 2)] for recipe in recipes)
    logits = 4 * 3 * SIZES.num_latents * 999
    assert one_more - one > logits
    assert three_more - three == pytest.approx(3 * (one_more - one - logits) + logits)


PEAK = """
import json, sys, torch
from perceiver_ar import PerceiverAR, PerceiverARConfig, next_token_loss
from perceiver_ar.config import OptimConfig
from perceiver_ar.optim import make_optimizer

def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

def train(config, windows, bf16, checkpointing, blocks):
    model = PerceiverAR(config)
    model.activation_checkpointing = checkpointing
    optimizer = make_optimizer(model, OptimConfig())
    tokens = torch.randint(config.vocab_size, (windows, config.context_length + 1))
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            latents = blocks * config.num_latents
            logits = model(tokens[:, :-1], config.context_length - latents, blocks=blocks)
            loss = next_token_loss(logits, tokens[:, -latents:])
        loss.backward()
        optimizer.step()
    return model.num_parameters()

train(PerceiverARConfig(context_length=32, num_latents=8, dim=32, num_layers=1, num_heads=2), 1, False, False, 1)
before = peak()
settings, *how = json.loads(sys.argv[1])
print(train(PerceiverARConfig(**settings), *how), peak() - before)
"""
SIZED = {
    "many layers": ({"context_length": 512, "num_latents": 256, "dim": 256, "num_layers": 6}, 6, "32", False),
    "long prefix": ({"context_length": 8192, "num_latents": 128, "dim": 128, "num_layers": 2}, 6, "32", False),
    "streamed prefix": (
        {"context_length": 8192, "num_latents": 512, "dim": 128, "num_layers": 4, "prefix_chunk": 512}, 6, "32", False
    ),
    "bfloat16": ({"context_length": 2048, "num_latents": 256, "dim": 256, "num_layers": 4}, 6, "bf16", False),
    "recomputed": ({"context_length": 2048, "num_latents": 512, "dim": 256, "num_layers": 4}, 6, "32", True),
    "position tables": (
        {"context_length": 4096, "num_latents": 128, "dim": 128, "num_layers": 2, "position_table": "learned"}, 6, "32",
        False,
    ),
    "prefix dropout": (
        {"context_length": 8192, "num_latents": 128, "dim": 128, "num_layers": 2, "prefix_dropout": 0.5}, 6, "32", False
    ),
    "no local context": (
        {"context_length": 8192, "num_latents": 128, "dim": 128, "num_layers": 2, "local_context": 1}, 6, "32", False
    ),
    "blocks": (
        {"context_length": 2048, "num_latents": 128, "dim": 256, "num_layers": 4}, 2, "32", False, 4
    ),
    "many parameters": ({"context_length": 256, "num_latents": 128, "dim": 512, "num_layers": 8}, 1, "32", False),
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if i != 1 else name
                                  for i, name in enumerate(SIZED)])  # fmt: skip
def test_the_memory_of_training_is_estimated_within_a_fifth(name: str) -> None:
    sizes, windows, precision, checkpointing, *more = SIZED[name]
    blocks = more[0] if more else 1
    settings: dict[str, Any] = {"prefix_chunk": 0, "num_heads": 4, **sizes}
    trainer: Any = {"batch_size": windows, "precision": precision, "activation_checkpointing": checkpointing}
    trainer["blocks"] = blocks
    recipe = Recipe(out="x", model=PerceiverARConfig(**settings), trainer=TrainerConfig(**trainer))
    # Small blocks are given back at once, so that what the process holds is what torch has allocated.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    argument = json.dumps([settings, windows, precision == "bf16", checkpointing, blocks])
    result = subprocess.run([sys.executable, "-c", PEAK, argument], capture_output=True, text=True, env=environment)
    parameters, seen = map(int, result.stdout.split())
    assert training_bytes(recipe, parameters) == pytest.approx(seen, rel=0.2)
