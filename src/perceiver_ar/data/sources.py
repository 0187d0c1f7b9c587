"""Sources of documents: files, folders, patterns, standard input, the standard library; plain or compressed.

Finding a source does not read it. Files are streamed, never held in memory as a whole.
"""

import bz2
import fnmatch
import glob
import gzip
import lzma
import os
import re
import shutil
import stat
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar

from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.text import text_only, text_pieces
from perceiver_ar.errors import InputError, require

HUB = "hf://"
CHUNK = 1 << 20  # bytes per read
NOT_DOCUMENTS = frozenset({"__pycache__"})  # folders that are skipped, besides hidden ones
RUN_FILES = ("recipe.yaml", "codec.json", "model.safetensors", "tokens")  # two of them make a folder a run
NOT_LIBRARY = NOT_DOCUMENTS | {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One file to read.

    name: its name in messages.
    size: in bytes as stored, compressed or not.
    named: the user gave this very file, so it is an error if a codec cannot read it. A file that was found in a folder
        or by a pattern is skipped instead.
    """

    of_rows: ClassVar[bool] = False
    path: Path
    name: str
    size: int
    named: bool = True
    conditions: Mapping[str, str] = field(default_factory=dict, hash=False)  # of its documents; others are unknown
    spool: Any = field(default=None, repr=False, compare=False)  # keeps a temporary file alive as long as its source

    @property
    def identity(self) -> tuple[str, bool]:
        """Equal for sources of the same documents, by whatever path."""
        return os.path.realpath(self.path), False

    @property
    def without_documents(self) -> str:
        """What it is if no document is in it, and the remedy."""
        return "empty; give files with something in them"

    def chunks(self, advance: Callable[[int], Any] = lambda num_bytes: None) -> Iterator[bytes]:
        """The decompressed content. Calls `advance(n)` after each n bytes read of the stored file.

        Raises `InputError` if the file vanished, is a broken link, may not be read, or is damaged.
        """
        require(not _leads_nowhere(self.path), f"{self.name} is a broken link; correct it or remove it")
        read = 0
        try:
            with open(self.path, "rb") as raw:
                for chunk in filter(None, _decompressed(raw, self.path.suffix.lower(), self.name)):
                    yield chunk
                    advance(raw.tell() - read)
                    read = raw.tell()
        except FileNotFoundError:
            raise InputError(f"{self.name} vanished before it was read; put it back and start again") from None
        except PermissionError:
            raise _permission_denied(self.name) from None
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # a failing disk, not a damaged file
                raise
            reason = f"{self.name} is damaged, or its ending is wrong ({error})"
            raise InputError(f"{reason}; fetch or compress it again") from None

    def documents(
        self, separator: bytes | None, advance: Callable[[int], Any] = lambda num_bytes: None, text: bool = False
    ) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Pairs of a document's name in messages and its chunks, as `split_documents` yields them.

        text: raises `WrongModality` if the file cannot be text, such as an archive.
        """
        chunks = self.chunks(advance)
        chunks = text_only(chunks, self.name) if text else chunks
        for number, document in enumerate(split_documents(chunks, separator), 1):
            yield f"{self.name}, document {number}," if separator else self.name, document


def _permission_denied(name: str | os.PathLike[str]) -> InputError:
    return InputError(f"no permission to read {name}; change its permissions or leave it out")


def _decompressed(raw: IO[bytes], suffix: str, name: str) -> Iterator[bytes]:
    """The content of an open file, decompressed by its `suffix`."""
    if suffix == ".xz":
        yield from _streams(raw, lzma.LZMADecompressor, padding=b"\0")
    elif suffix == ".bz2":
        yield from _streams(raw, bz2.BZ2Decompressor, padding=b"\0")
    elif suffix == ".zst":
        yield from _zstd_chunks(raw, name)
    else:
        file = gzip.GzipFile(fileobj=raw) if suffix in (".gz", ".tgz") else raw
        while chunk := file.read(CHUNK):
            yield chunk


def _streams(
    raw: IO[bytes], begin: Callable[[], Any], padding: bytes = b"", limit: tuple[int, ...] = (CHUNK,)
) -> Iterator[bytes]:
    """The content of a compressed file: streams, one after the other, with bytes of `padding` between them.

    The packages' own readers take damage or padding behind the first stream for the end of the file.

    begin: makes a decompressor of one stream.
    limit: what its `decompress` takes beside the data: the most bytes to return at once.

    Raises EOFError if the file ends within a stream, and what the decompressor raises.
    """
    stream = None
    while data := raw.read(1 << 14):
        while data := data if stream else data.lstrip(padding):
            stream = stream or begin()
            yield stream.decompress(data, *limit)
            while not stream.eof and not getattr(stream, "needs_input", True):
                yield stream.decompress(b"", *limit)
            data, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
    if stream is not None:
        raise EOFError("it ends in the middle")


def _zstd_chunks(raw: IO[bytes], name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"reading {name} needs the package zstandard: pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    try:
        yield from _streams(raw, decompressor.decompressobj, limit=())
    except zstandard.ZstdError as error:
        raise OSError(error) from None  # without a number, as gzip and bz2 raise it


def find_files(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Source]:
    """The files at `paths`, in order, each once, even if several paths or links lead to it.

    A path is a file, a folder (walked in sorted order, without hidden files and folders and `__pycache__`), a pattern
    (`*`, `?`, `[...]`, and `**` for any folders) or `-` for standard input. Files ending in .gz, .tgz, .xz, .bz2 or
    .zst are decompressed when read. Raises `InputError` if a path does not exist, holds or matches nothing, or may not
    be read.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    sources: dict[str, Source] = {}  # by the real path
    for path in (os.path.expanduser(path) for path in paths):
        if path == "-":
            found = [_spooled(sys.stdin.buffer, "standard input")]
        elif os.path.lexists(path) or not glob.has_magic(path):
            found = _at(path)
        elif not (found := _matching(path)):
            raise InputError(f"no file matches {path}; check the pattern")
        for source in found:
            real = os.path.realpath(source.path)
            if source.named or real not in sources:  # a named one has to be readable, wherever else it was found
                sources[real] = source
    require(len(sources) > 0, "no files given; name files, folders or patterns, or - for standard input")
    return list(sources.values())


def standard_library() -> list[Source]:
    """The embedded default corpus: the sources of the running Python's standard library, without its tests."""
    folder = sysconfig.get_path("stdlib")
    found = _walk(folder, skip=NOT_LIBRARY) if folder and os.path.isdir(folder) else []
    sources = [source for source in found if source.name.endswith(".py") and os.access(source.path, os.R_OK)]
    require(len(sources) > 0, f"this Python has no standard library sources in {folder}; name files of your own")
    return sources


def read_text(sources: Iterable[Source], max_bytes: int | None = None) -> Iterator[str]:
    """Yields the text of `sources` in pieces, up to about `max_bytes` (UTF-8), for `train_bpe`.

    Skips files that cannot be read as text; raises `InputError` if the user named them.
    """
    total = 0
    for source in sources:
        try:
            for where, document in source.documents(None, text=True):
                try:
                    for piece in text_pieces(document, where):
                        yield piece
                        total += len(piece.encode())
                        if max_bytes is not None and total >= max_bytes:
                            return
                except WrongModality:
                    if not source.of_rows:
                        raise
        except InputError:  # reported when the file is tokenised
            if source.named:
                raise


def read_documents(sources: Iterable[Source], read: Callable[[bytes], Any]) -> Iterator[Any]:
    """What `read` makes of the documents of `sources`, without those that it cannot read.

    Raises `InputError` if that is a file, or in a file, that the user named.
    """
    for source in sources:
        try:
            for where, chunks in source.documents(None):
                try:
                    yield read(b"".join(chunks))
                except InputError as error:
                    if not source.of_rows:
                        raise InputError(f"{where}: {error}") from None
        except InputError:
            if source.named:
                raise


def split_documents(chunks: Iterable[bytes], separator: bytes | None) -> Iterator[Iterator[bytes]]:
    """The documents of one file, each an iterator of chunks. `separator` stands between them and is left out.

    LF in the separator also matches CR LF in the file. Use up each document before asking for the next. Without a
    separator the file is one document.
    """
    if not separator:
        yield iter(chunks)
        return
    chunks, buffer, start, at_end = iter(chunks), b"", 0, False  # what is unread: buffer[start:], then chunks
    pattern = re.compile(re.escape(separator).replace(b"\\\n", b"\r?\n"))
    longest = len(separator) + separator.count(b"\n")

    def document() -> Iterator[bytes]:
        nonlocal buffer, start, at_end
        while True:
            if found := pattern.search(buffer, start):
                content, start = buffer[start : found.start()], found.end()
                if content:
                    yield content
                return
            chunk = next(chunks, None)
            at_end = chunk is None
            # The last bytes may be the first half of a separator, so they wait for the next chunk.
            keep = len(buffer) if at_end else max(start, len(buffer) - longest + 1)
            content, buffer, start = buffer[start:keep], buffer[keep:] + (chunk or b""), 0
            if content:
                yield content
            if at_end:
                return

    while not at_end:
        yield document()


def refused(error: WrongModality) -> Iterator[bytes]:
    """A document that raises `error` when it is read."""
    yield from ()
    raise error


def folder_of(name: str) -> str:
    """The name of the folder in which a file lies (a link: the link itself); empty if `name` is no file's."""
    return Path(os.path.abspath(name)).parent.name if os.path.dirname(name) or os.path.exists(name) else ""


def file_beside(table: str | os.PathLike[str], name: str, where: str) -> str:
    """The real path of the file that a table names, relative to its own folder.

    Raises `InputError`, which begins with `where`, if no file can have this name.
    """
    try:
        name_bytes = os.fsencode(name)
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        name_bytes = b"\0"
    require(b"\0" not in name_bytes, f"{where} names a file {name!r:.60}, as no file can be named: write it again")
    return os.path.realpath(Path(table).parent / name)


def _at(path: str) -> list[Source]:
    """The files at a path that the user named."""
    if path.startswith(HUB):
        raise InputError(f"{path}: only `train` reads the Hub; fetch it with `hf download` and name the folder")
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        raise _permission_denied(path) from None
    except OSError as error:
        raise InputError(f"{path or 'an empty path'} does not exist ({error.strerror}); check the path") from None
    if stat.S_ISDIR(mode):
        if found := _walk(path):
            return found
        raise InputError(f"the folder {path} holds no files (hidden ones do not count); give another one")
    if stat.S_ISFIFO(mode):  # such as the shell's <(command)
        with open(path, "rb") as pipe:
            return [_spooled(pipe, path)]
    require(stat.S_ISREG(mode), f"{path} is neither a file nor a folder; give a file, or - for standard input")
    if not os.access(path, os.R_OK):
        raise _permission_denied(path)
    return [_source(path, named=True)]


def _matching(pattern: str) -> list[Source]:
    """The files that match a pattern, or lie in a folder that does."""
    parts = Path(pattern).parts
    if "**" in parts:  # glob's own may follow links in circles
        depth = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        below = _walk(os.path.join(*parts[:depth] or ["."]))
        return [source for source in below if _fits(source.path.parts[depth:], parts[depth:])]
    found = []
    for match in sorted(glob.glob(pattern)):
        if os.path.isdir(match):
            found += [] if os.path.basename(match) in NOT_DOCUMENTS or _skipped_run(match) else _walk(match)
        elif _is_file(match):
            found.append(_source(match, named=False))
    return found


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern; `**` fits any number of them."""
    if not pattern or not path:
        return not pattern
    if pattern[0] == "**":
        return _fits(path, pattern[1:]) or _fits(path[1:], pattern)
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _source(path: str, named: bool) -> Source:
    return Source(Path(path), path, 0 if _leads_nowhere(path) else os.stat(path).st_size, named)


def _leads_nowhere(path: str | os.PathLike[str]) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _is_file(path: str) -> bool:
    """Whether it is a file, not a folder, pipe or socket. A broken link counts as a file: it is skipped like one."""
    return os.path.isfile(path) or _leads_nowhere(path)


def _walk(folder: str, skip: frozenset[str] = NOT_DOCUMENTS) -> list[Source]:
    """All files below `folder`, sorted. Links are followed, but no folder is entered twice. Folders in it that may not
    be read or that hold a run are skipped and reported on stderr."""
    found, seen = [], set()

    def denied(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            return
        if error.filename == folder:
            raise _permission_denied(folder)
        print(f"skipped the folder {error.filename}: no permission to read it", file=sys.stderr)

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=denied):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            name
            for name in folders
            if name not in skip and not name.startswith(".") and not _skipped_run(os.path.join(parent, name))
        )
        for name in sorted(files):
            path = os.path.join(parent, name)
            if not name.startswith(".") and _is_file(path):
                with suppress(FileNotFoundError):
                    found.append(_source(path, named=False))
    return found


def _skipped_run(folder: str) -> bool:
    """Whether a folder holds a run of perceiver-ar, whose files are not documents; reports it on stderr."""
    has = {name for name in RUN_FILES if os.path.exists(os.path.join(folder, name))}
    if len(has) > 1:
        print(f"skipped the folder {folder}: it holds a run; to read it, name it", file=sys.stderr)
    return len(has) > 1


def _spooled(stream: IO[bytes], name: str) -> Source:
    """A stream as a temporary file that can be read more than once; it is removed with its source."""
    spool = tempfile.NamedTemporaryFile(prefix="perceiver-ar-")  # noqa: SIM115
    shutil.copyfileobj(stream, spool, CHUNK)
    spool.flush()
    return Source(Path(spool.name), name, os.stat(spool.name).st_size, named=True, spool=spool)
