"""Generation: ours beside perceiver-ar-pytorch's and a dense Llama of the same size (Hugging Face, static cache).

    make benchmark BENCH=decode ARGS="--prompts 16,4096 --batches 1 --threads 2"

Ours has the package's weights (through `compat.lucidrains`) and draws greedily; with --own also our default network of
the same size. The prompt fills the context; with
--grow, it fills the prefix but for one token, so that the package computes one latent for the first token, two for the
next. Prints seconds to the first token, tokens/s after it (of all rows together), and what reading memory allows:
beside the median step, the time of reading the weights once, and the weights with the keys and values that a step
attends to, at the speed that memory has right after the steps: the best of ten sums of 512 MiB, more than caches hold.
Tables, of which a step reads a row, do not count as weights. The package needs a forward over all for each token, so
few of its tokens are timed, evenly spread over the others.
"""

import argparse
import platform
import time
from copy import deepcopy
from itertools import accumulate, pairwise
from statistics import median
from typing import Literal

import torch
from common import cached_bytes
from perceiver_ar_pytorch import PerceiverAR as Theirs  # pyright: ignore[reportMissingImports]  # extra: bench
from perceiver_ar_pytorch.autoregressive_wrapper import (  # pyright: ignore[reportMissingImports]
    AutoregressiveWrapper,
)

from perceiver_ar import PerceiverAR, PerceiverARConfig, stream
from perceiver_ar.compat.lucidrains import PerceiverAR as Ours
from perceiver_ar.generation.quantization import int8_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="16,4096", help="lengths, with commas between")
    parser.add_argument("--batches", default="1", help="numbers of rows, with commas between")
    parser.add_argument("--tokens", type=int, default=256, help="to generate, in each row")
    parser.add_argument("--their_tokens", type=int, default=4, help="to time of the package; 0: leave it out")
    parser.add_argument("--llama_up_to", type=int, default=4096, help="longest prompt for the Llama; 0: leave it out")
    parser.add_argument("--grow", action="store_true", help="begin with one latent, see above")
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8, help="self-attention layers")
    parser.add_argument("--own", action="store_true", help="our default network, too")
    parser.add_argument("--bf16", action="store_true", help="ours in bfloat16, too")
    parser.add_argument("--int8", action="store_true", help="ours with int8 weights and the rest in bfloat16, too")
    parser.add_argument("--compiled", action="store_true", help="ours with compiled steps, too")
    parser.add_argument("--max_autotune", action="store_true", help="and with kernels tried out for this machine")
    parser.add_argument("--threads", type=int, help="of the CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    where += f", memory {memory_speed(device) / 1e9:.1f} GB/s"
    print(f"torch {torch.__version__}, {platform.machine()}, {where}, {args.tokens} tokens\n")
    print("| prompt | rows | what | first token, s | tokens/s | step, ms | weights once, ms | with the cache, ms |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for prompt in map(int, args.prompts.split(",")):
        prefix = max(1, prompt - (1 if args.grow else args.latents))
        settings = {
            "num_tokens": 256,
            "dim": args.dim,
            "depth": args.depth,
            "heads": args.dim // 64,
            "max_seq_len": prefix + args.latents,
            "cross_attn_seq_len": prefix,
        }
        torch.manual_seed(0)
        theirs, ours = Theirs(**settings).to(device).eval(), Ours(**settings).to(device).eval()
        ours.load_state_dict(theirs.state_dict())
        networks = {"ours": ours.model}
        if args.own:
            sizes = {"dim": args.dim, "num_layers": args.depth, "num_heads": args.dim // 64}
            sizes |= {"context_length": prefix + args.latents, "num_latents": args.latents}
            config = PerceiverARConfig(vocab_size=256, init="torch", **sizes)  # logits that are not all alike
            networks["our own network"] = PerceiverAR(config).to(device).eval()
        for batch in map(int, args.batches.split(",")):
            tokens = torch.randint(256, (batch, prompt), device=device)

            def row(what: str, model: torch.nn.Module, clock: list[float], tokens: torch.Tensor = tokens) -> None:
                steps = [b - a for a, b in pairwise(clock[1:])]
                rate = len(tokens) * len(steps) / max(clock[-1] - clock[1], 1e-9)
                memory = ""
                if isinstance(model, PerceiverAR):
                    speed = memory_speed(device)
                    tables = {table.weight for table in model.modules() if isinstance(table, torch.nn.Embedding)}
                    read = [getattr(x, "qdata", x) for x in set(model.parameters()) - tables]
                    weights = sum(x.numel() * x.element_size() for x in read)
                    cache = len(tokens) * cached_bytes(model, tokens.shape[1])
                    memory = f"{1000 * weights / speed:.2f} | {1000 * (weights + cache) / speed:.2f}"
                print(
                    f"| {tokens.shape[1]:,} | {len(tokens)} | {what} | {clock[1] - clock[0]:.2f} | {rate:.2f} | "
                    f"{1000 * median(steps):.2f} | {memory or ' | '} |",
                    flush=True,
                )

            if args.their_tokens:
                wrapper, seconds = AutoregressiveWrapper(theirs), list[float]()
                for i in range(args.their_tokens + 1):
                    more = torch.randint(256, (batch, round(args.tokens * i / args.their_tokens)), device=device)
                    start = now(device)
                    wrapper.generate(torch.cat([tokens, more], dim=1), 1)
                    seconds.append(now(device) - start)
                row("perceiver-ar-pytorch", theirs, [0.0, *accumulate(seconds)])
            kinds = {"float32": True, "bfloat16": args.bf16, "int8": args.int8}
            for name, network in networks.items():
                for kind in [kind for kind, wanted in kinds.items() if wanted]:
                    model = deepcopy(network).to(torch.float32 if kind == "float32" else torch.bfloat16)
                    if kind == "int8":
                        int8_weights(model)
                    ways: list[tuple[str, bool | Literal["max-autotune"], bool]] = [
                        ("", False, True),
                        (", compiled", True, args.compiled),
                        (", max-autotune", "max-autotune", args.max_autotune),
                    ]
                    for how, compile, wanted in ways:
                        if wanted:
                            timed(model, tokens, args.tokens if compile else 2, device, compile)
                            clock = timed(model, tokens, args.tokens, device, compile)
                            row(f"{name}, {kind}{how}", model, clock)
            if 0 < prompt <= args.llama_up_to:
                row("Llama, float32", theirs, llama(args, tokens, device))


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(
    model: PerceiverAR, tokens: torch.Tensor, n: int, device: str, compile: bool | Literal["max-autotune"]
) -> list[float]:
    """The start, and when each token was there."""
    clock = [now(device)]
    for _ in stream(model, tokens, max_new_tokens=n, temperature=0.0, compile=compile):
        clock.append(now(device))
    return clock


def memory_speed(device: str) -> float:
    """Bytes/s."""
    array, seconds = torch.ones(128 << 20, device=device), []
    for _ in range(10):
        start = now(device)
        array.sum()
        seconds.append(now(device) - start)
    return array.numel() * array.element_size() / min(seconds)


def llama(args: argparse.Namespace, tokens: torch.Tensor, device: str) -> list[float]:
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]  # extra: bench
    from transformers.generation.streamers import BaseStreamer  # pyright: ignore[reportMissingImports]

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(now(device))  # first the prompt, before anything is computed

        def end(self) -> None:
            pass

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.dim,
        intermediate_size=8 * args.dim // 3,  # three matrices of this width have the size of two of 4 x dim
        num_hidden_layers=args.depth + 1,
        num_attention_heads=args.dim // 64,
        max_position_embeddings=tokens.shape[1] + args.tokens,
        pad_token_id=0,
    )
    model, clock = LlamaForCausalLM(config).eval(), Clock()
    torch.nn.Module.to(model, device)
    options = {"do_sample": False, "cache_implementation": "static", "attention_mask": torch.ones_like(tokens)}
    options |= {"min_new_tokens": args.tokens, "max_new_tokens": args.tokens, "eos_token_id": None}
    model.generate(tokens, streamer=clock, **options)  # type: ignore[operator]
    return clock.times


if __name__ == "__main__":
    main()
