"""Pictures as ids, pixel by pixel in raster order, all of one size."""

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from PIL import ExifTags, Image, ImageOps

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.codec import NO_CONDITIONS, Codec, WrongModality, check_positive
from perceiver_ar.data.pictures import grid, png_bytes
from perceiver_ar.data.sources import Source, folder_of, read_documents
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path

Colours = Literal["rgb", "grey", "palette"]
MISSING = 128
"""Value of each channel in pixels that were not generated."""

LARGE = 1 << 22  # pixels of a picture, or a strip of one, that is converted in one piece
FINE = 8  # whole-number reduction leaves this many times the wanted size, so that the final scaling is exact enough
JPEG, PNG = b"\xff\xd8", b"\x89PNG"


def read_image(data: bytes, rows: int, columns: int, colours: Colours) -> np.ndarray:
    """A picture of any kind and size -> (rows, columns, 3) uint8, or (rows, columns, 1) in grey.

    The picture is turned upright by its EXIF data, put on white if it is transparent, scaled to cover the size, and
    cropped around its middle. Large pictures take little more memory than Pillow's decoder does; JPEG hardly any.
    Raises `WrongModality` if it is not a picture, or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about large pictures and damaged EXIF data
            image = _decoded(data, FINE * max(rows, columns))
            image = _scaled(image, rows, columns, "L" if colours == "grey" else "RGB")
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        reason = " ".join(str(error).partition(" <")[0].split())  # Pillow names the object that it read from
        raise WrongModality(f"no picture, or a damaged one ({reason})") from None
    return np.asarray(image).reshape(rows, columns, -1)


def _decoded(data: bytes, side: int) -> Image.Image:
    """The picture as Pillow decodes it; a JPEG at 1/2, 1/4 or 1/8 if that has at least `side` rows and columns."""
    image = Image.open(io.BytesIO(data))
    image.draft(None, (side, side))
    try:
        image.load()
    except OSError:
        if not data.startswith(JPEG):
            raise
        # Perhaps only the end marker is missing: then a few more bytes to look ahead at let all rows be decoded.
        image = Image.open(io.BytesIO(data + bytes(8)))
        image.draft(None, (side, side))
        with suppress(OSError):
            image.load()
        image.tile = []  # what was decoded is all there is
        if image.crop((0, image.height - 1, *image.size)).getbbox() is None:  # still black
            raise
    bits, clear = data[24] if data.startswith(PNG) else 8, image.info.get("transparency")
    if isinstance(clear, tuple) and bits == 16:  # Pillow scales pixels to 8 bits, but not the colour of no pixels
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif isinstance(clear, int) and image.mode == "L" and bits < 8:
        image.info["transparency"] = clear * 255 // (2**bits - 1)
    return image


def _scaled(image: Image.Image, rows: int, columns: int, mode: str) -> Image.Image:
    """The picture in `mode`: opaque, scaled, cropped and upright. A large one is first reduced in strips."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    width, height = (rows, columns) if orientation in (5, 6, 7, 8) else (columns, rows)  # before it is turned
    factor = 1
    if image.width * image.height > LARGE:
        factor = max(1, min(image.width // width, image.height // height) // FINE)
    white = _white(image)
    plain = Image.new(mode, (-(-image.width // factor), -(-image.height // factor)))
    step = factor * max(1, LARGE // (image.width * factor))
    for top in range(0, image.height, step):
        strip = image.crop((0, top, image.width, min(top + step, image.height)))
        if white is not None:
            values = np.asarray(strip).astype(np.float64)
            if not np.isfinite(values).all():
                raise ValueError("some of its values are not finite")
            values[values == image.info.get("transparency", -1)] = white
            strip = Image.fromarray(np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8))
        if strip.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        strip = strip.convert(mode)
        plain.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    wide, high = min(image.width, image.height * width / height), min(image.height, image.width * height / width)
    left, top = (image.width - wide) / 2, (image.height - high) / 2
    right, bottom = min(left + wide, image.width), min(top + high, image.height)
    box = (left / factor, top / factor, right / factor, bottom / factor)
    small = plain.resize((width, height), Image.Resampling.BOX, box)
    small.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(small)


def _white(image: Image.Image) -> float | None:
    """The value of white in a picture of more than 8 bits, else None. Raises ValueError if none fits its values."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    if image.mode.startswith("I;16"):
        return 65535
    low, high = np.array(image.getextrema(), dtype=np.float64)
    for white, most in ((1, 16), (255, 400), (65535, 70_000)):  # what is a little above white is white
        if high <= most and low >= -high / 10 and (image.mode == "F" or white == 65535):
            return white
    raise ValueError(f"values from {low:g} to {high:g} do not fit black at 0 and white at 1, 255 or 65,535")


class ImageCodec(Codec):
    """Every document is one picture: a start id, then rows x columns x channels values.

    In raster order: the channels of the first pixel (red, green, blue), then those of the pixel to its right, and so on
    row by row (64 x 64 x 3 = 12,288 values are the paper's ImageNet). A value is 0 ... 255 in each channel, or, with a
    palette, the index of the nearest colour. The start id is `num_values`, or, for pictures of class k,
    `num_values + 1 + k`. The input at place i of a document predicts value i, so its position is that value's row,
    column and channel.
    """

    name = "image"
    saved = ("rows", "columns", "colours")
    ending = ".png"
    encodes_slowly = True

    def __init__(
        self,
        rows: int,
        columns: int,
        colours: Colours = "rgb",
        palette: Sequence[Sequence[int]] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        """palette: (colours, 3), 0 ... 255, all different; classes: names of the folders that pictures lie in."""
        check_positive(rows=rows, columns=columns)
        self.rows, self.columns, self.classes = rows, columns, tuple(classes)
        self.colours: Colours = colours
        self.palette = None if palette is None else np.array(palette, dtype=np.uint8).reshape(-1, 3)
        channels = 3 if colours == "rgb" else 1
        self.index_dims = (rows, columns, channels) if channels > 1 else (rows, columns)
        self.num_values = 256 if self.palette is None else len(self.palette)
        self.vocab_size = self.num_values + 1 + len(self.classes)
        self.num_pixel_values = rows * columns * channels
        self.document_length = self.num_pixel_values + 1

    def encode(self, data: bytes) -> np.ndarray:
        values = read_image(data, self.rows, self.columns, self.colours)
        if self.palette is not None:
            distances = ((values[..., None, :].astype(np.int32) - self.palette.astype(np.int32)) ** 2).sum(-1)
            values = distances.argmin(-1)
        return np.append(self.num_values, values.reshape(-1)).astype(self.dtype)

    def encode_stream(self, chunks: Iterable[bytes], where: str) -> Iterator[np.ndarray]:
        """The class is the folder of the file `where`, if that is one of `classes`."""
        for ids in super().encode_stream(chunks, where):
            if (folder := folder_of(where)) in self.classes:
                ids[0] = self.num_values + 1 + self.classes.index(folder)
            yield ids

    def pixels(self, ids: ArrayLike) -> np.ndarray:
        """Any ids, also the first part of a picture -> (rows, columns, 3) uint8."""
        values = np.asarray(ids, dtype=np.int64).reshape(-1)
        values = values[values < self.num_values][: self.num_pixel_values]
        colours = np.repeat(values[:, None], 3, axis=1) if self.palette is None else self.palette[values]
        if self.colours == "rgb":
            colours = values
        size = self.rows * self.columns * 3
        picture = np.append(colours.reshape(-1), np.full(size, MISSING))[:size]
        return picture.reshape(self.rows, self.columns, 3).astype(np.uint8)

    def decode(self, ids: ArrayLike) -> bytes:
        """A PNG file; grey pictures have one channel."""
        pixels = self.pixels(ids)
        return png_bytes(Image.fromarray(pixels[..., 0] if self.colours == "grey" else pixels))

    def fit(self, config: PerceiverARConfig) -> PerceiverARConfig:
        """The context is one picture; positions are learned by row, column and channel unless `config` has a table."""
        length = self.num_pixel_values
        settings: dict[str, Any] = {"context_length": length, "num_latents": min(config.num_latents, length)}
        if config.position_table == "none":
            settings |= {"position_table": "learned", "index_dims": self.index_dims}
        return config.replace(vocab_size=self.vocab_size, **settings)

    def start(self, prompt: str = "", conditions: Mapping[str, str] = NO_CONDITIONS) -> np.ndarray:
        """`prompt`: name of a class. Raises `InputError` if there is no such class."""
        self.condition_ids(conditions)  # there are none
        if prompt and prompt not in self.classes:
            known = f"give one of {', '.join(self.classes)}" if self.classes else "this run was trained without any"
            raise InputError(f"there is no class {prompt!r}: {known}")
        return np.array([self.num_values + (self.classes.index(prompt) + 1 if prompt else 0)], dtype=self.dtype)

    def allowed_next(self, ids: np.ndarray) -> np.ndarray:
        """A start id at the beginning of a picture, a value everywhere else."""
        is_value = np.arange(self.vocab_size) < self.num_values
        return is_value if len(ids) % (self.num_pixel_values + 1) else ~is_value

    def augment(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """One picture in ten loses its class, so that the start id without a class is trained, too."""
        if self.classes and ids[0] > self.num_values and random.random() < 0.1:
            ids = np.append(self.num_values, ids[1:])
        return ids

    def amounts(self, ids: np.ndarray) -> dict[str, float]:
        """A dimension is one channel of one pixel, so that bits per dimension are comparable with other models."""
        return {"dimension": float((np.asarray(ids) < self.num_values).sum())}

    def results(
        self, rows: Sequence[np.ndarray], prompt_len: int, stem: str, *, original: np.ndarray | None = None, **_: Any
    ) -> Iterator[tuple[str, bytes]]:
        """STEM.png for each row, and STEM-grid.png with the original, the kept part and the completions."""
        yield from super().results(rows, prompt_len, stem)
        first = {} if original is None else {"original": original, "kept": rows[0][:prompt_len]}
        samples = ["sample"] if len(rows) == 1 else [f"sample {number}" for number in range(1, len(rows) + 1)]
        pictures = [self.pixels(ids) for ids in (*first.values(), *rows)]
        picture = grid(pictures, [*first, *samples], scale=max(1, 160 // max(self.rows, self.columns)))
        yield f"{stem}-grid.png", png_bytes(picture)

    def result_names(self, stem: str, count: int) -> list[str]:
        return [*super().result_names(stem, count), f"{stem}-grid.png"]

    def draw_bits(self, ids: np.ndarray, bits: np.ndarray, path: Path) -> None:
        """The picture, and beside it the bits of each pixel, from black (0) to white (the most)."""
        each = np.asarray(bits).reshape(self.rows, self.columns, -1).sum(-1)
        shades = np.rint(255 * each / max(each.max(), 1e-9)).astype(np.uint8)[..., None].repeat(3, axis=-1)
        labels = ["picture", f"bits per pixel, at most {each.max():.1f}"]
        scale = max(1, 320 // max(self.rows, self.columns))
        with atomic_path(path) as temporary:
            grid([self.pixels(ids), shades], labels, scale).save(temporary)

    def settings(self) -> dict[str, Any]:
        palette = None if self.palette is None else self.palette.tolist()
        return super().settings() | {"palette": palette, "classes": list(self.classes)}


def choose_palette(sources: Sequence[Source], rows: int, columns: int, size: int, most: int = 500) -> list[list[int]]:
    """At most `size` different colours (n, 3), dark ones first, that suit up to `most` pictures spread over `sources`.

    Raises `InputError` if a named file cannot be read, or if there is no picture.
    """
    step = max(1, len(sources) // most)  # sources are sorted by folder, so the first ones may be alike
    spread = chain.from_iterable(sources[first::step] for first in range(step))
    samples = list(islice(read_documents(spread, lambda data: read_image(data, rows, columns, "palette")), most))
    require(len(samples) > 0, "there is no picture to choose a palette from; give a folder of pictures")
    pixels = np.concatenate(samples)
    different = np.unique(pixels.reshape(-1, 3), axis=0)
    if len(different) > size:
        image = Image.fromarray(pixels).quantize(size, Image.Quantize.MEDIANCUT)
        different = np.unique(np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3)[:size], axis=0)
    return different[np.argsort(different @ [299, 587, 114], kind="stable")].tolist()
