"""One picture from a file to the pixels a network sees: the same in training and prediction.

`read_picture` gives upright RGB of any size, `to_square` brings that to the network's size, and
`read_square` does both, with less memory because the full size never becomes an array. What a file
holds beyond 8-bit RGB is turned into that as follows, or refused by name:

grey, palette, black-and-white   to RGB
alpha, transparent colour        composited on white
CMYK, YCbCr, HSV                 to RGB by Pillow's formulas; colour profiles are not applied
16 bits a channel                scaled: grey is rounded to v/257, colours keep their high byte
EXIF orientation                 applied
MPO (of phones and 3-D cameras)  its main picture
animations, several pages        refused
32-bit and float, Lab            refused: what white is, the file does not say
over 25 megapixels               refused before a pixel is unpacked
"""

import hashlib
import io
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from normlab.errors import DataError, TooLargeError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")  # MPO opens as JPEG
MAX_PIXELS = 25_000_000

_BAND = 1 << 20  # pixels that are converted at a time

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0

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


def read_square(source: Path | bytes, size: int) -> Pixels:
    """`to_square(read_picture(source), size)`, the same pixels (size, size, 3).

    Raises:
        DataError, TooLargeError: as `read_picture` does.
    """
    with _damage_named():
        image = _upright(source)
        return np.asarray(image if image.size == (size, size) else _fit(image, size))


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
        known = ", ".join(FORMATS)
        raise DataError(f"not a picture, or damaged at its start; known are {known}") from None
    except Image.DecompressionBombError:
        raise TooLargeError(
            f"more than {MAX_PIXELS / 1e6:.0f} megapixels are refused; make it smaller"
        ) from None
    except MemoryError as error:
        raise TooLargeError("takes more memory than there is for it; make it smaller") from error
    except _DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"cannot be read ({reason or type(error).__name__})") from error


def _upright(source: Path | bytes) -> Image.Image:
    """The picture as RGB, the right way up."""
    file = _regular(source) if isinstance(source, Path) else io.BytesIO(source)
    with quiet(), Image.open(file, formats=FORMATS) as image:
        _refuse(image)
        image.load()
        white = _white(image)
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, white)


def _fit(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _regular(path: Path) -> Path:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # a pipe would block for ever
        raise DataError("a folder" if stat.S_ISDIR(mode) else "not a regular file")
    return path


def _refuse(image: Image.Image) -> None:
    """Refuse, by what the header says, what cannot be rightly turned into 8-bit RGB."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise TooLargeError(
            f"{width} × {height} pixels; more than {MAX_PIXELS / 1e6:.0f} megapixels are refused"
        )
    # Not `n_frames`, which reads a file to its end to count them.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise DataError("animated or of several pages; give one still picture")
    if image.mode in ("F", "LAB") or (image.mode == "I" and image.format != "PPM"):
        raise DataError(f"of Pillow's mode {image.mode}; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I") and _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
        raise DataError("a 16-bit TIFF whose zero is white; save it as PNG")
    key = image.info.get("transparency")
    if key is not None and np.max(np.frombuffer(key, np.uint8) if isinstance(key, bytes) else key):
        deep = image.mode.startswith("I") or (not isinstance(key, bytes) and np.max(key) > 255)
        if deep:
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
