"""The forms of the prefix that cross-attention reads: held, streamed, or cached.

Every form has one method, `attend`, which the layers call: attention of the latents' queries (B, H, N, C) to the prefix
and to the latents themselves, (B, H, N, C). The results are equal; time and memory differ.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError
from perceiver_ar.network.attention import Piece, attend
from perceiver_ar.network.autocast import product_dtype
from perceiver_ar.network.inputs import EmbeddedTokens, TokenSource
from perceiver_ar.network.streaming import automatic_chunk, stream_attention

CacheUpdate = Callable[[Tensor, Tensor], list[Piece]]
"""Writes the keys and values of new positions to one layer of a cache -> the pieces that their queries attend to."""


class LayersCache(Protocol):
    """A cache for all attention layers of one kind."""

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> list[Piece]:
        """Writes keys and values (B, H, N, C) of new positions -> the pieces that their queries attend to."""
        ...


class NetworkCache(Protocol):
    """The cache interface that the network needs; `generation.cache.Cache` has it."""

    @property
    def cross(self) -> LayersCache: ...

    @property
    def self_attention(self) -> LayersCache: ...


class Reader(Protocol):
    """The part of a cross-attention layer that the forms use."""

    settings: str

    @property
    def context_norm(self) -> nn.Module: ...

    @property
    def kv_proj(self) -> nn.Module: ...

    def keys_values(self, tokens: EmbeddedTokens) -> tuple[Tensor, Tensor]: ...


class HeldPrefix(NamedTuple):
    """All prefix tokens are embedded, and their keys and values are held."""

    tokens: EmbeddedTokens
    dropout: float
    """On attention probabilities."""

    def attend(self, layer: Reader, q: Tensor, latents: Piece) -> Tensor:
        k, v = layer.keys_values(self.tokens)
        return attend(q, [Piece(k, v, mask=self.tokens.mask), latents], dropout=self.dropout)


class StreamedPrefix(NamedTuple):
    """Keys and values are made and dropped piece by piece, here and again in the backward pass."""

    tokens: TokenSource
    chunk: int
    """Tokens per row in a piece."""
    group: str
    """Name of the process group whose ranks share the prefix; "": none."""

    def attend(self, layer: Reader, q: Tensor, latents: Piece) -> Tensor:
        norm, projection = layer.context_norm.parameters(), layer.kv_proj.parameters()
        return stream_attention(layer.settings, q, latents, self.tokens, norm, projection, self.chunk, self.group)


class CachedPrefix(NamedTuple):
    """A cache holds the keys and values of all tokens before the latents."""

    update: CacheUpdate

    def attend(self, layer: Reader, q: Tensor, latents: Piece) -> Tensor:
        return attend(q, self.update(latents.k, latents.v))


PrefixAttention = HeldPrefix | StreamedPrefix | CachedPrefix


def choose_chunk(
    config: PerceiverARConfig,
    prefix: TokenSource,
    group: ProcessGroup | None,
    dropout: float,
    modules: dict[str, nn.Module],
    device: torch.device,
) -> int:
    """Tokens per row in a piece if the prefix is streamed; 0: hold the prefix.

    `modules`: those whose weights streaming reads, by name. `device`: where the network computes. Raises InputError if
    `prefix_chunk` or `group` demands streaming, but a module is not plain; and for `group` with dropout.
    """
    chunk, length = config.prefix_chunk, prefix.length
    if group is not None:
        if dropout > 0:
            raise InputError("attention_dropout needs the whole prefix in one process: set it to 0, or no prefix_group")
        length = -(-length // group.size())
    changed = next((name for name, module in modules.items() if not is_plain(module)), None)
    if changed is not None and (chunk or group is not None):
        raise InputError(
            f"{changed} is {type(modules[changed]).__name__} with a hook, an adapter or other weights, and "
            "streaming reads plain weights only: set prefix_chunk to 0 and no prefix_group"
        )
    if dropout > 0 or changed is not None:
        return 0
    if chunk is None:
        dtype = product_dtype(prefix.tables.tokens.dtype, device)
        chunk = automatic_chunk(config, len(prefix.tokens), length, dtype, device)
    if group is not None:
        return chunk or max(length, 1)
    return chunk if chunk < length else 0


def is_plain(module: nn.Module) -> bool:
    """Whether a module's output depends on its weights alone.

    False with an adapter (PEFT), a parametrization, a hook (of torch or accelerate), or quantised weights (torchao).
    """
    plain = type(module) in (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
    hooks = any(getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))
    return plain and not hooks and not hasattr(module, "_hf_hook") and not hasattr(module.weight, "qdata")
