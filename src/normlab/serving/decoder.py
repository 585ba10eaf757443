"""A process that decodes pictures and may die of them: `python -m normlab.serving.decoder`.

It reads requests from standard input and writes answers to standard output, one at a time:

    request   1 byte: whether the square is wanted as a PNG, too; 4 bytes: length; the file
    answer    1 byte: a `Status`; 1 byte: whether this process is to be replaced;
              4 bytes and 4 bytes: two lengths; the pixels or a message; the PNG

Nothing of a request is a path, and nothing can be written to a disk. A picture that takes more
processor time than allowed ends the process by SIGPROF; one that takes more memory is refused.
"""

import io
import resource
import signal
import struct
import sys
from enum import IntEnum
from typing import BinaryIO

from PIL import Image

from normlab.data.pictures.reading import read_square
from normlab.errors import DataError, TooLargeError

REQUEST = struct.Struct("<?I")
ANSWER = struct.Struct("<B?II")
KEPT = 32 * 2**20  # a process that keeps more than this of what it was given is replaced


class Status(IntEnum):
    """How a picture fared."""

    DECODED = 0
    UNREADABLE = 1
    TOO_LARGE = 2


def main(size: int, seconds: float, memory: int) -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this
    Image.init()  # all formats now: later there may be no memory for them
    idle = _data()
    _limit(idle, memory)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(head := requests.read(REQUEST.size)) == REQUEST.size:
        as_png, length = REQUEST.unpack(head)
        content = requests.read(length)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        status, body, png = _decode(content, size, as_png)
        signal.setitimer(signal.ITIMER_PROF, 0)
        del content
        spent = idle is not None and (_data() or 0) > idle + KEPT
        _write(answers, ANSWER.pack(status, spent, len(body), len(png)) + body + png)


def _decode(content: bytes, size: int, as_png: bool) -> tuple[Status, bytes, bytes]:
    try:
        pixels = read_square(content, size)
        return Status.DECODED, pixels.tobytes(), _png(Image.fromarray(pixels)) if as_png else b""
    except TooLargeError as error:
        return Status.TOO_LARGE, str(error).encode(), b""
    except DataError as error:
        return Status.UNREADABLE, str(error).encode("utf-8", "replace"), b""


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()


def _limit(idle: int | None, memory: int) -> None:
    """Allow `memory` bytes beyond what there is, where the system can; no files, no core dumps."""
    if idle is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (idle + memory, idle + memory))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def _data() -> int | None:
    """Bytes that count against RLIMIT_DATA, or None where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        return None


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
