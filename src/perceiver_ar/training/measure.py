"""Evaluation and samples during a run."""

from typing import Literal

import numpy as np
import torch

from perceiver_ar.data.codec import start_ids
from perceiver_ar.evaluation import Evaluation, evaluate
from perceiver_ar.files import write_text
from perceiver_ar.generation import generate
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.training.console import say
from perceiver_ar.training.prepare import Prepared


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
    """Writes a sample that the model generates without a prompt, and shows it on stderr if it is text.

    whole: if all documents have the same length, the sample is a whole document unless `sample_tokens` is 0.
    """
    codec, run, recipe = prepared.codec, prepared.run, prepared.recipe
    length = recipe.trainer.sample_tokens
    if length == 0:
        return
    if codec.document_length is not None:
        rest = codec.document_length - len(codec.start())
        length = rest if whole else min(length, rest)
    start = start_ids(codec)
    stop = codec.separator[-1:]
    ids = generate(
        model,
        torch.from_numpy(start)[None],
        length,
        temperature=0.8,
        stop_tokens=stop,
        seed=recipe.seed,
        allowed_next=codec.constraint(),
        pinned=codec.condition_ids({}),
    )[0]
    stem = f"step-{step:06d}"
    if not codec.writes_text:
        paths = codec.show([np.append(start, ids.cpu().numpy())], 0, run.samples, stem)
        say(f"step {step:,}  sample: {', '.join(path.name for path in paths)}")
        return
    text = codec.decode(ids.cpu().numpy()).decode("utf-8", errors="replace")
    write_text(run.samples / f"{stem}.txt", text)
    say(f"step {step:,}  sample:")
    say("  " + text.replace("\n", "\n  "), style="dim")
