"""Music of several instruments and drums as REMI+ tokens, and the infilling of its bars.

A document is a header and bars:

    Tempo Program ... Program    Bar TimeSig Position Program Pitch Velocity Duration ...    Bar TimeSig ...

The header has the tempo at the start and every instrument of the piece, by rising id. The bars are MidiTok's REMI with
programs, tempos and time signatures (REMI+, von Rütte et al. 2022, arXiv 2201.10936), without the tempo at the start.

A document whose bars i ... j are to be infilled has its bars in another order, as in fill-in-the-middle for text
(Bavarian et al. 2022, arXiv 2207.14255), with suffix first, so that the hole follows what comes before it:

    header SUFFIX bars after j    PREFIX bars before i    HOLE empty bars i ... j    MIDDLE bars i ... j

The empty bars are Bar, TimeSig and changes of tempo. So time is the same whatever comes into the hole.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import ArrayLike

from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.midi import Kind, MidiTokCodec, track_notes
from perceiver_ar.data.midi_file import DRUM_KIT, LONGEST, Parts, clean, read_parts, write_midi
from perceiver_ar.errors import require

SECTIONS = ("SUFFIX", "PREFIX", "HOLE", "MIDDLE")
MAX_INSTRUMENTS = 15
"""As many as have a channel of their own; drums have the sixteenth."""
LONGEST_HOLE = 8
"""Maximum number of bars that training takes out."""
PER_QUARTER = 480
"""Ticks of the files that `decode` writes."""


class RemiPlusCodec(MidiTokCodec):
    """Positions are twelfths of a beat, as are lengths up to four beats; longer ones, up to sixteen, are quarters.
    There are 32 velocities; tempos are whole numbers from 40 to 250. A time signature that the vocabulary lacks is left
    out. Tracks of one program become one."""

    name = "remi_plus"
    header_conditions = ("instruments", "tempo")
    miditok_settings: ClassVar[dict[str, Any]] = {
        **MidiTokCodec.miditok_settings,
        "beat_res": {(0, 4): 12, (4, 16): 4},  # sixteenths and triplets
        "special_tokens": ["PAD", *SECTIONS],
        "use_programs": True,
        "one_token_stream_for_programs": True,
        "use_tempos": True,
        "tempo_range": (40, 250),
        "num_tempos": 211,  # every whole number
        "delete_equal_successive_tempo_changes": True,
        "use_time_signatures": True,
        "time_signature_range": {2: [2, 3, 4], 4: [1, 2, 3, 4, 5, 6, 7], 8: [3, 5, 6, 7, 9, 12]},
        "delete_equal_successive_time_sig_changes": True,
        "remove_duplicated_notes": True,
    }

    def __init__(self, kind: Kind = "remi", tokenizer: Any = None) -> None:
        require(kind == "remi", f"REMI+ has no kind {kind!r}: use remi")
        super().__init__(kind, tokenizer)
        vocab = self.tokenizer.vocab
        self._division: int = self.tokenizer.time_division  # ticks per quarter in MidiTok
        self._sections = [vocab[f"{name}_None"] for name in SECTIONS]
        self._drums = vocab[f"Program_{DRUM_KIT}"]
        self._variable.append((self._types == "Tempo", 4))
        self._bar_ticks, self._place_ticks = np.zeros((2, self.vocab_size), dtype=np.int64)  # by TimeSig
        for token, index in vocab.items():
            kind_of, value = token.split("_")
            if kind_of == "TimeSig":
                beats, unit = map(int, value.split("/"))
                self._bar_ticks[index] = 4 * self._division * beats // unit
                self._place_ticks[index] = 4 * self._division // unit // 12
        for one in self._follow:
            self._follow[one] &= ~np.isin(self._types, SECTIONS)
            if one != "Bar":
                self._follow[one] &= self._types != "TimeSig"
        self._follow["TimeSig"] &= self._types != "Program"  # a Position comes first

    # Files.

    def encode(self, data: bytes) -> np.ndarray:
        parts = read_parts(data)
        instruments = len(np.unique(parts.notes[parts.notes[:, 4] != DRUM_KIT, 4]))
        if instruments > MAX_INSTRUMENTS:
            raise WrongModality(f"a MIDI file of {instruments} instruments; at most {MAX_INSTRUMENTS} have a channel")
        return self._ids(self._parts(self._ids(parts)))  # rounding can make notes overlap; decoding makes them meet

    def decode(self, ids: ArrayLike) -> bytes:
        return self._score(self._parts(np.asarray(ids))).dumps_midi()

    def encode_notes(self, notes: np.ndarray) -> np.ndarray:
        return self.encode(write_midi(notes))

    def decode_notes(self, ids: np.ndarray) -> np.ndarray:
        """All instruments as one, without the drums."""
        return self._parts(ids).as_one()

    def _score(self, parts: Parts) -> Any:
        """Parts -> a symusic Score. Raises `WrongModality` if it has more bars than a piece can have."""
        from miditok.constants import MIDI_INSTRUMENTS
        from symusic import Note, Score, Tempo, TimeSignature, Track

        def ticks(times: Any) -> np.ndarray:
            if parts.division & 0x8000:  # frames: no beats, so 120 a minute
                return np.rint(2 * PER_QUARTER * parts.seconds(np.asarray(times))).astype(np.int32)
            return np.rint(np.asarray(times) * (PER_QUARTER / parts.division)).astype(np.int32)

        last = parts.notes[:, 1].max(initial=0.0)
        if not parts.division & 0x8000 and last > 4 * LONGEST * parts.division:
            raise WrongModality(f"a MIDI file of {last / parts.division:,.0f} beats, which must be damaged")
        score = cast(Any, Score)(PER_QUARTER)
        known = set(self.tokenizer.time_signatures)
        tempos = () if parts.division & 0x8000 else parts.tempos  # frames have none
        score.tempos = [Tempo(int(ticks(at)), 6e7 / tempo) for at, tempo in tempos if at < last]
        score.time_signatures = [
            TimeSignature(int(ticks(at)), beats, unit)
            for at, beats, unit in parts.signatures
            if at < last and (beats, unit) in known
        ]
        for program in np.unique(parts.notes[:, 4]).astype(int).tolist():
            notes = clean(parts.notes[parts.notes[:, 4] == program, :4])
            starts, ends = ticks(notes[:, 0]), ticks(notes[:, 1])
            name = "Drums" if program == DRUM_KIT else MIDI_INSTRUMENTS[program]["name"]
            track: Any = Track(name, max(program, 0), program == DRUM_KIT)
            pitch, velocity = notes[:, 2:].astype(np.int8).T
            track.notes = Note.from_numpy(starts, np.maximum(ends - starts, 1), pitch.copy(), velocity.copy())
            score.tracks.append(track)
        return score

    def _ids(self, parts: Parts) -> np.ndarray:
        """The ids of a document: MidiTok's, which begin with Bar TimeSig Position Tempo, and the header."""
        ids = np.array(self.tokenizer(self._score(parts)).ids)
        programs = np.unique(ids[self._types[ids] == "Program"])
        rest = ids[4:] if len(ids) > 4 and self._types[ids[4]] != "Program" else np.append(ids[2], ids[4:])
        return np.concatenate([ids[3:4], programs, ids[:2], rest]).astype(self.dtype)

    def _parts(self, ids: np.ndarray) -> Parts:
        """Any ids -> what they play. No note sounds across an end of a hole."""
        from miditok import TokSequence

        plain, holes = self._plain(ids)
        score = self.tokenizer.decode(TokSequence(ids=plain.tolist()))
        notes = [np.empty((0, 5))]
        for track in score.tracks:
            part = track_notes(track)
            for edge in np.ravel(holes):
                part[(part[:, 0] < edge) & (part[:, 1] > edge), 1] = edge
            notes.append(np.insert(clean(part), 4, DRUM_KIT if track.is_drum else track.program, axis=1))
        tempos = sorted((tempo.time, round(tempo.mspq)) for tempo in score.tempos)
        signatures = sorted((one.time, one.numerator, one.denominator) for one in score.time_signatures)
        return Parts(np.concatenate(notes), tempos, signatures, self._division)

    # The order of bars.

    def _plain(self, ids: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """MidiTok's ids of a row, with all bars in their order, and start and end of every hole in ticks."""
        parts, holes, now = [np.empty(0, dtype=np.int64)], [], 0
        for document in np.split(ids, np.flatnonzero(ids == self.separator[0])):
            head, after, before, hole, middle = self._split(document[document != self.separator[0]].astype(np.int64))
            drawn = [bar[~np.isin(self._types[bar], ["Bar", "TimeSig", "Tempo"])] for bar in self._bars(middle)[1:]]
            empty = self._bars(hole)[1:]
            drawn += [np.empty(0, dtype=np.int64)] * len(empty)
            hole = np.concatenate([hole[:0], *(part for pair in zip(empty, drawn, strict=False) for part in pair)])
            start = now + self._ticks(head) + self._ticks(before)
            holes += [(start, start + self._ticks(hole))] if len(hole) else []
            whole = np.concatenate([head, before, hole, after])
            bars = np.flatnonzero(self._types[whole] == "Bar")
            if len(bars) and self._types[whole[0]] == "Tempo":
                first = min(bars[0] + 2, len(whole))  # after the bar's TimeSig
                whole = np.insert(whole, first, [np.argmax(self._place == 0), whole[0]])[1:]
            parts.append(whole)
            now += self._ticks(whole)
        return np.concatenate(parts), holes

    def _split(self, document: np.ndarray) -> list[np.ndarray]:
        """Header, after, before, hole and middle; a document in order is all header."""
        at = [int(found[0]) if len(found := np.flatnonzero(document == one)) else -1 for one in self._sections]
        edges = [-1, *at, len(document)]
        if not all(a < b for a, b in pairwise(edges)):
            edges = [-1, *[len(document)] * 5]
        return [(part := document[a + 1 : b])[~np.isin(part, self._sections)] for a, b in pairwise(edges)]

    def _bars(self, ids: np.ndarray) -> list[np.ndarray]:
        """What precedes the first bar, then the bars."""
        return np.split(ids, np.flatnonzero(self._types[ids] == "Bar"))

    def _ticks(self, ids: np.ndarray) -> int:
        """The length of the bars in ids (n,)."""
        lengths, last = 0, self._division * 4
        for bar in self._bars(ids)[1:]:
            last = int(self._bar_ticks[bar[1]]) if len(bar) > 1 and self._bar_ticks[bar[1]] else last
            lengths += last
        return lengths

    def _arranged(self, head: np.ndarray, before: np.ndarray, hole: np.ndarray, after: np.ndarray) -> list[np.ndarray]:
        """The ids of a document whose `hole` is to be infilled, up to MIDDLE, and those of the hole without tempos."""
        types = self._types[hole]
        tempo, position = types == "Tempo", types == "Position"
        of_tempo, of_note = np.append(tempo[1:], False), np.append(types[1:] == "Program", False)
        of_note |= of_tempo & np.append(of_note[1:], False)
        empty = hole[(types == "Bar") | (types == "TimeSig") | tempo | (position & of_tempo)]
        suffix, prefix, before_hole, middle = ([one] for one in self._sections)
        row = np.concatenate([head, suffix, after, prefix, before, before_hole, empty, middle]).astype(np.int64)
        return [row, hole[~tempo & (~position | of_note)]]

    def infill(self, ids: np.ndarray, first: int, last: int, room: int) -> tuple[np.ndarray, np.ndarray, int]:
        bars = self._bars(ids[len(self.separator) :].astype(np.int64))
        count = len(bars) - 1
        require(
            2 <= first <= last < count,
            f"infill is {first}:{last}, but the piece has bars 1 to {count}: give FIRST:LAST in them, with at least "
            "one bar before and one after",
        )
        head = np.append(self.separator, bars[0]).astype(np.int64)
        before, hole, after = (np.concatenate(bars[a:b]) for a, b in pairwise((1, first, last + 1, len(bars))))
        whole, _ = self._arranged(head, before, hole, after)
        most = 2 * max(len(hole), (last - first + 1) * len(ids) // count)  # of a denser hole than the piece has
        left = room - min(most, room // 2) - (len(whole) - len(head) - len(before) - len(after))
        require(left > 0, f"infill is {first}:{last}, and these bars do not fit into the {room} tokens of the context")
        if len(head) + len(before) + len(after) > left:  # what is nearest to the hole
            after = after[: max(left // 2, left - len(before) - len(head))]
            if len(head) + len(before) + len(after) > left:
                near = self._bars(before[len(before) - max(0, left - len(head) - len(after)) :])[1:]
                before = np.concatenate([head[:0], *near])
        return whole, self._arranged(head, before, hole, after)[0], most

    def header_ids(self, conditions: Mapping[str, str]) -> list[int]:
        values = {key: value for key, value in conditions.items() if key in self.header_conditions}
        if not values:
            return []
        vocab, tempo = self.tokenizer.vocab, values.get("tempo", "120")
        require(
            tempo.isdecimal() and f"Tempo_{int(tempo)}.0" in vocab,
            f"condition tempo={tempo}: give a whole number of beats a minute, 40 ... 250",
        )
        ids = [vocab[f"Tempo_{int(tempo)}.0"]]
        if "instruments" in values:
            names = {name.strip() for name in values["instruments"].split(",")}
            programs = names - {"drums"}
            for name in programs:
                require(
                    name.isdecimal() and int(name) < 128,
                    f"condition instruments: {name!r} is no instrument: give General MIDI programs 0 ... 127 and "
                    "drums, such as 0,33,drums",
                )
            require(
                len(programs) <= MAX_INSTRUMENTS,
                f"condition instruments: {len(programs)} instruments: give at most {MAX_INSTRUMENTS} and drums",
            )
            ids += sorted({self._drums if name == "drums" else vocab[f"Program_{int(name)}"] for name in names})
            ids += [vocab["Bar_None"]]  # no more instruments
        return ids

    # Training and generation.

    def allowed_next(self, ids: np.ndarray) -> np.ndarray:
        """What REMI+ allows: instruments of the header only, positions that rise within the bar, and an infill of as
        many bars as are empty, with their time signatures."""
        ids = np.asarray(ids)
        row, begun = self.last_piece(ids), self.separator[0] in ids
        types = self._types[row]
        every, bars = self._types, np.flatnonzero(types == "Bar")
        last = str(types[-1]) if len(row) else "End"
        begins = np.flatnonzero((types == "Bar") | (row == self._sections[0]))
        instruments = row[: begins[0] if len(begins) else None]
        instruments = instruments[self._types[instruments] == "Program"]
        if begun and len(begins) == 0:
            if last == "End":
                return every == "Tempo"
            more = (every == "Program") & (np.arange(self.vocab_size) > instruments.max(initial=-1))
            full = (instruments != self._drums).sum() >= MAX_INSTRUMENTS
            return (more & (not full)) | ((every == "Bar") & (len(instruments) > 0))
        allowed = (every == "Bar") if last in SECTIONS else self._follow[last].copy()
        if len(bars):
            bar = row[bars[-1] :]
            length = self._bar_ticks[bar].max() // self._place_ticks[bar].max(initial=1)
            allowed &= (self._place < 0) | ((self._place > self._place[bar].max()) & (self._place < length))
        if begun:
            allowed &= (every != "Program") | np.isin(np.arange(self.vocab_size), instruments)
        middles = np.flatnonzero(row == self._sections[3])
        if len(middles):
            hole = self._split(row)[3]
            signatures = hole[self._types[hole] == "TimeSig"]
            done = int((types[middles[-1] :] == "Bar").sum())
            if last == "Bar" and done <= len(signatures):
                return np.arange(self.vocab_size) == signatures[done - 1]
            allowed &= (every != "Tempo") & ((every != "Bar") | (done < len(signatures)))
            allowed &= (every != "End") | (done >= len(signatures))
        return allowed

    def augment(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Up to three semitones up or down, one velocity louder or softer, and four beats a minute faster or slower,
        never out of range; drums keep their pitches. In half of the windows some bars of the last document are put at
        the end, to be infilled; as many tokens as this adds are dropped from the end of what follows them."""
        ids = super().augment(ids, random)
        start = len(ids) - len(self.last_piece(ids))
        bars = self._bars(ids[start:])
        if random.random() < 0.5 or len(bars) < 4:  # the last one may be cut
            return ids
        first = int(random.integers(2, len(bars) - 1))
        last = int(random.integers(first, min(first + LONGEST_HOLE, len(bars) - 1)))
        head = np.append(ids[:start], bars[0])
        before, hole, after = (np.concatenate(bars[a:b]) for a, b in pairwise((1, first, last + 1, len(bars))))
        row, middle = self._arranged(head, before, hole, after)
        excess = len(row) + len(middle) + 1 - len(ids)
        if excess >= len(after):
            return ids
        row, _ = self._arranged(head, before, hole, after[: len(after) - excess])
        return np.concatenate([row, middle, self.separator])

    def amounts(self, ids: np.ndarray) -> dict[str, float]:
        types = self._types[np.asarray(ids, dtype=np.int64)]
        return {"note": float((types == "Pitch").sum()), "bar": float((types == "Bar").sum())}

    # Results.

    def seconds(self, ids: np.ndarray) -> float:
        """The time of the last bar and position."""
        *bars, last = self._bars(self._plain(ids)[0])
        if not bars:
            return 0.0
        place = max(0, self._place[last].max() * self._place_ticks[last].max())
        return float(self._parts(ids).seconds(np.array(self._ticks(np.concatenate(bars)) + place)))

    def new_span(self, prompt: np.ndarray) -> tuple[float, float]:
        if not (holes := self._plain(prompt)[1]):
            return super().new_span(prompt)
        start, end = self._parts(prompt).seconds(np.array(holes[-1])).tolist()
        return start, end

    def excerpt(self, ids: np.ndarray, start: float, end: float) -> bytes | None:
        """From the start of the bar on in which `start` is."""
        parts = self._parts(ids)
        starts, ends = parts.seconds(parts.notes[:, :2]).T
        new = parts.notes[(ends > start + 1e-6) & (starts < end - 1e-6)]
        if len(new) == 0:
            return None
        tick = int(np.searchsorted(parts.seconds(np.arange(new[:, 1].max() + 1)), start - 1e-6))
        at, beats, unit = max([(0, 4, 4), *(one for one in parts.signatures if one[0] <= tick)])
        tick -= (tick - at) % (4 * parts.division * beats // unit)
        new[:, :2] = np.maximum(new[:, :2] - tick, 0)
        tempos = {max(0, at - tick): tempo for at, tempo in parts.tempos}
        signatures = {max(0, at - tick): (beats, unit) for at, beats, unit in parts.signatures}
        moved = Parts(new, [*tempos.items()], [(at, *one) for at, one in signatures.items()], parts.division)
        return self._score(moved).dumps_midi()
