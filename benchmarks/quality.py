"""Who predicts held-out tokens best after equal wall-clock time? Ours, perceiver-ar-pytorch ("seed") and dense Llamas.

    make benchmark BENCH=quality ARGS="--books DIR --piano DIR"

All train for `--minutes` on `--threads` threads, with the same token files, sampler and precision; nothing is compiled.
`--jobs` runs go side by side and slow each other down alike. The clock counts training only. With one CPU thread it
counts CPU time, so that other programs on the machine cost no run its share. All predict the same held-out targets:
segments spread evenly over the text, in windows of `--stride` targets with the full context.

A contender tries its grid (`CONTENDERS`) with the lowest seed; the best grid point then runs with the other seeds. The
best is chosen on the text that is reported, for all alike. Every id is a target (the package's own loss ignores id 0).

`--out` keeps results.jsonl (a line per finished run), table.md, quality.png and the tokens. After an interruption the
same command continues. A folder holds one setting; for the time that ours needs to reach the package's score, run ours
with fewer minutes and another folder.
"""

import argparse
import json
import math
import os
import statistics
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from common import DEVICE, machine, training_clock
from networks import Size
from torch import nn

from perceiver_ar import next_token_loss
from perceiver_ar.config import DataConfig, OptimConfig
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.data.modalities import make_codec
from perceiver_ar.data.sampler import TrainingWindows
from perceiver_ar.data.sources import find_files, standard_library
from perceiver_ar.data.tokens import TokenFile, prepare
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path, write_text
from perceiver_ar.optim import lr_factor, make_optimizer

Record = dict[str, Any]
"""A line of results.jsonl."""


@dataclass(frozen=True)
class GridPoint:
    context: int
    batch: int
    """TrainingWindows per step."""
    lr: float = 1.0
    """Factor on the peak learning rates of the contender's rule."""


@dataclass(frozen=True)
class Contender:
    grid: tuple[GridPoint, ...]
    size: Size
    latents: int | None
    """Targets of a window, or of each of its blocks; None: all its tokens."""
    rule: OptimConfig
    network: networks.Network
    micro_batch: int | None = None
    """TrainingWindows at once; None: all of a step."""
    blocks: int = 1
    """Of a window in training."""


# Four million weights beside the embeddings. CPUs prefer 128 channels a head (recipes/demo.yaml); the package has 64.
OURS, SEED_SMALL, SEED_SCRIPT, TINY = Size(256, 4, 2), Size(256, 4, 4), Size(512, 8, 8), Size(32, 1, 1)
MUON = OptimConfig()
ADAMW = OptimConfig(name="adamw", lr=1e-3, weight_decay=0.1, schedule="cosine")
SCRIPT = OptimConfig(name="adamw", lr=2e-4, betas=(0.9, 0.999), schedule="constant", warmup=0.0, grad_clip=0.5)
COSINE = replace(SCRIPT, schedule="cosine", warmup=0.02)
OURS_GRID = (GridPoint(1024, 8), GridPoint(1024, 4), GridPoint(2048, 4), GridPoint(1024, 4, lr=0.5))
DENSE_GRID = (GridPoint(256, 8), GridPoint(512, 4), GridPoint(1024, 2), GridPoint(2048, 1), GridPoint(512, 2))
SLIDING_GRID = (GridPoint(1024, 2), GridPoint(2048, 1))
MUON_GRID, ADAMW_GRID = (*DENSE_GRID, GridPoint(512, 4, lr=0.5)), (*DENSE_GRID, GridPoint(512, 4, lr=3.0))
SEED_GRID, SCRIPT_GRID = (GridPoint(1024, 8), GridPoint(1024, 8, lr=5.0)), (GridPoint(4096, 16),)

CONTENDERS = {
    "ours": Contender(OURS_GRID, OURS, 128, MUON, networks.OURS, blocks=4),
    "ours_plain": Contender(OURS_GRID, OURS, 128, MUON, networks.OURS_PLAIN, blocks=4),
    "dense_muon": Contender(MUON_GRID, OURS, None, MUON, networks.DENSE),
    "dense_adamw": Contender(ADAMW_GRID, OURS, None, ADAMW, networks.DENSE),
    "dense_sliding": Contender(SLIDING_GRID, OURS, None, MUON, networks.SLIDING),
    # train.py of perceiver-ar-pytorch: Adam at a constant rate, the gradients of four batches of four windows a step.
    "seed_script": Contender(SCRIPT_GRID, SEED_SCRIPT, 512, SCRIPT, networks.SEED, micro_batch=4),
    "seed_small": Contender(SEED_GRID, SEED_SMALL, 128, COSINE, networks.SEED),
}
SEGMENTS = 16
"""Pieces of the held-out text that are scored; every fourth one is scored at shorter contexts, too."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a folder have in common."""

    minutes: float
    score_tokens: int
    stride: int
    threads: int
    jobs: int
    precision: str
    rehearse: bool

    @property
    def scale(self) -> int:
        """What contexts and numbers of latents are divided by."""
        return 16 if self.rehearse else 1

    @property
    def first_target(self) -> int:
        """In each segment: the longest context of all contenders comes before it."""
        return max(point.context for contender in CONTENDERS.values() for point in contender.grid) // self.scale


@dataclass(frozen=True)
class Job:
    """One training run with its score."""

    corpus: str
    name: str
    point: GridPoint
    seed: int

    @classmethod
    def of(cls, record: Record) -> "Job":
        return cls(record["corpus"], record["name"], GridPoint(**record["point"]), record["seed"])


def run_job(job: Job, setting: Setting, folder: Path) -> Record:
    """Trains and scores a contender on the tokens in `folder`."""
    torch.set_num_threads(setting.threads)
    contender, codec = CONTENDERS[job.name], load_codec(folder)
    context = job.point.context // setting.scale
    latents = (contender.latents or job.point.context) // setting.scale
    segments = cut_segments(TokenFile.open(folder / "validation"), setting)
    torch.manual_seed(job.seed)
    size = TINY if setting.rehearse else contender.size
    model = contender.network.build(codec.vocab_size, size, context, latents).to(DEVICE)
    targets = contender.blocks * latents
    windows = TrainingWindows(TokenFile.open(folder / "train"), context, targets, job.seed, augment=codec.augment)
    trained = train(contender, model, windows, job, setting)
    contexts = [2**i for i in range(6, 20) if 2**i < context and contender.network.shorter]
    nats = score(contender, model.eval(), segments, context, latents, setting)
    some = {n: score(contender, model, segments[::4], n, min(n, latents), setting) for n in contexts}
    curve = {str(n): float(values.mean()) for n, values in [*some.items(), (context, nats[::4])]}
    num_bytes = codec.num_bytes(segments[:, setting.first_target :])
    per_byte = setting.score_tokens / num_bytes / math.log(2) if num_bytes else 0.0
    scores = {"nats_per_token": float(nats.mean()), "bits_per_byte": float(nats.mean()) * per_byte}
    scores |= {"standard_error": float(nats.std(ddof=1)) / math.sqrt(SEGMENTS), "segments": nats.tolist()}
    weights = sum(parameter.numel() for parameter in model.parameters())
    scores |= {"curve": curve, "finite": bool(np.isfinite(nats).all()), "parameters": weights, "machine": machine()}
    return asdict(setting) | asdict(job) | trained | scores


def train(contender: Contender, model: nn.Module, windows: TrainingWindows, job: Job, setting: Setting) -> Record:
    """Trains until the time is over; the learning rate follows the clock."""
    latents, batch, factor = windows.num_latents, job.point.batch, job.point.lr
    rule = replace(contender.rule, muon_lr=contender.rule.muon_lr * factor, lr=contender.rule.adamw_lr * factor)
    bf16 = setting.precision == "bf16"
    optimizer = make_optimizer(model, rule, torch.bfloat16 if bf16 else torch.float32)
    random, micro_batch = np.random.default_rng(job.seed), contender.micro_batch or batch
    limit, elapsed, steps, targets, began = 60 * setting.minutes, 0.0, 0, 0, training_clock()
    while elapsed < limit:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(rule, elapsed / limit)
        quarters = int(random.integers(4)) if random.random() < contender.network.short_prefix else 4
        cut = (windows.context_length - latents) * (4 - quarters) // 4
        for first in range(steps * batch, (steps + 1) * batch, micro_batch):
            window = {name: x.to(DEVICE) for name, x in windows.batch(first, micro_batch).items()}
            labels, mask = window["labels"], window.get("mask")
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                mask = None if mask is None else mask[:, cut:]
                logits = contender.network.predict(model, window["tokens"][:, cut:], latents, mask)
            (next_token_loss(logits, labels) * micro_batch / batch).backward()
            targets += int((labels >= 0).sum())
        if nn.utils.clip_grad_norm_(model.parameters(), rule.grad_clip).isfinite():
            optimizer.step()
        optimizer.zero_grad()
        steps, elapsed = steps + 1, training_clock() - began
    return {"steps": steps, "seconds": elapsed, "targets_per_second": targets / elapsed}


def cut_segments(held_out: TokenFile, setting: Setting) -> np.ndarray:
    """(SEGMENTS, first_target + targets) ids, spread evenly over the held-out text."""
    length = setting.first_target + setting.score_tokens // SEGMENTS
    room = len(held_out) - setting.score_tokens - setting.first_target
    require(room >= 0, f"{held_out.stem}.bin holds {len(held_out):,} tokens, {-room:,} too few: lower --score_tokens")
    starts = np.linspace(0, len(held_out) - length, SEGMENTS).astype(np.int64)
    return np.stack([held_out.read(start, start + length) for start in starts.tolist()]).astype(np.int64)


def score(
    contender: Contender, model: nn.Module, segments: np.ndarray, context: int, latents: int, setting: Setting
) -> np.ndarray:
    """Nats per target of each segment. A target has at most `context` tokens before it, and at least half as many."""
    first, length = setting.first_target, segments.shape[1]
    stride, at_once = min(setting.stride, latents, context // 2), max(1, 8192 // context)
    nats = np.zeros(len(segments))
    for start in range(first, length, stride):
        end = min(start + stride, length)
        ids = torch.from_numpy(segments[:, end - context - 1 : end]).to(DEVICE)
        for rows in torch.arange(len(ids)).split(at_once):
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=setting.precision == "bf16"):
                logits = contender.network.predict(model, ids[rows, :-1], latents, None)[:, start - end :]
            losses = next_token_loss(logits, ids[rows, start - end :], reduction="none")
            nats[rows.numpy()] += losses.double().sum(dim=1).cpu().numpy()
    return nats / (length - first)


def prepare_corpus(name: str, args: argparse.Namespace, folder: Path) -> None:
    """Tokenises a corpus once."""
    if (folder / "codec.json").exists():  # written last
        return
    data, modality, held_out = DataConfig(bpe_vocab_size=args.bpe), "text", None
    if name == "books":
        paths = [Path(args.books) / f"{part}.txt" for part in ("train", "validation")]
        sources, held_out = (find_files(str(path) if path.exists() else f"{path}.*") for path in paths)
        data = replace(data, split_on="\n\n\n\n")
    elif name == "piano":
        sources, held_out = (find_files(f"{args.piano}/{part}") for part in ("train", "validation"))
        data, modality = DataConfig(), "midi"
    else:
        sources = standard_library()
    codec = make_codec(modality, data, sources)
    prepare(sources, codec, folder, validation_sources=held_out, split_on=data.split_on)
    save_codec(codec, folder)


def unfinished(records: list[Record], corpora: list[str], names: list[str], args: argparse.Namespace) -> list[Job]:
    """The jobs of the grids with the lowest seed; once they are finished, the best points with the other seeds."""
    done = {Job.of(record) for record in records}
    pairs = [(corpus, name) for corpus in corpora for name in names]
    first, *others = sorted(args.seeds)
    grids = {name: contender.grid[: 1 if args.rehearse else args.points] for name, contender in CONTENDERS.items()}
    jobs = [Job(*pair, point, first) for pair in pairs for point in grids[pair[1]]]
    if done.issuperset(jobs):
        best = best_runs(records)
        jobs = [Job(*pair, Job.of(best[pair][0]).point, seed) for pair in pairs for seed in others]
    return [job for job in jobs if job not in done]


def best_runs(records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """(corpus, contender) -> the runs of its best grid point, one a seed. The lowest seed decides which is best."""
    pairs = {(record["corpus"], record["name"]) for record in records}
    best = {}
    for pair in sorted(pairs, key=lambda pair: (pair[0], list(CONTENDERS).index(pair[1]))):
        runs = [record for record in records if (record["corpus"], record["name"]) == pair]
        lowest = [run for run in runs if run["seed"] == min(run["seed"] for run in runs)]
        winner = min(lowest, key=lambda run: run["nats_per_token"] if run["finite"] else math.inf)
        best[pair] = [run for run in runs if run["point"] == winner["point"]]
    return best


def read_results(file: Path) -> list[Record]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def make_table(records: list[Record]) -> str:
    """Markdown: for each corpus and contender the best of its grid."""
    first, machines = records[0], ", ".join(sorted({record["machine"] for record in records}))
    setting = ", ".join(f"{name} {first[name]}" for name in Setting.__dataclass_fields__)
    columns = "corpus|contender|best of its grid|mean (min ... max)|nats against ours|seeds|targets/s|steps|parameters"
    lines = [f"{setting}. {machines}.\n", f"|{columns}|", "|---" * (columns.count("|") + 1) + "|"]
    best = best_runs(records)
    for (corpus, name), runs in best.items():
        unit = "bits_per_byte" if runs[0]["bits_per_byte"] else "nats_per_token"
        values, point = [run[unit] for run in runs], GridPoint(**runs[0]["point"])
        speed, steps = (statistics.mean(run[key] for run in runs) for key in ("targets_per_second", "steps"))
        cells = [
            f"{corpus} ({unit.replace('_', ' ')})",
            name,
            f"context {point.context:,}, batch {point.batch}, rates x {point.lr:g}",
            f"{statistics.mean(values):.4f} ({min(values):.4f} ... {max(values):.4f})",
            difference(runs, best.get((corpus, "ours"), runs)),
            *(f"{value:,.0f}" for value in (len(runs), speed, steps, runs[0]["parameters"])),
        ]
        lines.append(f"|{'|'.join(cells)}|")
    return "\n".join(lines) + "\n"


def difference(runs: list[Record], ours: list[Record]) -> str:
    """In per cent of ours, with the standard error over the segments; positive where ours is better."""
    own, other = (np.mean([run["segments"] for run in group], axis=0) for group in (ours, runs))
    error = (other - own).std(ddof=1) / math.sqrt(SEGMENTS)
    return f"{100 * (other.mean() / own.mean() - 1):+.1f}% ± {100 * error / own.mean():.1f}"


def draw(path: Path, records: list[Record]) -> None:
    """Bits against context on the same targets, a picture per corpus."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from perceiver_ar.plots import STYLE, binary_count

    best = best_runs(records)
    corpora = sorted({corpus for corpus, _ in best})
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(corpora), 4.2), dpi=150, layout="constrained")
        pictures = dict(zip(corpora, figure.subplots(1, len(corpora), squeeze=False)[0], strict=True))
        for (corpus, name), runs in best.items():
            lengths = sorted(runs[0]["curve"], key=int)
            bits = [statistics.mean(run["curve"][n] for run in runs) / math.log(2) for n in lengths]
            pictures[corpus].plot([int(n) for n in lengths], bits, marker="o", markersize=4, label=name)
        for corpus, axes in pictures.items():
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: binary_count(value))
            axes.set_xlabel("context length in tokens")
            axes.set_title(f"{corpus}: bits per token", loc="left", fontsize=10)
            axes.legend(frameon=False, fontsize=8)
        with atomic_path(path) as temporary:
            figure.savefig(temporary)


def choose_setting(records: list[Record], args: argparse.Namespace) -> Setting:
    """The setting of this call. Raises InputError if the folder holds another one."""
    precision = records[0]["precision"] if args.precision == "auto" and records else args.precision
    if precision == "auto":
        from perceiver_ar.training.resources import choose_precision

        precision = choose_precision("auto", DEVICE)
    minutes, tokens, stride = (0.004, 256, 8) if args.rehearse else (args.minutes, args.score_tokens, args.stride)
    setting = Setting(minutes, tokens, stride, args.threads, args.jobs, precision, args.rehearse)
    for name, value in asdict(setting).items():
        require(isinstance(value, str | bool) or value > 0, f"--{name} is {value}: it must be more than 0")
        known = records[0][name] if records else value
        require(value == known, f"{args.out} holds runs with {name} {known}, not {value}: give another --out")
    require(tokens % SEGMENTS == 0, f"--score_tokens is {tokens}: it must be a multiple of {SEGMENTS}")
    return setting


def choose(option: str, given: str | None, known: list[str], remedy: str = "") -> list[str]:
    """The names in `given`, with commas between; None: all."""
    names = known if given is None else given.split(",")
    unknown = ", ".join(name for name in names if name not in known)
    require(not unknown, f"--{option} has {unknown}: choose among {', '.join(known)}{remedy}")
    return names


def end_with_parent() -> None:
    """Ends this process as soon as the one that collects the results is gone."""

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def measure(args: argparse.Namespace) -> list[Record]:
    """Runs what is not finished yet; all records of the folder."""
    file, tokens = args.out / "results.jsonl", args.out / "tokens"
    names = choose("contenders", args.contenders, list(CONTENDERS))
    known = ["code", *(name for name in ("books", "piano") if getattr(args, name))]
    chosen = choose("corpora", args.corpora, known, ", or give --books or --piano")
    setting = choose_setting(records := read_results(file), args)
    for prefix, package in {"dense": "transformers", "seed": "perceiver_ar_pytorch"}.items():
        if any(name.startswith(prefix) for name in names) and find_spec(package) is None:
            raise InputError(f"this needs the package {package}: pip install 'perceiver-ar[bench]'")
    corpora = [f"{name}-bpe{args.bpe}" if args.bpe and name != "piano" else name for name in chosen]
    for name, corpus in zip(chosen, corpora, strict=True):
        prepare_corpus(name, args, tokens / corpus)
    with ProcessPoolExecutor(setting.jobs, get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            while jobs := unfinished(records, corpora, names, args):
                for future in as_completed(pool.submit(run_job, job, setting, tokens / job.corpus) for job in jobs):
                    records = [*read_results(file), record := future.result()]
                    write_text(file, "".join(json.dumps(line) + "\n" for line in records))
                    print(f"{Job.of(record)}: {record['nats_per_token']:.4f} nats per token", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the results")
    parser.add_argument("--books", help="folder with train.txt and validation.txt, or compressed ones")
    parser.add_argument("--piano", help="folder with train/ and validation/, both of MIDI files")
    parser.add_argument("--corpora", help="with commas between; default: code (Python's own source) and those given")
    parser.add_argument("--contenders", help=f"with commas between; default: {','.join(CONTENDERS)}")
    parser.add_argument("--bpe", type=int, help="size of a tokenizer for text; default: bytes")
    parser.add_argument("--minutes", type=float, default=20.0, help="training time of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="the grid takes the lowest")
    parser.add_argument("--points", type=int, metavar="N", help="try only the first N points of each grid")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--precision", choices=("auto", "32", "bf16"), default="auto", help="auto: the faster one")
    parser.add_argument("--score_tokens", type=int, default=65536, help="held-out tokens to predict")
    parser.add_argument("--stride", type=int, default=64, help="targets of a scored window")
    parser.add_argument("--table", action="store_true", help="only write table.md and quality.png")
    parser.add_argument("--rehearse", action="store_true", help="everything at toy sizes, in seconds")
    args = parser.parse_args()
    try:
        records = read_results(args.out / "results.jsonl") if args.table else measure(args)
        require(len(records) > 0, f"{args.out} holds no results: run without --table first")
    except InputError as error:
        parser.error(str(error))
    write_text(args.out / "table.md", table := make_table(records))
    draw(args.out / "quality.png", records)
    print(table)


if __name__ == "__main__":
    main()
