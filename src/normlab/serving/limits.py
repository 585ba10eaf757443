"""What a server bears: every figure in one place. docs/serve.md has the same table."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one server; sizes in bytes, times in seconds.

    Attributes:
        file_bytes: of one picture's file (413). Pixels are limited where pictures are read.
        parts: pictures in one request (413).
        body_bytes: one request's body (413).
        requests: predictions being received or computed at a time (429).
        buffered_bytes: of all bodies held at a time (429).
        connections: open at a time (429).
        wait: for a free decoder (429).
        head: until a request's first lines are complete (408).
        pause: between two pieces of a body (408).
        body: until a body is complete (408).
        linger: for the rest of a body that has been answered before its end.
        decode_cpu: processor time to decode one picture (413).
        decode_wall: time to decode one picture on a machine that is busy otherwise (413).
        decode_memory: to decode one picture, beyond what an idle decoder has (413).
    """

    file_bytes: int = 10_000_000
    parts: int = 64
    body_bytes: int = 64_000_000
    requests: int = 128
    buffered_bytes: int = 256_000_000
    connections: int = 512
    wait: float = 10
    head: float = 10
    pause: float = 10
    body: float = 60
    linger: float = 2
    decode_cpu: float = 2
    decode_wall: float = 6
    decode_memory: int = 256 * 2**20
