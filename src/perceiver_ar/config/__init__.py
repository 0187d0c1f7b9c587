"""Every setting, in dataclasses whose field docstrings are the command line's help; no torch here.

`PerceiverARConfig` defines a network, `Recipe` a whole run. The defaults are what learned best in our measurements
(docs/log.md).
"""

from perceiver_ar.config.checks import parse_duration, unknown_words
from perceiver_ar.config.network import BEFORE, MODEL_TYPE, PerceiverARConfig
from perceiver_ar.config.presets import PRESETS
from perceiver_ar.config.recipe import Recipe, default_network, flat, names_all
from perceiver_ar.config.run import DataConfig, OptimConfig, TrainerConfig
from perceiver_ar.config.yaml_files import dump_yaml, load_yaml

__all__ = [
    "BEFORE",
    "MODEL_TYPE",
    "PRESETS",
    "DataConfig",
    "OptimConfig",
    "PerceiverARConfig",
    "Recipe",
    "TrainerConfig",
    "default_network",
    "dump_yaml",
    "flat",
    "load_yaml",
    "names_all",
    "parse_duration",
    "unknown_words",
]
