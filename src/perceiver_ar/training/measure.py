"""Evaluation and samples during a run."""

from codecs import getincrementaldecoder
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
MOST_READ = 4096  # tokens of the prompt: their keys and values are held, other than in training


def score(prepared: Prepared, model: PerceiverAR, max_tokens: int, spread: bool = False) -> Evaluation | None:
    """Scores at most `max_tokens` held-out tokens, the first ones or spread over all; None if nothing is held out."""
    held_out, codec = prepared.held_out, prepared.codec
    if held_out is None or len(held_out) < 2:
        return None
    # Conditions are not scored. Of few tokens, those that are spread over the text could all be conditions.
    conditions = len(codec.unknown)
    max_tokens = max(max_tokens, conditions + 2)
    spread = spread and max_tokens > 100 * conditions
    return evaluate(
        model,
        held_out,
        byte_lengths=codec.byte_lengths(),
        amounts=codec.amounts,
        document_length=codec.document_length,
        max_tokens=max_tokens,
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
    prompt, held_out = start_ids(codec), prepared.held_out if codec.writes_text else None
    continues = held_out is not None and len(held_out) > len(prompt)
    if held_out is not None and continues:
        context = recipe.model.context_length
        prompt = beginning(held_out, min(max(context // 2, context - length), MOST_READ), len(prompt))
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
    decoder = getincrementaldecoder("utf-8")("replace")  # a prompt may end within a character
    before = decoder.decode(codec.decode(prompt))
    text = decoder.decode(codec.decode(ids.cpu().numpy()), final=True)
    if continues:
        say(f"step {step:,}  sample, from {CONTINUED} on, after {len(prompt):,} held-out tokens:")
        text = before[-SHOWN:] + CONTINUED + text
    else:
        say(f"step {step:,}  sample:")
    write_text(run.samples / f"{stem}.txt", text)
    say("  " + text.replace("\n", "\n  "), style="dim")


def beginning(tokens: TokenFile, room: int, front: int) -> np.ndarray:
    """The first half of the first document and the `front` tokens before it, cut to `room` tokens behind these."""
    end = int(tokens.documents[1]) if tokens.num_documents > 1 else len(tokens)
    return tokens.read(0, front + min(max(room - front, 0), (end - front) // 2))
