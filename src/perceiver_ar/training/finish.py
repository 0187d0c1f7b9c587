"""The end of a run: the last evaluation and sample, pictures, the report, and the summary."""

import json
import math
import shutil
from typing import Any

from perceiver_ar.data.tokens import TokenFile
from perceiver_ar.evaluation import compressors, evaluate_context_lengths, write_table
from perceiver_ar.files import write_text
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.report import write_report
from perceiver_ar.run import Run
from perceiver_ar.training.checkpoints import Checkpoint, Checkpoints
from perceiver_ar.training.console import say
from perceiver_ar.training.measure import evaluation_precision, sample, score
from perceiver_ar.training.metrics import read_metrics
from perceiver_ar.training.prepare import Prepared
from perceiver_ar.training.saving import read_checkpoint, weights_for_use, write_weights
from perceiver_ar.training.state import Training
from perceiver_ar.training.tracking import Track


def finish(prepared: Prepared, training: Training, model: PerceiverAR, track: Track) -> dict[str, Any]:
    """Writes `summary.json` last: it marks the run as finished. Returns the summary."""
    run, recipe, codec, held_out = prepared.run, prepared.recipe, prepared.codec, prepared.held_out
    some, shorter, best = recipe.trainer.evaluation_tokens, None, None
    if recipe.trainer.final_weights == "best":
        shorter = score(prepared, model, some, spread=True)
        best = better_checkpoint(prepared, math.inf if shorter is None else shorter.bits_per_token)
    if best is not None:
        model, shorter = take_weights(prepared, best, training), None
    summary: dict[str, Any] = {
        "steps": training.step,
        "ended_by": training.ended_by,
        "tokens_seen": training.tokens_seen,
        "skipped_steps": training.skipped,
        "train_seconds": round(training.seconds, 1),
        "parameters": model.num_parameters(),
        "weights_of_step": training.step if best is None else best.step,
    }
    references: dict[str, float] = {}
    last: list[tuple[float, float]] = []
    tokens_per_byte: float | None = None
    result = score(prepared, model, 10 * some)
    if result is not None and held_out is not None:
        # Evaluations during training scored fewer tokens.
        shorter = result if result.tokens <= some else shorter or score(prepared, model, some, spread=True)
        assert shorter is not None
        references = compressors(codec, held_out.tokens[: 10 * some + 1])
        compressed = {f"{name}_bits_per_byte": bits for name, bits in references.items()}
        last = [(training.tokens_seen, shorter.bits_per_token)] if best is None else []
        tokens_per_byte = shorter.tokens / shorter.bytes if codec.writes_text and shorter.bytes else None
        if shorter is not result:
            bits = result.bits_per_token if tokens_per_byte is None else result.bits_per_byte
            assert bits is not None  # of text
            references["all held out"] = bits
        summary = {**result.to_dict(), **compressed, **summary, "held_out_documents": held_out.num_documents}
        if codec.document_length is None:
            draw_context(prepared, model, held_out)
    sample(prepared, model, training.step, whole=True)
    draw_loss(run, last, references, tokens_per_byte)
    track({name: value for name, value in summary.items() if isinstance(value, (int, float))}, training.step)
    report = write_report(run, summary)
    if recipe.adapter is None:  # else checkpoints hold the adapter alone
        shutil.rmtree(run.initial, ignore_errors=True)
    write_text(run.summary_file, json.dumps(summary, indent=2) + "\n")
    say(f"report: {report}")
    return summary


def better_checkpoint(prepared: Prepared, least: float) -> Checkpoint | None:
    """The intact checkpoint that was best on held-out text, if it had fewer bits per token than `least`."""
    kept = Checkpoints(prepared.run.checkpoints, prepared.recipe.trainer.keep_best).all()
    measured = [(each.validation_bits, each.step, each) for each in kept if each.validation_bits is not None]
    return next((each for bits, _, each in sorted(measured) if bits < least and each.damage() is None), None)


def take_weights(prepared: Prepared, checkpoint: Checkpoint, training: Training) -> PerceiverAR:
    """Makes the weights of a checkpoint those of the run; returns their network."""
    content = read_checkpoint(checkpoint)
    model = training.with_weights(weights_for_use(content))
    write_weights(prepared, model, content)
    say(f"the run's weights are those of step {checkpoint.step:,}, the best on held-out text (trainer.final_weights)")
    return model.eval()


def draw_loss(
    run: Run, last: list[tuple[float, float]], references: dict[str, float], tokens_per_byte: float | None
) -> None:
    """Draws loss.png.

    tokens_per_byte: of the held-out text scored during training, with separators; None: it is not text.
    """
    from perceiver_ar.plots import plot_loss

    rows, scale = read_metrics(run.metrics_file), tokens_per_byte or 1.0
    train, validation = (
        [(float(row["tokens"]), scale * float(row[name])) for row in rows if row[name]]
        for name in ("train_bits", "validation_bits")
    )
    validation += [(tokens, scale * bits) for tokens, bits in last]
    plot_loss(
        run.plots / "loss.png",
        train,
        validation,
        references,
        y_label="bits per token" if tokens_per_byte is None else "bits per byte",
    )


def draw_context(prepared: Prepared, model: PerceiverAR, held_out: TokenFile) -> None:
    """Draws bits per byte of the same held-out text against the context length, up to the model's maximum."""
    from perceiver_ar.plots import plot_context

    run, recipe, codec = prepared.run, prepared.recipe, prepared.codec
    longest = min(recipe.model.context_length, len(held_out) // 2)  # the other half are targets
    count = len(codec.unknown)  # a context has room for conditions and targets
    if longest < 2 * count:
        say("The held-out text is too short beside its conditions for a plot of context lengths.")
        return
    lengths = [longest, *(longest // 4**i for i in (1, 2, 3) if longest // 4**i >= max(16, 2 * count))]
    most = max(count + 2, recipe.trainer.evaluation_tokens // 10)
    results = evaluate_context_lengths(
        model,
        held_out,
        lengths,
        byte_lengths=codec.byte_lengths(),
        max_tokens=most,
        precision=evaluation_precision(prepared),
    )
    write_table(run.plots / "context.csv", results)
    references = compressors(codec, held_out.tokens[longest:][:most])
    plot_context(run.plots / "context.png", results, references)
