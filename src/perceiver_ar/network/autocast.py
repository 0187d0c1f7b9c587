"""What autocast does to tensors of a device."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def is_autocast_on(device: torch.device) -> bool:
    """torch raises for "meta". (`torch.compile` of torch 2.11 cannot trace `torch.amp.is_autocast_available`.)"""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which tensors of `dtype` are multiplied: that of autocast, if it is on for the device."""
    return torch.get_autocast_dtype(device.type) if is_autocast_on(device) and dtype != torch.float64 else dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which operations on tensors of the device of `x` keep their dtype."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast_on(x.device) else nullcontext()
