"""What autocast does to tensors of a device."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which tensors of `dtype` are multiplied: that of autocast, if it is on for the device."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on and dtype != torch.float64 else dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which operations on tensors of the device of `x` keep their dtype."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
