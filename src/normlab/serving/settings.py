"""The server's limits. docs/serve.md has the same table."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The limits of one server. Sizes are in bytes, times in seconds.

    The number in brackets is the HTTP status that a request gets which passes the limit.

    Attributes:
        file_bytes: size of one picture's file (413). `data.pictures.reading` limits its pixels.
        parts: pictures in one request (413).
        body_bytes: size of one request's body (413).
        requests: requests with a body at the same time (429).
        buffered_bytes: size of the bodies of all these requests together. A request that would
            exceed it waits for its turn (429 after `wait`).
        connections: open connections at the same time (429).
        wait: time that a request waits for its turn to send its body, and then for a free
            decoder (429).
        head: time until a request's first lines are complete (408).
        pause: time between two pieces of a body (408), and between two pieces of an answer that
            the client reads (the connection is closed).
        body: time until a body is complete (408).
        linger: time for which the rest of a refused body is read, so that the answer arrives;
            and time that clients get to finish sending or reading when the server is ended.
        decode_cpu: processor time to decode one picture (413).
        decode_wall: time on the clock to decode one picture (413).
        decode_memory: memory to decode one picture, its file included (413). Linux only.
        decoder_start: time on the clock to start a decoder.
    """

    file_bytes: int = 25_000_000
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
    decoder_start: float = 30
