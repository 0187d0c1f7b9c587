"""Pictures come back exactly; every kind of file becomes the same size; damage is one clear line."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from perceiver_ar import PerceiverARConfig
from perceiver_ar.data.codec import WrongModality, load_codec, save_codec
from perceiver_ar.data.image import ImageCodec, choose_palette
from perceiver_ar.data.sources import find_files
from perceiver_ar.errors import InputError

RGB, GREY = ImageCodec(5, 7), ImageCodec(5, 7, "grey")
PALETTE = ImageCodec(5, 7, "palette", [[0, 0, 0], [200, 10, 10], [255, 255, 255]])
CODECS = {"rgb": RGB, "grey": GREY, "palette": PALETTE, "classes": ImageCodec(5, 7, "rgb", None, ["cat", "dog"])}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)

pixels = arrays.arrays(np.uint8, (5, 7, 3))


def file_of(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def picture_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


# Round trips.


@given(pixels)
def test_pictures_of_the_codecs_size_come_back_exactly(picture: np.ndarray) -> None:
    assert (picture_of(RGB.decode(RGB.encode(file_of(picture)))) == picture).all()
    assert RGB.encode(file_of(picture))[1:].tolist() == picture.reshape(-1).tolist()  # rows, columns, channels
    grey = picture[..., 0]
    assert (picture_of(GREY.decode(GREY.encode(file_of(grey)))) == grey).all()


@given(pixels)
def test_a_palette_gives_each_pixel_its_nearest_colour(picture: np.ndarray) -> None:
    assert PALETTE.palette is not None
    colours = PALETTE.palette.astype(float)
    distances = ((picture[..., None, :].astype(float) - colours) ** 2).sum(-1)
    back = picture_of(PALETTE.decode(PALETTE.encode(file_of(picture)))).astype(float)
    assert (((picture - back) ** 2).sum(-1) == distances.min(-1)).all()


@every_codec
@given(data=st.data())
@settings(max_examples=50)
def test_ids_of_pictures_come_back_exactly(codec: ImageCodec, data: st.DataObject) -> None:
    size = codec.document_length
    assert size is not None
    values = data.draw(arrays.arrays(np.int64, size - 1, elements=st.integers(0, codec.num_values - 1)))
    ids = [codec.num_values, *values.tolist()]
    assert codec.encode(codec.decode(ids)).tolist() == ids


@every_codec
@given(data=st.data())
@settings(max_examples=50)
def test_any_ids_are_a_picture(codec: ImageCodec, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, codec.vocab_size - 1), max_size=300))
    assert picture_of(codec.decode(ids)).shape[:2] == (5, 7)


@every_codec
def test_a_run_keeps_its_codec(codec: ImageCodec, tmp_path: Path) -> None:
    save_codec(codec, tmp_path)
    again = load_codec(tmp_path)
    assert again.settings() == codec.settings()
    assert again.vocab_size == codec.vocab_size and again.document_length == codec.document_length


# Kinds of files.

FLAT = np.full((8, 8), 200, np.uint8)
KINDS = {
    "1-bit PNG": (file_of(Image.fromarray(FLAT).convert("1", dither=Image.Dither.NONE)), [255, 255, 255]),
    "16-bit PNG": (file_of(Image.fromarray(FLAT.astype(np.uint16) * 257)), [200, 200, 200]),
    "grey with alpha": (file_of(Image.merge("LA", [Image.fromarray(FLAT), Image.new("L", (8, 8), 0)])), [255] * 3),
    "RGB with alpha": (file_of(Image.new("RGBA", (8, 8), (9, 8, 7, 255))), [9, 8, 7]),
    "palette PNG": (file_of(Image.new("RGB", (8, 8), (9, 8, 7)).quantize(4)), [9, 8, 7]),
    "CMYK JPEG": (file_of(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG"), [255, 0, 0]),
    "grey JPEG": (file_of(FLAT, "JPEG"), [200, 200, 200]),
    "WebP": (file_of(Image.new("RGB", (8, 8), (9, 8, 7)), "WEBP", lossless=True), [9, 8, 7]),
    "1 x 1 PNG": (file_of(Image.new("RGB", (1, 1), (9, 8, 7))), [9, 8, 7]),
    "1000 x 1 PNG": (file_of(Image.new("RGB", (1000, 1), (9, 8, 7))), [9, 8, 7]),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_is_read(name: str) -> None:
    data, colour = KINDS[name]
    picture = picture_of(RGB.decode(RGB.encode(data))).astype(int)
    assert np.abs(picture - colour).max() <= 2, picture[0, 0]


def test_a_picture_is_cut_at_its_middle_and_stands_upright() -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = [10, 20, 30]
    assert (ImageCodec(10, 10).pixels(ImageCodec(10, 10).encode(file_of(wide))) == [10, 20, 30]).all()
    turned = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2) * 50)
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    values = ImageCodec(2, 2, "grey").encode(file_of(turned, exif=exif))[1:]
    assert values.tolist() == [150, 100, 50, 0]


GOOD = file_of(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\xff\xfe" * 99, GOOD[:300], GOOD[:-200]], ids=range(5)
)
@every_codec
def test_a_damaged_picture_is_refused_in_one_line(codec: ImageCodec, data: bytes) -> None:
    with pytest.raises(WrongModality, match=r"^x\.png: no picture, or a damaged one") as error:
        list(codec.encode_stream([data], "x.png"))
    assert "\n" not in str(error.value)
    assert "object at" not in str(error.value)


def test_a_picture_of_enormous_size_is_refused() -> None:
    bomb = bytearray(GOOD)
    bomb[16:24] = (100_000).to_bytes(4) * 2  # rows and columns in the header
    with pytest.raises(WrongModality):
        RGB.encode(bytes(bomb))


# Palettes, classes, positions, what may come next.


def test_a_palette_suits_the_pictures_and_is_theirs_where_they_have_few_colours(tmp_path: Path) -> None:
    colours = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [255, 255, 255]], np.uint8)
    Image.fromarray(colours[np.random.default_rng(0).integers(4, size=(6, 6))]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"damaged")
    sources = find_files(tmp_path)
    assert sorted(choose_palette(sources, 6, 6, 16)) == sorted(colours.tolist())
    two = choose_palette(sources, 6, 6, 2)
    assert len(two) == 2 and sum(two[0]) < sum(two[1])
    for folder, colour in (("red", (250, 0, 0)), ("white", (255, 255, 255))):
        (tmp_path / folder).mkdir()
        for number in range(3):
            Image.new("RGB", (6, 6), colour).save(tmp_path / folder / f"{number}.png")
    folders = find_files([tmp_path / "red", tmp_path / "white"])
    assert choose_palette(folders, 6, 6, 16, most=2) == [[250, 0, 0], [255, 255, 255]]  # not the first folder alone
    with pytest.raises(InputError, match=r"b\.png: no picture, or a damaged one"):
        choose_palette(find_files(tmp_path / "b.png"), 6, 6, 2)
    with pytest.raises(InputError, match="no picture to choose a palette from"):
        choose_palette(find_files(str(tmp_path / "b.*")), 6, 6, 2)


def test_the_folder_is_the_class_and_a_prompt_names_it() -> None:
    codec = CODECS["classes"]
    starts = {
        where: next(iter(codec.encode_stream([GOOD], where)))[0] for where in ("x/cat/1.png", "x/dog/2.png", "x/3.png")
    }
    assert starts == {"x/cat/1.png": 257, "x/dog/2.png": 258, "x/3.png": 256}
    assert codec.start("dog").tolist() == [258] and codec.start().tolist() == [256]
    with pytest.raises(InputError, match="no class 'cow': give one of cat, dog"):
        codec.start("cow")
    with pytest.raises(InputError, match="trained without any"):
        RGB.start("cow")


def test_the_context_is_a_picture_and_positions_are_its_axes() -> None:
    config = RGB.fit(PerceiverARConfig())
    assert (config.context_length, config.num_latents, config.vocab_size) == (105, 105, 257)
    assert config.position_table == "learned" and config.index_dims == (5, 7, 3)
    assert GREY.fit(PerceiverARConfig()).index_dims == (5, 7)
    assert RGB.fit(config) == config
    assert RGB.fit(PerceiverARConfig(position_table="learned")).index_dims == ()  # flat, as asked for


@every_codec
def test_a_picture_starts_with_a_start_id_and_has_none_in_it(codec: ImageCodec) -> None:
    rng, ids = np.random.default_rng(0), np.empty(0, dtype=np.int64)
    assert codec.document_length is not None
    for place in range(2 * codec.document_length):
        ids = np.append(ids, rng.choice(np.flatnonzero(codec.allowed_next(ids))))
        assert (ids[-1] >= codec.num_values) == (place % codec.document_length == 0)
    assert codec.amounts(ids) == {"dimension": 2 * (codec.document_length - 1)}


@every_codec
def test_results_are_pictures_and_a_grid_of_them(codec: ImageCodec, tmp_path: Path) -> None:
    ids = codec.encode(GOOD).astype(np.int64)
    half = len(ids) // 2
    paths = codec.show([ids, ids[:-9]], half, tmp_path, "new", original=ids)
    assert [path.name for path in paths] == ["new-1.png", "new-2.png", "new-grid.png"]
    assert picture_of(paths[0].read_bytes()).shape[:2] == (5, 7)
    grid = picture_of(paths[2].read_bytes())
    scale = 160 // 7
    tiles = [grid[scale + scale // 2 :: scale, scale + scale // 2 + i * 8 * scale :: scale][:5, :7] for i in range(4)]
    assert (tiles[0] == codec.pixels(ids)).all() and (tiles[2] == tiles[0]).all()
    assert (tiles[1] == codec.pixels(ids[:half])).all() and (tiles[3] == codec.pixels(ids[:-9])).all()
