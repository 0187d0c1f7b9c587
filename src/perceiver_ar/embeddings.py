"""A document as one vector: the mean of the final latents of its tokens."""

from itertools import groupby, islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from perceiver_ar.errors import require
from perceiver_ar.generation import evaluation_mode
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.scored_windows import windows
from perceiver_ar.windows import longest_context


def embed(
    model: PerceiverAR,
    tokens: np.ndarray | Tensor,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    precision: Literal["32", "bf16"] = "32",
    pinned: ArrayLike = (),
) -> np.ndarray:
    """The embedding of a document, (D,) float32.

    Every token is a latent once, in the windows in which `evaluate` would predict the token after it, with as much
    context before it as there is. The embedding is the mean of these n latents, as the last norm leaves them for the
    head.

    Args:
        tokens: (n,) integer ids, n >= 1.
        stride: new latents per window, 1 ... num_latents. None: half of num_latents.
        batch_size: windows per forward.
        precision: "32": in the weights' dtype; "bf16": autocast.
        pinned: ids in place of the first tokens of a window that starts later, unless these are new: the document's
            conditions.

    Raises:
        InputError: no tokens, ids outside the vocabulary, or a model whose weights give NaN.
    """
    config = model.config
    x = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    require(
        x.ndim == 1 and len(x) > 0 and x.dtype.kind in "iu",
        f"the tokens to embed have shape {x.shape} and type {x.dtype}: they must be one sequence of at least one id",
    )
    wrong = x[(x < 0) | (x >= config.vocab_size)]
    require(len(wrong) == 0, f"there is no id {wrong[:1]}: this model's are 0 ... {config.vocab_size - 1}")
    require(batch_size >= 1, f"batch_size is {batch_size}: it must be at least 1")
    first = np.array(pinned, dtype=x.dtype)
    T = longest_context(config)
    N = min(config.num_latents, T)
    each = windows(len(x) + 1, T, N, max(1, N // 2) if stride is None else stride)
    total = torch.zeros(config.dim, dtype=torch.float64)
    device = model.device
    with (
        evaluation_mode(model.modules()),
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        for (length, P), alike in groupby(each, key=lambda window: (window.end - window.start - 1, window.prefix_len)):
            while batch := list(islice(alike, batch_size)):
                ids = np.stack([x[window.start : window.start + length] for window in batch])
                for row, window in zip(ids, batch, strict=True):
                    if 0 < window.start < window.first_target - len(first):
                        row[: len(first)] = first
                latents = model.latents(torch.from_numpy(ids.astype(np.int64)).to(device), P).cpu().double()
                for window, row in zip(batch, latents, strict=True):
                    total += row[window.first_target - window.end :].sum(dim=0)
    require(bool(total.isfinite().all()), "the model's weights give NaN: use weights from before training diverged")
    return (total / len(x)).float().numpy()
