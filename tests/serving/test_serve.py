"""The server over real HTTP: answers, limits, hostile pictures, and how it ends."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import requests
from PIL import Image

import normlab
from hostile_pictures import HOSTILE
from normlab.data import load
from normlab.data.pictures.reading import to_square
from normlab.errors import UserError
from normlab.interchange import export_run
from normlab.runs import Run
from normlab.serving.server import _name
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
    assert "gone" not in json.dumps(model)


def test_the_model_the_health_and_the_samples(server: Server, exported: Path) -> None:
    assert server.get("/healthz").json()["status"] == "ok"
    model = server.get("/model").json()
    assert model["name"] == "model.onnx"
    assert model["image_size"] == 32
    assert model["certificate"]["test_images"] == 200
    assert str(exported.parent) not in json.dumps(model)
    assert model["limits"]["file_bytes"] == LIMITS["file_bytes"]
    assert (model["limits"]["pixels"], model["limits"]["jpeg_pixels"]) == (50_000_000, 200_000_000)
    assert ("HEIC" in model["formats"]) == (find_spec("pillow_heif") is not None)
    assert len(model["samples"]) == 10
    sample = server.get("/" + model["samples"][3]["path"])
    assert sample.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(sample.content)) as image:
        assert image.size == (32, 32)
    assert server.get("/samples/10.png").status_code == 422
    for path in ("/samples/..%2f..%2fserve.html", "/page.html", "/docs", "/redoc"):
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


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]", 200),
        ("[::1]:80", 200),
        ("pets.example", 421),
        ("localhost.pets.example", 421),
        ("pets.example:8000", 421),
        ("127.0.0.2", 421),
        ("[::2]", 421),
        ("0.0.0.0", 421),
        ("", 421),
    ],
)
def test_only_its_own_names_are_answered(server: Server, host: str, status: int) -> None:
    """A website could otherwise have its name lead here (DNS rebinding), and read the answers."""
    for path in ("/model", "/", "/nowhere"):
        answered = requests.get(server.url + path, headers={"Host": host}, timeout=60)
        assert answered.status_code == (404 if (status, path) == (200, "/nowhere") else status)
    sent = requests.post(
        server.url + "/predict", files={"files": PICTURE}, headers={"Host": host}, timeout=60
    )
    assert sent.status_code == status
    assert status == 200 or "--allow-host" in sent.json()["detail"]


def test_nobody_is_sent_to_another_address(server: Server) -> None:
    for path in ("/predict/", "/model/", "//pets.example/model"):
        answered = requests.get(server.url + path, allow_redirects=False, timeout=60)
        assert answered.status_code in (404, 405), path
        assert "location" not in answered.headers


def test_further_names_are_allowed_by_an_option(exported: Path) -> None:
    with running(
        str(exported),
        "--allow-host",
        "2001:db8::7",
        "--allow-host",
        "Pets.example:80",
        "--allow-host",
        "b",
    ) as server:
        for host, code in (
            ("pets.example:99", 200),
            ("b", 200),
            ("[2001:db8::7]:8", 200),
            ("c", 421),
            ("localhost", 200),
        ):
            answered = requests.get(server.url + "/model", headers={"Host": host}, timeout=60)
            assert answered.status_code == code, host


def told_of_itself(exported: Path, path: Path, **entries: Any) -> Path:
    """The same file with other metadata."""
    model = onnx.load(exported)
    for entry in model.metadata_props:
        if entry.key in entries:
            entry.value = json.dumps(entries[entry.key])
    onnx.save(model, path)
    return path


NAMES = ["a\x1b]0;title\x07", "b\ud800", "\u202egnp.exe", "c\r\nd", "\x00", "<b>", "猫", *"xyz"]


def test_what_a_file_says_of_itself_is_only_shown(exported: Path, tmp_path: Path) -> None:
    certificate = {"test_images": 200, "x\udfff": ["\x9b", float("nan"), {"y": [[[[[1]]]]]}]}
    recipe = {"recipe": {"name": "r\x1b[2J"}, "data": "/home/p\ud83d"}
    path = told_of_itself(
        exported,
        tmp_path / "model\x1b]0;x\x07.onnx",
        class_names=NAMES,
        certificate=certificate,
        recipe=recipe,
    )
    with running(str(path)) as server:
        said, model, answered = server.said, server.get("/model"), server.post(PICTURE)
        sample = server.get("/samples/0.png")
    assert model.status_code == answered.status_code == 200
    described = model.json()
    assert all(line.isprintable() for line in (*said, *described["class_names"]))
    assert described["class_names"][5:7] == ["<b>", "猫"]
    assert described["recipe"] == r"r\x1b[2J"
    assert described["certificate"]["test_images"] == 200
    text = json.dumps(described, ensure_ascii=False)
    assert text.isprintable()
    classes = {p["class"] for p in answered.json()["results"][0]["predictions"]}
    assert classes <= set(described["class_names"])
    assert described["samples"] == []  # aeroplanes and cats are not what it knows
    assert sample.status_code == 404


def test_an_answer_that_is_not_a_number_is_an_error_of_its_own(
    exported: Path, tmp_path: Path
) -> None:
    model = onnx.load(exported)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full_like(array, np.nan), tensor.name))
    onnx.save(model, tmp_path / "nan.onnx")
    with running(str(tmp_path / "nan.onnx")) as server:
        answered = server.post(PICTURE)
        many = server.post(PICTURE, b"no picture")
    assert answered.status_code == 500
    assert "not a number" in answered.json()["detail"]
    assert [a["error"]["status"] for a in many.json()["results"]] == [500, 415]


def test_openapi_describes_errors_too(server: Server) -> None:
    document = server.get("/openapi.json").json()
    predict = document["paths"]["/predict"]["post"]
    codes = "200 408 411 413 415 421 422 429 500 503"
    assert set(predict["responses"]) == set(codes.split())
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
    assert answered.status_code == 411
    assert "Content-Length" in answered.json()["detail"]


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
    f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM}\r\n"
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
    with running(str(exported), limits={"buffered_bytes": 1000, "wait": 0.2}) as server:
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


def test_a_phones_photograph_of_48_megapixels_is_answered(exported: Path) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (750, 1000, 3), np.uint8))
    file = io.BytesIO()
    small.resize((8000, 6000)).save(file, "JPEG", quality=95)
    assert 15_000_000 < len(file.getvalue()) < 25_000_000
    with running(str(exported)) as server:
        assert server.post(file.getvalue()).status_code == 200


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
        assert codes == [200] * len(codes)  # it was not the picture's fault
        assert not set(server.children()) & set(children)


def test_a_decoder_that_hangs_is_replaced(exported: Path) -> None:
    with running(str(exported), limits={"decode_wall": 1.0}) as server:
        stopped = server.children()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        codes = [server.post(PICTURE).status_code for _ in range(len(stopped) + 1)]
        assert codes == [413] * len(stopped) + [200]
        assert not set(server.children()) & set(stopped)


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


def test_views_are_refused_in_one_line_where_they_cannot_be(exported: Path, run: Run) -> None:
    assert f"{exported} answers single views: leave out --views" in refused(
        str(exported), "--port", "0", "--views", "flip"
    )
    message = refused(str(run.path), "--port", "0", "--views", "unsure")  # it held out nothing
    assert f"which answers of run {run.path}" in message
    assert "choose views flip or shift" in message
    message = refused(str(run.path), "--port", "0", "--views", "flip", "--abstain-at", "90")
    assert "--abstain-at holds for single views: leave out --views" in message


def test_mistakes_are_one_line(exported: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = refused(str(exported), "--port", port)
    assert f"port {port}" in message
    assert "--port" in message.replace(port, "")
    message = refused(str(exported), "--allow-host", "http://pets.example")
    assert "'http://pets.example'" in message
    assert "such as pictures.example" in message
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


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(exported: Path, closed: str) -> None:
    """Their numbers would otherwise go to the server's own sockets and pipes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "normlab", "serve", str(exported), "--port", str(port)]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" {closed}', "bash", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 100
        while True:
            try:
                answered = requests.post(
                    f"http://127.0.0.1:{port}/predict", files={"files": PICTURE}, timeout=60
                )
                break
            except requests.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        process.terminate()
        code = process.wait(60)
    assert (answered.status_code, code) == (200, 143)


def limited_to(files: int, *words: str) -> list[str]:
    command = [sys.executable, "-m", "normlab", "serve", *words]
    return ["bash", "-c", f'ulimit -n {files}; exec "$@"', "bash", *command]


@pytest.mark.parametrize("name", ["*", "", " ", "a b", "//a", "*.a", "a@b", "[a", "https://[::1]/"])
def test_what_is_no_name_is_not_allowed(name: str) -> None:
    with pytest.raises(UserError, match="give it alone"):
        _name(name)


def test_too_few_descriptors_are_told_at_the_start(exported: Path) -> None:
    done = subprocess.run(
        limited_to(100, str(exported), "--port", "0"), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2
    assert "may open 100 files" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_another_address_than_this_machine_is_noted(exported: Path) -> None:
    server = start(str(exported), "--host", "0.0.0.0")
    _, errors = server.stop()
    assert "no password" in errors


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_generated_requests_and_no_failure(exported: Path, tmp_path: Path) -> None:
    """Schemathesis over the OpenAPI description, run as its command.

    One check is left out: that what fits the description is accepted. A description cannot say
    which bytes are a picture. `generated.py` leaves out what no request can carry.
    """
    with running(str(exported)) as server:
        done = subprocess.run(
            [
                *(str(Path(sys.executable).with_name("schemathesis")), "run"),
                *(f"{server.url}/openapi.json", "--max-examples", "6000", "--workers", "2"),
                *("--exclude-checks", "positive_data_acceptance", "--seed", "1", "--no-color"),
            ],
            cwd=tmp_path,
            env=os.environ
            | {"PYTHONPATH": str(Path(__file__).parent), "SCHEMATHESIS_HOOKS": "generated"},
            capture_output=True,
            text=True,
            timeout=3000,
        )
        assert server.post(PICTURE).status_code == 200
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    generated = re.search(r"([\d,]+) generated", done.stdout)
    assert generated is not None
    assert int(generated[1].replace(",", "")) >= 10_000
