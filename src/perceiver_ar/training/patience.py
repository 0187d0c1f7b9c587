"""Early stopping: the best held-out score so far, and for how many evaluations there was no better one."""

import math
from dataclasses import dataclass


@dataclass
class Patience:
    limit: int | None
    """trainer.patience."""
    best_bits: float = math.inf
    """Per token, on held-out text."""
    best_step: int = 0
    unimproved: int = 0
    """Number of consecutive evaluations that gave no better bits, up to the last one."""

    def note(self, bits: float | None, step: int) -> None:
        """Counts an evaluation; None: nothing could be measured."""
        if bits is None:
            return
        self.unimproved += 1
        if bits < self.best_bits:
            self.best_bits, self.best_step, self.unimproved = bits, step, 0

    @property
    def over(self) -> bool:
        return self.limit is not None and self.unimproved >= self.limit

    def reason(self, step: int) -> str:
        return (
            f"stopped early at step {step:,}: the last {self.unimproved} evaluations were not better than the "
            f"{self.best_bits:.3f} bits/token of step {self.best_step:,} (trainer.patience)"
        )
