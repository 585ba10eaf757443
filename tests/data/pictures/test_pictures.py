"""One picture from a file to RGB: every kind handled rightly, or refused by name."""

import io
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normlab.data.pictures import reading
from normlab.data.pictures.reading import (
    MAX_PIXELS,
    fingerprint,
    read_picture,
    read_square,
    to_square,
)
from normlab.errors import DataError, TooLargeError
from normlab.text import shown

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


def png_of(width: int, bits: int, colour: int, rows: list[bytes], key: bytes = b"") -> bytes:
    """What Pillow cannot write: a PNG is four chunks, or five with a transparent colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0))
    head += chunk(b"tRNS", key) if key else b""
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png_of_16_bit_colour(pixels: np.ndarray, key: bytes = b"") -> bytes:
    return png_of(pixels.shape[1], 16, 2, [row.astype(">u2").tobytes() for row in pixels], key)


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    deep = np.random.default_rng(2).integers(0, 65536, (H, W, 3))
    np.testing.assert_array_equal(read_picture(png_of_16_bit_colour(deep)), deep >> 8)


@pytest.mark.parametrize("key", [(0, 0, 0), (200, 0, 0), (300, 0, 0)])
def test_a_transparent_colour_of_16_bits_is_refused(key: tuple[int, ...]) -> None:
    """By its upper eight bits, which Pillow compares, (5, 7, 200) would be black as well."""
    pixels = np.array([[[0, 0, 0], [5, 7, 200], [40_000, 0, 0]]])
    with pytest.raises(DataError, match="16-bit with a transparent colour"):
        read_picture(png_of_16_bit_colour(pixels, struct.pack(">3H", *key)))


@pytest.mark.parametrize(("bits", "row"), [(1, 0b01000000), (2, 0b00011011), (4, 0x3C)])
def test_a_transparent_grey_is_one_of_the_files_own_bits(bits: int, row: int) -> None:
    width, most = 8 // bits, 2**bits - 1
    values = np.array([row >> bits * i & most for i in reversed(range(width))])
    for key in range(most + 1):
        found = read_picture(png_of(width, bits, 0, [bytes([row])], struct.pack(">H", key)))
        expected = np.where(values == key, 255, values * (255 // most))
        np.testing.assert_array_equal(found[0, :, 0], expected)


@pytest.mark.parametrize("form", ["bmp", "png", "tiff"])
def test_a_picture_of_eight_bits_is_not_taken_for_a_deep_one(form: str) -> None:
    """A row of these has 160 bytes in BMP, and Pillow's notes of it a 16."""
    assert not reading.read_measured(encode(Image.new("RGB", (53, 16)), form))[1]


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
        (encode(Image.fromarray(GREY.astype(np.uint16)), transparency=0), "transparent colour"),
        (encode(Image.fromarray(GREY.astype(np.uint16)), "tiff", tiffinfo={262: 0}), "zero is"),
        (encode(Image.new("1", (7001, 7200))), "7001 × 7200 pixels"),
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


def app1(payload: bytes) -> bytes:
    """A JPEG of 24 × 16 smooth pixels with one segment of metadata."""
    smooth = encode(Image.new("RGB", (24, 16), (200, 100, 50)), "jpeg")
    return smooth[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + smooth[2:]


def directory(*entries: bytes) -> bytes:
    """EXIF with a directory of twelve bytes an entry."""
    return (
        b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)
    )


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack(">HHI", tag, kind, count) + value


TURNED = entry(274, 3, 1, b"\0\x06\0\0")


@pytest.mark.parametrize(
    ("payload", "turned"),
    [
        (directory(TURNED), True),
        (directory(TURNED, entry(34665, 4, 1, b"\x7f\xff\xff\xff")), True),
        (directory(TURNED, entry(36867, 2, 1 << 30, b"\0\0\0\x09")), True),
        (directory(TURNED, entry(33434, 5, 1, b"\0\0\0\0")), True),
        (directory(entry(274, 3, 1, b"\0\0\0\0")), False),
        (directory(entry(274, 3, 1, b"\0\x63\0\0")), False),
        (directory(entry(274, 2, 4, b"top\0")), False),
        (directory(entry(274, 12, 1, b"\0\0\0\x08")), False),
        (directory(TURNED)[:-9], False),
        (b"Exif\0\0", False),
        (b"Exif\0\0MM\0*\xff\xff\xff\xff", False),
        (b"Exif\0\0" + bytes(range(256)), False),
        (b"http://ns.adobe.com/xap/1.0/\0<x \xff\xfe", False),
    ],
)
def test_metadata_never_make_a_picture_unusable(payload: bytes, turned: bool) -> None:
    picture = read_picture(app1(payload))
    assert picture.shape == ((24, 16, 3) if turned else (16, 24, 3))
    np.testing.assert_allclose(picture.astype(int) - (200, 100, 50), 0, atol=4)


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    body = kind + data
    check = zlib.crc32(body) if crc is None else crc
    return struct.pack(">I", len(data)) + body + struct.pack(">I", check)


@pytest.mark.parametrize(
    "bad",
    [
        chunk(b"zTXt", b"much\0\0" + zlib.compress(bytes(80 << 20))),  # more than Pillow takes
        chunk(b"iTXt", b"broken\0\x01\0\0\0" + b"no zlib"),
        chunk(b"iCCP", b"profile\0\0" + b"no zlib"),
        chunk(b"eXIf", b"nonsense"),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  8\nno hex"),
        chunk(b"pHYs", b"\0\0"),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"\1\2\3"),
        chunk(b"tIME", b"", crc=0),
    ],
    ids=lambda bad: bad[4:8].decode(),
)
@pytest.mark.parametrize("place", [33, -12])  # after the header; after the pixels
def test_chunks_of_a_png_that_hold_no_pixels_do_not_matter(bad: bytes, place: int) -> None:
    good = encode(Image.fromarray(RGB))
    np.testing.assert_array_equal(read_picture(good[:place] + bad + good[place:]), RGB)


@pytest.mark.parametrize("form", ["jpeg", "png"])
@pytest.mark.parametrize(("limit", "times"), [(64 * 48, 1), (64 * 48 - 1, 2), (800, 2), (700, 4)])
def test_large_pictures_are_read_at_a_part_of_their_size(
    form: str, limit: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_PIXELS", limit)
    tiny = Image.fromarray(np.random.default_rng(5).integers(0, 256, (3, 4, 3), np.uint8))
    whole = tiny.resize((64, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[274] = 6
    options = {"quality": 98, "subsampling": 0} if form == "jpeg" else {}
    content = encode(whole, form, exif=exif, **options)
    found = read_picture(content)
    assert found.shape == (64 // times, 48 // times, 3)
    expected = np.rot90(np.asarray(whole.reduce(times)), -1)
    np.testing.assert_allclose(found.astype(int), expected, atol=10)
    np.testing.assert_array_equal(read_square(content, 8), to_square(found, 8))


@pytest.mark.parametrize(("form", "limit"), [("jpeg", "MAX_JPEG"), ("png", "MAX_OTHER")])
def test_too_large_is_refused_with_a_remedy(
    form: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encode(Image.new("RGB", (64, 48)), form)
    monkeypatch.setattr(reading, limit, 64 * 48)
    read_picture(content)
    monkeypatch.setattr(reading, limit, 64 * 48 - 1)
    with pytest.raises(TooLargeError, match=r"64 × 48 pixels; .* make it smaller"):
        read_picture(content)


def test_what_phones_make_is_within_the_limits() -> None:
    """The largest sensors: 200 megapixels as JPEG; 48 in every format."""
    assert reading.MAX_JPEG >= 16320 * 12240
    assert reading.MAX_OTHER >= 8064 * 6048


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_heic_without_its_reader_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pillow_heif", "pillow_heif.as_plugin"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"pip install 'pillow-heif>=[\d.]+', or save it as JPEG"):
        read_picture(HEIC + bytes(50))
    (tmp_path / "IMG_1").write_bytes(HEIC)
    assert reading.begins_as_picture(tmp_path / "IMG_1")


def test_heic_is_read_upright() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    tiny = Image.fromarray(np.random.default_rng(6).integers(0, 256, (3, 4, 3), np.uint8))
    whole = tiny.resize((64, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    pillow_heif.from_pillow(whole).save(buffer, quality=95, chroma=444)
    assert read_picture(buffer.getvalue()).shape == (48, 64, 3)
    np.testing.assert_allclose(
        read_picture(buffer.getvalue()).astype(int), np.asarray(whole), atol=16
    )
    several = io.BytesIO()
    pair = pillow_heif.from_pillow(whole)
    pair.add_from_pillow(whole.rotate(180))
    pair.save(several, quality=95)
    assert read_picture(several.getvalue()).shape == (48, 64, 3)
    with pytest.raises(DataError):
        read_picture(buffer.getvalue()[:-200])
