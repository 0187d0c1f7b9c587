"""The activation functions of the MLPs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def activate(x: Tensor, activation: str) -> Tensor:
    """`activation`: relu, relu2 (its square), gelu or gelu_tanh."""
    if activation == "relu":
        return F.relu(x)
    if activation == "relu2":
        # Compilers fuse the plain formula; without gradients the Function would cost more than its operations.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            x = F.relu(x)
            return x * x  # CUDA's autocast would widen the method `square` to float32
        return _SquaredReLU.apply(x)[0]
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2, and relu(x) for the gradient, which autograd would compute in twice as many operations."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(x)
        return x * x, x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_square: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return (d_square * ctx.saved_tensors[0]).mul_(2)
