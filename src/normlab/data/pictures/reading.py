"""One picture from a file to the pixels a network sees: the same in training and prediction.

`read_picture` gives upright RGB of any size, `to_square` brings that to the network's size, and
`read_square` does both, with less memory because the full size never becomes an array. What a file
holds beyond 8-bit RGB is turned into that as follows, or refused by name:

grey, palette, black-and-white   to RGB
alpha, transparent colour        composited on white
CMYK, YCbCr, HSV                 to RGB by Pillow's formulas; colour profiles are not applied
16 bits a channel                scaled: grey is rounded to v/257, colours keep their high byte;
                                 with a transparent colour refused
EXIF orientation                 applied; one that cannot be read counts as upright
MPO (of phones and 3-D cameras)  its main picture
HEIC                             its main picture, by the package pillow-heif
animations, several pages        refused
32-bit and float, Lab            refused: what white is, the file does not say
over 25 megapixels               read at a half, a quarter or an eighth of its size
over 200 (JPEG) or 50 (others)   refused before a pixel is unpacked

Metadata (EXIF, colour profiles, texts) that cannot be read never make a picture unusable.
"""

import hashlib
import io
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from normlab.errors import DataError, TooLargeError, install

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")  # MPO opens as JPEG
MAX_PIXELS = 25_000_000  # that are kept; of more every second, fourth or eighth row and column is
MAX_JPEG = 200_000_000  # of a JPEG, which is reduced while it is unpacked
MAX_OTHER = 50_000_000

_NO_MEMORY = "takes more memory than there is for it; make it smaller"
_BAND = 1 << 20  # pixels that are converted at a time

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0
_ORIENTATION = 274  # a tag of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The first bytes of the formats that are read.
_PNG = b"\x89PNG\r\n\x1a\n"
_BEGINNINGS = (
    *(b"\xff\xd8\xff", _PNG, b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"),
    *(b"II+\0", b"MM\0+"),
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# What Pillow was seen to raise on damaged files.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, EOFError),
    *(struct.error, RuntimeError, ArithmeticError),
)

Pixels = NDArray[np.uint8]


def read_picture(source: Path | bytes) -> Pixels:
    """Upright RGB pixels (H, W, 3) of a file or of a file's bytes.

    Raises:
        DataError: it cannot be read, or is of a kind that this module's docstring refuses. The
            message does not name the file.
        TooLargeError: it has too many pixels, or more than the memory at hand can take.
    """
    with _damage_named():
        return np.asarray(_upright(source))


def read_measured(source: Path | bytes) -> tuple[Pixels, bool]:
    """`read_picture`, and whether the file has more than 8 bits a channel.

    Raises:
        DataError, TooLargeError: as `read_picture` does.
    """
    with _damage_named():
        image, deep = _upright_and_deep(source)
        return np.asarray(image), deep


def dimensions(source: Path | bytes) -> tuple[int, int]:
    """Width and height of a picture in pixels, by its header.

    Raises:
        DataError, TooLargeError: as `read_picture` does.
    """
    with _damage_named(), quiet(), _file(source) as file, _open(file) as image:
        return image.size


def begins_as_picture(file: Path) -> bool:
    """Whether the first bytes are those of a picture, in whatever condition the rest may be."""
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except OSError:
        return False
    webp = start.startswith(b"RIFF") and start[8:12] == b"WEBP"
    avif = start[4:12] in (b"ftypavif", b"ftypavis")
    return start.startswith(_BEGINNINGS) or webp or avif or _is_heic(start)


def read_square(source: Path | bytes, size: int) -> Pixels:
    """`to_square(read_picture(source), size)`, the same pixels (size, size, 3).

    Raises:
        DataError, TooLargeError: as `read_picture` does.
    """
    with _damage_named():
        image = _upright(source)
        return np.asarray(image if image.size == (size, size) else _fit(image, size))


def formats() -> tuple[str, ...]:
    """The kinds of pictures that can be read here; HEIC where its reader is installed."""
    return (*FORMATS, "HEIC") if find_spec("pillow_heif") is not None else FORMATS


def to_square(picture: Pixels, size: int) -> Pixels:
    """The largest centred square, resized to (size, size, 3) by antialiased bicubic filtering.

    A picture of that size is returned as it is.
    """
    if picture.shape == (size, size, 3):
        return picture
    return np.asarray(_fit(Image.fromarray(picture), size))


def fingerprint(picture: Pixels) -> bytes:
    """SHA-256 of a picture's size and pixels: equal for the same picture in two formats."""
    digest = hashlib.sha256(f"{picture.shape}".encode())
    digest.update(np.ascontiguousarray(picture).data)
    return digest.digest()


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore Pillow's warnings: it has an error for whatever makes a picture unusable.

    Filters belong to the whole process, so whoever reads in threads does it inside one `quiet`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _damage_named() -> Iterator[None]:
    """Turn what Pillow raises into a `DataError`."""
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(formats())
        raise DataError(f"not a picture, or damaged at its start; known are {known}") from None
    except Image.DecompressionBombError:
        raise TooLargeError(
            f"more than {MAX_OTHER / 1e6:.0f} megapixels are refused; make it smaller"
        ) from None
    except MemoryError as error:
        raise TooLargeError(_NO_MEMORY) from error
    except _DAMAGE as error:
        if "Memory allocation error" in str(error):  # as the library for HEIC says it
            raise TooLargeError(_NO_MEMORY) from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"cannot be read ({reason or type(error).__name__})") from error


def _upright(source: Path | bytes) -> Image.Image:
    """The picture as RGB, the right way up."""
    return _upright_and_deep(source)[0]


def _upright_and_deep(source: Path | bytes) -> tuple[Image.Image, bool]:
    """The picture as RGB, the right way up, and whether its file has more than 8 bits a channel."""
    with quiet(), _file(source) as file:
        try:
            return _decoded(file)
        except DataError:
            raise
        except (ValueError, SyntaxError, OSError):
            file.seek(0)
            if file.read(len(_PNG)) != _PNG:
                raise
            # A text or a profile that Pillow takes offence at does not make the pixels unusable.
            file.seek(0)
            return _decoded(io.BytesIO(_bare_png(file.read())))


def _decoded(file: IO[bytes]) -> tuple[Image.Image, bool]:
    with _open(file) as image:
        _refuse(image)
        _draft(image)
        _scale_key(image)
        deep = _is_deep(image)
        image.load()
        white = _white(image)
        turn = _TURNS.get(_orientation(image))
        upright = _reduced(_to_rgb(image, white))
        return upright if turn is None else upright.transpose(turn), deep


@contextmanager
def _file(source: Path | bytes) -> Iterator[IO[bytes]]:
    with _regular(source).open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        yield file


def _open(file: IO[bytes]) -> Image.Image:
    """The picture in a file, unpacked no further than its header."""
    start = file.read(64)
    file.seek(0)
    if start.startswith(b"\xff\xd8\xff"):
        # Not by `Image.open`, which refuses 200 megapixels, whatever they are reduced to.
        return JpegImagePlugin.jpeg_factory(file)
    if _is_heic(start):
        return _open_heic(file)
    return Image.open(file, formats=FORMATS)


def _is_heic(start: bytes) -> bool:
    """Whether a file begins as HEIC does; AVIF has the same container."""
    length = int.from_bytes(start[:4], "big")
    brands = [start[i : i + 4] for i in (8, *range(16, min(length, len(start)), 4))]
    return start[4:8] == b"ftyp" and brands[0] in _HEIC_BRANDS and b"avif" not in brands


def _open_heic(file: IO[bytes]) -> Image.Image:
    try:
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError:
        raise DataError(
            f"HEIC, as phones write it, needs pillow-heif: {install('heic')}, or save it as JPEG"
        ) from None
    opened: Any = HeifImageFile  # without types
    image: Image.Image = opened(file)
    return image


def _bare_png(content: bytes) -> bytes:
    """A PNG without texts, profiles and other chunks that decide nothing about its pixels."""
    kept, place = [content[:8]], 8
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length
        if not kind[0] & 32 or kind in (b"tRNS", b"eXIf", b"acTL"):  # capitals: always needed
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


def _draft(image: Image.Image) -> None:
    """Have a large JPEG unpacked at a half, a quarter or an eighth of its size."""
    if isinstance(image, JpegImagePlugin.JpegImageFile) and (times := _times(image.size)) > 1:
        image.draft(image.mode, (image.width // times, image.height // times))


def _reduced(image: Image.Image) -> Image.Image:
    times = _times(image.size)
    return image.reduce(times) if times > 1 else image


def _times(size: tuple[int, int]) -> int:
    """By how much a picture is to be reduced in width and height."""
    pixels = size[0] * size[1]
    return next((times for times in (1, 2, 4) if pixels <= MAX_PIXELS * times**2), 8)


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or re.search(";16[BLN]", _layout(image)) is not None


def _layout(image: Image.Image) -> str:
    """The bits that Pillow will unpack: RGB;16B, L;2, …; nothing where a library has done it."""
    for tile in getattr(image, "tile", ()):
        return str(tile[3][0] if isinstance(tile[3], tuple) else tile[3])
    return ""


def _scale_key(image: Image.Image) -> None:
    """Pillow unpacks grey of 2 and of 4 bits to 8, and leaves the transparent one as it was."""
    times, key = {"L;2": 85, "L;4": 17}.get(_layout(image), 0), image.info.get("transparency")
    if isinstance(key, int) and key < times:
        image.info["transparency"] = key * times


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, if it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (*_DAMAGE, zlib.error):
        return 1
    return value if isinstance(value, int) else 1


def _fit(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square at `size`: across first, then down.

    In one call Pillow 13 takes tall pictures the other way round, and Pillow 12 does not, which
    changes pixels: each pass rounds. An exported graph has this order, too.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    bicubic = Image.Resampling.BICUBIC
    narrow = image.resize((size, height), bicubic, box=(left, 0, left + side, height))
    return narrow.resize((size, size), bicubic, box=(0, top, size, top + side))


def _regular(path: Path) -> Path:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # a pipe would block for ever
        raise DataError("a folder" if stat.S_ISDIR(mode) else "not a regular file")
    return path


def _refuse(image: Image.Image) -> None:
    """Refuse, by what the header says, what cannot be rightly turned into 8-bit RGB."""
    width, height = image.size
    limit = MAX_JPEG if isinstance(image, JpegImagePlugin.JpegImageFile) else MAX_OTHER
    if width * height > limit:
        raise TooLargeError(
            f"{width} × {height} pixels; more than {limit / 1e6:.0f} megapixels are refused; "
            f"make it smaller{'' if limit == MAX_JPEG else ', or save it as JPEG'}"
        )
    # Not `n_frames`, which reads a file to its end to count them.
    if getattr(image, "is_animated", False) and image.format not in ("MPO", "HEIF"):
        raise DataError("animated or of several pages; give one still picture")
    if image.mode in ("F", "LAB") or (image.mode == "I" and image.format != "PPM"):
        raise DataError(f"of Pillow's mode {image.mode}; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I") and _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
        raise DataError("a 16-bit TIFF whose zero is white; save it as PNG")
    if "transparency" in image.info and _is_deep(image):  # Pillow compares its upper eight bits
        raise DataError("16-bit with a transparent colour; save it with an alpha channel")


def _white(image: Image.Image) -> int:
    """The largest value of a grey picture of more than 8 bits."""
    bits: int = _tag(image, _BITS_PER_SAMPLE, 16)
    return (1 << bits) - 1


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """A tag of a TIFF file, the first value if it has several."""
    value: Any = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _to_rgb(image: Image.Image, white: int) -> Image.Image:
    if image.mode.startswith("I"):
        table = np.rint(np.arange(white + 1) * (255 / white)).astype(np.uint8)
        image = Image.fromarray(table[np.clip(np.asarray(image), 0, white)])
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Composite in bands: the whole picture in RGBA twice over would take 8 bytes a pixel."""
    width, height = image.size
    rows = max(1, _BAND // width)
    result = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        result.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return result
