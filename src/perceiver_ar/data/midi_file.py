"""Standard MIDI files to the notes of a piece, and back.

    notes (n, 4) float64: start and end in seconds, pitch 0 ... 127, velocity 1 ... 127; sorted by start, then pitch;
    no pitch sounds twice at the same time

All tracks but drums become one; `read_parts` keeps instruments and drums apart. Events at the same tick act in file
order, one track after another.

*Releases.* The k-th release of a key ends its k-th stroke, as in symusic. (pretty_midi ends all strokes of the key at
its first release, which makes notes shorter than they were held.) A stroke has lost its release if the key
has fewer releases than strokes from then on. It lasts until the key is struck again or the track ends; the other
strokes keep their own releases. A release without a stroke is ignored.

*Pedal.* The sustain pedal becomes length: a note whose key is released while the pedal of its channel is down sounds
until the pedal goes up or the key is struck again (as in MAESTRO; Hawthorne et al. 2019, arXiv 1810.12247. But note_seq
applies pedals before the releases of the same tick, so a pedal that comes after a release lengthens its note). Tracks
share their channels; each port has channels of its own. The sostenuto and soft pedals are left out.

Files are read here because mido 1.3 refuses wrong track lengths and .rmi files, loses tracks beyond the header's count,
and has no times in frames; symusic 0.5.9 can end the process at a damaged file.
"""

import struct
from collections import defaultdict
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from perceiver_ar.data.codec import WrongModality

DRUMS = 9
"""The channel (counted from 0) of General MIDI whose pitches are drums."""
DRUM_KIT = -1
"""Stands for the program of drums."""
LONGEST = 24 * 3600.0
"""Maximum length of a piece in seconds; a longer file is damaged."""

NOTE_OFF, NOTE_ON, CONTROL, PROGRAM, TRACK_END = 0x80, 0x90, 0xB0, 0xC0, 0xFF
TEMPO, SIGNATURE = 0x51, 0x58
PEDAL, SOUND_OFF, RESET, NOTES_OFF = 64, 120, 121, (123, 124, 125, 126, 127)
"""Controllers. The pedal is down at 64 or more; a reset lifts it. Mode changes (124 ... 127) release keys, too."""
HEARD = frozenset({PEDAL, SOUND_OFF, RESET, *NOTES_OFF})


Event = tuple[int, int, int, int, int, int]
"""Tick, track, channel (plus 16 times the port), kind, pitch or controller, value.

The last two are, for a tempo, microseconds per quarter and 0; for a time signature, numerator and denominator.
"""


def read_midi(data: bytes) -> np.ndarray:
    """The notes (n, 4) of a standard MIDI file. Raises `WrongModality` if it is damaged, cut off, or without notes."""
    notes = read_parts(data).as_one()
    if len(notes) == 0:
        raise WrongModality("a MIDI file without notes")
    return notes


class Parts(NamedTuple):
    """What the tracks of a file play."""

    notes: np.ndarray
    """(n, 5) float64, n >= 1: start and end in ticks, pitch, velocity, program (0 ... 127, or DRUM_KIT)."""
    tempos: list[tuple[int, int]]
    """Sorted: tick, microseconds per quarter from there on."""
    signatures: list[tuple[int, int, int]]
    """Sorted: tick, numerator and denominator of the time signature from there on."""
    division: int
    """As in the header: ticks per quarter, or frames and ticks per frame."""

    def seconds(self, ticks: np.ndarray) -> np.ndarray:
        """Times in ticks -> times in seconds. Raises `WrongModality` if a tempo or the division is 0."""
        if self.division & 0x8000:  # frames per second, ticks per frame
            frames, per_frame = 256 - (self.division >> 8), self.division & 0xFF
            per_second, tempos = (30_000 / 1001 if frames == 29 else frames) * per_frame, []
        else:
            per_second, tempos = 2 * self.division, self.tempos
        if per_second == 0 or any(tempo == 0 for _, tempo in tempos):
            raise WrongModality("a damaged MIDI file: its tempo or division is 0")
        changes = np.array([0, *(tick for tick, _ in tempos)], dtype=np.float64)
        per_tick = np.array([1 / per_second, *(tempo / 1e6 / self.division for _, tempo in tempos)])
        before = np.append(0.0, np.cumsum(np.diff(changes) * per_tick[:-1]))
        part = np.searchsorted(changes, ticks, side="right") - 1
        return before[part] + (ticks - changes[part]) * per_tick[part]

    def as_one(self) -> np.ndarray:
        """The notes (n, 4) of all instruments but drums, in seconds."""
        notes = self.notes[self.notes[:, 4] != DRUM_KIT, :4]
        notes[:, :2] = self.seconds(notes[:, :2])
        return clean(notes)


def read_parts(data: bytes) -> Parts:
    """The parts of a standard MIDI file. Raises `WrongModality` if it is damaged, cut off, or without notes."""
    try:
        events, division = _events(data)
    except (IndexError, struct.error):
        raise WrongModality("a MIDI file that is cut off, or damaged") from None
    tempos = [(tick, number) for tick, _, _, kind, number, _ in events if kind == TEMPO]
    signatures = [(tick, number, value) for tick, _, _, kind, number, value in events if kind == SIGNATURE]
    parts = Parts(_sounding(events), tempos, signatures, division)
    ends = parts.seconds(parts.notes[:, 1])
    if len(ends) == 0:
        raise WrongModality("a MIDI file without notes")
    if (last := float(ends.max())) > LONGEST:
        raise WrongModality(f"a MIDI file of {last / 3600:,.0f} hours, which must be damaged")
    return parts


def _events(data: bytes) -> tuple[list[Event], int]:
    """The events of all tracks in order, and the division of the header.

    Tracks are searched to the end of the data, also between other chunks; the track count in the header is ignored.
    """
    riff = data[:4] == b"RIFF" and data[8:12] == b"RMID"  # .rmi: other chunks may come before the file
    at = data.find(b"MThd", 0, len(data) if riff else 256)
    if at < 0:
        raise WrongModality("no MIDI file")
    _, kind, _, division = struct.unpack_from(">IHHH", data, at + 4)
    tracks: list[list[Event]] = []
    while (at := data.find(b"MTrk", at)) >= 0:
        [size] = struct.unpack_from(">I", data, at + 4)
        start = tracks[-1][-1][0] if kind == 2 and tracks else 0  # format 2: one after another
        events, at = _read_track(data, at + 8, size, len(tracks), start)
        tracks.append(events)
    if not tracks:
        raise IndexError
    return sorted(chain.from_iterable(tracks), key=itemgetter(0)), division


def _read_track(data: bytes, at: int, size: int, track: int, tick: int) -> tuple[list[Event], int]:
    """The events of the track at `at`, which begins at `tick`, and its end in `data`.

    A track ends at its end-of-track event, whatever its `size`; without that event, after `size` bytes. If the recorder
    never filled in the `size`, it may end with the data. Raises IndexError if the track is cut off.
    """
    events: list[Event] = []
    start, port, running = at, 0, 0

    def length() -> int:
        nonlocal at
        value = 0
        for _ in range(4):
            value = value << 7 | data[at] & 0x7F
            at += 1
            if data[at - 1] < 0x80:
                return value
        raise WrongModality("a damaged MIDI file")

    def argument() -> int:
        nonlocal at
        while 0xF8 <= data[at] < 0xFF:  # real-time messages may come within others
            at += 1
        if data[at] > 127:
            raise WrongModality("a damaged MIDI file")
        at += 1
        return data[at - 1]

    try:
        while not (at >= start + size and (at == len(data) or data[at : at + 4] == b"MTrk")):
            tick += length()
            status = data[at]
            at += status >= 0x80
            if status == 0xFF:
                meta = data[at]
                at += 1
                end = length() + at
                content = data[at:end]
                if end > len(data):
                    raise IndexError
                at = end
                if meta == 0x2F:
                    break
                if meta == TEMPO and len(content) == 3:
                    events.append((tick, track, 0, TEMPO, int.from_bytes(content), 0))
                elif meta == SIGNATURE and len(content) == 4 and content[0] > 0 and content[1] < 8:
                    events.append((tick, track, 0, SIGNATURE, content[0], 1 << content[1]))
                elif meta == 0x21 and len(content) == 1:
                    port = content[0]
            elif status in (0xF0, 0xF7):  # system exclusive
                at = length() + at
            elif status > 0xF0:  # system common and real-time: no notes
                for _ in range({0xF1: 1, 0xF2: 2, 0xF3: 1}.get(status, 0)):
                    argument()
            else:
                running = status if status >= 0x80 else running
                kind, channel = running & 0xF0, running & 0x0F
                if running == 0:
                    raise WrongModality("a damaged MIDI file")
                number = argument()
                value = 0 if kind in (0xC0, 0xD0) else argument()
                if kind == NOTE_ON and value == 0:
                    kind = NOTE_OFF
                if kind in (NOTE_ON, NOTE_OFF, PROGRAM) or (kind == CONTROL and number in HEARD):
                    events.append((tick, track, 16 * port + channel, kind, number, value))
    except IndexError:
        if size not in (0, 0x7FFFFFFF, 0xFFFFFFFF):
            raise
        at = len(data)
    events.append((tick, track, 0, TRACK_END, 0, 0))
    return events, at


class _Key:
    """Strokes and releases of one key, of one channel and track. Times are places in the list of events."""

    def __init__(self) -> None:
        self.strokes: list[tuple[int, int, int]] = []  # place, velocity, program
        self.releases: list[int] = []
        self.held: list[int] = []  # numbers of unreleased strokes, if each release ended the newest

    def strike(self, place: int, velocity: int, program: int) -> None:
        self.held.append(len(self.strokes))
        self.strokes.append((place, velocity, program))

    def release(self, place: int) -> None:
        if self.held:
            self.held.pop()
            self.releases.append(place)

    def notes(self, pitch: int, end: int) -> list[tuple[int, int, int, int, int]]:
        """For each stroke: its place, that of its release, pitch, velocity, program. `end`: where the track ends."""
        lost, releases = set(self.held), iter(self.releases)
        return [
            (place, end if number in lost else next(releases), pitch, velocity, program)
            for number, (place, velocity, program) in enumerate(self.strokes)
        ]


def _sounding(events: list[Event]) -> np.ndarray:
    """Notes (n, 5) of `Parts`, with the pedal applied. `clean` then ends notes whose key is struck again."""
    keys: defaultdict[tuple[int, int, int], _Key] = defaultdict(_Key)  # by channel, track and pitch
    pedals: defaultdict[int, list[tuple[int, bool]]] = defaultdict(lambda: [(-1, False)])  # by channel: place, down?
    ends: dict[int, int] = {}  # of tracks
    programs: dict[int, int] = {}  # by channel
    for place, (_, track, channel, kind, number, value) in enumerate(events):
        if kind == NOTE_ON:
            program = DRUM_KIT if channel % 16 == DRUMS else programs.get(channel, 0)
            keys[channel, track, number].strike(place, value, program)
        elif kind == NOTE_OFF:
            keys[channel, track, number].release(place)
        elif kind == TRACK_END:
            ends[track] = place
        elif kind == PROGRAM:
            programs[channel] = number
        elif kind in (TEMPO, SIGNATURE):
            continue
        elif number == PEDAL:
            pedals[channel].append((place, value >= 64))
        elif number == RESET:
            pedals[channel].append((place, False))
        elif number == SOUND_OFF or number in NOTES_OFF:
            for key in (key for (of, _, _), key in keys.items() if of == channel):
                for _ in list(key.held):
                    key.release(place)
            if number == SOUND_OFF:
                pedals[channel] += [(place, False), (place, pedals[channel][-1][1])]
    times = np.array([event[0] for event in events], dtype=np.float64)
    parts: defaultdict[int, list[tuple[int, int, int, int, int]]] = defaultdict(list)  # by channel
    for (channel, track, pitch), key in keys.items():
        parts[channel] += key.notes(pitch, ends[track])
    notes: list[np.ndarray] = [np.empty((0, 5))]
    for channel, part in parts.items():
        start, end, pitch, velocity, program = np.array(part, dtype=np.int64).reshape(-1, 5).T
        end = _sustained(end, np.array(pedals[channel]))
        notes.append(np.stack([times[start], times[end], pitch, velocity, program], axis=1))
    return np.concatenate(notes)


def _sustained(releases: np.ndarray, pedal: np.ndarray) -> np.ndarray:
    """Places at which notes fall silent. A pedal that stays down ends at its channel's last release or pedal event."""
    places, down = pedal[:, 0], pedal[:, 1] > 0
    last = max(releases.max(initial=0), places[-1])
    up_from = np.minimum.accumulate(np.where(down, last, places)[::-1])[::-1]  # from each change on
    change = np.searchsorted(places, releases, side="left") - 1  # the last one before each release
    return np.where(down[change], up_from[change], releases)


def clean(notes: np.ndarray) -> np.ndarray:
    """Sorts notes and lets no pitch sound twice at the same time.

    Notes of the same pitch and start become one, with the longest length and the highest velocity. A note ends at the
    latest when its pitch starts again. Velocities are clipped to 1 ... 127.
    """
    notes = notes[np.lexsort((notes[:, 0], notes[:, 2]))]
    first = np.flatnonzero(np.any(np.diff(notes[:, [0, 2]], axis=0, prepend=-1) != 0, axis=1))
    end, velocity = (np.maximum.reduceat(notes[:, column], first) for column in (1, 3))
    start, pitch = notes[first, 0], notes[first, 2]
    end[:-1] = np.where(pitch[1:] == pitch[:-1], np.minimum(end[:-1], start[1:]), end[:-1])
    notes = np.stack([start, end, pitch, velocity.clip(1, 127)], axis=1)
    return notes[np.lexsort((pitch, start))]


def write_midi(notes: np.ndarray) -> bytes:
    """A MIDI file of one piano track; a tick is a millisecond."""
    times = np.rint(1000 * notes[:, :2]).astype(np.int64)
    times[:, 1] = np.maximum(times[:, 0] + 1, times[:, 1])
    events = []  # sorted below: at the same time, ends come first
    for (start, end), (pitch, velocity) in zip(times.tolist(), notes[:, 2:].astype(int).tolist(), strict=True):
        events += [(end, bytes([0x80, pitch, 0])), (start, bytes([0x90, pitch, velocity]))]
    track, now = bytearray(b"\x00\xff\x51\x03" + (500_000).to_bytes(3) + b"\x00\xc0\x00"), 0
    for time, event in sorted(events):
        track += _number(time - now) + event
        now = time
    track += b"\x00\xff\x2f\x00"
    return struct.pack(">4sIHHH4sI", b"MThd", 6, 0, 1, 500, b"MTrk", len(track)) + track


def _number(value: int) -> bytes:
    """MIDI's variable-length number: seven bits per byte; the eighth bit is set in all but the last byte."""
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(value & 0x7F | 0x80)
    return bytes(reversed(digits))
