"""Pictures come back exactly; every kind of file becomes the same size; damage is one clear line."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps

from perceiver_ar import DataConfig, PerceiverARConfig
from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.data.image import ImageCodec, choose_palette, read_image
from perceiver_ar.data.modalities import make_codec
from perceiver_ar.data.sources import find_files
from perceiver_ar.data.tokens import prepare
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


def png(bits: int, colour_type: int, row: bytes, clear: bytes) -> bytes:
    """A PNG of one row whose transparent colour is `clear`, of a depth that Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    width = 8 * len(row) // (bits * (3 if colour_type == 2 else 1))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0)), (b"tRNS", clear)]
    chunks += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (png(16, 0, struct.pack(">2H", 1000, 40 * 257), struct.pack(">H", 1000)), [255, 40]),
        (
            png(16, 2, struct.pack(">6H", 1000, 2000, 3000, 9 * 257, 0, 0), struct.pack(">3H", 1000, 2000, 3000)),
            [255, 9],
        ),
        (png(8, 0, bytes([10, 40]), struct.pack(">H", 10)), [255, 40]),
        (png(4, 0, bytes([0x5A]), struct.pack(">H", 5)), [255, 170]),
        (png(2, 0, bytes([0b01101010]), struct.pack(">H", 1)), [255, 170]),
        (png(8, 2, bytes([1, 2, 3, 9, 0, 0]), struct.pack(">3H", 1, 2, 3)), [255, 9]),
    ],
    ids=["grey of 16 bits", "colour of 16 bits", "grey", "grey of 4 bits", "grey of 2 bits", "colour"],
)
def test_a_transparent_colour_is_white_at_every_depth(data: bytes, values: list[int]) -> None:
    assert read_image(data, 1, picture_of(data).shape[1], "rgb")[0, :2, 0].tolist() == values


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_a_picture_of_floats_is_as_bright_as_it_was(white: float) -> None:
    levels = np.linspace(0, 1, 40, dtype=np.float32).reshape(5, 8)
    values = read_image(file_of(Image.fromarray(white * levels), "TIFF"), 5, 8, "grey")[..., 0]
    assert np.abs(values - 255 * levels).max() <= 0.51
    nearly = read_image(file_of(Image.fromarray(white * (1.02 * levels - 0.01)), "TIFF"), 5, 8, "grey")[..., 0]
    assert np.abs(nearly - 255 * levels).max() < 4
    bright = 3 * levels  # lights above white
    values = read_image(file_of(Image.fromarray(bright), "TIFF"), 5, 8, "grey")[..., 0]
    assert np.abs(values - (255 * bright).clip(0, 255)).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([-5.0, 5.0], "values from -5 to 5"),
        ([0.0, 1e6], r"values from 0 to 1e\+06"),
        ([0.5, np.nan], "values are not finite"),
        (np.array([0, 70_000_000], np.int32), r"values from 0 to 7e\+07"),
    ],
)
def test_values_that_do_not_tell_what_is_white_are_refused(values: Any, says: str) -> None:
    picture = np.array([values], dtype=getattr(values, "dtype", np.float32))
    with pytest.raises(WrongModality, match=says):
        read_image(file_of(Image.fromarray(picture), "TIFF"), 1, 2, "grey")


PHOTO = np.stack(np.broadcast_arrays(*np.mgrid[40:168:2, 20:260:3], 99), axis=-1).astype(np.uint8)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"quality": 95}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_marker_is_read(mode: str, options: dict[str, Any]) -> None:
    whole = file_of(Image.fromarray(PHOTO).convert(mode), "JPEG", **options)
    assert whole[-2:] == b"\xff\xd9"
    for rows, columns in ((64, 80), (4, 5)):
        expected = read_image(whole, rows, columns, "rgb").tolist()
        for cut in (1, 2):
            assert read_image(whole[:-cut], rows, columns, "rgb").tolist() == expected


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_more_is_refused_or_lacks_a_block_at_most(progressive: bool) -> None:
    whole = file_of(PHOTO, "JPEG", progressive=progressive, subsampling=0)
    expected, read = read_image(whole, 64, 80, "rgb").astype(int), 0
    for cut in range(3, len(whole) - 700, 5):
        try:
            picture = read_image(whole[:-cut], 64, 80, "rgb")
        except WrongModality:
            continue
        read += 1
        assert (np.abs(picture - expected).max(axis=-1) > 2).sum() <= 64
    assert read <= 5


def test_large_pictures_are_reduced_and_look_the_same() -> None:
    waves = np.add.outer(np.cos(np.arange(2050) / 350), np.sin(np.arange(2100) / 450))
    large = Image.fromarray((127 + 60 * waves).astype(np.uint8))
    for rows, columns in ((41, 42), (20, 30)):
        exact = np.asarray(ImageOps.fit(large, (columns, rows), Image.Resampling.BOX)).astype(int)
        for data in (file_of(large, compress_level=1), file_of(large, "JPEG", quality=95)):
            assert np.abs(read_image(data, rows, columns, "grey")[..., 0] - exact).max() <= 2


def test_a_large_picture_keeps_its_transparency_its_depth_and_its_place() -> None:
    def grey(data: bytes, rows: int, columns: int) -> list[int]:
        return read_image(data, rows, columns, "grey").reshape(-1).tolist()

    deep = np.zeros((1000, 4300), np.uint16)
    deep[:, 2150:] = 200 * 257
    assert grey(file_of(deep), 1, 4) == pytest.approx([0, 0, 200, 200], abs=6)
    clear = Image.new("LA", (1000, 4300), (0, 0))
    clear.paste((10, 255), (0, 0, 1000, 2150))
    assert grey(file_of(clear, compress_level=1), 4, 1) == pytest.approx([10, 10, 255, 255], abs=6)
    exif = Image.Exif()
    for orientation, shape, expected in ((3, (4, 1), [255, 255, 10, 10]), (6, (1, 4), [255, 255, 10, 10])):
        exif[0x0112] = orientation
        assert grey(file_of(clear, compress_level=1, exif=exif), *shape) == pytest.approx(expected, abs=6)


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


def test_some_pictures_lose_their_class_so_that_the_start_without_one_is_trained() -> None:
    codec = CODECS["classes"]
    ids = next(iter(codec.encode_stream([GOOD], "x/cat/1.png"))).astype(np.int64)
    variants = [codec.augment(ids, np.random.default_rng(seed)) for seed in range(300)]
    assert {int(variant[0]) for variant in variants} == {256, 257}
    assert 10 < sum(variant[0] == 256 for variant in variants) < 60
    assert all((variant[1:] == ids[1:]).all() for variant in variants)
    assert (RGB.augment(ids, np.random.default_rng(0)) == ids).all()


@pytest.mark.parametrize("paths", [["."], ["../cat", "../dog"], ["../dog/a.png", "1.png"], ["../links"]])
def test_a_class_is_the_folder_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str]
) -> None:
    for name in ("cat/1.png", "dog/a.png", "store/x.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "links" / "cow").mkdir(parents=True)
    (tmp_path / "links" / "cow" / "2.png").symlink_to(tmp_path / "store" / "x.png")
    monkeypatch.chdir(tmp_path / "cat")
    sources = find_files(paths)
    codec = make_codec("image", DataConfig(image_size=(5, 7), classes=True), sources)
    assert isinstance(codec, ImageCodec)
    first = [next(iter(codec.encode_stream(source.chunks(), source.name)))[0] for source in sources]
    expected = {"1.png": "cat", "a.png": "dog", "2.png": "cow"}
    assert first == [codec.start(expected[source.path.name])[0] for source in sources]


def test_folders_that_are_no_classes_of_the_model_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("cat", "fox", "wolf"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(GOOD)
    tokens, _ = prepare(find_files(tmp_path), CODECS["classes"], tmp_path / "out", validation_fraction=0)
    said = "2 of 3 files lie in folders that are no classes of the model, such as fox, wolf: they count as pictures"
    assert said in capsys.readouterr().err
    assert tokens.tokens[::106].tolist() == [257, 256, 256]


def test_copies_in_folders_of_two_classes_are_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.png").write_bytes(GOOD)
    (tmp_path / "README.md").write_text("pictures")
    sources = find_files(tmp_path)
    codec = make_codec("image", DataConfig(image_size=(5, 7), classes=True), sources)
    assert isinstance(codec, ImageCodec) and codec.classes == ("cat", "dog")
    prepare([source for source in sources if source.name.endswith(".png")], codec, tmp_path / "out")
    assert "are copies" in capsys.readouterr().err


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
