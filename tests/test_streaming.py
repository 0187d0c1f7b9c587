"""Streaming the prefix changes nothing but memory: the same logits, the same gradient of every parameter."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Server
from reference import Adapted, Case, assert_close, cases, randomize
from torch import Tensor
from torch._dynamo import lookup_backend
from torch.utils._pytree import tree_map_only

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.config.presets import PUBLISHED
from perceiver_ar.errors import InputError
from perceiver_ar.network import attention, streaming
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.objective import next_token_loss

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pair(chunk: int, **fixed: Any) -> tuple[PerceiverAR, PerceiverAR]:
    """A dense network and the same one that streams."""
    sizes = {"vocab_size": 11, "context_length": 64, "num_latents": 5, "dim": 16, "num_layers": 2, "num_heads": 2}
    config = PerceiverARConfig.from_dict({**sizes, "cross_layers": (0, 1), **fixed})
    dense = randomize(PerceiverAR(config.replace(prefix_chunk=0)), seed=0)
    streamed = PerceiverAR(config.replace(prefix_chunk=chunk))
    streamed.load_state_dict(dense.state_dict())
    return dense, streamed


def tokens_of(model: PerceiverAR, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def results(model: PerceiverAR, tokens: Tensor, prefix_len: int, **inputs: Any) -> list[Tensor]:
    """The logits, the loss, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(tokens, prefix_len, **inputs)
    loss = next_token_loss(logits, tokens[:, prefix_len:].long().to(logits.device))
    loss.backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [logits.detach(), loss.detach(), *gradients]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each within `tolerance` of its own scale; what is much smaller than the rest has the rest's rounding errors."""
    largest = max(x.abs().max().item() for x in expected)
    for a, b in zip(actual, expected, strict=True):
        scale = max(b.abs().max().item(), 0.01 * largest)
        assert_close(a.cpu() / scale, b.cpu() / scale, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=100)
@given(case=cases(min_length=3), data=st.data())
def test_streamed_equals_dense_with_all_gradients(case: Case, device: str, data: st.DataObject) -> None:
    dense, tokens, P = case
    B, T = tokens.shape
    config = dense.config
    dense.config = config.replace(prefix_chunk=0)
    streamed = PerceiverAR(config.replace(prefix_chunk=data.draw(st.integers(1, T), label="chunk"))).double()
    streamed.load_state_dict(dense.state_dict())
    inputs: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    if data.draw(st.booleans(), label="mask"):
        inputs["mask"] = torch.rand(B, T, generator=generator) < 0.7
    if data.draw(st.booleans(), label="keep"):
        kept = data.draw(st.integers(0, P))
        layers = len(config.cross_layers)
        inputs["prefix_keep"] = torch.rand(layers, B, P, generator=generator).argsort(-1)[..., :kept]
    inputs = {name: x.to(device) for name, x in inputs.items()}
    expected, actual = (results(model.to(device), tokens.to(device), P, **inputs) for model in (dense, streamed))
    assert_same(actual, expected, 1e-10)


@pytest.mark.parametrize("chunk", [0, 16])
def test_gradients_of_what_is_looked_up_are_not_summed_in_half_precision(chunk: int) -> None:
    sizes = {"vocab_size": 3, "context_length": 8197, "num_layers": 1, "cross_layers": (0,)}
    model = pair(chunk, **sizes)[1]
    tokens = torch.zeros(1, 8197, dtype=torch.long)
    tokens[:, ::1000] = 1
    exact = results(model, tokens, 8192)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results(model, tokens, 8192)
    embedding = 2  # after the logits and the loss
    assert_same(rounded[embedding : embedding + 1], exact[embedding : embedding + 1], 0.03)


@pytest.mark.parametrize("chunk", [1, 16, 37])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_in_float32_too(preset: str, chunk: int) -> None:
    sizes = {"context_length": 128, "num_latents": 32, "dim": 64, "prefix_dropout": 0.3, "vocab_size": 50}
    dense, streamed = pair(chunk, **{**PUBLISHED[preset], **sizes})
    tokens = tokens_of(dense, 2, 128)
    mask = torch.ones(2, 128, dtype=torch.bool)
    mask[1, :30] = False
    for inputs in ({}, {"mask": mask}):
        torch.manual_seed(0)
        expected = results(dense, tokens, 96, **inputs)
        torch.manual_seed(0)
        assert_same(results(streamed, tokens, 96, **inputs), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_ids_may_stay_in_the_type_they_are_stored_in(dtype: torch.dtype) -> None:
    dense, streamed = pair(7)
    tokens = tokens_of(dense, 2, 50)
    expected = results(dense, tokens, 45)
    for model in (dense, streamed):
        assert_same(results(model, tokens.to(dtype), 45), expected, 1e-5)


def test_under_autocast_and_activation_checkpointing_too() -> None:
    dense, streamed = pair(7, prefix_dropout=0.5)
    tokens = tokens_of(dense, 2, 50)
    for model in (dense, streamed):
        model.activation_checkpointing = True
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        expected = results(dense, tokens, 45)
        torch.manual_seed(0)
        actual = results(streamed, tokens, 45)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in streamed.parameters())
    assert_same(actual, expected, 0.1)  # bfloat16 has 8 bits, and the two round in different places
    torch.manual_seed(0)
    exact = results(dense, tokens, 45)
    torch.manual_seed(0)
    assert_same(results(streamed, tokens, 45), exact, 1e-5)


def test_dropout_on_probabilities_needs_the_whole_and_gets_it() -> None:
    dense, streamed = pair(7, attention_dropout=0.5)
    tokens = tokens_of(dense, 2, 50)
    torch.manual_seed(0)
    expected = dense(tokens, 45)
    torch.manual_seed(0)
    assert_close(streamed(tokens, 45), expected, 1e-6)
    assert_close(streamed.eval()(tokens, 45), dense.eval()(tokens, 45), 1e-5)


def test_nan_in_one_row_reaches_no_other() -> None:
    for model in pair(7):
        with torch.no_grad():
            model.embed.weight[3] = math.nan
        tokens = tokens_of(model, 3, 50)
        tokens[tokens == 3] = 4
        clean = model(tokens, 45)
        dirty = tokens.clone()
        dirty[1, 20] = 3
        logits = model(dirty, 45)
        assert logits[1].isnan().all()
        assert torch.equal(logits[[0, 2]], clean[[0, 2]])


def test_the_prefix_is_streamed_where_it_would_take_a_large_share_of_the_memory() -> None:
    config = PerceiverARConfig(dim=512, num_heads=8, context_length=1 << 24, num_latents=256)
    cpu = torch.device("cpu")
    most = min(streaming.SHARE * streaming.device_memory("cpu", 0), streaming.CPU_BYTES)
    limit = int(most / (2 * 512 * 4))  # tokens of keys and values
    assert streaming.automatic_chunk(config, 1, limit, torch.float32, cpu) == 0
    assert streaming.automatic_chunk(config, 1, limit + 1, torch.float32, cpu) == streaming.PIECE["cpu"]
    assert streaming.automatic_chunk(config, 2, limit, torch.float32, cpu) == streaming.PIECE["cpu"] // 2
    assert streaming.automatic_chunk(config, 100, limit, torch.float32, cpu) == 2 * config.num_latents
    assert streaming.automatic_chunk(config, 1, limit + 1, torch.bfloat16, cpu) == 0
    twice = config.replace(cross_layers=(0, 1))
    assert streaming.automatic_chunk(twice, 1, limit, torch.float32, cpu) > 0


def test_projections_that_are_more_than_their_weights_are_not_streamed() -> None:
    long = 40_000  # so long that its prefix would be streamed
    dense, streamed = pair(7, context_length=long, cross_head_dim=64)
    automatic = PerceiverAR(dense.config.replace(prefix_chunk=None))
    automatic.load_state_dict(dense.state_dict())
    assert streaming.automatic_chunk(dense.config, 1, long, torch.float32, torch.device("cpu")) > 0
    tokens = tokens_of(dense, 1, long)
    for model in (dense, streamed, automatic):
        adapted = Adapted(16, 256, bias=False)
        adapted.load_state_dict(model.cross_attention[1].kv_proj.state_dict())  # type: ignore[union-attr]
        model.cross_attention[1].kv_proj = adapted  # type: ignore[union-attr]
    with torch.no_grad():
        assert_close(automatic(tokens, long - 5), dense(tokens, long - 5), 1e-6)
    with pytest.raises(InputError, match=r"kv_proj is Adapted .* set prefix_chunk to 0"):
        streamed(tokens, long - 5)


def test_a_negative_piece_is_refused() -> None:
    with pytest.raises(InputError, match="prefix_chunk is -1"):
        PerceiverARConfig(prefix_chunk=-1)


# The operators, and torch.compile.


def operator_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    q, k, v, k2, v2 = (torch.randn(2, n, 2, 4).transpose(1, 2).requires_grad_() for n in (5, 5, 5, 9, 9))
    mask, own = torch.rand(2, 9) < 0.7, torch.rand(2, 5) < 0.7
    config = PerceiverARConfig(vocab_size=11, context_length=20, num_latents=5, dim=8, num_heads=2)
    tokens = torch.randint(11, (2, 9), dtype=torch.uint8)
    weights = [torch.randn(*s, requires_grad=True) for s in ((11, 8), (3, 8), (8,), (8,), (16, 8))]
    keep = torch.tensor([[0, 3, 4], [8, 1, 2]])
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (attention._attention, (q, [k2, k], [v2, v], [False, True], [None, None])),
        (attention._attention, (q, [k2, k], [v2, v], [False, True], [mask, own])),
    ]
    for positions, part_mask, kept in ((None, None, None), (torch.arange(9)[None], mask, keep)):
        prefix = (tokens, positions, part_mask, kept)
        calls.append((streaming._stream, (q, k, v, None, *prefix, weights, config.to_json(), 4, "")))
    return calls


@pytest.mark.parametrize("which", range(4))
def test_the_operators_keep_torch_compiles_rules(which: int) -> None:
    operator, arguments = operator_calls()[which]
    torch.library.opcheck(operator, arguments)
    arguments = tree_map_only(Tensor, Tensor.detach, arguments)
    out, lse = operator(*arguments)
    d_out = torch.randn_like(out)
    if operator is attention._attention:
        torch.library.opcheck(attention._attention_backward, (d_out, *arguments, out, lse))
    else:  # the other checks' tracing cannot look into torch.func.vjp; the test below has them all, compiled
        check = "test_autograd_registration"
        torch.library.opcheck(streaming._stream_backward, (d_out, out, lse, *arguments), test_utils=check)


def test_compiled_the_memory_of_the_device_is_a_constant() -> None:
    config, cpu = PerceiverARConfig(context_length=1 << 40), torch.device("cpu")

    def chunk(x: Tensor) -> Tensor:
        return x + streaming.automatic_chunk(config, 1, config.context_length, x.dtype, cpu)

    x = torch.zeros(1)
    assert chunk(x) > 0 and torch.equal(torch.compile(chunk, fullgraph=True, backend="eager")(x), chunk(x))


@pytest.mark.parametrize(
    ("chunk", "backend"),
    [(3, "aot_eager"), *(pytest.param(chunk, "inductor", marks=pytest.mark.slow) for chunk in (0, 3))],
)
def test_compiled_once_for_all_prefix_lengths_with_the_same_numbers(chunk: int, backend: str) -> None:
    _, model = pair(chunk, num_layers=1, cross_layers=(0,))
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    def loss(tokens: Tensor, prefix_len: int) -> Tensor:
        return next_token_loss(model(tokens, prefix_len), tokens[:, prefix_len:])

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counting)

    def run(function: Callable[..., Tensor], tokens: Tensor) -> list[Tensor]:
        model.zero_grad()
        value = function(tokens, tokens.shape[1] - 5)
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    first = 0
    for length in (20, 31):
        tokens = tokens_of(model, 2, length)
        assert_same(run(compiled, tokens), run(loss, tokens), 1e-5)
        first = first or len(graphs)  # torch may start over once, to take the settings' floats for constants
    assert len(graphs) == first <= 2


# Several processes.

DATA_PARALLEL = """
parallel = DistributedDataParallel(streamed)
own = tokens[2 * rank : 2 * rank + 2]
next_token_loss(parallel(own, 45), own[:, 45:]).backward()
compare([p.grad for p in streamed.parameters()], expected[2:])
"""

PREFIX_PARALLEL = """
for model in (dense, streamed):
    model.prefix_group = dist.group.WORLD
    for inputs in ({}, {"mask": mask}, {"prefix_keep": keep}):
        model.prefix_group = None
        expected = results(model, tokens, 45, **inputs)
        model.prefix_group = dist.group.WORLD
        compare(results(model, tokens, 45, **inputs), expected)
    compare(results(model, tokens[:, :6], 1), results(alone, tokens[:, :6], 1))  # a token for more than one rank
"""

SCRIPT = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, "{tests}")
from test_streaming import assert_same, pair, results, tokens_of
from perceiver_ar.objective import next_token_loss
torch.set_num_threads(1)
dist.init_process_group("gloo")
(dense, streamed), (alone, _) = pair(7), pair(7)
rank, tokens = dist.get_rank(), tokens_of(dense, 4, 50)
generator = torch.Generator().manual_seed(0)
mask = torch.rand(4, 50, generator=generator) < 0.7
keep = torch.rand(4, 45, generator=generator).argsort(-1)[:, :20]
expected = results(dense, tokens, 45)
def compare(actual, wanted):
    assert_same(actual, wanted, 1e-5)
{body}
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("body", "ranks"), [(DATA_PARALLEL, 2), (PREFIX_PARALLEL, 3)])
def test_several_processes_have_the_loss_and_gradients_of_one(server: Server, body: str, ranks: int) -> None:
    code = SCRIPT.replace("{tests}", str(Path(__file__).parent)).replace("{body}", body)
    assert server.run_ranks(ranks, code=code) == [0] * ranks, server.messages()
