"""Initial weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

QUERY_GAIN = 2.5
"""Initial value of the learned factor on the scores of each cross-attention head."""


def init_weights(model: Any) -> None:
    """Draws the initial weights of a `PerceiverAR` as `config.init` says; biases are zero except with "torch"."""
    config = model.config
    for name, module in model.named_modules():
        if config.init == "torch" or not isinstance(module, nn.Embedding | nn.Linear):
            continue
        std = 1 / math.sqrt(module.in_features) if isinstance(module, nn.Linear) else 1.0
        if config.init == "normal" or name in ("query_embed", "latent_embed"):
            nn.init.normal_(module.weight, std=0.02)
        elif config.init == "fan_in":
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif name.endswith(("out_proj", "down_proj")):
            nn.init.zeros_(module.weight)
        else:
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if model.local_conv is not None:
        # Queries and keys start as the same map, so a latent attends to similar tokens from the first step on. Half of
        # a key is the token before, so the latent finds copies of its local context; their values tell what followed.
        # All tokens before a token count equally there: four bases are copied by chance too often to tell places apart.
        model.local_conv.data.normal_().sign_().mul_(0.5)
        for layer in model.cross_attention:
            if layer.q_proj.in_features == layer.kv_proj.in_features:
                layer.kv_proj.weight.data[: layer.q_proj.out_features] = layer.q_proj.weight
    if config.init in ("fan_in", "zero_out"):
        if config.tie_embeddings:  # the embedding is the head, and normalised latents have length sqrt(dim)
            nn.init.normal_(model.embed.weight, std=1 / math.sqrt(config.dim))
        else:
            nn.init.zeros_(model.head.weight)
    if model.local_conv is not None and config.vocab_size > 1:  # ids of a small vocabulary, too, have nothing in common
        model.embed.weight.data -= model.embed.weight.mean(0)
    if config.position_table == "sinusoidal":
        for rows, table in zip(config.table_sizes, model.position_embed, strict=True):
            table.weight = nn.Parameter(sinusoids(rows, config.width_embed), requires_grad=False)


def sinusoids(rows: int, dim: int) -> Tensor:
    """(rows, dim): row p is [sin(p w_j), cos(p w_j)] with w_j = 10000^(-j / (dim/2 - 1)), as in google's release."""
    half = dim // 2
    w = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / max(half - 1, 1))
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * w
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
