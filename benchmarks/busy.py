"""A training step of the demo's network beside programs that use the cores, for several settings of OpenMP.

    make benchmark BENCH=busy

Each setting has a process of its own, as OpenMP reads its variables once. The processes train in turns while 0, 1 and 6
other processes count. Seconds are the median (min ... max) of a step; the share is that of the last setting alone.
GNU OpenMP waits as GOMP_SPINCOUNT says; other OpenMP libraries ignore it, and all rows are alike.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

SETTINGS: dict[str, dict[str, str]] = {
    "torch's default": {},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "10000, adaptive, as `train`": {"GOMP_SPINCOUNT": "10000"},
}
TRAIN, BUSY = "10000, adaptive, as `train`", "while True: pass"


def train(threads: int, adaptive: bool) -> None:
    """Trains one step of the demo's network for each line of stdin, and prints its seconds."""
    import torch

    from perceiver_ar import PerceiverAR, PerceiverARConfig, next_token_loss
    from perceiver_ar.config import OptimConfig
    from perceiver_ar.optim import make_optimizer
    from perceiver_ar.threads import adaptive_spins
    from perceiver_ar.training.resources import choose_precision

    torch.set_num_threads(threads)
    precision = choose_precision("auto", "cpu")
    model = PerceiverAR(
        PerceiverARConfig(vocab_size=4096, context_length=1024, num_latents=128, dim=256, num_layers=4, num_heads=2)
    )
    optimizer = make_optimizer(model, OptimConfig(), torch.bfloat16 if precision == "bf16" else torch.float32)
    tokens = torch.randint(4096, (4, 1025))
    with adaptive_spins() if adaptive else nullcontext():
        for _ in sys.stdin:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(tokens[:, :-1], 1024 - 128)
            next_token_loss(logits, tokens[:, -128:]).backward()
            optimizer.step()
            optimizer.zero_grad()
            print(time.perf_counter() - start, flush=True)


def start(threads: int, name: str) -> "subprocess.Popen[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, __file__, "--train", str(threads), *(["--adaptive"] if name == TRAIN else [])]
    return subprocess.Popen(
        command, env=kept | SETTINGS[name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def seconds(process: "subprocess.Popen[str]") -> float:
    """Of one step."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 6], help="other processes")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each training process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of each setting in a round")
    parser.add_argument("--train", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    parser.add_argument("--adaptive", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.adaptive)
        return
    processes = {name: start(args.threads, name) for name in SETTINGS}
    for process in processes.values():
        for _ in range(2):  # warm-up
            seconds(process)
    others: list[subprocess.Popen[bytes]] = []
    alone = 1.0
    print("| other processes | setting | seconds a step | of `train` alone |\n|---|---|---|---|")
    try:
        for number in sorted(args.busy):
            others += [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number - len(others))]
            measured: dict[str, list[float]] = {name: [] for name in processes}
            for _ in range(args.rounds):
                for name, process in processes.items():
                    time.sleep(2.5)  # adaptive spins look once a second, and should not see the turn before
                    measured[name] += [seconds(process) for _ in range(args.steps)]
            if number == min(args.busy):
                alone = statistics.median(measured[TRAIN])
            for name, values in measured.items():
                median = statistics.median(values)
                spread = f"{median:.2f} ({min(values):.2f} ... {max(values):.2f})"
                print(f"| {number} | {name} | {spread} | {alone / median:.0%} |", flush=True)
    finally:
        for process in [*others, *processes.values()]:
            process.kill()


if __name__ == "__main__":
    main()
