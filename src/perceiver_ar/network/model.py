"""Perceiver AR (Hawthorne et al., ICML 2022, arXiv 2202.07765): the whole network, to be read top-down.

Shapes: B batch, T context, P prefix, N latents (T = P + N), D dim, E embedding width (D unless `embed_dim` is set),
H heads, C channels per head, V vocabulary.

    h = embed(tokens)                          (B, T, E)   one vector per token of the context
    u = h[:, P:]                               (B, N, D)   the latents: the last N positions
    cross-attention:  u += attend(u to h)                  causal: latent r reads tokens 0 ... P + r
                      u += mlp(u)
    self-attention:   u += attend(u to u)                  causal, num_layers times
                      u += mlp(u)
    logits = head(norm(u))                     (B, N, V)   latent r predicts token P + r + 1
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError
from perceiver_ar.network.activations import activate
from perceiver_ar.network.attention import Piece, attend, side_by_side
from perceiver_ar.network.heads import (
    Rotary,
    merge_blocks,
    merge_heads,
    normalize_and_rotate,
    rotary_tables,
    split_blocks,
    split_heads,
    split_keys_values,
    split_queries_keys_values,
)
from perceiver_ar.network.init import QUERY_GAIN, init_weights
from perceiver_ar.network.inputs import (
    EmbeddedTokens,
    Tables,
    TokenSource,
    coordinates,
    flat_positions,
    mix_local_context,
    position_vectors,
    prefix_keeps,
    repeat_rows,
    resolve_positions,
    resolve_prefix_len,
    token_source,
)
from perceiver_ar.network.prefix import (
    CachedPrefix,
    CacheUpdate,
    HeldPrefix,
    NetworkCache,
    PrefixAttention,
    StreamedPrefix,
    choose_chunk,
)
from perceiver_ar.network.weights import StoredModule


class PerceiverAR(StoredModule):
    """Next-token logits for the last positions of a long context.

    `activation_checkpointing = True` recomputes each layer in the backward pass instead of keeping its activations.
    `prefix_group = group`, a process group of torch.distributed, makes its ranks share the prefix: all get the same
    tokens, each reads its part of the prefix, and all have the same logits and, after backward, the same gradients
    (with dropout: if their random states are the same). Each rank spends memory and time on its share of the keys and
    values only. (Ring attention, arXiv 2310.01889, without a ring: the queries are few, so every rank has them all.)
    """

    def __init__(self, config: PerceiverARConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.prefix_group: ProcessGroup | None = None
        self.embed = nn.Embedding(config.vocab_size, config.width_embed)
        W = config.local_context
        self.local_conv = nn.Parameter(torch.empty(W - 1, config.width_embed)) if W > 1 else None
        tables = [nn.Embedding(rows, config.width_embed) for rows in config.table_sizes]
        # A tuple if empty: PEFT's `modules_to_save=["embed"]` matches every name that ends in embed, and refuses lists.
        self.position_embed = nn.ModuleList(tables) if tables else ()
        self.query_proj = nn.Linear(config.width_embed, config.dim) if config.query_proj else nn.Identity()
        self.query_mlp = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(config.query_mlp_layers))
        rows = {"none": 0, "shared": 1, "each": config.num_latents}[config.learned_queries]
        self.query_embed = nn.Embedding(rows, config.dim) if rows else None
        K = config.latents_per_position
        self.latent_embed = nn.Embedding(K, config.dim) if K > 1 else None
        self.cross_attention = nn.ModuleList(CrossLayer(config) for _ in config.cross_layers)
        self.self_attention = nn.ModuleList(SelfLayer(config) for _ in range(config.num_layers))
        self.norm = make_norm(config, config.dim) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.dim, config.vocab_size, bias=config.logits_bias)
        init_weights(self)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        prefix_len: int | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        prefix_keep: Tensor | None = None,
        blocks: int = 1,
    ) -> Tensor:
        """Logits (B, N, V) of the next token at each of the last N = T - prefix_len positions.

        Args:
            tokens: (B, T) integer ids, 1 <= T <= context_length, of any integer type. They may be on another device
                than the model: each part is copied when it is read.
            prefix_len: how many of the first tokens are prefix, 0 <= prefix_len < T; None: as many latents as
                num_latents allows. An explicit value may ask for more or fewer latents than in training.
            mask: (B, T) bool, True for real tokens, False for padding. No query sees a padded key, and by default
                positions count real tokens only, so a padded row gives the logits of the row alone. Outputs at padded
                latents mean nothing. None: all tokens are real.
            positions: (T,) or (B, T) integer positions, or (B or 1, T, axes) for a model with several `index_dims`;
                None: 0 ... T - 1, less the padding before a token.
            prefix_keep: (B, K) or (cross layers, B, K) indices below prefix_len, distinct within a row: the prefix
                tokens that survive prefix dropout. None: drawn at `config.prefix_dropout` in training, else all.
            blocks: number of consecutive blocks, each of N / blocks latents. Self-attention stays within a block. So
                the logits are those of `blocks` forwards, each over the tokens up to the end of its block with that
                block as latents; but the context is embedded and its keys and values are made only once.

        Raises:
            InputError: shapes or lengths that do not fit together; the message has the numbers.
        """
        settings = {"mask": mask, "positions": positions, "prefix_keep": prefix_keep, "blocks": blocks}
        return self.head(self.latents(tokens, prefix_len, **settings))

    def latents(
        self,
        tokens: Tensor,
        prefix_len: int | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        prefix_keep: Tensor | None = None,
        blocks: int = 1,
    ) -> Tensor:
        """The final latents (B, N, D), which `forward` turns into logits; same arguments."""
        K = self.config.latents_per_position
        P = resolve_prefix_len(self.config, tokens, prefix_len, mask, prefix_keep, blocks)
        positions = resolve_positions(self.config, tokens, mask, positions)
        if K > 1:  # the K latents of a position are neighbouring rows of the batch
            tokens, positions, mask, prefix_keep = repeat_rows(K, tokens, positions, mask, prefix_keep)
        tables = Tables(self.embed.weight, self.local_conv, [cast(nn.Embedding, t).weight for t in self.position_embed])
        context = token_source(self.config, tables, tokens, positions, mask)
        keeps = prefix_keeps(self.config, tokens, P, prefix_keep, self.training)
        prefixes = [self.prefix(context.first(P, keep)) for keep in keeps]
        prefixes = prefixes if len(prefixes) == (L := len(self.cross_attention)) else prefixes * L
        u = self.transform(self.embedded(*context.part(P, context.length)), prefixes, blocks=blocks)
        return u if K == 1 else u.unflatten(0, (-1, K)).mean(1)

    def cached_latents(self, tokens: Tensor, positions: Tensor, cache: NetworkCache) -> Tensor:
        """The final latents (B, N, D) of the N tokens that come after those in the cache.

        Writes their keys and values to the cache; `cache.advance(N)` keeps them.

        Args:
            tokens: (B, n + N); the first n = `inputs.reach(config)` are the tokens before them, -1 if missing.
            positions: (B or 1, N) of the N tokens.
        """
        prefixes = [CachedPrefix(partial(cache.cross.update, layer_idx=c)) for c in range(len(self.cross_attention))]
        return self.transform(self.embedded(tokens, positions, None), prefixes, cache)

    def cache_prefix(self, tokens: Tensor, positions: Tensor, cache: NetworkCache) -> None:
        """Writes N prefix tokens to a cache; `cache.cross.advance(N)` keeps them. Arguments as in `cached_latents`."""
        embedded = self.embedded(tokens, positions, None)
        for c, layer in enumerate(self.cross_attention):
            cache.cross.update(*layer.keys_values(embedded), layer_idx=c)  # type: ignore[operator]

    def transform(
        self,
        tokens: EmbeddedTokens,
        prefixes: Sequence[PrefixAttention],
        cache: NetworkCache | None = None,
        blocks: int = 1,
    ) -> Tensor:
        """The N tokens at the latent positions, and a prefix per cross-attention layer -> final latents (B, N, D)."""
        config = self.config
        # Autocast would start the residual stream in half precision.
        u = self.first_latents(tokens.h[:, -tokens.positions.shape[1] :]).to(tokens.h.dtype)
        positions = tokens.positions + config.query_position_offset
        make_rotary = partial(rotary_tables, config, positions, dtype=self.embed.weight.dtype)
        query_rotary = tokens.rotary if config.query_position_offset == 0 else make_rotary(cross=True)
        self_rotary = make_rotary(cross=False)
        self_mask = tokens.mask if config.mask_self_attention else None
        for i in range(config.num_layers + 1):
            for at, layer, prefix in zip(config.cross_layers, self.cross_attention, prefixes, strict=True):
                if at == i:
                    u = self.apply_layer(layer, u, query_rotary, prefix, tokens)
            if i < config.num_layers:
                rotary = self_rotary if config.rotary_layers is None or i < config.rotary_layers else None
                update = None if cache is None else partial(cache.self_attention.update, layer_idx=i)
                u = self.apply_layer(self.self_attention[i], u, rotary, self_mask, update, blocks)
        return self.norm(u)

    def prefix(self, tokens: TokenSource) -> PrefixAttention:
        """The prefix in the cheaper form: held, or streamed in pieces if it is too long to hold."""
        group, dropout = self.prefix_group, self.config.attention_dropout if self.training else 0.0
        chunk = choose_chunk(self.config, tokens, group, dropout, self.streamed_modules(), self.device)
        if chunk > 0:
            return StreamedPrefix(tokens, chunk, "" if group is None else group.group_name)
        return HeldPrefix(self.embedded(*tokens.part(0, tokens.length)), dropout)

    def streamed_modules(self) -> dict[str, nn.Module]:
        """Name -> module, for the modules whose weights streaming reads without calling them."""
        modules: dict[str, Any] = {"embed": self.embed}
        modules |= {f"position_embed.{axis}": table for axis, table in enumerate(self.position_embed)}
        for c, layer in enumerate(self.cross_attention):
            modules |= {f"cross_attention.{c}.{part}": getattr(layer, part) for part in ("context_norm", "kv_proj")}
        return modules

    def embedded(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> EmbeddedTokens:
        """Embeds tokens, given as returned by `TokenSource.part`."""
        by_axis = coordinates(self.config, positions)
        positions = flat_positions(self.config, by_axis)
        known = ids if self.local_conv is None else ids.clamp(min=0)
        rows = self.embed(known.flatten(1)).unflatten(1, known.shape[1:])  # called, as it may be more than its weight
        h = mix_local_context(ids, rows, self.local_conv, position_vectors(self.position_embed, by_axis))
        rotary = rotary_tables(self.config, positions, cross=True, dtype=self.embed.weight.dtype)
        return EmbeddedTokens(h, positions, rotary, mask)

    def first_latents(self, h: Tensor) -> Tensor:
        """Embeddings (B, N, E) of the latent positions -> the latents before the first layer (B, N, D)."""
        B, N = h.shape[:2]
        if self.query_embed is None:
            u = self.query_proj(h)
        else:  # the last latent has the last row, however many latents there are
            rows = self.query_embed.num_embeddings
            if self.config.learned_queries == "each" and rows < N:
                raise InputError(f"{N} latents are more than the {rows} learned_queries: use fewer")
            u = self.query_embed(torch.arange(rows - N, rows, device=h.device).clamp(min=0)).expand(B, -1, -1)
        if self.latent_embed is not None:
            latents = self.latent_embed(torch.arange(self.config.latents_per_position, device=h.device))
            u = u + latents.repeat(B // self.config.latents_per_position, 1)[:, None]
        for layer in self.query_mlp:
            u = activate(layer(u), self.config.query_mlp_activation or self.config.activation)
        return u

    def apply_layer(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


class CrossLayer(nn.Module):
    """Latents read the context: prefix and latents, each latent up to its own position; then an MLP."""

    def __init__(self, config: PerceiverARConfig) -> None:
        super().__init__()
        self.config = config
        self.settings = config.to_json()  # for the streaming operator
        width = config.heads_cross * config.width_head_cross
        self.query_norm = make_norm(config, config.dim)
        self.context_norm = make_norm(config, config.width_embed)
        self.q_proj = nn.Linear(config.dim, width, bias=config.attention_bias)
        self.kv_proj = nn.Linear(config.width_embed, 2 * width, bias=config.attention_bias)
        self.out_proj = nn.Linear(width, config.dim, bias=config.out_bias != "none")
        # Normalised queries and keys bound the scores; to find one token among thousands, attention has to be sharper.
        gain = config.local_context > 1 and config.qk_norm
        self.query_gain = nn.Parameter(torch.full((config.heads_cross,), QUERY_GAIN)) if gain else None
        self.mlp = MLP(config, config.cross_mlp_ratio or config.mlp_ratio)

    def forward(self, u: Tensor, rotary: Rotary | None, prefix: PrefixAttention, tokens: EmbeddedTokens) -> Tensor:
        """u (B, N, D) -> (B, N, D). `tokens`: those at the latent positions; `rotary` rotates their queries."""
        x = self.query_norm(u)
        q = normalize_and_rotate(split_heads(self.q_proj(x), self.config.heads_cross), rotary, self.config)
        if self.query_gain is not None:
            q = q * self.query_gain[:, None, None].to(q.dtype)
        # lucidrains and krasserm make the keys at latent positions from the normalised query stream instead.
        source = x if self.config.latent_keys == "query" else self.context_norm(tokens.h)
        k, v = split_keys_values(self.kv_proj(source), u.shape[1], tokens.rotary, self.config)
        out = self.out_proj(merge_heads(prefix.attend(self, q, Piece(k, v, causal=True, mask=tokens.mask))))
        u = u + out if self.config.query_residual else out.to(u.dtype)
        return u + self.mlp(u)

    def keys_values(self, tokens: EmbeddedTokens) -> tuple[Tensor, Tensor]:
        """Keys and values of K prefix tokens, each (B, H, K, C)."""
        kv = self.kv_proj(self.context_norm(tokens.h))
        return split_keys_values(kv, tokens.positions.shape[1], tokens.rotary, self.config)


class SelfLayer(nn.Module):
    """Latents read the latents up to themselves; then an MLP."""

    def __init__(self, config: PerceiverARConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.width_head
        self.norm = make_norm(config, config.dim)
        self.qkv_proj = nn.Linear(config.dim, 3 * width, bias=config.attention_bias)
        self.out_proj = nn.Linear(width, config.dim, bias=config.out_bias == "all")
        self.mlp = MLP(config, config.mlp_ratio)

    def forward(
        self, u: Tensor, rotary: Rotary | None, mask: Tensor | None, update: CacheUpdate | None, blocks: int
    ) -> Tensor:
        """u (B, N, D) -> (B, N, D).

        Args:
            mask: (B, N), True where a latent is a real token.
            update: of a cache with earlier latents; None: no cache.
            blocks: see `PerceiverAR.forward`; each is attended to separately.
        """
        q, k, v = split_queries_keys_values(self.qkv_proj(self.norm(u)), rotary, self.config)
        if blocks > 1:
            q, k, v = (split_blocks(x, blocks) for x in (q, k, v))
            mask = None if mask is None else mask.reshape(-1, mask.shape[1] // blocks)
        pieces = [Piece(k, v, causal=True, mask=mask)] if update is None else update(k, v)
        if self.config.latents_per_position > 1:
            pieces = side_by_side(pieces[0], self.config.latents_per_position)
        out = attend(q, pieces)
        u = u + self.out_proj(merge_heads(merge_blocks(out, blocks) if blocks > 1 else out))
        return u + self.mlp(u)


class MLP(nn.Module):
    """Pre-normalised feed-forward block of two matrices."""

    def __init__(self, config: PerceiverARConfig, ratio: float) -> None:
        super().__init__()
        self.activation = config.activation
        self.norm = make_norm(config, config.dim)
        self.up_proj = nn.Linear(config.dim, int(config.dim * ratio), bias=config.mlp_bias)
        self.down_proj = nn.Linear(int(config.dim * ratio), config.dim, bias=config.mlp_bias)
        self.dropout = config.mlp_dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = activate(self.up_proj(self.norm(x)), self.activation)
        if self.training and self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout)
        return self.down_proj(hidden)


def make_norm(config: PerceiverARConfig, dim: int) -> nn.Module:
    return nn.LayerNorm(dim) if config.norm == "layernorm" else nn.RMSNorm(dim, eps=1e-5)
