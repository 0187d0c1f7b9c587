"""Everything that defines a network, in one frozen dataclass; no torch here.

The defaults are what learned best in our measurements (docs/log.md). The fields below the first block exist so that one
network computes what each published implementation computes; `PRESETS` names those combinations.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from perceiver_ar.errors import InputError

MODEL_TYPE = "perceiver_ar"


@dataclass(frozen=True)
class PerceiverARConfig:
    """Settings of a `PerceiverAR`. Sizes are counts; rates are shares between 0 and 1."""

    vocab_size: int = 256
    """Number of different token ids; ids are 0 ... vocab_size - 1 and none of them is special to the model."""
    context_length: int = 4096
    """Most tokens the model sees at once: prefix and latents together."""
    num_latents: int = 512
    """Most positions that are queries, by default; each gives one next-token prediction."""
    dim: int = 512
    """Width of the latents' residual stream."""
    num_layers: int = 8
    """Self-attention layers over the latents."""
    num_heads: int = 8
    """Attention heads."""
    head_dim: int | None = None
    """Channels per head; None: dim / num_heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward blocks, as a multiple of their input width."""
    cross_layers: tuple[int, ...] = (0,)
    """Where cross-attention layers stand: each number is the self-attention layer it comes before (num_layers: after the
    last). (0,) is the paper; (0, 0) is two in a row; (0, 3) reads the context again before the fourth layer."""
    prefix_dropout: float = 0.0
    """Share of the prefix tokens dropped from each cross-attention in training (paper, section 3.2 and appendix)."""
    attention_dropout: float = 0.0
    """Dropout on cross-attention probabilities in training; needs a masked kernel, so it is slow."""
    mlp_dropout: float = 0.0
    """Dropout on the hidden units of the feed-forward blocks in training."""

    # Shape of a block.
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Pre-normalisation of every block."""
    qk_norm: bool = True
    """RMS-normalise queries and keys per head before the rotation."""
    activation: Literal["relu2", "gelu", "gelu_tanh"] = "relu2"
    """Feed-forward activation: squared ReLU, exact GELU, or its tanh form."""
    final_norm: bool = True
    """Normalise the latents before the logits."""
    tie_embeddings: bool = False
    """Logits from the transposed token embedding instead of an own matrix."""
    attention_bias: bool = False
    """Biases of the query, key and value projections."""
    out_bias: Literal["none", "cross", "all"] = "none"
    """Which attention output projections have a bias."""
    mlp_bias: bool = False
    """Biases of the feed-forward blocks."""
    logits_bias: bool = False
    """A bias per vocabulary entry."""
    init: Literal["zero_out", "torch", "normal", "fan_in"] = "zero_out"
    """zero_out: output projections and logits start at zero, the rest at std 1/sqrt(fan_in). torch: PyTorch's own
    (lucidrains). normal: std 0.02 (krasserm). fan_in: truncated normal 1/sqrt(fan_in), logits zero (google)."""

    # Positions.
    rotary: bool = True
    """Rotate queries and keys by their positions (RoPE, arXiv 2104.09864)."""
    rotary_fraction: float = 1.0
    """Share of each head's channels that is rotated: the first 2 * floor(fraction * head_dim / 2)."""
    rotary_heads_fraction: float = 1.0
    """Share of the heads that is rotated: the first floor(fraction * heads) (google)."""
    rotary_base: float | None = 10000.0
    """Slowest wavelength over 2 pi; None: context_length (google)."""
    rotary_endpoint: bool = False
    """Frequencies reach exactly 1 / rotary_base at the last band (google) instead of stopping one band before."""
    rotary_layers: int | None = None
    """How many of the first self-attention layers are rotated; None: all (krasserm)."""
    position_table: Literal["none", "learned", "sinusoidal"] = "none"
    """Vectors added to the token embeddings by position."""
    index_dims: tuple[int, ...] = ()
    """Sizes of the position tables, one per axis, (rows, columns, channels) for images; (): one of context_length."""
    query_position_offset: int = 0
    """Added to the latents' positions as queries, and as keys of self-attention (google's query offsetting)."""

    # What only some references have.
    latent_keys: Literal["context", "query"] = "context"
    """Cross-attention keys at latent positions come from the normalised context embedding (google), or from the
    normalised query stream (lucidrains, krasserm)."""
    query_proj: bool = False
    """A linear layer with bias from embeddings to the first latents (google)."""
    query_residual: bool = True
    """Add the cross-attention's output to its query."""
    mask_self_attention: bool = True
    """Padding is invisible to self-attention too. Only lucidrains' function masks the cross-attention alone."""
    embed_dim: int | None = None
    """Width of the token embeddings, if not dim (google; needs query_proj)."""
    cross_num_heads: int | None = None
    """Heads of the cross-attention, if not num_heads."""
    cross_head_dim: int | None = None
    """Channels per cross-attention head, if not head_dim."""
    cross_mlp_ratio: float | None = None
    """Feed-forward ratio in cross-attention layers, if not mlp_ratio."""

    def __post_init__(self) -> None:
        # YAML and JSON have lists where the fields are tuples.
        object.__setattr__(self, "cross_layers", tuple(self.cross_layers))
        object.__setattr__(self, "index_dims", tuple(self.index_dims))

        def require(ok: bool, message: str) -> None:
            if not ok:
                raise InputError(message)

        for name in ("vocab_size", "context_length", "num_latents", "dim", "num_heads"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        require(self.num_layers >= 0, f"num_layers is {self.num_layers}: it must not be negative")
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
            f"dim {self.dim} is not a multiple of cross_num_heads {self.heads_cross}: change one, or give cross_head_dim",
        )
        for name in ("head_dim", "embed_dim", "cross_num_heads", "cross_head_dim", "cross_mlp_ratio"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}: it must be positive, or left out")
        require(self.mlp_ratio > 0, f"mlp_ratio is {self.mlp_ratio}: it must be positive")
        for name in ("prefix_dropout", "attention_dropout", "mlp_dropout"):
            require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        for name in ("rotary_fraction", "rotary_heads_fraction"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}: it must be in [0, 1]")
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
            self.width_embed == self.dim or self.query_proj,
            f"embed_dim {self.width_embed} differs from dim {self.dim}: that needs query_proj",
        )
        require(
            self.width_embed == self.dim or self.latent_keys == "context",
            f"embed_dim {self.width_embed} differs from dim {self.dim}: that needs latent_keys 'context'",
        )
        require(
            self.width_embed == self.dim or not self.tie_embeddings,
            f"embed_dim {self.width_embed} differs from dim {self.dim}: tie_embeddings needs them equal",
        )
        require(
            not self.index_dims or self.position_table != "none",
            f"index_dims is {self.index_dims} but position_table is 'none': set position_table",
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

    @classmethod
    def preset(cls, name: str, **settings: Any) -> Self:
        """The combination called `name` in `PRESETS`, with `settings` on top.

        Raises:
            InputError: there is no such preset.
        """
        if name not in PRESETS:
            raise InputError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **settings})

    def replace(self, **settings: Any) -> Self:
        return dataclasses.replace(self, **settings)

    def to_json(self) -> str:
        return json.dumps({"model_type": MODEL_TYPE, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "the settings") -> Self:
        """Settings as read from JSON or YAML.

        Raises:
            InputError: not ours (`model_type`), unknown fields, or values that cannot work; names `where`.
        """
        settings = dict(settings)
        kind = settings.pop("model_type", MODEL_TYPE)
        if kind != MODEL_TYPE:
            raise InputError(f"{where}: model_type is {kind!r}, not {MODEL_TYPE!r}: this is another kind of model")
        # Other libraries add their own entries on saving; they do not change what the network computes.
        for foreign in ("architectures", "auto_map", "transformers_version", "torch_dtype", "dtype"):
            settings.pop(foreign, None)
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - fields):
            raise InputError(f"{where}: unknown settings {', '.join(unknown)}")
        try:
            return cls(**settings)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except TypeError as error:
            raise InputError(f"{where}: a value has the wrong type ({error})") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads `config.json`, or the one in a directory.

        Raises:
            InputError: missing, damaged, or not ours.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{file}: no such file, so this is not a model directory") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is damaged ({error}): restore it, or train again") from None
        if not isinstance(settings, dict):
            raise InputError(f"{file} is damaged (not a JSON object): restore it, or train again")
        return cls.from_dict(settings, where=str(file))


PRESETS: dict[str, dict[str, Any]] = {
    # What learned best at equal time in our measurements.
    "default": {},
    # Hawthorne et al. 2022 as released in google-research/perceiver-ar, rotary form (arXiv 2202.07765, appendix).
    "paper": {
        "norm": "layernorm",
        "qk_norm": False,
        "activation": "relu2",
        "attention_bias": True,
        "out_bias": "all",
        "mlp_bias": True,
        "logits_bias": True,
        "query_proj": True,
        "rotary_fraction": 0.5,
        "rotary_base": None,
        "rotary_endpoint": True,
        "prefix_dropout": 0.15,
        "init": "fan_in",
    },
    # perceiver-ar-pytorch 0.0.10 with its default head size 64; `compat.lucidrains` fills in the rest.
    "lucidrains": {
        "head_dim": 64,
        "norm": "layernorm",
        "qk_norm": False,
        "activation": "gelu",
        "out_bias": "cross",
        "final_norm": False,
        "rotary_fraction": 0.5,
        "position_table": "learned",
        "latent_keys": "query",
        "mask_self_attention": False,
        "init": "torch",
    },
    # perceiver-io's causal language model (krasserm) with its defaults.
    "krasserm": {
        "norm": "layernorm",
        "qk_norm": False,
        "activation": "gelu",
        "out_bias": "all",
        "final_norm": False,
        "tie_embeddings": True,
        "logits_bias": True,
        "rotary_fraction": 0.5,
        "rotary_layers": 1,
        "position_table": "learned",
        "latent_keys": "query",
        "prefix_dropout": 0.5,
        "init": "normal",
    },
}
