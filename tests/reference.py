"""Perceiver AR once more, as plainly as possible: what the tests compare the library with, and what they draw from.

Everything here is written from the mathematics (docstrings of `network/model.py` and `network/attention.py`), with
explicit rectangular masks, einsum, complex numbers for rotations, and no call into the library's own computations.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.network.model import PerceiverAR


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Equal shapes, and the largest difference at most `tolerance` of the expected values' scale (at least 1)."""
    assert actual.shape == expected.shape, f"{what} {tuple(actual.shape)} {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    bound = tolerance * max(1.0, expected.double().abs().max().item())
    assert error <= bound, f"{what} differs by {error:.3g}, more than {bound:.3g}"  # also where the error is NaN


def naive_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, factor: Tensor | None = None) -> Tensor:
    """Softmax attention of q (B, H, N, C) to k, v (B, H, K, C); `seen` broadcasts to (B, H, N, K).

    A query that sees nothing gets zeros. `factor` multiplies probabilities (dropout).
    """
    scores = torch.einsum("bhnc,bhkc->bhnk", q, k) / math.sqrt(q.shape[-1])
    probabilities = scores.masked_fill(~seen, -1e30).softmax(-1) * seen
    if factor is not None:
        probabilities = probabilities * factor
    return torch.einsum("bhnk,bhkc->bhnc", probabilities, v)


def naive_logits(
    config: PerceiverARConfig,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    prefix_len: int,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    kept: Sequence[Tensor] | None = None,
) -> Tensor:
    """Logits (B, N, V) of a network with these weights (names of its state dict), in the weights' precision.

    mask (B, T) is True at real tokens; positions (B, T) are running positions, by default the number of real tokens
    before each one, or after it where they count from the end; kept has for each cross-attention layer a bool (B, P),
    True where prefix dropout leaves the token.
    """
    B, T = tokens.shape
    P, K = prefix_len, config.latents_per_position
    real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    if positions is None:
        counted = [slice(i + 1, None) if config.positions_from_end else slice(i) for i in range(T)]
        positions = torch.tensor([[int(real[b, tokens].sum()) for tokens in counted] for b in range(B)])
    steps = torch.arange(T - P).repeat_interleave(K)  # latents 0 ... K - 1 of a position, then those of the next
    causal = torch.arange(T)[None, :] <= P + steps[:, None]  # (N K, T): a latent sees tokens 0 ... P + its step

    def linear(x: Tensor, name: str) -> Tensor:
        y = torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"])
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(x: Tensor, name: str) -> Tensor:
        if config.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
        return x + weights[f"{name}.bias"] if config.norm == "layernorm" else x

    def activate(x: Tensor, name: str = config.activation) -> Tensor:
        if name in ("relu", "relu2"):
            return torch.where(x > 0, x if name == "relu" else x * x, 0.0)
        if name == "gelu":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(activate(linear(norm(x, f"{name}.norm"), f"{name}.up_proj")), f"{name}.down_proj")

    def heads(x: Tensor, count: int) -> Tensor:
        return torch.stack(x.split(x.shape[-1] // count, dim=-1), dim=1)

    def turn(x: Tensor, at: Tensor | None, most: float = 1.0) -> Tensor:
        """Queries or keys (B, H, K, C) as they are scored; `at` (B, K) where they are rotated.

        most: of the channels are rotated.
        """
        if config.qk_norm:
            centred = x - x.mean(-1, keepdim=True) if config.norm == "layernorm" else x
            eps = 1e-5 if config.norm == "layernorm" else torch.finfo(x.dtype).eps
            x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        if not config.rotary or at is None:
            return x
        pairs = math.floor(round(config.rotary_fraction * x.shape[-1] / 2, 6))
        pairs = min(pairs, math.floor(math.ceil(most * x.shape[-1]) / 2))
        base = config.context_length if config.rotary_base is None else config.rotary_base
        bands = pairs - 1 if config.rotary_endpoint else pairs
        turned = []
        for head in range(x.shape[1]):
            y = x[:, head]
            if head < math.floor(round(config.rotary_heads_fraction * x.shape[1], 6)):
                a, b, rest = y[..., :pairs], y[..., pairs : 2 * pairs], y[..., 2 * pairs :]
                speed = torch.tensor([base ** -(j / max(bands, 1)) for j in range(pairs)], dtype=x.dtype)
                z = torch.complex(a, b) * torch.exp(1j * at[..., None] * speed)
                y = torch.cat([z.real, z.imag, rest], dim=-1)
            turned.append(y)
        return torch.stack(turned, dim=1)

    e, W = weights["embed.weight"][tokens], config.local_context
    h, preceding = e.clone(), torch.zeros_like(e)  # of each token, and of the real token before it without its position
    for b, t in itertools.product(range(B), range(T)):
        real_before = [i for i in reversed(range(t)) if real[b, i]]
        for i in range(1, min(W, len(real_before) + 1)):
            h[b, t] += weights["local_conv"][i - 1] * e[b, real_before[i - 1]]
        if real_before:
            preceding[b, t] = h[b, real_before[0]]
    rest = positions
    for axis in reversed(range(len(config.table_sizes))):
        h = h + weights[f"position_embed.{axis}.weight"][rest % config.table_sizes[axis]]
        rest = rest // config.table_sizes[axis]
    u = linear(h[:, P:], "query_proj") if config.query_proj else h[:, P:]
    if config.learned_queries != "none":
        rows = [-1 if config.learned_queries == "shared" else i - T for i in range(P, T)]
        u = weights["query_embed.weight"][rows].expand(B, -1, -1)
    if K > 1:
        u = u.repeat_interleave(K, 1) + weights["latent_embed.weight"].repeat(T - P, 1)
    for i in range(config.query_mlp_layers):
        u = activate(linear(u, f"query_mlp.{i}"), config.query_mlp_activation or config.activation)
    latents_at = positions[:, P:].repeat_interleave(K, 1) + config.query_position_offset

    def cross_layer(u: Tensor, i: int) -> Tensor:
        name, count = f"cross_attention.{i}", config.heads_cross
        x = norm(u, f"{name}.query_norm")
        context = norm(h, f"{name}.context_norm")
        if config.latent_keys == "query":
            context = torch.cat([context[:, :P], x], dim=1)
        k, v = linear(context, f"{name}.kv_proj").chunk(2, dim=-1)
        k = heads(k, count)
        if W > 1:
            offset = heads(
                linear(norm(preceding, f"{name}.context_norm"), f"{name}.kv_proj").chunk(2, dim=-1)[0], count
            )
            half = math.ceil(k.shape[-1] / 2)
            k = torch.cat([k[..., :half], offset[..., half:]], dim=-1)
        seen = causal & real[:, None, None, :]
        if kept is not None:
            seen = seen & torch.cat([kept[i], torch.ones(B, T - P, dtype=torch.bool)], dim=1)[:, None, None, :]
        rotated = 1.0 if W == 1 else 0.5
        q = turn(heads(linear(x, f"{name}.q_proj"), count), latents_at, rotated)
        if W > 1 and config.qk_norm:
            q = q * weights[f"{name}.query_gain"][:, None, None]
        out = naive_attention(q, turn(k, positions, rotated), heads(v, count), seen)
        out = linear(out.transpose(1, 2).flatten(2), f"{name}.out_proj")
        u = u + out if config.query_residual else out
        return u + mlp(u, f"{name}.mlp")

    def self_layer(u: Tensor, i: int) -> Tensor:
        name, count = f"self_attention.{i}", config.num_heads
        q, k, v = linear(norm(u, f"{name}.norm"), f"{name}.qkv_proj").chunk(3, dim=-1)
        at = latents_at if config.rotary_layers is None or i < config.rotary_layers else None
        seen = (steps[None, :] <= steps[:, None]).expand(B, 1, -1, -1)
        if config.mask_self_attention:
            seen = seen & real[:, None, None, P:].repeat_interleave(K, -1)
        out = naive_attention(turn(heads(q, count), at), turn(heads(k, count), at), heads(v, count), seen)
        u = u + linear(out.transpose(1, 2).flatten(2), f"{name}.out_proj")
        return u + mlp(u, f"{name}.mlp")

    for i in range(config.num_layers + 1):
        for c, before in enumerate(config.cross_layers):
            if before == i:
                u = cross_layer(u, c)
        if i < config.num_layers:
            u = self_layer(u, i)
    u = norm(u, "norm") if config.final_norm else u
    return linear(u.unflatten(1, (T - P, K)).mean(2), "head")


def randomize(model: PerceiverAR, seed: int) -> PerceiverAR:
    """Gives every trained number of a model a random value: no zero matrices, no identity norms, no zero biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # the sinusoidal tables
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "embed" in name or name == "local_conv":
                parameter.copy_(noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


class Case(NamedTuple):
    """A network in evaluation mode and something to feed it."""

    model: PerceiverAR
    tokens: Tensor
    """(B, T)"""
    prefix_len: int


class Adapted(torch.nn.Linear):
    """A projection that is more than its weights."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> PerceiverARConfig:
    """Small networks over the whole range of the settings, dropouts apart; `fixed` settings are taken as they are."""
    context_length = fixed.get("context_length") or draw(st.integers(1, 10))
    num_layers = draw(st.integers(0, 3))
    dim = draw(st.sampled_from([4, 6, 8, 12]))
    query_proj = draw(st.booleans())
    embed_dim = (
        fixed["embed_dim"] if "embed_dim" in fixed else draw(st.sampled_from([None, 4, 6])) if query_proj else None
    )
    same_width = embed_dim in (None, dim)
    position_table = fixed.get("position_table") or draw(st.sampled_from(["none", "learned", "sinusoidal"]))
    local_context = fixed.get("local_context") or draw(st.integers(1, 8))
    tables = st.sampled_from([(), (12,), (3, 4), (2, 2, 3)])
    fraction = st.one_of(st.sampled_from([1.0, 0.5, 0.0]), st.floats(0, 1))
    settings = {
        "vocab_size": draw(st.integers(2, 7)),
        "context_length": context_length,
        "num_latents": draw(st.integers(1, context_length)),
        "dim": dim,
        "num_layers": num_layers,
        "num_heads": draw(st.sampled_from([1, 2])),
        "local_context": local_context,
        "head_dim": draw(st.sampled_from([None, 8, 5, 4, 3, 2, 1])),
        "mlp_ratio": draw(st.sampled_from([0.5, 1.0, 2.5])),
        "cross_layers": tuple(sorted(draw(st.lists(st.integers(0, num_layers), min_size=0, max_size=3)))),
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "qk_norm": draw(st.booleans()),
        "activation": draw(st.sampled_from(["relu2", "relu", "gelu", "gelu_tanh"])),
        "final_norm": draw(st.booleans()),
        "tie_embeddings": same_width and draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "out_bias": draw(st.sampled_from(["none", "cross", "all"])),
        "mlp_bias": draw(st.booleans()),
        "logits_bias": draw(st.booleans()),
        "rotary": draw(st.sampled_from([True, True, False])),
        "rotary_fraction": draw(fraction),
        "rotary_heads_fraction": draw(fraction),
        "rotary_base": draw(st.sampled_from([None, 64.0, 10000.0])),
        "rotary_endpoint": draw(st.booleans()),
        "rotary_layers": draw(st.sampled_from([None, 0, 1, 2])),
        "position_table": position_table,
        "index_dims": draw(tables) if position_table != "none" and context_length <= 12 else (),
        "query_position_offset": draw(st.sampled_from([0, 0, 1, 3])),
        "latent_keys": draw(st.sampled_from(["context", "query"])) if same_width and local_context == 1 else "context",
        "query_proj": query_proj,
        "query_residual": draw(st.booleans()),
        "mask_self_attention": draw(st.booleans()),
        "embed_dim": embed_dim,
        "cross_num_heads": draw(st.sampled_from([None, 1, 2])),
        "cross_head_dim": draw(st.sampled_from([None, None, 3, 6])),
        "cross_mlp_ratio": draw(st.sampled_from([None, 1.5])),
        "prefix_chunk": draw(st.sampled_from([None, 1, 2, 3])),
    }
    return PerceiverARConfig(**{**settings, **fixed})


@st.composite
def cases(draw: st.DrawFn, min_length: int = 1, **fixed: Any) -> Case:
    """A float64 network with random weights, 1 to 3 rows of tokens, and any split of them."""
    if min_length > 1:
        fixed.setdefault("context_length", draw(st.integers(min_length, 10)))
    config = draw(configs(**fixed))
    seed = draw(st.integers(0, 2**20))
    model = randomize(PerceiverAR(config).double().eval(), seed)
    length = draw(st.integers(min_length, config.context_length))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (draw(st.integers(1, 3)), length), generator=generator)
    return Case(model, tokens, draw(st.integers(0, length - 1)))
