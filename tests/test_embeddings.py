"""Embeddings: the mean of the final latents of a document's tokens, each with as much context as there is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MODEL, assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import write_picture

from perceiver_ar import InputError, PerceiverAR
from perceiver_ar.cli import main
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import save_codec
from perceiver_ar.data.image import ImageCodec
from perceiver_ar.data.text import BytesCodec
from perceiver_ar.embeddings import embed

TEXTS = ["It was a dark and stormy night.\n" * 3, "ä", "A new day.\n"]


def network(codec: Codec) -> PerceiverAR:
    torch.manual_seed(0)
    return PerceiverAR(codec.fit(MODEL)).eval()


@settings(max_examples=20)
@given(st.integers(1, 90), st.integers(1, 8), st.integers(1, 4))
def test_it_is_the_mean_of_every_tokens_final_latent(n: int, stride: int, batch_size: int) -> None:
    model = network(BytesCodec()).double()
    x = torch.randint(256, (n,), generator=torch.Generator().manual_seed(n))
    latents = []
    first = 0
    with torch.no_grad():
        while first < n:  # the tokens first ... end - 1 are new latents of a window that ends with them
            end = min(n, max(first + stride, 8))
            start = max(0, end - 32)
            for i in range(first, end):
                latents.append(model.latents(x[None, start : i + 1], max(0, end - start - 8))[0, -1])
            first = end
    expected = torch.stack(latents).mean(0)
    found = embed(model, x, stride=stride, batch_size=batch_size)
    assert found.shape == (16,) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def make_run(path: Path, codec: Codec) -> Path:
    network(codec).save_pretrained(path)
    save_codec(codec, path)
    return path


@pytest.mark.parametrize("ending", [".npy", ".parquet", ".jsonl", ".csv"])
def test_every_document_has_a_vector_that_is_its_own(ending: str, tmp_path: Path) -> None:
    run, files = make_run(tmp_path / "run", BytesCodec()), []
    for number, text in enumerate(TEXTS):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(text)
    assert main(["embed", str(run), *map(str, files), "--out", str(tmp_path / f"x{ending}")]) == 0
    vectors = read(tmp_path / f"x{ending}", files)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = np.append(0, np.frombuffer(text.encode(), np.uint8))
        np.testing.assert_allclose(vector, embed(network(BytesCodec()), ids), atol=1e-6)


def read(path: Path, files: list[Path]) -> Any:
    if path.suffix == ".npy":
        return np.load(path)
    pandas = pytest.importorskip("pandas")
    if path.suffix == ".parquet":
        table = pandas.read_parquet(path)
    elif path.suffix == ".jsonl":
        table = pandas.read_json(path, lines=True)
    else:
        table = pandas.read_csv(path, converters={"embedding": lambda text: np.fromstring(text[1:-1], sep=",")})
    assert table["file"].tolist() == list(map(str, files)) and table["document"].tolist() == [0, 1, 2]
    return np.stack(table["embedding"].tolist())


def test_pictures_have_vectors(tmp_path: Path) -> None:
    codec = ImageCodec(6, 6)
    run = make_run(tmp_path / "run", codec)
    for number in range(2):
        write_picture(tmp_path / f"{number}.png", number)
    assert main(["embed", str(run), str(tmp_path / "*.png"), "--out", str(tmp_path / "x.npy")]) == 0
    one, other = np.load(tmp_path / "x.npy")
    ids = codec.encode((tmp_path / "0.png").read_bytes())[:-1]
    np.testing.assert_allclose(one, embed(network(codec), ids), atol=1e-6)
    assert np.abs(one - other).max() > 1e-3


def test_what_cannot_work_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network(BytesCodec())
    for tokens, message in (([], "shape"), ([[1]], "shape"), ([0.5], "type"), ([256], "there is no id"), ([-1], "id")):
        with pytest.raises(InputError, match=message):
            embed(model, np.array(tokens))
    run, file = make_run(tmp_path / "run", BytesCodec()), tmp_path / "a.txt"
    file.write_text("words")
    assert_refused(capsys, "embed", run, file, says="--out is missing")
    assert_refused(capsys, "embed", run, file, "--out", "x.txt", says="must end in .npy, .csv, .jsonl or .parquet")
    assert_refused(capsys, "embed", run, file, "--out", "x.npy", "--stride", "9", says="stride is 9")
    assert_refused(capsys, "embed", run, file, "--out", "x.npy", "--batch_size", "0", says="batch_size is 0")
