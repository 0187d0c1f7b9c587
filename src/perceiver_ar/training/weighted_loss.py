"""What a training step differentiates: the network and its loss as one module, which DDP and FSDP wrap."""

from typing import Any

import torch
from torch import Tensor, nn

from perceiver_ar.config import Recipe
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.network.streaming import SHARE, device_memory
from perceiver_ar.objective import head_loss, next_token_loss


class WeightedLoss(nn.Module):
    """The weighted loss of a micro-batch from `Batches`, a scalar in nats."""

    def __init__(self, model: PerceiverAR, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        model.activation_checkpointing = recipe.trainer.activation_checkpointing
        # In a list, so that its parameters are not registered twice.
        self.compiled: list[Any] = [torch.compile(model) if recipe.trainer.compile else model]
        self.prefix_group: Any = None

    def forward(self, batch: dict[str, Any]) -> Tensor:
        tokens, labels, rule = batch["tokens"], batch["labels"], self.recipe.optim
        inputs = {"prefix_len": tokens.shape[1] - labels.shape[1], "mask": batch.get("mask")}
        inputs["blocks"] = labels.shape[1] // self.model.config.num_latents
        self.model.prefix_group = self.prefix_group
        try:
            if self.has_large_vocabulary(labels):
                return batch["weight"] * head_loss(self.model.latents(tokens, **inputs), self.model.head, labels)
            logits = self.compiled[0](tokens, **inputs)
        finally:
            self.model.prefix_group = None  # evaluation and sampling run on one rank
        loss = next_token_loss(logits, labels, label_smoothing=rule.label_smoothing, z_loss=rule.z_loss)
        return batch["weight"] * loss

    def has_large_vocabulary(self, labels: Tensor) -> bool:
        """Whether logits would take a large share of the memory, and no setting needs all of them together."""
        settings, rule, device = self.recipe.trainer, self.recipe.optim, labels.device
        size = 4 * labels.numel() * self.recipe.model.vocab_size
        needed = settings.compile or settings.strategy == "fsdp" or rule.label_smoothing or rule.z_loss
        return not needed and size > SHARE * device_memory(device.type, device.index or 0)
