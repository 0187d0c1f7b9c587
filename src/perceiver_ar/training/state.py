"""The state that training steps change: the network, its optimizer and the progress."""

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from perceiver_ar.adapters import fingerprint, merged
from perceiver_ar.config import Recipe
from perceiver_ar.errors import require
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.optim import make_optimizer, whole
from perceiver_ar.run import Run
from perceiver_ar.training.console import say
from perceiver_ar.training.patience import Patience
from perceiver_ar.training.saving import divided_as, load_optimizer, stored_optimizer
from perceiver_ar.training.trouble import first_not_finite
from perceiver_ar.training.weighted_loss import WeightedLoss

FAILURES = 5
"""Number of consecutive steps without finite gradients that ends the run."""
SPIKES = 100
"""Number of last gradient norms with which a spike is compared."""


class Training:
    """The network, its optimizer and the progress: the content of a checkpoint."""

    def __init__(self, model: PerceiverAR, recipe: Recipe, fabric: Fabric, checkpoint: dict[str, Any] | None) -> None:
        self.recipe, self.fabric, self.model = recipe, fabric, model
        self.base = None if recipe.adapter is None else fingerprint(model)
        """Of the weights that an adapter is added to."""
        loss = WeightedLoss(model, recipe)
        if checkpoint is not None:
            initial = Run(recipe.out).initial
            require(
                checkpoint.get("base") == self.base,
                f"the weights in {initial} are not those that the adapter was trained on: restore them",
            )
            loss.load_state_dict(checkpoint["state_dict"], strict=recipe.adapter is None)
        settings = recipe.trainer
        if settings.prefix_ranks > 1:
            shape = (settings.data_ranks, settings.prefix_ranks)
            mesh = init_device_mesh(fabric.device.type, shape, mesh_dim_names=("data", "prefix"))
            loss.prefix_group = mesh["prefix"].get_group()
        self.loss = fabric.setup_module(loss)  # FSDP divides the weights here, so the optimizer comes after
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.optimizer = make_optimizer(model, recipe.optim, dtype)
        self.fabric_optimizer: Any = fabric.setup_optimizers(self.optimizer)

        self.step = 0
        """Optimizer steps made, skipped ones included."""
        self.tokens_seen = 0
        """Targets of all steps. Windows at the ends of a pass or of a picture have fewer than others."""
        self.skipped = 0
        self.norms: list[float] = []
        """Gradient norms of the last `SPIKES` steps."""
        self.mean: dict[str, Tensor] = {}
        """The running mean of the weights; empty if `optim.ema` is 0."""
        self.seconds_before = 0.0
        """Seconds spent in earlier parts of a resumed run."""
        self.started = time.perf_counter()
        self.now = 0.0
        """Seconds spent training, the same on all ranks."""
        self.failures = 0
        """Number of consecutive steps without finite gradients, up to the last step."""
        self.trouble: str | None = None
        """How the training diverged, if it did."""
        self.patience = Patience(recipe.trainer.patience)
        self.grad_norm = 0.0
        self.loss_sum: Tensor | float = 0.0
        self.losses = 0
        if checkpoint is not None:
            self.load(checkpoint)
        if recipe.optim.ema:
            self.mean = {name: divided_as(own, self.mean.get(name, own)) for name, own in self.weights().items()}

    # A step.

    def make_step(self, micro_batches: Iterable[dict[str, Any]], count: int) -> None:
        """Accumulates the gradients of this rank's `count` micro-batches, then updates the weights, or skips that."""
        step_loss: Tensor | float = 0.0
        batch: dict[str, Any] = {}
        for i, batch in enumerate(micro_batches):
            batch = self.fabric.to_device(batch)
            torch.manual_seed(batch["seed"])
            with self.fabric.no_backward_sync(self.loss, enabled=i < count - 1):
                loss = self.loss(batch)
                self.fabric.backward(loss / count)
            step_loss = step_loss + loss.detach()
        self.fabric.strategy.precision.unscale_gradients(self.optimizer)
        limit = self.recipe.optim.grad_clip or math.inf
        self.grad_norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), limit)))
        skip = self.skips_step()
        if not skip:
            self.fabric_optimizer.step()
        elif (scaler := getattr(self.fabric.strategy.precision, "scaler", None)) is not None:
            scaler.update()  # or it would refuse the next step
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens_seen += batch["targets"]
        if not skip:
            self.loss_sum, self.losses = self.loss_sum + step_loss, self.losses + count
            self.update_mean()
        most = 50 if self.recipe.trainer.precision == "fp16" else FAILURES  # the scaler of fp16 first lowers its scale
        if self.failures == most:
            where = first_not_finite(self.model, lambda: self.loss.module(batch))
            self.trouble = f"the {self.failures} steps up to {self.step} gave no finite gradients; {where}"

    def note_failing_end(self) -> None:
        """Sets `trouble` if the run ends with steps that gave no finite gradients."""
        if self.ended_by and self.failures and not self.trouble and self.recipe.trainer.precision != "fp16":
            self.trouble = f"the last {self.failures} steps gave no finite gradients"

    def skips_step(self) -> bool:
        """Whether to skip the update because the gradient is not finite or a spike; the same on all ranks."""
        norm, factor, reason = self.grad_norm, self.recipe.optim.skip_spikes, None
        if math.isfinite(norm):
            if factor and len(self.norms) >= 10 and norm > factor * (usual := statistics.median(self.norms)):
                reason = f"the gradient norm is {norm:.3g}, but usually {usual:.3g}"
            self.failures, self.norms = 0, [*self.norms, norm][-SPIKES:]
        else:
            self.failures += 1
            if self.recipe.trainer.precision == "fp16":
                return False  # the scaler raises its scale until this happens, and skips such steps itself
            reason = f"the gradient norm is {norm}"
        if reason is not None:
            self.skipped += 1
            say(f"step {self.step + 1:,} skipped: {reason}")
        return reason is not None

    def update_mean(self) -> None:
        if self.mean:
            # A fixed decay would keep the initial weights in the mean of short runs and early steps.
            decay = min(self.recipe.optim.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for name, own in self.weights().items():
                    self.mean[name].lerp_(own, 1 - decay)

    def take_mean_loss(self) -> float | None:
        """Mean loss in nats, over all ranks, since the last call; None if every step was skipped.

        All ranks have to call it.
        """
        if not self.losses:
            return None
        mean = torch.as_tensor(self.loss_sum / self.losses, device=self.fabric.device)
        self.loss_sum, self.losses = 0.0, 0
        return float(self.fabric.all_reduce(mean, reduce_op="mean"))  # type: ignore[arg-type]

    # Progress.

    def start_clock(self) -> None:
        self.started = time.perf_counter()
        self.agree(False)

    @property
    def seconds(self) -> float:
        """Time spent training, evaluations included, over all parts of the run."""
        return self.seconds_before + time.perf_counter() - self.started

    def agree(self, stop: bool) -> bool:
        """Sets `now` to the first rank's clock; returns whether any rank asks to stop. All ranks have to call it."""
        self.now = self.seconds
        if self.recipe.trainer.devices > 1:
            first = self.fabric.global_rank == 0
            own = torch.tensor([self.now if first else 0.0, stop], dtype=torch.float64, device=self.fabric.device)
            torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX)
            self.now, stop = own[0].item(), bool(own[1])
        return stop

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 ... 1, half of the running step included."""
        by_steps = (self.step + 0.5) / self.recipe.max_steps if self.recipe.max_steps else 0.0
        by_time = self.now / self.recipe.max_seconds if self.recipe.max_seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    @property
    def ended_by(self) -> Literal["patience", "max_steps", "max_time"] | None:
        """The setting that ends the training now; None: it goes on."""
        if self.patience.over:
            return "patience"
        if self.recipe.max_steps is not None and self.step >= self.recipe.max_steps:
            return "max_steps"
        return "max_time" if self.recipe.max_seconds is not None and self.now >= self.recipe.max_seconds else None

    # For evaluation, samples and checkpoints.

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, a shared one under each of its names; with an adapter, those of the adapter alone."""
        everything = self.recipe.adapter is None
        parameters = self.model.named_parameters(remove_duplicate=False)
        return {name: parameter.detach() for name, parameter in parameters if everything or parameter.requires_grad}

    def usable(self) -> PerceiverAR:
        """The network to evaluate, sample from and save; with the running mean of the weights if there is one.

        Under FSDP all ranks have to call this; only the first one gets the weights.
        """
        if not (self.mean or self.recipe.trainer.sharded or self.recipe.adapter):
            return self.model
        state = self.gathered(self.mean or self.weights())
        return self.with_weights(state) if state else self.model

    def with_weights(self, weights: dict[str, Tensor]) -> PerceiverAR:
        """A network with other weights than the present ones, which have the names of `weights()`."""
        if self.recipe.adapter is not None:
            return merged(self.model, weights)
        model = PerceiverAR(self.recipe.model)
        model.load_state_dict(weights)
        return model.to(self.fabric.device)

    def gathered(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors that FSDP has divided, in the first rank's main memory; {} on other ranks."""
        if not self.recipe.trainer.sharded:
            return state
        device, first = self.fabric.device, self.fabric.global_rank == 0
        values = ((name, whole(tensor.to(device))) for name, tensor in state.items())
        return {name: tensor.cpu() for name, tensor in values if first}

    def checkpoint(self) -> dict[str, Any]:
        """The content of a checkpoint. Under FSDP all ranks have to call this; only the first one gets the tensors."""
        state = {f"model.{name}": tensor for name, tensor in self.gathered(self.weights()).items()}
        checkpoint: dict[str, Any] = {
            "global_step": self.step,
            "state_dict": state,
            "base": self.base,
            "optimizer_states": [stored_optimizer(self.optimizer, self.model, self.gathered)],
            "scaler": self.fabric.strategy.precision.state_dict(),
            "seconds": self.seconds,
            "windows": self.step * self.recipe.trainer.batch_size,
            "tokens_seen": self.tokens_seen,
            "skipped": self.skipped,
            "norms": list(self.norms),
            "patience": asdict(self.patience),
        }
        return checkpoint | ({"mean": self.gathered(self.mean)} if self.mean else {})

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Loads everything but the weights from a checkpoint."""
        load_optimizer(self.optimizer, self.model, checkpoint["optimizer_states"][0])
        scaler = checkpoint.get("scaler") or checkpoint.get("MixedPrecision")  # written by Lightning's Trainer
        if scaler:
            self.fabric.strategy.precision.load_state_dict(scaler)
        self.step, self.seconds_before = checkpoint["global_step"], checkpoint["seconds"]
        self.tokens_seen = checkpoint.get("tokens_seen", checkpoint["windows"] * self.recipe.window_latents)
        self.skipped, self.norms = checkpoint["skipped"], list(checkpoint["norms"])
        self.patience = Patience(**checkpoint.get("patience", {}) | {"limit": self.recipe.trainer.patience})
        self.mean = checkpoint.get("mean", {})
