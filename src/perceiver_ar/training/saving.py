"""The content of checkpoint files, also when weights and states are divided among ranks.

A checkpoint has all weights and states in one file, whatever the number of devices. Optimizer states have the numbers
of the model's parameters. So a run can resume with any number of devices.
"""

import errno
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from perceiver_ar.adapters import save_adapter
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.training.checkpoints import Checkpoint, Checkpoints
from perceiver_ar.training.prepare import Prepared
from perceiver_ar.training.trouble import is_out_of_memory

Gather = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def write_checkpoint(
    prepared: Prepared, checkpoints: Checkpoints, checkpoint: dict[str, Any], model: PerceiverAR, bits: float | None
) -> None:
    """Writes the weights and a checkpoint; each file replaces the previous one only when it is complete.

    The checkpoint comes last: resuming from one at the end of the run does not save the weights again. Raises OSError
    if they cannot be written; the earlier files are unchanged. bits: per token, on held-out text, if measured.
    """
    try:
        with checkpoints.writing(checkpoint["global_step"], bits) as temporary:
            torch.save(checkpoint, temporary)
            write_weights(prepared, model, checkpoint)  # inside: a kill leaves an incomplete checkpoint, too
    except (OSError, SafetensorError, RuntimeError) as error:  # some writers raise these instead of OSError
        if is_out_of_memory(error):
            raise
        message = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        if number == errno.EIO and shutil.disk_usage(prepared.run.path).free < bytes_of(checkpoint):
            number, message = errno.ENOSPC, os.strerror(errno.ENOSPC)  # these writers do not say it
        raise OSError(number, f"cannot save ({message})", str(prepared.run.path)) from error


def bytes_of(checkpoint: dict[str, Any]) -> int:
    tensors = (x for x in tree_leaves(checkpoint) if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)


def write_weights(prepared: Prepared, model: PerceiverAR, checkpoint: dict[str, Any]) -> None:
    """Writes `model`, and the adapter of `checkpoint` if the recipe has one, as the weights of the run."""
    run, recipe = prepared.run, prepared.recipe
    model.save_pretrained(run.path)
    if recipe.adapter is not None:
        save_adapter(run.adapter, recipe, weights_for_use(checkpoint), checkpoint["base"])


def weights_for_use(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in the content of a checkpoint, or their running mean if there is one."""
    state = checkpoint["state_dict"]
    return checkpoint.get("mean") or {name.removeprefix("model."): tensor for name, tensor in state.items()}


def read_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    return torch.load(checkpoint.path, map_location="cpu", weights_only=True)


def stored_optimizer(optimizer: Optimizer, model: nn.Module, gathered: Gather) -> dict[str, Any]:
    """The state of an optimizer in the form that checkpoints hold."""
    numbers = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    groups = [
        {**group, "params": [numbers[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    states = {numbers[id(parameter)]: gathered(state) for parameter, state in optimizer.state.items()}
    return {"state": states, "param_groups": groups}


def load_optimizer(optimizer: Optimizer, model: nn.Module, stored: dict[str, Any]) -> None:
    """The inverse of `stored_optimizer`. Each group keeps its own `fused`, which suits the device of this run."""
    states = {}
    for number, parameter in enumerate(model.parameters()):
        if number in stored["state"]:
            states[number] = {
                name: divided_as(parameter, value) if value.shape == parameter.shape else value
                for name, value in stored["state"][number].items()
            }
    groups = [
        group | ({"fused": own["fused"]} if "fused" in own else {})
        for group, own in zip(stored["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def divided_as(own: Tensor, values: Tensor) -> Tensor:
    """A copy of `values` on the device of `own`, divided among the ranks as FSDP divided `own`."""
    if isinstance(own, DTensor) and not isinstance(values, DTensor):
        values = values.to(own.device_mesh.device_type)
        return distribute_tensor(values, own.device_mesh, own.placements, src_data_rank=None)
    return values.detach().to(own.device, copy=True)
