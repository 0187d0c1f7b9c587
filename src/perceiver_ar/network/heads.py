"""Queries, keys and values as heads: split, normalised, and rotated by their positions (RoPE, arXiv 2104.09864).

Shapes: B batch, K length, H heads, C channels per head, R rotated channels.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.network.autocast import without_autocast

Rotary = tuple[Tensor, Tensor]
"""Cosines and signed sines, each broadcastable to (B, H, K, R)."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, K, H * C) -> (B, H, K, C)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, K, C) -> (B, K, H * C)"""
    return x.transpose(1, 2).flatten(2)


def split_blocks(x: Tensor, blocks: int) -> Tensor:
    """(B, H, blocks * N, C) -> (B * blocks, H, N, C)"""
    return x.unflatten(2, (blocks, -1)).transpose(1, 2).flatten(0, 1)


def merge_blocks(x: Tensor, blocks: int) -> Tensor:
    """(B * blocks, H, N, C) -> (B, H, blocks * N, C)"""
    return x.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)


def split_queries_keys_values(
    qkv: Tensor, rotary: Rotary | None, config: PerceiverARConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused projection (B, K, 3 * H * C) -> queries and keys, rotated, and values, each (B, H, K, C)."""
    qkv = qkv.unflatten(-1, (3, config.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if torch.compiler.is_compiling():  # Inductor cannot order the strides of both if K is a difference of lengths
        q, k, v = qkv.unbind()
        return normalize_and_rotate(q, rotary, config), normalize_and_rotate(k, rotary, config), v
    qk, v = qkv.split([2, 1])  # half as many operations
    q, k = normalize_and_rotate(qk, rotary, config)
    return q, k, v.squeeze(0)


def split_keys_values(kv: Tensor, K: int, rotary: Rotary | None, config: PerceiverARConfig) -> tuple[Tensor, Tensor]:
    """The fused projection of K context tokens -> keys, rotated, and values, each (B, H, K, C).

    kv: (B, K, 2 * H * C). With local context: (B, K + 1 or 2 K, 2 * H * C), ordered as by `inputs.mix_local_context`;
    the second half of a key's channels is then that of the token before.
    """
    k, v = (split_heads(x, config.heads_cross) for x in kv.chunk(2, dim=-1))
    if config.local_context > 1:
        first, half = k.shape[2] - K, k.shape[3] // 2
        own, before = k.split([k.shape[3] - half, half], dim=-1)
        k = torch.cat([own.narrow(2, first, K), before.narrow(2, 0, K)], dim=-1)
        v = v.narrow(2, first, K)
    return normalize_and_rotate(k, rotary, config), v


def normalize_and_rotate(x: Tensor, rotary: Rotary | None, config: PerceiverARConfig) -> Tensor:
    """Queries or keys (B, H, K, C), normalised per head if `qk_norm`, then rotated by their positions."""
    if config.qk_norm:
        with without_autocast(x):  # autocast would widen it to float32 on CUDA
            x = (F.layer_norm if config.norm == "layernorm" else F.rms_norm)(x, x.shape[-1:])
    return rotate(x, rotary)


def rotary_tables(config: PerceiverARConfig, positions: Tensor, *, cross: bool, dtype: torch.dtype) -> Rotary | None:
    """Cosines and sines (B or 1, H or 1, K, R) of integer positions (B or 1, K); None for a model without rotary.

    Sines are negative in the first half of the channels, so `rotate` does not have to split them.

    `cross`: for the heads of cross-attention, else of self-attention. `dtype`: the network's; the tables are float64 if
    it is float64, else float32. Angles are computed in float64 if the device supports it: float32 angles are off by
    0.06 at position 10^6, and bfloat16 cannot distinguish positions beyond 256.
    """
    if not config.rotary:
        return None
    plain = type(positions) is Tensor and not torch.compiler.is_compiling()  # never cache traced tensors
    speeds = (_kept_rotary_speeds if plain else rotary_speeds)(config, cross, positions.device)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions[:, None, :, None].to(speeds.dtype) * speeds
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotary_speeds(config: PerceiverARConfig, cross: bool, device: torch.device) -> Tensor:
    """Radians per position (H or 1, 1, R / 2), in float64, or in float32 on devices without it."""
    heads, channels = (config.heads_cross, config.width_head_cross) if cross else (config.num_heads, config.width_head)
    pairs = int(config.rotary_fraction * channels / 2 + 1e-6)
    if cross and config.local_context > 1:  # the other half is for search by content
        pairs = min(pairs, (channels - channels // 2) // 2)
    base = config.context_length if config.rotary_base is None else config.rotary_base
    at = torch.device("cpu") if device.type == "mps" else device  # where float64 is
    j = torch.arange(pairs, dtype=torch.float64, device=at)
    exponent = j / max(pairs - 1, 1) if config.rotary_endpoint else j / max(pairs, 1)
    speeds = (base**-exponent)[None, None]
    if config.rotary_heads_fraction < 1:  # the other heads have angle 0
        turned = torch.arange(heads, device=at) < int(config.rotary_heads_fraction * heads + 1e-6)
        speeds = speeds * turned[:, None, None]
    return speeds.to(device, torch.float32 if device.type == "mps" else torch.float64)


_kept_rotary_speeds = lru_cache(rotary_speeds)


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotates the channel pairs (c, c + R/2), c < R/2, of x (B, H, K, C) by their angles; other channels stay."""
    if rotary is None:
        return x
    cos, sin = rotary
    R, C = cos.shape[-1], x.shape[-1]
    turned, *rest = [x] if R == C else x.split([R, C - R], dim=-1)
    turned = torch.addcmul(turned * cos, turned.roll(R // 2, dims=-1), sin).to(x.dtype)
    return torch.cat([turned, *rest], dim=-1) if rest else turned
