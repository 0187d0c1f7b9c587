"""Evaluation and samples during a run."""

from typing import Literal

import numpy as np
import torch

from perceiver_ar.data.codec import start_ids
from perceiver_ar.data.token_files import TokenFile
from perceiver_ar.evaluation import Evaluation, evaluate
from perceiver_ar.files import write_text
from perceiver_ar.generation import generate
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.training.console import say
from perceiver_ar.training.prepare import Prepared

CONTINUED = "\u25b8"  # ▸, between a prompt and its continuation
SHOWN = 200  # characters of the prompt


def score(prepared: Prepared, model: PerceiverAR, max_tokens: int, spread: bool = False) -> Evaluation | None:
    """Scores at most `max_tokens` held-out tokens, the first ones or spread over all; None if nothing is held out."""
    held_out, codec = prepared.held_out, prepared.codec
    if held_out is None or len(held_out) < 2:
        return None
    return evaluate(
        model,
        held_out,
        byte_lengths=codec.byte_lengths(),
        amounts=codec.amounts,
        document_length=codec.document_length,
        max_tokens=max(max_tokens, len(codec.unknown) + 2),  # conditions are not scored
        spread=spread,
        precision=evaluation_precision(prepared),
    )


def evaluation_precision(prepared: Prepared) -> Literal["32", "bf16"]:
    return "32" if prepared.recipe.trainer.precision == "32" else "bf16"


def sample(prepared: Prepared, model: PerceiverAR, step: int, whole: bool = False) -> None:
    """Writes a sample that the model generates, and shows it on stderr if it is text.

    Text continues the beginning of the held-out text, if there is any; all else begins without a prompt.

    whole: if all documents have the same length, the sample is a whole document unless `sample_tokens` is 0.
    """
    codec, run, recipe = prepared.codec, prepared.run, prepared.recipe
    length = recipe.trainer.sample_tokens
    if length == 0:
        return
    if codec.document_length is not None:
        rest = codec.document_length - len(codec.start())
        length = rest if whole else min(length, rest)
    prompt = start_ids(codec)
    if codec.writes_text and prepared.held_out is not None and len(prepared.held_out) > len(prompt):
        prompt = beginning(prepared.held_out, recipe.model.context_length - length, len(prompt))
    ids = generate(
        model,
        torch.from_numpy(prompt.astype(np.int64))[None],
        length,
        temperature=1.0 if codec.writes_text else 0.8,
        stop_tokens=codec.separator[-1:],
        seed=recipe.seed,
        allowed_next=codec.constraint(),
        pinned=codec.conditions_of(prompt),
    )[0]
    stem = f"step-{step:06d}"
    if not codec.writes_text:
        paths = codec.show([np.append(prompt, ids.cpu().numpy())], 0, run.samples, stem)
        say(f"step {step:,}  sample: {', '.join(path.name for path in paths)}")
        return
    before, text = (codec.decode(part).decode("utf-8", errors="replace") for part in (prompt, ids.cpu().numpy()))
    if before:
        say(f"step {step:,}  sample, from {CONTINUED} on, after {len(prompt):,} held-out tokens:")
        text = before[-SHOWN:] + CONTINUED + text
    else:
        say(f"step {step:,}  sample:")
    write_text(run.samples / f"{stem}.txt", text)
    say("  " + text.replace("\n", "\n  "), style="dim")


def beginning(tokens: TokenFile, room: int, least: int) -> np.ndarray:
    """The first half of the first document, cut to `room` tokens, but at least its first `least`."""
    end = int(tokens.documents[1]) if tokens.num_documents > 1 else len(tokens)
    return tokens.read(0, max(least, min(room, end // 2)))
