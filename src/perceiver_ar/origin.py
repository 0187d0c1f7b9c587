"""The start of a run that is not trained from scratch: weights, network and codec of a trained run.

`Recipe.init_from` names the trained run. The new run keeps a copy (`Run.initial`), so it does not depend on it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from perceiver_ar.config import DataConfig, PerceiverARConfig, Recipe, default_network
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.data.modalities import codec_settings
from perceiver_ar.data.text import TokenizerCodec
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_directory
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.run import Run

FREE = ("context_length", "num_latents", "prefix_dropout", "attention_dropout", "mlp_dropout", "prefix_chunk")
"""Settings of a network that its weights do not depend on."""
CODEC_SETTINGS = (
    *("tokenizer", "bpe_vocab_size", "midi_tokens", "image_size", "image_colours", "palette_size", "classes"),
    *("audio_codec", "sample_rate", "audio_weights", "codebooks", "kmer", "condition_text"),
)
"""Settings of `DataConfig` that determine the codec."""


@dataclass(frozen=True)
class Origin:
    """The trained run from which a new run starts."""

    path: str
    network: PerceiverARConfig
    codec: Codec
    recipe: Recipe | None
    """How it was trained. None: unknown, as with an export or a converted checkpoint."""

    @classmethod
    def open(cls, path: str) -> Self:
        """Reads everything but the weights. Raises InputError if the run, or a part of it, is missing or damaged."""
        require(
            Path(path).exists(),
            f"init_from is {path!r}, and there is no such run: check the path; for a run on the Hugging Face Hub, "
            "first use `hf download OWNER/NAME --local-dir NAME`",
        )
        run = Run.open(path)
        network, codec = PerceiverARConfig.load(run.path).with_fixed_angles(), load_codec(run.path)
        fitting = codec.fit(network)
        wrong = [f"{name} {value!r}" for name, value in vars(network).items() if value != getattr(fitting, name)]
        require(
            not wrong,
            f"init_from is {path!r}, whose codec.json does not match {', '.join(wrong)} in its config.json: take both "
            "files from the same run",
        )
        return cls(path, network, codec, run.recipe() if run.recipe_file.exists() else None)

    def settings(self) -> dict[str, Any]:
        """All settings that a new run takes from it, by names such as "model.dim"."""
        data = {f"data.{name}": getattr(DataConfig(), name) for name in CODEC_SETTINGS} | codec_settings(self.codec)
        text = next((field for field, values in self.codec.conditions.items() if isinstance(values, int)), None)
        data["data.condition_text"] = text
        return data | {f"model.{name}": value for name, value in vars(self.network).items()}

    def complete(self, recipe: Recipe) -> Recipe:
        """`recipe` with the settings that it leaves out: the whole network, or data settings that have their defaults.

        Raises InputError as `check`.
        """
        settings, base = self.settings(), self.network.rotary_base
        if recipe.model.rotary_base is None and base == self.network.context_length:  # None in the trained run, too
            recipe = replace(recipe, model=recipe.model.replace(rotary_base=base))
        data = replace(DataConfig(), **{name: settings[f"data.{name}"] for name in CODEC_SETTINGS})
        recipe = fill_in(recipe, self.network, settings["modality"], data)
        self.check(recipe)
        return recipe

    def check(self, recipe: Recipe) -> None:
        """Raises InputError if `recipe` contradicts the trained run, or has the same folder as `out`."""
        require(
            os.path.realpath(self.path) != os.path.realpath(recipe.out),
            f"init_from and out are both {recipe.out}: give the new run another --out; to train the same one further, "
            "use --resume",
        )
        if changes := list(self._changes(recipe)):
            names = ", ".join(name for name, _ in changes)
            raise InputError(
                f"init_from takes network and codec of {self.path}, but {'; '.join(text for _, text in changes)}: "
                f"leave out {names} or give the same value, or train from scratch without init_from"
            )

    def _changes(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """Contradicting settings of `recipe`: (name, phrase with its value and the trained run's)."""
        taken, model = self.settings(), recipe.model
        free = set(FREE) - self._fixed().keys()
        for name in (entry.name for entry in fields(model) if entry.name not in free):
            asked, own = getattr(model, name), taken[f"model.{name}"]
            if name == "rotary_base" and asked is None and model.context_length == own:
                continue
            if asked != own:
                why = f", {self._fixed()[name]}" if name in self._fixed() else ""
                yield f"model.{name}", f"model.{name} is {asked!r} instead of {own!r}{why}"
        for name in ("modality", *(f"data.{name}" for name in CODEC_SETTINGS)):
            asked, own = _value(recipe, name), taken[name]
            before = own if self.recipe is None else _value(self.recipe, name)
            if asked not in (own, before, None, "auto") and not self._same_tokenizer(name, asked):
                size = f"a tokenizer of {self.codec.plain.vocab_size:,} ids"
                other = size if isinstance(self.codec.plain, TokenizerCodec) else "no tokenizer"
                other = "none" if name == "data.condition_text" else other
                yield name, f"{name} is {asked!r} instead of {other if own is None else repr(own)}"

    def _fixed(self) -> dict[str, str]:
        """Settings of `FREE` that this network fixes nevertheless, with the reason."""
        fixed = {}
        if self.network.position_table != "none":
            fixed["context_length"] = f"with a {self.network.position_table} position table of that length"
        if self.codec.document_length is not None:
            fixed["context_length"] = "the values of a picture"
        if self.network.learned_queries == "each":
            fixed["num_latents"] = "each with a learned query"
        return fixed

    def _same_tokenizer(self, name: str, asked: Any) -> bool:
        codec = self.codec.plain
        if not isinstance(codec, TokenizerCodec):
            return False
        if name == "data.bpe_vocab_size":
            return asked == codec.vocab_size
        other = TokenizerCodec.from_file(asked) if name == "data.tokenizer" else None
        return other is not None and other.tokenizer.to_str() == codec.tokenizer.to_str()

    def write(self, network: PerceiverARConfig, directory: Path) -> None:
        """Writes the weights, with `network` as configuration, and the codec into a new `directory`, atomically.

        Raises InputError if the weights are missing or damaged.
        """
        with atomic_directory(directory) as folder:
            model = PerceiverAR(network)
            model.load_tensors(PerceiverAR.from_pretrained(self.path).stored_tensors(), where=self.path)
            model.save_pretrained(folder)
            save_codec(self.codec, folder)


def fill_in(recipe: Recipe, network: PerceiverARConfig, modality: str, data: DataConfig) -> Recipe:
    """`recipe` with this network, modality and codec settings in place of those that it leaves out."""
    model = network if recipe.model is default_network() else recipe.model
    left_out = [name for name in CODEC_SETTINGS if getattr(recipe.data, name) == getattr(DataConfig(), name)]
    return replace(
        recipe,
        model=model.replace(vocab_size=network.vocab_size),  # which training sets in any case
        modality=modality if recipe.modality == "auto" else recipe.modality,
        data=replace(recipe.data, **{name: getattr(data, name) for name in left_out}),
    )


def _value(recipe: Recipe, name: str) -> Any:
    return getattr(recipe.data, name.removeprefix("data.")) if name.startswith("data.") else getattr(recipe, name)
