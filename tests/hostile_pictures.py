"""Pictures made to do harm, each under 10 MB."""

import io
import struct
import zlib

from PIL import Image


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def packed(size: int) -> bytes:
    """So many zeros, of which each million after the first is the same thousand bytes."""
    packer, million = zlib.compressobj(9), bytes(1_000_000)
    first, again = (packer.compress(million) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    sums = struct.pack(">HH", size % 65521, 1)  # Adler's, of zeros
    return first + again * (size // len(million) - 1) + b"\3\0" + sums


def gif_of(frames: int) -> bytes:
    one = b"\x21\xf9\x04\x00\x01\x00\x00\x00" + b"\x2c\0\0\0\0\1\0\1\0\0" + b"\x02\x02\x44\x01\0"
    palette = bytes(6)
    return b"GIF89a\x01\x00\x01\x00\x80\x00\x00" + palette + one * frames + b"\x3b"


def endless_gif() -> bytes:
    """One frame of 25 megapixels, and then comments to the end."""
    head = b"GIF89a" + struct.pack("<HH", 5000, 5000) + b"\x80\x00\x00" + bytes(6)
    return head + (b"\x21\xfe" + b"\xff" + b"c" * 255 + b"\0") * 30_000


def slow_webp() -> bytes:
    """Valid, 25 megapixels, and more memory to decode than is allowed."""
    file = io.BytesIO()
    Image.new("RGB", (5000, 5000), "red").save(file, "WEBP", method=0)
    return file.getvalue()


def looped_tiff() -> bytes:
    """A directory that names itself as the next."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 0) + struct.pack("<I", 8)


def nested_text() -> bytes:
    text = b"k\0\0" + packed(900_000_000)
    return png_of(8, 8, chunk(b"zTXt", text), chunk(b"IDAT", zlib.compress(bytes(8 * 25))))


HOSTILE = {
    "60000 × 60000 claimed": png_of(60_000, 60_000, chunk(b"IDAT", packed(50_000_000))),
    "a gigabyte behind 25 megapixels": png_of(5000, 5000, chunk(b"IDAT", packed(1_000_000_000))),
    "100,000 frames": gif_of(100_000),
    "comments without end": endless_gif(),
    "900 MB of text": nested_text(),
    "text upon text": png_of(
        8, 8, *[chunk(b"zTXt", b"k\0\0" + packed(1_000_000))] * 2000, chunk(b"IDAT", b"x")
    ),
    "a profile of 900 MB": png_of(
        8, 8, chunk(b"iCCP", b"k\0\0" + packed(900_000_000)), chunk(b"IDAT", b"x")
    ),
    "a wrong checksum": png_of(8, 8, chunk(b"IDAT", zlib.compress(bytes(200)))[:-4] + b"abcd"),
    "a chunk longer than the file": png_of(8, 8, struct.pack(">I", 2**31 - 1) + b"IDAT"),
    "memory": slow_webp(),
    "a circle": looped_tiff(),
}
