"""The nginx configuration of docs/serve.md, in front of a real server."""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import normlab
from attack.server import picture
from normlab.interchange import export_run
from servers import running

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx here: apt-get install nginx-light")

DOCUMENT = Path(__file__).parents[2] / "docs" / "serve.md"
FRAME = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    {lines}
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page behind nginx."""
    folder = tmp_path_factory.mktemp("proxy")
    run = normlab.train("fast79", out=folder / "run", data="sample", epochs=1, threads=1)
    model = export_run(run, folder / "model.onnx").path
    (lines,) = re.findall("```nginx\n(.*?)```", DOCUMENT.read_text(), re.S)
    port = free_port()
    # A server with room for two bodies: slow ones must not get this far.
    with running(str(model), limits={"requests": 2}) as server:
        lines = lines.replace("8080", f"127.0.0.1:{port}").replace("8000", str(server.port))
        (folder / "nginx.conf").write_text(FRAME.format(folder=folder, lines=lines))
        process = subprocess.Popen(
            [NGINX, "-e", f"{folder}/errors", "-p", str(folder), "-c", f"{folder}/nginx.conf"]
        )
        try:
            deadline = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}/pictures/"
        finally:
            process.terminate()
            process.wait(20)


def test_the_page_and_pictures_pass(proxy: str) -> None:
    assert "What is on the picture?" in requests.get(proxy, timeout=60).text
    sent = requests.post(proxy + "predict", files={"files": picture()}, timeout=60)
    assert sent.status_code == 200


def test_a_body_of_unknown_length_passes_with_its_length(proxy: str) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        yield picture()
        yield b"\r\n--x--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    sent = requests.post(proxy + "predict", data=pieces(), headers=headers, timeout=60)
    assert sent.status_code == 200


def test_slow_bodies_end_at_the_proxy(proxy: str) -> None:
    port = int(proxy.split(":")[2].split("/")[0])
    head = (
        b"POST /pictures/predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; "
        b"boundary=x\r\nContent-Length: 100000\r\n\r\nabc"
    )
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    try:
        for s in slow:
            s.sendall(head)
        sent = requests.post(proxy + "predict", files={"files": picture()}, timeout=60)
        assert sent.status_code == 200
    finally:
        for s in slow:
            s.close()


def test_one_client_that_floods_is_told_so_by_the_proxy(proxy: str) -> None:
    port = int(proxy.split(":")[2].split("/")[0])
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(150)]
    for s in sockets:
        s.sendall(b"GET /pictures/healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    codes = []
    for s in sockets:
        s.settimeout(60)
        codes.append(s.recv(1000).split(b" ")[1])
        s.close()
    assert set(codes) == {b"200", b"429"}
