"""What a network costs, counted from its settings; no torch.

FLOPs count two per multiply-add of the matrix products, attention at its causal half among the latents; element-wise
work is left out. A training step is three forward passes' worth (each product has two in the backward pass).
"""

from dataclasses import dataclass

from perceiver_ar.config import PerceiverARConfig


@dataclass(frozen=True)
class Costs:
    """Of one window of `context` tokens with `latents` latents."""

    forward_flops: float
    """Operations of one forward pass."""
    training_flops: float
    """Operations of one forward and backward pass."""
    context_bytes: int
    """Float32 bytes of the cross-attention's keys and values."""


def costs(config: PerceiverARConfig, context: int | None = None, latents: int | None = None) -> Costs:
    """Costs of one window; by default of the whole context with all latents.

    forward = 2 N V D                                                     logits
            + per cross layer  2 (N D W + 2 T E W + N W D + 2 N D F) + 4 W (N P + N^2 / 2)
            + per self layer   2 (3 N D W + N W D + 2 N D F)         + 4 W (N^2 / 2)

    with T context, N latents, P = T - N, D dim, E embedding width, W heads times channels, F hidden, V vocabulary.
    """
    T = context or config.context_length
    N = min(latents or config.num_latents, T)
    D, E, P = config.dim, config.width_embed, T - N
    W = config.heads_cross * config.width_head_cross
    F = int((config.cross_mlp_ratio or config.mlp_ratio) * D)
    cross = 2 * (N * D * W + 2 * T * E * W + N * W * D + 2 * N * D * F) + 4 * W * (N * P + N * N / 2)
    layers = len(config.cross_layers)
    context_bytes = layers * 4 * 2 * T * W
    W, F = config.num_heads * config.width_head, int(config.mlp_ratio * D)
    own = 2 * (3 * N * D * W + N * W * D + 2 * N * D * F) + 4 * W * N * N / 2
    query = 2 * N * E * D if config.query_proj else 0
    forward = 2 * N * config.vocab_size * D + query + layers * cross + config.num_layers * own
    return Costs(forward_flops=forward, training_flops=3 * forward, context_bytes=context_bytes)
