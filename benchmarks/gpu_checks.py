"""The checks of `gpu.py`: what a device computes, against float64 on the CPU, with gradients.

Each check is a function of the device ("cuda", or "cpu" to rehearse) that returns its figures and whether it `holds`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from perceiver_ar import PerceiverAR, PerceiverARConfig, next_token_loss, stream
from perceiver_ar.config import OptimConfig
from perceiver_ar.generation.sampling import Sampling
from perceiver_ar.network.attention import Piece, attend
from perceiver_ar.objective import IGNORE, head_loss
from perceiver_ar.optim import make_optimizer

Check = Callable[[str], dict[str, Any]]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest error of attention, relative to the largest number of the exact tensor."""
SMALL = PerceiverARConfig(vocab_size=50, context_length=256, num_latents=48, dim=128, num_layers=2, num_heads=2)


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact number; NaN counts as infinite."""
    difference = (actual.double().cpu() - exact.double().cpu()).abs().max().item()
    return difference / max(exact.abs().max().item(), 1e-30) if difference == difference else float("inf")


def verdict(worst: float, limit: float) -> dict[str, Any]:
    return {"error": worst, "limit": limit, "holds": worst <= limit}


def exact_attention(q: Tensor, pieces: list[Piece]) -> Tensor:
    """By the definition, in ordinary operations; zeros for a query that sees nothing."""
    columns = []
    for piece in pieces:
        seen = torch.ones(len(q), 1, q.shape[2], piece.k.shape[2], dtype=torch.bool)
        seen = seen.tril() if piece.causal else seen
        columns.append(seen if piece.mask is None else seen & piece.mask[:, None, None])
    seen = torch.cat(columns, -1)
    k, v = torch.cat([piece.k for piece in pieces], 2), torch.cat([piece.v for piece in pieces], 2)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -1e30)
    return (scores.softmax(-1) * seen) @ v


def attention(dtype: torch.dtype, masked: bool, N: int, K: int, channels: int, scale: float = 1.0) -> Check:
    """A plain piece of K keys and, for several queries, a causal piece of N. Masks hide all keys of some rows."""

    def check(device: str) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(N + K)

        def tensor(length: int) -> Tensor:
            x = torch.randn(3, length, 2, channels, generator=generator, dtype=torch.float64).transpose(1, 2)
            return x.to(dtype).double()  # rounded, so that rounding the inputs is no error

        lengths = [K, N] if N > 1 else [K]
        masks: list[Tensor | None] = [None] * 2
        if masked:
            some = torch.tensor([0.0, 0.7, 0.7])[:, None]
            masks = [torch.rand(3, length, generator=generator) < some for length in lengths]
        q, keys = scale * tensor(N), [(tensor(n), tensor(n)) for n in lengths]
        weight = tensor(N)

        def run(target: str, kind: torch.dtype, attention: Callable[..., Tensor]) -> list[Tensor]:
            with torch.enable_grad():
                inputs = [x.to(target, kind).requires_grad_(N > 1) for x in (q, *(x for pair in keys for x in pair))]
                there = [None if mask is None else mask.to(target) for mask in masks]
                pairs = zip(inputs[1::2], inputs[2::2], there, strict=False)
                pieces = [Piece(k, v, causal=i == 1, mask=mask) for i, (k, v, mask) in enumerate(pairs)]
                out = attention(inputs[0], pieces)
                if N == 1:
                    return [out]
                return [out, *torch.autograd.grad(out, inputs, weight.to(out))]

        pairs = zip(run(device, dtype, attend), run("cpu", torch.float64, exact_attention), strict=True)
        return verdict(max(error(a, b) for a, b in pairs), min(0.2, TOLERANCE[dtype] * scale))

    return check


def results(model: PerceiverAR, tokens: Tensor, bf16: bool = False, **inputs: Any) -> list[Tensor]:
    """Logits, and the gradients of all parameters."""
    model.zero_grad()
    N = model.config.num_latents
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        logits = model(tokens[:, :-1], tokens.shape[1] - 1 - N, **inputs)
        loss = next_token_loss(logits, tokens[:, -N:])
    loss.backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def pair(device: str, **settings: Any) -> tuple[PerceiverAR, PerceiverAR]:
    """A network on the device, and the same in float64 on the CPU, dense."""
    config = SMALL.replace(init="torch", **settings)
    torch.manual_seed(0)
    exact = PerceiverAR(config.replace(prefix_chunk=0)).double()
    model = PerceiverAR(config)
    model.load_state_dict(exact.state_dict())
    return model.to(device), exact


def network(bf16: bool = False, masked: bool = False, kept: bool = False, **settings: Any) -> Check:
    def check(device: str) -> dict[str, Any]:
        model, exact = pair(device, **settings)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(50, (3, 257), generator=generator)
        inputs: dict[str, Tensor] = {}
        if masked:
            inputs["mask"] = torch.ones(3, 256, dtype=torch.bool)
            inputs["mask"][1, :100] = False
            inputs["mask"][2, :250] = False
        if kept:
            inputs["prefix_keep"] = torch.rand(3, 208, generator=generator).argsort(-1)[:, :104]
        there = {name: x.to(device) for name, x in inputs.items()}
        found, expected = results(model, tokens.to(device), bf16, **there), results(exact, tokens, False, **inputs)
        # Of bfloat16 the direction of each gradient has to be right, of float32 each number. A gradient smaller than a
        # hundredth of all is measured against that: the query gain's is a sum of thousands of numbers that cancel.
        if bf16:
            least = 0.01 * torch.stack([b.norm() for b in expected[1:]]).norm()
            pairs = zip(found, expected, strict=True)
            worst = max(float((a.double().cpu() - b).norm() / b.norm().clamp(min=least)) for a, b in pairs)
        else:
            worst = max(map(error, found, expected))
        return verdict(worst, 0.05 if bf16 else 2e-3)

    return check


def finite(device: str) -> dict[str, Any]:
    """Scores without bounds, rows of padding: no NaN in output or gradients."""
    model, _ = pair(device, qk_norm=False, local_context=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(8.0 if "q_proj" in name or "kv_proj" in name else 1.0)
    tokens = torch.randint(50, (4, 257), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(4, 256, dtype=torch.bool, device=device)
    mask[1, :240], mask[2] = False, False
    found = results(model, tokens, bf16=True, mask=mask)
    bad = sum(int(not x.isfinite().all()) for x in found)
    return {"error": float(bad), "limit": 0.0, "holds": bad == 0}


def generation(compiled: bool, **settings: Any) -> Check:
    """Logits of a stream over rows of different lengths, against forwards over the windows that it reports."""

    def check(device: str) -> dict[str, Any]:
        model, exact = (x.eval() for x in pair(device, context_length=96, num_latents=24, **settings))
        prompt = [torch.randint(50, (n,), generator=torch.Generator().manual_seed(n)) for n in (100, 37, 60)]
        rows, worst = [ids.tolist() for ids in prompt], 0.0
        for step in stream(model, prompt, max_new_tokens=40, seed=0, compile=compiled):
            for r, row in enumerate(rows):
                start, latents = int(step.window_start[r]), int(step.num_latents[r])
                window = torch.tensor([row[start:]])
                with torch.no_grad():
                    expected = exact(window, window.shape[1] - latents)[0, -1]
                worst = max(worst, error(step.logits[r], expected))
                row.append(int(step.tokens[r]))
        return verdict(worst, 2e-3)

    return check


def draws(device: str) -> dict[str, Any]:
    """Ids drawn from logits on the device, which shall be those drawn on the CPU."""
    logits = torch.randn(64, 50_257, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    different = 0
    for sampling in (Sampling(), Sampling(0.8, top_k=100), Sampling(1.2, top_p=0.9), Sampling(0.7, min_p=0.01)):
        here, there = (
            sampling.draw(x, [torch.Generator().manual_seed(r) for r in range(64)]).cpu()
            for x in (logits, logits.to(device))
        )
        different += int((here != there).sum())
    return {"different": different, "holds": different == 0}


def large_vocabulary(device: str) -> dict[str, Any]:
    """The loss without all logits at once, under bfloat16 autocast, with the gradients of latents and head."""
    torch.manual_seed(0)
    exact, latents = torch.nn.Linear(64, 3000, dtype=torch.float64), torch.randn(2, 300, 64, dtype=torch.float64)
    head = torch.nn.Linear(64, 3000)
    head.load_state_dict(exact.state_dict())
    labels = torch.randint(3000, (2, 300))
    labels[0, :7] = IGNORE
    found: list[list[Tensor]] = []
    for layer, x, loss in (
        (head.to(device), latents.to(device, torch.float32), lambda u, layer, y: head_loss(u, layer, y)),
        (exact, latents, lambda u, layer, y: next_token_loss(layer(u), y)),
    ):
        x.requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=layer is head):
            value = loss(x, layer, labels.to(x.device))
        assert value.dtype == x.dtype
        found.append([value.detach(), *torch.autograd.grad(value, [x, layer.weight, layer.bias])])
    return verdict(max(map(error, *found)), 3e-2)


def one_graph(device: str) -> dict[str, Any]:
    """Training compiles without a break, once for all prefix lengths, and gives what it gives uncompiled."""
    from torch._dynamo.backends.registry import lookup_backend

    model, _ = pair(device, num_layers=1)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("inductor" if device == "cuda" else "eager")(graph, inputs)

    def loss(tokens: Tensor, prefix_len: int) -> Tensor:
        return next_token_loss(model(tokens, prefix_len), tokens[:, prefix_len:])

    torch._dynamo.reset()
    compiled, worst = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend), 0.0
    for length in (250, 180, 111):
        tokens = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0)).to(device)
        found = []
        for function in (compiled, loss):
            model.zero_grad()
            value = function(tokens, length - 48)
            value.backward()
            found.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        worst = max(worst, *map(error, *found))
    return verdict(worst, 1e-3) | {"graphs": len(graphs), "holds": worst <= 1e-3 and len(graphs) == 1}


def optimizer(device: str) -> dict[str, Any]:
    """Steps of Muon and AdamW, in float32."""
    models = [PerceiverAR(SMALL), PerceiverAR(SMALL).to(device)]
    models[1].load_state_dict(models[0].state_dict())
    rules = [make_optimizer(model, OptimConfig(weight_decay=0.1)) for model in models]
    for seed in range(3):
        for model, rule in zip(models, rules, strict=True):
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            rule.step()
    return verdict(max(error(b, a) for a, b in zip(*(model.parameters() for model in models), strict=True)), 1e-2)


def checks() -> Iterator[tuple[str, Check]]:
    for dtype in TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        for masked in (False, True):
            shapes = [(48, 100, 64), (130, 517, 128), (1, 1000, 64), (1, 2048, 64)] + ([] if masked else [(33, 65, 24)])
            for N, K, channels in shapes:
                how = f"{name}{', masked' if masked else ''}, {N} queries, {K} keys, {channels} channels"
                yield f"attention, {how}", attention(dtype, masked, N, K, channels)
    yield "attention, bfloat16, scores to 200", attention(torch.bfloat16, True, 48, 256, 64, scale=30.0)
    forms: dict[str, dict[str, Any]] = {
        "dense": {"prefix_chunk": 0},
        "streamed": {"prefix_chunk": 56},
        "masked": {"prefix_chunk": 0, "masked": True},
        "streamed, masked": {"prefix_chunk": 56, "masked": True},
        "prefix dropout": {"prefix_chunk": 0, "kept": True},
        "streamed, prefix dropout": {"prefix_chunk": 56, "kept": True},
        "no local context": {"prefix_chunk": 56, "local_context": 1},
        "position table": {"prefix_chunk": 56, "position_table": "learned", "rotary": False},
        "unbounded scores": {"prefix_chunk": 0, "qk_norm": False},
    }
    for bf16 in (False, True):
        for name, settings in forms.items():
            yield f"network, {'bfloat16' if bf16 else 'float32'}, {name}", network(bf16, **settings)
    yield "finite gradients under masks", finite
    yield "generation", generation(False)
    yield "generation, position table", generation(False, position_table="learned")
    yield "generation, compiled", generation(True)
    yield "draws of a large vocabulary", draws
    yield "loss of a large vocabulary", large_vocabulary
    yield "optimizer", optimizer
    yield "one graph", one_graph


CHECKS = dict(checks())
