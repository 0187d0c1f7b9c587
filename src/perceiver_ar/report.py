"""`report.html`: a run on one page, in one self-contained file, made from the files of the run directory."""

import base64
import json
import platform
import re
from collections.abc import Iterator, Mapping
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from perceiver_ar import __version__
from perceiver_ar.files import write_text
from perceiver_ar.run import Run

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$name: perceiver-ar</title>
<link rel="icon" href="data:,">
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #24292f; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
.facts div { border: 1px solid #d0d7de; border-radius: 6px; padding: .5rem .9rem }
.facts b { display: block; font-size: 1.35rem } .facts div:first-child b { color: #2f6fb2 }
.facts span, .muted { color: #6e7781; font-size: .9rem }
img { max-width: 100%; height: auto } audio { width: 100% }
pre { background: #f6f8fa; border-radius: 6px; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: .9rem } td { padding: .1rem 1.2rem .1rem 0; vertical-align: top }
details { margin: .3rem 0 } summary { cursor: pointer } code { overflow-wrap: anywhere }
</style>
<h1>$name</h1>
<div class="muted">$subtitle</div>
<div class="facts">
$facts
</div>
$pictures
$samples
<h2>Settings</h2>
$settings
<h2>Measurements</h2>
<details><summary>summary.json</summary>
<table>
$summary
</table></details>
<p class="muted">$versions</p>
</html>
""")

IMAGES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".gif": "image/gif"}
SOUNDS = {".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg", ".ogg": "audio/ogg"}
LARGEST = 20_000_000
"""Maximum bytes of a sample that is shown; larger ones are only named."""


def write_report(run: Run, summary: Mapping[str, Any]) -> Path:
    """Writes `report.html`: settings, curves, bits against context length, last samples. Returns its path."""
    recipe = run.recipe_dict()
    groups = {name: value for name, value in recipe.items() if isinstance(value, dict)}
    general = {name: value for name, value in recipe.items() if name not in groups}
    sizes = groups.get("model", {})
    text = PAGE.substitute(
        name=escape(run.path.resolve().name),
        subtitle=escape(
            f"{summary['parameters']:,} parameters, context {sizes.get('context_length', 0):,}, "
            f"{sizes.get('num_latents', 0):,} latents"
            + (f", started from {general['init_from']}" if general.get("init_from") else "")
        ),
        facts="\n".join(f"<div><b>{value}</b><span>{escape(name)}</span></div>" for name, value in facts(summary)),
        pictures="\n".join(
            f'<h2>{title}</h2>\n<img alt="{title}" src="{data_uri(run.plots / file, "image/png")}">'
            for title, file in (("How it learned", "loss.png"), ("What more context brings", "context.png"))
            if (run.plots / file).exists()
        ),
        samples="\n".join(samples(run.samples)),
        settings="\n".join(
            f"<details><summary>{name}</summary>\n<table>\n{rows(values)}\n</table></details>"
            for name, values in {"run": general, **groups}.items()
        ),
        summary=rows(summary),
        versions=f"perceiver-ar {__version__}, torch {version('torch')}, Python {platform.python_version()}",
    )
    path = run.path / "report.html"
    write_text(path, text)
    return path


def facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The most important numbers, as (name, value)."""
    for name in ("bits_per_base", "bits_per_byte", "bits_per_dimension", "nats_per_note", "bits_per_token"):
        if summary.get(name) is not None:
            yield f"{name.replace('_', ' ')}, held out", f"{summary[name]:.3f}"
            break
    for name in ("gzip", "xz"):
        if f"{name}_bits_per_byte" in summary:
            yield f"bits per byte, {name} on the same", f"{summary[f'{name}_bits_per_byte']:.3f}"
    yield "steps", f"{summary['steps']:,}"
    if summary.get("skipped_steps"):
        yield "of them skipped", f"{summary['skipped_steps']:,}"
    yield "training targets", f"{summary['tokens_seen']:,}"
    minutes, seconds = divmod(round(summary["train_seconds"]), 60)
    yield "time", f"{minutes:,} min {seconds:02d} s" if minutes else f"{seconds} s"


def samples(folder: Path) -> Iterator[str]:
    """HTML of the last step's samples, shown by kind, and of earlier texts, folded."""
    steps: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("step-*")):
        if match := re.match(r"step-(\d+)(-|$)", path.stem):  # else it is not one of ours
            steps.setdefault(int(match[1]), []).append(path)
    for i, (step, paths) in enumerate(sorted(steps.items(), reverse=True)):
        title = f"What it writes after step {step:,}"
        shown = "\n".join(sample(path) for path in paths)
        if i == 0:
            yield f"<h2>{title}</h2>\n{shown}"
        elif all(path.suffix == ".txt" for path in paths):
            yield f"<details><summary>{title}</summary>\n{shown}</details>"


def sample(path: Path) -> str:
    if path.stat().st_size > LARGEST:
        return f"<p><code>{escape(path.name)}</code> (too large to show)</p>"
    if path.suffix == ".txt":
        return f"<pre>{escape(path.read_text(encoding='utf-8', errors='replace'))}</pre>"
    if path.suffix in IMAGES:
        return f'<img alt="{escape(path.name)}" src="{data_uri(path, IMAGES[path.suffix])}">'
    if path.suffix in SOUNDS:
        return f'<audio controls src="{data_uri(path, SOUNDS[path.suffix])}"></audio>'
    return f"<p><code>{escape(path.name)}</code></p>"


def data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def rows(values: Mapping[str, Any]) -> str:
    return "\n".join(
        f"<tr><td>{escape(str(name))}</td><td><code>{escape(json.dumps(value, ensure_ascii=False))}</code></td></tr>"
        for name, value in values.items()
    )
