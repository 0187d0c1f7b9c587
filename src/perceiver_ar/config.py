"""Every setting, in dataclasses whose field docstrings are the command line's help; no torch here.

`PerceiverARConfig` defines a network, `Recipe` a whole run. The defaults are what learned best in our measurements
(docs/log.md). The network's fields after the first block exist so that one network computes what each published
implementation computes; `PRESETS` names those combinations.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import yaml

from perceiver_ar.errors import InputError, require

MODEL_TYPE = "perceiver_ar"
BEFORE: dict[str, dict[str, Any]] = {"model": {"local_context": 1}, "trainer": {"blocks": 1}}
"""Values of settings, by group, that a config.json or recipe.yaml of older runs does not name."""


@dataclass(frozen=True)
class PerceiverARConfig:
    """Settings of a `PerceiverAR`. Sizes are counts; rates are shares between 0 and 1."""

    vocab_size: int = 256
    """Number of different token ids; ids are 0 ... vocab_size - 1 and none of them is special to the model.
    Training sets it to what its data have."""
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
    """Where cross-attention layers stand: each number is the self-attention layer it comes before (num_layers: after
    the last). (0,) is the paper; (0, 0) is two in a row; (0, 3) reads the context again before the fourth layer."""
    local_context: int = 4
    """Number of tokens that an embedding knows: its own and those before it, by a causal depthwise convolution. More
    than 1: in cross-attention, the second half of each head's channels searches by content: it is not rotated, and its
    keys are those of the token before, so that latents find what followed where the same tokens stood before.
    1: embeddings of single tokens, as the references have them, and as in a config.json without this setting."""
    prefix_dropout: float = 0.0
    """Share of the prefix tokens dropped from each cross-attention in training (paper, section 3.2 and appendix)."""
    attention_dropout: float = 0.0
    """Dropout on cross-attention probabilities in training; needs a masked kernel, so it is slow."""
    mlp_dropout: float = 0.0
    """Dropout on the hidden units of the feed-forward blocks in training."""
    prefix_chunk: int | None = None
    """Tokens of the prefix that cross-attention reads at once, so that memory does not grow with the context; the
    results are the same. 0: all at once; None: all, unless their keys and values would take 1/128 of the memory, or on
    a CPU 32 MiB."""

    # Shape of a block.
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Pre-normalisation of every block."""
    qk_norm: bool = True
    """Normalise queries and keys per head, in the manner of `norm` but without weights, before the rotation."""
    activation: Literal["relu2", "relu", "gelu", "gelu_tanh"] = "relu2"
    """Feed-forward activation: squared ReLU, ReLU, exact GELU, or its tanh form."""
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
    """Share of each head's channels that is rotated: the first 2 * floor(fraction * head_dim / 2); in cross-attention
    with local_context at most the first half."""
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
    positions_from_end: bool = False
    """Positions count backwards, and the last token of the context is 0 (google without positions from the data)."""
    query_position_offset: int = 0
    """Added to the latents' positions as queries, and as keys of self-attention (google's query offsetting)."""

    # What only some references have.
    latent_keys: Literal["context", "query"] = "context"
    """Cross-attention keys at latent positions come from the normalised context embedding (google), or from the
    normalised query stream (lucidrains, krasserm)."""
    query_proj: bool = False
    """A linear layer with bias from embeddings to the first latents (google)."""
    query_mlp_layers: int = 0
    """Linear layers, each followed by the activation, that the first latents go through (google)."""
    query_mlp_activation: Literal["relu2", "relu", "gelu", "gelu_tanh"] | None = None
    """Activation of these layers, if not `activation`."""
    learned_queries: Literal["none", "shared", "each"] = "none"
    """First latents that are learned, not read from the tokens: one for all, or one each of num_latents (google)."""
    latents_per_position: int = 1
    """Latents at each latent position, which see each other and are averaged before the logits (google)."""
    query_residual: bool = True
    """Add the cross-attention's output to its query."""
    mask_self_attention: bool = True
    """Padding is invisible to self-attention too. Only lucidrains' function masks the cross-attention alone."""
    embed_dim: int | None = None
    """Width of the token embeddings, if not dim (google; needs query_proj or learned_queries)."""
    cross_num_heads: int | None = None
    """Heads of the cross-attention, if not num_heads."""
    cross_head_dim: int | None = None
    """Channels per cross-attention head, if not head_dim."""
    cross_mlp_ratio: float | None = None
    """Feed-forward ratio in cross-attention layers, if not mlp_ratio."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in (
            "vocab_size",
            "context_length",
            "num_latents",
            "dim",
            "num_heads",
            "latents_per_position",
            "local_context",
        ):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("num_layers", "query_mlp_layers"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}: it must not be negative")
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
        for name in ("head_dim", "embed_dim", "cross_num_heads", "cross_head_dim", "cross_mlp_ratio", "rotary_base"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < math.inf, f"{name} is {value}: it must be positive and finite, or left out"
            )
        require(0 < self.mlp_ratio < math.inf, f"mlp_ratio is {self.mlp_ratio}: it must be positive and finite")
        for name, ratio in {"mlp_ratio": self.mlp_ratio, "cross_mlp_ratio": self.cross_mlp_ratio or 1.0}.items():
            require(
                int(self.dim * ratio) >= 1, f"{name} is {ratio}: with dim {self.dim} that is no hidden unit, raise it"
            )
        require(
            self.prefix_chunk is None or self.prefix_chunk >= 0,
            f"prefix_chunk is {self.prefix_chunk}: it must be at least 1, 0 for no pieces, or left out",
        )
        require(
            self.rotary_layers is None or self.rotary_layers >= 0,
            f"rotary_layers is {self.rotary_layers}: it must not be negative, or be left out for all",
        )
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
        require(
            self.width_embed == self.dim or self.query_proj or self.learned_queries != "none",
            f"embed_dim {self.width_embed} differs from dim {self.dim}: that needs query_proj or learned_queries",
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
        fields = {entry.name for entry in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - fields):
            raise InputError(f"{where}: unknown settings {unknown_words(unknown, fields)}")
        try:
            return cls(**settings)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

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
        return cls.from_dict(BEFORE["model"] | settings, where=str(file))


PRESETS: dict[str, dict[str, Any]] = {
    # What learned best at equal time in our measurements.
    "default": {},
    # Hawthorne et al. 2022 as released in google-research/perceiver-ar, rotary form (arXiv 2202.07765, appendix).
    "paper": {
        "local_context": 1,
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
        "local_context": 1,
        "head_dim": 64,
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
        "local_context": 1,
        "qk_norm": False,
        "activation": "gelu",
        "out_bias": "cross",
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


@dataclass(frozen=True)
class DataConfig:
    """Which part of the files is what, and how they become tokens."""

    validation: tuple[str, ...] | str = ()
    """A file or folder to hold out for measuring, or a list of them, instead of a share of the documents."""
    validation_fraction: float = 0.05
    """Share of the bytes held out, as whole documents."""
    split_on: str | None = None
    """Text between documents in one file, not kept itself, such as '\\n\\n\\n\\n'; None: a file is a document."""
    column: str = "text"
    """Which column of .jsonl, .ndjson, .csv, .tsv, .parquet and .arrow files holds the text, or which field of a field
    (doc.text); each of their rows is a document."""
    group_by: str | None = None
    """Regular expression: files in whose names it finds the same are held out together, or not at all. '(.*)__' keeps
    the performances of Piece__Performer.mid on one side, '(.*)/' the files of a folder. None: each file for itself."""
    augment: bool = True
    """Train on variants of windows where the modality has some: music in other keys, faster, slower, louder, softer."""
    tokenizer: str | None = None
    """A Hugging Face tokenizers file (tokenizer.json); None: every byte is a token."""
    bpe_vocab_size: int | None = None
    """Train a byte-level BPE tokenizer of this size on the files first."""

    midi_tokens: Literal["performance", "remi", "tsd", "midilike"] = "performance"
    """performance: note on, note off, time shift, velocity: 388 events; the others as MidiTok has them."""
    image_size: tuple[int, int] = (32, 32)
    """Rows and columns that pictures are scaled and cut to; the model's context_length follows from it."""
    image_colours: Literal["rgb", "grey", "palette"] = "rgb"
    """Three ids a pixel (red, green, blue), or one: its grey, or the nearest of palette_size colours."""
    palette_size: int = 256
    """Colours of a palette, chosen from the pictures."""
    classes: bool = False
    """Put a token for the class, which is the folder a picture lies in, before each; --prompt then names a class."""
    audio_codec: Literal["mulaw", "encodec", "dac", "mimi"] = "mulaw"
    """8-bit mu-law samples, without any model; or the codes of a neural codec."""
    sample_rate: int = 16_000
    """Samples a second of mu-law; recordings are resampled. Neural codecs have their own."""
    audio_weights: str | None = None
    """A neural codec's weights: a folder, or a name on the Hub; None: the usual ones of the Hub."""
    codebooks: int | None = None
    """How many of a neural codec's codebooks to use, the coarse ones first; None: eight, or all if it has fewer."""

    def __post_init__(self) -> None:
        _check_types(self, "data.")
        if isinstance(self.validation, str):
            object.__setattr__(self, "validation", (self.validation,))
        for name in ("palette_size", "codebooks", "sample_rate"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name} is {value}: it must be at least 1")
        require(self.palette_size <= 256, f"data.palette_size is {self.palette_size}: it must be at most 256")
        require(min(self.image_size) >= 1, f"data.image_size is {self.image_size}: rows and columns must be at least 1")
        if self.split_on is not None:  # shells pass backslashes on
            object.__setattr__(
                self, "split_on", self.split_on.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
            )
        require(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction is {self.validation_fraction}: it must be in [0, 1)",
        )
        if self.group_by is not None:
            try:
                re.compile(self.group_by)
            except re.error as error:
                raise InputError(f"data.group_by {self.group_by!r} is no regular expression ({error})") from None
        require(self.split_on != "", "data.split_on is empty: give a text, or leave it out")
        require(
            self.bpe_vocab_size is None or self.bpe_vocab_size > 256,
            f"data.bpe_vocab_size is {self.bpe_vocab_size}: it must be more than 256, the single bytes",
        )
        require(
            self.tokenizer is None or self.bpe_vocab_size is None,
            "data.tokenizer and data.bpe_vocab_size are both given: choose one",
        )


@dataclass(frozen=True)
class OptimConfig:
    """The learning rule. Learning rates are peaks; the schedule scales them all alike."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for hidden matrices and AdamW for the rest; adamw: AdamW for all."""
    muon_lr: float = 0.02
    """Peak learning rate of the hidden matrices under Muon."""
    lr: float | None = None
    """Peak learning rate of AdamW; None: 0.03 for what is left to it beside Muon, 0.003 where it does all."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, per unit of learning rate."""
    momentum: float = 0.95
    """Muon's momentum."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warmup, stable, then linear decay to zero; cosine: warmup, then a half cosine to zero; or constant."""
    warmup: float = 0.02
    """Share of the run over which learning rates rise from zero."""
    decay: float = 0.6
    """wsd: share of the run over which they fall to zero."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    skip_spikes: float = 0.0
    """Skip a step whose gradient norm is more than so many times the median of the last 100; 0: none, 10 is careful."""
    label_smoothing: float = 0.0
    """Share of each target spread over all other ids. Held-out text is measured without."""
    z_loss: float = 0.0
    """Weight of log^2(sum exp(logits)) in the loss, which keeps logits from drifting, such as 1e-4. Held-out text is
    measured without."""
    ema: float = 0.0
    """Share of the old in a running mean of the weights, taken at every step, which is then what is measured and
    written; such as 0.999. 0: the weights themselves."""

    def __post_init__(self) -> None:
        _check_types(self, "optim.")
        for name in ("muon_lr", "lr", "weight_decay", "grad_clip", "skip_spikes", "label_smoothing", "z_loss"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"optim.{name} is {value}: it must not be negative")
        require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas is {self.betas}: both must be in [0, 1)")
        for name in ("warmup", "decay", "momentum"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name} is {getattr(self, name)}: it must be in [0, 1]")
        require(0 <= self.ema < 1, f"optim.ema is {self.ema}: it must be in [0, 1)")

    @property
    def adamw_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        return 3e-2 if self.name == "muon" else 3e-3


@dataclass(frozen=True)
class TrainerConfig:
    """How the run goes through its steps."""

    batch_size: int = 4
    """Windows per optimizer step."""
    blocks: int | None = None
    """How many times num_latents targets each window has, one block behind the other. They share the text before, whose
    keys and values are made once, so a step learns from more tokens in less time; but fewer texts are in it.
    None: 4, or as many as half of the context holds; 1 with prefix dropout, and where a network allows no more."""
    micro_batch_size: int | None = None
    """Windows per forward pass on each device; less than its share of batch_size accumulates gradients in less memory.
    None: all its share."""
    devices: int = 1
    """Devices that share each step, each with a process of its own; torchrun and SLURM say it themselves."""
    prefix_ranks: int = 1
    """How many devices read the same windows, a share of the prefix each, so that context can grow with their number;
    devices / prefix_ranks groups of them share the windows of a step."""
    short_prefix: float = 0.5
    """Share of the steps whose windows have their prefix cut to 3/4, 1/2, 1/4 or nothing of it, at random.
    Always whole, the model would not learn to write from little, and less prefix is less work."""
    prefix_growth: float = 0.0
    """Share of the run over which the longest prefix grows from nothing to whole, by quarters: what is near is learned
    first, at less cost. 0: it is whole from the start."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each of several devices holds the whole network; fsdp: a share of weights, gradients and optimizer state."""
    precision: Literal["auto", "32", "bf16", "fp16"] = "auto"
    """auto: bfloat16 autocast where the processor is faster at it, else float32; the recipe keeps which it was."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    compile: bool = False
    """torch.compile the network: minutes of compilation, then faster steps."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, a third more time."""
    evaluations: int = 10
    """How many times, evenly spread over the run, to measure and to sample."""
    evaluation_tokens: int = 100_000
    """Held-out tokens to score each time, in windows from everywhere; at the end, the first ten times as many."""
    sample_tokens: int = 200
    """Length of the samples, 0: none; the last one of pictures is a whole picture."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Where metrics go beside metrics.csv and TensorBoard (which is taken where it is installed); each is an extra."""
    checkpoint_every: str = "60s"
    """Time between checkpoints, as in max_time; there is one after each evaluation, too."""
    keep_best: int = 1
    """How many of the checkpoints that predicted held-out text best to keep, beside the last two."""

    def __post_init__(self) -> None:
        _check_types(self, "trainer.")
        for name in ("batch_size", "blocks", "micro_batch_size", "devices", "prefix_ranks"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"trainer.{name} is {value}: it must be at least 1")
        require(
            self.devices == 1 or self.devices % self.prefix_ranks == 0,
            f"trainer.prefix_ranks is {self.prefix_ranks}, which does not divide devices {self.devices}",
        )
        ranks = f"devices {self.devices}" + (f" / prefix_ranks {self.prefix_ranks}" if self.prefix_ranks > 1 else "")
        require(
            self.batch_size % self.data_ranks == 0,
            f"trainer.batch_size {self.batch_size} is not a multiple of {ranks}, which share it: "
            f"set it to {-(-self.batch_size // self.data_ranks) * self.data_ranks}",
        )
        each = self.data_ranks * self.micro_batch
        require(
            self.batch_size % each == 0,
            f"trainer.batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            + (f" times {ranks}" if self.data_ranks > 1 else "")
            + f": set it to {-(-self.batch_size // each) * each}",
        )
        for name in ("short_prefix", "prefix_growth"):
            require(0 <= getattr(self, name) <= 1, f"trainer.{name} is {getattr(self, name)}: it must be in [0, 1]")
        for name in ("evaluations", "sample_tokens", "keep_best"):
            require(getattr(self, name) >= 0, f"trainer.{name} is {getattr(self, name)}: it must not be negative")
        require(
            self.evaluation_tokens >= 2, f"trainer.evaluation_tokens is {self.evaluation_tokens}: it must be at least 2"
        )
        parse_duration(self.checkpoint_every, "trainer.checkpoint_every")

    @property
    def data_ranks(self) -> int:
        """Groups of devices that share the windows of a step."""
        return max(1, self.devices // self.prefix_ranks)

    @property
    def micro_batch(self) -> int:
        """micro_batch_size with its default filled in."""
        return self.micro_batch_size or self.batch_size // self.data_ranks

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp" and self.devices > 1


@cache
def default_network() -> PerceiverARConfig:
    """`Recipe.model` if it is left out, always the same object: so init_from can tell it from equal settings given."""
    return PerceiverARConfig()


@dataclass(frozen=True)
class Recipe:
    """The complete settings of a run: training one again reproduces it."""

    paths: tuple[str, ...] = ()
    """Files, folders, globs, or - for standard input; none: the Python standard library's source."""
    out: str = ""
    """The run directory to make."""
    modality: Literal["auto", "text", "bytes", "midi", "image", "audio", "integers"] = "auto"
    """text: valid UTF-8 only; bytes: any file; auto: what the files are."""
    init_from: str | None = None
    """A trained run, or a folder with an exported one, to start from: its weights, network and tokens (codec). They
    cannot be changed, but for model.context_length (unless positions are learned), num_latents and dropout.
    None: train from scratch."""
    max_time: str | None = None
    """How long to train, such as 90s, 5m or 1h30m; the learning rate falls accordingly. none: as long as max_steps
    take, where a --config file says something else."""
    max_steps: int | None = None
    """How many optimizer steps to train. With neither: 10 minutes."""
    seed: int = 0
    """Seed of the split, the weights and the order of the windows."""
    model: PerceiverARConfig = field(default_factory=default_network)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        _check_types(self)
        require(self.out != "", "out is missing: name the run directory to make, as in --out runs/mine")
        require(self.init_from != "", "init_from is empty: name a trained run, or leave it out")
        require(self.max_steps is None or self.max_steps >= 1, f"max_steps is {self.max_steps}: it must be at least 1")
        require(
            self.modality in ("auto", "text") or (self.data.tokenizer is None and self.data.bpe_vocab_size is None),
            f"modality is {self.modality!r}, but a tokenizer reads text: leave out one of them",
        )
        most = 1 - 1 / self.model.vocab_size  # there all ids are alike
        require(
            self.optim.label_smoothing == 0 or self.optim.label_smoothing < most,
            f"optim.label_smoothing is {self.optim.label_smoothing}: with {self.model.vocab_size} ids it must be in "
            f"[0, {most:.4g})",
        )
        require(
            self.trainer.prefix_ranks == 1 or self.model.attention_dropout == 0,
            f"model.attention_dropout is {self.model.attention_dropout}, which needs the whole prefix on each device: "
            "set it to 0, or trainer.prefix_ranks to 1",
        )
        if self.max_time in ("none", "null"):
            object.__setattr__(self, "max_time", None)
        if self.max_time is not None:
            parse_duration(self.max_time, "max_time")
        elif self.max_steps is None:
            object.__setattr__(self, "max_time", "10m")

    @property
    def blocks(self) -> int:
        """trainer.blocks with its default filled in."""
        if self.trainer.blocks is not None:
            return self.trainer.blocks
        if self.model.prefix_dropout > 0 or not self.model.blocks_allowed:
            return 1
        return max(1, min(4, self.model.context_length // (2 * self.model.num_latents)))

    @property
    def window_latents(self) -> int:
        """Latents of a training window, in all its blocks."""
        return self.blocks * self.model.num_latents

    @property
    def max_seconds(self) -> float | None:
        return None if self.max_time is None else parse_duration(self.max_time, "max_time")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as in `recipe.yaml`; tuples as lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "the settings") -> Self:
        """The inverse of `to_dict`. Raises InputError that names `where` for what does not belong."""
        groups = {"model": PerceiverARConfig, "data": DataConfig, "optim": OptimConfig, "trainer": TrainerConfig}
        known, given = {entry.name for entry in dataclasses.fields(cls)}, set(map(str, settings))
        try:
            for name in groups:
                group = settings.get(name) or {}
                require(isinstance(group, Mapping), f"{name} is {group!r}: it must be a group of settings")
                known |= {f"{name}.{entry.name}" for entry in dataclasses.fields(groups[name])}
                given |= {f"{name}.{setting}" for setting in group}
            if unknown := sorted(given - known):
                words = unknown_words(unknown, known)
                raise InputError(f"unknown settings {words}: is this a recipe of perceiver-ar?")
            parts = {name: group(**settings[name]) for name, group in groups.items() if settings.get(name)}
            return cls(**{name: value for name, value in settings.items() if name not in groups}, **parts)
        except (InputError, TypeError) as error:
            raise InputError(f"{where}: {error}") from None


class SettingsLoader(yaml.SafeLoader):
    """YAML with numbers as in JSON and YAML 1.2: 2e-2 is one; 1:30 and 010 are text, as are dates."""


class SettingsDumper(yaml.SafeDumper):
    """Quotes text that SettingsLoader, or another reader of YAML, would take for a number."""


NUMBER, DECIMALS = "[-+]?(?:0|[1-9][0-9_]*)", r"\.[0-9_]*"
FLOAT = rf"{NUMBER}{DECIMALS}(?:[eE][-+]?[0-9]+)?|{NUMBER}[eE][-+]?[0-9]+|[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?"
SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in entries if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for reader in (SettingsLoader, SettingsDumper):
    for name, pattern in (("int", NUMBER), ("float", rf"{FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")):
        reader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), list("-+.0123456789"))


def _represent_text(dumper: SettingsDumper, text: str) -> yaml.ScalarNode:
    """Escapes the line breaks of Unicode: within other quotes they would be read as spaces."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


SettingsDumper.add_representer(str, _represent_text)


def load_yaml(text: str) -> Any:
    """What a file of settings says. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=SettingsLoader)


def dump_yaml(settings: Any) -> str:
    return yaml.dump(settings, Dumper=SettingsDumper, sort_keys=False, allow_unicode=True)


def names_all(group: str, settings: Any) -> bool:
    """Whether these settings of a group, such as "trainer", are a whole one of this or an older version."""
    kind = {"model": PerceiverARConfig, "trainer": TrainerConfig}[group]
    names = {entry.name for entry in dataclasses.fields(kind)}
    return isinstance(settings, Mapping) and names <= {*settings, *BEFORE[group]}


def unknown_words(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Names that there are not, each with the nearest one that there is, if any is near."""
    known = sorted(known)

    def nearest(name: str) -> str:
        last = name.lstrip("-").rpartition(".")[2]
        same = [other for other in known if other.lstrip("-").rpartition(".")[2] == last]  # in another group
        near = same[:1] or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        return f" (did you mean {near[0]}?)" if near else ""

    return ", ".join(f"{name}{nearest(name)}" for name in unknown)


def parse_duration(text: str, name: str) -> float:
    """Seconds in a text such as "90s", "5m", "1h30m" or "2d". Raises InputError naming the setting `name`."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?", str(text).strip())
    if not match or not any(match.groups()):
        example = f"{text}s".replace(" ", "") if re.fullmatch(r"\s*[1-9]\d*\s*", str(text)) else "90s"
        raise InputError(f"{name} is {text!r}: write a duration such as {example}, 5m or 1h30m")
    seconds = sum(float(n or 0) * unit for n, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
    if seconds <= 0:
        raise InputError(f"{name} is {text!r}: it must be more than nothing")
    return seconds


def _check_types(settings: Any, group: str = "") -> None:
    """Refuses values that are not of their field's type; lists, which YAML and JSON have, become tuples."""
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, (list, tuple)):
            value = tuple(value)
            object.__setattr__(settings, name, value)
        choices = [
            choice for part in (kind, *get_args(kind)) if get_origin(part) is Literal for choice in get_args(part)
        ]
        words = " or ".join(map(repr, choices)) or (str(kind) if get_args(kind) else kind.__name__)
        require(_fits(value, kind), f"{group}{name} is {value!r}: it must be {words}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        kinds = [part for part in get_args(kind) if part is not Ellipsis]
        kinds = kinds * len(value) if Ellipsis in get_args(kind) and isinstance(value, tuple) else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if get_origin(kind) in (UnionType, Union):
        return any(_fits(value, choice) for choice in get_args(kind))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)
