"""Costs of a network, computed from its settings, without torch.

FLOPs count two per multiply-add of the matrix products, attention at its causal half among the latents; element-wise
work is left out. A training step is three forward passes' worth (each product has two in the backward pass).
"""

from dataclasses import dataclass

from perceiver_ar.config import PerceiverARConfig, Recipe


@dataclass(frozen=True)
class Costs:
    """Costs of one window of `context` tokens with `latents` latents."""

    forward_flops: float
    """Operations of one forward pass."""
    training_flops: float
    """Operations of one forward and backward pass."""
    context_bytes: int
    """Float32 bytes of the cross-attention's keys and values."""


def costs(config: PerceiverARConfig, context: int | None = None, latents: int | None = None, blocks: int = 1) -> Costs:
    """Costs of one window alone; by default of the whole context with all latents.

    forward = 2 N V D                                                     logits
            + per cross layer  2 (2 N D W + 2 N D F) + 4 R E W + 4 W (N P + N^2 / 2)
            + per self layer   2 (3 N D W + N W D + 2 N D F)   + 4 W (N^2 / 2) / blocks

    with T context, N latents, P = T - N, D dim, E embedding width, W heads times channels, F hidden, V vocabulary, and
    R = T embeddings that are projected. With local context R = T + 2, because the one before the prefix and the one
    before the latents are, too; with position tables as well, R = 2 T (see `inputs.mix_local_context`). K latents per
    position are K rows of the batch; only the logits are computed once.
    """
    T = context or config.context_length
    N = min(latents or config.num_latents, T)
    D, E, P = config.dim, config.width_embed, T - N
    W = config.heads_cross * config.width_head_cross
    F = int((config.cross_mlp_ratio or config.mlp_ratio) * D)
    K = config.latents_per_position
    R = T if config.local_context == 1 else 2 * T if config.table_sizes else T + 2
    cross = 2 * (2 * N * D * W + 2 * N * D * F) + 4 * R * E * W + 4 * W * (N * P + N * N / 2)
    layers = len(config.cross_layers)
    context_bytes = layers * 4 * 2 * T * W
    W, F = config.num_heads * config.width_head, int(config.mlp_ratio * D)
    own = 2 * (3 * N * D * W + N * W * D + 2 * N * D * F) + 4 * W * N * N / 2 / blocks
    own += 4 * W * N * N / 2 * (K - 1)  # each latent sees all of its position
    query = (2 * N * E * D if config.query_proj else 0) + config.query_mlp_layers * 2 * N * D * D
    forward = 2 * N * config.vocab_size * D + K * (query + layers * cross + config.num_layers * own)
    return Costs(forward_flops=forward, training_flops=3 * forward, context_bytes=K * context_bytes)


def step_flops(recipe: Recipe, prefix_is_cut: bool = True) -> float:
    """Mean operations of a training step over a run, with `trainer.short_prefix` and `prefix_growth`, which cut
    prefixes unless a window is a picture, and with prefix dropout."""
    config, N = recipe.model, recipe.window_latents
    short, growth = recipe.trainer.short_prefix, recipe.trainer.prefix_growth

    def window(quarters: int) -> float:
        left = quarters * (config.context_length - N) / 4 * (1 - config.prefix_dropout)
        return costs(config, N + round(left), N, recipe.blocks).training_flops

    def mean(most: int) -> float:
        """Over the steps in which prefixes have at most so many quarters."""
        return (1 - short) * window(most) + short * sum(window(min(q, most)) for q in range(4)) / 4

    grown = mean(4) if growth == 0 else (1 - growth) * mean(4) + growth * sum(map(mean, range(5))) / 5
    return recipe.trainer.batch_size * (grown if prefix_is_cut else window(4))


def training_bytes(
    recipe: Recipe, parameters: int, windows: int | None = None, prefix_chunk: int | None = None
) -> float:
    """Estimated maximum of bytes that training takes on a device, with `windows` per forward; None: the recipe's.

    `prefix_chunk`: tokens of the prefix in a piece, 0: all; None: as in the model's settings, or all if left open.

        weights, their gradients, Muon's one moment or Adam's two, the mean of the weights, DDP's buckets;
        under FSDP a share of each
      + per window  3 N V                                                        logits and their gradients
                  + per cross layer  N (4 D + 7 W + 2 E + 2 F) + P (2 E + 5 W)   kept for the backward pass
                  + with local context  P (E + W) more of these, 3 times as much with position tables and 5 times
                                     with prefix dropout, whose embeddings share no rows (`inputs.mix_local_context`)
                  + per self layer   N (4 D + 7 W + 2 F)

    floats, with the letters of `costs`. But P is the prefix that is left by prefix dropout, a device's share of it, or
    one piece. Keys and values of the prefix keep 3 W; 2 W are their gradients, when little else is left. With
    activation checkpointing a layer keeps its input, and one layer at a time keeps everything. Under autocast a float
    takes 2.3 bytes instead of 4, the mean of those kept in two and in four, and a copy of the weights takes two. K
    latents per position keep K times as much, except for the logits.

    This is allocated memory. On a CPU the C library's allocator may hold half as much again (docs/log.md).
    """
    config = recipe.model
    B, K = recipe.trainer.micro_batch if windows is None else windows, config.latents_per_position
    N, D, E = recipe.window_latents, config.dim, config.width_embed
    P = (config.context_length - N) * (1 - config.prefix_dropout) / recipe.trainer.prefix_ranks
    P = min(P, (config.prefix_chunk if prefix_chunk is None else prefix_chunk) or P)
    W, F = config.heads_cross * config.width_head_cross, int((config.cross_mlp_ratio or config.mlp_ratio) * D)
    cross = N * (4 * D + 7 * W + 2 * E + 2 * F) + P * (2 * E + 5 * W)
    if config.local_context > 1:
        cross += P * (E + W) * (5 if config.prefix_dropout else 3 if config.table_sizes else 1)
    W, F = config.num_heads * config.width_head, int(config.mlp_ratio * D)
    own = N * (4 * D + 7 * W + 2 * F)
    layers = [cross] * len(config.cross_layers) + [own] * config.num_layers
    kept = sum(layers)
    if recipe.trainer.activation_checkpointing:
        kept = N * D * len(layers) + max(layers, default=0)
    half = recipe.trainer.precision in ("bf16", "fp16")
    moments = 1.1 if recipe.optim.name == "muon" else 2
    states = 2 + moments + (recipe.optim.ema > 0) + half / 2
    if recipe.trainer.devices > 1:
        states = states / recipe.trainer.devices if recipe.trainer.sharded else states + 1
    return 4 * states * parameters + B * (K * (2.3 if half else 4) * kept + 4 * 3 * N * config.vocab_size)
