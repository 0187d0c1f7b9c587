"""A recipe: all settings of a run, and how they are read."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Self

from perceiver_ar.config.checks import Positive, check_fields, parse_duration, unknown_words
from perceiver_ar.config.network import BEFORE, PerceiverARConfig
from perceiver_ar.config.run import DataConfig, OptimConfig, TrainerConfig
from perceiver_ar.errors import InputError, require


@cache
def default_network() -> PerceiverARConfig:
    """`Recipe.model` if it is left out, always the same object: so init_from can tell it from equal settings given."""
    return PerceiverARConfig()


@dataclass(frozen=True)
class Recipe:
    """The complete settings of a run: training one again reproduces it."""

    paths: tuple[str, ...] = ()
    """Files, folders, globs, - for standard input, or hf://datasets/OWNER/NAME; none: the Python standard library's
    source."""
    out: str = ""
    """The run directory to make."""
    modality: Literal["auto", "text", "bytes", "midi", "image", "audio", "integers", "genome"] = "auto"
    """text: valid UTF-8 only; bytes: any file; auto: recognised from the files."""
    init_from: str | None = None
    """Trained run, or folder with an exported one, from which to take weights, network and codec. Of these, only
    model.context_length (without position tables), num_latents, prefix_chunk and dropout can be changed.
    None: train from scratch."""
    adapter: Literal["lora"] | None = None
    """lora: train small low-rank additions to the projections of init_from, whose own weights stay as they are. The
    run's weights are the sum of both; its folder adapter/ holds the additions alone, for the PEFT library. None: train
    all weights."""
    adapter_rank: Positive | None = None
    """Rank of the additions; None: 16."""
    max_time: str | None = None
    """Training time, such as 90s, 5m or 1h30m; the learning rate schedule fits into it. none: overrides the time in a
    --config file, so that only max_steps counts."""
    max_steps: int | None = None
    """Number of optimizer steps to train. Without max_steps and max_time: 10 minutes."""
    seed: int = 0
    """Seed of the split, the weights and the order of the windows."""
    model: PerceiverARConfig = field(default_factory=default_network)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.out != "", "out is missing: name the run directory to make, as in --out runs/mine")
        require(self.init_from != "", "init_from is empty: name a trained run, or leave it out")
        require(
            self.adapter is None or self.init_from is not None,
            f"adapter is {self.adapter!r}, but init_from is missing: name the trained run to adapt",
        )
        require(
            self.adapter is not None or self.adapter_rank is None,
            f"adapter_rank is {self.adapter_rank}, but adapter is missing: give --adapter lora, or leave it out",
        )
        require(
            self.adapter is None or not self.trainer.sharded,
            "trainer.strategy is 'fsdp', which cannot train an adapter: leave it out, or adapter",
        )
        require(
            self.adapter is None or self.optim.muon_lr == OptimConfig.muon_lr,
            f"optim.muon_lr is {self.optim.muon_lr}, but AdamW trains an adapter: give optim.lr instead",
        )
        if self.adapter is not None:
            object.__setattr__(self, "adapter_rank", self.adapter_rank or 16)
            lr = 0.01 if self.optim.lr is None else self.optim.lr
            object.__setattr__(self, "optim", dataclasses.replace(self.optim, lr=lr))
        require(
            self.data.condition_text is None or self.data.conditions is not None or self.init_from is not None,
            f"data.condition_text is {self.data.condition_text!r}, a column of a table, but there is no table: give "
            "data.conditions, too",
        )
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
    def limits(self) -> str:
        """max_steps and max_time, for messages."""
        steps = None if self.max_steps is None else f"{self.max_steps:,} steps"
        return " or ".join(limit for limit in (steps, self.max_time) if limit is not None)

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


def flat(settings: dict[str, Any], group: str = "") -> dict[str, Any]:
    """Nested settings as one flat dict, with names such as model.dim."""
    parts = (
        flat(value, f"{name}.") if isinstance(value, dict) else {group + name: value}
        for name, value in settings.items()
    )
    return {name: value for part in parts for name, value in part.items()}


def names_all(group: str, settings: Any) -> bool:
    """Whether these settings of a group, such as "trainer", are a whole one of this or an older version."""
    kind = {"model": PerceiverARConfig, "trainer": TrainerConfig}[group]
    names = {entry.name for entry in dataclasses.fields(kind)}
    return isinstance(settings, Mapping) and names <= {*settings, *BEFORE[group]}
