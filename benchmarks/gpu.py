"""Everything that has to be known of a GPU, in one run of ten minutes: first what is exact, then how fast it is.

    make benchmark BENCH=gpu ARGS="--out runs/gpu"

Checks (gpu_checks.py) come first. Then come the card's own peaks (a product of 8,192 x 8,192 matrices in bfloat16, and
a copy), training steps (forward, backward, clipping and the optimizer, bfloat16 autocast) of ours, of the package
perceiver-ar-pytorch and of a dense Transformer (Llama), and generation with a network of 315M parameters. Each figure
is in `gpu.json` and in the tables of `gpu.md` as soon as it is measured, so a run that is cut short leaves all that it
has measured. A figure that fails, for example for lack of memory, is a row with the reason. Figures are measured in a
process of their own: one that dies, takes more than three minutes or leaves the GPU in an error is replaced, and the
others follow. The exit status is 1 if a check fails.

"Of the peak" counts the FLOPs of `perceiver_ar.costs` (for the dense Transformer, those of `common.py`) against the
measured product; "of the bandwidth" the bytes of the weights and of the cache that a step reads, against the copy.
`--rehearse` runs the same with tiny sizes, on any machine.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, cached_bytes, dense_training_flops, in_turns, machine, product_peak, synchronize
from gpu_checks import CHECKS
from networks import DENSE, OURS, SEED, Network, Size
from torch import nn

from perceiver_ar import PerceiverAR, PerceiverARConfig, next_token_loss, stream
from perceiver_ar.config import OptimConfig
from perceiver_ar.costs import costs
from perceiver_ar.files import write_text
from perceiver_ar.optim import make_optimizer

VOCABULARY = 256


@dataclass(frozen=True)
class Setup:
    """One size of training."""

    name: str
    context: int
    latents: int
    size: Size
    batch: int
    compiled: bool = True
    others: tuple[str, ...] = ()
    """Contenders beside ours that can hold it."""


BASE, LARGE = Size(512, 8, 8), Size(1024, 24, 16)
SETUPS = [
    Setup("a", 4096, 512, BASE, 64, others=("seed", "dense")),
    Setup("a, few rows", 4096, 512, BASE, 8),
    Setup("b", 8192, 2048, LARGE, 8, others=("seed", "dense")),
    Setup("c, 65,536", 65536, 1024, BASE, 8, others=("seed",)),
    Setup("c, 1,048,576", 1 << 20, 1024, BASE, 1),
    Setup("d", 1 << 24, 1024, BASE, 1, compiled=False),
]
CONTENDERS = {"ours": OURS, "seed": SEED, "dense": DENSE}
NAMES = {"ours": "ours", "seed": "perceiver-ar-pytorch", "dense": "dense Transformer"}
PARTS = "checks", "peaks", "training", "generation"


Figures = Callable[[], dict[str, Any]]
LONGEST = 180.0
"""Seconds that a figure may take, with compilation."""


class Worker:
    """A process that measures figures, until one fails: after some errors CUDA fails to the end of its process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=work, args=(there,), daemon=True)
        self.process.start()
        there.close()

    def measure(self, figures: Figures, seconds: float) -> dict[str, Any]:
        """The figures, or why there are none."""
        self.connection.send(figures)
        try:
            if self.connection.poll(seconds):
                return self.connection.recv()
            return {"failed": f"not finished after {seconds:.0f} seconds"}
        except (EOFError, OSError):
            self.process.join()
            return {"failed": f"the process died with exit status {self.process.exitcode}"}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def work(connection: Connection) -> None:
    while True:
        figures = connection.recv()
        try:
            found = figures()
        except Exception as error:  # the next figure may still be had
            lines = str(error).strip().splitlines()
            found = {"failed": f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]}
        connection.send(found)
        if DEVICE == "cuda" and "failed" not in found:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class Report:
    """Records, in `gpu.json` and `gpu.md` after each."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.records = folder, list[dict[str, Any]]()
        self.until = time.monotonic() + 60 * minutes
        self.worker: Worker | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def measure(self, part: str, what: dict[str, Any], figures: Figures, longest: float = LONGEST) -> dict[str, Any]:
        """Adds the record of `what`, with its figures or the reason why there are none. Pickles `figures`."""
        began = time.monotonic()
        if began < self.until:
            self.worker = self.worker or Worker()
            found = self.worker.measure(figures, min(longest, self.until - began))
        else:
            found = {"failed": "no time left"}
        if "failed" in found:
            self.close()
        record = {"part": part, **what, **found, "took": round(time.monotonic() - began, 1)}
        self.records.append(record)
        write_text(self.folder / "gpu.json", json.dumps({"machine": machine(), "records": self.records}, indent=1))
        write_text(self.folder / "gpu.md", self.tables())
        print(json.dumps(record), flush=True)
        return record

    def close(self) -> None:
        if self.worker is not None:
            self.worker.stop()
            self.worker = None

    @property
    def failed_checks(self) -> list[str]:
        return [r["what"] for r in self.records if r["part"] == "checks" and not r.get("holds")]

    def tables(self) -> str:
        """One table for each part."""
        text = f"{machine()}\n"
        for part in PARTS:
            rows = [record for record in self.records if record["part"] == part]
            columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("part", "took")))
            if rows:
                text += f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
                text += "".join(f"| {' | '.join(cell(row.get(name, '')) for name in columns)} |\n" for row in rows)
        return text


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value).replace("|", "/")


def check(name: str) -> dict[str, Any]:
    return CHECKS[name](DEVICE)


def product_speed(size: int) -> dict[str, Any]:
    return {"/s": product_peak(torch.bfloat16, size)}


def copy_speed(size: int) -> dict[str, Any]:
    """Bytes read and written."""
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)

    def step() -> None:
        target.copy_(source)
        synchronize()

    return {"/s": 2 * size / min(in_turns([step], 10)[0])}


def measure_peaks(report: Report, size: int) -> tuple[float, float]:
    """FLOP/s of a bfloat16 product, and bytes/s of a copy."""
    count = 16 * size * size
    product = report.measure("peaks", {"what": f"product of {size} x {size}, FLOP/s"}, partial(product_speed, size))
    copied = report.measure("peaks", {"what": f"copy of {count:,} bytes, bytes/s"}, partial(copy_speed, count))
    return product.get("/s", float("nan")), copied.get("/s", float("nan"))


def measure_training(setup: Setup, who: str, compiled: bool, repeats: int, peak: float) -> dict[str, Any]:
    contender: Network = CONTENDERS[who]
    torch.manual_seed(0)
    model = nn.Module.to(contender.build(VOCABULARY, setup.size, setup.context, setup.latents), DEVICE)
    if isinstance(model, PerceiverAR):
        optimizer = make_optimizer(model, OptimConfig(), torch.bfloat16)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    targets = setup.context if who == "dense" else setup.latents
    tokens = torch.randint(VOCABULARY, (setup.batch, setup.context), dtype=torch.uint8, device=DEVICE)
    labels = tokens[:, -targets:].long()
    network: Any = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = next_token_loss(contender.predict(network, tokens, targets, None), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()

    if compiled:
        torch._dynamo.reset()
    began = time.perf_counter()
    step()
    first = time.perf_counter() - began
    seconds = statistics.median(in_turns([step], repeats)[0])
    if who == "dense":
        flops = dense_training_flops(setup.context, setup.size.dim, setup.size.layers)
    else:
        flops = costs(counted(setup, who)).training_flops
    figures = {"seconds": seconds, "targets/s": setup.batch * targets / seconds, "first step, s": first}
    figures["of the peak"] = setup.batch * flops / seconds / peak
    if DEVICE == "cuda":
        figures["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def counted(setup: Setup, who: str) -> PerceiverARConfig:
    """The settings whose FLOPs a step counts. The package drops half of the prefix, but computes keys for all of it."""
    sizes: dict[str, Any] = {"dim": setup.size.dim, "num_layers": setup.size.layers, "num_heads": setup.size.heads}
    sizes |= {"context_length": setup.context, "num_latents": setup.latents}
    return PerceiverARConfig(vocab_size=VOCABULARY, local_context=1 if who == "seed" else 4, **sizes)


def measure_generation(setup: Setup, batch: int, compiled: bool, tokens: int, bandwidth: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = OURS.build(VOCABULARY, setup.size, setup.context, setup.latents).to(DEVICE, torch.bfloat16).eval()
    assert isinstance(model, PerceiverAR)
    prompt = torch.randint(VOCABULARY, (batch, setup.context // 2))

    def clock() -> Iterator[float]:
        yield time.perf_counter()
        for _ in stream(model, prompt, max_new_tokens=tokens, temperature=0.0, compile=compiled):
            yield time.perf_counter()

    if compiled:
        list(clock())
    times = list(clock())
    seconds = statistics.median(b - a for a, b in pairwise(times[1:]))
    tables = {table.weight for table in model.modules() if isinstance(table, nn.Embedding)}
    read = sum(x.numel() * x.element_size() for x in set(model.parameters()) - tables)
    read += batch * cached_bytes(model, prompt.shape[1])
    return {
        "parameters": model.num_parameters(),
        "first token, s": times[1] - times[0],
        "step, ms": 1000 * seconds,
        "tokens/s": batch / seconds,
        "of the bandwidth": read / seconds / bandwidth,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=9.0, help="after them it ends")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas between")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, for tests")
    args = parser.parse_args(arguments)
    parts, setups, generation, peak_size, repeats, tokens = args.parts.split(","), SETUPS, SETUPS[2], 8192, 5, 48
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if args.rehearse:
        tiny = {"context": 64, "latents": 16, "size": Size(64, 1, 2), "batch": 2}
        setups = [replace(setup, **tiny, compiled=False) for setup in (SETUPS[0], SETUPS[-1])]
        generation, peak_size, repeats, tokens = setups[0], 64, 1, 3
    report = Report(args.out, args.minutes)
    if "checks" in parts:
        slow = {"generation, compiled", "one graph"} if args.rehearse else set()
        for name in [name for name in CHECKS if name not in slow]:
            report.measure("checks", {"what": name}, partial(check, name))
    peak, bandwidth = measure_peaks(report, peak_size) if "peaks" in parts else (float("nan"), float("nan"))

    def train(setup: Setup, who: str, compiled: bool) -> None:
        what = {"setup": setup.name, "what": NAMES[who] + (", compiled" if compiled else "")}
        what |= {"context": setup.context, "latents": setup.latents, "dim": setup.size.dim, "rows": setup.batch}
        count = 1 if setup.context > 1 << 22 else repeats
        report.measure("training", what, partial(measure_training, setup, who, compiled, count, peak))

    def generate(batch: int, compiled: bool) -> None:
        what = {"what": "ours, bfloat16" + (", compiled" if compiled else ""), "rows": batch}
        figures = partial(measure_generation, generation, batch, compiled, tokens, bandwidth)
        report.measure("generation", what, figures)

    # What matters most comes first: the time may end.
    for compiled in (False, True):
        for setup in setups if "training" in parts else ():
            if setup.compiled or not compiled:
                train(setup, "ours", compiled)
        for batch in (1, 64) if "generation" in parts else ():
            if not (compiled and args.rehearse):
                generate(2 if args.rehearse else batch, compiled)
    for compiled in (False, True):
        for setup in setups if "training" in parts else ():
            for who in setup.others:
                if setup.compiled or not compiled:
                    train(setup, who, compiled)
    report.close()
    for name in report.failed_checks:
        print(f"gpu.py: {name} does not hold", file=sys.stderr)
    return 1 if report.failed_checks else 0


if __name__ == "__main__":
    sys.exit(main())
