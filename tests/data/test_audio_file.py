"""Recordings of every kind are read whole, also where lengths are missing or wrong; damage is one clear line."""

import io
from typing import Any

import numpy as np
import pytest
import soundfile
from samples import RATE, TONE, recording

from perceiver_ar.data.audio_file import read_audio
from perceiver_ar.data.codec import WrongModality


@pytest.mark.parametrize(
    ("kind", "options"),
    [("WAV", {}), ("WAV", {"subtype": "PCM_24"}), ("WAV", {"subtype": "FLOAT"}), ("FLAC", {}), ("OGG", {})],
)
def test_every_kind_of_recording_is_read(kind: str, options: dict[str, Any]) -> None:
    samples = read_audio(recording(TONE, kind=kind, **options), RATE)
    assert len(samples) == len(TONE) and np.abs(samples - TONE).max() < (0.1 if kind == "OGG" else 1e-4)


def test_channels_are_averaged_and_rates_converted() -> None:
    eight = np.stack([TONE] * 4 + [-TONE] * 3 + [TONE], axis=1)
    np.testing.assert_allclose(read_audio(recording(eight), RATE), TONE / 4, atol=1e-4)
    faster = read_audio(recording(TONE), 2 * RATE)
    assert abs(len(faster) - 2 * len(TONE)) <= 1
    assert abs(np.abs(np.fft.rfft(faster)).argmax() * 2 * RATE / len(faster) - 440) < 5


@pytest.mark.parametrize("scale", [-1.0, -1.01, -0.95])
def test_channels_that_cancel_each_other_are_not_silence(scale: float) -> None:
    samples = read_audio(recording(np.stack([0.9 * TONE, 0.9 * scale * TONE], axis=1)), RATE)
    np.testing.assert_allclose(np.abs(samples), 0.9 * max(1, -scale) * np.abs(TONE), atol=1e-3)
    silent = read_audio(recording(np.zeros((100, 2))), RATE)
    assert not silent.any()


@pytest.mark.parametrize("peak", [0.25, 1.0, 1.3, 100.0, 32768.0])
def test_floats_above_1_keep_their_shape(peak: float) -> None:
    samples = read_audio(recording(2 * TONE * peak, subtype="FLOAT"), RATE)
    np.testing.assert_allclose(samples, 2 * TONE * min(peak, 1) * max(1, 1 / np.abs(2 * TONE).max()), atol=1e-4)
    assert (np.abs(samples) > 0.99 * np.abs(samples).max()).mean() < 0.2  # not a square wave


def test_long_recordings_come_in_blocks_without_seams() -> None:
    tone = 0.5 * np.sin(np.arange(200_000) / 3)
    for kind in ("WAV", "FLAC", "OGG"):
        data = recording(tone, kind=kind)
        whole, _ = soundfile.read(io.BytesIO(data), dtype="float32")
        np.testing.assert_allclose(read_audio(data, RATE), whole, atol=1e-6)


def changed(content: bytes, **fields: tuple[int, bytes]) -> bytes:
    """A file with other bytes at some places."""
    for at, by in fields.values():
        content = content[:at] + by + content[at + len(by) :]
    return content


@pytest.mark.parametrize("rate", [1, 79, 10_000_001, 0x7FFFFFFF])
def test_a_rate_that_cannot_be_is_refused_and_takes_no_memory(rate: int) -> None:
    data = changed(recording(TONE), rate=(24, rate.to_bytes(4, "little")))
    with pytest.raises(WrongModality, match=rf"a recording of {rate:,} samples a second, .* must be damaged"):
        read_audio(data, RATE)


@pytest.mark.parametrize("rate", [80, 250, 192_000, 1_000_000])
def test_slow_and_fast_recordings_are_read(rate: int) -> None:
    assert len(read_audio(recording(TONE[:400], rate), RATE)) == pytest.approx(400 * RATE / rate, abs=1)


@pytest.mark.parametrize("riff", [b"\0\0\0\0", b"\x24\0\0\0", None])
def test_a_recorder_that_crashed_before_it_wrote_the_length_leaves_what_it_had(riff: bytes | None) -> None:
    whole = recording(TONE)
    crashed = changed(whole, data=(whole.index(b"data") + 4, bytes(4)), riff=(4, riff or whole[4:8]))
    assert read_audio(crashed, RATE).tolist() == read_audio(whole, RATE).tolist()
    silent = changed(crashed, samples=(whole.index(b"data") + 8, bytes(len(TONE))))
    assert len(read_audio(silent, RATE)) == len(TONE)
    long = recording(TONE, kind="RF64")
    crashed = changed(long, lengths=(long.index(b"ds64") + 8, bytes(24)))
    assert read_audio(crashed, RATE).tolist() == read_audio(long, RATE).tolist()


def test_an_empty_recording_with_notes_behind_it_is_empty() -> None:
    notes = b"LIST\x1a\0\0\0INFOINAM\x0e\0\0\0nothing at all"
    empty = recording(np.empty(0)) + notes
    empty = changed(empty, riff=(4, (len(empty) - 8).to_bytes(4, "little")))
    with pytest.raises(WrongModality, match="without samples"):
        read_audio(empty, RATE)


GOOD = recording(TONE)
not_a_number = recording(np.array([0.1, np.nan, 0.2]), subtype="FLOAT")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no recording, or a damaged one"),
        (b"hello" * 99, "no recording, or a damaged one"),
        (GOOD[:20], "no recording, or a damaged one"),
        (recording(np.empty(0)), "without samples"),
        (not_a_number, "a damaged recording"),
    ],
    # Named, because a float WAV holds the second it was written in: as part of a name, it differs between workers.
    ids=["empty", "no audio", "cut off", "no samples", "not a number"],
)
def test_a_damaged_recording_is_refused_in_one_line(data: bytes, says: str) -> None:
    with pytest.raises(WrongModality, match=says) as error:
        read_audio(data, RATE)
    assert "\n" not in str(error.value)


def without_table_of_contents(mp3: bytes) -> bytes:
    """Without the first frame, which says how long a file is."""
    assert b"Xing" in mp3[:200] or b"Info" in mp3[:200]
    return mp3[mp3.index(mp3[:2], 4) :]


LOUD = np.random.default_rng(0).normal(0, 0.2, 4 * RATE)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("parts", ["quiet loud", "loud quiet"])
def test_mp3_that_does_not_say_its_length_is_read_to_its_end(mode: str, parts: str) -> None:
    """libsndfile would estimate the length from the bit rate of the first frames."""
    samples = np.concatenate([LOUD if part == "loud" else LOUD / 1000 for part in parts.split()])
    whole = recording(samples, kind="MP3", bitrate_mode=mode, compression_level=0.1)
    seconds = [len(read_audio(data, RATE)) / RATE for data in (whole, without_table_of_contents(whole))]
    assert seconds[0] == 8.0 and 8.0 <= seconds[1] < 8.4


@pytest.mark.parametrize("tags", [b"", b"ID3\3\0\0\0\0\0\x0a" + bytes(10)])
def test_mp3_joined_from_several_is_read_to_its_end(tags: bytes) -> None:
    parts = [recording(samples, kind="MP3", bitrate_mode="VARIABLE") for samples in (LOUD, LOUD[:RATE])]
    joined = read_audio(tags + parts[0] + tags + parts[1], RATE)
    assert joined.tolist() == np.concatenate([read_audio(part, RATE) for part in parts]).tolist()


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_all_links_of_an_ogg_stream_are_read(subtype: str) -> None:
    rates = (RATE, 2 * RATE, RATE)
    links = [
        recording(LOUD[:size], rate, kind="OGG", subtype=subtype)
        for size, rate in zip((99, 9000, 800), rates, strict=True)
    ]
    joined = read_audio(b"".join(links), RATE)
    assert joined.tolist() == np.concatenate([read_audio(link, RATE) for link in links]).tolist()
    assert len(joined) > 5000


def test_flac_whose_writer_did_not_know_the_length_is_read_to_its_end() -> None:
    data = recording(LOUD, kind="FLAC")
    unknown = changed(data, total=(21, bytes([data[21] & 0xF0, 0, 0, 0, 0])))
    assert read_audio(unknown, RATE).tolist() == read_audio(data, RATE).tolist()
