"""The formula counts what PyTorch's counter of floating-point operations sees a forward and a backward pass do.

That counter knows matrix products (`mm`, `addmm`, `bmm`) but not the fused attention kernel for CPUs, so products are
compared with it, and attention with a count of the pairs of query and key that see each other.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from reference import configs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from perceiver_ar import PerceiverAR, PerceiverARConfig
from perceiver_ar.costs import costs

SIZES = PerceiverARConfig(vocab_size=31, context_length=24, num_latents=6, dim=16, num_layers=2, num_heads=2)
PAPER = {"vocab_size": 31, "context_length": 24, "num_latents": 6, "dim": 16, "num_layers": 3, "num_heads": 4}
NAMED = {
    "default": SIZES,
    "paper": PerceiverARConfig.preset("paper", **PAPER),
    "several cross-attentions": SIZES.replace(cross_layers=(0, 0, 2)),
    "other heads across": SIZES.replace(cross_num_heads=3, cross_head_dim=5, head_dim=7, cross_mlp_ratio=1.5),
    "narrow embeddings": SIZES.replace(embed_dim=8, query_proj=True),
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
    cross = config.heads_cross * config.width_head_cross * (pairs(latents, context) - latents / 2)
    own = config.num_heads * config.width_head * (pairs(latents, latents) - latents / 2)
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
    config = NAMED[name]
    model, sizes = PerceiverAR(config).eval(), []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(output.numel() * output.element_size())

    for layer in model.cross_attention:
        layer.get_submodule("kv_proj").register_forward_hook(count)
    model(torch.zeros(1, config.context_length, dtype=torch.long))
    assert costs(config).context_bytes == sum(sizes)


def test_longer_contexts_cost_the_cross_attention_only() -> None:
    short, long = costs(SIZES, context=10_000, latents=6), costs(SIZES, context=20_000, latents=6)
    width, dim = 16, 16
    assert long.forward_flops - short.forward_flops == 10_000 * (4 * dim * width + 4 * 6 * width)
    assert long.context_bytes == 2 * short.context_bytes
