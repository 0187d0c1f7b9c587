"""Sound comes back up to the codec's steps; codebooks take turns; damage is one clear line.

The neural codecs are transformers' own classes, small and with random weights.
"""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from samples import RATE, TONE, recording

from perceiver_ar.data.audio import AudioCodec, MuLawCodec, NeuralCodec
from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.errors import InputError


def small(kind: str) -> NeuralCodec:
    from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

    torch.manual_seed(0)
    hop: Any = {"downsampling_ratios": [4, 8], "upsampling_ratios": [8, 4]}
    models: dict[str, Any] = {
        "encodec": lambda: EncodecModel(
            EncodecConfig(num_filters=4, hidden_size=16, codebook_dim=16, codebook_size=32, num_lstm_layers=1,
                          upsampling_ratios=[5, 4, 4], sampling_rate=8000, target_bandwidths=[1.5, 3.0])
        ),
        "dac": lambda: DacModel(
            DacConfig(encoder_hidden_size=8, decoder_hidden_size=32, n_codebooks=3, codebook_size=16,
                      sampling_rate=8000, **hop)
        ),
        "mimi": lambda: MimiModel(
            MimiConfig(num_filters=4, hidden_size=32, codebook_dim=16, vector_quantization_hidden_dimension=16,
                       upsample_groups=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                       head_dim=16, intermediate_size=32, num_quantizers=4, codebook_size=16)
        ),
    }  # fmt: skip
    return NeuralCodec(kind, models[kind]())  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["encodec", "dac", "mimi"])
def neural(request: pytest.FixtureRequest) -> NeuralCodec:
    return small(request.param)


# Mu-law.


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongModality, match=r"^x\.wav: no recording, or a damaged one"):
        list(MuLawCodec().encode_stream([recording(TONE)[:20]], "x.wav"))


@pytest.mark.parametrize("rate", [RATE, 2 * RATE, 44_100, 500_000])
def test_one_sample_is_a_recording(rate: int, tmp_path: Path) -> None:
    codec = MuLawCodec(RATE)
    ids = codec.encode(recording(np.array([0.5]), rate))
    assert len(ids) == 1 and codec.decode_samples(ids.astype(np.int64))[0] > 0.1
    prompt = np.append(codec.separator, ids)
    paths = codec.show([np.append(prompt, 500 * [128])], len(prompt), tmp_path, "x")
    assert [path.name for path in paths] == ["x-prompt.wav", "x.wav", "x.png"] and soundfile.info(paths[0]).frames == 1


@given(arrays.arrays(np.float64, st.integers(1, 200), elements=st.floats(-1, 1)))
def test_samples_come_back_up_to_the_mu_law(samples: np.ndarray) -> None:
    codec = MuLawCodec(RATE)
    back = codec.decode_samples(codec.encode_samples(samples).astype(np.int64))
    # A step is 2/255 of the compressed range, so the error grows with the sample: d = (1 + 255 |x|) ln 256 / 255 / 255.
    assert np.all(np.abs(back - samples) <= (1 + 255 * np.abs(samples)) * np.log(256) / 255 / 255 * 1.05)


def test_every_id_comes_back_through_a_file() -> None:
    codec = MuLawCodec(RATE)
    ids = np.random.default_rng(0).permutation(np.arange(256).repeat(3))
    assert codec.encode(codec.decode(ids)).tolist() == ids.tolist()


def test_mu_law_is_that_of_g711_at_its_ends() -> None:
    codec = MuLawCodec()
    assert codec.encode_samples(np.array([-1.0, 1.0, -2.0, 2.0])).tolist() == [0, 255, 0, 255]
    assert codec.decode_samples(np.array([0, 255])).tolist() == pytest.approx([-1, 1])


# Neural codecs.


def test_codebooks_are_interleaved_frame_by_frame_with_ids_of_their_own(neural: NeuralCodec) -> None:
    ids = neural.encode_samples(TONE)
    books = np.arange(len(ids)) % neural.codebooks
    assert len(ids) % neural.codebooks == 0 and (ids // neural.codebook_size == books).all()
    sound = torch.from_numpy(np.pad(TONE, (0, -len(TONE) % neural.hop)).astype(np.float32))[None, None]
    with torch.no_grad():
        if neural.kind == "encodec":
            expected = neural.model.encode(sound, bandwidth=3.0).audio_codes[0, 0]
        else:
            expected = neural.model.encode(sound).audio_codes[0]
    codes = (ids.astype(np.int64) - books * neural.codebook_size).reshape(-1, neural.codebooks).T
    assert codes.tolist() == expected[: neural.codebooks].tolist()


def test_what_the_codec_hears_is_what_its_model_reconstructs(neural: NeuralCodec) -> None:
    ids = neural.encode_samples(TONE).astype(np.int64)
    codes = torch.from_numpy((ids % neural.codebook_size).reshape(-1, neural.codebooks).T.copy())[None]
    with torch.no_grad():
        if neural.kind == "encodec":
            expected = neural.model.decode(codes[None], [None]).audio_values
        else:
            expected = neural.model.decode(audio_codes=codes).audio_values
    np.testing.assert_allclose(neural.decode_samples(ids), expected.reshape(-1).numpy().clip(-1, 1), atol=1e-6)
    assert 0 <= len(neural.decode_samples(ids)) - len(TONE) < neural.hop


def test_fewer_codebooks_are_the_first_ones(neural: NeuralCodec) -> None:
    two = NeuralCodec(neural.kind, neural.model, 2)
    all_codes = (neural.encode_samples(TONE) % neural.codebook_size).reshape(-1, neural.codebooks)
    assert (two.encode_samples(TONE) % two.codebook_size).reshape(-1, 2).tolist() == all_codes[:, :2].tolist()
    assert len(two.decode(two.encode_samples(TONE))) > 1000
    for wrong in (0, 99):
        with pytest.raises(InputError, match=f"data.codebooks is {wrong}"):
            NeuralCodec(neural.kind, neural.model, wrong)


def test_a_run_keeps_the_weights(neural: NeuralCodec, tmp_path: Path) -> None:
    save_codec(neural, tmp_path)
    again = load_codec(tmp_path)
    assert isinstance(again, NeuralCodec)
    assert again.encode_samples(TONE).tolist() == neural.encode_samples(TONE).tolist()


def test_a_run_without_its_weights_does_not_look_elsewhere(neural: NeuralCodec, tmp_path: Path) -> None:
    save_codec(neural, tmp_path)
    (tmp_path / "neural_codec").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="neural_codec does not exist: copy it again"):
        load_codec(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder, and the Hub gives no dac weights") as error:
        NeuralCodec.from_pretrained("dac", tmp_path / "nowhere")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "no numbers", "missing"])
def test_damaged_weights_in_a_run_are_named_and_nobody_asks_the_hub(
    neural: NeuralCodec, damage: str, tmp_path: Path
) -> None:
    save_codec(neural, tmp_path)
    weights = tmp_path / "neural_codec" / "model.safetensors"
    content = {"cut": weights.read_bytes()[:-100], "no numbers": b"no numbers" * 99, "missing": b""}[damage]
    weights.write_bytes(content)
    if damage == "missing":
        weights.unlink()
    with pytest.raises(InputError, match=rf"neural_codec: the {neural.kind} weights are missing or damaged") as error:
        load_codec(tmp_path)
    assert "\n" not in str(error.value) and "Hub" not in str(error.value)


@pytest.mark.parametrize("rate", [0, -1, 0.5, 8000.0, "8000", True, None])
def test_a_rate_is_a_whole_number_of_samples(rate: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sample_rate is {rate!r}: it must be")):
        MuLawCodec(rate)


# What may come next, and any ids at all.


def codecs(neural: NeuralCodec) -> list[AudioCodec]:
    return [neural, MuLawCodec(RATE)]


@given(data=st.data())
@settings(max_examples=15)
def test_any_ids_are_a_recording(neural: NeuralCodec, data: st.DataObject) -> None:
    for codec in codecs(neural):
        ids = data.draw(st.lists(st.integers(0, codec.vocab_size - 1), max_size=60))
        soundfile.read(io.BytesIO(codec.decode(ids)))


def test_codebooks_take_turns_whatever_is_drawn(neural: NeuralCodec) -> None:
    rng, row = np.random.default_rng(0), np.array(neural.separator)
    for _ in range(200):
        row = np.append(row, rng.choice(np.flatnonzero(neural.allowed_next(row))))
    place = 0
    for i in row[1:].tolist():
        if i == neural.separator[0]:
            assert place > 0 and place % neural.codebooks == 0
            place = 0
        else:
            assert i // neural.codebook_size == place % neural.codebooks
            place += 1
    frames = (row[1:] < neural.codebook_size).sum()
    assert neural.amounts(row)["second"] == pytest.approx(frames * neural.hop / neural.sample_rate)


def test_what_was_recorded_is_always_allowed(neural: NeuralCodec) -> None:
    for codec in codecs(neural):
        row = np.concatenate([codec.separator, codec.encode_samples(TONE)[:400], codec.separator]).astype(np.int64)
        for i in range(1, len(row) - 1):
            allowed = codec.allowed_next(row[:i])
            assert allowed is None or allowed[row[i]]
        assert codec.amounts(row)["second"] > 0


def test_results_are_files_to_hear_and_see(neural: NeuralCodec, tmp_path: Path) -> None:
    for codec in codecs(neural):
        ids = np.concatenate([codec.separator, codec.encode_samples(TONE)]).astype(np.int64)
        kept = 1 + (len(ids) // 2) // 4 * 4
        paths = codec.show([ids, ids], kept, tmp_path, codec.name)
        expected = ["-prompt.wav", "-1.wav", "-1.png", "-2.wav", "-2.png"]
        assert [path.name for path in paths] == [codec.name + ending for ending in expected]
        prompt, whole = (len(soundfile.read(path)[0]) for path in paths[:2])
        assert 0.3 * whole < prompt < 0.65 * whole
        nothing = codec.show([np.array(codec.separator)], 1, tmp_path, "nothing")
        assert [path.name for path in nothing] == ["nothing.wav", "nothing.png"]
