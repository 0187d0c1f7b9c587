"""Text in and out: a codec's ids as bytes and names, and bytes as text that ends at a stop.

Stops are compared as bytes, because a text has many tokenizations and a character may take several tokens.
"""

import codecs
from collections.abc import Mapping, Sequence

import numpy as np

from perceiver_ar.data.codec import NO_CONDITIONS, Codec, start_ids
from perceiver_ar.data.text import END_OF_TEXT
from perceiver_ar.errors import require
from perceiver_ar.serving.protocol import Refused, require_unicode


class Vocabulary:
    """The text of ids. Ids of a codec that does not write text are numbers: "60 388 12"."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        ids = range(codec.vocab_size)
        if codec.writes_text:
            self.bytes = [codec.decode([index]) for index in ids]
        else:
            self.bytes = [f"{index} ".encode() for index in ids]
        self.names = [self._name(index) for index in ids]
        """Text of each id, all different; "bytes:\\\\xe2\\\\x82" for parts of a character, as OpenAI names them."""
        taken = set[str]()
        for index, name in enumerate(self.names):
            self.names[index] = f"{name}<|{index}|>" if name in taken else name
            taken.add(self.names[index])
        self.conditions = codec.plain.vocab_size
        """Ids from here on stand for conditions."""
        self.end = codec.separator[-1] if codec.separator else None
        """The id that ends a document."""

    def _name(self, index: int) -> str:
        if self.codec.separator and index == self.codec.separator[-1]:
            return END_OF_TEXT
        data = self.bytes[index]
        try:
            return data.decode() if data else f"<|{index}|>"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def prompt_ids(self, prompt: str | Sequence[int], conditions: Mapping[str, str] = NO_CONDITIONS) -> np.ndarray:
        """The ids (T,) of a prompt: a text as the start of a document with `conditions`; ids unchanged.

        Raises:
            InputError: text that the codec cannot read, ids outside of the vocabulary, or no ids.
        """
        if isinstance(prompt, str):
            return start_ids(self.codec, prompt, conditions)
        require(len(prompt) > 0, "prompt has no ids: give at least one")
        return np.array(self.check(prompt, "prompt"), dtype=np.int64)

    def check(self, ids: Sequence[int], name: str) -> Sequence[int]:
        """The ids. Raises Refused for one outside of the vocabulary."""
        last = self.codec.vocab_size - 1
        wrong = next((index for index in ids if not 0 <= index <= last), None)
        if wrong is not None:
            raise Refused(f"{name} has the id {wrong}: this model's ids are 0 ... {last}", name)
        return ids

    def tokenize(self, text: str, start: bool) -> list[int]:
        """Ids of a text, after those that begin a document if `start`; END_OF_TEXT alone is one id. Raises Refused."""
        require_unicode(text, "prompt")
        if text == END_OF_TEXT and self.end is not None:
            return [self.end]
        front = len(self.codec.separator) + len(self.codec.condition_ids({}))
        return self.codec.start(text).tolist()[0 if start else front :]

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(self.bytes[index] for index in ids).decode(errors="replace")


class CharacterCount:
    """Counts the characters of a text whose bytes arrive in pieces, as `StoppedText` decodes them."""

    def __init__(self) -> None:
        self.count = 0
        """Characters that are complete."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def copy(self) -> "CharacterCount":
        copied = CharacterCount()
        copied.count = self.count
        copied._decoder.setstate(self._decoder.getstate())
        return copied

    def push(self, data: bytes) -> int:
        """The number of characters before the one in which `data` begins."""
        held, before = self._decoder.getstate()[0], self.count
        if held and data:  # a character that is not complete; `data` may not go on with it
            before += not _may_go_on(held + data[:1])
        self.count += len(self._decoder.decode(data))
        return before


def _may_go_on(data: bytes) -> bool:
    """Whether these bytes are one character, or the beginning of one."""
    try:
        return len(codecs.getincrementaldecoder("utf-8")().decode(data)) <= 1
    except UnicodeDecodeError:
        return False


class StoppedText:
    """Bytes that arrive in pieces -> text up to the first stop.

    Holds back only an incomplete character and bytes that may be the beginning of a stop.
    """

    def __init__(self, stops: Sequence[bytes]) -> None:
        """stops: none of them empty."""
        self.stops = stops
        self.stopped = False
        self.num_bytes = 0
        """Bytes that have become text or an incomplete character."""
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def echo(self, data: bytes) -> str:
        """The text of bytes in which no stop counts; they come before all others."""
        return self._decoder.decode(data)

    def push(self, data: bytes) -> str:
        """The text that is now certain. The stop that is completed first ends it; of several, the longest."""
        held = self._held + data
        found = [(at + len(stop), at) for stop in self.stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, keep = True, min(found)[1]
        else:
            longest = min(len(held), max((len(stop) - 1 for stop in self.stops), default=0))
            tails = (n for n in range(longest, 0, -1) if any(stop.startswith(held[-n:]) for stop in self.stops))
            keep = len(held) - next(tails, 0)
        self._held = b"" if self.stopped else held[keep:]
        self.num_bytes += keep
        return self._decoder.decode(held[:keep])

    def close(self) -> str:
        """The rest of a text that ends without a stop, or before one."""
        held, self._held = self._held, b""
        self.num_bytes += len(held)
        return self._decoder.decode(held, final=True)
