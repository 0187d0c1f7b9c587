"""For `generate`: the prompt, the number of tokens to draw, and the text that ends them."""

import argparse
import math
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_ar.errors import InputError, require

if TYPE_CHECKING:
    from perceiver_ar.data.codec import Codec


def prompt_ids(codec: "Codec", prompt: str | None, prompt_file: str | None, conditions: Mapping[str, str]) -> list[int]:
    """The ids of the prompt, as the start of a document with `conditions`; at least one."""
    from perceiver_ar.data.codec import WrongModality, of_trained, start_ids
    from perceiver_ar.data.text import text_only

    first = [key for key in conditions if key in codec.header_conditions]
    if first and not (prompt is None and prompt_file is None):
        raise InputError(f"--condition {first[0]} begins a new document: leave out --prompt and --prompt_file")
    try:
        if prompt_file is None:
            return start_ids(codec, prompt or "", conditions).tolist()
        where = f"--prompt_file {prompt_file}"
        try:
            data = sys.stdin.buffer.read() if prompt_file == "-" else Path(prompt_file).read_bytes()
        except FileNotFoundError:
            raise InputError(f"{where}: no such file; check the path") from None
        except IsADirectoryError:
            raise InputError(f"{where} is a folder: name a file") from None
        chunks = text_only([data], prompt_file) if codec.reads_text else [data]
        pieces = [ids.tolist() for ids in codec.encode_stream(chunks, prompt_file)]
    except WrongModality as error:
        reason = str(error).replace("the input", "--prompt", 1) if prompt_file is None else f"--prompt_file {error}"
        raise InputError(f"this run cannot read the prompt: {of_trained(reason)}") from None
    return [*codec.separator, *codec.condition_ids(conditions), *chain.from_iterable(pieces)] or [0]


def stop_bytes(codec: "Codec", stop: str | None) -> bytes:
    """The bytes that end a text; empty without `stop`. Not ids, since several sequences of ids may decode to them."""
    if stop is None:
        return b""
    require(codec.writes_text, "--stop is text, which this run does not write: leave it out")
    stop = stop.replace("\\n", "\n").replace("\\t", "\t")  # shells pass backslashes on
    data = stop.encode("utf-8", errors="surrogateescape")
    try:
        written = codec.decode(codec.encode(data))
    except InputError as error:
        raise InputError(f"--stop {stop!r} cannot be encoded: {error}") from None
    require(written == data and len(data) > 0, f"--stop {stop!r} cannot be encoded: give text that the model can write")
    return data


def what_to_draw(
    codec: "Codec", document: list[int], args: argparse.Namespace, context_length: int
) -> tuple[list[int], list[int], int, int]:
    """Returns the row that results begin with, the prompt, the number of tokens to draw, and that of samples.

    The row is the prompt, unless a piece around a hole is too long for the context.
    """
    from perceiver_ar.data.codec import row_prompt_and_count

    if args.keep is not None and not (args.keep > 0 and math.isfinite(args.keep)):
        raise InputError(f"--keep is {args.keep:g}: give a number of tokens, or a share of them below 1")
    samples = (1 if codec.document_length is None else 4) if args.samples is None else args.samples
    require(samples >= 1, f"--samples is {samples}: it must be at least 1")
    if args.infill is not None and (args.prompt_file is None or args.keep is not None):
        raise InputError("--infill needs a whole piece: give --prompt_file, and leave out --keep")
    import numpy as np

    counts = args.keep, args.max_new_tokens, args.infill
    row, prompt, count = row_prompt_and_count(codec, np.array(document), *counts, context_length)
    whole = codec.document_length is not None and count < 1 and args.max_new_tokens != 0
    require(not whole, "there is nothing to draw: the prompt is a whole picture; --keep says how much of it stays")
    return row.tolist(), prompt.tolist(), count, samples


def to_device(model: Any) -> Any:
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu")
