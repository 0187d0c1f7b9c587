"""Perceiver AR (Hawthorne et al., ICML 2022): train on long sequences, measure, generate. See README.md."""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from perceiver_ar.config import DataConfig, OptimConfig, PerceiverARConfig, Recipe, TrainerConfig
    from perceiver_ar.errors import InputError
    from perceiver_ar.evaluation import evaluate
    from perceiver_ar.generation import generate, stream
    from perceiver_ar.network.model import PerceiverAR
    from perceiver_ar.objective import next_token_loss
    from perceiver_ar.run import Run
    from perceiver_ar.training.main import train

# Module -> its names. Imported when first used, so that `perceiver-ar --help` does not wait for torch.
_NAMES = {
    "config": ("DataConfig", "OptimConfig", "PerceiverARConfig", "Recipe", "TrainerConfig"),
    "errors": ("InputError",),
    "evaluation": ("evaluate",),
    "generation": ("generate", "stream"),
    "network.model": ("PerceiverAR",),
    "objective": ("next_token_loss",),
    "run": ("Run",),
    "training.main": ("train",),
}

__all__ = [
    "DataConfig",
    "InputError",
    "OptimConfig",
    "PerceiverAR",
    "PerceiverARConfig",
    "Recipe",
    "Run",
    "TrainerConfig",
    "evaluate",
    "generate",
    "next_token_loss",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"perceiver_ar.{module}"), name)
    raise AttributeError(f"module 'perceiver_ar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
