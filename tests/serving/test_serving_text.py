"""Text ends at the first stop, whatever the pieces in which its bytes come; no character is broken."""

from hypothesis import given
from hypothesis import strategies as st

from perceiver_ar.data.text import BytesCodec, OffsetBytesCodec, train_bpe
from perceiver_ar.serving.text import CharacterCount, StoppedText, Vocabulary

pieces = st.lists(st.lists(st.sampled_from(list("aaabé€".encode())), max_size=4).map(bytes), max_size=12)
stops = st.lists(st.text("aabé€", min_size=1, max_size=4).map(str.encode), max_size=3)


def text_of(pieces: list[bytes], stops: list[bytes]) -> tuple[str, bool, list[str]]:
    text, shown = StoppedText(stops), list[str]()
    for piece in pieces:
        shown.append(text.push(piece))
        if text.stopped:
            break
    shown.append(text.close())
    return "".join(shown), text.stopped, shown


def cut(data: bytes, stops: list[bytes]) -> tuple[bytes, bool]:
    """By definition: the shortest beginning that ends with a stop, without the longest such stop."""
    for end in range(len(data) + 1):
        found = [stop for stop in stops if data[:end].endswith(stop)]
        if found:
            return data[: end - max(map(len, found))], True
    return data, False


@given(pieces, stops)
def test_a_text_ends_where_the_first_stop_is_complete(pieces: list[bytes], stops: list[bytes]) -> None:
    text, stopped, _ = text_of(pieces, stops)
    data, expected = cut(b"".join(pieces), stops)
    assert (text, stopped) == (data.decode(errors="replace"), expected)


@given(pieces, stops)
def test_only_a_live_beginning_of_a_stop_is_held_back(pieces: list[bytes], stops: list[bytes]) -> None:
    text, data = StoppedText(stops), b""
    for piece in pieces:
        text.push(piece)
        data += piece
        if text.stopped:
            return
        held = data[text.num_bytes :]
        assert held == b"" or any(stop.startswith(held) and stop != held for stop in stops)
        longer = data[max(0, text.num_bytes - 1) :]
        assert longer == held or len(longer) > len(held)
        for n in range(len(held) + 1, len(data) + 1):  # and nothing longer was to be held
            assert not any(stop.startswith(data[-n:]) for stop in stops)


@given(
    st.lists(st.lists(st.sampled_from(list("ab€".encode() + b"\x80\xf0\xff\xe2")), max_size=3).map(bytes), max_size=12)
)
def test_a_piece_is_counted_to_begin_where_its_character_is(pieces: list[bytes]) -> None:
    whole = b"".join(pieces).decode(errors="replace")
    characters = CharacterCount()
    for i, piece in enumerate(pieces):
        at, again = characters.copy().push(piece), characters.push(piece)
        assert at == again
        if piece[:1] in (b"a", b"b"):
            assert whole[at] == chr(piece[0])
            assert whole[:at].count("a") == b"".join(pieces[:i]).count(b"a")


def test_offsets_of_parts_of_characters() -> None:
    def offsets(*pieces: bytes) -> list[int]:
        characters = CharacterCount()
        return [characters.push(piece) for piece in pieces]

    assert offsets(b"\x80", b"\x80", b"a", b"b") == [0, 1, 2, 3]
    assert offsets(b"a", b"\xe2", b"\x82", b"\xac", b"b") == [0, 1, 1, 1, 2]
    assert offsets(b"\xe2", b"\x82", b"a", b"\xe2", b"\xe2") == [0, 0, 1, 2, 3]


def test_a_character_comes_whole() -> None:
    assert text_of([b"\xe2", b"\x82", b"\xacx"], [])[2] == ["", "", "€x", ""]
    assert text_of([b"\xe2", b"\x82"], [])[0] == "\ufffd"
    assert text_of([b"\xe2", b"\x82", b"\xac", b"!"], ["€".encode()]) == ("", True, ["", "", "", ""])


def test_no_two_ids_have_one_name() -> None:
    for codec in (BytesCodec(), BytesCodec(text=False), OffsetBytesCodec(6), train_bpe(["ab " * 50, "é" * 9], 262)):
        vocabulary = Vocabulary(codec)
        assert len(set(vocabulary.names)) == codec.vocab_size == len(vocabulary.bytes)
    assert Vocabulary(BytesCodec()).names[0xE2] == "bytes:\\xe2"
    assert Vocabulary(BytesCodec()).names[0] == "<|endoftext|>"


def test_text_and_ids_are_prompts() -> None:
    vocabulary = Vocabulary(BytesCodec())
    assert vocabulary.prompt_ids("ab").tolist() == [0, 97, 98]
    assert vocabulary.prompt_ids([97, 98]).tolist() == [97, 98]
    assert vocabulary.prompt_ids("").tolist() == [0]
    assert Vocabulary(OffsetBytesCodec(6)).prompt_ids("").tolist() == [0]
    assert vocabulary.tokenize("ab", start=False) == [97, 98]
    assert vocabulary.tokenize("ab", start=True) == [0, 97, 98]
    assert vocabulary.tokenize("<|endoftext|>", start=False) == [0]
    assert vocabulary.text([0, 97, 0xE2]) == "a\ufffd"
