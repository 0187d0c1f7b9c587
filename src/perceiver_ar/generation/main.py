"""Generation: every token is drawn from the logits of a forward over a reported window of its row (windows.py).

Shapes: B batch, T tokens of a row so far, V vocabulary.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from perceiver_ar.errors import InputError, require
from perceiver_ar.generation.decoder import Decoder, Recomputing
from perceiver_ar.generation.rows import Row, RowSettings, draw
from perceiver_ar.generation.sampling import LogitsProcessor, Sampling, is_whole
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.windows import Schedule

Prompt = Tensor | np.ndarray | Sequence[Any]
"""(B, T) or (T,) integer ids, or rows of any lengths: a list of 1-D sequences, arrays or tensors of ids."""


class Step(NamedTuple):
    """One new token per row. A row that has finished repeats the step that drew its last token."""

    tokens: Tensor
    """(B,) int64, on the prompt's device (CPU for lists)."""
    logits: Tensor
    """(B, V), before temperature, penalties and filters: the last logits of
    `model(row[start:], prefix_len=len(row) - start - num_latents)`."""
    window_start: Tensor
    """(B,) int64, index in the row of the window's first token."""
    num_latents: Tensor
    """(B,) int64, latents of the window."""
    logprobs: Tensor
    """(B,) float64 (on MPS float32), the tokens' log-probabilities under the logits, in nats."""


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
    presence_penalty: float = 0.0,
    logits_processors: Sequence[LogitsProcessor] = (),
    allowed_next: Callable[[Tensor], Tensor] | None = None,
    stop_tokens: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    num_samples: int = 1,
    seed: int | Sequence[int] | None = None,
    refill_latents: int | None = None,
    prompt_latents: int | None = None,
    slide: bool = False,
    pinned: Sequence[int] = (),
    compile: bool | Literal["max-autotune"] = False,
) -> Iterator[Step]:
    """Continues every row of a prompt token by token.

    The model computes in evaluation mode and without gradients; between steps it is in the mode in which it was before.
    The cache has the dtype of the model's weights, or of autocast, and room for the longest context that can occur.

    Args:
        prompt: see `Prompt`; every row has at least one token. The model sees the last context_length tokens of a row.
        max_new_tokens: maximum number of steps.
        temperature: divides the logits; 0: always the most likely token, after penalties and processors.
        top_k: see `keep_top_k` in `perceiver_ar.generation.sampling`. Applied as in Hugging Face transformers:
            penalties, processors, temperature, top-k, top-p, min-p.
        top_p: see `keep_top_p`.
        min_p: see `keep_min_p`.
        repetition_penalty: see `penalise_repetition`; for ids in the row's prompt and output. In 0.01 ... 100.
        frequency_penalty: subtracted from an id's logit for each time that the row has drawn it. In -100 ... 100.
        presence_penalty: subtracted once from the logit of an id that the row has drawn. In -100 ... 100.
        logits_processors: callables that turn a row's ids so far (1, T) and logits (1, V) float64, on the CPU, into
            other logits, as those of Hugging Face transformers.
        allowed_next: from a row's ids so far (T,) to (V,) bool, True for ids that are allowed next, such as
            `codec.constraint()`.
        stop_tokens: a row that draws one of these ids is finished: it repeats that id and costs nothing more. The
            stream ends when all rows are finished.
        stop_sequences: a row whose output ends with one of these sequences of ids is finished likewise.
        num_samples: rows of output for each row of the prompt, next to each other; the prompt is read once.
        seed: of the draws. An integer: row r uses seed + r; a sequence: one for each row; None: other draws each time.
            What a row draws depends on its own seed and tokens only.
        refill_latents: number of latents after a refill, 1 ... num_latents; None: half of num_latents. With fewer,
            refills are rarer, and the tokens right after one are predicted with less depth.
        prompt_latents: number of latents at the start, 1 ... num_latents; None: as many as the prompt has tokens, or,
            if that is too many, refill_latents. 1, with half at refills, is how the authors sample.
        slide: instead of refills, drop the oldest latent, and the oldest token of a full context. Every step then costs
            the same, but the remaining latents still depend on the dropped ones: after the first drop no single
            forward gives these logits. With position tables a full context is still followed by a refill.
        pinned: ids that stand in place of the first tokens of every window that does not start with the row, such as
            the conditions of its document.
        compile: run the step under `torch.compile`, on CUDA as CUDA graphs. Compiling takes half a minute, for each
            model, number of rows and size of the cache (a power of two); then every token is faster. On a CPU it needs
            a C++ compiler. (Every step reads the whole cache, so a long context that is still growing gains nothing.)
            The cache stays in memory with the model, for the next stream.
            "max-autotune", a mode of torch: kernels are benchmarked on this machine, which takes a minute and pays
            from some ten thousand tokens on. On a CPU it also holds another copy of the weights, in the kernels'
            layout, for each number of rows and size of the cache; the weights must not change during a stream, and if
            they have changed since the last one, everything is compiled again.

    Raises:
        InputError: immediately for arguments that cannot work; later if the model's weights give NaN, a row has no
            allowed next id, or the step does not compile.
    """
    config = model.config
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty)
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
    require(config.cacheable or not compile, "compile needs a cache, which these settings rule out: leave compile out")
    stops = [(int(token),) for token in stop_tokens] + [tuple(map(int, sequence)) for sequence in stop_sequences]
    require(all(stops), "a stop sequence is empty: give at least one id, or leave it out")
    require(not (slide and pinned), "slide drops the oldest tokens one by one, pinned ones too: leave out one of them")
    for name, ids in (*(("a stop token or sequence", stop) for stop in stops), ("pinned", pinned)):
        for id in ids:
            known = 0 <= id < config.vocab_size
            require(known, f"{name} has id {id}: this model's ids are 0 ... {config.vocab_size - 1}")
    prompts = prompt_rows(prompt, config.vocab_size)
    generators = _generators(seed, len(prompts) * num_samples)
    settings = RowSettings(
        sampling,
        tuple(logits_processors),
        allowed_next,
        tuple(stops),
        max_new_tokens,
        Schedule(refill_latents, prompt_latents, slide),
        tuple(map(int, pinned)),
    )

    def steps() -> Iterator[Step]:
        if max_new_tokens == 0:
            return
        home = prompts[0].device
        rows = [
            Row(i, prompts[i // num_samples], config, settings, generator) for i, generator in enumerate(generators)
        ]
        tokens, starts, latents = ([0] * len(rows) for _ in range(3))
        logprobs = [0.0] * len(rows)
        logits: Tensor | None = None
        modules = list(model.modules())
        with evaluation_mode(modules), torch.inference_mode():
            if config.cacheable:
                decoder = Decoder(model, rows, num_samples, max_new_tokens, compile)
            else:
                decoder = Recomputing(model, rows)
        while decoder.rows:
            with evaluation_mode(modules), torch.inference_mode():
                fresh = decoder.next_logits()
                drawn, chosen, _ = draw(decoder.rows, fresh)
                order = [row.index for row in decoder.rows]
                for row, token, logprob in zip(decoder.rows, drawn, chosen, strict=True):
                    tokens[row.index], logprobs[row.index] = token, logprob
                    starts[row.index], latents[row.index] = row.window.start, row.window.num_latents
                decoder.add(drawn)
            # Copies, because inference tensors are of no use to autograd.
            logits = fresh.new_empty(len(rows), fresh.shape[-1]) if logits is None else logits
            logits = logits.index_copy(0, torch.tensor(order, device=fresh.device), fresh)
            yield Step(
                torch.tensor(tokens, device=home),
                logits,
                torch.tensor(starts, device=home),
                torch.tensor(latents, device=home),
                torch.tensor(logprobs, dtype=torch.float32 if home.type == "mps" else torch.float64, device=home),
            )

    return steps()


def generate(model: PerceiverAR, prompt: Prompt, max_new_tokens: int, **settings: Any) -> Tensor:
    """The new ids (B, n) int64, on the prompt's device (CPU for lists); `stream` explains the settings.

    B counts every sample; n is max_new_tokens, or less if all rows finish before.

    Raises:
        InputError: see `stream`.
    """
    rows = prompt_rows(prompt, model.config.vocab_size)
    columns = [step.tokens for step in stream(model, rows, max_new_tokens=max_new_tokens, **settings)]
    return torch.stack(columns, dim=1) if columns else rows[0].new_empty(len(rows) * settings.get("num_samples", 1), 0)


def prompt_rows(prompt: Prompt, vocab_size: int) -> list[Tensor]:
    """The rows of a prompt, each (T,) int64, T its own.

    Raises InputError, with the row and the id, for no rows, an empty row, or a value that is no id below `vocab_size`.
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
        require(row.ndim > 0, f"prompt row {r} is a single id: give a list of rows, even for one row")
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
    seed = secrets.randbits(64) if seed is None else seed
    numbers = list(seed) if isinstance(seed, Sequence) else [seed]
    require(all(map(is_whole, numbers)), f"seed is {seed!r}: give a whole number, or one for each row")
    seeds = numbers if isinstance(seed, Sequence) else [int(seed) + r for r in range(rows)]
    require(
        len(seeds) == rows,
        f"seed has {len(seeds)} numbers, the prompt {rows} rows: give one for each row, or a single one",
    )
    return [torch.Generator().manual_seed(int(one) % 2**64) for one in seeds]


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context with these modules, not those inside of them, in evaluation mode, and afterwards as they were."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
