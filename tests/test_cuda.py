"""CUDA's path, held without a GPU.

Tensors on device "meta" have shapes, strides and dtypes, but no numbers. The library takes CUDA's kernels for them, so
forward and backward make the calls that they would make on a GPU. PyTorch's meta functions hold these calls to the
kernels' schemas; the mode below adds what only the CUDA sources demand. Code that waits for a number of a GPU fails.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # not inside a test, which would be slow
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perceiver_ar import OptimConfig, PerceiverAR, PerceiverARConfig, next_token_loss
from perceiver_ar.generation.cache import Cache
from perceiver_ar.generation.compiled import next_logits
from perceiver_ar.generation.decoder import Decoder
from perceiver_ar.generation.rows import Row, RowSettings
from perceiver_ar.generation.sampling import Sampling
from perceiver_ar.network import attention, streaming
from perceiver_ar.network.inputs import reach
from perceiver_ar.optim import MuonAdamW, make_optimizer

HALF = torch.float16, torch.bfloat16
BODIES: dict[Any, Callable[..., Any]] = {
    operator._opoverload: operator._init_fn
    for operator in (
        attention._attention, attention._attention_backward, streaming._stream, streaming._stream_backward
    )
}  # fmt: skip


class Calls(TorchDispatchMode):
    """Counts the calls of kernels, those inside the library's own operators, too, and checks those of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = Counter[str]()
        """Calls by name; views do not count."""
        self.copies_between_devices = 0
        self.outside = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BODIES:  # on meta tensors, torch would only ask for the shapes of the result
            with torch._C._ForceDispatchKeyGuard(*self.outside), torch.no_grad(), self:  # in a mode, torch.func is off
                return BODIES[func](*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        if name in CHECKS:
            CHECKS[name](out, *args)
        if not (func.is_view or name in NO_KERNEL):
            self.kernels[name] += 1
        if name in ("_to_copy", "copy_") and isinstance(args[-1 if name == "copy_" else 0], Tensor):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
            self.copies_between_devices += source.device != target.device
        return out


NO_KERNEL = (
    "_record_function_enter_new",
    "_record_function_exit",
    "detach",
    "detach_",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "lift_fresh",
    "_unsafe_view",
)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, flash: bool) -> None:
    """What `check_tensors` in flash_api.cpp and `Kernel::check_supported` in kernel_forward.h demand."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (HALF if flash else (*HALF, torch.float32))
    aligned = 8 if q.dtype in HALF else 4
    for x in (q, k, v):
        assert x.stride(-1) == 1 and x.shape[-1] % aligned == 0 and x.storage_offset() % aligned == 0
        assert all(s % aligned == 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1)
    assert k.shape[2] > 0 and q.shape[2] > 0
    if flash:
        assert bias is None and q.shape[-1] <= 256
    else:
        assert q.shape[0] < 1 << 16  # the batch is the grid's third dimension
    if bias is not None:
        assert bias.dtype == q.dtype and bias.shape == (*q.shape[:3], k.shape[2]) and bias.stride(3) == 1
        assert all(s % aligned == 0 for s, n in zip(bias.stride()[:3], bias.shape[:3], strict=True) if n > 1)


def check_backward(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, out: Tensor, lse: Tensor) -> None:
    assert d_out.dtype == out.dtype == q.dtype and d_out.shape == out.shape == q.shape
    assert d_out.stride(-1) == 1 and lse.dtype == torch.float32 and lse.is_contiguous()
    assert out.transpose(1, 2).is_contiguous()  # else copied by flash; the efficient kernel takes it for granted


def flash_forward(result: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False) -> None:
    check_inputs(q, k, v, None, flash=True)
    assert dropout == 0.0 and (not causal or q.shape[2] == k.shape[2])


def flash_backward(
    result: Any, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *_: Any
) -> None:
    check_inputs(q, k, v, None, flash=True)
    check_backward(q, k, v, d_out, out, lse)
    assert lse.shape == q.shape[:3]


def efficient_forward(result: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: Any) -> None:
    check_inputs(q, k, v, bias, flash=False)


def efficient_backward(
    result: Any, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, *_: Any
) -> None:
    check_inputs(q, k, v, bias, flash=False)
    check_backward(q, k, v, d_out, out, lse)
    assert lse.shape == (*q.shape[:2], math.ceil(q.shape[2] / 32) * 32)


CHECKS: dict[str, Callable[..., None]] = {
    "_scaled_dot_product_flash_attention": flash_forward,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_scaled_dot_product_efficient_attention": efficient_forward,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
}

SMALL = PerceiverARConfig(context_length=256, num_latents=45, dim=128, num_layers=2, num_heads=2, vocab_size=300)


def attentions(calls: Calls) -> set[str]:
    """Kernels of attention without what their names share."""
    names = [name for name in calls.kernels if "attention" in name]
    return {name.removeprefix("_scaled_dot_product_").replace("_attention", "") for name in names}


def network(settings: dict[str, Any], dtype: torch.dtype) -> PerceiverAR:
    with torch.device("meta"):
        return PerceiverAR(SMALL.replace(**settings)).to(dtype)


@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefix_chunk": 104},
        {"prefix_dropout": 0.5, "activation": "gelu"},
        {"prefix_chunk": 50, "prefix_dropout": 0.5},
        {"prefix_chunk": 104, "qk_norm": False, "norm": "rmsnorm"},
        {"prefix_chunk": 104, "position_table": "learned", "rotary": False},
        {"prefix_chunk": 104, "local_context": 1, "head_dim": 24},
        {"latents_per_position": 2},
        {"latent_keys": "query", "local_context": 1},
        {"cross_layers": (0, 1), "attention_bias": True},
    ],
    ids=str,
)
def test_training_calls_attention_kernels_as_cudas_sources_demand(
    settings: dict[str, Any], dtype: torch.dtype, masked: bool
) -> None:
    model = network(settings, dtype)
    tokens = torch.zeros(2, 256, dtype=torch.int64, device="meta")
    mask = torch.ones(2, 256, dtype=torch.bool, device="meta") if masked else None
    with Calls() as calls:
        next_token_loss(model(tokens, 211, mask=mask), tokens[:, 211:]).backward()
    kernel = "efficient" if masked or dtype == torch.float32 else "flash"
    assert attentions(calls) == {kernel, f"{kernel}_backward"}
    assert not {"bmm", "baddbmm"} & calls.kernels.keys()  # no attention in ordinary operations
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "lengths", "kernels"),
    [
        ({}, (30, 30), ("flash",)),
        ({}, (30, 14), ("efficient", "flash")),
        ({"local_context": 1, "position_table": "learned"}, (30, 14), ("efficient", "flash")),
        ({"latent_keys": "query", "local_context": 1}, (30, 30), ("flash",)),
    ],
    ids=str,
)
def test_decoding_reads_no_number_from_the_device(
    settings: dict[str, Any], lengths: tuple[int, int], kernels: tuple[str, ...]
) -> None:
    """Prompts are read, the cache grows and is full, windows refill, and a row ends."""
    sizes = {"context_length": 20, "num_latents": 6, "num_layers": 1}
    model = network({**sizes, **settings}, torch.bfloat16).eval()
    ends = RowSettings(stops=((7,),))
    rows = [Row(r, torch.zeros(n, dtype=torch.int64), model.config, ends) for r, n in enumerate(lengths)]
    with torch.inference_mode(), Calls() as calls:
        decoder = Decoder(model, rows, num_samples=1, max_new_tokens=20)
        for _ in range(9):
            assert decoder.next_logits().shape == (2, model.config.vocab_size)
            decoder.add([0, 1])
        decoder.add([7, 1])
        assert decoder.next_logits().shape == (1, model.config.vocab_size)
    assert attentions(calls) == {*kernels}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_over_a_fixed_cache_call_attention_kernels_as_cudas_sources_demand(dtype: torch.dtype) -> None:
    model = network({}, dtype).eval()
    cache = Cache.empty(model.config, 3, 256, dtype, torch.device("meta"))
    cache.fix()
    tokens, positions = (torch.zeros(3, n, dtype=torch.int64, device="meta") for n in (reach(model.config) + 1, 1))
    for count in (0, 7, 300):
        cache.cross.counts[:] = cache.self_attention.counts[:] = count
        cache.aim()
        with torch.inference_mode(), Calls() as calls:
            assert next_logits(model, tokens, positions, cache).shape == (3, model.config.vocab_size)
        assert attentions(calls) == {"efficient"} and calls.kernels["_scaled_dot_product_efficient_attention"] == 3


# Graphs of torch.compile.


class Graphs(list[Any]):
    """A backend of torch.compile that keeps the graphs, and runs them as they are."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.append(graph)
        return graph.forward


def test_training_compiles_to_one_graph_for_all_prefix_lengths() -> None:
    model, graphs = network({"num_layers": 1}, torch.bfloat16), Graphs()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=graphs)
    def loss(tokens: Tensor, prefix_len: int) -> Tensor:
        return next_token_loss(model(tokens, prefix_len), tokens[:, prefix_len:])

    for length in (200, 120, 83):
        tokens = torch.zeros(2, length, dtype=torch.int64, device="meta")
        loss(tokens, length - 45).backward()
    assert len(graphs) == 1


def test_a_decoding_step_compiles_to_one_graph_for_all_counts() -> None:
    model, graphs = network({"num_layers": 1}, torch.bfloat16).eval(), Graphs()
    cache = Cache.empty(model.config, 3, 256, torch.bfloat16, torch.device("meta"))
    cache.fix()
    torch._dynamo.reset()
    step = torch.compile(next_logits, fullgraph=True, dynamic=False, backend=graphs)
    tokens, positions = (torch.zeros(3, n, dtype=torch.int64, device="meta") for n in (reach(model.config) + 1, 1))
    for count in (0, 7, 300):
        cache.cross.counts[:] = cache.self_attention.counts[:] = count
        with torch.inference_mode():
            cache.aim()
            step(model, tokens, positions, cache)
    assert len(graphs) == 1


# Numbers of kernels, which a change may lower but not raise unnoticed.


def test_a_training_step_launches_no_more_kernels_than_it_did() -> None:
    model = network({"num_layers": 8}, torch.float32)
    optimizer = make_optimizer(model, OptimConfig(), torch.bfloat16)
    assert isinstance(optimizer, MuonAdamW)
    optimizer.adamw.param_groups.clear()  # one fused kernel, which takes no meta tensors
    tokens = torch.zeros(2, 256, dtype=torch.int64, device="meta")
    with Calls() as forward:
        loss = next_token_loss(model(tokens, 211), tokens[:, 211:])
    with Calls() as backward:
        loss.backward()
    optimizer.step()  # makes the states
    with Calls() as update:
        optimizer.step()
    for calls, budget in ((forward, 238), (backward, 334), (update, 123)):
        assert calls.kernels.total() <= budget, calls.kernels
    assert forward.copies_between_devices == backward.copies_between_devices == 0


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(0.7, top_k=9, top_p=0.9, min_p=0.01)], ids=["greedy", "filters"]
)
def test_ids_are_drawn_on_the_device(sampling: Sampling) -> None:
    """Of meta tensors, which have no numbers to read."""
    logits = torch.zeros(3, 50, dtype=torch.float64, device="meta")
    ids = sampling.draw(logits, [torch.Generator() for _ in logits])
    assert ids.shape == (3,) and ids.device.type == "meta"


def test_a_decoding_step_launches_no_more_kernels_than_it_did() -> None:
    model = network({"num_layers": 8}, torch.bfloat16).eval()
    rows = [Row(0, torch.zeros(100, dtype=torch.int64), model.config)]
    with torch.inference_mode():
        decoder = Decoder(model, rows, num_samples=1, max_new_tokens=20)
        decoder.add([0])
        with Calls() as calls:
            decoder.next_logits()
    assert calls.kernels.total() <= 192, calls.kernels
