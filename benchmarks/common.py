"""What the benchmarks share: contenders with the same sizes, fair timing, and what the machine could do at best."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from perceiver_ar import PerceiverAR, next_token_loss
from perceiver_ar.compat.lucidrains import PerceiverAR as Ours
from perceiver_ar.config import OptimConfig
from perceiver_ar.data.sampler import TrainingWindows
from perceiver_ar.optim import lr_factor, make_optimizer

Step = Callable[[], None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> str:
    """One line: processor, threads, torch."""
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
        name = f"{name} ({platform.machine()}), {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def settings(context: int, latents: int, dim: int, depth: int) -> dict[str, int]:
    """Arguments of perceiver-ar-pytorch, 64 channels a head, bytes."""
    sizes = {"num_tokens": 256, "dim": dim, "depth": depth, "heads": dim // 64}
    return sizes | {"max_seq_len": context, "cross_attn_seq_len": context - latents}


def make_theirs(sizes: dict[str, int]) -> nn.Module:
    from perceiver_ar_pytorch import PerceiverAR  # pyright: ignore[reportMissingImports]  # extra: bench

    torch.manual_seed(0)
    return PerceiverAR(**sizes).to(DEVICE)


def make_ours(sizes: dict[str, int]) -> Ours:
    torch.manual_seed(0)
    return Ours(**sizes).to(DEVICE)  # type: ignore[arg-type]


def make_dense(context: int, dim: int, depth: int) -> nn.Module:
    """A causal Transformer of that width and depth (Llama, fused attention): every token goes through all layers."""
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]  # extra: bench

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=dim,
        intermediate_size=dim * 8 // 3,  # three matrices there: as many weights as two of 4 dim
        num_hidden_layers=depth + 1,
        num_attention_heads=dim // 64,
        max_position_embeddings=context,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return nn.Module.to(LlamaForCausalLM(config), DEVICE)


def dense_training_flops(context: int, dim: int, depth: int) -> float:
    """3 * (2 T M + L * 4 T^2 D / 2): M weights of matrices, L layers; one forward and two backward products each."""
    matrices = (depth + 1) * (4 * dim * dim + 3 * dim * (dim * 8 // 3)) + 256 * dim
    return 3 * (2 * context * matrices + (depth + 1) * 2 * context**2 * dim)


def training_step(loss: Callable[[], Tensor], model: nn.Module, bf16: bool) -> Step:
    """Forward and backward."""

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        model.zero_grad()
        synchronize()

    return step


def training_clock() -> float:
    """Seconds of training so far: of the processor with one CPU thread, so that other programs take nothing away."""
    return time.process_time() if DEVICE == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def in_turns(steps: list[Step], repeats: int) -> list[list[float]]:
    """Seconds of each step, `repeats` times in turns, after one unmeasured turn: what disturbs one disturbs all."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 1):
        for step, measured in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            if turn:
                measured.append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} ... {max(seconds):.2f})"


def product_peak(dtype: torch.dtype, size: int = 8192 if DEVICE == "cuda" else 2048) -> float:
    """FLOP/s of the best of ten products of two square matrices: what the machine can do at most."""
    a, b = (torch.randn(size, size, dtype=dtype, device=DEVICE) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        synchronize()

    return 2 * size**3 / min(in_turns([product], 10)[0])


def train(
    model: PerceiverAR,
    rule: OptimConfig,
    windows: TrainingWindows,
    steps: int,
    batch: int,
    micro_batch: int | None = None,
) -> None:
    """So many steps on so many windows each, as the Trainer makes them but for shortened prefixes."""
    optimizer, micro_batch = make_optimizer(model, rule), micro_batch or batch
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(rule, (step + 0.5) / steps)
        for first in range(step * batch, (step + 1) * batch, micro_batch):
            (loss(model, windows.batch(first, micro_batch)) * micro_batch / batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), rule.grad_clip)
        optimizer.step()
        optimizer.zero_grad()


def loss(model: PerceiverAR, batch: dict[str, Tensor]) -> Tensor:
    """Nats per target of some windows."""
    batch = {name: x.to(model.device) for name, x in batch.items()}
    logits = model(batch["tokens"], model.config.context_length - model.config.num_latents, mask=batch.get("mask"))
    return next_token_loss(logits, batch["labels"])


def cached_bytes(model: PerceiverAR, prompt: int) -> int:
    """What the middle step of a growing window reads of each row's cache."""
    config, size = model.config, model.embed.weight.element_size()
    latents, context = 3 * config.num_latents // 4, min(prompt, config.context_length)
    numbers = context * len(config.cross_layers) * config.heads_cross * config.width_head_cross
    numbers += latents * config.num_layers * config.num_heads * config.width_head
    return 2 * numbers * size
