"""One picture from a file to RGB: every kind handled rightly, or refused by name."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normlab.core.text import shown
from normlab.data.pictures.reading import (
    MAX_PIXELS,
    fingerprint,
    read_picture,
    read_square,
    to_square,
)
from normlab.errors import DataError, TooLargeError

H, W = 6, 9
RGB = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
GREY = RGB[..., 0]


def encode(image: Image.Image, form: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composited on white, in float."""
    a = alpha[..., None] / 255
    return pixels * a + 255 * (1 - a)


@pytest.mark.parametrize("form", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_rgb_comes_through_as_it_is(form: str) -> None:
    options = {"lossless": True} if form == "webp" else {}
    np.testing.assert_array_equal(read_picture(encode(Image.fromarray(RGB), form, **options)), RGB)


@pytest.mark.parametrize("form", ["jpeg", "avif"])
def test_lossy_formats_are_read(form: str) -> None:
    smooth = np.full((H, W, 3), (200, 100, 50), np.uint8)
    found = read_picture(encode(Image.fromarray(smooth), form, quality=95))
    np.testing.assert_allclose(found.astype(int), smooth, atol=4)


def test_grey_and_bilevel() -> None:
    np.testing.assert_array_equal(read_picture(encode(Image.fromarray(GREY))), grey_to_rgb(GREY))
    bits = GREY > 128
    np.testing.assert_array_equal(
        read_picture(encode(Image.fromarray(bits))), grey_to_rgb(bits * np.uint8(255))
    )


@pytest.mark.parametrize("form", ["png", "gif"])
def test_palette(form: str) -> None:
    image = Image.fromarray(RGB).quantize(16)
    expected = np.array(image.getpalette()).reshape(-1, 3)[np.asarray(image)]
    np.testing.assert_array_equal(read_picture(encode(image, form)), expected)


def test_alpha_is_composited_on_white() -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (H, W), np.uint8)
    found = read_picture(encode(Image.fromarray(np.dstack([RGB, alpha]))))
    np.testing.assert_allclose(found.astype(float), on_white(RGB, alpha), atol=1)
    found = read_picture(encode(Image.fromarray(np.dstack([GREY, alpha]), "LA")))
    np.testing.assert_allclose(found.astype(float), on_white(grey_to_rgb(GREY), alpha), atol=1)


def test_a_transparent_colour_becomes_white() -> None:
    image = Image.fromarray(np.where(np.arange(W) < 4, 0, GREY | 1).astype(np.uint8))
    expected = grey_to_rgb(np.asarray(image)).copy()
    expected[:, :4] = 255
    np.testing.assert_array_equal(read_picture(encode(image, transparency=0)), expected)
    palette = Image.fromarray(np.where(np.arange(W) < 4, 0, np.full((H, W), 1)).astype(np.uint8))
    palette = palette.convert("P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    found = read_picture(encode(palette, transparency=bytes([0, 255])))
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] == (10, 20, 30)).all()


@pytest.mark.parametrize("form", ["tiff", "jpeg"])
def test_cmyk(form: str) -> None:
    """Without ink paper is white; with all of one ink its colour is gone."""
    inks = np.zeros((16, 32, 4), np.uint8)
    inks[:, 16:, 0] = 255  # cyan
    found = read_picture(encode(Image.fromarray(inks, "CMYK"), form))
    np.testing.assert_allclose(found[:, :12].astype(int), 255, atol=4)
    np.testing.assert_allclose(found[:, 20:, 0].astype(int), 0, atol=4)
    np.testing.assert_allclose(found[:, 20:, 1:].astype(int), 255, atol=4)


@pytest.mark.parametrize("form", ["png", "tiff", "ppm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(form: str) -> None:
    deep = np.linspace(0, 65535, H * W).reshape(H, W).round().astype(np.uint16)
    found = read_picture(encode(Image.fromarray(deep), form))
    np.testing.assert_array_equal(found, grey_to_rgb(np.rint(deep / 257).astype(np.uint8)))


def png_of_16_bit_colour(pixels: np.ndarray) -> bytes:
    """Pillow cannot write these; a PNG is four chunks."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    deep = np.random.default_rng(2).integers(0, 65536, (H, W, 3))
    np.testing.assert_array_equal(read_picture(png_of_16_bit_colour(deep)), deep >> 8)


# EXIF 2.3, tag 274: which side of the picture row 0 and column 0 of the file are.
ORIENTATIONS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("form", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if form == "webp" else {}
    content = encode(Image.fromarray(RGB), form, exif=exif, **options)
    np.testing.assert_array_equal(read_picture(content), ORIENTATIONS[orientation](RGB))


def test_the_main_picture_of_an_mpo() -> None:
    smooth = Image.new("RGB", (16, 8), (200, 100, 50))
    other = Image.new("RGB", (16, 8), (0, 0, 255))
    found = read_picture(encode(smooth, "mpo", save_all=True, append_images=[other]))
    np.testing.assert_allclose(found.astype(int), np.asarray(smooth), atol=4)


def frames(form: str) -> bytes:
    first, second = Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())
    return encode(first, form, save_all=True, append_images=[second])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (frames("gif"), "animated or of several pages"),
        (frames("webp"), "animated or of several pages"),
        (frames("png"), "animated or of several pages"),
        (frames("tiff"), "animated or of several pages"),
        (encode(Image.fromarray(GREY.astype(np.float32)), "tiff"), "mode F"),
        (encode(Image.fromarray(GREY.astype(np.int32)), "tiff"), "mode I"),
        (encode(Image.new("LAB", (4, 4)), "tiff"), "mode LAB"),
        (encode(Image.fromarray(GREY.astype(np.uint16)), transparency=7), "transparent colour"),
        (encode(Image.fromarray(GREY.astype(np.uint16)), "tiff", tiffinfo={262: 0}), "zero is"),
        (encode(Image.new("1", (5001, 5000))), "5001 × 5000 pixels"),
        (b"", "not a picture"),
        (b"GIF89a", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (encode(Image.fromarray(RGB))[:-40], "cannot be read"),
        (encode(Image.new("RGB", (64, 64)), "jpeg")[:-200], "cannot be read"),
    ],
)
def test_refused_by_name(content: bytes, named: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError) as error:
            read_picture(content)
    assert named in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_claim_of_many_pixels_is_refused_before_anything_is_unpacked() -> None:
    """A header that claims 60000 × 60000 with no pixels behind it."""
    content = bytearray(png_of_16_bit_colour(np.zeros((1, 1, 3), int)))
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(TooLargeError, match="pixels"):
        read_picture(bytes(content))
    assert MAX_PIXELS == 25_000_000


@pytest.mark.parametrize("size", [(9, 6), (6, 6), (1100, 1000)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "I;16", "LA"])
def test_straight_to_a_square_gives_the_same_pixels(size: tuple[int, int], mode: str) -> None:
    """Also of a picture that is composited in more than one band."""
    noise = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 4), np.uint8)
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 251)
    elif mode == "P":
        image = image.convert("RGB").quantize(64)
        image.info["transparency"] = bytes(range(64))
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[274] = 6
    content = encode(image, exif=exif)
    np.testing.assert_array_equal(read_square(content, 6), to_square(read_picture(content), 6))


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm", "avif"])
def test_damage_anywhere_is_an_answer_or_a_clear_error(form: str) -> None:
    """Random bytes overwritten: pixels, or a DataError of one line; nothing else."""
    good = encode(Image.fromarray(RGB), form)
    rng = np.random.default_rng(3)
    for _ in range(60):
        content = bytearray(good)
        for place in rng.integers(0, len(good), rng.integers(1, 6)):
            content[place] = rng.integers(256)
        cut = int(rng.integers(len(good) // 2, len(good) + 1))
        try:
            found = read_picture(bytes(content[:cut]))
        except DataError:
            continue
        assert found.dtype == np.uint8
        assert found.shape[2] == 3


def test_files_and_what_is_no_file(tmp_path: Path) -> None:
    import os

    (tmp_path / "a.png").write_bytes(encode(Image.fromarray(RGB)))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), RGB)
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "regular"), ("gone.png", "No such file"), (".", "a folder")):
        with pytest.raises(DataError, match=reason):
            read_picture(tmp_path / name)


def test_the_centre_square_is_kept_and_antialiased() -> None:
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = (10, 20, 30)  # the centre; black on both sides is cut off
    for picture in (wide, wide.transpose(1, 0, 2)):  # the filter's edge reaches a little beyond
        np.testing.assert_allclose(to_square(picture, 8).astype(int) - (10, 20, 30), 0, atol=2)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = to_square(stripes, 8)[:, 1:-1].astype(int)
    assert abs(inner - 127.5).max() < 6  # without antialiasing all black or all white


def test_a_square_of_the_size_is_left_alone() -> None:
    square = np.random.default_rng(4).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(to_square(square, 32), square)
    assert to_square(square[:1], 32).shape == (32, 32, 3)


def test_fingerprints_are_of_pixels_not_files() -> None:
    png, bmp = (read_picture(encode(Image.fromarray(RGB), form)) for form in ("png", "bmp"))
    assert fingerprint(png) == fingerprint(bmp)
    assert fingerprint(RGB) != fingerprint(RGB.reshape(W, H, 3))


def test_names_are_fit_to_print() -> None:
    assert shown("café.png") == "café.png"
    assert shown("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert shown(b"\xff.png".decode("utf-8", "surrogateescape")) == "\\xff.png"
