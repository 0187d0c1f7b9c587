"""The training objective: cross-entropy of the latents' next tokens."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_ar.errors import InputError, require
from perceiver_ar.network.autocast import product_dtype

IGNORE = -100
"""Label of a position that is no target. No token id is special."""


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy in nats, computed in float32 or better.

    With label_smoothing s the target has probability 1 - s, and the other V - 1 ids s / (V - 1) each. The entropy of
    that distribution is subtracted, so that the minimum is still 0. z_loss z adds z log^2(sum exp(logits)), which keeps
    logits from drifting. Both as in google's Perceiver AR (and T5X, arXiv 2203.17189).

    Args:
        logits: (B, N, V).
        labels: (B, N) ids of any integer type: the token after each latent's position, or `ignore_index` where there
            is no target.
        reduction: "mean" over targets (NaN without any), "sum", or "none" for (B, N) with 0 at ignored labels.
        label_smoothing: from 0 to less than 1 - 1 / V.
        z_loss: 0 or more; google trains with 1e-4.

    Raises:
        InputError: shapes that do not fit together, or too much smoothing.
    """
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise InputError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}: "
            "they must be (B, N, V) and (B, N), a label for each latent"
        )
    labels = labels.long()
    exact = logits if logits.element_size() >= 4 else logits.float()
    V, s = logits.shape[-1], label_smoothing
    if s != 0:  # torch.compile cannot read messages with sizes in them
        require(0 < s < 1 - 1 / V, f"label_smoothing is {s}: with {V} ids it must be in [0, {1 - 1 / V:.4g})")
    plain = s == 0 and z_loss == 0
    loss = F.cross_entropy(  # of a matrix: more dimensions take CUDA another kernel, which has no deterministic form
        exact.flatten(0, 1),
        labels.flatten(),
        ignore_index=ignore_index,
        reduction=reduction if plain else "none",
        label_smoothing=s * V / max(V - 1, 1),  # torch spreads its share over all V ids, including the target
    )
    if plain:
        return loss.view_as(labels) if reduction == "none" else loss
    targets = labels != ignore_index
    more = z_loss * exact.logsumexp(-1).square()
    if s > 0:
        more = more + (1 - s) * math.log(1 - s) + s * math.log(s / max(V - 1, 1))
    loss = loss.view_as(labels) + more.masked_fill(~targets, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / targets.sum()


def head_loss(latents: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """`next_token_loss(head(latents), labels)`, in pieces if torch can (2.13 can), so that memory holds few logits.

    For large vocabularies: it takes a sixth of the memory, and on a CPU twice the time.

    Args:
        latents: (B, N, D), the final ones.
        labels: (B, N) as in `next_token_loss`.
    """
    if not hasattr(F, "linear_cross_entropy"):
        return next_token_loss(head(latents), labels)
    weight, bias, labels = head.weight, head.bias, labels.flatten().long()
    dtype = product_dtype(weight.dtype, latents.device)
    half = latents.device.type == "cuda" and dtype.itemsize == 2
    options = nn.LinearCrossEntropyOptions(acc_policy="balanced" if half else "auto")  # sums over pieces in float32
    if half:  # autocast has no rule for this function; nor are its products on a CPU faster in half precision
        latents, weight, bias = latents.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    loss = F.linear_cross_entropy(
        latents.flatten(0, 1),
        weight,
        labels,
        linear_bias=bias,
        ignore_index=IGNORE,
        options=options,
        reduction="none" if half else "mean",  # the mean would be rounded to half precision
    )
    return loss.float().sum() / (labels != IGNORE).sum() if half else loss
