"""The learning rule: Muon for the hidden matrices, AdamW for everything else, and schedules of the learning rate.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
orthogonal matrix, so that every direction learns at the same pace. Embeddings, the head, norms and biases are not such
maps, and get AdamW. Ours differs from torch.optim.Muon in one thing, which is worth more than most settings here
(docs/log.md): projections fused into one parameter are orthogonalised separately, as they are separate maps.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from perceiver_ar.config import OptimConfig

FUSED = {"qkv_proj.weight": 3, "kv_proj.weight": 2}
"""End of a parameter's name -> number of matrices in it, one above the other."""


class MuonAdamW(Optimizer):
    """Muon and AdamW behind one optimizer, so that one schedule, one state and one step serve both.

    The first parameter group is Muon's. Its i-th parameter holds `pieces[i]` matrices. The AdamW part owns
    no state: it works on this optimizer's second group and state.
    """

    def __init__(
        self,
        hidden: list[nn.Parameter],
        pieces: list[int],
        rest: list[nn.Parameter],
        config: OptimConfig,
        dtype: torch.dtype = torch.float32,
    ):
        self.dtype = dtype
        muon = {"params": hidden, "pieces": pieces, "lr": config.muon_lr, "momentum": config.momentum}
        # On a CPU the default is a loop of single operations, five times slower.
        self.adamw = AdamW(rest, lr=config.adamw_lr, betas=config.betas, weight_decay=0.0, fused=True)
        super().__init__([muon | {"weight_decay": config.weight_decay}, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for pieces, parameters in self._stacks():
            self._step_stack(parameters, pieces)
        self.adamw.step()
        return loss

    def _stacks(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Muon's parameters with gradients, as (matrices in each, parameters).

        On a GPU those of equal shapes come together: it takes few large operations better than many small ones.
        """
        group, stacks = self.param_groups[0], dict[Any, list[Tensor]]()
        for i, (parameter, pieces) in enumerate(zip(group["params"], group["pieces"], strict=True)):
            together = parameter.device.type != "cpu" and not isinstance(parameter, DTensor)
            key = pieces, parameter.shape, parameter.device, None if together else i
            if parameter.grad is not None:
                stacks.setdefault(key, []).append(parameter)
        return ((key[0], parameters) for key, parameters in stacks.items())

    def _step_stack(self, parameters: list[Tensor], pieces: int) -> None:
        group = self.param_groups[0]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])  # type: ignore[reportPrivateImportUsage]
        update = _stack(gradients).lerp(_stack(momenta), group["momentum"])  # Nesterov
        matrices = whole(update).unflatten(-2, (pieces, -1)).flatten(0, -3)
        rows, columns = matrices.shape[1:]
        if group["weight_decay"] > 0:
            factor = 1 - group["lr"] * group["weight_decay"]
            torch._foreach_mul_(parameters, factor)  # type: ignore[reportPrivateImportUsage]
        step = group["lr"] * math.sqrt(max(1.0, rows / columns))
        orthogonal = orthogonalize(matrices, self.dtype).view(update.shape)
        if isinstance(update, DTensor):  # each rank has computed all of it, and takes its share
            orthogonal = distribute_tensor(orthogonal, update.device_mesh, update.placements, src_data_rank=None)
        updates = [orthogonal] if len(parameters) == 1 else list(orthogonal.unbind())
        torch._foreach_add_(parameters, updates, alpha=-step)  # type: ignore[reportPrivateImportUsage]


def _stack(tensors: list[Tensor]) -> Tensor:
    """Tensors of equal shapes in one, with another dimension in front if there are several."""
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, if FSDP has split it among the ranks. All ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """Brings the singular values of each of (M, rows, columns) near 1 (0.7 ... 1.2), by Newton-Schulz in `dtype`.

    The quintic x -> a x + b x^3 + c x^5 with Jordan's coefficients, which trade exactness for few steps. So bfloat16
    is exact enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(dtype).squeeze(0)
    tall = matrices.shape[1] > matrices.shape[2]
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm  # a batch of one takes a CPU 1.4 times as long
    x = x / x.flatten(-2).norm(dim=-1).clamp(min=1e-7)[..., None, None]
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT  # the smaller of the two
        factor = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, x, factor, beta=a) if tall else add_product(x, factor, x, beta=a)
    return x.to(matrices.dtype).reshape(matrices.shape)


def make_optimizer(model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32) -> Optimizer:
    """The optimizer of `config` over the trainable parameters of `model`; each group has its peak as `initial_lr`.

    `dtype`: of Muon's matrix products; bfloat16 learns as well, and is faster if the device is faster in it.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {name: p for name, p in parameters.items() if p.ndim == 2 and name.endswith("_proj.weight")}
    if config.name == "muon" and hidden:
        pieces = [next((n for end, n in FUSED.items() if name.endswith(f".{end}")), 1) for name in hidden]
        rest = [p for name, p in parameters.items() if name not in hidden]
        optimizer: Optimizer = MuonAdamW(list(hidden.values()), pieces, rest, config, dtype)
    else:
        # In local_conv each row, for one distance, is a vector of its own.
        matrices = [p for name, p in parameters.items() if p.ndim >= 2 and not name.endswith("local_conv")]
        vectors = [p for name, p in parameters.items() if p.ndim < 2 or name.endswith("local_conv")]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        fused = True if any(p.is_cuda for p in vectors + matrices) else None
        optimizer = AdamW(groups, lr=config.adamw_lr, betas=config.betas, fused=fused)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def lr_factor(config: OptimConfig, progress: float) -> float:
    """The factor on the peak learning rates after a share `progress` (0 ... 1) of the run."""
    rise = min(1.0, progress / config.warmup) if config.warmup > 0 else 1.0
    left = max(0.0, 1.0 - progress)
    if config.schedule == "wsd" and config.decay > 0:
        return min(rise, left / config.decay)
    if config.schedule == "cosine":
        share = max(0.0, progress - config.warmup) / max(1e-9, 1.0 - config.warmup)
        return rise * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
    return rise
