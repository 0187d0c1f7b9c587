"""The settings of a network. The fields after the first block exist so that one network computes what each published
implementation computes; `PRESETS` names those combinations.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from perceiver_ar.config.checks import (
    NotNegative,
    Positive,
    PositiveNumber,
    Share,
    ShareBelow1,
    check_fields,
    unknown_words,
)
from perceiver_ar.config.presets import PRESETS
from perceiver_ar.errors import InputError, require

MODEL_TYPE = "perceiver_ar"
BEFORE: dict[str, dict[str, Any]] = {
    "model": {"local_context": 1},
    "trainer": {"blocks": 1, "patience": None, "final_weights": "last"},
}
"""Values of settings, by group, that a config.json or recipe.yaml of older runs does not name."""


@dataclass(frozen=True)
class PerceiverARConfig:
    """Settings of a `PerceiverAR`. Sizes are counts; rates are shares between 0 and 1."""

    vocab_size: Positive = 256
    """Number of different token ids. Ids are 0 ... vocab_size - 1; none of them is special to the model.
    Training takes it from the codec."""
    context_length: Positive = 4096
    """Maximum number of tokens in a context: prefix and latents together."""
    num_latents: Positive = 512
    """Maximum number of latents (query positions) unless a call asks for more; each gives one next-token prediction."""
    dim: Positive = 512
    """Width of the latents' residual stream."""
    num_layers: NotNegative = 8
    """Self-attention layers over the latents."""
    num_heads: Positive = 8
    """Attention heads."""
    head_dim: Positive | None = None
    """Channels per head; None: dim / num_heads."""
    mlp_ratio: PositiveNumber = 4.0
    """Hidden width of the feed-forward blocks, as a multiple of their input width."""
    cross_layers: tuple[int, ...] = (0,)
    """Places of the cross-attention layers, each given by the number of the self-attention layer after it (num_layers:
    at the end). (0,) is the paper; (0, 0) is two in a row; (0, 3) has a second one before the fourth layer."""
    local_context: Positive = 4
    """Number of tokens in an embedding: its own and those before it, mixed by a causal depthwise convolution. More than
    1: in cross-attention, the second half of each head's channels searches by content. It is not rotated, and its keys
    come from the token before, so latents find the tokens that followed the same tokens earlier.
    1: embeddings of single tokens, as in the references and in a config.json without this setting."""
    prefix_dropout: ShareBelow1 = 0.0
    """Share of the prefix tokens dropped from each cross-attention in training (paper, section 3.2 and appendix)."""
    attention_dropout: ShareBelow1 = 0.0
    """Dropout on cross-attention probabilities in training; needs a masked kernel, so it is slow."""
    mlp_dropout: ShareBelow1 = 0.0
    """Dropout on the hidden units of the feed-forward blocks in training."""
    prefix_chunk: NotNegative | None = None
    """Number of prefix tokens in each piece that cross-attention reads, so that memory does not grow with the context.
    It does not change the results. 0: no pieces. None: no pieces unless keys and values of the whole prefix would take
    more than 1/128 of the device's memory, or on a CPU more than 32 MiB. Training with attention_dropout has no
    pieces."""

    # Shape of a block.
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Pre-normalisation of every block."""
    qk_norm: bool = True
    """Normalise queries and keys per head before the rotation, as `norm` does but without weights."""
    activation: Literal["relu2", "relu", "gelu", "gelu_tanh"] = "relu2"
    """Feed-forward activation: squared ReLU, ReLU, exact GELU, or its tanh form."""
    final_norm: bool = True
    """Normalise the latents before the logits."""
    tie_embeddings: bool = False
    """Compute logits with the transposed token embedding instead of a separate matrix."""
    attention_bias: bool = False
    """Add biases to the query, key and value projections."""
    out_bias: Literal["none", "cross", "all"] = "none"
    """Which attention output projections have a bias."""
    mlp_bias: bool = False
    """Add biases to the feed-forward blocks."""
    logits_bias: bool = False
    """Add a bias per vocabulary entry to the logits."""
    init: Literal["zero_out", "torch", "normal", "fan_in"] = "zero_out"
    """Initial weights. zero_out: output projections and logits are zero, the rest has std 1/sqrt(fan_in). torch:
    PyTorch's defaults (lucidrains). normal: std 0.02 (krasserm). fan_in: truncated normal with std 1/sqrt(fan_in),
    logits are zero (google)."""

    # Positions.
    rotary: bool = True
    """Rotate queries and keys by their positions (RoPE, arXiv 2104.09864)."""
    rotary_fraction: Share = 1.0
    """Share of each head's channels that is rotated: the first 2 * floor(fraction * head_dim / 2). In cross-attention
    with local_context above 1, at most the first half."""
    rotary_heads_fraction: Share = 1.0
    """Share of the heads that is rotated: the first floor(fraction * heads) (google)."""
    rotary_base: PositiveNumber | None = 10000.0
    """Longest rotary wavelength divided by 2 pi; None: context_length (google)."""
    rotary_endpoint: bool = False
    """Frequencies reach exactly 1 / rotary_base at the last band (google) instead of stopping one band before."""
    rotary_layers: NotNegative | None = None
    """Number of self-attention layers that are rotated, from the first on (krasserm); None: all."""
    position_table: Literal["none", "learned", "sinusoidal"] = "none"
    """Vectors added to the token embeddings by position."""
    index_dims: tuple[int, ...] = ()
    """Sizes of the position tables, one per axis: (rows, columns, channels) for images; (): one of context_length."""
    positions_from_end: bool = False
    """Count positions backwards from 0, the last token of the context (google without positions from the data)."""
    query_position_offset: int = 0
    """Number added to the latents' positions in queries and in self-attention keys (google's query offsetting)."""

    # What only some references have.
    latent_keys: Literal["context", "query"] = "context"
    """Source of the cross-attention keys and values at latent positions. context: the normalised embeddings (google);
    query: the normalised query stream (lucidrains, krasserm)."""
    query_proj: bool = False
    """Make the initial latents from the embeddings with a linear layer that has a bias (google)."""
    query_mlp_layers: NotNegative = 0
    """Number of linear layers, each followed by the activation, that the initial latents pass through (google)."""
    query_mlp_activation: Literal["relu2", "relu", "gelu", "gelu_tanh"] | None = None
    """Activation of the query_mlp_layers; None: `activation`."""
    learned_queries: Literal["none", "shared", "each"] = "none"
    """Learn the initial latents instead of reading the tokens. shared: one for all; each: one per latent (google)."""
    latents_per_position: Positive = 1
    """Number of latents at each latent position. They see each other and are averaged before the logits (google)."""
    query_residual: bool = True
    """Add the cross-attention's output to its query."""
    mask_self_attention: bool = True
    """Hide padding from self-attention, too. Only lucidrains masks the cross-attention alone."""
    embed_dim: Positive | None = None
    """Width of the token embeddings; None: dim. Another width needs query_proj or learned_queries (google)."""
    cross_num_heads: Positive | None = None
    """Attention heads in cross-attention; None: num_heads."""
    cross_head_dim: Positive | None = None
    """Channels per cross-attention head; None: head_dim, or dim / cross_num_heads without one."""
    cross_mlp_ratio: PositiveNumber | None = None
    """mlp_ratio of the cross-attention layers; None: mlp_ratio."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.num_latents <= self.context_length,
            f"num_latents is {self.num_latents}, more than context_length {self.context_length}: "
            "lower num_latents or raise context_length",
        )
        require(
            self.head_dim is not None or self.dim % self.num_heads == 0,
            f"dim {self.dim} is not a multiple of num_heads {self.num_heads}: change one of them, or give head_dim",
        )
        require(
            self.cross_head_dim is not None or self.head_dim is not None or self.dim % self.heads_cross == 0,
            f"dim {self.dim} is not a multiple of cross_num_heads {self.heads_cross}: change one, "
            "or give cross_head_dim",
        )
        for name, ratio in {"mlp_ratio": self.mlp_ratio, "cross_mlp_ratio": self.cross_mlp_ratio or 1.0}.items():
            require(
                int(self.dim * ratio) >= 1, f"{name} is {ratio}: with dim {self.dim} that is no hidden unit, raise it"
            )
        for at in self.cross_layers:
            require(
                0 <= at <= self.num_layers,
                f"cross_layers has {at}: with num_layers {self.num_layers} its numbers must be 0 ... {self.num_layers}",
            )
        require(
            list(self.cross_layers) == sorted(self.cross_layers),
            f"cross_layers is {self.cross_layers}: write its numbers in rising order",
        )
        require(
            self.learned_queries == "none" or not self.query_proj,
            f"learned_queries is {self.learned_queries!r}, which query_proj has no part in: leave out one",
        )
        require(
            self.latents_per_position == 1 or self.latent_keys == "context",
            f"latents_per_position is {self.latents_per_position}: that needs latent_keys 'context'",
        )
        require(
            self.local_context == 1 or self.latent_keys == "context",
            f"local_context is {self.local_context}: that needs latent_keys 'context'; or set it to 1",
        )
        if self.width_embed != self.dim:
            differs = f"embed_dim {self.width_embed} differs from dim {self.dim}"
            made = self.query_proj or self.learned_queries != "none"
            require(made, f"{differs}: that needs query_proj or learned_queries")
            require(self.latent_keys == "context", f"{differs}: that needs latent_keys 'context'")
            require(not self.tie_embeddings, f"{differs}: tie_embeddings needs them equal")
        require(
            not self.index_dims or self.position_table != "none",
            f"index_dims is {self.index_dims} but position_table is 'none': set position_table",
        )
        require(min(self.index_dims, default=1) >= 1, f"index_dims is {self.index_dims}: each size must be at least 1")
        require(
            self.position_table != "sinusoidal" or self.width_embed % 2 == 0,
            f"position_table is 'sinusoidal' and the embeddings' width {self.width_embed}: it must be even",
        )

    # Sizes with their defaults filled in.
    @property
    def width_embed(self) -> int:
        return self.embed_dim or self.dim

    @property
    def width_head(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    @property
    def heads_cross(self) -> int:
        return self.cross_num_heads or self.num_heads

    @property
    def width_head_cross(self) -> int:
        return self.cross_head_dim or self.head_dim or self.dim // self.heads_cross

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """Rows of each position table; () without tables."""
        return () if self.position_table == "none" else self.index_dims or (self.context_length,)

    @property
    def max_positions(self) -> int | None:
        """Positions the model can tell apart; None: any number (rotary only)."""
        return math.prod(self.table_sizes) if self.table_sizes else None

    @property
    def cacheable(self) -> bool:
        """Whether what is kept of latents serves the next token: not where they change when tokens follow, as with
        positions from the end or one learned query each; nor, because nobody needed it, with several per position."""
        return not self.positions_from_end and self.learned_queries != "each" and self.latents_per_position == 1

    @property
    def blocks_allowed(self) -> bool:
        """Whether a forward can have several blocks of latents: not where a token's key depends on whether it is a
        latent, or a latent on what follows."""
        return self.cacheable and self.latent_keys == "context"

    @classmethod
    def preset(cls, name: str, **settings: Any) -> Self:
        """The combination called `name` in `PRESETS`, with `settings` on top. Raises InputError if there is none."""
        require(name in PRESETS, f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **settings})

    def with_fixed_angles(self) -> Self:
        """The same network with its rotary base as a number, so that another context_length leaves all angles."""
        own = self.rotary and self.rotary_base is None
        return self.replace(rotary_base=float(self.context_length)) if own else self

    def replace(self, **settings: Any) -> Self:
        return dataclasses.replace(self, **settings)

    def to_json(self) -> str:
        """The content of `config.json`, without settings that are None and would be by default.

        (transformers' Trainer reads the file as a configuration of no known kind, and multiplies a `head_dim` that is
        there by `num_heads`.)
        """
        unset = {entry.name for entry in dataclasses.fields(self) if entry.default is None}
        settings = dataclasses.asdict(self)
        given = {name: value for name, value in settings.items() if value is not None or name not in unset}
        return json.dumps({"model_type": MODEL_TYPE, **given}, indent=2) + "\n"

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "the settings") -> Self:
        """Settings as read from JSON or YAML.

        Raises InputError, naming `where`, for those of another kind (`model_type`), unknown fields and wrong values.
        """
        settings = dict(settings)
        kind = settings.pop("model_type", MODEL_TYPE)
        if kind != MODEL_TYPE:
            raise InputError(f"{where}: model_type is {kind!r}, not {MODEL_TYPE!r}: this is another kind of model")
        # Other libraries add their own entries on saving; they do not change what the network computes.
        for foreign in ("architectures", "auto_map", "transformers_version", "torch_dtype", "dtype"):
            settings.pop(foreign, None)
        fields = {entry.name for entry in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - fields):
            raise InputError(f"{where}: unknown settings {unknown_words(unknown, fields)}")
        try:
            return cls(**settings)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads `config.json`, or the one in a directory. Raises InputError if it is missing, damaged or not ours."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{file}: no such file, so this is not a model directory") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is damaged ({error}): restore it, or train again") from None
        require(isinstance(settings, dict), f"{file} is damaged (not a JSON object): restore it, or train again")
        return cls.from_dict(BEFORE["model"] | settings, where=str(file))
