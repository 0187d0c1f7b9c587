"""Piano music as ids, and ids as MIDI, sound and a picture.

Every codec here works on the notes of a piece (n, 4), in the form that `midi_file` defines.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from perceiver_ar.data.codec import Codec, importing, numbered
from perceiver_ar.data.midi_file import clean, read_midi, write_midi
from perceiver_ar.data.pictures import piano_roll, png_bytes
from perceiver_ar.data.sound import play_notes, wav_bytes
from perceiver_ar.errors import InputError
from perceiver_ar.files import atomic_path


class MusicCodec(Codec):
    """The common part of music codecs: MIDI in and out, and results as sound and pictures."""

    ending = ".mid"
    encodes_slowly = True

    def encode(self, data: bytes) -> np.ndarray:
        return self.encode_notes(read_midi(data))

    def decode(self, ids: ArrayLike) -> bytes:
        return write_midi(self.decode_notes(np.asarray(ids)))

    @abstractmethod
    def encode_notes(self, notes: np.ndarray) -> np.ndarray:
        """Notes -> ids (n,)."""

    @abstractmethod
    def decode_notes(self, ids: np.ndarray) -> np.ndarray:
        """Any ids -> notes (n, 4)."""

    def last_piece(self, ids: np.ndarray) -> np.ndarray:
        """What follows the last separator in ids (n,); without one, all of them."""
        ends = np.flatnonzero(ids == self.separator[0])
        return ids[ends[-1] + 1 :] if len(ends) else ids

    def seconds(self, ids: np.ndarray) -> float:
        """The time in seconds of the next event after ids (n,)."""
        return self.amounts(ids)["second"]

    def new_span(self, prompt: np.ndarray) -> tuple[float, float]:
        """The start and end in seconds of what is drawn after a prompt (n,)."""
        return self.seconds(prompt), np.inf

    def excerpt(self, ids: np.ndarray, start: float, end: float) -> bytes | None:
        """A MIDI file of what sounds between two times in seconds, the first above 0. None: nothing does."""
        notes = self.decode_notes(ids)
        notes = notes[(notes[:, 1] > start + 1e-6) & (notes[:, 0] < end)]
        times = np.maximum(notes[:, :2] - start, 0)
        return write_midi(np.concatenate([times, notes[:, 2:]], axis=1)) if len(notes) else None

    def results(
        self, rows: Sequence[np.ndarray], prompt_len: int, stem: str, *, soundfont: str | None = None, **_: Any
    ) -> Iterator[tuple[str, bytes]]:
        """STEM.mid, STEM.wav and STEM.png for each row; the picture is a piano roll with lines where what was drawn
        begins and ends. If a prompt was continued, STEM-continuation.mid has the music between them."""
        prompt = np.asarray(rows[0][:prompt_len])
        for number, ids in enumerate(rows, 1):
            name = numbered(stem, number, len(rows))
            ids = np.asarray(ids)
            notes, midi, (start, end) = self.decode_notes(ids), self.decode(ids), self.new_span(prompt)
            yield f"{name}.mid", midi
            if start > 0 and midi == self.decode(prompt):  # nothing new
                start = end = max(start, float(notes[:, 1].max(initial=0.0)))
            elif start > 0 and (new := self.excerpt(ids, start, end)) is not None:
                yield f"{name}-continuation.mid", new
            yield f"{name}.wav", wav_bytes(*play_notes(notes, midi, soundfont))
            yield f"{name}.png", png_bytes(piano_roll(notes, start, end))

    def result_names(self, stem: str, count: int) -> list[str]:
        midis = super().result_names(stem, count)
        others = (".wav", ".png", "-continuation.mid")
        return [*midis, *(name.removesuffix(".mid") + other for name in midis for other in others)]


def _sounding(pitches: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Which pitches sound after events (n,), in which a note of `pitches` starts (True) or ends: (128,) bool."""
    last = np.zeros((2, 128), dtype=np.int64)
    last[starts.astype(np.int64), pitches] = np.arange(1, len(pitches) + 1)  # the last assignment to an index stays
    return last[1] > last[0]


ON, OFF, SHIFT, VELOCITY, END = 0, 128, 256, 356, 388
"""First id of each kind: note on and note off by pitch, time shifts of 10 ms ... 1 s, 32 velocities, the separator."""
STEPS = 100  # per second


class PerformanceCodec(MusicCodec):
    """The 388 events of the performance literature, and a separator.

    128 note-on, 128 note-off, 100 time shifts (10 ms ... 1 s) and 32 velocity events, in the order of Oore et al. 2018
    (arXiv 1808.03715), which Music Transformer (arXiv 1809.04281) and the MAESTRO results of Perceiver AR use. Times
    are rounded to 10 ms, a velocity to the middle of its bin of four (126 for the last), and no note is shorter than
    10 ms. At one time note-offs come first, then note-ons, each by rising pitch; a velocity event stands before a
    note-on whose velocity differs from the last one.
    """

    name = "performance"
    vocab_size = END + 1
    separator = (END,)

    def encode_notes(self, notes: np.ndarray) -> np.ndarray:
        notes = notes.copy()
        on = np.rint(STEPS * notes[:, 0])
        notes[:, 0], notes[:, 1] = on, np.maximum(on + 1, np.rint(STEPS * notes[:, 1]))
        events = []  # sorted below: at the same time, ends come first
        for start, end, pitch, velocity in clean(notes).astype(np.int64).tolist():  # rounding may have made notes meet
            events += [(end, False, pitch, 0), (start, True, pitch, (velocity - 1) // 4)]
        ids: list[int] = []
        now, last = 0, -1
        for time, is_on, pitch, loudness in sorted(events):
            seconds, rest = divmod(time - now, STEPS)
            ids += [SHIFT + STEPS - 1] * seconds + ([SHIFT + rest - 1] if rest else [])
            now = time
            if is_on and loudness != last:
                last = loudness
                ids.append(VELOCITY + loudness)
            ids.append((ON if is_on else OFF) + pitch)
        return np.array(ids, dtype=self.dtype)

    def decode_notes(self, ids: np.ndarray) -> np.ndarray:
        """Events without effect (the end of a note that does not sound) are ignored. Notes that still sound at the end
        or at a separator end there. A note lasts at least 10 ms."""
        notes: list[tuple[int, int, int, int]] = []
        sounding: dict[int, int] = {}  # pitch -> which note
        now, velocity = 0, 64

        def end(pitch: int) -> None:
            if (which := sounding.pop(pitch, None)) is not None:
                start, _, _, loudness = notes[which]
                notes[which] = start, max(now, start + 1), pitch, loudness

        for event in [*ids.tolist(), END]:
            if event < OFF:
                end(event)
                sounding[event] = len(notes)
                notes.append((now, now + 1, event, velocity))
            elif event < SHIFT:
                end(event - OFF)
            elif event < VELOCITY:
                now += event - SHIFT + 1
            elif event < END:
                velocity = 4 * (event - VELOCITY) + 2
            else:
                for pitch in list(sounding):
                    end(pitch)
        return clean(np.array(notes, dtype=np.float64).reshape(-1, 4)) / [STEPS, STEPS, 1, 1]

    def allowed_next(self, ids: np.ndarray) -> np.ndarray:
        """A note may end only if it sounds, and start only if it does not. After a velocity, only a note may start."""
        ids = self.last_piece(np.asarray(ids))
        events = ids[ids < SHIFT]
        sounds = _sounding(events % OFF, events < OFF)
        allowed = np.ones(self.vocab_size, dtype=bool)
        allowed[ON:OFF], allowed[OFF:SHIFT] = ~sounds, sounds
        if len(ids) and VELOCITY <= ids[-1] < END and not sounds.all():
            allowed[OFF:] = False
        return allowed

    def augment(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Up to three semitones up or down, up to 5% faster or slower (Music Transformer, section 4.1), and up to one
        velocity bin louder or softer; never out of range."""
        ids = ids.astype(np.int64)
        semitones, loudness = random.integers(-3, 4), random.integers(-1, 2)
        stretch = random.choice([0.95, 0.975, 1.0, 1.025, 1.05])
        pitched = ids < SHIFT
        pitches = ids[pitched] % OFF
        if len(pitches):
            ids[pitched] += np.clip(semitones, -pitches.min(), 127 - pitches.max())
        shifts = (ids >= SHIFT) & (ids < VELOCITY)
        times = np.cumsum(ids[shifts] - SHIFT + 1)
        ids[shifts] = SHIFT - 1 + np.diff(np.rint(stretch * times), prepend=0).clip(1, STEPS).astype(np.int64)
        loud = (ids >= VELOCITY) & (ids < END)
        ids[loud] = (ids[loud] + loudness).clip(VELOCITY, END - 1)
        return ids

    def draw_bits(self, ids: np.ndarray, bits: np.ndarray, path: Path) -> None:
        """A piano roll: a note is darker the more bits it took, with the time shifts and the velocity before it."""
        ids = np.asarray(ids, dtype=np.int64)
        times = np.cumsum(np.where((ids >= SHIFT) & (ids < VELOCITY), ids - SHIFT + 1, 0))
        events = np.flatnonzero(ids < SHIFT)
        took = np.diff(np.cumsum(bits)[events], prepend=0.0)
        by_note = {(times[i], ids[i]): bits for i, bits in zip(events, took, strict=True) if ids[i] < OFF}
        notes = self.decode_notes(ids)
        notes[:, 3] = [by_note.get((round(STEPS * note[0]), round(note[2])), 0.0) for note in notes]
        most = max(1.0, float(notes[:, 3].max(initial=0.0)))
        notes[:, 3] *= 127 / most
        with atomic_path(path) as temporary:
            piano_roll(notes, label=f"darker: more bits, at most {most:.1f}").save(temporary)

    def amounts(self, ids: np.ndarray) -> dict[str, float]:
        """Notes are note-on events; seconds are the sum of the time shifts."""
        counts = np.bincount(np.asarray(ids), minlength=self.vocab_size)
        steps = counts[SHIFT:VELOCITY] @ np.arange(1, STEPS + 1)
        return {"note": float(counts[ON:OFF].sum()), "second": float(steps) / STEPS}


Kind = Literal["remi", "tsd", "midilike"]
RESOLUTION = {(0, 4): 25, (4, 16): 5}
"""Steps per beat, by length in beats: steps of 20 ms below two seconds, of 100 ms above."""


class MidiTokCodec(MusicCodec):
    """A tokenisation of MidiTok (Fradet et al. 2021, arXiv 2310.17202): REMI, TSD or MIDI-Like.

    Performances have no marked beats, so the tempo is always 120 beats per minute: a beat is half a second, a REMI bar
    two seconds. Starts are rounded to 20 ms and velocities to 32 levels. The last id separates
    pieces.
    """

    name = "miditok"
    saved = ("kind",)
    files = ("miditok.json",)
    miditok_settings: ClassVar[dict[str, Any]] = {
        "pitch_range": (0, 127),
        "beat_res": RESOLUTION,
        "num_velocities": 32,
        "special_tokens": ["PAD"],
        "use_time_signatures": False,
        "use_tempos": False,
        "use_pitchdrum_tokens": False,
        "encode_ids_split": "no",
    }

    def __init__(self, kind: Kind, tokenizer: Any = None) -> None:
        """tokenizer: an existing MidiTok tokenizer. Raises `InputError` if MidiTok is not installed."""
        with importing("midi"):
            import miditok
            import symusic  # noqa: F401
        self.kind: Kind = kind
        self.tokenizer = tokenizer or _tokenizer_class(kind)(miditok.TokenizerConfig(**self.miditok_settings))
        tokens = {index: token for token, index in self.tokenizer.vocab.items()}
        self.vocab_size = max(tokens) + 2
        self.separator = (self.vocab_size - 1,)
        self._types = np.array([tokens[i].split("_")[0] for i in range(self.vocab_size - 1)] + ["End"])
        starts = "NoteOn" if kind == "midilike" else "Pitch"
        self._is_note = self._types == starts
        self._pitch = np.full(self.vocab_size, -1)  # of each id; -1: none
        self._seconds = np.zeros(self.vocab_size)
        self._place = np.full(self.vocab_size, -1)  # of a Position in its bar
        for index, token in tokens.items():
            kind_of, value = token.split("_")
            if kind_of in ("Pitch", "NoteOn", "NoteOff"):
                self._pitch[index] = int(value)
            elif kind_of == "Bar":
                self._seconds[index] = 2.0
            elif kind_of == "Position":
                self._place[index] = int(value)
            elif kind_of == "TimeShift":
                beats, steps, per_beat = map(int, value.split("."))
                self._seconds[index] = (beats + steps / per_beat) / 2
        self._drums = -1  # the id whose notes keep their pitches; -1: none
        # Which ids `augment` changes, and by how much at most.
        self._variable = [(self._pitch >= 0, 3), (self._types == "Velocity", 1)]
        first = ["Bar"] if kind == "remi" else ["TimeShift", starts]
        self._follow = {"End": np.isin(self._types, first)}  # by the type of the last id
        for one, others in self.tokenizer.tokens_types_graph.items():
            names = others | ({"End"} if starts in others or "Bar" in others else set())
            self._follow[one] = np.isin(self._types, sorted(names - {"PAD"}))

    def encode_notes(self, notes: np.ndarray) -> np.ndarray:
        from symusic import Score

        ids = np.empty(0)
        for _ in range(2):  # rounding can make notes of a pitch overlap; `clean` then makes them meet
            [sequence] = self.tokenizer(Score.from_midi(write_midi(notes)))
            ids = np.array(sequence.ids, dtype=self.dtype)
            notes = self.decode_notes(ids)
        return ids

    def decode_notes(self, ids: np.ndarray) -> np.ndarray:
        from miditok import TokSequence

        known = ids[ids < self.vocab_size - 1]
        score = self.tokenizer.decode([TokSequence(ids=known.tolist())])
        notes = np.concatenate([np.empty((0, 4)), *map(track_notes, score.tracks)])
        length = notes[:, 1] - notes[:, 0]
        notes[:, 0] /= 2 * score.ticks_per_quarter
        notes[:, 1] = notes[:, 0] + length / (2 * score.ticks_per_quarter)
        return clean(notes)

    def seconds(self, ids: np.ndarray) -> float:
        """The sum of the time shifts; in REMI, the time of the last bar and position."""
        if self.kind != "remi":
            return super().seconds(ids)
        ids = np.asarray(ids, dtype=np.int64)
        bars = np.flatnonzero(self._types[ids] == "Bar")
        if len(bars) == 0:
            return 0.0
        place = max(0, int(self._place[ids[bars[-1] :]].max()))
        return 2.0 * (len(bars) - 1) + place / max(RESOLUTION.values()) / 2

    def allowed_next(self, ids: np.ndarray) -> np.ndarray:
        """The ids that MidiTok's graph of token types allows after the last one; a note may end only if it sounds."""
        follow = self._follow[str(self._types[ids[-1]]) if len(ids) else "End"]
        if self.kind != "midilike":
            return follow
        ids = self.last_piece(ids)
        events = ids[self._pitch[ids] >= 0]
        sounds = _sounding(self._pitch[events], self._is_note[events])
        about = sounds[self._pitch]
        return follow & np.where(self._is_note, ~about, (self._types != "NoteOff") | about)

    def augment(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Up to three semitones up or down, and up to one velocity louder or softer; never out of range."""
        ids = ids.astype(np.int64)
        of_drums = np.append(False, ids[:-1] == self._drums)
        for kind, most in self._variable:
            change = random.integers(-most, most + 1)
            moved = np.where(kind[ids] & ~of_drums, ids + change, ids).clip(0, self.vocab_size - 1)
            if (self._types[moved] == self._types[ids]).all():  # ids of a type are neighbours, in order
                ids = moved
        return ids

    def amounts(self, ids: np.ndarray) -> dict[str, float]:
        """Notes are Pitch or NoteOn tokens; seconds the sum of the time shifts, or of REMI's bars."""
        ids = np.asarray(ids, dtype=np.int64)
        return {"note": float(self._is_note[ids].sum()), "second": float(self._seconds[ids].sum())}

    def save(self, directory: Path) -> None:
        with atomic_path(directory / "miditok.json") as temporary:
            self.tokenizer.save(temporary)

    @classmethod
    def load(cls, directory: Path, settings: dict[str, Any]) -> "MidiTokCodec":
        with importing("midi"):
            import miditok  # noqa: F401
        path = directory / "miditok.json"
        try:
            tokenizer = _tokenizer_class(settings["kind"])(params=path)
        except Exception as error:  # MidiTok raises many kinds for damaged files
            reason = " ".join(str(error).split())
            raise InputError(f"cannot read {path} ({reason}); copy it again from the original run") from None
        return cls(settings["kind"], tokenizer)


def track_notes(track: Any) -> np.ndarray:
    """The notes (n, 4) of a symusic track, with times in ticks."""
    columns = track.notes.numpy()
    end = columns["time"] + np.maximum(columns["duration"], 1.0)
    return np.stack([columns["time"], end, columns["pitch"], columns["velocity"]], axis=1)


def _tokenizer_class(kind: Kind) -> Any:
    import miditok

    return {"remi": miditok.REMI, "tsd": miditok.TSD, "midilike": miditok.MIDILike}[kind]
