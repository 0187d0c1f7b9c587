"""A decoder's step under `torch.compile`.

Shapes: B rows, V vocabulary.
"""

import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import chain
from threading import RLock
from types import FunctionType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from perceiver_ar.errors import InputError
from perceiver_ar.generation.cache import Cache
from perceiver_ar.network.model import PerceiverAR

NextLogits = Callable[[PerceiverAR, Tensor, Tensor, Cache], Tensor]
"""(model, tokens (B, 1), positions (B or 1, 1), cache) -> logits (B, V); updates the cache."""


def next_logits(model: PerceiverAR, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    return model.head(model.cached_latents(tokens, positions, cache)[:, -1])


def compiled_step(model: PerceiverAR, device: str, tuned: bool) -> NextLogits:
    """`next_logits` for a fixed cache, to be compiled by `compile_and_run`.

    tuned: with kernels that are benchmarked on this machine. On a CPU the weights then become constants in the kernels'
    layout, so the step is for these weights only.
    """
    if not tuned or device != "cpu":
        return _shared_step(device, tuned)
    weights = [fingerprint(x) for x in chain(model.parameters(), model.buffers())]
    with _lock:
        if model not in _tuned or _tuned[model][0] != weights:
            # torch caches compiled code by code object, and checks a constant's identity, not its value.
            own = FunctionType(next_logits.__code__.replace(), next_logits.__globals__)
            _tuned[model] = weights, torch.compile(own, fullgraph=True, dynamic=False)
        return _tuned[model][1]


_lock = RLock()
_tuned = WeakKeyDictionary[PerceiverAR, tuple[list[int], NextLogits]]()
"""Steps whose weights are constants, each with the fingerprints of these weights."""


@lru_cache
def _shared_step(device: str, tuned: bool) -> NextLogits:
    cuda = "reduce-overhead" if device == "cuda" else None  # CUDA graphs, which "max-autotune" uses, too
    return torch.compile(next_logits, fullgraph=True, dynamic=False, mode="max-autotune" if tuned else cuda)


def compile_and_run(
    step: NextLogits, model: PerceiverAR, tokens: Tensor, positions: Tensor, cache: Cache, *, tuned: bool
) -> Tensor:
    """Runs a `compiled_step`, which is compiled first if necessary.

    Raises InputError if it does not compile, for example because there is no C++ compiler.
    """
    from torch._dynamo import config as dynamo_config  # a second to import
    from torch._dynamo.exc import BackendCompilerFailed

    # One process may compile for any number of models, batches and contexts.
    limits = dynamo_config.patch(recompile_limit=1000, accumulated_recompile_limit=1000)
    quiet = _quiet() if tuned else nullcontext()
    constants = _constant_weights() if tuned and tokens.device.type == "cpu" else nullcontext()
    try:
        with _lock, limits, quiet, constants:
            return step(model, tokens, positions, cache)
    except BackendCompilerFailed as error:
        what = " ".join(" ".join(str(error).splitlines()[:2]).split())  # the cause may be on the second line
        raise InputError(f"the step does not compile ({what}): repair that, or leave out compile") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from printing which kernels it tries, and from warning of its own code."""
    from torch._inductor import config, select_algorithm  # seconds to import

    printing = select_algorithm.PRINT_AUTOTUNE
    select_algorithm.PRINT_AUTOTUNE = False
    try:
        with config.patch(max_autotune_report_choices_stats=False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
            yield
    finally:
        select_algorithm.PRINT_AUTOTUNE = printing


@contextmanager
def _constant_weights() -> Iterator[None]:
    """Inside this context torch compiles weights as constants, which are freed with the step."""
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache

    before = len(PyCodeCache.modules)
    try:
        # Without the cache on disk, which tells constants apart by their shapes only.
        with config.patch(
            freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP,ATEN", fx_graph_cache=False
        ):
            yield
    finally:
        for module in PyCodeCache.modules[before:]:  # they hold the constants
            sys.modules.pop(module.__name__, None)
        del PyCodeCache.modules[before:]


def fingerprint(x: Tensor) -> int:
    """CRC-32 of a tensor's memory, at some gigabytes per second."""
    if is_traceable_wrapper_subclass(x):  # int8 weights: numbers and their scales
        return hash(tuple(fingerprint(getattr(x, name)) for name in x.__tensor_flatten__()[0]))
    return zlib.crc32(x.detach().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
