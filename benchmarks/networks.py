"""The networks of `quality.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_ar import PerceiverAR, PerceiverARConfig
from perceiver_ar.config import TrainerConfig


@dataclass(frozen=True)
class Size:
    dim: int
    layers: int
    """Self-attention layers behind one cross-attention layer; a dense network has one layer more instead."""
    heads: int


@dataclass(frozen=True)
class Network:
    build: Callable[[int, Size, int, int], nn.Module]
    """(vocabulary size, size, context length, number of latents) -> module."""
    predict: Callable[[Any, Tensor, int, Tensor | None], Tensor]
    """(module, tokens (B, T), number of latents N, mask (B, T)) -> logits of the last N positions (B, N, V). Only ours
    reads the mask. To the others padding is id 0; it is in the few windows that begin before the text."""
    short_prefix: float = 0.0
    """Share of the training steps with a shortened prefix, as in `TrainerConfig`."""
    shorter: bool = True
    """Whether it can read less than its context."""


def build_ours(vocab_size: int, size: Size, context: int, latents: int, **settings: Any) -> nn.Module:
    sizes = {"dim": size.dim, "num_layers": size.layers, "num_heads": size.heads}
    lengths = {"context_length": context, "num_latents": latents}
    return PerceiverAR(PerceiverARConfig(vocab_size=vocab_size, **sizes, **lengths, **settings))


def build_ours_plain(vocab_size: int, size: Size, context: int, latents: int) -> nn.Module:
    """Ours without local context."""
    return build_ours(vocab_size, size, context, latents, local_context=1)


def predict_ours(model: Any, tokens: Tensor, latents: int, mask: Tensor | None) -> Tensor:
    """As training does it: more latents than the network has are several blocks."""
    blocks = max(1, latents // model.config.num_latents)
    return model(tokens, tokens.shape[1] - latents, mask=mask, blocks=blocks)


def build_seed(vocab_size: int, size: Size, context: int, latents: int) -> nn.Module:
    """perceiver-ar-pytorch, with the prefix dropout of its train.py."""
    from perceiver_ar_pytorch import perceiver_ar_pytorch as package  # pyright: ignore[reportMissingImports]

    # Under bfloat16 autocast the package fills masks with float32's lowest value and fails; scores in float32 hold it.
    package.einsum = lambda *inputs: torch.einsum(*inputs).float()
    sizes = {"dim": size.dim, "depth": size.layers, "heads": size.heads, "dim_head": size.dim // size.heads}
    lengths = {"max_seq_len": context, "cross_attn_seq_len": context - latents}
    return package.PerceiverAR(num_tokens=vocab_size, cross_attn_dropout=0.5, **sizes, **lengths)


def predict_seed(model: Any, tokens: Tensor, latents: int, mask: Tensor | None) -> Tensor:
    return model(tokens.long())[:, -latents:]


def build_dense(vocab_size: int, size: Size, context: int, latents: int, attention: str = "sdpa") -> nn.Module:
    """Llama with as many weights as ours, and with our initial weights.

    Llama's own (standard deviation 0.02 everywhere) are made for AdamW.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]  # extra: bench

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.dim,
        intermediate_size=-(-size.dim * 8 // 3 // 32) * 32,  # three matrices with the weights of our two
        num_hidden_layers=size.layers + 1,
        num_attention_heads=size.heads,
        max_position_embeddings=context,
        use_cache=False,
    )
    config._attn_implementation = attention
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            nn.init.zeros_(weight)
        elif weight.ndim == 2:
            nn.init.normal_(weight, std=1.0 if "embed" in name else weight.shape[1] ** -0.5)
    return model


def predict_dense(model: Any, tokens: Tensor, latents: int, mask: Tensor | None) -> Tensor:
    return model(tokens.long(), logits_to_keep=latents).logits


def build_sliding(vocab_size: int, size: Size, context: int, latents: int) -> nn.Module:
    """Llama whose layers see an eighth of the context."""
    from transformers import AttentionInterface  # pyright: ignore[reportMissingImports]  # extra: bench

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **settings: Any) -> tuple[Tensor, None]:
        return sliding_attention(q, k, v, max(1, context // 8)).transpose(1, 2), None

    AttentionInterface.register("sliding", attend)
    return build_dense(vocab_size, size, context, latents, attention="sliding")


def sliding_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the last `window` keys of each query; all are (B, H, T, d).

    A block of `window` queries sees its own block and the one before, so time grows with T * window. transformers'
    own sliding window masks the whole square, whose time grows with T * T.
    """
    (B, _, T, _), W = q.shape, window
    blocks = -(-T // W)
    q, k, v = (F.pad(x, (0, 0, 0, blocks * W - T)).unflatten(2, (blocks, W)).transpose(1, 2) for x in (q, k, v))
    k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], dim=3) for x in (k, v))
    distance = torch.arange(W, 2 * W, device=q.device)[:, None] - torch.arange(2 * W, device=q.device)
    seen = ((distance >= 0) & (distance < W)).repeat(B, blocks, 1, 1, 1)
    seen[:, 0, ..., :W] = False  # no block comes before the first one
    q, k, v, seen = (x.flatten(0, 1) for x in (q, k, v, seen))  # only four dimensions have a fused kernel
    mixed = F.scaled_dot_product_attention(q, k, v, seen)
    return mixed.unflatten(0, (B, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T]


SHORT_PREFIX = TrainerConfig().short_prefix
OURS = Network(build_ours, predict_ours, SHORT_PREFIX)
OURS_PLAIN = Network(build_ours_plain, predict_ours, SHORT_PREFIX)
SEED = Network(build_seed, predict_seed, shorter=False)
DENSE = Network(build_dense, predict_dense)
SLIDING = Network(build_sliding, predict_dense)
