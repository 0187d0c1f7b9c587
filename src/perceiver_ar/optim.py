"""The learning rule: Muon for the hidden matrices, AdamW for everything else, and schedules of the learning rate.

Muon (Jordan 2024; torch.optim.Muon) replaces a matrix's momentum by the nearest orthogonal matrix, so that every
direction learns at the same pace. Embeddings, the head, norms and biases are not such maps, and get AdamW.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from perceiver_ar.config import OptimConfig


class MuonAdamW(Optimizer):
    """Muon and AdamW behind one optimizer, so that one schedule, one state and one step serve both.

    The two parts own no state: they work on this optimizer's parameter groups and state.
    """

    def __init__(self, hidden: list[nn.Parameter], rest: list[nn.Parameter], config: OptimConfig) -> None:
        self.muon = Muon(hidden, lr=config.muon_lr, momentum=config.momentum, weight_decay=config.weight_decay)
        self.adamw = AdamW(rest, lr=config.lr, betas=config.betas, weight_decay=0.0)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer of `config` over the trainable parameters of `model`; each group keeps its peak as `initial_lr`."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in parameters.items() if p.ndim == 2 and name.endswith("_proj.weight")]
    known = {id(p) for p in hidden}
    rest = [p for p in parameters.values() if id(p) not in known]
    if config.name == "muon" and hidden:
        optimizer: Optimizer = MuonAdamW(hidden, rest, config)
    else:
        matrices = [p for p in parameters.values() if p.ndim >= 2]
        vectors = [p for p in parameters.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=config.lr, betas=config.betas)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def lr_factor(config: OptimConfig, progress: float) -> float:
    """What to multiply the peak learning rates by after a share `progress` (0 ... 1) of the run."""
    rise = min(1.0, progress / config.warmup) if config.warmup > 0 else 1.0
    left = max(0.0, 1.0 - progress)
    if config.schedule == "wsd" and config.decay > 0:
        return min(rise, left / config.decay)
    if config.schedule == "cosine":
        share = max(0.0, progress - config.warmup) / max(1e-9, 1.0 - config.warmup)
        return rise * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
    return rise
