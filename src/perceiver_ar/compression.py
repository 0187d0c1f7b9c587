"""Lossless compression: a range coder driven by a model's next-token probabilities.

Compressing and decompressing run the very same operations, in the same shapes and order, so that both have the same
probabilities bit by bit: the tokens of a few segments of the file, as rows of one batch, step by step over the cache of
generation. Other machines and versions may round differently, and one bit is enough for nonsense, so a file says where
it was made, and is refused elsewhere. Whatever happens, what was read is compared with a hash of the original.

A file is a header (`HEADER`), the code in words of 4 bytes, and a hash of both; all little-endian. Data that the model
does not make smaller stand there as they are, as 0 segments.
"""

import hashlib
import os
import platform
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perceiver_ar import __version__
from perceiver_ar.data.codec import Codec, WrongModality, importing, start_ids
from perceiver_ar.data.text import BytesCodec
from perceiver_ar.errors import require
from perceiver_ar.generation import evaluation_mode
from perceiver_ar.generation.decoder import Decoder, Recomputing
from perceiver_ar.generation.rows import Row, RowSettings, require_finite
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.run import Run
from perceiver_ar.windows import longest_context

MAGIC = b"\x89pAR\r\n\x01"
HEADER = struct.Struct("<7sQH16s16s32s")
"""MAGIC, number of tokens, number of segments, hash of the data, hash of the run, 4 bytes of a hash for each entry of
`surroundings`."""
HASH = 16  # bytes
CONTEXTS = 16
"""Contexts that a segment holds at least: each begins without any before it, which costs some bits."""
ROWS = 32
"""Maximum number of segments."""


def compress(run: Run, data: bytes, progress: Callable[[float], Any] = lambda share: None) -> bytes:
    """The compressed form of any bytes, by a run whose ids stand for bytes. `progress` gets the share done.

    Raises:
        InputError: the run's ids do not stand for bytes, its weights give NaN, or a package is missing.
    """
    coder = _coder()
    model, codec = run.model(), run.codec()
    ids = exact_ids(codec, data)
    count = max(1, min(ROWS, len(ids) // (CONTEXTS * longest_context(model.config))))
    segments = [part.tolist() for part in np.array_split(ids.astype(np.int64), count)]
    encoder = coder.stream.queue.RangeEncoder()
    family = coder.stream.model.Categorical(perfect=False)

    def known(rows: Sequence[Row], probabilities: np.ndarray, step: int) -> list[int]:
        tokens = [segments[row.index][step] for row in rows]
        encoder.encode(np.array(tokens, dtype=np.int32), family, probabilities)
        return tokens

    _walk(model, codec, [len(segment) for segment in segments], known, progress)
    made_with = b"".join(_hash(value.encode())[:4] for value in surroundings().values())
    code, number = encoder.get_compressed().astype("<u4").tobytes(), len(ids)
    if len(code) >= len(data):
        code, number, count = data, 0, 0
    body = HEADER.pack(MAGIC, number, count, _hash(data), run_hash(run, codec), made_with) + code
    return body + _hash(body)


def decompress(run: Run, file: bytes, progress: Callable[[float], Any] = lambda share: None) -> bytes:
    """What `compress` was given.

    Raises:
        InputError: the file is damaged or no compressed file, another run made it, or floating point may differ here.
    """
    require(file.startswith(MAGIC), "it is no file that perceiver-ar compress of this version made")
    body = file[:-HASH]
    require(len(body) >= HEADER.size and _hash(body) == file[-HASH:], "the file is damaged or cut off: fetch it again")
    _, num_tokens, count, data_hash, made_by, made_with = HEADER.unpack_from(body)
    if count == 0:
        return body[HEADER.size :]
    coder, codec = _coder(), run.codec()
    require(
        made_by == run_hash(run, codec),
        f"it was compressed with another model than the one in {run.path}: name the run that made it",
    )
    here = surroundings()
    differs = [name for i, name in enumerate(here) if made_with[4 * i :][:4] != _hash(here[name].encode())[:4]]
    require(
        not differs,
        "it was compressed elsewhere, where the last bits of a probability may be others: not the same are "
        f"{', '.join(f'{name} (here {here[name]})' for name in differs)}; decompress it where it was made",
    )
    model = run.model()
    lengths = [len(part) for part in np.array_split(np.empty(num_tokens, np.uint8), count)]
    segments: list[list[int]] = [[] for _ in lengths]
    decoder = coder.stream.queue.RangeDecoder(np.frombuffer(body[HEADER.size :], dtype="<u4").astype(np.uint32))
    family = coder.stream.model.Categorical(perfect=False)

    def decoded(rows: Sequence[Row], probabilities: np.ndarray, step: int) -> list[int]:
        tokens = decoder.decode(family, probabilities).tolist()
        for row, token in zip(rows, tokens, strict=True):
            segments[row.index].append(token)
        return tokens

    try:
        _walk(model, codec, lengths, decoded, progress)
    except AssertionError:  # the coder's, for code that cannot come from these probabilities
        segments = []
    data = exact_bytes(codec, [token for segment in segments for token in segment])
    require(
        _hash(data) == data_hash,
        "it does not decompress to what it was made from, so probabilities differ from those where it was made; "
        "nothing is written",
    )
    return data


def _walk(
    model: PerceiverAR,
    codec: Codec,
    lengths: Sequence[int],
    next_tokens: Callable[[Sequence[Row], np.ndarray, int], list[int]],
    progress: Callable[[float], Any],
) -> None:
    """Goes through rows of `lengths` tokens, which `next_tokens` gives from the rows that go on, the probabilities of
    their next tokens (rows, V) float32, and the number of tokens before."""
    if max(lengths) == 0:
        return
    start = torch.from_numpy(start_ids(codec))
    pinned = tuple(codec.condition_ids({}))
    settings = [RowSettings(max_new_tokens=length, pinned=pinned) for length in lengths]
    rows = [Row(i, start, model.config, each) for i, each in enumerate(settings)]
    with _one_thread(), evaluation_mode(model.modules()), torch.inference_mode():
        decoder = Decoder(model, rows, 1, max(lengths)) if model.config.cacheable else Recomputing(model, rows)
        for step in range(max(lengths)):
            logits = decoder.next_logits().double()
            require_finite(logits)
            decoder.add(next_tokens(decoder.rows, logits.softmax(-1).float().numpy(), step))
            progress((step + 1) / max(lengths))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread adds in one order, on a machine with any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def exact_ids(codec: Codec, data: bytes) -> np.ndarray:
    """Ids (n,) that `exact_bytes` turns back into any `data`, also where it is no text.

    Raises InputError if the codec's ids do not stand for bytes, or some byte has no id.
    """
    codec = codec.plain
    require(codec.writes_text, f"the codec {codec.name!r} does not write bytes: compress with a run of text or bytes")
    if isinstance(codec, BytesCodec):
        return np.frombuffer(data, dtype=np.uint8)
    lengths = codec.byte_lengths()
    single = {codec.decode([i]): i for i in np.flatnonzero(lengths == 1).tolist()[::-1]}

    def bytewise(part: bytes) -> list[int]:
        missing = {bytes([byte]) for byte in part} - single.keys()
        require(not missing, f"the codec has no id for the bytes {sorted(missing)}: compress with another run")
        return [single[bytes([byte])] for byte in part]

    ids: list[int] = []
    for part in re.split("([\0\udc80-\udcff]+)", data.decode("utf-8", errors="surrogateescape")):
        own = part.encode("utf-8", errors="surrogateescape")
        try:
            encoded = codec.encode(own).tolist()
        except WrongModality:
            encoded = []
        ids += encoded if codec.decode(encoded) == own else bytewise(own)
    return np.array(ids, dtype=codec.dtype)


def exact_bytes(codec: Codec, ids: Sequence[int]) -> bytes:
    """The inverse of `exact_ids`."""
    return bytes(ids) if isinstance(codec.plain, BytesCodec) else codec.decode(ids)


def run_hash(run: Run, codec: Codec) -> bytes:
    """A hash of the files that the probabilities depend on: network, weights and codec."""
    digests = []
    for pattern in ("config.json", "model.safetensors", "codec.json", *codec.files):
        for path in sorted(run.path.glob(pattern)):
            with open(path, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").digest())
    return _hash(b"".join(digests))


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:HASH]


def surroundings() -> dict[str, str]:
    """Eight things that the last bits of a probability depend on beside the run: all must be the same to decompress."""
    names = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    variables = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    return {
        "perceiver-ar": __version__,
        "torch": torch.__version__,
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
        "constriction": version("constriction"),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "settings": f"{torch.get_float32_matmul_precision()} {torch.backends.mkldnn.enabled} {variables}".strip(),
    }


def _processor() -> str:
    """The processor's model, which math libraries choose their kernels by."""
    try:
        return str(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0])
    except (OSError, IndexError):
        return platform.processor()


def _coder() -> Any:
    with importing("compress"):
        import constriction  # pyright: ignore[reportMissingImports]  # an extra
    return constriction
