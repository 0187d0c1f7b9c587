"""A server under load: tokens per second, and seconds to the first token and between tokens, for several clients.

    make benchmark BENCH=serve ARGS="runs/demo --clients 1,8,32"

Each client streams one completion of the same prompt with a seed of its own. One round for each number of clients,
`--repeats` times in turns; the table has medians, minima and maxima of the rounds.
"""

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import time
from itertools import pairwise

from openai import AsyncOpenAI


async def complete(client: AsyncOpenAI, model: str, prompt: str, seed: int, tokens: int) -> tuple[list[float], int]:
    """Seconds from the request to each piece of text, and the number of tokens."""
    started, moments, count = time.perf_counter(), list[float](), 0
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, seed=seed, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        if chunk.choices:
            moments.append(time.perf_counter() - started)
        count = chunk.usage.completion_tokens if chunk.usage else count
    return moments, count


async def measure(client: AsyncOpenAI, model: str, clients: int, args: argparse.Namespace) -> dict[str, float]:
    started = time.perf_counter()
    results = await asyncio.gather(
        *(complete(client, model, args.prompt, seed, args.tokens) for seed in range(clients))
    )
    seconds = time.perf_counter() - started
    first = [moments[0] for moments, _ in results]
    between = [b - a for moments, _ in results for a, b in pairwise(moments)]
    return {
        "tokens/s": sum(count for _, count in results) / seconds,
        "first, ms": 1000 * statistics.median(first),
        "first p99, ms": 1000 * statistics.quantiles([*first, *first], n=100)[-1],
        "between, ms": 1000 * statistics.median(between),
        "between p99, ms": 1000 * statistics.quantiles(between, n=100)[-1],
    }


async def rounds(url: str, args: argparse.Namespace) -> None:
    numbers = [int(number) for number in args.clients.split(",")]
    found: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    async with AsyncOpenAI(base_url=url, api_key="-", timeout=600) as client:
        model = args.run if args.url else (await client.models.list()).data[0].id
        await complete(client, model, args.prompt, 0, 8)  # warm-up
        for _ in range(args.repeats):
            for number in numbers:
                found[number].append(await measure(client, model, number, args))
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
    if args.url:
        asyncio.run(rounds(args.url, args))
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
        asyncio.run(rounds(f"http://127.0.0.1:{port}/v1", args))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
