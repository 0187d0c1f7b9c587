"""The step of a decoder with `torch.compile`.

Shapes: B rows, V vocabulary.
"""

import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from perceiver_ar.cache import Cache
from perceiver_ar.errors import InputError
from perceiver_ar.model import PerceiverAR

NextLogits = Callable[[PerceiverAR, Tensor, Tensor, Cache], Tensor]
"""Of a model, one token (B, 1) of each row, their positions (B or 1, 1) and a cache, which is written: (B, V)."""


def next_logits(model: PerceiverAR, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    return model.head(model.latents(tokens, positions=positions, cache=cache)[:, -1])


def tuned_next_logits(model: PerceiverAR, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """The same: torch keeps what it compiled by function, and two ways of compiling are not to be mixed up."""
    return next_logits(model, tokens, positions, cache)


@lru_cache
def compiled(device: str, tuned: bool) -> NextLogits:
    """`next_logits` for a fixed cache, once `compile_and_run` has compiled it."""
    if device == "cuda":  # both with CUDA graphs
        mode = "max-autotune" if tuned else "reduce-overhead"
    else:
        mode = None
    return torch.compile(tuned_next_logits if tuned else next_logits, fullgraph=True, dynamic=False, mode=mode)


def compile_and_run(
    model: PerceiverAR, tokens: Tensor, positions: Tensor, cache: Cache, *, tuned: bool = False
) -> Tensor:
    """`next_logits` with a fixed cache, compiled if it is not yet.

    tuned: with kernels that are tried out for this machine. On a CPU the weights then become constants, laid out as
    the kernels want them; where they have changed since, all is compiled anew.

    Raises:
        InputError: there is nothing to compile with.
    """
    device = tokens.device.type
    try:
        # One process may compile for any number of models, batches and contexts.
        with dynamo_config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
            if not tuned or device != "cpu":
                return compiled(device, tuned)(model, tokens, positions, cache)
            with constant_weights():
                forget_other_weights(model)
                return compiled(device, tuned)(model, tokens, positions, cache)
    except BackendCompilerFailed as error:
        what = " ".join(" ".join(str(error).splitlines()[:2]).split())  # the cause may be on the second line
        raise InputError(f"the step does not compile ({what}): repair that, or leave out compile") from error


@contextmanager
def constant_weights() -> Iterator[None]:
    """What torch compiles inside for a CPU takes weights for constants; its tables of tried kernels are not printed."""
    from torch._inductor import config, select_algorithm  # seconds to import

    printing = select_algorithm.PRINT_AUTOTUNE
    select_algorithm.PRINT_AUTOTUNE = False
    try:
        with (
            config.patch(freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP,ATEN"),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch's warning of itself
            yield
    finally:
        select_algorithm.PRINT_AUTOTUNE = printing


_weights = WeakKeyDictionary[PerceiverAR, list[int]]()
"""Fingerprints of the weights that are constants of compiled steps."""


def forget_other_weights(model: PerceiverAR) -> None:
    """Where a model's weights are not those of its tuned step, drops what was compiled (of other models, too)."""
    now = [fingerprint(x) for x in chain(model.parameters(), model.buffers())]
    if _weights.setdefault(model, now) != now:
        _weights[model] = now
        reset_code(tuned_next_logits.__code__)


def fingerprint(x: Tensor) -> int:
    """CRC-32 of a tensor's memory, of some gigabytes a second."""
    if is_traceable_wrapper_subclass(x):  # int8 weights: numbers and their scales
        return hash(tuple(fingerprint(getattr(x, name)) for name in x.__tensor_flatten__()[0]))
    return zlib.crc32(x.detach().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
