"""A run on the Hugging Face Hub: its model card (README.md), and which of its files go there."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from perceiver_ar import __version__
from perceiver_ar.data.codec import Codec
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import write_text
from perceiver_ar.run import Run

CARD = "README.md"
SHARED = (CARD, "config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
          "codec.json", "recipe.yaml", "summary.json", "report.html",
          "modeling_perceiver_ar.py", "generation_config.json", "tokenizer.json", "tokenizer_config.json")  # fmt: skip
"""Files to upload besides the codec's own: for using the run and knowing how it was made, not for resuming it. The
last four are those of an export for transformers."""
MEASURED = ("bits_per_byte", "bits_per_base", "bits_per_dimension", "nats_per_note", "nats_per_second",
            "bits_per_token", "nats_per_token")  # fmt: skip


def write_card(run: Run, repo_id: str) -> bool:
    """Writes `README.md` into a run, for the Hub's `repo_id` (OWNER/NAME). Returns False if there is one already.

    The card describes the network, its training data, its results (also in the Hub's format) and its use. It names no
    licence: the owner has to add it.
    """
    check_repo_id(repo_id)
    if (run.path / CARD).exists():
        return False
    model, codec, figures = run.model(), run.codec_if_any(), _figures(run)
    name = repo_id.partition("/")[2]
    task = _task(codec)
    data = ModelCardData(
        library_name="perceiver-ar",
        pipeline_tag=None if task == "other" else task,
        tags=["perceiver-ar", "long-context", *([] if codec is None else [codec.name])],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type="held-out",
                dataset_name="documents held out in training",
                metric_type=metric,
                metric_name=metric.replace("_", " "),
                metric_value=round(figures[metric], 5),
            )
            for metric in MEASURED
            if metric in figures
        ]
        or None,
    )
    config = model.config
    about = [
        f"# {name}",
        "",
        f"A [Perceiver AR](https://arxiv.org/abs/2202.07765) of {model.num_parameters():,} parameters that reads up to "
        f"{config.context_length:,} tokens at once, made with perceiver-ar {__version__}.",
        "",
        *_table(_settings(run, model, codec, figures)),
        *_measured(figures),
        *_use(repo_id, name, codec),
    ]
    write_text(run.path / CARD, "\n".join(["---", data.to_yaml(), "---", "", *about, ""]))
    return True


def shared_files(run: Run) -> list[str]:
    """The files of a run that go to the Hub, as paths within it. Raises InputError if it cannot be loaded."""
    run.model()
    codec = run.codec_if_any()
    patterns = [*SHARED, *(() if codec is None else codec.files)]
    found = {path.relative_to(run.path).as_posix() for pattern in patterns for path in run.path.glob(pattern)}
    return sorted(found)


def push(run: Run, repo_id: str, *, private: bool = False) -> str:
    """Uploads `shared_files` to a repository on the Hub, in one commit; makes the repository if it is missing.

    Returns its address. Raises InputError if the Hub cannot be reached or refuses the files.
    """
    check_repo_id(repo_id)
    operations = [CommitOperationAdd(name, run.path / name) for name in shared_files(run)]
    api = HfApi(token=True, library_name="perceiver-ar", library_version=__version__)
    try:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        public = private and not api.repo_info(repo_id).private
        if not public:
            api.create_commit(repo_id, operations, commit_message=f"A run of perceiver-ar {__version__}")
    except LocalTokenNotFoundError:
        raise InputError(f"pushing to {repo_id} needs a token: run `hf auth login`, or set HF_TOKEN") from None
    except Exception as error:  # from the network, the Hub, or a library between
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{repo_id}: the Hub did not accept the run ({type(error).__name__}: {reason})") from error
    require(not public, f"{repo_id} already exists and is public: leave out --private, or name another one")
    return str(address)


def check_repo_id(repo_id: str) -> None:
    """Raises InputError unless `repo_id` is a valid OWNER/NAME on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not a valid name on the Hub ({error}); give OWNER/NAME") from None
    require(repo_id.count("/") == 1, f"{repo_id!r} has no owner: give OWNER/NAME")


def _task(codec: Codec | None) -> str:
    """The Hub's name for the task."""
    if codec is not None and codec.writes_text:
        return "text-generation"
    return "unconditional-image-generation" if codec is not None and codec.ending == ".png" else "other"


def _settings(run: Run, model: Any, codec: Codec | None, figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    config = model.config
    yield "context", f"{config.context_length:,} tokens, the last {config.num_latents:,} of them latents"
    yield "layers", f"{len(config.cross_layers)} of cross-attention, {config.num_layers} of self-attention"
    yield "width", f"{config.dim} ({config.num_heads} heads)"
    yield "vocabulary", f"{config.vocab_size:,} ids" + ("" if codec is None else f" (codec `{codec.name}`)")
    if run.recipe_file.exists():
        recipe = run.recipe()
        yield "trained on", ", ".join(f"`{Path(path).name}`" for path in recipe.paths) or "Python's standard library"
        if recipe.init_from is not None:
            yield "started from", f"`{Path(recipe.init_from).name}`"
    if {"steps", "tokens_seen"} <= figures.keys():
        yield "training", f"{figures['steps']:,} steps, {figures['tokens_seen']:,} targets"
    if run.recipe_file.exists():
        yield "all settings", "[recipe.yaml](recipe.yaml)"


def _figures(run: Run) -> dict[str, Any]:
    """The finite numbers of a summary, which may be an older version's or edited."""
    numbers = {name: value for name, value in (run.summary() or {}).items() if type(value) in (int, float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _measured(figures: dict[str, Any]) -> Iterator[str]:
    rows = [(name.replace("_", " "), f"{figures[name]:.4f}") for name in MEASURED if name in figures]
    if not rows:
        return
    for tool in ("gzip", "xz"):
        if (value := figures.get(f"{tool}_bits_per_byte")) is not None:
            rows.append((f"`{tool}` on the same bytes", f"{value:.4f}"))
    yield from ("", "## How good it is", "")
    if {"tokens", "held_out_documents"} <= figures.keys():
        documents = f"{figures['tokens']:,} tokens of {figures['held_out_documents']:,} documents"
        yield f"On {documents} that it was not trained on:"
    else:
        yield "On documents that it was not trained on:"
    yield from ("", *_table(iter(rows)))


def _table(rows: Iterator[tuple[str, str]]) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    for name, value in rows:
        yield f"| {name} | {value} |"


def _use(repo_id: str, name: str, codec: Codec | None) -> Iterator[str]:
    yield from ("", "## How to use it", "", "With perceiver-ar installed:", "")
    yield from ("```bash", f"hf download {repo_id} --local-dir {name}", f"perceiver-ar info {name}")
    if codec is not None:
        yield f"perceiver-ar generate {name} --seed 1 " + (
            '--prompt "It was"' if codec.writes_text else f"--out new{codec.ending}"
        )
    yield from ("```", "", "or from Python:", "", "```python")
    if codec is None:
        yield from ("from perceiver_ar import Run", "", f'model = Run.open("{name}").model()', "```")
        return
    count = 200 if codec.document_length is None else codec.document_length - 1
    start = 'codec.start("It was")' if codec.writes_text else "codec.start()"
    yield from ([] if codec.writes_text else ["from pathlib import Path", ""])
    yield from ("from perceiver_ar import Run, generate", "")
    yield from (f'run = Run.open("{name}")', "model, codec = run.model(), run.codec()")
    yield f"ids = generate(model, [{start}], max_new_tokens={count}, seed=1, allowed_next=codec.constraint())"
    if codec.writes_text:
        yield 'print(codec.decode(ids[0]).decode(errors="replace"))'
    else:
        yield f'Path("new{codec.ending}").write_bytes(codec.decode(ids[0]))'
    yield "```"
