"""A model as ONNX files, for runtimes without PyTorch: scoring, and generation over caches.

`model.onnx`: a window of any split; P >= 0, N >= 1, P + N <= context_length.

    prefix (B, P), latents (B, N)   ->   logits (B, N, V)

`step.onnx`: one more latent for each row, after the tokens in its caches.

    tokens, positions (B, 1), context_held, latents_held (B,), CACHES   ->   logits (B, V), CACHES with the new token

`read.onnx`: keys and values of prefix tokens, for the caches.

    tokens, positions (B, K)   ->   context_k, context_v, of these tokens alone

With local context, `tokens` of `step` and `read` are (B, n + 1) and (B, n + K): first come the n tokens before them;
-1 stands for tokens before the window (n is the setting `local_context`, or 0 if that is 1).

Ids, positions and counts are int64, the rest is float32. CACHES are context_k, context_v (cross-attention layers, B, H,
room, C) and latent_k, latent_v (layers, B, H, room, C), finite everywhere. Each row uses the first `context_held` slots
of the first two, and the first `latents_held` slots of the others. The caller chooses the room.

For a window of P prefix tokens and N latents, `read` the prefix, put it into the first slots, and run a `step` for each
latent. Every further step is for a window that is longer by one token. To refill, continue with latents_held = 0 and
with the longer prefix of the new window as context_held: the slots of prefix tokens stay valid, and those of former
latents, too, unless the setting `latent_keys` is "query" (then `read` these tokens). If the window's start has moved:
with position tables, `read` the whole prefix again; otherwise move the remaining slots to the front, and `read` the
first n tokens of the window again, because the tokens before them have left. These are all windows of `generate`.
Positions count from a row's start or, with position tables, from the window's.
"""

import copy
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from perceiver_ar.data.codec import importing
from perceiver_ar.errors import require
from perceiver_ar.generation.cache import Cache
from perceiver_ar.network.attention import Piece, ordinary_attention
from perceiver_ar.network.inputs import reach
from perceiver_ar.network.model import PerceiverAR

CACHES: tuple[str, ...] = ("context_k", "context_v", "latent_k", "latent_v")


class Graph(nn.Module):
    """What a file computes, with a network."""

    def __init__(self, model: PerceiverAR) -> None:
        super().__init__()
        self.model = model


class Scoring(Graph):
    """A context in its two parts, so that each has its own length."""

    def forward(self, prefix: Tensor, latents: Tensor) -> Tensor:
        tokens = torch.cat([prefix, latents], dim=1)
        positions = torch.arange(tokens.shape[1])
        if self.model.config.positions_from_end:  # the network does it by a sum over a mask, which exporters lose
            positions = tokens.shape[1] - 1 - positions
        return self.model(tokens, prefix.shape[1], positions=positions)


class Step(Graph):
    """One latent for each row, over caches that are input and output tensors."""

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        context_held: Tensor,
        latents_held: Tensor,
        context_k: Tensor,
        context_v: Tensor,
        latent_k: Tensor,
        latent_v: Tensor,
    ) -> tuple[Tensor, ...]:
        cross, own = Slots(context_k, context_v, context_held), Slots(latent_k, latent_v, latents_held)
        latents = self.model.cached_latents(tokens, positions, TracedCache(cross, own))
        return self.model.head(latents[:, -1]), *cross.written(), *own.written()


class Read(Graph):
    """Keys and values of prefix tokens in every cross-attention layer."""

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        new = Written()
        self.model.cache_prefix(tokens, positions, TracedCache(new, Written()))
        return new.written()


class TracedCache(NamedTuple):
    """A cache in the form that exporters can trace."""

    cross: "Written"
    self_attention: "Written"


class Written:
    """Collects what the network writes to a cache, by layer: `cache.KeysValues` without changes in place."""

    def __init__(self) -> None:
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> list[Piece]:
        self.k.append(k)
        self.v.append(v)
        return [Piece(k, v)]

    def written(self) -> tuple[Tensor, Tensor]:
        return torch.stack(self.k), torch.stack(self.v)


class Slots(Written):
    """Writes the slot after the first `held` (B,) of each row, in keys and values (layers, B, H, room, C)."""

    def __init__(self, k: Tensor, v: Tensor, held: Tensor) -> None:
        super().__init__()
        self.before = k, v
        places = torch.arange(k.shape[3])
        self.seen = places <= held[:, None]
        self.here = (places == held[:, None])[:, None, :, None]

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> list[Piece]:
        k, v = (torch.where(self.here, new, old[layer_idx]) for new, old in zip((k, v), self.before, strict=True))
        super().update(k, v, layer_idx)
        return [Piece(k, v, mask=self.seen)]


def empty_caches(model: PerceiverAR, rows: int, context: int) -> dict[str, Tensor]:
    """Caches for `step.onnx` by name, with room for `context` tokens and for num_latents latents."""
    cache = Cache.empty(model.config, rows, context, torch.float32, torch.device("cpu"))
    stacked = [torch.stack(x) for part in (cache.cross, cache.self_attention) for x in zip(*part.layers, strict=True)]
    return dict(zip(CACHES, stacked, strict=True))


def export_onnx(model: PerceiverAR, directory: str | Path) -> list[str]:
    """Writes `model.onnx` and, for networks whose latents can be cached, `step.onnx` and `read.onnx`.

    Each comes with its weights in a file NAME.onnx.data. Returns their names.
    Raises InputError if a package of the extra `onnx` is missing, or the model is too small for the exporter.
    """
    with importing("onnx"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    config = model.config
    require(config.num_layers > 0 and config.cross_layers != (), "the exporter needs a layer of each kind")
    model = copy.deepcopy(model).cpu().float().eval()
    model.config = model.config.replace(prefix_chunk=0)  # exporters cannot translate the streaming operator
    # The exporter would make example lengths of 0 and 1 constants, equal lengths one length, and inputs that are one
    # tensor one input.
    rows, ids = Dim("rows"), torch.zeros(2, 9, dtype=torch.int64)
    most = model.config.context_length
    latents = model.config.num_latents if model.config.learned_queries == "each" else most
    require(
        most >= 9 and latents >= 3,
        f"the exporter needs a context of 9 tokens and 3 latents to see what varies: here are {most} and {latents}",
    )
    length = Dim("length", max=most)
    bounds = {"prefix": most, "latents": latents}
    score: dict[str, Any] = {name: {0: rows, 1: Dim(name, max=bound)} for name, bound in bounds.items()}
    graphs: dict[str, tuple[Graph, tuple[Tensor, ...], dict[str, Any], list[str]]] = {
        "model": (Scoring(model), (ids[:, :5], ids[:, :3]), score, ["logits"])
    }
    if model.config.cacheable:
        caches = empty_caches(model, 2, 5)
        room = {1: rows, 3: Dim("context_room")}, {1: rows, 3: Dim("latent_room")}
        shapes: dict[str, Any] = {"tokens": {0: rows}, "positions": {0: rows}}
        shapes |= {"context_held": {0: rows}, "latents_held": {0: rows}}
        shapes |= dict(zip(CACHES, (room[0], room[0], room[1], room[1]), strict=True))
        n = reach(model.config)
        one, held, before = ids[:, :1], ids[:, 0], torch.zeros(2, n, dtype=torch.int64)
        outputs = ["logits", *(f"new_{name}" for name in CACHES)]
        step = torch.cat([before, one], 1), one, held, held, *caches.values()
        graphs["step"] = Step(model), step, shapes, outputs
        shapes = {"tokens": {0: rows, 1: length + n if n else length}, "positions": {0: rows, 1: length}}
        graphs["read"] = Read(model), (torch.cat([before, ids], 1), ids), shapes, list(CACHES[:2])
    log = logging.getLogger("torch.onnx")
    level, names = log.level, []
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad(), ordinary_attention():
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        log.setLevel(logging.ERROR)
        try:
            for name, (module, inputs, shapes, outputs) in graphs.items():
                names.append(f"{name}.onnx")
                program = torch.onnx.export(
                    module.eval(), tuple(x.clone() for x in inputs), dynamo=True, dynamic_shapes=shapes,
                    input_names=list(shapes), output_names=outputs, verbose=False,
                )  # fmt: skip
                assert program is not None
                program.save(folder / names[-1], external_data=True)
        finally:
            log.setLevel(level)
    return names
