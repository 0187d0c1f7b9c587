"""What the default network finds in its context: tasks made in code, whose answers stand somewhere before.

    make benchmark BENCH=probes ARGS="copy recall --out runs/probes"

copy, copy64   segments of 32 tokens from anywhere in a prefix of 192 (448) random tokens of 32 (64) ids, copied
recall         pairs of a key and a value (4 tokens each) between random tokens; the values of 8 of the keys
passkey        5 tokens behind a mark, anywhere between random tokens, asked for at the end
mirror         the paper's copy task (section 5.1.1): random bytes, then the same bytes, plain or mirrored. The context
               doubles whenever the task is learned, until `--minutes` of training are over (paper: 131,072, mirrored)

Each network has dim 128, 2 + 1 layers and the defaults otherwise, and sees each sequence once. Training stops when
99.9% of the scored tokens of 20 steps were right. Recall and passkey are trained at one length and read, with the same
weights, at up to 16 times that length, where the prefix is streamed. Accuracies are of new sequences.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import DEVICE, machine, training_clock
from torch import Tensor, nn

from perceiver_ar import PerceiverAR, PerceiverARConfig, next_token_loss
from perceiver_ar.config import OptimConfig
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path, write_text
from perceiver_ar.objective import IGNORE
from perceiver_ar.optim import lr_factor, make_optimizer

Record = dict[str, Any]
"""A row of the table."""
PAPER_CONTEXT = 131_072
LONGER = (8192, 32768, 131072)
KNOWN, RECENT, PARTS = 6, 20, 8
"""Tokens that tell which segment is copied; steps whose accuracy is averaged; parts of the distance in the table."""


class Sequences(NamedTuple):
    """B sequences. Their last N tokens are targets."""

    tokens: Tensor
    """(B, T + 1): the context, and the target of the last latent"""
    sources: Tensor
    """(B, N) where in `tokens` a target stands for the first time; -1: not a target"""
    scored: Tensor
    """(N,) bool: targets that count"""
    first: Tensor
    """(N,) bool: those of them that come first in an answer"""


@dataclass(frozen=True)
class Probe:
    """A task, and how it is trained."""

    name: str
    draw: Callable[["Probe", int, int, torch.Generator], Sequences]
    """(probe, B, T, random) -> sequences"""
    ids: int
    marks: int
    """Ids that are never a target; they follow the `ids` that can be."""
    context: int
    latents: int
    batch: int
    steps: int | None
    """None: until the time is over; the context doubles whenever the task is learned."""
    reads: tuple[int, ...] = ()
    """Context lengths to read after training; (): that of training."""


@dataclass(frozen=True)
class Setting:
    """What all probes of a call have in common."""

    local_context: int
    seed: int
    minutes: float
    full: bool = False
    dim: int = 128
    layers: int = 2
    read_tokens: int = 2**22
    """Maximum to read at each length; 256 sequences are enough."""


def draw_copy(probe: Probe, rows: int, context: int, random: torch.Generator, segment: int = 32) -> Sequences:
    """A random prefix, then segments of it."""
    prefix = torch.randint(probe.ids, (rows, context + 1 - probe.latents), generator=random)
    starts = torch.randint(prefix.shape[1] - segment + 1, (rows, probe.latents // segment), generator=random)
    sources = (starts[..., None] + torch.arange(segment)).flatten(1)
    place = torch.arange(probe.latents) % segment
    return Sequences(torch.cat([prefix, prefix.gather(1, sources)], 1), sources, place >= KNOWN, place == KNOWN)


def draw_recall(
    probe: Probe, rows: int, context: int, random: torch.Generator, pairs: int, key: int, value: int
) -> Sequences:
    """Random tokens, among them `pairs` of mark, key and value; then some of these again, whose values are targets."""
    length, prefix_len, mark = 1 + key + value, context + 1 - probe.latents, probe.ids
    slots, queries = prefix_len // length, probe.latents // length
    require(pairs <= slots, f"{pairs} pairs have no room in {prefix_len} tokens: lower --pairs")
    tokens = torch.randint(probe.ids, (rows, context + 1), generator=random)
    starts = torch.rand(rows, slots, generator=random).argsort(1)[:, :pairs] * length
    tokens.scatter_(1, starts, mark)
    asked = starts.gather(1, torch.randint(pairs, (rows, queries), generator=random))
    sources = (asked[..., None] + torch.arange(length)).flatten(1)
    tokens[:, prefix_len:] = tokens.gather(1, sources)
    place = torch.arange(probe.latents) % length
    return Sequences(tokens, sources.where(place > key, -1), place > key, place == 1 + key)


def draw_mirror(probe: Probe, rows: int, context: int, random: torch.Generator, mirrored: bool) -> Sequences:
    """A mark, random tokens, and the same again."""
    half = context // 2
    mark, text = torch.full((rows, 1), probe.ids), torch.randint(probe.ids, (rows, half), generator=random)
    targets = torch.arange(2 * half + 1 - probe.latents, 2 * half + 1)
    sources = (2 * half + 1 - targets if mirrored else targets - half).expand(rows, -1)
    tokens = torch.cat([mark, text, text.flip(1) if mirrored else text], 1)
    return Sequences(tokens, sources, targets > half, targets > half)


def probes(pairs: list[int]) -> dict[str, list[Probe]]:
    """By the name to ask for."""
    draw = [partial(draw_recall, pairs=n, key=4, value=4) for n in pairs]
    recall = [Probe(f"recall, {d.keywords['pairs']} pairs", d, 62, 2, 8192, 72, 4, 250, LONGER) for d in draw]
    passkey = partial(draw_recall, pairs=1, key=0, value=5)
    mirror = Probe("mirror, plain", partial(draw_mirror, mirrored=False), 256, 1, 256, 64, 16, None)
    return {
        "copy": [Probe("copy", draw_copy, 32, 0, 192 + 63, 64, 16, 700)],
        "copy64": [Probe("copy64", draw_copy, 64, 0, 448 + 63, 64, 16, 1500)],
        "recall": recall,
        "passkey": [Probe("passkey", passkey, 62, 2, 2048, 6, 16, 300, (2048, 32768))],
        "mirror": [mirror, replace(mirror, name="mirror, mirrored", draw=partial(draw_mirror, mirrored=True))],
    }


def measure(probe: Probe, setting: Setting) -> Iterator[Record]:
    """Trains a network; a record for each context that it was read at."""
    torch.manual_seed(setting.seed)
    random = torch.Generator().manual_seed(setting.seed)
    context, most = probe.context, max(probe.context, *probe.reads, 0) if probe.steps else PAPER_CONTEXT
    config = PerceiverARConfig(probe.ids + probe.marks, most, probe.latents, setting.dim, setting.layers, num_heads=2)
    model = PerceiverAR(config.replace(local_context=setting.local_context)).to(DEVICE)
    optimizer = make_optimizer(model, rule := OptimConfig())
    seconds, right, reached = 0.0, [], None

    def record(read_at: int) -> Record:
        known = {"probe": probe.name, "local_context": setting.local_context, "seed": setting.seed}
        known |= {"trained_at": context, "steps": step, "step_of_95": reached, "seconds": seconds}
        return known | {"chance": 1 / probe.ids} | read(model, probe, read_at, setting)

    for step in count():  # steps made
        recent = statistics.mean(right[-RECENT:]) if len(right) >= RECENT else 0.0
        reached = step if reached is None and recent >= 0.95 else reached
        if probe.steps is None and recent >= 0.99 and context < most:
            yield record(context)
            context, right, reached = 2 * context, [], None
        progress = (step + 0.5) / probe.steps if probe.steps else seconds / (60 * setting.minutes)
        if progress >= 1 or (recent >= 0.999 and right and not setting.full):
            break
        began = training_clock()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(rule, progress)
        batch = probe.batch if probe.steps else max(1, min(probe.batch, 2**16 // context))
        right.append(learn(model, optimizer, rule, probe.draw(probe, batch, context, random)))
        seconds += training_clock() - began
    for read_at in probe.reads or (context,):
        yield record(read_at)


def learn(model: PerceiverAR, optimizer: torch.optim.Optimizer, rule: OptimConfig, drawn: Sequences) -> float:
    """One step; the share of scored targets that were right before it."""
    sources, N = drawn.sources, drawn.sources.shape[1]
    labels = drawn.tokens[:, -N:].where(sources >= 0, IGNORE).to(DEVICE)
    logits = model(drawn.tokens[:, :-1].to(DEVICE), drawn.tokens.shape[1] - 1 - N)
    next_token_loss(logits, labels).backward()
    nn.utils.clip_grad_norm_(model.parameters(), rule.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return (logits.argmax(-1) == labels)[:, drawn.scored].float().mean().item()


@torch.no_grad()
def read(model: PerceiverAR, probe: Probe, context: int, setting: Setting) -> Record:
    """Accuracies on new sequences of this length."""
    random, N = torch.Generator().manual_seed(10**6 + setting.seed), probe.latents
    rows, at_once = max(8, min(256, setting.read_tokens // context)), max(1, min(256, 2**16 // context))
    columns: list[list[Tensor]] = [[], [], []]
    for done in range(0, rows, at_once):
        tokens, sources, scored, first = probe.draw(probe, min(at_once, rows - done), context, random)
        right = model(tokens[:, :-1].to(DEVICE), context - N).argmax(-1).cpu() == tokens[:, -N:]
        distances = torch.arange(context + 1 - N, context + 1) - sources
        found = right, distances * PARTS // (context + 1), first.expand_as(right)
        for column, value in zip(columns, found, strict=True):
            column.append(value[:, scored])
    right, part, first = map(torch.cat, columns)
    by_distance = [right[part == n].double().mean().item() if (part == n).any() else None for n in range(PARTS)]
    accuracies = {"first": right[first].double().mean().item(), "all": right.double().mean().item()}
    return {"read_at": context, "sequences": rows} | accuracies | {"by_distance": by_distance}


COLUMNS = "probe|local context|seed|trained at|steps|95% at step|seconds|read at|chance|first token|all tokens"
HEADER = f"|{COLUMNS}|by eighths of the distance|\n{'|---' * 12}|"


def table_row(record: Record) -> str:
    """Accuracies in per cent."""
    cells = [record["probe"], record["local_context"], record["seed"], f"{record['trained_at']:,}", record["steps"]]
    cells += [record["step_of_95"] or "-", f"{record['seconds']:.0f}", f"{record['read_at']:,}"]
    cells += [f"{record[name]:.1%}" for name in ("chance", "first", "all")]
    cells.append(" ".join("-" if share is None else f"{100 * share:.0f}" for share in record["by_distance"]))
    return f"|{'|'.join(map(str, cells))}|"


def draw_picture(path: Path, records: list[Record]) -> None:
    """Accuracy against distance, at the longest context that a probe was read at; accuracy against context."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from perceiver_ar.plots import STYLE, binary_count

    with rc_context(STYLE):
        near, far = (figure := Figure(figsize=(11, 4.6), dpi=150, layout="constrained")).subplots(1, 2)
        near.axhline(100, color="lightgrey", linewidth=0.8, label="all tokens right")
        for number, name in enumerate(dict.fromkeys(record["probe"] for record in records)):
            rows = [record for record in records if record["probe"] == name]
            line = {"marker": "osD^vPX*"[number % 8], "markersize": 5, "color": f"C{number}"}
            longest = max(rows, key=lambda row: row["read_at"])
            shares = [(n, 100 * share) for n, share in enumerate(longest["by_distance"]) if share is not None]
            if not name.startswith("mirror"):  # there, the context says how far away the answer is
                x, y = [(n + 0.5) / PARTS * longest["read_at"] for n, _ in shares], [share for _, share in shares]
                near.plot(x, y, label=f"{name}: {longest['read_at']:,} tokens", **line)
            x, y = [row["read_at"] for row in rows], [100 * row["all"] for row in rows]
            far.plot(x, y, label=f"{name}: {rows[0]['trained_at']:,}", **line)
        far.axvline(PAPER_CONTEXT, color="grey", linestyle=":", linewidth=1.2, label="paper's mirrored copy: 131,072")
        near.set_title("by distance of the answer, at the longest context read", loc="left", fontsize=10)
        far.set_title("by context read (legend: context trained at first)", loc="left", fontsize=10)
        for axes, label in ((near, "distance in tokens"), (far, "context in tokens")):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: binary_count(value))
            axes.set(ylim=(-3, 103), xlabel=label, ylabel="tokens right, %")
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        with atomic_path(path) as temporary:
            figure.savefig(temporary)


def toy(probe: Probe) -> Probe:
    """The same at sizes that take no time."""
    if probe.reads:
        probe = replace(probe, context=probe.context // 8, reads=tuple(n // 8 for n in probe.reads))
    return replace(probe, batch=2, steps=probe.steps and 3)


def main() -> None:
    names = list(probes([1]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("probes", nargs="*", metavar="PROBE", help=f"default: {' '.join(names)}")
    parser.add_argument("--out", type=Path, help="folder for probes.md, probes.json and probes.png")
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 32, 64], help="of recall")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of each kind of mirror")
    parser.add_argument("--local_context", type=int, default=PerceiverARConfig.local_context, help="1: none, a control")
    parser.add_argument("--full", action="store_true", help="make all steps, also when the task is learned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rehearse", action="store_true", help="everything at toy sizes, in seconds")
    args = parser.parse_args()
    setting = Setting(args.local_context, args.seed, args.minutes, args.full)
    if args.rehearse:
        setting = replace(setting, minutes=0.02, dim=32, layers=1, read_tokens=2**14)
    records: list[Record] = []
    try:
        unknown = ", ".join(name for name in args.probes if name not in names)
        require(not unknown, f"there is no probe {unknown}: choose among {', '.join(names)}")
        for option, least in {"minutes": args.minutes, "threads": args.threads, "pairs": min(args.pairs)}.items():
            require(0 < least < math.inf, f"--{option} is or has {least}: it must be more than 0")
        torch.set_num_threads(args.threads)
        print(title := f"Accuracies of new sequences; {machine()}.\n\n{HEADER}", flush=True)
        for name in args.probes or names:
            for probe in probes(args.pairs)[name]:
                for record in measure(toy(probe) if args.rehearse else probe, setting):
                    records.append(record)
                    print(table_row(record), flush=True)
                    if args.out:
                        write_text(args.out / "probes.md", "\n".join([title, *map(table_row, records), ""]))
                        write_text(args.out / "probes.json", json.dumps(records, indent=1) + "\n")
                if args.out:
                    draw_picture(args.out / "probes.png", records)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
