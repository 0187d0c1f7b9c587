"""Diagnosis of failed training: the first values that are not finite, and the memory that training needs."""

import math
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_ar.config import Recipe
from perceiver_ar.costs import training_bytes
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.network.streaming import automatic_chunk

ROOM = {"cuda": 0.8, "mps": 0.8, "cpu": 0.5}
"""Share of the free memory to plan with: the estimate may be wrong by a fifth, and on a CPU allocators need more."""


def first_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """A sentence naming the first weights that are not finite, or else the first such layer output in `forward`."""
    from perceiver_ar.optim import whole  # with torch.distributed.tensor, half of torch's own time to import

    for name, parameter in model.named_parameters():
        finite = whole(parameter.detach()).isfinite()
        if not finite.all():
            return f"{name} holds {int((~finite).sum()):,} values that are not finite"
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    # Hooks on streamed modules would hold the whole prefix. Bad values in them show in the layer that reads them.
    networks = [module for module in model.modules() if isinstance(module, PerceiverAR)]
    streamed = {module for network in networks for module in network.streamed_modules().values()}
    with torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and module not in streamed:
                hooks.enter_context(module.register_forward_hook(partial(look, name)))
        forward()
    if found:
        return f"the first layer whose output is not finite is {found[0]}"
    return "all layers' outputs are finite, their gradients are not"


def expected_bytes(recipe: Recipe, parameters: int, device: str, windows: int | None = None) -> float:
    """`training_bytes`, with the prefix streamed or not as on `device`. windows: micro-batch; None: the recipe's."""
    config, chunk = recipe.model, recipe.model.prefix_chunk
    if chunk is None:
        length = int((config.context_length - recipe.window_latents) * (1 - config.prefix_dropout))
        length = -(-length // recipe.trainer.prefix_ranks)
        rows = recipe.trainer.micro_batch if windows is None else windows
        chunk = automatic_chunk(config, rows * config.latents_per_position, length, torch.float32, torch.device(device))
    return training_bytes(recipe, parameters, windows, chunk)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def out_of_memory(recipe: Recipe, parameters: int, device: str) -> str:
    """The error message: the memory needed, and the setting to change."""
    each = recipe.trainer.micro_batch
    needed = f"micro-batches of {each} windows need about {gigabytes(expected_bytes(recipe, parameters, device))}"
    if each > 1:
        half = max(size for size in range(1, each // 2 + 1) if each % size == 0)
        less = gigabytes(expected_bytes(recipe, parameters, device, half))
        remedy = f"--resume with trainer.micro_batch_size {half} (about {less}), or with --find_batch"
    elif not recipe.trainer.activation_checkpointing:
        lower = "trainer.blocks" if recipe.blocks > 1 else "model.context_length or model.num_latents"
        remedy = f"--resume with trainer.activation_checkpointing, or start a new run with a lower {lower}"
    else:
        remedy = "start a new run with a lower model.context_length, model.num_latents or model.dim"
    return f"out of memory: {needed}; {remedy}"


def largest_micro_batch(recipe: Recipe, parameters: int, device: str, room: float) -> int | None:
    """The largest micro-batch that fits into `room` bytes by the estimate; None: not even one window."""
    share = recipe.trainer.batch_size // recipe.trainer.data_ranks
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    fitting = [size for size in sizes if expected_bytes(recipe, parameters, device, size) <= room]
    return max(fitting, default=None)


def free_bytes(device: str) -> float:
    """Bytes of free memory on a device; infinite if unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    limits = [math.inf]
    with suppress(OSError, ValueError):
        import resource  # not on Windows

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            with open("/proc/self/statm") as file:
                limits.append(soft - int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):
        limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, StopIteration), open("/proc/meminfo") as file:  # includes caches that can be freed
        limits[-1] = 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    return min(limits)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
