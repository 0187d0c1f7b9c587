"""The settings of a network as a configuration of Hugging Face transformers."""

import dataclasses
import json
from typing import Any

from transformers import PreTrainedConfig

from perceiver_ar.config import BEFORE, MODEL_TYPE, PerceiverARConfig
from perceiver_ar.errors import require

THEIR_NAMES = {"hidden_size": "dim", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
               "n_positions": "context_length", "tie_word_embeddings": "tie_embeddings"}  # fmt: skip
"""transformers' names of our settings, for reading only: they are set under our names."""


class PerceiverARModelConfig(PreTrainedConfig):
    """A `PerceiverARConfig`, in `network`, with the names that transformers asks for. Its JSON is that of a run."""

    model_type = MODEL_TYPE

    def __init__(self, network: PerceiverARConfig | None = None, **settings: Any) -> None:
        """settings: transformers' own."""
        self.network = network or PerceiverARConfig()
        for_trl = {"architectures": ["PerceiverARForCausalLM"], "auto_map": {}}
        super().__init__(**for_trl | settings)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From the content of a run's `config.json`, changed by settings of the network in kwargs.

        Raises InputError for settings that the network does not have.
        """
        names = {entry.name for entry in dataclasses.fields(PerceiverARConfig)}
        for theirs, ours in THEIR_NAMES.items():
            require(theirs not in kwargs, f"{theirs} is {kwargs.get(theirs)!r}: the network's setting is {ours}")
        changed = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        where = str(kwargs.get("name_or_path", "config.json"))
        config_dict = {name: value for name, value in config_dict.items() if name not in THEIR_NAMES}
        network = PerceiverARConfig.from_dict(BEFORE["model"] | config_dict, where=where)
        network = (network.with_fixed_angles() if "context_length" in changed else network).replace(**changed)
        others = {name: value for name, value in config_dict.items() if name not in {"model_type", *names}}
        return super().from_dict({"network": network, **others}, **kwargs)

    @property
    def vocab_size(self) -> int:
        return self.network.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.network = self.network.replace(vocab_size=value)

    hidden_size = property(lambda self: self.network.dim)
    num_hidden_layers = property(lambda self: self.network.num_layers)
    num_attention_heads = property(lambda self: self.network.num_heads)
    tie_word_embeddings = property(lambda self: self.network.tie_embeddings)
    n_positions = property(lambda self: self.network.context_length)
    """Context length in tokens; lm-eval reads it. transformers would take `max_position_embeddings` for a limit of the
    sequence length, and there is no limit."""

    def to_dict(self) -> dict[str, Any]:
        return self.to_diff_dict() | {"tie_word_embeddings": self.tie_word_embeddings}  # PEFT reads it here

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        code = {"auto_map": self.auto_map} if self._auto_class and self.auto_map else {}
        return json.loads(self.network.to_json()) | code  # if this file came with the weights, it is saved with them

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_diff_dict(), indent=2) + "\n"
