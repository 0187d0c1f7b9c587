"""The training objective: cross-entropy of the latents' next tokens."""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Label of a position that is no target. No token id is special."""


def next_token_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, computed in float32 or better.

    Args:
        logits: (B, N, V).
        labels: (B, N) integer ids: the token after each latent's position, or `ignore_index` where there is no target.
        reduction: "mean" over targets (NaN without any), "sum", or "none" for (B, N) with 0 at ignored labels.
    """
    exact = logits if logits.element_size() >= 4 else logits.float()
    return F.cross_entropy(exact.transpose(1, 2), labels, ignore_index=ignore_index, reduction=reduction)
