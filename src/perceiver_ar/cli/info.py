"""perceiver-ar info."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from perceiver_ar.cli.options import make_parser, parse
from perceiver_ar.costs import costs

if TYPE_CHECKING:
    from perceiver_ar.run import Run


def info_verb(argv: list[str]) -> None:
    what = "Shows a run's settings, scores and costs, and why it ended or stopped."
    parser = make_parser("info", "RUN", what, "  perceiver-ar info runs/books")
    parser.add_argument("run", type=str, help="a run directory")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parse(parser, argv)

    from perceiver_ar.data.conditions import listed
    from perceiver_ar.run import Run

    run = Run.open(args.run)
    facts = dict(run_facts(run))
    if args.json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, list):
            shown = ", ".join(value[:3]) + (f" and {len(value) - 3:,} more" if len(value) > 3 else "")
        elif isinstance(value, dict):
            shown = "; ".join(f"{key}: {listed(values)}" for key, values in value.items())
        else:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<34}{shown}")


# Entries of summary.json to show, if present.
SHOWN = ("steps", "tokens_seen", "train_seconds", "bits_per_byte", "bits_per_base", "bits_per_dimension",
         "nats_per_note", "nats_per_token")  # fmt: skip


def run_facts(run: "Run") -> Iterator[tuple[str, Any]]:
    import torch

    from perceiver_ar.training.checkpoints import Checkpoints
    from perceiver_ar.training.trouble import expected_bytes

    recipe, summary = run.recipe() if run.recipe_file.exists() else None, run.summary()
    if recipe is not None:
        yield "trained_on", list(recipe.paths) or ["Python's standard library"]
        if recipe.init_from is not None:
            yield "started_from", recipe.init_from
        if recipe.adapter is not None:
            yield "adapter", f"{recipe.adapter} of rank {recipe.adapter_rank}"
        yield "finished", summary is not None
        if run.stopped_file.exists():
            yield "stopped", " ".join(run.stopped_file.read_text(encoding="utf-8").split())
        if summary is not None and "ended_by" in summary:
            yield "ended_by", f"{summary['ended_by']}, at step {summary['steps']:,} of {recipe.limits}"
        saved = [each.step for each in Checkpoints(run.checkpoints).all() if each.bytes > 0]
        if summary is None and saved:
            yield "last_checkpoint_at_step", saved[-1]
    if summary is None and recipe is not None and not run.weights_file.exists():
        return  # it has stopped before its first checkpoint, or has just begun
    model = run.model()
    config, parameters, codec = model.config, model.num_parameters(), run.codec_name()
    if codec is not None:
        yield "codec", codec
        if conditions := run.conditions():
            yield "conditions", conditions
    yield "parameters", parameters
    yield "vocab_size", config.vocab_size
    yield "context_length", config.context_length
    yield "num_latents", config.num_latents
    yield "self_attention_layers", config.num_layers
    yield "cross_attention_layers", len(config.cross_layers)
    yield "dim", config.dim
    window = costs(config)
    yield "forward_gigaflops_per_window", window.forward_flops / 1e9
    if recipe is not None:
        yield "windows_per_step", recipe.trainer.batch_size
        yield "blocks_per_window", recipe.blocks
        training = costs(config, latents=recipe.window_latents, blocks=recipe.blocks).training_flops
        yield "training_gigaflops_per_step", recipe.trainer.batch_size * training / 1e9
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield "training_megabytes", expected_bytes(recipe, parameters, device) / 1e6
    yield "weights_megabytes", 4 * parameters / 1e6
    yield "context_keys_values_megabytes", window.context_bytes / 1e6
    for name, value in (summary or {}).items():
        if name in SHOWN and value is not None:
            yield name, value
