"""Perceiver AR (Hawthorne et al., ICML 2022, arXiv 2202.07765): the whole network, to be read top-down.

Shapes: B batch, T context, P prefix, N latents (T = P + N), D dim, H heads, C channels per head, V vocabulary.

    h = embed(tokens)                          (B, T, D)   one vector per token of the context
    u = h[:, P:]                               (B, N, D)   the latents: the last N positions
    cross-attention:  u += attend(u to h)                  causal: latent r reads tokens 0 ... P + r
                      u += mlp(u)
    self-attention:   u += attend(u to u)                  causal, num_layers times
                      u += mlp(u)
    logits = head(norm(u))                     (B, N, V)   latent r predicts token P + r + 1
"""

import inspect
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from perceiver_ar.attention import Piece, attend
from perceiver_ar.cache import Cache
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path, write_text
from perceiver_ar.heads import (
    Rotary,
    merge_blocks,
    merge_heads,
    place,
    rotary_tables,
    split_blocks,
    split_heads,
    split_keys_values,
)
from perceiver_ar.inputs import Prefix, Tables, coordinates, mix, place_vectors, reach, running, with_predecessors
from perceiver_ar.streaming import automatic_chunk, stream_attention

Past = Callable[[Tensor, Tensor], list[Piece]]
"""Takes the new positions' keys and values and gives the pieces to attend to: a layer of a cache."""


QUERY_GAIN = 1.5
"""Factor of the cross-attention's scores before training."""


class Span(NamedTuple):
    """Tokens of the context as cross-attention layers read them."""

    h: Tensor
    """(B, K, E) embeddings, before any normalisation; with local context (B, K + 1 or 2 K, E), see `inputs.mix`."""
    positions: Tensor
    """(B or 1, K)"""
    rotary: Rotary | None
    """Their rotation as keys."""
    mask: Tensor | None
    """(B, K) bool, True where the token is real; None: all are."""


class PerceiverAR(nn.Module, PyTorchModelHubMixin, library_name="perceiver-ar", tags=["perceiver-ar", "long-context"]):
    """Next-token logits for the last positions of a long context.

    Setting `activation_checkpointing` recomputes each layer in the backward pass instead of keeping its activations.
    Setting `prefix_group` to a process group of torch.distributed makes its ranks share the prefix: all are given the
    same tokens, each reads its part of the prefix, and all have the same logits and, after backward, the same
    gradients (with dropout: if their random states are the same). Then keys and values take a rank's share of the
    memory and time. (Ring attention, arXiv 2310.01889, with nothing that goes round: the latents' queries are few, so
    every rank has them all.)
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
        # No list without tables: PEFT's `modules_to_save=["embed"]` takes whatever ends in embed, and refuses lists.
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
        """Logits (B, N, V) of the tokens that follow each of the last N = T - prefix_len positions.

        Args:
            tokens: (B, T) integer ids, 1 <= T <= context_length, of any integer type. They may be on another device
                than the model: the part that is being read is fetched.
            prefix_len: how many of the first tokens are prefix, 0 <= prefix_len < T; None: as many latents as
                num_latents allows. An explicit value may ask for more or fewer latents than in training.
            mask: (B, T) bool, True for real tokens, False for padding. No query sees a padded key, and by default
                positions count real tokens only, so a padded row gives the logits of the row alone. Outputs at padded
                latents mean nothing. None: all tokens are real.
            positions: (T,) or (B, T) integer positions, or (B or 1, T, axes) for a model with several `index_dims`;
                None: 0 ... T - 1, less the padding before a token.
            prefix_keep: (B, K) or (cross layers, B, K) indices below prefix_len, distinct within a row: the prefix
                tokens that survive prefix dropout. None: drawn at `config.prefix_dropout` in training, else all.
            blocks: how many blocks of N / blocks latents there are, one behind the other. Self-attention stays within
                a block. So the logits are those of `blocks` forwards, each over the tokens up to the end of its block
                with that block as latents; but the context is embedded and its keys and values are made only once.

        Raises:
            InputError: shapes or lengths that do not fit together; the message has the numbers.
        """
        inputs = {"mask": mask, "positions": positions, "prefix_keep": prefix_keep, "blocks": blocks}
        return self.head(self.latents(tokens, prefix_len, **inputs))

    def latents(
        self,
        tokens: Tensor,
        prefix_len: int | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        prefix_keep: Tensor | None = None,
        blocks: int = 1,
        cache: Cache | None = None,
    ) -> Tensor:
        """The final latents (B, N, D) that `forward` turns into logits; same arguments.

        With a cache, all N tokens are latents, at these positions, behind what the cache holds of their context; with
        local context `tokens` are (B, n + N), and the first n = `inputs.reach(config)` are the tokens before them, -1
        where there is none. Their keys and values are written to the cache; `cache.advance(N)` keeps them.
        """
        config = self.config
        if cache is None:
            P = self.check(tokens, prefix_len, mask, prefix_keep, blocks)
            positions = self.positions(tokens, mask, positions)
            if config.latents_per_position > 1:  # several latents of a position are rows of the batch, side by side
                tokens, positions, mask, prefix_keep = self.repeat_rows(tokens, positions, mask, prefix_keep)
            keeps = self.prefix_keeps(tokens, P, prefix_keep)
            context = self.context(tokens, positions, mask)
            latent = self.span(*context.part(P, context.length))
        else:
            assert positions is not None
            P, context, keeps = 0, None, []
            latent = self.span(tokens, positions, None)

        # Autocast would start the residual stream in half precision.
        u = self.first_latents(latent.h[:, -latent.positions.shape[1] :]).to(latent.h.dtype)
        at = latent.positions + config.query_position_offset
        query_rotary = latent.rotary if config.query_position_offset == 0 else self.rotary(at, cross=True)
        self_rotary = self.rotary(at, cross=False)
        self_mask = latent.mask if config.mask_self_attention else None

        prefix: Span | Prefix | None = None
        for i in range(config.num_layers + 1):
            for c, (before, layer) in enumerate(zip(config.cross_layers, self.cross_attention, strict=True)):
                if before == i:
                    past = None if cache is None else partial(cache.cross.update, layer_idx=c)
                    if context is not None and (prefix is None or keeps[c] is not None):
                        prefix = self.prefix(context, P, keeps[c])
                    u = self.apply_layer(layer, u, query_rotary, prefix, latent, past)
            if i < config.num_layers:
                rotary = self_rotary if config.rotary_layers is None or i < config.rotary_layers else None
                past = None if cache is None else partial(cache.own.update, layer_idx=i)
                u = self.apply_layer(self.self_attention[i], u, rotary, self_mask, past, blocks)
        u = self.norm(u)
        return u if config.latents_per_position == 1 else u.unflatten(0, (-1, config.latents_per_position)).mean(1)

    def read(self, tokens: Tensor, positions: Tensor, cache: Cache) -> None:
        """Writes K prefix tokens at positions (B or 1, K) to a cache; `cache.cross.advance(K)` keeps them.

        tokens: (B, n + K), as `latents` takes them with a cache.
        """
        span = self.span(tokens, positions, None)
        for c, layer in enumerate(cast("list[CrossLayer]", self.cross_attention)):
            cache.cross.update(*layer.read(span), c)

    # The context: which tokens, where they stand, how they are embedded.

    def context(self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None) -> Prefix:
        """All tokens of a context, from which prefix and latents are taken."""
        n = reach(self.config)
        if n > 0 and mask is not None:
            tokens = with_predecessors(tokens, mask.to(tokens.device), n)
        return Prefix(self.tables(), tokens, positions, mask, None, n)

    def tables(self) -> Tables:
        positions = [cast(nn.Embedding, table).weight for table in self.position_embed]
        return Tables(self.embed.weight, self.local_conv, positions)

    def check(
        self, tokens: Tensor, prefix_len: int | None, mask: Tensor | None, prefix_keep: Tensor | None, blocks: int
    ) -> int:
        """The prefix length to use. Raises InputError where tokens, prefix length and masks do not fit together."""
        if not isinstance(tokens, Tensor):
            raise InputError(
                f"tokens are of type {type(tokens).__name__}: turn them into a tensor with torch.as_tensor"
            )
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise InputError(f"tokens have shape {tuple(tokens.shape)}: they must be (batch, length), neither empty")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise InputError(f"tokens are of {tokens.dtype}: they must be integer ids")
        T = tokens.shape[1]
        if self.config.context_length < T:
            raise InputError(
                f"{T} tokens are more than context_length {self.config.context_length}: give only the last "
                f"{self.config.context_length}, or build the model with a longer context"
            )
        if mask is not None and mask.shape != tokens.shape:
            raise InputError(f"mask has shape {tuple(mask.shape)}, tokens {tuple(tokens.shape)}: they must be equal")
        if mask is not None and mask.dtype != torch.bool:
            raise InputError(f"mask is of {mask.dtype}: it must be of torch.bool, True for real tokens")
        layers = len(self.config.cross_layers)
        if prefix_keep is not None and prefix_keep.shape[:-1] not in ((len(tokens),), (layers, len(tokens))):
            raise InputError(
                f"prefix_keep has shape {tuple(prefix_keep.shape)} for {layers} cross-attention layers and "
                f"{len(tokens)} rows: it must be (rows, kept) or (layers, rows, kept)"
            )
        P = max(0, T - self.config.num_latents) if prefix_len is None else prefix_len
        if not 0 <= P < T:
            raise InputError(f"prefix_len is {P} with {T} tokens: it must be in 0 ... {T - 1}")
        if blocks < 1 or (T - P) % blocks:
            raise InputError(f"blocks is {blocks} with {T - P} latents: it must divide them")
        if blocks > 1 and not self.config.blocks_allowed:
            raise InputError(
                f"blocks is {blocks}: with latent_keys query, positions_from_end, learned_queries each or "
                "latents_per_position a block's forward is another one, so give each block alone"
            )
        eager, V = not torch.compiler.is_compiling(), self.config.vocab_size
        comparable = tokens.dtype not in (torch.uint16, torch.uint32, torch.uint64)
        # Where looking costs no wait for a GPU, and there are numbers (fake tensors have none).
        if eager and type(tokens) is Tensor and tokens.device.type == "cpu" and comparable:
            wrong = [id for id in map(int, tokens.aminmax()) if not 0 <= id < V]
            if wrong:
                raise InputError(f"tokens have the id {wrong[0]}: with vocab_size {V} they must be in 0 ... {V - 1}")
        # What lies behind the prefix would let latents see what comes.
        if eager and prefix_keep is not None and prefix_keep.device.type == "cpu":
            wrong = prefix_keep[(prefix_keep < 0) | (prefix_keep >= P)].tolist()
            if wrong:
                raise InputError(f"prefix_keep has index {wrong[0]}: with prefix_len {P} they must be in 0 ... {P - 1}")
        return P

    def positions(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
        """Positions as `Prefix` takes them: (B or 1, T) or, by axes, (B or 1, T, axes); None: 0 ... T - 1."""
        if positions is None:
            T, most = tokens.shape[1], self.config.max_positions
            if mask is None and most is not None and most < T:
                raise InputError(
                    f"{T} tokens are more than the {most} positions of the tables {self.config.table_sizes}: "
                    "give fewer, or positions of their own"
                )
            if mask is None and not self.config.positions_from_end:
                return None
            real = torch.ones_like(tokens[:1], dtype=torch.bool) if mask is None else mask
            positions = (real.cumsum(1) - 1).clamp_(min=0)
            return positions[:, -1:] - positions if self.config.positions_from_end else positions
        axes = len(self.config.table_sizes)
        shape = positions.shape
        positions = positions if positions.ndim > 1 else positions[None]
        fits = positions.ndim == 2 or (positions.ndim == 3 and axes > 1 and shape[-1] == axes)
        if not fits or positions.shape[0] not in (1, tokens.shape[0]) or positions.shape[1] != tokens.shape[1]:
            raise InputError(f"positions have shape {tuple(shape)}, tokens {tuple(tokens.shape)}: give one each")
        return positions

    def prefix_keeps(self, tokens: Tensor, P: int, prefix_keep: Tensor | None) -> list[Tensor | None]:
        """For each cross-attention layer the indices (B, K) of the prefix tokens it reads; None: all."""
        layers, rate = len(self.config.cross_layers), self.config.prefix_dropout
        if prefix_keep is not None:
            return list(prefix_keep) if prefix_keep.ndim == 3 else [prefix_keep] * layers
        dropped = int(P * rate) if self.training else 0
        if dropped == 0:
            return [None] * layers
        noise = torch.rand(layers, tokens.shape[0], P, device=tokens.device)
        return list(noise.topk(P - dropped, dim=-1, sorted=False).indices)

    def prefix(self, context: Prefix, P: int, keep: Tensor | None) -> Span | Prefix:
        """The first P tokens, or those at the indices `keep` (B, K) with the tokens before them.

        A `Prefix` where it is to be streamed.
        """
        prefix = context.rows(P, keep)
        chunk = self.config.prefix_chunk
        group, dropout = self.prefix_group, self.training and self.config.attention_dropout > 0
        if group is not None and dropout:
            raise InputError("attention_dropout needs the whole prefix in one process: set it to 0, or no prefix_group")
        length = prefix.length if group is None else -(-prefix.length // group.size())
        odd = next((name for name, module in self.streamed_modules().items() if not is_plain(module)), None)
        if odd is not None and (chunk or group is not None):
            raise InputError(
                f"{odd} is {type(self.get_submodule(odd)).__name__} with a hook, an adapter or other weights, and "
                "streaming reads plain weights only: set prefix_chunk to 0, and no prefix_group"
            )
        if dropout or odd is not None:
            chunk = 0
        elif chunk is None:
            chunk = automatic_chunk(self.config, len(prefix.tokens), length, self.embed.weight.dtype, self.device)
        if group is not None:
            return prefix._replace(chunk=chunk or max(length, 1), group=group.group_name)
        if 0 < chunk < length:
            return prefix._replace(chunk=chunk)
        return self.span(*prefix.part(0, prefix.length))

    def streamed_modules(self) -> dict[str, nn.Module]:
        """The modules that a streamed prefix takes for their weights, by name."""
        layers = [(f"cross_attention.{c}", layer) for c, layer in enumerate(self.cross_attention)]
        modules = {f"{name}.{part}": getattr(layer, part) for name, layer in layers for part in CrossLayer.STREAMED}
        tables = {f"position_embed.{axis}": table for axis, table in enumerate(self.position_embed)}
        return {"embed": self.embed, **tables, **modules}

    def span(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Span:
        """Embeds tokens, given as `Prefix.part` gives them."""
        places = coordinates(self.config, positions)
        positions = running(self.config, places)
        known = ids if self.local_conv is None else ids.clamp(min=0)
        rows = self.embed(known.flatten(1)).unflatten(1, known.shape[1:])  # called: it may be more than its weight
        h = mix(ids, rows, self.local_conv, place_vectors(self.position_embed, places))
        return Span(h, positions, self.rotary(positions, cross=True), mask)

    def rotary(self, positions: Tensor, *, cross: bool) -> Rotary | None:
        """The rotation of heads at integer positions (B or 1, K)."""
        dtype = torch.float64 if self.embed.weight.dtype == torch.float64 else torch.float32
        return rotary_tables(self.config, positions, cross=cross, dtype=dtype)

    def first_latents(self, h: Tensor) -> Tensor:
        """Embeddings (B, N, E) of the latent positions -> what the first layer takes as latents (B, N, D)."""
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

    def repeat_rows(
        self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None, prefix_keep: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Every row of the batch `latents_per_position` times."""
        K = self.config.latents_per_position
        positions = positions if positions is None or len(positions) == 1 else positions.repeat_interleave(K, 0)
        mask = None if mask is None else mask.repeat_interleave(K, 0)
        prefix_keep = None if prefix_keep is None else prefix_keep.repeat_interleave(K, -2)
        return tokens.repeat_interleave(K, 0), positions, mask, prefix_keep

    def apply_layer(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    @property
    def device(self) -> torch.device:
        """Where it computes: its weights' device, or the one to which accelerate fetches weights that it put away."""
        fetched_to = getattr(getattr(self.embed, "_hf_hook", None), "execution_device", None)
        return self.embed.weight.device if fetched_to is None else torch.device(fetched_to)

    # Weights on disk: config.json and model.safetensors; also from and to the Hub, through the mixin.

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> str | None:
        """Writes `config.json` and `model.safetensors` into a directory, each whole or not at all.

        With `push_to_hub=True` and the other arguments of huggingface_hub's mixin, also uploads them with a model card.
        """
        if kwargs:
            return super().save_pretrained(Path(save_directory), **kwargs)
        self._save_pretrained(Path(save_directory))
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.stored_tensors().items()}
        with atomic_path(save_directory / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_text(save_directory / "config.json", self.config.to_json())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """The model in a directory (a run is one) or, with huggingface_hub's arguments, on the Hub; in evaluation mode.

        Raises:
            InputError: files missing, damaged, or not ours; arguments that nobody has.
        """
        unknown = sorted(set(kwargs) - set(inspect.signature(snapshot_download).parameters))
        require(not unknown, f"from_pretrained has no argument {', '.join(unknown)}: leave it out")
        path = Path(pretrained_model_name_or_path)
        if not path.is_dir():
            try:
                files = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
                path = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=files, **kwargs))
            except Exception as error:
                raise InputError(
                    f"{pretrained_model_name_or_path}: no such directory, and no such model to be had from the Hub "
                    f"({type(error).__name__})"
                ) from error
        model = cls(PerceiverARConfig.load(path))
        file = path / "model.safetensors"
        index = path / "model.safetensors.index.json"  # transformers' `save_pretrained` may have written shards
        try:
            shards = [file]
            if index.exists() and not file.exists():
                file = index
                names = sorted({*json.loads(index.read_text())["weight_map"].values()})
                shards = [path / Path(name).name for name in names]  # never outside of the directory
            tensors: dict[str, Tensor] = {}
            for file in shards:
                file.open("rb").close()  # safetensors takes what may not be read for missing
                tensors |= load_file(file)
        except PermissionError:
            raise
        except FileNotFoundError:
            raise InputError(f"{file}: no such file, so there is no trained model here (yet)") from None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is damaged ({error}): restore it, or train again") from None
        model.load_tensors(tensors, where=str(path if len(shards) > 1 else file))
        return model.eval()

    def stored_tensors(self) -> dict[str, Tensor]:
        """The state dict, without the second name of a tied embedding."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not (self.config.tie_embeddings and name == "head.weight")
        }

    def load_tensors(self, tensors: dict[str, Tensor], where: str) -> None:
        """Loads every tensor by name. Raises InputError that lists what is missing, unknown or has another shape."""
        own = self.stored_tensors()
        wrong = [f"{name} is missing" for name in own if name not in tensors]
        wrong += [f"{name} is unknown" for name in tensors if name not in own]
        wrong += [
            f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ]
        if wrong:
            raise InputError(f"{where} does not fit the settings: {'; '.join(wrong)}")
        self.load_state_dict(tensors, strict=False)


class CrossLayer(nn.Module):
    """Latents read the context: prefix and latents, each latent up to its own position; then an MLP."""

    STREAMED = "context_norm", "kv_proj"

    def __init__(self, config: PerceiverARConfig) -> None:
        super().__init__()
        self.config = config
        self.settings = config.to_json()  # as the streaming operator takes them
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

    def forward(
        self,
        u: Tensor,
        rotary: Rotary | None,
        prefix: Span | Prefix | None,
        latent: Span,
        past: Past | None = None,
    ) -> Tensor:
        """u (B, N, D) -> (B, N, D). `rotary` turns the queries; the spans bring the rotation of their keys.

        A prefix that comes as a `Prefix` is streamed; `past`: what was read before these latents.
        """
        x = self.query_norm(u)
        q = place(split_heads(self.q_proj(x), self.config.heads_cross), rotary, self.config)
        if self.query_gain is not None:
            q = q * self.query_gain[:, None, None].to(q.dtype)
        # lucidrains and krasserm take the keys at latent positions from the normalised query stream instead.
        own = x if self.config.latent_keys == "query" else self.context_norm(latent.h)
        k, v = split_keys_values(self.kv_proj(own), u.shape[1], latent.rotary, self.config)
        pieces = [Piece(k, v, causal=True, mask=latent.mask)] if past is None else past(k, v)
        if prefix is None:
            out = attend(q, pieces)
        elif isinstance(prefix, Prefix):
            norm, projection = self.context_norm.parameters(), self.kv_proj.parameters()
            out = stream_attention(self.settings, q, pieces[0], prefix, list(norm), list(projection))
        else:
            k, v = self.read(prefix)
            dropout = self.config.attention_dropout if self.training else 0.0
            out = attend(q, [Piece(k, v, mask=prefix.mask), *pieces], dropout=dropout)
        out = self.out_proj(merge_heads(out))
        u = u + out if self.config.query_residual else out.to(u.dtype)
        return u + self.mlp(u)

    def read(self, prefix: Span) -> tuple[Tensor, Tensor]:
        """Keys and values of a prefix, each (B, H, K, C)."""
        kv = self.kv_proj(self.context_norm(prefix.h))
        return split_keys_values(kv, prefix.positions.shape[1], prefix.rotary, self.config)


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
        self, u: Tensor, rotary: Rotary | None, mask: Tensor | None, past: Past | None = None, blocks: int = 1
    ) -> Tensor:
        """u (B, N, D) -> (B, N, D); mask (B, N), True where a latent is a real token; `past`: latents before these.

        Of several `blocks` (see `PerceiverAR.forward`) each is for itself.
        """
        qkv = self.qkv_proj(self.norm(u)).unflatten(-1, (3, self.config.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = place(qkv[:2], rotary, self.config)
        v = qkv[2]
        if blocks > 1:
            q, k, v = (split_blocks(x, blocks) for x in (q, k, v))
            mask = None if mask is None else mask.reshape(-1, mask.shape[1] // blocks)
        pieces = [Piece(k, v, causal=True, mask=mask)] if past is None else past(k, v)
        if self.config.latents_per_position > 1:
            pieces = side_by_side(pieces[0], self.config.latents_per_position)
        out = attend(q, pieces)
        u = u + self.out_proj(merge_heads(merge_blocks(out, blocks) if blocks > 1 else out))
        return u + self.mlp(u)


def is_plain(module: nn.Module) -> bool:
    """Whether a module does what its weights alone say.

    Not so with an adapter (PEFT), a parametrization, a hook (of torch or accelerate), or quantised weights (torchao).
    """
    plain = type(module) in (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
    hooks = any(getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))
    return plain and not hooks and not hasattr(module, "_hf_hook") and not hasattr(module.weight, "qdata")


def side_by_side(piece: Piece, K: int) -> list[Piece]:
    """Keys whose batch holds K latents of each position as K rows -> K pieces, so that each latent sees all K."""
    k, v = piece.k.unflatten(0, (-1, K)), piece.v.unflatten(0, (-1, K))
    return [
        Piece(k[:, i].repeat_interleave(K, 0), v[:, i].repeat_interleave(K, 0), piece.causal, piece.mask)
        for i in range(K)
    ]


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


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return F.relu(x).square()
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def make_norm(config: PerceiverARConfig, dim: int) -> nn.Module:
    return nn.LayerNorm(dim) if config.norm == "layernorm" else nn.RMSNorm(dim, eps=1e-5)


def init_weights(model: PerceiverAR) -> None:
    """Draws the initial weights in the manner `config.init` names; biases are zero except in PyTorch's own manner."""
    config = model.config
    if config.init != "torch":
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                if config.init == "normal" or name in ("query_embed", "latent_embed"):
                    nn.init.normal_(module.weight, std=0.02)
                elif config.init == "fan_in":
                    nn.init.trunc_normal_(module.weight, a=-2, b=2)
                else:
                    nn.init.normal_(module.weight)
            elif isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features)
                if config.init == "normal":
                    nn.init.normal_(module.weight, std=0.02)
                elif config.init == "fan_in":
                    nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                elif name.endswith(("out_proj", "down_proj")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    if model.local_conv is not None:
        nn.init.normal_(model.local_conv, std=0.5)
        # Queries and keys begin as the same map, so a latent looks from the first step on for what resembles it; and
        # as half of a key is the token before, it finds where its own local context stood, with what came next.
        for layer in cast("list[CrossLayer]", model.cross_attention):
            if layer.q_proj.in_features == layer.kv_proj.in_features:
                layer.kv_proj.weight.data[: layer.q_proj.out_features] = layer.q_proj.weight
    if config.init in ("fan_in", "zero_out"):
        if config.tie_embeddings:  # the embedding is the head, and normalised latents have length sqrt(dim)
            nn.init.normal_(model.embed.weight, std=1 / math.sqrt(config.dim))
        else:
            nn.init.zeros_(model.head.weight)
    if config.position_table == "sinusoidal":
        for rows, table in zip(config.table_sizes, model.position_embed, strict=True):
            table.weight = nn.Parameter(sinusoids(rows, config.width_embed), requires_grad=False)


def sinusoids(rows: int, dim: int) -> Tensor:
    """(rows, dim): row p is [sin(p w_j), cos(p w_j)] with w_j = 10000^(-j / (dim/2 - 1)), as in google's release."""
    half = dim // 2
    w = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / max(half - 1, 1))
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * w
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
