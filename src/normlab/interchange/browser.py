"""A page's answers, computed in a real browser: served on loopback, opened without a window."""

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normlab.core.children import child_environment
from normlab.errors import UserError
from normlab.interchange.certificate import CertificateError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def find_browser(given: Path | None = None) -> str:
    """The program of a browser of Chromium's family.

    Raises:
        UserError: there is none.
    """
    candidates = [str(given)] if given else [*BROWSERS, _MAC]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        what = (
            f"browser {str(given)!r} is no program" if given else "there is no Chromium or Chrome"
        )
        raise UserError(
            f"{what}: format web is checked in one; install it, or name its program with --browser"
        )
    return found


def browser_version(browser: str) -> str:
    """What the browser calls itself, such as "Chromium 149.0"."""
    told = subprocess.run([browser, "--version"], capture_output=True, text=True, check=False)
    return " ".join(told.stdout.split()[:2]) or Path(browser).name


def answers(
    page: Mapping[str, bytes],
    pictures: Sequence[bytes],
    browser: str,
    *,
    seconds: float = 300,
) -> list[NDArray[np.float32]]:
    """Open `check.html` of `page`, which answers every one of `pictures`, and return its answers.

    The page gets `count`, `picture/0`… by GET and sends what it makes of each, as float32, by POST
    to `answer/0`…, or a reason to `failed`.

    Raises:
        CertificateError: the page failed, or had not answered all of them after `seconds`.
    """
    check = _Check(page, pictures)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            content = check.get(self.path.lstrip("/"))
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Type", _KINDS.get(Path(self.path).suffix, "image/png"))
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def do_POST(self) -> None:
            check.post(self.path.lstrip("/"), self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            _open(browser, f"http://127.0.0.1:{server.server_port}/check.html", check, seconds)
        finally:
            server.shutdown()
    if check.failure or len(check.answers) < len(pictures):
        told = check.failure or f"{len(check.answers)} answers after {seconds:g} s"
        raise CertificateError(
            f"the page does not answer in {browser}, nothing was written: {told[:500]}"
        )
    return [check.answers[i] for i in range(len(pictures))]


class _Check:
    """What the page is given, and what it has answered."""

    def __init__(self, page: Mapping[str, bytes], pictures: Sequence[bytes]) -> None:
        self.page, self.pictures = page, pictures
        self.answers: dict[int, NDArray[np.float32]] = {}
        self.failure = ""
        self.done = threading.Event()

    def get(self, path: str) -> bytes | None:
        place, _, number = path.partition("/")
        if place == "picture":
            return self.pictures[int(number)]
        return str(len(self.pictures)).encode() if path == "count" else self.page.get(path)

    def post(self, path: str, body: bytes) -> None:
        place, _, number = path.partition("/")
        if place == "answer":
            self.answers[int(number)] = np.frombuffer(body, np.float32)
        else:
            self.failure = body.decode("utf-8", "replace")
        if self.failure or len(self.answers) == len(self.pictures):
            self.done.set()


def _open(browser: str, address: str, check: _Check, seconds: float) -> None:
    """Run the browser until the page is done, with a profile of its own that goes afterwards."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            *(browser, "--headless=new", "--disable-gpu", "--no-first-run", "--mute-audio"),
            *("--disable-background-networking", f"--user-data-dir={profile}"),
            *(["--no-sandbox"] if root else []),  # Chromium refuses to run as root with it
            address,
        ]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, env=child_environment()
        )
        try:
            check.done.wait(seconds)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
