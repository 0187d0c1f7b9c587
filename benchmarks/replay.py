"""How long would a training step take on a GPU? An estimate without one, the same on every machine.

    make benchmark BENCH=replay ARGS="a b"

Runs a training step (bfloat16 autocast, gradient clipping, Muon) of the sizes of `gpu.py` on fake CUDA tensors, which
have no numbers, and adds up each operation's time on an H100: its bytes over 2.7 TB/s, or its FLOPs over what such
kernels reach (650 TFLOP/s of products in bfloat16, 350 and 270 of attention forward and backward), and 2.5
microseconds at least. Eager, a step takes the sum, or 6 microseconds for each launch if that is longer. "Fused" is what
a perfect compiler would leave: tensors between elementwise operations and norms are never written, and no time is lost
by launching. Compare estimates with each other, not with a clock.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import fake_cuda  # noqa: F401  # before torch
import torch
import torch.utils._pytree as pytree
from gpu import SETUPS, counted
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from perceiver_ar import PerceiverAR, PerceiverARConfig, next_token_loss
from perceiver_ar.config import OptimConfig
from perceiver_ar.costs import costs
from perceiver_ar.network import attention, streaming
from perceiver_ar.optim import make_optimizer

PEAK, BANDWIDTH, LEAST, LAUNCH = 989e12, 2.7e12, 2.5e-6, 6e-6
HALF = torch.float16, torch.bfloat16
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_foreach_mm"}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view"}
OPAQUE = {"embedding", "embedding_dense_backward", "index_add_", "topk", "sort", "gather", "index", "nll_loss_forward"}
"""Operations, beside products and attention, that a compiler leaves as they are: their inputs have to be in memory."""
OPERATORS = (attention._attention, attention._attention_backward, streaming._stream, streaming._stream_backward)
BODIES: dict[Any, Callable[..., Any]] = {operator._opoverload: operator._init_fn for operator in OPERATORS}


class Replay(TorchDispatchMode):
    """Estimates the time of every operation, those inside the library's own operators, too.

    An operator that is not PyTorch's, such as a kernel of your own, counts as attention if its name has that word, and
    is refused otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.seconds, self.fused = 0, 0.0, 0.0
        self.by_name = dict[str, float]()
        """Seconds."""
        self.wide_products = 0
        """Products of float32 matrices."""
        self.copies = 0
        """From the CPU to the device or back: they make the program wait."""
        self.unwritten: dict[int, Tensor] = {}
        """By storage: tensors that a fusing compiler has not written so far."""
        self.keys: tuple[Any, Any] | None = None
        """The dispatcher's state outside of this mode, which torch.func needs."""

    def __enter__(self) -> "Replay":
        super().__enter__()
        if self.keys is None:
            self.keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BODIES:
            assert self.keys is not None
            with self, torch._C._ForceDispatchKeyGuard(*self.keys), torch.no_grad():
                return BODIES[func](*args, **kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not (func.is_view or name in FREE or func.namespace == "prim" or name.startswith("_record_function")):
            read, written = ([x for x in pytree.tree_leaves(t) if isinstance(x, Tensor)] for t in ((args, kwargs), out))
            if read or written:
                self.count(func, args, read, written)
        return out

    def count(self, func: Any, args: tuple[Any, ...], read: list[Tensor], written: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        self.copies += len({x.device for x in read + written if x.ndim > 0}) > 1
        half = bool(read) and read[0].dtype in HALF
        self.wide_products += name in PRODUCTS and not half
        opaque = name in PRODUCTS or name in OPAQUE or "attention" in name or "foreach" in name
        seconds = (
            sum(map(size, read + written))
            / BANDWIDTH
            * (2 if name in ("index_add_", "embedding_dense_backward") else 1)
        )
        if name in PRODUCTS:
            seconds = max(seconds, product_seconds(read[-2], read[-1], half))
        elif "attention" in name:
            seconds = max(seconds, attention_seconds(name, args, half))
        elif func.namespace != "aten":
            raise NotImplementedError(f"the time of {func} is unknown: add a rule for it above this line")
        self.kernels += 1
        self.seconds += max(seconds, LEAST)
        self.by_name[name] = self.by_name.get(name, 0.0) + max(seconds, LEAST)
        fresh = {x.untyped_storage()._cdata: x for x in written}
        if not opaque:
            self.fused += sum(size(x) for x in read if x.untyped_storage()._cdata not in self.unwritten) / BANDWIDTH
            self.unwritten.update(fresh)
        else:
            for x in read:
                if self.unwritten.pop(x.untyped_storage()._cdata, None) is not None:
                    self.fused += size(x) / BANDWIDTH
            self.fused += max(seconds, LEAST)


def size(x: Tensor) -> int:
    """Bytes, those of expanded dimensions once."""
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride != 0) * x.element_size()


def product_seconds(a: Tensor, b: Tensor, half: bool) -> float:
    """Tiles of 128 x 256 on 132 multiprocessors; long sums are split among those that are idle."""
    batch, (m, k), n = math.prod(a.shape[:-2]), a.shape[-2:], b.shape[-1]
    tiles = batch * math.ceil(m / 128) * math.ceil(n / 256)
    tiles *= max(1, min(132 // tiles, k // 512))
    rounds = math.ceil(tiles / 132) * 132 / tiles
    return 2 * batch * m * k * n * rounds / (650e12 if half else 50e12) + 2e-6


def attention_seconds(name: str, args: tuple[Any, ...], half: bool) -> float:
    """`args` begin as those of `Kernels` (network/kernels.py): q, k, v; of a backward d_out, q, k, v."""
    backward = "backward" in name
    q, k = args[1:3] if backward else args[:2]
    (B, H, N, C), K = q.shape, k.shape[2]
    flops = 4 * B * H * N * K * C * (2.5 if backward else 1) * (0.5 if any(x is True for x in args) and N == K else 1)
    speed = {(True, False): 350e12, (True, True): 270e12, (False, False): 60e12, (False, True): 45e12}[half, backward]
    return flops / speed + 5e-6


def replay(config: PerceiverARConfig, rows: int) -> dict[str, Any]:
    """The estimates of one training step."""
    streams = config.context_length >= 1 << 18  # as the automatic choice on 80 GB
    chunk = streaming.piece_length(config, rows, torch.device("cuda")) if streams else 0
    with torch.device("meta"):
        model = PerceiverAR(config.replace(prefix_chunk=chunk))
    parts = {name: Replay() for name in ("forward", "backward", "update")}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cuda")
        optimizer = make_optimizer(model, OptimConfig(), torch.bfloat16)
        T, N = config.context_length, config.num_latents
        tokens = torch.zeros(rows, T, dtype=torch.uint8, device="cuda")
        labels = torch.zeros(rows, N, dtype=torch.int64, device="cuda")
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would look for a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        with parts["forward"]:
            loss = next_token_loss(model(tokens, T - N), labels)
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
        with parts["backward"]:
            loss.backward()
        optimizer.step()  # makes the states
        with parts["update"]:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)  # as by default on a GPU
            optimizer.step()
    flops = rows * costs(config).training_flops
    eager = sum(max(part.seconds, LAUNCH * part.kernels) for part in parts.values())
    fused = sum(part.fused for part in parts.values())
    names = {name for part in parts.values() for name in part.by_name}
    times = {name: sum(part.by_name.get(name, 0.0) for part in parts.values()) for name in names}
    dearest = sorted(times, key=times.__getitem__, reverse=True)[:6]
    return {
        "kernels": {name: part.kernels for name, part in parts.items()},
        "wide products": sum(part.wide_products for part in parts.values()),
        "copies": sum(part.copies for part in parts.values()),
        "eager, ms": round(1000 * eager, 2),
        "eager, of the peak": round(flops / eager / PEAK, 4),
        "fused, ms": round(1000 * fused, 2),
        "fused, of the peak": round(flops / fused / PEAK, 4),
        "dearest, ms": {name: round(1000 * times[name], 2) for name in dearest},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {setup.name.replace(",", "").replace(" ", "_"): setup for setup in SETUPS}
    parser.add_argument("setups", nargs="*", help=f"of {', '.join(names)}, or tiny; none: all")
    args = parser.parse_args()
    if unknown := [name for name in args.setups if name not in (*names, "tiny")]:
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(names)}, tiny")
    for name in args.setups or names:
        if name == "tiny":
            config, rows = PerceiverARConfig(context_length=256, num_latents=64, dim=128, num_layers=2, num_heads=2), 2
        else:
            config, rows = counted(names[name], "ours"), names[name].batch
        print(json.dumps({"setup": name, "rows": rows} | replay(config, rows)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
