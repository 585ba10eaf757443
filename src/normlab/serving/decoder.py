"""What a decoding process of the server runs. It imports no more than that takes."""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normlab.data.pictures.reading import read_square


@dataclass(frozen=True)
class Square:
    """What the network sees: pixels (S, S, 3) uint8, and as a PNG file if that was asked for."""

    pixels: NDArray[np.uint8]
    png: bytes


def load_formats() -> None:
    """Load Pillow's formats now: under a call's limit of memory there may be no room for them."""
    Image.init()


def decode_square(content: bytes, size: int, as_png: bool) -> Square:
    """Decode a picture's file to a square of `size`.

    Raises:
        TooLargeError: it has more pixels, or takes more memory, than is allowed.
        DataError: it cannot be read.
    """
    pixels = read_square(content, size)
    return Square(pixels, _png(Image.fromarray(pixels)) if as_png else b"")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
