"""Generation: every token is drawn from the logits of a forward over a stated window of its row (windows.py).

Each step computes one latent per row, over cached keys and values (cache.py); where a row's window refills, its other
latents are computed anew before, over the same prefix. (Networks whose latents change when tokens follow are computed
anew for every token: `config.cacheable`.) Rows know nothing of each other, so a row gives the same tokens alone and in
any batch.

Shapes: B batch, T tokens of a row so far, V vocabulary.
"""

import copy
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import groupby, islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from perceiver_ar.cache import Cache
from perceiver_ar.compiled import NextLogits, compile_and_run, compiled_step, next_logits
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError, require
from perceiver_ar.network.inputs import NOTHING, reach
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.sampling import LogitsProcessor, Sampling, is_whole, penalise_repetition
from perceiver_ar.windows import Schedule, longest_context, next_window

Prompt = Tensor | np.ndarray | Sequence[Any]
"""(B, T) or (T,) integer ids, or rows of any lengths: a list of 1-D sequences, arrays or tensors of ids."""

READ = 4096
"""Prefix tokens whose keys and values are made at once, over all rows: their activations are all beside the cache."""


class Step(NamedTuple):
    """One new token per row. In a row that finished before, everything repeats the step that drew its last token."""

    tokens: Tensor
    """(B,) int64, on the prompt's device (CPU for lists)."""
    logits: Tensor
    """(B, V) what they were drawn from, before temperature and filters: the last logits of
    `model(row[start:], prefix_len=len(row) - start - num_latents)`."""
    window_start: Tensor
    """(B,) int64."""
    num_latents: Tensor
    """(B,) int64."""
    logprobs: Tensor
    """(B,) float64, the tokens' log-probabilities under the logits."""


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
    frequency_penalty: float = 0.0,
    logits_processors: Sequence[LogitsProcessor] = (),
    allowed_next: Callable[[Tensor], Tensor] | None = None,
    stop_tokens: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    num_samples: int = 1,
    seed: int | Sequence[int] | None = None,
    refill_latents: int | None = None,
    prompt_latents: int | None = None,
    slide: bool = False,
    compile: bool | Literal["max-autotune"] = False,
) -> Iterator[Step]:
    """Continues every row of a prompt token by token.

    Whatever mode the model is in, it computes in evaluation mode and without gradients; between steps it is as it was.
    The cache has the type of the model's weights, or of autocast, and room for the longest context that comes up.

    Args:
        prompt: see `Prompt`; every row has at least one token. Of longer rows the model sees the last context_length.
        max_new_tokens: most steps to make.
        temperature: divides the logits; 0: always the most likely token, and no filter matters but the penalties.
        top_k: see `keep_top_k` in `perceiver_ar.sampling`. Applied as in Hugging Face transformers: penalties,
            processors, temperature, top-k, top-p, min-p.
        top_p: see `keep_top_p`.
        min_p: see `keep_min_p`.
        repetition_penalty: see `penalise_repetition`; of ids in the row's prompt and output.
        frequency_penalty: subtracted from an id's logit for each time that the row has drawn it.
        logits_processors: callables that turn a row's ids so far (1, T) and logits (1, V) float64, on the CPU, into
            other logits, as those of Hugging Face transformers.
        allowed_next: from a row's ids so far (T,) to (V,) bool, True where an id may come next; say a codec's order.
        stop_tokens: a row that draws one of these ids is finished: it repeats that id and costs nothing more. The
            stream ends when all rows are finished.
        stop_sequences: a row whose output ends with one of these sequences of ids is finished likewise.
        num_samples: rows of output for each row of the prompt, next to each other; the prompt is read once.
        seed: of the draws. An integer: row r uses seed + r; a sequence: one for each row; None: new ones each time.
            What a row draws depends on its own seed and tokens only.
        refill_latents: with how many latents to go on when all are used, 1 ... num_latents; None: half of them. Fewer:
            refills are rarer, and the tokens right after one are predicted with less depth.
        prompt_latents: with how many to begin, 1 ... num_latents; None: as many as the prompt has tokens, or, if that
            is too many, refill_latents. 1, with half at refills, is how the authors sample.
        slide: instead of refills, drop the oldest latent, and the oldest token of a full context. Every step then costs
            the same, but the remaining latents still know what the dropped ones knew: after the first drop the logits
            are those of no single forward. With position tables a full context is still followed by a refill.
        compile: the step with `torch.compile`, as CUDA graphs on CUDA: takes half a minute first, and again for
            another model, number of rows or size of the cache, which is the next power of two; then every token is
            faster. On a CPU it needs a C++ compiler. (Every step reads the whole cache, so a long context that is
            still growing gains nothing.) "max-autotune", as torch calls it: kernels are tried out for this machine,
            which takes a minute and pays from some ten thousand tokens on. On a CPU it also holds another copy of the
            weights, laid out for them, for each number of rows and size of the cache; the weights must not change
            during a stream, and where they have since the last one, all is compiled anew.

    Raises:
        InputError: at once for arguments that cannot work; later if the model's weights give NaN, or a row may not go
            on with any id.
    """
    config = model.config
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty)
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("num_samples", num_samples, 1)):
        require(
            is_whole(value) and value >= least, f"{name} is {value}: it must be a whole number and at least {least}"
        )
    for name, value in {"refill_latents": refill_latents, "prompt_latents": prompt_latents}.items():
        require(
            value is None or (is_whole(value) and 1 <= value <= config.num_latents),
            f"{name} is {value}: it must be a whole number in 1 ... {config.num_latents}, the model's num_latents",
        )
    require(
        compile in (False, True, "max-autotune"), f"compile is {compile!r}: it must be True, False or 'max-autotune'"
    )
    require(
        config.cacheable or not compile, "compile is for networks with a cache, which these settings rule out: leave it"
    )
    stops = [(int(token),) for token in stop_tokens] + [tuple(map(int, sequence)) for sequence in stop_sequences]
    for stop in stops:
        require(len(stop) > 0, "a stop sequence is empty: give at least one id, or leave it out")
        for token in stop:
            require(
                0 <= token < config.vocab_size,
                f"a stop token or sequence has id {token}: this model's ids are 0 ... {config.vocab_size - 1}",
            )
    prompts = prompt_rows(prompt, config.vocab_size)
    generators = _generators(seed, len(prompts) * num_samples)
    schedule = Schedule(refill_latents, prompt_latents, slide)

    def adjust(row: Row, logits: Tensor) -> Tensor:
        """Logits (V,) after penalties, processors and what is allowed."""
        if repetition_penalty != 1.0:
            seen = torch.zeros(len(logits), dtype=torch.bool)
            seen[list(row.seen)] = True
            logits = penalise_repetition(logits, seen, repetition_penalty)
        if frequency_penalty != 0.0:
            times = torch.zeros_like(logits)
            times[list(row.drawn)] = torch.tensor(list(row.drawn.values()), dtype=times.dtype)
            logits = logits - frequency_penalty * times
        if row.history is not None:
            ids = row.history[: row.num_tokens]
            for processor in logits_processors:
                logits = processor(ids[None], logits[None])[0]
            if allowed_next is not None:
                allowed = allowed_next(ids)
                require(
                    isinstance(allowed, Tensor) and allowed.dtype == torch.bool and allowed.shape == logits.shape,
                    f"allowed_next gave {_kind(allowed)}: it must give a bool tensor ({len(logits)},), one for each id",
                )
                logits = logits.masked_fill(~allowed.cpu(), float("-inf"))
            best = float(logits.amax())
            require(
                math.isfinite(best),
                f"row {row.index} cannot go on after {len(ids)} tokens: logits_processors and allowed_next leave "
                f"{'NaN' if math.isnan(best) else 'no id that may come next'}",
            )
        return logits

    def steps() -> Iterator[Step]:
        if max_new_tokens == 0:
            return
        home, asks_for_ids = prompts[0].device, bool(logits_processors or allowed_next)
        rows = [
            Row(i, prompts[i // num_samples], config, generator, schedule, max_new_tokens if asks_for_ids else None)
            for i, generator in enumerate(generators)
        ]
        plain = repetition_penalty == 1.0 and frequency_penalty == 0.0 and rows[0].history is None
        tokens, starts, latents = ([0] * len(rows) for _ in range(3))
        logprobs = torch.empty(len(rows), dtype=torch.float64)
        logits: Tensor | None = None
        modules = list(model.modules())
        with _inference(modules):
            if config.cacheable:
                decoder = Decoder(model, rows, num_samples, max_new_tokens, compile)
            else:
                decoder = Recomputing(model, rows)
        for _ in range(max_new_tokens):
            if not decoder.rows:
                return
            with _inference(modules):
                fresh = decoder.next_logits()
                # Drawn on the CPU in float64: what a seed gives does not depend on the device.
                exact = fresh.cpu().double()
                require(
                    bool(exact.amax(-1).isfinite().all()),
                    "the model's weights give NaN or infinite logits: use weights from before training diverged, or "
                    "train at a lower rate",
                )
                adjusted = exact if plain else torch.stack(list(map(adjust, decoder.rows, exact)))
                drawn = sampling.draw(adjusted, [row.generator for row in decoder.rows])
                order = torch.tensor([row.index for row in decoder.rows])
                chosen = exact.log_softmax(-1).gather(-1, torch.tensor(drawn)[:, None])[:, 0]
                for row, token in zip(decoder.rows, drawn, strict=True):
                    tokens[row.index], starts[row.index] = token, row.window.start
                    latents[row.index] = row.window.num_latents
                decoder.add(drawn, stops)
            # Copies, as what was computed for inference alone is not for others to use.
            logits = fresh.new_empty(len(rows), fresh.shape[-1]) if logits is None else logits
            logits = logits.index_copy(0, order.to(fresh.device), fresh)
            logprobs = logprobs.index_copy(0, order, chosen)
            yield Step(
                torch.tensor(tokens, device=home),
                logits,
                torch.tensor(starts, device=home),
                torch.tensor(latents, device=home),
                logprobs.to(home),
            )

    return steps()


def generate(model: PerceiverAR, prompt: Prompt, max_new_tokens: int, **settings: Any) -> Tensor:
    """The new ids (B, n) int64, on the prompt's device (CPU for lists); `stream` says which settings there are.

    B counts every sample, and n is max_new_tokens, or less where all rows stop before.

    Raises:
        InputError: see `stream`.
    """
    rows = prompt_rows(prompt, model.config.vocab_size)
    steps = stream(model, rows, max_new_tokens=max_new_tokens, **settings)
    columns = [step.tokens for step in steps]
    return torch.stack(columns, dim=1) if columns else rows[0].new_empty(len(rows) * settings.get("num_samples", 1), 0)


class Row:
    """What a stream keeps of a row: its window and counts of ids, and the whole history only if asked for."""

    def __init__(
        self,
        index: int,
        prompt: Tensor,
        config: PerceiverARConfig,
        generator: torch.Generator | None = None,
        schedule: Schedule | None = None,
        history: int | None = None,
    ) -> None:
        """generator: None where others draw. history: room for so many new tokens in a record of all; None: none."""
        longest = longest_context(config)
        self.index, self.config, self.schedule = index, config, schedule or Schedule()
        self.generator = generator or torch.Generator()
        self.num_tokens = len(prompt)
        self.ids = deque(prompt[-longest:].tolist(), maxlen=longest)
        self.seen, self.drawn = set(prompt.bincount().nonzero()[:, 0].tolist()), Counter[int]()
        self.history = None if history is None else nn.functional.pad(prompt.cpu(), (0, history))
        self.ending: deque[int] = deque()
        self.window = next_window(config, None, self.num_tokens, schedule)
        self.kept, self.dropped = 0, 0
        """Of the cached context: how many positions hold after a refill, behind how many that left the window."""

    @property
    def origin(self) -> int:
        """The token at position 0. Rotations only know differences, so without tables it can stay where it is."""
        return self.window.start if self.config.table_sizes else 0

    @property
    def prefix_len(self) -> int:
        return self.num_tokens - self.window.start - self.window.num_latents

    def last_ids(self, n: int) -> list[int]:
        """The last n ids, oldest first; NOTHING in front of the window."""
        inside = min(n, self.num_tokens - self.window.start)
        return [NOTHING] * (n - inside) + list(islice(reversed(self.ids), inside))[::-1]

    def window_ids(self, first: int, last: int) -> list[int]:
        """Ids first ... last - 1 of the window; NOTHING in front of it."""
        start = len(self.ids) - (self.num_tokens - self.window.start)
        return [NOTHING] * -min(first, 0) + list(islice(self.ids, start + max(first, 0), start + last))

    def add(self, token: int, stops: Sequence[tuple[int, ...]]) -> bool:
        """One more token, and the window for the next; False where the row ends."""
        if self.history is not None:
            self.history[self.num_tokens] = token
        self.num_tokens += 1
        self.ids.append(token)
        self.seen.add(token)
        self.drawn[token] += 1
        if stops:
            self.ending.append(token)
            if any(tuple(islice(self.ending, max(0, len(self.ending) - len(stop)), None)) == stop for stop in stops):
                return False
            if len(self.ending) >= max(map(len, stops)):
                self.ending.popleft()
        before, self.window = self.window, next_window(self.config, self.window, self.num_tokens, self.schedule)
        if self.window.refill:
            # All but the newest token are cached; the keys of those that were latents may have come from elsewhere.
            true = self.num_tokens - 1 - before.start
            true -= before.num_latents if self.config.latent_keys == "query" else 0
            self.dropped = self.window.start - before.start
            moved = self.dropped > 0 and self.config.table_sizes
            self.kept = 0 if moved else min(max(true - self.dropped, 0), self.prefix_len)
        return True

    def fork(self) -> "Row":
        """The same row, to go on with other tokens."""
        row = copy.copy(self)
        for name in ("ids", "seen", "drawn", "ending"):
            setattr(row, name, copy.copy(getattr(self, name)))
        row.history = None if self.history is None else self.history.clone()
        return row


class Decoder:
    """The network over a cache of which every row has a slot. `rows` are those that go on, in the slots' order."""

    def __init__(
        self,
        model: PerceiverAR,
        rows: Sequence[Row],
        num_samples: int,
        max_new_tokens: int,
        compile: bool | Literal["max-autotune"] = False,
    ) -> None:
        """rows: every prompt num_samples times in a row; each prompt is read once. compile: see `stream`."""
        longest = max(row.num_tokens for row in rows) + max_new_tokens
        if compile:  # one size for many lengths
            longest = 2 ** (longest - 1).bit_length()
        context = min(longest_context(model.config), longest)
        self.model, self.reach = model, reach(model.config)
        self.rows = list(rows[::num_samples])
        device, dtype = model.device, model.embed.weight.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(device.type)
        self.cache = Cache.empty(model.config, len(self.rows), context, dtype, device)
        self._refill()
        if num_samples > 1:
            self.cache = self.cache.select([r // num_samples for r in range(len(rows))])
        self.rows = list(rows)
        self.slots = len(rows) if compile else None
        """Of a compiled decoder: rows that end keep their slots, as all shapes stay."""
        if compile:
            self.cache.fix()
            self._step = compiled_step(model, device.type, compile == "max-autotune")
            self._first_step: NextLogits | None = partial(compile_and_run, self._step, tuned=compile == "max-autotune")
        self._refilled = True

    def next_logits(self) -> Tensor:
        """Logits (rows, V) of each row's next token."""
        if not self._refilled:
            self._refill()
        self._refilled = False
        tokens = [row.last_ids(self.reach + 1) for row in self.rows]
        positions = [row.num_tokens - 1 - row.origin for row in self.rows]
        if self.slots is None:
            logits = next_logits(self.model, self._tensor(tokens), self._positions(positions, 1), self.cache)
        else:
            ended = self.slots - len(self.rows)
            at = self._tensor(positions + [0] * ended)[:, None]
            self.cache.aim()
            step = self._first_step or self._step
            logits = step(self.model, self._tensor(tokens + [[0] * (self.reach + 1)] * ended), at, self.cache)
            self._first_step = None
            logits = logits[: len(self.rows)].clone()  # CUDA graphs write the next ones to the same place
        self.cache.advance(1)
        return logits

    def add(self, tokens: Sequence[int], stops: Sequence[tuple[int, ...]]) -> None:
        """Each row's next token. Rows that end with it give up their slot to the last one."""
        going_on = [row.add(token, stops) for row, token in zip(self.rows, tokens, strict=True)]
        for slot in reversed(range(len(self.rows))):
            if not going_on[slot]:
                last = len(self.rows) - 1
                if slot < last:
                    self.cache.copy_row(last, slot)
                    self.rows[slot] = self.rows[last]
                self.rows.pop()
                if self.slots is None:
                    self.cache = self.cache.rows(0, last)

    def reserve(self, num_tokens: int) -> None:
        """Makes room for rows of this length, as far as contexts go."""
        room, longest = self.cache.cross.room, longest_context(self.model.config)
        if room < min(num_tokens, longest):
            self.cache.cross.grow(min(max(num_tokens, 2 * room), longest))

    def reorder(self, order: Sequence[int]) -> None:
        """Row r goes on from where row order[r] is, as beam search has it."""
        self.rows = [self.rows[source].fork() for source in order]
        self.cache = self.cache.select(order)

    def _refill(self) -> None:
        """Computes all latents but the last of every row whose window refills.

        Neighbours of equal lengths go through the network together.
        """

        def shape(slot: int) -> tuple[int, ...]:
            row = self.rows[slot]
            return row.window.refill, row.dropped, row.kept, row.prefix_len, row.window.num_latents

        for (refill, dropped, kept, P, N), group in groupby(range(len(self.rows)), shape):
            if not refill:
                continue
            slots = list(group)
            rows, cache = self.rows[slots[0] : slots[-1] + 1], self.cache.rows(slots[0], slots[-1] + 1)
            cache.self_attention.keep(0)
            cache.cross.keep(kept, dropped)
            if dropped and self.reach:  # keys of the first tokens depend on tokens that have left the window
                cache.cross.keep(0)
                self._read(rows, cache, 0, min(self.reach, kept))
                cache.cross.advance(max(0, kept - self.reach))
            self._read(rows, cache, kept, P)
            if N > 1:
                tokens, positions = self._window(rows, P, P + N - 1)
                self.model.cached_latents(tokens, positions, cache)
                cache.advance(N - 1)

    def _read(self, rows: Sequence[Row], cache: Cache, first: int, last: int) -> None:
        """Caches the keys and values of tokens first ... last - 1 of each row's window, behind what the cache holds."""
        if first == last:
            return
        tokens, positions = self._window(rows, first, last)
        chunk = max(1, READ // len(rows))
        for start in range(0, last - first, chunk):
            part = positions[:, start : start + chunk]
            self.model.cache_prefix(tokens[:, start : start + part.shape[1] + self.reach], part, cache)
            cache.cross.advance(part.shape[1])

    def _window(self, rows: Sequence[Row], first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens first ... last - 1 of each row's window behind those before them, and their positions."""
        tokens = [row.window_ids(first - self.reach, last) for row in rows]
        return self._tensor(tokens), self._positions(
            [row.window.start + first - row.origin for row in rows], last - first
        )

    def _positions(self, first: Sequence[int], n: int) -> Tensor:
        """n positions from each of `first` on: (rows, n), or (1, n) where all are the same."""
        starts = first[:1] if len(set(first)) == 1 else first
        return self._tensor(starts)[:, None] + torch.arange(n, device=self.model.device)

    def _tensor(self, ids: Any) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.model.device)


class Recomputing:
    """A decoder without a cache, for networks whose latents change when tokens follow: a forward for every token."""

    def __init__(self, model: PerceiverAR, rows: Sequence[Row]) -> None:
        self.model, self.rows = model, list(rows)

    def next_logits(self) -> Tensor:
        device, logits = self.model.device, []
        for row in self.rows:
            ids = list(row.ids)[-(row.num_tokens - row.window.start) :]
            logits.append(self.model.latents(torch.tensor([ids], device=device), row.prefix_len)[:, -1])
        return self.model.head(torch.cat(logits))

    def add(self, tokens: Sequence[int], stops: Sequence[tuple[int, ...]]) -> None:
        self.rows = [row for row, token in zip(self.rows, tokens, strict=True) if row.add(token, stops)]

    def reorder(self, order: Sequence[int]) -> None:
        self.rows = [self.rows[source].fork() for source in order]


def prompt_rows(prompt: Prompt, vocab_size: int) -> list[Tensor]:
    """The rows of a prompt, each (T,) int64, T its own.

    Raises:
        InputError: no rows, an empty row, or what is not an id below `vocab_size`; names the row and the id.
    """
    if isinstance(prompt, Tensor | np.ndarray):
        require(prompt.ndim in (1, 2), f"the prompt has shape {tuple(prompt.shape)}: it must be (B, T) or (T,)")
        prompt = prompt[None] if prompt.ndim == 1 else prompt
    require(len(prompt) > 0, "the prompt has no rows: give at least one")
    rows = []
    for r, ids in enumerate(prompt):
        try:
            row = ids if isinstance(ids, Tensor) else torch.tensor(ids)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"prompt row {r} is no sequence of ids: encode it with the model's codec") from None
        require(row.ndim > 0, f"prompt row {r} is a single id: give a list of rows, even if it is one")
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


def _kind(value: Any) -> str:
    """A value's type, and its shape if it has one, for messages."""
    return f"a {value.dtype} tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _generators(seed: int | Sequence[int] | None, rows: int) -> list[torch.Generator]:
    generators = [torch.Generator() for _ in range(rows)]
    if seed is None:
        for generator in generators:
            generator.seed()
        return generators
    numbers = list(seed) if isinstance(seed, Sequence) else [seed]
    require(all(map(is_whole, numbers)), f"seed is {seed!r}: give a whole number, or one for each row")
    seeds = numbers if isinstance(seed, Sequence) else [int(seed) + r for r in range(rows)]
    require(
        len(seeds) == rows, f"seed has {len(seeds)} numbers, the prompt {rows} rows: give each row one, or one in all"
    )
    for generator, one in zip(generators, seeds, strict=True):
        generator.manual_seed(int(one) % 2**64)
    return generators


@contextmanager
def _inference(modules: Sequence[nn.Module]) -> Iterator[None]:
    with _evaluating(modules), torch.inference_mode():
        yield


def evaluation_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Every submodule in evaluation mode, and afterwards in the mode it was in."""
    return _evaluating(list(model.modules()))


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
