"""Training: from files to a run directory.

A run is a function of its recipe. The weights come from the seed, training window i from the seed and i, the randomness
of step k from the seed and k. So a run that was killed and resumed makes exactly the steps of an undisturbed one.
(Bounded by `max_time` instead of `max_steps`, the learning rate follows the clock, and no two runs are the same.)

With several devices every process (rank) runs all of this. Each takes its share of the micro-batches of a step, or of
the prefix of the same ones. All agree on the clock and on stopping; only the first one writes, prints and measures.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_ar.training.main import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    """Imported when first used: estimates of memory are here, too, and need none of it."""
    if name != "train":
        raise AttributeError(f"module 'perceiver_ar.training' has no attribute {name!r}")
    from perceiver_ar.training.main import train

    return train
