"""The server over real HTTP: answers, limits, hostile pictures, and how it ends."""

import base64
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

import normlab
from normlab.data import load
from normlab.data.pictures.reading import to_square
from normlab.interchange import export_run
from normlab.runs.run import Run
from servers import Server, running, start

LIMITS = {
    "file_bytes": 300_000,
    "parts": 70,
    "body_bytes": 2_000_000,
    "head": 1.0,
    "pause": 1.0,
    "body": 2.5,
    "linger": 0.5,
}


def png(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


SAMPLE = load("sample").x_test
PICTURE = png(SAMPLE[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run") / "fast"
    return normlab.train("fast79", out=folder, data="sample", epochs=1, threads=1)


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(run, tmp_path_factory.mktemp("exported") / "model.onnx").path


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[Server]:
    with running(str(exported), limits=LIMITS) as server:
        yield server


def probabilities(answer: dict[str, Any], names: tuple[str, ...]) -> np.ndarray:
    found = {p["class"]: p["probability"] for p in answer["predictions"]}
    return np.array([found[name] for name in names])


def test_a_run_is_served_and_answers_as_its_evaluation_does(run: Run) -> None:
    evaluation = run.evaluate()
    with running(str(run.path)) as server:
        assert "compared with its run on all 200 test images" in server.said[0]
        answered = server.post(*(png(x) for x in SAMPLE[:50]), query="?top=10")
        model = server.get("/model").json()
    assert answered.status_code == 200
    for i, answer in enumerate(answered.json()["results"]):
        found = probabilities(answer, evaluation.class_names)
        np.testing.assert_allclose(found, evaluation.probabilities[i], rtol=0, atol=1e-5)
        assert answer["name"] == f"{i}.png"
        ranked = [p["probability"] for p in answer["predictions"]]
        assert ranked == sorted(ranked, reverse=True)
    assert model["certificate"]["test_images"] == 200
    assert (model["name"], model["recipe"], model["data"]) == ("fast", "fast79", "sample")


def test_without_its_test_images_a_run_is_compared_on_samples_and_says_so(
    run: Run, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in run.path.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    recipe = json.loads((moved / "recipe.json").read_text())
    recipe["data"] = "/gone/pets.npz"
    (moved / "recipe.json").write_text(json.dumps(recipe))
    with running(str(moved)) as server:
        assert "compared with its run on 64 samples" in server.said[0]
        assert "not at hand: the run's data are '/gone/pets.npz'" in server.said[0]
        model = server.get("/model").json()
    assert model["certificate"] is None
    assert model["data"] == "pets.npz"


def test_the_model_the_health_and_the_samples(server: Server, exported: Path) -> None:
    assert server.get("/healthz").json()["status"] == "ok"
    model = server.get("/model").json()
    assert model["name"] == "model.onnx"
    assert model["image_size"] == 32
    assert model["certificate"]["test_images"] == 200
    assert str(exported.parent) not in json.dumps(model)
    assert model["limits"]["file_bytes"] == LIMITS["file_bytes"]
    assert len(model["samples"]) == 10
    sample = server.get("/" + model["samples"][3]["path"])
    assert sample.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(sample.content)) as image:
        assert image.size == (32, 32)
    assert server.get("/samples/10.png").status_code == 422
    for path in ("/samples/..%2f..%2fserve.html", "/serve.html", "/docs", "/redoc"):
        assert server.get(path).status_code in (404, 422)


def test_what_the_network_sees_is_what_training_would_have_seen(server: Server) -> None:
    large = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    (answer,) = server.post(png(large), query="?seen=true&top=2").json()["results"]
    kind, _, content = answer["seen"].partition(",")
    assert kind == "data:image/png;base64"
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    np.testing.assert_array_equal(seen, to_square(large, 32))
    assert len(answer["predictions"]) == 2
    assert answer["milliseconds"]["decoding"] > 0 < answer["milliseconds"]["model"]
    (plain,) = server.post(png(large)).json()["results"]
    assert plain["seen"] is None


def test_a_kept_connection_is_answered_without_delay(server: Server) -> None:
    """Nagle's algorithm against delayed acknowledgements would make it 40 ms, each time."""
    with requests.Session() as session:
        session.get(server.url + "/healthz", timeout=60)
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            session.get(server.url + "/healthz", timeout=60)
            seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.03


def test_headers_keep_other_hosts_out(server: Server) -> None:
    for path in ("/", "/serve.js", "/model", "/nowhere"):
        headers = server.get(path).headers
        assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "server" not in headers


def test_openapi_describes_errors_too(server: Server) -> None:
    document = server.get("/openapi.json").json()
    predict = document["paths"]["/predict"]["post"]
    assert set(predict["responses"]) == {"200", "408", "413", "415", "422", "429"}
    assert "Retry-After" in predict["responses"]["429"]["headers"]
    assert "multipart/form-data" in predict["requestBody"]["content"]
    assert {"/model", "/healthz", "/predict"} <= set(document["paths"])


def test_one_bad_picture_among_good_ones_has_its_own_error(server: Server) -> None:
    answered = server.post(PICTURE, b"no picture", PICTURE + bytes(400_000), PICTURE)
    assert answered.status_code == 200
    good, bad, large, last = answered.json()["results"]
    assert good["predictions"] == last["predictions"]
    assert bad["error"]["status"] == 415
    assert "not a picture" in bad["error"]["detail"]
    assert large["error"]["status"] == 413
    assert bad["predictions"] == large["predictions"] == []


@pytest.mark.parametrize(
    ("content", "status", "named"),
    [
        (b"no picture", 415, "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not a picture"),
        (PICTURE[:200], 415, "cannot be read"),
        (PICTURE + bytes(400_000), 413, "more than 0.3 MB"),
    ],
)
def test_a_bad_picture_alone_gives_its_code(
    server: Server, content: bytes, status: int, named: str
) -> None:
    answered = server.post(content)
    assert answered.status_code == status
    assert named in answered.json()["detail"]


def test_a_name_decides_nothing(server: Server) -> None:
    """Neither the file's name nor the type it claims; the name comes back as text."""
    name = "../../etc/passwd<b>\x07.exe"
    files = {"files": (name, PICTURE, "text/html")}
    answered = requests.post(server.url + "/predict", files=files, timeout=60)
    (answer,) = answered.json()["results"]
    assert "passwd<b>" in answer["name"]
    assert "\x07" not in answer["name"]
    assert answered.headers["content-type"] == "application/json"


BODY = (
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n%b\r\n--x--\r\n'
    % PICTURE
)
FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("content_type", "body", "status", "named"),
    [
        (None, b"", 415, "multipart/form-data"),
        ("image/png", PICTURE, 415, "multipart/form-data"),
        ("application/json", b"{}", 415, "multipart/form-data"),
        ("multipart/form-data", BODY, 422, "boundary"),
        (FORM, b"", 422, "last boundary"),
        (FORM, b"--x--\r\n", 422, "no picture"),
        (FORM, BODY[:-10], 422, "last boundary"),
        (FORM, b"rubbish", 422, "multipart"),
        (FORM, BODY.replace(b"files", b"url"), 422, "'url'"),
        (FORM, BODY.replace(b"form-data; name", b"form-data; nome"), 422, "field"),
        (FORM, BODY.replace(b"Content-Disposition", b"X" * 9000), 422, "multipart"),
    ],
)
def test_a_body_of_another_kind(
    server: Server, content_type: str | None, body: bytes, status: int, named: str
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answered = requests.post(server.url + "/predict", data=body, headers=headers, timeout=60)
    assert answered.status_code == status
    assert named in answered.json()["detail"]


@pytest.mark.parametrize(
    "query", ["?top=0", "?top=x", "?top=%2B5", "?top=5.0", "?top=1001", "?seen=perhaps"]
)
def test_wrong_parameters(server: Server, query: str) -> None:
    answered = server.post(PICTURE, query=query)
    assert answered.status_code == 422
    assert answered.json()["detail"].startswith(query[1:].split("=")[0] + ":")


def test_too_many_parts_and_too_long_a_body(server: Server) -> None:
    answered = server.post(*[b"x"] * 71)
    assert answered.status_code == 413
    assert "more than 70 pictures" in answered.json()["detail"]
    answered = server.post(*[bytes(250_000)] * 9)
    assert answered.status_code == 413
    assert "more than 2 MB in one request" in answered.json()["detail"]

    def endless() -> Iterator[bytes]:  # of no stated length
        yield BODY[:80]
        for _ in range(60):
            yield bytes(50_000)

    answered = requests.post(
        server.url + "/predict", data=endless(), headers={"Content-Type": FORM}, timeout=60
    )
    assert answered.status_code == 413


def talk(server: Server, *pieces: bytes, pause: float = 0.0) -> tuple[bytes, float]:
    """Send bytes one after the other; what comes back until the server closes, and after what
    time."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
        began = time.monotonic()
        s.settimeout(20)
        for piece in pieces:
            try:
                s.sendall(piece)
            except OSError:
                break
            time.sleep(pause)
        received = b""
        while chunk := s.recv(65536):
            received += chunk
        return received, time.monotonic() - began


HEAD = (
    f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n"
).encode()


@pytest.mark.parametrize("sent", [HEAD[:30], HEAD, HEAD + BODY[:100]])
def test_who_stops_sending_is_told(server: Server, sent: bytes) -> None:
    received, seconds = talk(server, sent)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"send it faster" in received
    assert 0.9 < seconds < 6


def test_who_sends_a_byte_at_a_time_is_told(server: Server) -> None:
    received, seconds = talk(server, HEAD, *(bytes([b]) for b in BODY[:12]), pause=0.3)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert seconds < 8
    received, _ = talk(server, *(bytes([b]) for b in HEAD[:12]), pause=0.3)
    assert received.startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_says_nothing_is_closed(server: Server) -> None:
    received, seconds = talk(server)
    assert received == b""
    assert seconds < 6


def test_overload_is_told_with_when_to_try_again(exported: Path) -> None:
    limits = {"requests": 4, "model_seconds": 0.5}
    with running(str(exported), limits=limits) as server:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: server.post(PICTURE), range(12)))
        codes = [a.status_code for a in answers]
        assert set(codes) == {200, 429}
        refused = next(a for a in answers if a.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert "try again" in refused.json()["detail"]
        assert server.post(PICTURE).status_code == 200
    with running(str(exported), limits={"buffered_bytes": 1000}) as server:
        assert server.post(PICTURE).status_code == 429
        assert server.get("/healthz").status_code == 200
    with running(str(exported), limits={"connections": 2}) as server:
        with (
            socket.create_connection(("127.0.0.1", server.port)),
            socket.create_connection(("127.0.0.1", server.port)),
        ):
            received, _ = talk(server)
            assert received.startswith(b"HTTP/1.1 429 ")
            assert b"Retry-After: 1\r\n" in received
        time.sleep(0.2)
        assert server.get("/healthz").status_code == 200


def test_who_waits_goes_into_one_batch(exported: Path) -> None:
    """Many requests make far fewer runs of the model, and each has its own answer."""
    with running(str(exported), limits={"model_seconds": 0.2}) as server:
        alone = [server.post(png(x)).json()["results"][0]["predictions"] for x in SAMPLE[:4]]
        before = server.get("/healthz").json()
        assert (before["pictures"], before["model_runs"]) == (4, 4)
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda i: server.post(png(SAMPLE[i % 4])), range(24)))
        after = server.get("/healthz").json()
    assert after["pictures"] - before["pictures"] == 24
    assert after["model_runs"] - before["model_runs"] < 12
    for i, answer in enumerate(answers):
        found = answer.json()["results"][0]["predictions"]
        assert [p["class"] for p in found] == [p["class"] for p in alone[i % 4]]
        np.testing.assert_allclose(
            [p["probability"] for p in found],
            [p["probability"] for p in alone[i % 4]],
            rtol=0,
            atol=1e-5,
        )


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def packed(size: int) -> bytes:
    """Zeros, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    block = bytes(1_000_000)
    return b"".join(packer.compress(block) for _ in range(size // 1_000_000)) + packer.flush()


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


def peak_memory(pid: int) -> int:
    """The most memory a process has held so far, in bytes; 0 if it has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def processor_time(pid: int) -> float:
    """Seconds a process and those of its children that ended have used; 0 if it has gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, words[11:15])) / 100


def test_a_hostile_picture_costs_little_and_the_server_stays_healthy(exported: Path) -> None:
    """At most 2 s of a processor and 256 MB beyond an idle decoder, measured from outside."""
    with running(str(exported)) as server:
        assert server.post(PICTURE).status_code == 200
        idle = max(map(peak_memory, server.children()))
        for name, content in HOSTILE.items():
            assert len(content) < 10_000_000, name
            before = sum(map(processor_time, [server.process.pid, *server.children()]))
            peak = 0
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(server.post, content)
                while not answer.done():
                    peak = max([peak, *map(peak_memory, server.children())])
                    time.sleep(0.005)
            after = sum(map(processor_time, [server.process.pid, *server.children()]))
            assert answer.result().status_code in (200, 413, 415), name
            assert after - before < 2.7, name  # with the start of another decoder, if it died
            assert peak - idle < 256 * 2**20, name
            assert server.post(PICTURE).status_code == 200, name
        assert peak_memory(server.process.pid) < 600 * 2**20
        assert server.get("/healthz").json()["status"] == "ok"


def test_a_decoder_that_takes_too_long_is_replaced(exported: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (3000, 3000, 3), np.uint8)
    slow = png(noise, compress_level=1)  # 7 MB that take 0.15 s, seven times the limit
    with running(str(exported), limits={"decode_cpu": 0.02}) as server:
        before = server.children()
        for _ in range(3):
            answered = server.post(slow)
            assert answered.status_code == 413
            assert "too long" in answered.json()["detail"]
        assert server.post(PICTURE).status_code == 200
        deadline = time.monotonic() + 20
        while len(server.children()) != len(before) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(server.children()) == len(before)
        assert set(server.children()) != set(before)


def test_a_decoder_that_is_killed_is_replaced(exported: Path) -> None:
    with running(str(exported)) as server:
        children = server.children()
        for pid in children:
            subprocess.run(["kill", "-KILL", str(pid)], check=True)
        codes = [server.post(PICTURE).status_code for _ in range(len(children) + 2)]
        assert codes[-2:] == [200, 200]
        assert not set(server.children()) & set(children)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_requests_under_way_are_answered_before_the_end(
    exported: Path, signum: signal.Signals, code: int, background: bool
) -> None:
    # A shell's background command inherits that SIGINT is ignored.
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler
    )
    try:
        server = start(str(exported), limits={"model_seconds": 1.0})
    finally:
        signal.signal(signal.SIGINT, before)
    children = server.children()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, PICTURE)
        time.sleep(0.4)
        found, errors = server.stop(signum)
    assert answer.result().status_code == 200
    said = "normlab: interrupted\n" if signum == signal.SIGINT else ""
    assert (found, errors.lstrip("\n")) == (code, said)  # together: each tells of the other
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_decoders_end_with_a_server_that_is_killed(exported: Path) -> None:
    server = start(str(exported))
    server.post(PICTURE)
    children = server.children()
    server.stop(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def refused(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "normlab", "serve", *words],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_mistakes_are_one_line(exported: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = refused(str(exported), "--port", port)
    assert f"port {port}" in message
    assert "--port" in message.replace(port, "")
    assert "no/such.onnx" in refused("no/such.onnx", "--port", "0")
    assert "nowhere" in refused("nowhere", "--port", "0")
    assert (
        "no.such.host.invalid"
        in subprocess.run(
            [
                sys.executable,
                "-m",
                "normlab",
                "serve",
                str(exported),
                "--host",
                "no.such.host.invalid",
            ],
            capture_output=True,
            text=True,
            timeout=200,
        ).stderr
    )


def test_another_address_than_this_machine_is_noted(exported: Path) -> None:
    server = start(str(exported), "--host", "0.0.0.0")
    _, errors = server.stop()
    assert "no password" in errors


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_generated_requests_and_no_failure(exported: Path, tmp_path: Path) -> None:
    """Schemathesis over the OpenAPI description, run as its command.

    One check is left out: that what fits the description is accepted. A description cannot say
    which bytes are a picture.
    """
    with running(str(exported)) as server:
        done = subprocess.run(
            [
                *(str(Path(sys.executable).with_name("schemathesis")), "run"),
                *(f"{server.url}/openapi.json", "--max-examples", "6000", "--workers", "2"),
                *("--exclude-checks", "positive_data_acceptance", "--seed", "1", "--no-color"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=3000,
        )
        assert server.post(PICTURE).status_code == 200
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    generated = re.search(r"([\d,]+) generated", done.stdout)
    assert generated is not None
    assert int(generated[1].replace(",", "")) >= 10_000
