"""Compression: what comes out is what went in, or nothing; its size is what `evaluate` says."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_ar import InputError, PerceiverAR, PerceiverARConfig, Run, evaluate
from perceiver_ar.cli import main
from perceiver_ar.compression import HASH, HEADER, compress, decompress, exact_bytes, exact_ids, run_hash, surroundings
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import save_codec
from perceiver_ar.data.conditions import ConditionedCodec
from perceiver_ar.data.integers import IntegerCodec
from perceiver_ar.data.text import BytesCodec, OffsetBytesCodec, train_bpe

pytest.importorskip("constriction")

SOURCE = Path(__file__).read_bytes()
RANDOM = np.random.default_rng(0).bytes(300)
MIXED = SOURCE[:300] + b"\0\0" + RANDOM[:9] + "\ufffe\u20ac".encode() + SOURCE[-300:]
KINDS = ["source", "mixed", "random", "empty"]
BPE = train_bpe([SOURCE[:3000].decode()], 400)
CODECS: dict[str, Codec] = {
    "text": BytesCodec(),
    "bytes": BytesCodec(text=False),
    "offset": OffsetBytesCodec(6, 1),
    "bpe": BPE,
    "conditions": ConditionedCodec(BytesCodec(), {"kind": ["high", "low"], "note": 3}),
}


def make_run(path: Path, codec: Codec, seed: int = 0, **fields: Any) -> Run:
    torch.manual_seed(seed)
    config = PerceiverARConfig(
        context_length=8, num_latents=4, dim=16, num_layers=1, num_heads=2, logits_bias=True, **fields
    )
    model = PerceiverAR(codec.fit(config))
    with torch.no_grad():
        model.head.weight.normal_(std=0.2)  # probabilities that differ, around those of the source's ids
        ids = exact_ids(codec, SOURCE) if codec.writes_text else np.arange(codec.vocab_size)
        counts = np.bincount(ids, minlength=codec.vocab_size)
        model.head.bias.copy_(torch.from_numpy(np.log(counts + 0.1)))
    model.save_pretrained(path)
    save_codec(codec, path)
    return Run(path)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    ("data", "smaller"), [(SOURCE[:600], True), (MIXED, True), (RANDOM, False), (b"", False)], ids=KINDS
)
def test_any_bytes_come_back_and_none_become_much_more(name: str, data: bytes, smaller: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path, CODECS[name])
    packed = compress(run, data)
    assert decompress(run, packed) == data
    size = len(packed) - HEADER.size - HASH
    assert size < len(data) if smaller else size == len(data)


@pytest.mark.parametrize(
    "fields", [{"position_table": "learned"}, {"positions_from_end": True}, {"latents_per_position": 2}], ids=str
)
def test_any_network_can_compress(fields: dict[str, Any], tmp_path: Path) -> None:
    run = make_run(tmp_path, BPE, **fields)
    assert decompress(run, compress(run, SOURCE[:300])) == SOURCE[:300]


@settings(max_examples=50)
@given(st.binary(max_size=50) | st.text(max_size=30).map(lambda text: text.encode()))
def test_ids_stand_for_exactly_these_bytes(data: bytes) -> None:
    for codec in CODECS.values():
        assert exact_bytes(codec, exact_ids(codec, data).tolist()) == data


def test_text_keeps_its_tokens_around_what_is_no_text() -> None:
    ids = exact_ids(BPE, b"import os\n\xff\0import os\n").tolist()
    words = BPE.encode(b"import os\n").tolist()
    assert ids[: len(words)] == ids[-len(words) :] == words and len(ids) == 2 * len(words) + 2


@pytest.mark.parametrize("name", ["text", "bpe"])
def test_the_size_is_what_evaluate_says(name: str, tmp_path: Path) -> None:
    codec = CODECS[name]
    run, data = make_run(tmp_path, codec), SOURCE[:5000]
    code = 8 * (len(compress(run, data)) - HEADER.size - HASH)
    ids = np.append(codec.separator, exact_ids(codec, data))
    result = evaluate(run.model(), ids)
    assert code == pytest.approx(result.bits_per_token * result.tokens, rel=0.01)


def test_a_damaged_or_cut_file_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, BPE)
    whole = compress(run, SOURCE[:200])
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(InputError, match=r"damaged|no file that"):
            decompress(run, bytes(damaged))
    for length in range(len(whole)):
        with pytest.raises(InputError, match=r"damaged|no file that"):
            decompress(run, whole[:length])
    with pytest.raises(InputError, match="damaged"):
        decompress(run, whole + b"\0")


def test_it_is_refused_for_another_run_and_where_floating_point_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", BPE)
    packed = compress(run, SOURCE[:200])
    with pytest.raises(InputError, match="another model"):
        decompress(make_run(tmp_path / "other", BPE, seed=1), packed)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with pytest.raises(InputError, match=r"not the same are settings \(here .*MKL_CBWR=COMPATIBLE\)"):
        decompress(run, packed)


@pytest.mark.parametrize("seed", range(1, 4))
def test_other_probabilities_are_noticed_whatever_the_header_says(seed: int, tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run", BPE), make_run(tmp_path / "other", BPE, seed)
    body = compress(run, SOURCE[:300])[:-HASH].replace(run_hash(run, BPE), run_hash(other, BPE))
    with pytest.raises(InputError, match="does not decompress to what it was made from"):
        decompress(other, body + sha256(body).digest()[:HASH])


def test_the_number_of_threads_may_differ_and_the_instructions_of_the_processor_may_not(tmp_path: Path) -> None:
    run, packed = make_run(tmp_path / "run", BPE), tmp_path / "a.par"
    packed.write_bytes(compress(run, SOURCE[:200]))
    words = [sys.executable, "-m", "perceiver_ar", "decompress", str(run.path), str(packed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    assert subprocess.run(words, capture_output=True, env=environment).returncode == 0
    assert (tmp_path / "a").read_bytes() == SOURCE[:200]
    if surroundings()["instructions"] == "DEFAULT":
        return
    environment["ATEN_CPU_CAPABILITY"] = "default"
    refused = subprocess.run([*words, "--out", str(tmp_path / "b")], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and "instructions (here DEFAULT)" in refused.stderr
    assert not (tmp_path / "b").exists()


def test_the_command_restores_a_file_and_writes_over_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = make_run(tmp_path / "run", BPE).path, tmp_path / "a.py"
    file.write_bytes(SOURCE[:300])
    assert main(["compress", str(run), str(file)]) == 0
    packed = tmp_path / "a.py.par"
    assert f"{packed}: {packed.stat().st_size:,} bytes" in capsys.readouterr().out
    assert_refused(capsys, "compress", run, file, says="a.py.par already exists: give another --out")
    assert_refused(capsys, "decompress", run, packed, says="a.py already exists")
    assert_refused(capsys, "decompress", run, file, says="say with --out where to write")
    assert_refused(capsys, "decompress", run, file, "--out", tmp_path / "b", says="a.py: it is no file that")
    assert_refused(capsys, "compress", run, tmp_path / "none", says="no such file")
    assert_refused(capsys, "compress", run, tmp_path, says="is a folder")
    no_run = tmp_path / "no run"
    assert_refused(capsys, "compress", no_run, file, "--out", tmp_path / "c", says=f"ar: {no_run}: no such run")
    assert main(["decompress", str(run), str(packed), "--out", str(tmp_path / "b.py")]) == 0
    assert (tmp_path / "b.py").read_bytes() == SOURCE[:300]
    numbers = make_run(tmp_path / "numbers", IntegerCodec(40)).path
    assert_refused(capsys, "compress", numbers, file, "--out", tmp_path / "c", says="does not write bytes")
    assert not (tmp_path / "c").exists()
