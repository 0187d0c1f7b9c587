"""Text and bytes as ids: `BytesCodec` (one id per byte), `OffsetBytesCodec` (the same after special ids) and
`TokenizerCodec` (byte-level BPE, Hugging Face tokenizers).

All decode to exactly the bytes that were encoded, and know how many bytes each id stands for, so that bits per byte
are comparable between them.
"""

import codecs
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from perceiver_ar.data.codec import Codec, WrongModality
from perceiver_ar.errors import InputError
from perceiver_ar.files import write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
LETTER = rb"[\t\n\r -~\xa0-\xff]"
NO_TEXT: dict[bytes, tuple[str, str]] = {
    rb".{257}ustar": ("a tar archive", "unpack it"),
    rb"PK(\x03\x04|\x05\x06)": ("a zip archive, or a document in one (docx, epub)", "unpack it, or save it as text"),
    rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07": ("an archive (7z, rar)", "unpack it"),
    rb"\x1f\x8b": ("compressed (gzip)", "decompress it, or let its name end in .gz"),
    rb"BZh[1-9]1AY&SY": ("compressed (bzip2)", "decompress it, or let its name end in .bz2"),
    rb"\xfd7zXZ\x00": ("compressed (xz)", "decompress it, or let its name end in .xz"),
    rb"\x28\xb5\x2f\xfd": ("compressed (zstd)", "decompress it, or let its name end in .zst"),
    rb"%PDF-": ("a PDF", "save it as text"),
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an Office document", "save it as text"),
    rb"PAR1[\x00-\x08\x0e-\x1f]": ("a Parquet table", "let its name end in .parquet"),
    rb"ARROW1\x00|\xff{4}.{4}\x10\x00{3}": ("an Arrow table", "let its name end in .arrow"),
    rb"\x89PNG|\xff\xd8\xff|RIFF.{4}WEBP": ("a picture", "leave it out"),
    rb"fLaC\x00|OggS\x00|ID3[\x02-\x04]|RIFF.{4}WAVE": ("a recording", "leave it out"),
    rb"MThd\x00|RIFF.{4}RMID": ("a MIDI file", "leave it out"),
    rb".{4}ftyp(hei|hev|mif|avi)": ("a picture in HEIF (heic, avif)", "save it as PNG or JPEG"),
    rb".{4}ftyp|\x30\x26\xb2\x75\x8e\x66\xcf\x11|\x1aE\xdf\xa3": (
        "sound or video (m4a, mp4, wma, webm)",
        "save its sound as WAV, FLAC, OGG or MP3",
    ),
    rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff": ("UTF-16 or UTF-32", "save it as UTF-8"),
    rb"(%b\x00){8}|(\x00%b){8}|(%b\x00{3}){4}|(\x00{3}%b){4}" % (4 * (LETTER,)): (
        "UTF-16 or UTF-32",
        "save it as UTF-8",
    ),
}
"""Pattern of a file's first bytes -> (what the file is, what to do)."""
START = 512  # bytes that `NO_TEXT` is compared with
PIECE = 1 << 14  # characters that a tokenizer encodes in one piece: 1 << 16 takes twice as long
PIECES = 16  # pieces of a single document that it encodes in parallel, in its own threads
WORD = 256  # maximum characters of a word that a tokenizer is trained on
KINDS = r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s"  # letters, digits, other signs, spaces: words are runs of one kind
LONG_WORD = re.compile("|".join(f"{kind}{{{WORD}}}(?={kind})" for kind in KINDS))
LONG_WORDS = 1 << 20  # characters of such words that a tokenizer is trained on: almost all of their parts differ


class FixedBytesCodec(Codec):
    """Text whose ids each stand for fixed bytes; some for none."""

    ending = ".txt"
    writes_text = True
    _bytes: list[bytes]
    """Of each id."""

    def encode(self, data: bytes) -> np.ndarray:
        return np.concatenate([np.empty(0, self.dtype), *self.encode_stream([data], "the input")])

    def decode(self, ids: ArrayLike) -> bytes:
        return b"".join([self._bytes[index] for index in np.asarray(ids).tolist()])

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(part) for part in self._bytes], dtype=np.int64)


class BytesCodec(FixedBytesCodec):
    """Every byte is its own id.

    With `text`, documents must be valid UTF-8 without NUL, and id 0 (NUL) separates them. Without, any bytes are
    allowed, all 256 ids stand for themselves, and nothing separates documents.
    """

    name = "bytes"
    saved = ("text",)
    vocab_size = 256

    def __init__(self, text: bool = True):
        self.text = self.reads_text = text
        self.separator = (0,) if text else ()
        self._bytes = [b"" if byte in self.separator else bytes([byte]) for byte in range(256)]

    def encode_stream(self, chunks: Iterable[bytes], where: str) -> Iterator[np.ndarray]:
        if self.text:
            chunks = (piece.encode() for piece in decode_utf8(chunks, where, allow_nul=False))
        return (np.frombuffer(chunk, dtype=np.uint8) for chunk in chunks)

    def decode(self, ids: ArrayLike) -> bytes:
        data = np.asarray(ids).astype(np.uint8).tobytes()
        return data.replace(b"\0", b"") if self.text else data


class OffsetBytesCodec(FixedBytesCodec):
    """Byte b is id b + `reserved`, as in other implementations; the ids below `reserved` are special, without bytes.

    `start_id`, one of the special ids, precedes every document; None: no id does.
    """

    name = "offset_bytes"
    saved = ("reserved", "start_id")

    def __init__(self, reserved: int, start_id: int | None = None):
        self.reserved, self.start_id = reserved, start_id
        self.vocab_size = 256 + reserved
        self.separator = () if start_id is None else (start_id,)

    def encode(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype=np.uint8).astype(self.dtype) + self.dtype.type(self.reserved)

    def encode_stream(self, chunks: Iterable[bytes], where: str) -> Iterator[np.ndarray]:
        return map(self.encode, chunks)

    def decode(self, ids: ArrayLike) -> bytes:
        data = np.asarray(ids).astype(np.int64) - self.reserved
        return data[data >= 0].astype(np.uint8).tobytes()

    def byte_lengths(self) -> np.ndarray:
        return (np.arange(self.vocab_size) >= self.reserved).astype(np.int64)


class TokenizerCodec(FixedBytesCodec):
    """A byte-level BPE tokenizer (GPT-2, Llama 3, Qwen, or one made by `train_bpe`): every id stands for fixed bytes.

    Other kinds (WordPiece, SentencePiece) are refused: they do not decode to the encoded text, or only as a whole, and
    the bytes of one id cannot be counted. A tokenizer that first composes characters (NFC) is accepted; its text comes
    back composed. Special tokens are never made from text: a literal `<|endoftext|>` in a
    document is encoded like any other text. They stand for no bytes, and `<|endoftext|>`, if there is one, separates
    documents.
    """

    name = "tokenizer"
    files = ("tokenizer.json",)
    reads_text = encodes_in_threads = encodes_slowly = True

    def __init__(self, tokenizer: "Tokenizer", where: str = "this tokenizer"):
        """Raises `InputError`, naming `where`, if `tokenizer` is not byte-level."""
        self.tokenizer = tokenizer
        tokenizer.no_truncation()  # a saved tokenizer may cut or pad what it encodes
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):  # random merges, used in training only
            tokenizer.model.dropout = None  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.encode_special_tokens = True  # encodes their names as ordinary text
        if '"ByteLevel"' not in json.dumps(json.loads(tokenizer.to_str())["decoder"]):
            raise InputError(f"{where} is not byte-level; use a byte-level BPE tokenizer (GPT-2, Llama 3) or train one")
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self._bytes = [b""] * self.vocab_size  # ids without a token have none
        for token, index in vocab.items():
            self._bytes[index] = _token_bytes(token)
        for index, token in tokenizer.get_added_tokens_decoder().items():
            self._bytes[index] = b"" if token.special else token.content.encode()
            if token.special and token.content == END_OF_TEXT:
                self.separator = (index,)
        for probe in _PROBES:
            if (back := self.decode(self.encode(probe.encode())).decode(errors="replace")) != probe:
                raise InputError(
                    f"{where} does not decode to the encoded text ({probe!r} became {back!r}); use a lossless tokenizer"
                )

    @classmethod
    def from_file(cls, path: str | Path) -> "TokenizerCodec":
        """Reads a `tokenizer.json`. Raises `InputError` if it is missing, damaged or not byte-level."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the tokenizer {path}: {error.strerror}; give a tokenizer.json") from None
        except Exception as error:  # tokenizers raises plain Exception
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} is not a tokenizer.json of Hugging Face tokenizers ({reason})") from None
        return cls(tokenizer, where=str(path))

    def encode_stream(self, chunks: Iterable[bytes], where: str) -> Iterator[np.ndarray]:
        pieces = self.pieces(chunks, where)
        while batch := list(islice(pieces, PIECES)):
            yield from self.encode_pieces(batch)

    def pieces(self, chunks: Iterable[bytes], where: str) -> Iterator[str]:
        return text_pieces(chunks, where)

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)  # fast: without offsets
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def save(self, directory: Path) -> None:
        write_text(directory / "tokenizer.json", self.tokenizer.to_str(pretty=True))

    @classmethod
    def load(cls, directory: Path, settings: dict[str, Any]) -> "TokenizerCodec":
        return cls.from_file(directory / "tokenizer.json")


def train_bpe(texts: Iterable[str], vocab_size: int) -> TokenizerCodec:
    """Trains a lossless byte-level BPE tokenizer on `texts` (whole documents, or pieces of them: see `text_pieces`).

    Memory grows with the number of different words, not with the amount of text. Words of more than `WORD` characters
    (text without spaces, such as genomes) are cut, and only the first `LONG_WORDS` characters of such words are used.
    The vocabulary has all 256 bytes, `<|endoftext|>`, and merges up to `vocab_size`, or fewer if the texts do not have
    enough. A terminal shows the progress. Raises `InputError` if `vocab_size` is below 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise InputError(f"vocab_size {vocab_size} is too small for a tokenizer: 256 bytes and {END_OF_TEXT} need 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    _interruptible(lambda texts: tokenizer.train_from_iterator(texts, trainer), _short_words(texts))
    return TokenizerCodec(tokenizer)


def _short_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, with words longer than `WORD` cut, and such words left out after `LONG_WORDS` characters.

    The trainer's time is quadratic in the longest word.
    """
    left = LONG_WORDS
    for text in texts:
        start = 0
        for word in LONG_WORD.finditer(text):
            yield text[start : word.end() if left > 0 else word.start()]
            start = word.end()
            left -= WORD
        yield text[start:]


def _interruptible(work: Callable[[Iterator[str]], Any], texts: Iterator[str]) -> None:
    """Runs `work` in another thread. Signal handlers run in this one, and their exceptions end the wait.

    The other thread then gets no more texts. Its running computation cannot be stopped and ends with the process. (A
    thread that runs Python while the process ends would abort it, so this waits until it reads no more.)
    """
    result, abandoned = Future[Any](), threading.Event()

    def run() -> None:
        try:
            result.set_result(work(takewhile(lambda _: not abandoned.is_set(), texts)))
        except BaseException as error:
            result.set_exception(error)

    try:
        threading.Thread(target=run, daemon=True).start()
        result.result()
    except BaseException:
        abandoned.set()
        wait([result], timeout=1)
        raise


def decode_utf8(chunks: Iterable[bytes], where: str, allow_nul: bool = True) -> Iterator[str]:
    """Chunks of bytes, cut anywhere -> text in whole characters. Raises `WrongModality` naming the invalid byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the chunk in the document

    def wrong(byte: int, at: int) -> WrongModality:
        remedy = "save it as UTF-8, or use --modality bytes" if byte else "use --modality bytes or a tokenizer"
        return WrongModality(f"{where} is not UTF-8 text (byte 0x{byte:02x} at offset {at}); {remedy}")

    def decode(chunk: bytes, final: bool) -> str:
        pending = len(decoder.getstate()[0])  # bytes of an incomplete character from the last chunk
        try:
            return decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            raise wrong(error.object[error.start], offset - pending + error.start) from None

    for chunk in chunks:
        text = decode(chunk, final=False)
        if not allow_nul and (at := chunk.find(0)) >= 0:
            raise wrong(0, offset + at)
        offset += len(chunk)
        if text:
            yield text
    decode(b"", final=True)


def text_only(chunks: Iterable[bytes], where: str, allow_nul: bool = False) -> Iterator[bytes]:
    """Yields the content of a file that can be text, without a byte order mark.

    Raises `WrongModality` for NUL (unless allowed) or a signature of `NO_TEXT`, naming `where`, the kind of the file
    and the remedy.
    """
    chunks = iter(chunks)
    start = b""
    for chunk in chunks:
        start += chunk
        if len(start) >= START:
            break
    for signature, (kind, remedy) in NO_TEXT.items():
        if re.match(signature, start, re.DOTALL):
            raise WrongModality(f"{where} is {kind}, not UTF-8 text; {remedy}, or use --modality bytes")
    offset = start.startswith(codecs.BOM_UTF8) * len(codecs.BOM_UTF8)
    for chunk in chain([start[offset:]], chunks):
        if not allow_nul and (at := chunk.find(0)) >= 0:
            raise WrongModality(f"{where} is not UTF-8 text (byte 0x00 at offset {offset + at}); use --modality bytes")
        offset += len(chunk)
        if chunk:
            yield chunk


def column_separator(header: str) -> str:
    """The character between the columns of a .csv file, by its first line."""
    return max(",;\t|", key=header.count)


def text_pieces(chunks: Iterable[bytes], where: str, size: int = PIECE) -> Iterator[str]:
    """One document's bytes -> text in pieces of `size` characters or less, cut at line ends if possible."""
    rest = ""
    for text in decode_utf8(chunks, where):
        rest += text
        while len(rest) > size:
            cut = _cut(rest, size)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _cut(text: str, size: int) -> int:
    """Where to cut `text` (longer than `size`): at `size` or before.

    First choice: after a line end with no other whitespace beside it. The usual pre-tokenizers cut there anyway, so the
    ids are those of the uncut text. Else after a line end or before a space; in text without either, at `size`.
    """
    cut = text.rfind("\n", 0, size)
    while cut > 0:
        if not text[cut - 1].isspace() and not text[cut + 1].isspace():
            return cut + 1
        cut = text.rfind("\n", 0, cut)
    return max(text.rfind("\n", 0, size) + 1, text.rfind(" ", 1, size)) or size


# Byte-level BPE writes each byte as one printable character: these bytes as themselves, the others from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
BYTE_CHARACTERS = sorted(_BYTE_OF, key=_BYTE_OF.__getitem__)
"""The character of each byte."""


def _token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # not in the byte alphabet: stands for itself
        return token.encode()


# Text that lossy tokenizers change: cases, accents, spaces and line ends at the edges and in runs, ligatures, names of
# special tokens. All of it is composed (NFC).
_PROBES = (
    f" Twice  the\tSPACE \r\n\n  caf\u00e9 \u65e5\u672c\u8a9e \U0001f642 \ufb01 {END_OF_TEXT}</s>[UNK] ",
    "a\n",
    "x",
)
