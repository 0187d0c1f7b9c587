"""Documents that are members of tar files, as in WebDataset.

A member `KEY.EXTENSION` belongs to the sample KEY; the extension begins at the first dot of the member's file name. The
members with the wanted extension are the documents. Archives are read as streams.
"""

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.sources import Source, refused, split_documents
from perceiver_ar.data.text import text_only
from perceiver_ar.errors import InputError

TAR = re.compile(r".+\.(tar(\.(gz|xz|bz2|zst))?|tgz)", re.IGNORECASE)
SHOWN = 5  # endings in a message
SAMPLE = re.compile(r"(?:.*/)?[^/.]+(\.[^/]+)")
"""A member's name; the group is its extension."""


@dataclass(frozen=True)
class Members(Source):
    """A tar file, whose members that end in one of `endings` are documents.

    field: the text is in this field of a JSON member, or field of a field; empty: the member is the document.
    """

    of_rows: ClassVar[bool] = True
    endings: tuple[str, ...] = ()
    field: str = ""

    def documents(
        self, separator: bytes | None, advance: Callable[[int], Any] = lambda num_bytes: None, text: bool = False
    ) -> Iterator[tuple[str, Iterator[bytes]]]:
        """As `Source.documents`; `separator` separates several documents in one member.

        Raises `InputError` if the archive is damaged or no member has one of the endings.
        """
        seen, found = dict[str, None](), False
        key, has_document = "", False  # of the last sample
        others = list[tuple[str, Iterator[bytes]]]()  # members of it that are no documents, but look like some
        for name, data in read_tar(self, advance):
            where, ending = f"{self.name}/{name}", extension(name)
            if len(seen) < SHOWN:
                seen[ending or name] = None
            if name[: len(name) - len(ending)] != key:
                yield from () if has_document else others
                key, has_document, others = name[: len(name) - len(ending)], False, []
            if ending not in self.endings:
                if ending.endswith(self.endings):
                    reason = f"is no document: its name ends, from the first dot on, in {ending}"
                    others.append((where, refused(WrongModality(f"{where} {reason}" if text else reason))))
                continue
            found = has_document = True
            content = self._text(data, where) if text or self.field else iter([data])
            for document in split_documents(content, separator):
                yield where, document
        yield from () if has_document else others
        if seen and not found:
            raise InputError(
                f"{self.name} has no member that ends in {' or '.join(self.endings)}, only {', '.join(seen)} (from the "
                "first dot of a name on); set modality, or data.column to the ending of the text's members"
            )

    def _text(self, data: bytes, where: str) -> Iterator[bytes]:
        if not self.field:
            yield from text_only([data], where)
            return
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise WrongModality(f"{where} is not JSON") from None
        for name in self.field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, str):
            raise WrongModality(f"{where} has no text in {self.field!r}; set data.column")
        yield value.encode(errors="surrogatepass")


def extension(name: str) -> str:
    """The ending of a member, such as ".txt" or ".seg.png", in lower case; empty if it has none, or is hidden."""
    match = SAMPLE.fullmatch(name)
    return match[1].lower() if match else ""


def read_tar(source: Source, advance: Callable[[int], Any] = lambda num_bytes: None) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a tar file. Raises `InputError` if it is damaged, or as `Source.chunks`."""
    try:
        file: Any = _Reader(source.chunks(advance))
        with _Archive.open(fileobj=file, mode="r|") as tar:
            while (member := tar.next()) is not None:
                if member.isreg() and (content := tar.extractfile(member)) is not None:
                    yield member.name, content.read()
                tar.members.clear()  # type: ignore[attr-defined]  # else memory grows with their number
    except InputError:
        raise
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise InputError(f"{source.name} is damaged, or no tar file ({error}); fetch or pack it again") from None


class _Header(tarfile.TarInfo):
    """The header of a member. tarfile takes a damaged or cut one for the end of the archive; this raises."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> "_Header":
        try:
            header = super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            kind = type(error).__name__
            if kind == "EOFHeaderError":  # a block of zeros
                tarfile_.has_ended = True
            elif not (kind == "EmptyHeaderError" and tarfile_.has_ended):  # the end of the file
                raise tarfile.ReadError(str(error)) from None
            raise
        tarfile_.has_ended = False
        return header


class _Archive(tarfile.TarFile):
    """Goes on behind an end mark, as `cat a.tar b.tar` makes archives; has_ended: an end mark was the last block."""

    tarinfo, ignore_zeros, has_ended = _Header, True, False


class _Reader:
    """Chunks as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks, self.rest = chunks, b""

    def read(self, size: int) -> bytes:
        while len(self.rest) < size and (chunk := next(self.chunks, b"")):
            self.rest += chunk
        data, self.rest = self.rest[:size], self.rest[size:]
        return data
