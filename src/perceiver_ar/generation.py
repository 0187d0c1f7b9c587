"""Generation: every token is drawn from the logits of a forward over a stated window of its row.

A window says which tokens are context and how many of them are latents. Every token adds a latent; when all are used,
the same context is taken again with fewer (refill; the authors' sampling, Hawthorne et al. 2022, arXiv 2202.07765).
Windows follow from numbers of tokens alone and rows know nothing of each other, so a row gives the same tokens alone
and in any batch.

Shapes: B batch, T tokens of a row so far, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError, require
from perceiver_ar.model import PerceiverAR

Prompt = Tensor | Sequence[Any]
"""(B, T) or (T,) integer ids, or rows of any lengths: a list of 1-D sequences, arrays or tensors of ids."""


@dataclass(frozen=True)
class Window:
    """Of a row's tokens 0 ... t - 1, those from `start` on are the context, and its last `num_latents` are latents."""

    start: int
    num_latents: int


class Step(NamedTuple):
    """One new token per row. In a row that finished before, everything repeats the step that drew its stop token."""

    tokens: Tensor
    """(B,) int64, on the prompt's device (CPU for lists)."""
    logits: Tensor
    """(B, V) what they were drawn from, before temperature and filters: the last logits of
    `model(row[start:], prefix_len=len(row) - start - num_latents)`."""
    window_start: Tensor
    """(B,) int64."""
    num_latents: Tensor
    """(B,) int64."""


def next_window(
    config: PerceiverARConfig, previous: Window | None, num_tokens: int, refill_latents: int | None = None
) -> Window:
    """The window for the token after the first `num_tokens` of a row; `previous` was for the token before, if any.

    Always 0 <= start, num_tokens - start <= context_length and 1 <= num_latents <= min(config.num_latents,
    num_tokens - start); starts never go back.
    """
    most, fewer = config.num_latents, refill_latents or max(1, config.num_latents // 2)
    longest = min(config.context_length, config.max_positions or config.context_length)
    # Past the context length the start moves, but only at refills, and then far enough to grow again: latents remember
    # the tokens they have read, so what a cache keeps of them is true only as long as the context begins where it did.
    start = 0 if previous is None else previous.start
    full = num_tokens - start > longest
    if full:
        start = num_tokens - max(longest - (most - fewer), 1)
    if previous is None:
        num_latents = num_tokens if num_tokens <= most else fewer
    elif previous.num_latents >= most or full:
        num_latents = fewer
    else:
        num_latents = previous.num_latents + 1
    return Window(start, min(num_latents, num_tokens - start))


def next_logits(model: PerceiverAR, contexts: Sequence[Tensor], windows: Sequence[Window]) -> Tensor:
    """Logits (rows, V) of each row's next token, given the tokens (n,) in its window, n its own.

    Rows whose windows have the same shape go through the network together. A cache would replace this function alone.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for row, (context, window) in enumerate(zip(contexts, windows, strict=True)):
        shapes.setdefault((len(context), window.num_latents), []).append(row)
    parts, order = [], []
    for (length, num_latents), rows in shapes.items():
        batch = torch.stack([contexts[row] for row in rows])
        # The head is applied to the last latent alone: elsewhere it costs as much as a layer and is not asked for.
        parts.append(model.head(model.latents(batch, length - num_latents)[:, -1]))
        order += rows
    return torch.cat(parts)[torch.tensor(order).argsort().to(parts[0].device)]


def stream(
    model: PerceiverAR,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] | None = None,
    refill_latents: int | None = None,
) -> Iterator[Step]:
    """Continues every row of a prompt token by token.

    Whatever mode the model is in, it computes in evaluation mode and without gradients; between steps it is as it was.

    Args:
        prompt: see `Prompt`; every row has at least one token.
        max_new_tokens: most steps to make.
        temperature: divides the logits; 0: always the most likely token, and no filter matters but the penalty.
        top_k, top_p, min_p, repetition_penalty: see `keep_top_k`, `keep_top_p`, `keep_min_p`, `penalise_repetition`
            (of ids in the row's prompt and output). Applied as in Hugging Face transformers: penalty, temperature,
            top-k, top-p, min-p.
        stop_tokens: a row that draws one of these ids is finished: it repeats that id and costs nothing more. The
            stream ends when all rows are finished.
        seed: of the draws. An integer: row r uses seed + r; a sequence: one for each row; None: new ones each time.
            What a row draws depends on its own seed and tokens only.
        refill_latents: with how many latents to go on when all are used, 1 ... num_latents; None: half of them. Fewer:
            refills are rarer, and the tokens right after one are predicted with less depth.

    Raises:
        InputError: at once for arguments that cannot work, later if the model's weights give NaN.
    """
    config = model.config
    require(max_new_tokens >= 0, f"max_new_tokens is {max_new_tokens}: it must not be negative")
    require(0 <= temperature < math.inf, f"temperature is {temperature}: it must be 0 (greedy) or more, and finite")
    require(top_k is None or top_k >= 1, f"top_k is {top_k}: it must be at least 1, or left out")
    require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}: it must be in (0, 1], or left out")
    require(min_p is None or 0 <= min_p <= 1, f"min_p is {min_p}: it must be in [0, 1], or left out")
    require(
        0 < repetition_penalty < math.inf,
        f"repetition_penalty is {repetition_penalty}: it must be more than 0, where 1 changes nothing",
    )
    require(
        refill_latents is None or 1 <= refill_latents <= config.num_latents,
        f"refill_latents is {refill_latents}: it must be in 1 ... {config.num_latents}, the model's num_latents",
    )
    stops = {int(token) for token in stop_tokens}
    for token in stops:
        require(
            0 <= token < config.vocab_size,
            f"stop_tokens has id {token}: this model's vocabulary is ids 0 ... {config.vocab_size - 1}",
        )
    rows = prompt_rows(prompt, config.vocab_size)
    generators = _generators(seed, len(rows))

    def choose(logits: Tensor, seen: Tensor | None, generators: Sequence[torch.Generator]) -> list[int]:
        if seen is not None:
            logits = penalise_repetition(logits, seen, repetition_penalty)
        if temperature == 0:
            return sample(logits, 0.0).tolist()
        # Less the largest: a temperature near zero may not overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        if top_p is not None:
            logits = keep_top_p(logits, top_p)
        if min_p is not None:
            logits = keep_min_p(logits, min_p)
        return [int(sample(row, generator=generator)) for row, generator in zip(logits, generators, strict=True)]

    def steps() -> Iterator[Step]:
        device, home = model.embed.weight.device, rows[0].device
        states = []
        for tokens, generator in zip(rows, generators, strict=True):
            window = next_window(config, None, len(tokens), refill_latents)
            states.append(_Row(tokens[window.start :].to(device), len(tokens), window, generator))
        seen = None
        if repetition_penalty != 1.0:
            seen = torch.zeros(len(rows), config.vocab_size, dtype=torch.bool)
            for r, tokens in enumerate(rows):
                seen[r, tokens.cpu()] = True
        logits: Tensor | None = None
        for _ in range(max_new_tokens):
            active = [r for r, row in enumerate(states) if not row.finished]
            if not active:
                return
            now = [states[r] for r in active]
            with evaluation_mode(model), torch.no_grad():
                fresh = next_logits(model, [row.context for row in now], [row.window for row in now])
            # Drawn on the CPU in float64: what a seed gives does not depend on the device.
            exact = fresh.cpu().double()
            require(
                bool(exact.amax(-1).isfinite().all()),
                "the model's weights give NaN or infinite logits: use weights from before training diverged",
            )
            drawn = choose(exact, None if seen is None else seen[active], [row.generator for row in now])
            for r, row, token in zip(active, now, drawn, strict=True):
                row.add(token, finished=token in stops)
                if seen is not None:
                    seen[r, token] = True
            logits = fresh if logits is None else logits.index_copy(0, torch.tensor(active, device=device), fresh)
            yield Step(
                torch.tensor([row.token for row in states], device=home),
                logits,
                torch.tensor([row.window.start for row in states], device=home),
                torch.tensor([row.window.num_latents for row in states], device=home),
            )
            for row in now:
                if not row.finished:
                    row.move(next_window(config, row.window, row.num_tokens, refill_latents))

    return steps()


def generate(model: PerceiverAR, prompt: Prompt, max_new_tokens: int, **settings: Any) -> Tensor:
    """The new ids (B, n) int64, on the prompt's device (CPU for lists); `stream` says which settings there are.

    n is max_new_tokens, or less where all rows stop before.

    Raises:
        InputError: see `stream`.
    """
    rows = prompt_rows(prompt, model.config.vocab_size)
    steps = stream(model, rows, max_new_tokens=max_new_tokens, **settings)
    columns = [step.tokens for step in steps]
    return torch.stack(columns, dim=1) if columns else rows[0].new_empty(len(rows), 0)


@dataclass
class _Row:
    """What a stream keeps of a row: nothing that its window has left behind."""

    context: Tensor
    """(n,) the last n of its tokens, on the model's device."""
    num_tokens: int
    window: Window
    generator: torch.Generator
    finished: bool = False
    token: int = -1
    """The last one drawn."""

    def move(self, window: Window) -> None:
        self.context = self.context[window.start - self.window.start :]
        self.window = window

    def add(self, token: int, finished: bool) -> None:
        self.context = torch.cat([self.context, self.context.new_tensor([token])])
        self.num_tokens += 1
        self.token, self.finished = token, finished


def prompt_rows(prompt: Prompt, vocab_size: int) -> list[Tensor]:
    """The rows of a prompt, each (T,) int64, T its own.

    Raises:
        InputError: no rows, an empty row, or what is not an id below `vocab_size`; names the row and the id.
    """
    if isinstance(prompt, Tensor):
        require(prompt.ndim in (1, 2), f"the prompt has shape {tuple(prompt.shape)}: it must be (B, T) or (T,)")
        prompt = prompt[None] if prompt.ndim == 1 else prompt
    require(len(prompt) > 0, "the prompt has no rows: give at least one")
    rows = []
    for r, ids in enumerate(prompt):
        try:
            row = ids if isinstance(ids, Tensor) else torch.tensor(ids)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"prompt row {r} is no sequence of ids: encode it with the model's codec") from None
        require(row.ndim == 1, f"prompt row {r} has shape {tuple(row.shape)}: a row is a 1-D sequence of ids")
        require(len(row) > 0, f"prompt row {r} is empty: generation needs a start token, such as the codec's separator")
        whole = not (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool)
        require(whole, f"prompt row {r} has type {row.dtype}: ids are integers")
        row = row.long()
        wrong = ((row < 0) | (row >= vocab_size)).nonzero()
        if len(wrong) > 0:
            at = int(wrong[0])
            raise InputError(
                f"prompt row {r} has id {int(row[at])} at place {at}: "
                f"this model's vocabulary is ids 0 ... {vocab_size - 1}"
            )
        rows.append(row)
    return rows


def _generators(seed: int | Sequence[int] | None, rows: int) -> list[torch.Generator]:
    generators = [torch.Generator() for _ in range(rows)]
    if seed is None:
        for generator in generators:
            generator.seed()
        return generators
    seeds = list(seed) if isinstance(seed, Sequence) else [int(seed) + r for r in range(rows)]
    require(
        len(seeds) == rows, f"seed has {len(seeds)} numbers, the prompt {rows} rows: give each row one, or one in all"
    )
    for generator, one in zip(generators, seeds, strict=True):
        generator.manual_seed(int(one) % 2**64)
    return generators


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode, and afterwards in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# Filters of logits (..., V): what may not be drawn becomes -inf.


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k most likely ids, or all if there are no more."""
    values, ids = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, float("-inf")).scatter_(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the fewest most likely ids that have probability p together (nucleus sampling, arXiv 1904.09751)."""
    if p >= 1:  # rounding could reach 1 too early
        return logits
    values, ids = logits.sort(dim=-1, descending=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    before[..., 0] = 0.0  # the first one stays, rounding or not
    return torch.empty_like(logits).scatter_(-1, ids, values.masked_fill(before >= p, float("-inf")))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keeps ids at least p times as likely as the most likely one (arXiv 2407.01082)."""
    if p <= 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), float("-inf"))


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides positive logits of ids in `seen` (..., V) bool by the penalty and multiplies negative ones by it.

    Above 1 these ids become less likely, below 1 more (CTRL, arXiv 1909.05858).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, temperature: float = 1.0, *, generator: torch.Generator | None = None) -> Tensor:
    """Ids (...) drawn from softmax(logits / temperature), logits (..., V); at temperature 0 the most likely ones."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    ids = torch.multinomial(probabilities.reshape(-1, logits.shape[-1]), 1, generator=generator)
    return ids.reshape(logits.shape[:-1])
