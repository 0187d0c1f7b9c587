"""A server under load: tokens per second, and seconds to the first token, between tokens and to the end, for several
clients.

    make benchmark BENCH=serve ARGS="runs/demo --clients 1,8,32"

Each client streams one completion of the same prompt with a seed of its own. It does no more than to look for events,
as it shares the machine with the server. One round for each number of clients, `--repeats` times in turns; the table
has medians, minima and maxima of the rounds.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from urllib.parse import urlsplit
from urllib.request import urlopen

ENDS = b"\n\n"
"""The end of an event."""


async def complete(url: str, model: str, prompt: str, seed: int, tokens: int) -> tuple[list[float], int]:
    """Seconds from the request to each piece of text, and the number of tokens."""
    address = urlsplit(url)
    settings = {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": tokens, "seed": seed, **settings}).encode()
    head = f"POST {address.path}/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    started, moments, last = time.perf_counter(), list[float](), b""
    reader, writer = await asyncio.open_connection(address.hostname, address.port or 80)
    writer.write(head.encode() + body)
    try:
        while True:
            event = await reader.readuntil(ENDS)
            if b"data: {" in event:
                moments.append(time.perf_counter() - started)
                last = event
    except asyncio.IncompleteReadError:  # the end
        writer.close()
    _, found, usage = last.partition(b"data: ")
    if not found:
        raise SystemExit(f"{url} sent no events")
    return moments[:-1], json.loads(usage)["usage"]["completion_tokens"]


async def measure(url: str, model: str, clients: int, args: argparse.Namespace) -> dict[str, float]:
    started = time.perf_counter()
    results = await asyncio.gather(*(complete(url, model, args.prompt, seed, args.tokens) for seed in range(clients)))
    seconds = time.perf_counter() - started
    first, last = ([moments[at] for moments, _ in results] for at in (0, -1))
    between = [b - a for moments, _ in results for a, b in pairwise(moments)]
    return {
        "tokens/s": sum(count for _, count in results) / seconds,
        "first, ms": 1000 * statistics.median(first),
        "first p99, ms": 1000 * statistics.quantiles([*first, *first], n=100)[-1],
        "between, ms": 1000 * statistics.median(between),
        "between p99, ms": 1000 * statistics.quantiles(between, n=100)[-1],
        "last, ms": 1000 * statistics.median(last),
    }


def rounds(url: str, args: argparse.Namespace) -> None:
    numbers = [int(number) for number in args.clients.split(",")]
    found: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    model = args.run
    if not args.url:
        with urlopen(f"{url}/models") as answer:
            model = json.load(answer)["data"][0]["id"]
    asyncio.run(complete(url, model, args.prompt, 0, 8))  # warm-up
    for _ in range(args.repeats):
        for number in numbers:
            found[number].append(asyncio.run(measure(url, model, number, args)))
    names = list(found[numbers[0]][0])
    print("| clients | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for number, results in found.items():
        columns = [[result[name] for result in results] for name in names]
        cells = [f"{statistics.median(c):,.0f} ({min(c):,.0f} ... {max(c):,.0f})" for c in columns]
        print(f"| {number} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run; with --url, the name of the other server's model")
    parser.add_argument("--url", help="measure another server with completions, such as http://127.0.0.1:8201/v1")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", default="def parse(self, text):\n    return")
    args = parser.parse_args()
    if args.url and not args.url.startswith("http://"):
        parser.error(f"--url is {args.url}: it must begin with http://")
    if args.url:
        rounds(args.url, args)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slots = max(int(number) for number in args.clients.split(","))
    command = [sys.executable, "-m", "perceiver_ar", "serve", args.run, "--port", str(port), "--slots", str(slots)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        rounds(f"http://127.0.0.1:{port}/v1", args)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
