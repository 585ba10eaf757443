"""What a client may send to `normlab serve`: it stalls, lies, floods and sends rubbish.

An attack did no harm if the attacker got the answer that is his, or none, and if meanwhile or
afterwards a well-behaved client was answered. The server is the real one on loopback, in a process
of its own, with small limits, so that minutes become seconds. Only processes that are started here
are ended, and every wait is bounded.
"""

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random

import normlab
from attack.case import Case
from hostile_pictures import HOSTILE
from normlab.data import load
from normlab.interchange import export_run
from servers import Server, start

LIMITS = {
    **{"file_bytes": 10_000_000, "body_bytes": 12_000_000, "buffered_bytes": 40_000_000},
    **{"connections": 64, "head": 1.0, "pause": 1.0, "body": 3.0, "linger": 0.5, "wait": 5.0},
    "decode_wall": 3.0,
}
PATIENCE = 5.0  # seconds in which a well-behaved client is to be answered during an attack
END = 8.0  # seconds in which the server ends, whatever its clients do

FORM = b"multipart/form-data; boundary=x"
Attack = Callable[[Server, Random, float], tuple[int, int]]


def request(
    target: bytes = b"/healthz",
    *,
    method: bytes = b"GET",
    host: bytes = b"localhost",
    headers: bytes = b"",
    body: bytes = b"",
) -> bytes:
    """A request as bytes."""
    return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b\r\n%b" % (method, target, host, headers, body)


def upload(content: bytes, *, length: int | None = None) -> bytes:
    """A request that sends a picture, and may lie about its length."""
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        + content
        + b"\r\n--x--\r\n"
    )
    announced = len(body) if length is None else length
    headers = b"Content-Type: %b\r\nContent-Length: %d\r\n" % (FORM, announced)
    return request(b"/predict", method=b"POST", headers=headers, body=body)


def picture() -> bytes:
    """A sample of CIFAR-10 as a plain PPM file."""
    return b"P6 32 32 255\n" + load("sample").x_test[0].tobytes()


def connect(server: Server, timeout: float = 10.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=timeout)


def talk(server: Server, sent: bytes, *, timeout: float = 10.0) -> bytes | None:
    """What comes back until the server closes or the answer is whole; None for no end in time."""
    with connect(server, timeout) as s:
        with suppress(OSError):
            s.sendall(sent)
        return receive(s, timeout)


def receive(s: socket.socket, timeout: float) -> bytes | None:
    received, until = b"", time.monotonic() + timeout
    while time.monotonic() < until:
        s.settimeout(max(0.01, until - time.monotonic()))
        try:
            chunk = s.recv(65536)
        except TimeoutError:
            return None
        except OSError:  # reset
            return received
        received += chunk
        head, _, body = received.partition(b"\r\n\r\n")
        length = next(
            (int(v) for k, _, v in map(_field, head.split(b"\r\n")) if k == b"content-length"), None
        )
        if not chunk or (length is not None and len(body) >= length):
            return received
    return None


def _field(line: bytes) -> tuple[bytes, bytes, bytes]:
    name, colon, value = line.partition(b":")
    return name.lower(), colon, value.strip()


def status(answer: bytes | None) -> int:
    """HTTP's code; 0 for no answer."""
    words = (answer or b"").split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def well(server: Server, tries: int = 20) -> bool:
    """Whether a client that behaves gets a picture answered, told 429 now and then at most."""
    until = time.monotonic() + PATIENCE
    for _ in range(tries):
        left = until - time.monotonic()
        if left <= 0 or server.process.poll() is not None:
            return False
        with suppress(OSError):
            if status(talk(server, upload(picture()), timeout=left)) == 200:
                return True
        time.sleep(0.05)
    return False


@contextmanager
def held(server: Server, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many connections, each of which has sent that."""
    with ExitStack() as stack:
        sockets = []
        for _ in range(count):
            with suppress(OSError):
                s = stack.enter_context(connect(server))
                s.sendall(sent)
                sockets.append(s)
        yield sockets


def slow_heads(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """The first lines of a request stop in the middle."""
    whole = upload(picture())
    whole = whole[: whole.index(b"\r\n\r\n")]
    good, count = 0, 30
    with ExitStack() as stack:
        sockets = [stack.enter_context(connect(server)) for _ in range(count)]
        for s in sockets:
            s.sendall(whole[: draw.randrange(1, len(whole))])
        healthy = well(server)
        good = sum(status(receive(s, PATIENCE)) == 408 for s in sockets)
    return count, good if healthy else 0


def slow_bodies(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """A body stops, or comes a byte at a time."""
    sent = upload(bytes(2_000_000))
    with held(server, 30, sent[: 300 + draw.randrange(2000)]) as sockets:
        healthy = well(server)
        for s in sockets[:10]:
            with suppress(OSError):
                s.sendall(b"x")
        good = sum(status(receive(s, 2 * PATIENCE)) == 408 for s in sockets)
    return 30, good if healthy else 0


def tiny_chunks(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """Four clients send bodies in pieces of one byte; others wait no longer than usual."""
    head = request(
        b"/predict",
        method=b"POST",
        headers=b"Content-Type: %b\r\nTransfer-Encoding: chunked\r\n" % FORM,
    )
    flood = head + b"1\r\nx\r\n" * 40_000
    until, lock, codes = time.monotonic() + seconds, threading.Lock(), []

    def send() -> None:
        while time.monotonic() < until:
            code = status(talk(server, flood))
            with lock:
                codes.append(code)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(send)
        waits = []
        while time.monotonic() < until:
            began = time.monotonic()
            if not well(server):
                waits.append(PATIENCE)
            waits.append(time.monotonic() - began)
    quick = max(waits) < PATIENCE
    return len(codes), sum(code in (0, 411, 429) for code in codes) if quick else 0


def never_reading(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """Clients send requests without end and read no answer; they are cut off, others are not."""
    count = 20
    many = request(b"/") * 2000
    with ExitStack() as stack:
        sockets = []
        for _ in range(count):
            s = stack.enter_context(connect(server))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.setblocking(False)
            sockets.append(s)
        healthy, open_, until = True, set(sockets), time.monotonic() + 12
        while open_ and time.monotonic() < until:
            for s in list(open_):
                try:
                    s.send(many)
                except BlockingIOError:
                    continue
                except OSError:
                    open_.discard(s)
            healthy = healthy and well(server)
            time.sleep(0.1)
    return count, count - len(open_) if healthy else 0


def many_connections(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """Five times as many connections as there may be; they idle, and make room for others."""
    count = 5 * int(LIMITS["connections"])
    with held(server, count) as sockets:
        time.sleep(1.1)  # the youngest make no room
        healthy = well(server)
    return count, len(sockets) if healthy else 0


def lengths(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """Bodies that are longer or shorter than they say, or than is allowed."""
    content = picture()
    whole = len(upload(content).partition(b"\r\n\r\n")[2])
    tries = [
        (upload(content, length=10**12), (413,)),
        (upload(content, length=10**19), (413, 400)),
        (upload(content, length=whole + 1000), (408,)),
        (upload(content, length=whole - 5), (422,)),
        (upload(content, length=0), (422, 400)),
        (upload(bytes(11_000_000)), (413,)),
        (upload(bytes(13_000_000)), (413,)),
        *((upload(content)[: 150 + draw.randrange(500)], (408,)) for _ in range(5)),
        *(
            (
                request(b"/predict", method=b"POST", headers=b"Content-Length: %b\r\n" % bad),
                (400, 415),
            )
            for bad in (b"-1", b"0x10", b"1e3", b"1, 2", b"", b"9" * 400)
        ),
    ]
    with ThreadPoolExecutor(len(tries)) as pool:
        told = pool.map(lambda pair: status(talk(server, pair[0])), tries)
    good = sum(code in codes for code, (_, codes) in zip(told, tries, strict=True))
    return len(tries), good if well(server) else 0


def hosts(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """Names that are not this server's; it sends nobody there, either."""
    names = [
        *(b"evil.example", b"localhost.evil.example", b"127.0.0.1.evil.example", b"[::2]"),
        *(b"evil.example:8000", b"localhost@evil.example", b"localhost evil", b"", b"0.0.0.0"),
        *(b"127.0.0.2", b"2130706433", b"localhost\x00.evil", b"\xff\xfe", b"localhost:evil"),
    ]
    good = 0
    targets = (b"/model", b"/predict/", b"//evil.example/..", b"http://evil.example/")
    for name in names:
        for target in targets:
            answer = talk(server, request(target, host=name)) or b""
            good += status(answer) in (421, 400) and b"location:" not in answer.lower()
    return len(names) * len(targets), good if well(server) else 0


def odd_requests(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """Methods, paths, versions and headers that nobody sends in earnest, and plain rubbish."""
    methods = (b"GET", b"POST", b"PUT", b"DELETE", b"TRACE", b"CONNECT", b"OPTIONS", b"get", b"X")
    paths = [
        *(b"/../../etc/passwd", b"/samples/..%2f..%2fserve.html", b"/%00", b"/samples/99.png"),
        *(
            b"*",
            b"/" + b"a" * 9000,
            b"/predict?top=" + b"9" * 5000,
            b"/%ff%fe",
            b"/model%0d%0aX: y",
        ),
        *(b"/predict", b"/predict/", b"//", b"/samples/%F0%9F%98%80.png"),
    ]
    tries = [request(path, method=method) for method in methods for path in paths]
    tries += [
        *(b"\r\n" * 500, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)),
        *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /healthz\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"),
        request(headers=b"X: " + b"y" * 200_000 + b"\r\n"),
        request(headers=b"X: y\r\n" * 20_000),
        request(headers=b"Connection: Upgrade\r\nUpgrade: websocket\r\n"),
        request(headers=b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", body=b"0\r\n\r\n"),
    ]
    tries += [draw.randbytes(draw.randrange(1, 4000)) for _ in range(20)]
    good = 0
    with ThreadPoolExecutor(16) as pool:
        for code in pool.map(lambda sent: status(talk(server, sent)), tries):
            good += code < 500
    return len(tries), good if well(server) else 0


def hostile_pictures(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """Bombs, endless comments, claims of gigabytes, circles."""
    good = 0
    for content in HOSTILE.values():
        code = status(talk(server, upload(content), timeout=20))
        good += code in (200, 413, 415) and well(server)
    return len(HOSTILE), good


def bad_forms(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """Seeded changes to a good body of multipart/form-data."""
    _, _, body = upload(picture()).partition(b"\r\n\r\n")
    until, tried, good = time.monotonic() + seconds, 0, 0
    while time.monotonic() < until or tried < 20:
        changed = bytearray(body[:200]) + body[-20:]
        for _ in range(draw.randrange(1, 6)):
            at = draw.randrange(len(changed))
            match draw.randrange(4):
                case 0:
                    changed[at] = draw.randrange(256)
                case 1:
                    del changed[at : at + draw.randrange(1, 30)]
                case 2:
                    changed[at:at] = draw.choice((b"--x", b"\r\n", b"\0", b'"', b";", b"--x--"))
                case 3:
                    changed += changed[at:]
            changed = changed or bytearray(b"-")
        headers = b"Content-Type: %b\r\nContent-Length: %d\r\n" % (FORM, len(changed))
        sent = request(b"/predict", method=b"POST", headers=headers, body=bytes(changed))
        good += status(talk(server, sent)) in (200, 413, 415, 422)
        tried += 1
    return tried, good if well(server) else 0


def cut_connections(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """Sockets closed for sending, or reset, at any moment of a request."""
    whole, count = upload(picture()), 60
    for i in range(count):
        with suppress(OSError), connect(server) as s:
            s.sendall(whole[: draw.randrange(len(whole) + 1)])
            if i % 2:
                s.shutdown(socket.SHUT_WR)
                receive(s, 0.2)
            else:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    return count, count if well(server) else 0


def large_uploads(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """24 uploads at once that together are seven times what may be held; each gets an answer."""
    sent = upload(bytes(11_000_000))
    with ThreadPoolExecutor(24) as pool:
        codes = list(pool.map(lambda _: status(talk(server, sent, timeout=30)), range(24)))
    return len(codes), sum(code in (413, 415, 429) for code in codes) if well(server) else 0


def decoders_killed(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """The processes that decode pictures are killed, while idle and at work, or stopped."""
    tried = good = 0
    for signum in (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP):
        victims = server.children()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(talk, server, upload(HOSTILE["comments without end"]), timeout=20)
            for pid in victims:
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)
            answer.result()
        until = time.monotonic() + 20
        while not (healthy := well(server)) and time.monotonic() < until:
            pass
        tried += len(victims)
        good += len(victims) if healthy else 0
    return tried, good


def no_descriptors(server: Server, draw: Random, seconds: float) -> tuple[int, int]:
    """The server can open no file and no connection for a while."""
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 3, before[1]))
    try:
        with held(server, 40):
            time.sleep(min(seconds, 2.0))
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    until = time.monotonic() + 10
    while not (healthy := well(server)) and time.monotonic() < until:
        pass
    return 40, 40 if healthy else 0


ATTACKS: dict[str, Attack] = {
    "requests whose first lines stop": slow_heads,
    "bodies that stop, or come a byte at a time": slow_bodies,
    "bodies in chunks of one byte": tiny_chunks,
    "clients that send requests and read no answer": never_reading,
    "five times as many connections as there may be": many_connections,
    "bodies that are not as long as they say, or too long": lengths,
    "names in `Host` that are not the server's": hosts,
    "odd methods, paths and headers; rubbish": odd_requests,
    "pictures made to do harm": hostile_pictures,
    "broken multipart/form-data": bad_forms,
    "connections cut or half closed in mid-request": cut_connections,
    "24 large uploads at once": large_uploads,
    "decoders killed, crashed and stopped": decoders_killed,
    "no file descriptor left": no_descriptors,
}


def end_under_fire(server: Server) -> tuple[int, int]:
    """SIGTERM with connections open that are silent, half sent and unread."""
    count = 3 * (int(LIMITS["connections"]) // 4)
    pieces = (b"", upload(bytes(1_000_000))[:2000], request(b"/") * 3000)
    with ExitStack() as stack:
        for i in range(count):
            s = stack.enter_context(connect(server))
            s.setblocking(False)
            with suppress(OSError):
                s.send(pieces[i % 3])
        began = time.monotonic()
        code, errors = server.stop()
        seconds = time.monotonic() - began
    harmless = code == 143 and seconds < END and "Traceback" not in errors and len(errors) < 2000
    if not harmless:
        told = f"code {code} after {seconds:.1f} s, {len(errors)} characters: {errors[:2000]}"
        raise AssertionError(f"SIGTERM ended the server with {told}")
    return count, count


def attacks(folder: Path, draw: Random, tries: int) -> Iterator[Case]:
    """Try everything on one server; what floods goes on for `tries` half seconds."""
    run = normlab.train("fast79", out=folder / "run", data="sample", epochs=1, threads=1)
    server = start(str(export_run(run, folder / "model.onnx").path), limits=LIMITS)
    try:
        for name, trying in ATTACKS.items():
            yield Case(name, *trying(server, draw, tries / 2))
        yield Case("SIGTERM with all of these connected", *end_under_fire(server))
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()
