"""Conditions: from a table to tokens in front of documents and of every window, and to what is generated."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from helpers import SMALL, assert_refused, content, write_files
from hypothesis import strategies as st
from reference import assert_close
from samples import write_music, write_picture

from perceiver_ar import InputError, PerceiverAR, PerceiverARConfig, Recipe, Run, evaluate
from perceiver_ar.card import write_card
from perceiver_ar.cli import main
from perceiver_ar.data.audio import MuLawCodec
from perceiver_ar.data.codec import Codec, parse_conditions
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.data.conditions import ConditionedCodec, ConditionTable
from perceiver_ar.data.genome import NucleotideCodec
from perceiver_ar.data.integers import IntegerCodec
from perceiver_ar.data.midi import PerformanceCodec
from perceiver_ar.data.sampler import TrainingWindows
from perceiver_ar.data.text import BytesCodec, OffsetBytesCodec, train_bpe
from perceiver_ar.data.token_files import TokenFile
from perceiver_ar.data.tokens import find_files, prepare_all
from perceiver_ar.embeddings import embed
from perceiver_ar.generation import generate, stream
from perceiver_ar.scores import score_documents
from perceiver_ar.training.batches import Batches

FIELDS = {"kind": ("high", "low"), "year": ("1812",)}
WITH_TEXT = {**FIELDS, "note": 4}
LETTERS, WORDS = "abXY", ("my", "é", "so")
ALPHABETS = {"low": "ab", "high": "XY"}
TABLE = "file,kind,year\n" + "".join(f"{i}.txt,{('low', 'high')[i % 2]},{'1812' if i < 2 else ''}\n" for i in range(12))
NOTES = "file,kind,year,note\n" + "".join(f"{line},é {i:x}\n" for i, line in enumerate(TABLE.splitlines()[1:]))
PLAIN: dict[str, Codec] = {
    "text": BytesCodec(),
    "bytes": BytesCodec(text=False),
    "offset": OffsetBytesCodec(6, 1),
    "bpe": train_bpe(["some text, some more text"], 270),
    "integers": IntegerCodec(40),
    "music": PerformanceCodec(),
    "sound": MuLawCodec(),
    "genome": NucleotideCodec(2),
}


def document(i: int) -> bytes:
    letters = ALPHABETS["low" if i % 2 == 0 else "high"].encode()
    return bytes(np.random.default_rng(i).choice(list(letters), 40 + i).tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {f"{i}.txt": document(i) for i in range(12)} | {"meta.csv": TABLE.encode()}
    return write_files(tmp_path_factory.mktemp("files"), files)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--data.conditions", str(folder / "meta.csv"), "--trainer.batch_size=8", "--max_steps=40"]
    assert main(["train", str(folder), "--out", str(out), *SMALL, *options, "--trainer.sample_tokens=40"]) == 0
    return out


@pytest.fixture(scope="module", params=["fields", "text"])
def codec(request: pytest.FixtureRequest) -> ConditionedCodec:
    return ConditionedCodec(BytesCodec(), FIELDS if request.param == "fields" else WITH_TEXT)


@pytest.fixture(scope="module")
def file(folder: Path, codec: ConditionedCodec, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    """All documents."""
    (folder / "notes.csv").write_text(NOTES)
    table = "notes.csv" if "note" in codec.conditions else "meta.csv"
    sources = ConditionTable.read(str(folder / table)).apply(find_files(sorted(folder.glob("*.txt"))), codec)
    return prepare_all(sources, codec, tmp_path_factory.mktemp("tokens") / "all")[0]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of a letter and dots, no two the same. The column `note` of `about.csv` names the letter."""
    files = {f"{i:02}.txt": f"0{i:06b}".replace("0", LETTERS[i % 4]).replace("1", ".").encode() for i in range(48)}
    lines = (f"{i:02}.txt,{WORDS[i % 3]} {LETTERS[i % 4]},{i % 2}\n" for i in range(48))
    return write_files(
        tmp_path_factory.mktemp("letters"), files | {"about.csv": f"file,note,odd\n{''.join(lines)}".encode()}
    )


@pytest.fixture(scope="module")
def told(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned from the free text which letter comes."""
    out = tmp_path_factory.mktemp("runs") / "told"
    options = ["--data.conditions", str(letters / "about.csv"), "--data.condition_text=note"]
    options += ["--trainer.batch_size=16", "--max_steps=50"]
    assert main(["train", str(letters), "--out", str(out), *SMALL, *options]) == 0
    return out


def drawn(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main(["generate", str(run), "--max_new_tokens=60", "--seed=1", "--temperature=0.5", *options]) == 0
    return capsys.readouterr().out.strip("\n")


def share(text: str, kind: str) -> float:
    return sum(letter in ALPHABETS[kind] for letter in text) / max(1, len(text))


# The codec


@pytest.mark.parametrize("name", PLAIN)
def test_a_conditioned_codec_is_the_plain_one_with_ids_that_stand_for_nothing(name: str, tmp_path: Path) -> None:
    plain = PLAIN[name]
    save_codec(ConditionedCodec(plain, FIELDS), tmp_path)
    codec = load_codec(tmp_path)
    assert isinstance(codec, ConditionedCodec) and type(codec.plain) is type(plain)
    assert codec.conditions == FIELDS and codec.vocab_size == plain.vocab_size + 5
    front = codec.condition_ids({"kind": "low"})
    assert front == [plain.vocab_size + 2, plain.vocab_size + 3]
    assert codec.start(conditions={"kind": "low"}).tolist() == [*plain.separator, *front]
    ids = np.arange(min(plain.vocab_size, 30))
    mixed = np.concatenate([front, ids, codec.unknown])
    assert codec.decode(mixed) == plain.decode(ids) and codec.file_of(b"a") == plain.file_of(b"a")
    assert codec.amounts(mixed) == plain.amounts(ids)
    assert codec.byte_lengths().tolist() == [*plain.byte_lengths().tolist(), 0, 0, 0, 0, 0]
    allowed = codec.allowed_next(np.array([*plain.separator, *front]))
    assert allowed.shape == (codec.vocab_size,) and not allowed[plain.vocab_size :].any()
    own = plain.allowed_next(np.array(plain.separator))
    assert (allowed[: plain.vocab_size] == (True if own is None else own)).all()
    if plain.writes_text:
        assert codec.encode(b"ACGTTA").tolist() == plain.encode(b"ACGTTA").tolist()
        assert codec.start("ACG", {}).tolist() == [*plain.separator, *codec.unknown, *plain.encode(b"ACG").tolist()]


TEXT = st.text(max_size=9)


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.sampled_from(["text", "bpe", "music"]), TEXT, st.sampled_from([{}, {"kind": "low"}]))
def test_a_free_text_is_a_fixed_number_of_bytes_after_the_fields(name: str, note: str, kind: dict[str, str]) -> None:
    codec = ConditionedCodec(PLAIN[name], {**FIELDS, "note": 36})
    ids = codec.condition_ids({**kind, "note": note})
    data, unknown = note.strip().encode(), codec.unknown[2]
    assert codec.vocab_size == unknown + 257 and codec.unknown[2:] == (unknown,) * 36
    fields = codec.condition_ids(kind)[:2]
    assert ids == [*fields, *(unknown + 1 + byte for byte in data), *[unknown] * (36 - len(data))]
    start = codec.start("", {**kind, "note": note})
    assert codec.conditions_of(np.append(start, [3, 4])) == ids
    assert codec.decode(start) == codec.plain.decode(codec.plain.start())
    assert not codec.byte_lengths()[unknown:].any() and not codec.allowed_next(start)[codec.first :].any()
    # Unknown texts are those without a byte.
    assert codec.condition_ids({"note": "\n "}) == codec.condition_ids({}) == list(codec.unknown)


def test_a_codec_keeps_the_name_and_the_length_of_its_free_text(tmp_path: Path) -> None:
    save_codec(ConditionedCodec(BytesCodec(), WITH_TEXT), tmp_path)
    assert json.loads((tmp_path / "codec.json").read_text())["conditions"]["note"] == 4
    codec = load_codec(tmp_path)
    assert codec.conditions == WITH_TEXT and codec.vocab_size == 262 + 256 and codec.dtype == np.uint16


@pytest.mark.parametrize("name", ["music", "genome"])
def test_augmented_windows_keep_their_conditions_where_they_are(name: str) -> None:
    plain = PLAIN[name]
    codec, random = ConditionedCodec(plain, FIELDS), np.random.default_rng(0)
    fixed = np.array([*plain.separator, *codec.condition_ids({"kind": "high"})])
    parts = [random.integers(0, plain.separator[0], 20) for _ in range(2)]
    ids = np.concatenate([parts[0], fixed, parts[1]])
    changed = [codec.augment(ids, np.random.default_rng(seed)) for seed in range(8)]
    assert all((new[20 : 20 + len(fixed)] == fixed).all() and (new < codec.first).sum() == 41 for new in changed)
    assert any((new != ids).any() for new in changed)
    random = np.random.default_rng(3)
    before, after = (plain.augment(part, random) for part in parts)
    expected = np.concatenate([before, fixed, after])
    assert codec.augment(ids, np.random.default_rng(3)).tolist() == expected.tolist()


def test_unknown_fields_and_values_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    codec = ConditionedCodec(BytesCodec(), FIELDS)
    with pytest.raises(InputError, match="no condition kind=lo: known are high, low"):
        codec.condition_ids({"kind": "lo"})
    with pytest.raises(InputError, match="no condition 'kin': known are kind, year"):
        codec.condition_ids({"kin": "low"})
    with pytest.raises(InputError, match="trained without any"):
        BytesCodec().condition_ids({"kind": "low"})
    assert parse_conditions(["a=b=c", "d= e"]) == {"a": "b=c", "d": " e"}
    for words, says in ((["kind"], "write KEY=VALUE"), (["kind=low", "kind=high"], "given twice")):
        with pytest.raises(InputError, match=says):
            parse_conditions(words)
    save_codec(codec, tmp_path)
    settings = json.loads((tmp_path / "codec.json").read_text())
    for wrong in ([], {"kind": 3.0}, {"kind": 0}, {"kind": 257}, {"kind": True}):
        (tmp_path / "codec.json").write_text(json.dumps(settings | {"conditions": wrong}))
        with pytest.raises(InputError, match=r"codec\.json is damaged"):
            load_codec(tmp_path)


# Token files and windows


def test_documents_begin_with_the_conditions_of_their_file(file: TokenFile, codec: ConditionedCodec) -> None:
    names = sorted(range(12), key=str)
    for i, start, stop in zip(names, file.bounds()[:-1], file.bounds()[1:], strict=True):
        kind = {"kind": "low" if i % 2 == 0 else "high"} | ({"year": "1812"} if i < 2 else {})
        kind |= {"note": f"é {i:x}"} if "note" in codec.conditions else {}
        assert file.tokens[start:stop].tolist() == codec.start(document(i).decode(), kind).tolist()
    assert file.num_bytes == sum(len(document(i)) for i in range(12))


def test_a_token_file_from_before_conditions_has_none(folder: Path, tmp_path: Path) -> None:
    prepare_all(find_files(folder / "1.txt"), BytesCodec(), tmp_path / "old")
    content = json.loads((tmp_path / "old.json").read_text())
    del content["conditions"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = TokenFile.open(tmp_path / "old")
    assert old.conditions == (0, 0) and TrainingWindows(old, 24, 8).num_conditions == 0
    content["conditions"] = [1]
    (tmp_path / "old.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"old\.json is damaged"):
        TokenFile.open(tmp_path / "old")


def in_front(file: TokenFile, start: int, stop: int) -> np.ndarray:
    """tokens[start:stop] as a context."""
    ids = file.tokens[start:stop].copy()
    begin = max(first for first in file.bounds() if first <= start)
    end = min(last for last in file.bounds() if last > start)
    if begin < start:
        fitting = min(file.conditions[1], end - start)
        ids[:fitting] = file.tokens[begin + 1 : begin + 1 + fitting]
    return ids


@pytest.mark.parametrize("cut", [0, 5, 14])
def test_every_training_window_begins_with_the_conditions_of_its_document(file: TokenFile, cut: int) -> None:
    windows = TrainingWindows(file, 24, 8, seed=3)
    batch, spans = windows.batch(0, 150, cut), windows.spans(0, 150)
    assert batch["tokens"].shape == (150, 24 - cut)
    for tokens, labels, (a, b) in zip(batch["tokens"].numpy(), batch["labels"].numpy(), spans, strict=True):
        expected = in_front(file, max(0, b - 1 - (24 - cut)), b - 1)
        assert tokens[len(tokens) - len(expected) :].tolist() == expected.tolist()
        assert labels[labels >= 0].tolist() == file.tokens[a:b].tolist()


def test_a_tenth_of_the_windows_has_no_conditions_and_another_tenth_not_all(file: TokenFile) -> None:
    codec = ConditionedCodec(BytesCodec(), {"kind": ("high", "low"), "year": ("1812",)})
    ids = np.array([257, 260, 5, 258, 260])
    lost = np.array([codec.forget(ids, np.random.default_rng(i)) != ids for i in range(3000)])
    assert not lost[:, 2].any() and (lost[:, 0] == lost[:, 3]).all() and (lost[:, 1] == lost[:, 4]).all()
    assert 0.11 < lost.all(axis=1, where=[True, True, False, True, True]).mean() < 0.14  # 0.1 + 0.1 / 4
    assert 0.16 < lost.any(axis=1).mean() < 0.19  # 0.1 + 0.1 * 3 / 4
    windows = TrainingWindows(file, 24, 8, seed=3, forget=codec.forget)
    some, plain = windows.batch(0, 200)["tokens"], TrainingWindows(file, 24, 8, seed=3).batch(0, 200)["tokens"]
    assert (some[70:73] == windows.batch(70, 3)["tokens"]).all()  # a function of the window's index
    changed = some != plain
    assert changed.any() and np.isin(some[changed].numpy(), codec.unknown).all() and (plain[changed] > 256).all()


def test_a_cut_prefix_leaves_room_for_the_conditions(file: TokenFile) -> None:
    windows = TrainingWindows(file, 24, 8, seed=3)
    recipe = Recipe.from_dict({"out": "x", "trainer": {"batch_size": 4, "short_prefix": 1.0}})
    batches = Batches(windows, recipe)
    assert {batches.cut(step, 0.5) for step in range(40)} == {
        4,
        8,
        min(12, 16 - windows.num_conditions),
        16 - windows.num_conditions,
    }


def test_a_free_text_is_forgotten_as_a_whole() -> None:
    codec = ConditionedCodec(BytesCodec(), WITH_TEXT)
    ids = np.array([*codec.condition_ids({"kind": "low", "year": "1812", "note": "so"}), 5])
    lost = np.array([codec.forget(ids, np.random.default_rng(i)) != ids for i in range(500)])
    assert (lost[:, 2] == lost[:, 3]).all() and lost[:, 2].any() and (lost[:, 1] & ~lost[:, 2]).any()
    assert not lost[:, 4:].any()  # what has no byte, and the document


# Evaluation


MODEL = PerceiverARConfig(vocab_size=261, context_length=16, num_latents=6, dim=16, num_layers=2, num_heads=2)


def random_model(**fields: Any) -> PerceiverAR:
    torch.manual_seed(0)
    model = PerceiverAR(MODEL.replace(**fields)).eval()
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)
    return model


def test_evaluation_scores_documents_alone_each_with_its_conditions_in_front(
    file: TokenFile, codec: ConditionedCodec
) -> None:
    model = random_model(vocab_size=codec.vocab_size)
    result = evaluate(model, file, stride=3, byte_lengths=codec.byte_lengths())
    nats, tokens, first = np.zeros(len(file)), 0, 1
    conditions = [start + place for start in file.bounds()[:-1] for place in range(1, 1 + len(codec.unknown))]
    while first < len(file):
        end = min(len(file), max(first + 3, 7))
        start = max(0, end - 1 - 16)
        ids = torch.from_numpy(in_front(file, start, end - 1).astype(np.int64))[None]
        with torch.no_grad():
            logits = model(ids, max(0, end - 1 - start - 6))[0].log_softmax(-1)
        for i in range(first, end):
            if i not in conditions:
                nats[i], tokens = -float(logits[i - end, file.tokens[i]]), tokens + 1
        first = end
    assert (
        (result.tokens, result.bytes) == (tokens, file.num_bytes) == (len(file) - 1 - len(conditions), file.num_bytes)
    )
    assert result.nats_per_token == pytest.approx(nats.sum() / tokens, rel=1e-5)
    scores = score_documents(model, codec, file, [str(i) for i in range(12)], stride=3)
    assert sum(row["tokens"] for row in scores.rows) == tokens
    assert sum(row["bits"] for row in scores.rows) == pytest.approx(nats.sum() / np.log(2), rel=1e-5)
    assert [row["bytes"] for row in scores.rows] == [len(document(i)) for i in sorted(range(12), key=str)]
    rows = list(scores.token_rows())
    assert b"".join(row["bytes"] for row in rows if row["document"] == 0) == document(0)


def test_the_windows_of_an_embedding_begin_with_the_conditions(file: TokenFile) -> None:
    model, ids = random_model(vocab_size=file.vocab_size), file.tokens[: file.bounds()[1]].astype(np.int64)
    total, first = torch.zeros(16), 0
    while first < len(ids):
        end = min(len(ids), max(first + 3, 6))
        start = max(0, end - 16)
        context = torch.from_numpy(in_front(file, start, end).astype(np.int64))[None]
        with torch.no_grad():
            total += model.latents(context, max(0, end - start - 6))[0, first - end :].sum(0)
        first = end
    assert_close(torch.from_numpy(embed(model, ids, pinned=ids[1 : 1 + file.conditions[1]])), total / len(ids), 1e-5)


# Generation


NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"local_context": 1}, 2),
    "local": ({"local_context": 4}, 12),
    "query": ({"latent_keys": "query", "local_context": 1}, 2),
    "table": ({"position_table": "learned"}, 2),
    "recomputing": ({"positions_from_end": True}, 2),
}


@pytest.mark.parametrize(("fields", "count"), NETWORKS.values(), ids=NETWORKS)
def test_every_step_is_one_forward_over_a_window_that_begins_with_the_pinned_ids(
    fields: dict[str, Any], count: int
) -> None:
    model, pinned = random_model(**fields), list(range(240, 240 + count))
    prompts = [[0, 257, 260, 5, 6], [0, 257, 260, *range(30)]]
    rows, moved = [list(prompt) for prompt in prompts], 0
    for step in stream(model, prompts, max_new_tokens=24, pinned=pinned, seed=0):
        for r, row in enumerate(rows):
            start = int(step.window_start[r])
            context = row[start:]
            if start > 0:
                context[:count] = pinned
                moved += 1
            with torch.no_grad():
                logits = model(torch.tensor([context]), len(context) - int(step.num_latents[r]))[0, -1]
            assert_close(step.logits[r], logits, 1e-4)
            row.append(int(step.tokens[r]))
    assert moved > 30


def test_pinned_ids_that_leave_no_room_are_refused() -> None:
    model = random_model()
    with pytest.raises(InputError, match="13 pinned ids"):
        next(iter(stream(model, [[0]], max_new_tokens=1, pinned=range(13))))
    next(iter(stream(model, [[0]], max_new_tokens=1, pinned=range(12))))
    with pytest.raises(InputError, match="slide"):
        stream(model, [[0]], max_new_tokens=1, pinned=[1], slide=True)
    with pytest.raises(InputError, match="pinned has id 261"):
        stream(model, [[0]], max_new_tokens=1, pinned=[261])


# A run


def test_what_is_generated_follows_its_condition(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for kind in ALPHABETS:
        text = drawn(run, capsys, f"--condition=kind={kind}", "--stop=Q")
        assert len(text) > 5 and share(text, kind) > 0.9
        text = drawn(run, capsys, f"--condition=kind={kind}", "--condition=year=1812", f"--prompt={ALPHABETS[kind]}")
        assert share(text, kind) > 0.9
        (tmp_path / "prompt.txt").write_text(ALPHABETS[kind])
        prompt = ("--prompt_file", str(tmp_path / "prompt.txt"), "--condition", "year=1812")
        assert drawn(run, capsys, f"--condition=kind={kind}", *prompt) == text
    text = drawn(run, capsys, "--seed=2")
    assert share(text, "low") + share(text, "high") > 0.9
    assert (run / "samples" / "step-000040.txt").read_text()


def test_ids_of_conditions_are_never_drawn(run: Path) -> None:
    model, codec = Run(run).model(), Run(run).codec()
    start, settings = codec.start().astype(np.int64), {"temperature": 1e6, "seed": 0}
    steps = stream(model, [start], max_new_tokens=60, num_samples=8, allowed_next=codec.constraint(), **settings)
    assert max(int(step.tokens.max()) for step in steps) < codec.plain.vocab_size


def test_a_free_text_says_what_is_generated_and_scored(
    told: Path, letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, codec = Run(told).model(), Run(told).codec()
    assert codec.conditions == {"odd": ("0", "1"), "note": 4}
    for letter in LETTERS:
        conditions = {"note": f"we {letter}"}  # a text that no document has
        text = drawn(told, capsys, f"--condition=note=we {letter}")
        pinned = codec.condition_ids(conditions)
        options = {"pinned": pinned, "allowed_next": codec.constraint(), "stop_tokens": [0], "seed": 1}
        start = np.array([0, *pinned])
        ids = generate(model, [start], 60, temperature=0.5, **options)[0].numpy()
        assert text == codec.decode(ids).decode() and letter in text and {*text} <= {letter, "."}
    new, bits = write_files(tmp_path, {"new.txt": b"aa.a..a"}), []
    for note in ("my a", "my X", ""):
        (new / "new.csv").write_text(f"file,odd,note\nnew.txt,0,{note}\n")
        capsys.readouterr()
        assert main(["evaluate", str(told), str(new / "new.txt"), "--conditions", str(new / "new.csv"), "--json"]) == 0
        bits.append(json.loads(capsys.readouterr().out)["bits_per_token"])
    right, wrong, unknown = bits
    assert right < min(wrong, unknown)
    argv = ["score", told, letters, "--conditions", letters / "about.csv"]
    assert main(list(map(str, argv))) == 0
    assert main(["info", str(told)]) == 0
    assert "odd: 0, 1; note: text of at most 4 bytes\n" in capsys.readouterr().out
    assert write_card(Run(told), "me/told")


def test_compressors_read_all_of_the_text_that_the_model_is_scored_on(
    told: Path, letters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Conditions are no text, but they stand among its tokens."""
    argv = ["evaluate", told, letters, "--conditions", letters / "about.csv", "--context_lengths=16,32"]
    capsys.readouterr()
    assert main(list(map(str, argv))) == 0
    shown = re.search(r"gzip +([\d.]+)", capsys.readouterr().out)
    text = b"".join(path.read_bytes() for path in sorted(letters.glob("*.txt")))[14:]  # but the first 32 tokens
    assert shown is not None and float(shown[1]) == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text), rel=0.03)


def test_a_fine_tuned_run_has_the_same_free_text(
    told: Path, letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", letters, "--init_from", told, "--max_steps=1", *SMALL[-7:-1]]
    table = ["--data.conditions", letters / "about.csv"]
    for name, options in (("without", []), ("with", [*table, "--data.condition_text=note"])):
        assert main([str(word) for word in (*argv, "--out", tmp_path / name, *options)]) == 0
        assert Run(tmp_path / name).codec().conditions == Run(told).codec().conditions
        tokens = TokenFile.open(tmp_path / name / "tokens" / "train").tokens
        assert (tokens[2] == Run(told).codec().unknown[1]) == (name == "without")
    assert main(["train", "--out", str(tmp_path / "with"), "--resume", "--max_steps=2"]) == 0
    wrong = [*argv, "--out", tmp_path / "new", *table, "--data.condition_text=odd"]
    assert_refused(capsys, *wrong, says="data.condition_text is 'odd' instead of 'note': leave out data.condition_text")
    (tmp_path / "long.csv").write_text(f"file,note\n{letters}/00.txt,\n{letters}/01.txt,a long one\n")
    wrong = [*argv, "--out", tmp_path / "new", "--data.conditions", tmp_path / "long.csv"]
    assert_refused(capsys, *wrong, says="01.txt: condition note has 10 bytes of text, of at most 4: shorten it")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data.condition_text=note"], "is 'note', a column of a table, but there is no table: give data.conditions"),
        (
            ["--data.conditions=table.csv", "--data.condition_text=title"],
            "has no text in a column 'title' for these files",
        ),
        (
            ["--data.conditions=table.csv", "--data.condition_text=note", "--model.context_length=24"],
            "note, up to 7 bytes, takes more than a quarter of the context_length 24: raise model.context_length to 28",
        ),
        (
            ["--data.conditions=long.csv", "--data.condition_text=note"],
            "row 2, 1.txt: condition note has 258 bytes of text, of at most 256: shorten it",
        ),
    ],
)
def test_a_wrong_free_text_is_refused_before_training(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, texts in (("table.csv", ("a waltz", "a march")), ("long.csv", ("x", "é" * 129))):
        (tmp_path / name).write_text("file,note\n" + "".join(f"{i}.txt,{text}\n" for i, text in enumerate(texts)))
    write_files(tmp_path, {f"{i}.txt": document(i) for i in range(2)})
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, "train", "0.txt", "1.txt", "--out", "run", *SMALL, *options, says=says)


def test_free_texts_that_cannot_be_are_refused(told: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = "condition note has 5 bytes of text, of at most 4: shorten it"
    assert_refused(capsys, "generate", told, "--condition", "note=my é", says=says)
    assert_refused(capsys, "generate", told, "--condition", "note=\udcff", says="note is not Unicode text")
    new = write_files(tmp_path, {"new.txt": b"aaa", "new.jsonl": b'{"file": "new.txt", "note": "a waltz"}'})
    table = ["--conditions", new / "new.jsonl"]
    for verb in (["evaluate"], ["score"], ["embed", "--out", new / "new.npy"]):
        says = "row 1, " + f"{new}/new.txt: condition note has 7 bytes of text, of at most 4: shorten it"
        assert_refused(capsys, verb[0], told, new / "new.txt", *verb[1:], *table, says=says)
    (new / "new.jsonl").write_text(r'{"file": "new.txt", "note": "\ud800"}')
    assert_refused(capsys, "evaluate", told, new / "new.txt", *table, says="row 1, ")
    assert_refused(capsys, "evaluate", told, "--context_lengths=8,32", says="no room for 5 tokens of conditions")


def test_info_lists_the_conditions(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["info", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conditions"] == {"kind": ["high", "low"], "year": ["1812"]}
    assert main(["info", str(run)]) == 0
    assert "kind: high, low; year: 1812\n" in capsys.readouterr().out


def test_new_files_are_scored_with_a_table_of_their_own(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bits(*options: object) -> float:
        capsys.readouterr()
        assert main(["evaluate", str(run), *map(str, options), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["bits_per_token"]

    new = write_files(tmp_path, {"new.txt": document(2)})
    for name, kind in (("right", "low"), ("wrong", "high")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"file": "new.txt", "kind": kind}))
    unknown = bits(new / "new.txt")
    assert bits(new / "new.txt", "--conditions", tmp_path / "right.jsonl") < unknown
    assert unknown < bits(new / "new.txt", "--conditions", tmp_path / "wrong.jsonl")
    assert main(["evaluate", str(run), str(new / "new.txt")]) == 0
    assert "conditions are unknown (kind, year)" in capsys.readouterr().err
    assert main(["score", str(run), str(folder), "--conditions", str(folder / "meta.csv")]) == 0  # not the table itself
    assert "documents        12" in capsys.readouterr().out
    argv = ["embed", run, new / "new.txt", "--conditions", tmp_path / "right.jsonl", "--out", tmp_path / "new.npy"]
    assert main(list(map(str, argv))) == 0
    assert_refused(capsys, "evaluate", run, "--conditions", folder / "meta.csv", says="--conditions is of files")


def test_resuming_needs_no_table_and_keeps_the_conditions(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = tmp_path / "run", tmp_path / "meta.tsv"
    lines = TABLE.replace(",", "\t").splitlines()
    table.write_text("\n".join([lines[0], *(f"{folder}/{line}" for line in lines[1:])]))
    argv = ["train", str(folder / "[0-9]*.txt"), "--out", str(out), *SMALL[:-1]]
    assert main([*argv, "--max_steps=2", "--data.conditions", str(table)]) == 0
    table.unlink()
    before = content(out)["codec.json"]
    assert main(["train", "--out", str(out), "--resume", "--max_steps=4"]) == 0
    assert content(out)["codec.json"] == before
    assert Run(out).codec().conditions == Run(run).codec().conditions


def test_a_run_that_starts_from_one_with_conditions_has_the_same(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", str(folder / "1*.txt"), "--init_from", str(run), "--max_steps=1", *SMALL[-7:-1]]
    capsys.readouterr()
    assert main([*argv, "--out", str(tmp_path / "without")]) == 0
    assert "conditions are unknown (kind, year)" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "with"), "--data.conditions", str(folder / "meta.csv")]) == 0
    for name, known in (("without", False), ("with", True)):
        assert Run(tmp_path / name).codec().conditions == Run(run).codec().conditions
        tokens = TokenFile.open(tmp_path / name / "tokens" / "train").tokens
        assert (tokens[1] == Run(run).codec().unknown[0]) != known
    other = write_files(tmp_path, {"other.csv": f"file,kind\n{folder}/1.txt,middle\n".encode()}) / "other.csv"
    refused = [*argv, "--out", tmp_path / "new", "--data.conditions", other]
    assert_refused(capsys, *refused, says="there is no condition kind=middle: known are high, low")


def test_a_run_without_conditions_refuses_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_model(vocab_size=256).save_pretrained(tmp_path)
    save_codec(BytesCodec(), tmp_path)
    says = "there is no condition 'kind': this run was trained without any"
    assert_refused(capsys, "generate", tmp_path, "--condition", "kind=low", says=says)
    table = ["--conditions", folder / "meta.csv"]
    says = "the run was trained without conditions"
    assert_refused(capsys, "evaluate", tmp_path, folder / "0.txt", *table, says=says)
    argv = ["train", folder, "--init_from", tmp_path, "--out", tmp_path / "new", "--max_steps=1", *SMALL[-7:-1]]
    assert_refused(capsys, *argv, "--data.conditions", table[1], says=says)


def test_what_does_not_work_with_conditions_is_refused(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "generate", run, "--ignore_end", says="--ignore_end begins documents without conditions")
    assert_refused(capsys, "generate", run, "--slide", says="--slide drops the conditions")
    assert_refused(capsys, "generate", run, "--condition", "low", says="write KEY=VALUE")
    table = ["--data.conditions", folder / "meta.csv", "--out", tmp_path / "run"]
    capsys.readouterr()
    assert main(["train", str(folder), *map(str, table), *SMALL, "--model.num_latents=31"]) == 2
    assert "data.conditions takes 2 of the context_length 32, and the latents 31 (1 b" in capsys.readouterr().err
    for number in range(2):
        write_picture(tmp_path / f"{number}.png", number)
    (tmp_path / "meta.csv").write_text("file,kind\n0.png,a\n")
    argv = ["train", tmp_path, "--data.conditions", tmp_path / "meta.csv", "--out", tmp_path / "run", *SMALL]
    assert_refused(capsys, *argv, says="data.conditions does not work with pictures")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("name,kind\n0.txt,a\n", "row 1, has no column 'file'"),
        ("file\n0.txt\n", "has no field with a value: give it columns beside 'file'"),
        ("file,kind\n0.txt,\n", "has no field with a value"),
        ("file,kind\n0.txt,a\n./0.txt,b\n", "row 2, names ./0.txt again, as row 1 does"),
        ("file,kind\n,a\n", "row 1, names no file"),
        ("file,kind\n9.txt,a\n", "says nothing of any of these files"),
        ("file,a=b\n0.txt,a\n", "has a column 'a=b'"),
        ("file,kind\n0.txt,a,b\n", "row 1, has 3 fields for 2 columns"),
        ('file,kind\n0.txt,"a\n', "is damaged"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_in_one_line(
    table: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_files(tmp_path, {f"{i}.txt": document(i) for i in range(3)} | {"meta.csv": table.encode()})
    argv = ["train", files, "--data.conditions", files / "meta.csv", "--out", tmp_path / "run", *SMALL]
    assert_refused(capsys, *argv, says=says)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_context_that_starts_with_the_last_token_of_a_document_leaves_the_next_one_its_conditions(
    file: TokenFile,
) -> None:
    border = file.bounds()[1]
    assert len(file.conditions_before(border - 1)) == 1 and len(file.conditions_before(border - 2)) == 2
    assert len(file.conditions_before(border - 20)) == file.conditions[1]


def test_a_row_of_ids_tells_its_conditions() -> None:
    codec = ConditionedCodec(BytesCodec(), FIELDS)
    for given in ({}, {"kind": "low"}, {"kind": "high", "year": "1812"}):
        assert codec.conditions_of(codec.start("Once", given)) == codec.condition_ids(given)
    for other in ([], [0], [5, 6, 7, 8], codec.condition_ids({})):
        assert codec.conditions_of(np.array(other)) == list(codec.unknown)
    assert BytesCodec().conditions_of(np.array([1, 2])) == []


def test_files_held_out_need_no_row_in_the_table(folder: Path, tmp_path: Path) -> None:
    table = ConditionTable.read(str(folder / "meta.csv"))
    codec = table.codec(BytesCodec(), find_files(sorted(folder.glob("*.txt"))))
    others = find_files([str(write_files(tmp_path, {"other.txt": b"x"}) / "other.txt")])
    assert table.apply(others, codec) == others


def test_a_damaged_list_of_values_is_refused(tmp_path: Path) -> None:
    save_codec(ConditionedCodec(BytesCodec(), FIELDS), tmp_path)
    content = json.loads((tmp_path / "codec.json").read_text())
    (tmp_path / "codec.json").write_text(json.dumps(content | {"conditions": {"kind": "xyz"}}))
    with pytest.raises(InputError, match=r"codec\.json is damaged \(conditions need lists"):
        load_codec(tmp_path)


def test_other_wrong_tables(tmp_path: Path) -> None:
    for name in ("0\0.txt", "0\ud800.txt"):
        (tmp_path / "name.jsonl").write_text(json.dumps({"file": name, "kind": "a"}))
        with pytest.raises(InputError, match=r"row 1, names a file '0.*txt', as no file can be named: write it again"):
            ConditionTable.read(str(tmp_path / "name.jsonl"))
    (tmp_path / "twice.csv").write_text("file,kind,kind\n0.txt,a,b\n")
    with pytest.raises(InputError, match="has two columns 'kind'"):
        ConditionTable.read(str(tmp_path / "twice.csv"))
    for name, says in (("no.csv", "does not exist"), ("meta.txt", "is no table"), ("..", "is no table")):
        with pytest.raises(InputError, match=says):
            ConditionTable.read(str(tmp_path / name))
    (tmp_path / "meta.jsonl").write_text('{"file": "0.txt", "kind": ["a"]}')
    with pytest.raises(InputError, match=r"row 1, column 'kind' holds \['a'\]"):
        ConditionTable.read(str(tmp_path / "meta.jsonl"))
    files = write_files(tmp_path, {f"{i}.txt": b"x" for i in range(1001)})
    lines = [f"{i}.txt,{i}" for i in range(1001)]
    (tmp_path / "meta.csv").write_text("\n".join(["file,title", *lines]))
    table, sources = ConditionTable.read(str(tmp_path / "meta.csv")), find_files(files.glob("*.txt"))
    says = "1,001 different values in the column 'title', of at most 1,000: if it is free text, set data.condition_text"
    with pytest.raises(InputError, match=says):
        table.codec(BytesCodec(), sources)
    assert table.codec(BytesCodec(), sources, "title").conditions == {"title": 4}
    titles = table.codec(BytesCodec(), sources[1:]).conditions["title"]
    assert isinstance(titles, tuple) and len(titles) == 1000


def test_a_table_may_be_of_any_format_beside_files_of_any_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("datasets")
    for number in range(4):
        write_music(tmp_path / f"{number}.mid", number)
    rows = {"file": [f"{i}.mid" for i in range(3)], "opus": [7, 8, None], "composer": ["bach", " bach ", ""]}
    pandas.DataFrame(rows).to_parquet(tmp_path / "meta.parquet")
    argv = ["train", str(tmp_path), "--data.conditions", str(tmp_path / "meta.parquet"), "--max_steps=2", *SMALL[:-1]]
    assert main([*argv, "--out", str(tmp_path / "run"), "--trainer.sample_tokens=20"]) == 0
    shown = capsys.readouterr().err
    assert f"1 of 4 files are not in {tmp_path}/meta.parquet, such as {tmp_path}/3.mid" in shown
    codec = Run(tmp_path / "run").codec()
    assert codec.conditions == {"opus": ("7", "8"), "composer": ("bach",)} and codec.name == "performance"
    out = ["--condition=composer=bach", "--max_new_tokens=20", "--out", str(tmp_path / "new")]
    assert main(["generate", str(tmp_path / "run"), "--prompt_file", str(tmp_path / "0.mid"), "--keep=10", *out]) == 0
    assert (tmp_path / "new.mid").exists()
