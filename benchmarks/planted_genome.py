"""Writes a genome of random bases with planted repeats, for which only a long context pays.

    python benchmarks/planted_genome.py FILE.fa [MEGABASES]

Half of the bases belong to copies of 200 to 800 bases, with one base in a hundred drawn anew, of what stands 1,024 to
60,000 bases before (log-uniform). The rest is random, 2 bits a base: no model that knows 1,024 bases can do better.
A second file, FILE.bed, holds out the last eighth.
"""

import argparse
from pathlib import Path

import numpy as np

NEAREST, FARTHEST, SHORTEST, LONGEST, DRAWN_ANEW = 1024, 60_000, 200, 800, 0.01


def planted(length: int, random: np.random.Generator) -> np.ndarray:
    """(length,) codes of bases, 0 ... 3."""
    bases = random.integers(4, size=length)
    place = FARTHEST + LONGEST
    while place < length:
        copied, between = random.integers(SHORTEST, LONGEST, size=2)
        copied = min(copied, length - place)
        distance = int(np.exp(random.uniform(np.log(NEAREST), np.log(FARTHEST))))
        new = np.where(random.random(copied) < DRAWN_ANEW, bases[place : place + copied], -1)
        copy = bases[place - distance : place - distance + copied]
        bases[place : place + copied] = np.where(new < 0, copy, new)
        place += copied + between
    return bases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="such as repeats.fa")
    parser.add_argument("megabases", type=float, nargs="?", default=4.0)
    args = parser.parse_args()
    file, length = args.file, int(args.megabases * 1_000_000)
    letters = np.frombuffer(b"ACGT", np.uint8)[planted(length, np.random.default_rng(0))].tobytes()
    lines = [letters[start : start + 80] for start in range(0, length, 80)]
    file.write_bytes(b"\n".join([b">planted", *lines, b""]))
    file.with_suffix(".bed").write_text(f"planted {length - length // 8} {length}\n")


if __name__ == "__main__":
    main()
