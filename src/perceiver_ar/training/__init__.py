"""Training: from files to a run directory.

A run is a function of its recipe. The weights come from the seed, training window i from the seed and i, the randomness
of step k from the seed and k. So a run that was killed and resumed makes exactly the steps of an undisturbed one.
(With `max_time` instead of `max_steps`, the learning rate follows the clock, and no two runs are the same.)

With several devices every process (rank) runs all of this. Each takes a share of a step's micro-batches, or a
share of the prefix of the same micro-batches. All agree on the clock and on stopping; only the first one writes, prints
and evaluates.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_ar.training.main import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    """Imports `train` on first use: the memory estimates in this package do not need it."""
    if name != "train":
        raise AttributeError(f"module 'perceiver_ar.training' has no attribute {name!r}")
    from perceiver_ar.training.main import train

    return train
