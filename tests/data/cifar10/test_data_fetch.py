"""Fetching: every source, everything that can go wrong with it, and many processes at once."""

import hashlib
import json
import os
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import normlab
from cifar_files import ARRAYS, TINY, npm_version, python_version, send, serving, tar, write_folder
from normlab.data import cache
from normlab.data.cache import cache_folder
from normlab.data.cifar10 import download, sources
from normlab.data.cifar10.cache import info, read_cache, verify
from normlab.data.cifar10.download import Limits
from normlab.data.cifar10.fetching import fetch
from normlab.data.cifar10.sources import Archive, LocalCopy, NpmPackage
from normlab.errors import DataError

ARCHIVE = tar(python_version(ARRAYS))
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()
QUICK = Limits(connect=2, read=0.5, total=5, grace=4)


@pytest.fixture(autouse=True)
def cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


def archive(url):
    return Archive(url, SHA256, len(ARCHIVE))


def get(*places, limits=QUICK, lines=None):
    return fetch(
        sources=places,
        reference=TINY,
        limits=limits,
        report=([] if lines is None else lines).append,
    )


def assert_cached():
    data = read_cache(TINY)
    for name, array in ARRAYS.items():
        cached = getattr(data, name)
        assert isinstance(cached, np.memmap)
        np.testing.assert_array_equal(cached, array)
    assert_no_strays()


def assert_no_strays():
    names = {path.name for path in cache_folder().iterdir()}
    assert names <= {"cifar10", "cifar10.lock"}


def assert_fails(*places, match, limits=QUICK, within=5.0):
    """One clear line, in bounded time, and nothing in the cache."""
    started = time.monotonic()
    with pytest.raises(DataError, match=match) as error:
        get(*places, limits=limits)
    assert time.monotonic() - started < within
    assert "\n" not in str(error.value)
    assert read_cache(TINY) is None
    assert_no_strays()


def test_an_archive_from_the_network_once(cache_root):
    requests = []

    def answer(handler):
        requests.append(handler.path)
        send(handler, ARCHIVE)

    with serving(answer) as url:
        first = get(archive(url))
        second = get(archive(url))
    assert first.source == archive(url).title
    assert second.source is None
    assert len(requests) == 1
    assert str(cache_root) in str(first)
    assert "already there" in str(second)
    assert_cached()


def test_the_next_source_is_tried_and_every_failure_has_its_line():
    lines = []
    with (
        serving(lambda handler: handler.send_error(404)) as gone,
        serving(lambda handler: send(handler, ARCHIVE)) as good,
    ):
        result = get(archive(gone), LocalCopy(Path("nowhere")), archive(good), lines=lines)
    assert result.source == archive(good).title
    assert lines[1] == "  failed: the server answered 404 Not Found"
    assert "nowhere does not exist" in lines[3]
    assert len(lines) == 5
    assert_cached()


def test_when_all_fail_the_error_gives_every_reason_and_a_remedy():
    with serving(lambda handler: handler.send_error(404)) as gone:
        assert_fails(
            archive(gone), LocalCopy(Path("nowhere")), match=r"none of 2 .*404.*nowhere.*--data"
        )


@pytest.mark.parametrize(
    ("content", "length", "match"),
    [
        (b"<html>Service is down</html>" * 9, None, "something else than a gzipped archive"),
        (ARCHIVE[: len(ARCHIVE) // 2], None, "ended early after"),
        (ARCHIVE[: len(ARCHIVE) // 2], len(ARCHIVE), "was cut off|ended early"),
        (ARCHIVE[:-1] + b"?", None, "wrong SHA-256"),
        (ARCHIVE + b"more", None, "sent more than"),
        (b"", None, "ended early after 0"),
    ],
)
def test_wrong_content_never_reaches_the_cache(content, length, match):
    with serving(lambda handler: send(handler, content, length=length)) as url:
        assert_fails(archive(url), match=match)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_transfer_cut_off_is_tried_again(failures):
    answers = []

    def answer(handler):
        answers.append(1)
        content = ARCHIVE[:5000] if len(answers) <= failures else ARCHIVE
        send(handler, content, length=len(ARCHIVE))

    with serving(answer) as url:
        get(archive(url))
    assert len(answers) == failures + 1
    assert_cached()


def test_a_transfer_cut_off_late_has_time_for_another_try(monkeypatch):
    monkeypatch.setattr(download, "_CHUNK", 1000)  # the archive is smaller than a real chunk
    answers = []

    def answer(handler):
        answers.append(1)
        if len(answers) == 1:
            send(handler, ARCHIVE[: len(ARCHIVE) // 2], length=len(ARCHIVE))
            handler.wfile.flush()
            time.sleep(0.6)
        else:
            time.sleep(0.3)
            send(handler, ARCHIVE)

    with serving(answer) as url:
        get(archive(url), limits=Limits(read=2, grace=0.5, total=20))
    assert len(answers) == 2
    assert_cached()


def test_tries_are_counted():
    answers = []

    def answer(handler):
        answers.append(1)
        handler.send_error(503)

    with serving(answer) as url:
        assert_fails(archive(url), match="answered 503")
    assert len(answers) == 3


def test_a_host_that_refuses_is_left_at_once():
    with serving(lambda handler: None) as url:
        pass  # the port is closed again
    assert_fails(archive(url), match="cannot be reached", within=2)


@pytest.mark.parametrize("before", [b"", b"\x1f\x8b only this"])
def test_a_stall_is_left_in_bounded_time(before):
    release = threading.Event()

    def answer(handler):
        send(handler, before, length=len(ARCHIVE))
        release.wait(20)

    with serving(answer) as url:
        try:
            assert_fails(
                archive(url), match="cut off|nothing|slow", limits=Limits(read=0.3, grace=1.0)
            )
        finally:
            release.set()


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (Limits(grace=0.6, total=60), "too slow to end within 1 min"),
        (Limits(grace=60, total=0.8), "not finished after"),
    ],
)
@pytest.mark.parametrize("in_headers", [False, True])
def test_a_byte_now_and_then_does_not_hold_us(limits, match, in_headers):
    """No timeout of a socket ever fires here."""
    over = threading.Event()

    def answer(handler):
        if in_headers:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        else:
            send(handler, b"\x1f\x8b", length=len(ARCHIVE))
        while not over.wait(0.05):
            handler.wfile.write(b"x")

    with serving(answer) as url:
        try:
            assert_fails(archive(url), match=match, limits=limits)
        finally:
            over.set()


@pytest.fixture
def secure_server(tmp_path, monkeypatch):
    """An https server on loopback; `server.target` is where it redirects to."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/archive":
                send(self, ARCHIVE)
                return
            self.send_response(302)
            self.send_header("Location", self.server.target)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_redirect_from_https_to_http_is_refused(secure_server):
    url = f"https://127.0.0.1:{secure_server.server_port}/"
    asked = []
    with serving(lambda handler: asked.append(1)) as plain:
        secure_server.target = plain
        assert_fails(archive(url), match="plain http; refused")
    assert not asked
    secure_server.target = "/archive"
    get(archive(url))
    assert_cached()


def test_an_unknown_certificate_is_refused(secure_server, monkeypatch):
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    url = f"https://127.0.0.1:{secure_server.server_port}/archive"
    assert_fails(archive(url), match="no secure connection")


TARBALL = tar(npm_version(ARRAYS), "package")
PACKAGE = NpmPackage("tiny", "1.0.0", hashlib.sha256(TARBALL).hexdigest(), len(TARBALL))


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Puts an `npm` on PATH that runs the given lines of shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "package.tgz").write_bytes(TARBALL)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def install(script):
        program = folder / "npm"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    return install


def test_the_npm_package(npm, tmp_path):
    npm(f'echo "$@" > {tmp_path}/arguments; cp {tmp_path}/package.tgz tiny-1.0.0.tgz')
    result = get(PACKAGE)
    assert result.source == PACKAGE.title
    assert (tmp_path / "arguments").read_text().startswith("pack tiny@1.0.0 --ignore-scripts")
    assert_cached()


@pytest.mark.parametrize(
    ("script", "match"),
    [
        ("echo npm error code E404 >&2; echo more >&2; exit 1", "npm failed: code E404"),
        ("exit 3", "npm failed: no message"),
        ("exit 0", "without writing the package"),
        ("echo something else > tiny-1.0.0.tgz", "wrong SHA-256"),
    ],
)
def test_what_npm_can_do_wrong(npm, script, match):
    npm(script)
    assert_fails(PACKAGE, match=match)


def test_npm_that_hangs_is_ended_with_its_children(npm, tmp_path):
    npm(f"sleep 60 & echo $! > {tmp_path}/child; wait")
    assert_fails(PACKAGE, match="had not finished", limits=Limits(total=0.7))
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(process_id):
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_without_an_npm_client(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert_fails(PACKAGE, match="no npm client")


@pytest.mark.parametrize(
    "place",
    [
        "keras/datasets/cifar-10-batches-py-target/cifar-10-batches-py",
        "keras/datasets/cifar-10-batches-py",
        "keras/datasets/cifar-10-batches-py.tar.gz",
        "keras/datasets/cifar-10-batches-py-target_archive",
        "work/data/cifar-10-batches-py",
        "work/cifar-10-batches-py",
        "home/data/cifar-10-python.tar.gz",
    ],
)
def test_copies_of_keras_and_torchvision_come_first(tmp_path, place):
    path = tmp_path / place
    if "batches-py" in path.name and "." not in path.name and "archive" not in path.name:
        write_folder(path, python_version(ARRAYS))
    else:
        path.parent.mkdir(parents=True)
        path.write_bytes(ARCHIVE)
    first = sources.default_sources()[0]
    assert isinstance(first, LocalCopy)
    get(*sources.default_sources())
    assert_cached()


def test_a_bad_copy_of_the_users_is_passed_over(tmp_path):
    write_folder(tmp_path / "keras/datasets/cifar-10-batches-py", {"data_batch_1": b"?"})
    lines = []
    own = [s for s in sources.default_sources() if isinstance(s, LocalCopy)]
    with serving(lambda handler: send(handler, ARCHIVE)) as url:
        get(*own, archive(url), lines=lines)
    assert "damaged pickle" in lines[1]
    assert_cached()


def test_the_order_of_the_sources():
    hosts = [s.title.split()[0] for s in sources.default_sources()]
    assert hosts[0] == "www.cs.toronto.edu"
    assert hosts[-1] == "npm"
    assert all(s.url.startswith("https:") for s in sources.REMOTE if isinstance(s, Archive))


def test_fetch_from_a_path(tmp_path):
    folder = write_folder(tmp_path / "Größe 1", python_version(ARRAYS))
    assert fetch(folder, reference=TINY, report=[].append).source == str(folder)
    assert_cached()
    with pytest.raises(DataError, match="does not exist"):
        fetch(tmp_path / "nowhere", reference=TINY, report=[].append)
    assert_cached()


@pytest.mark.parametrize("damage", ["pixel", "truncated", "removed", "empty", "garbage"])
def test_a_cached_file_that_changed_is_noticed_and_replaced(cache_root, tmp_path, damage):
    folder = write_folder(tmp_path / "data", python_version(ARRAYS))
    get(LocalCopy(folder))
    path = cache_root / "cifar10" / "x_train.npy"
    content, times = path.read_bytes(), path.stat()
    if damage == "removed":
        path.unlink()
    else:
        changed = {
            "pixel": content[:-1] + bytes([content[-1] ^ 1]),
            "truncated": content[:-5],
            "empty": b"",
            "garbage": b"\x93NUMPY garbage",
        }
        path.write_bytes(changed[damage])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # even so
    with pytest.raises(DataError, match=r"x_train.npy.*fetch` replaces it"):
        read_cache(TINY)
    assert verify(TINY).wrong == ("x_train",)
    assert "replaces it" in str(verify(TINY))
    lines = []
    get(LocalCopy(folder), lines=lines)
    assert "x_train.npy" in lines[0]
    assert verify(TINY).ok
    assert_cached()


def test_info_and_verify(cache_root, tmp_path):
    assert not info(TINY).present
    assert "fetch" in str(info(TINY))
    with pytest.raises(DataError, match="nothing to verify"):
        verify(TINY)
    assert not cache_root.exists()
    get(LocalCopy(write_folder(tmp_path / "data", python_version(ARRAYS))))
    assert info(TINY).present
    assert info(TINY).arrays["x_train"] == (15, 32, 32, 3)
    assert verify(TINY).ok
    assert "as it should be" in str(verify(TINY))


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"cannot write the cache .*NORMLAB_CACHE"):
        get(LocalCopy(tmp_path))


@pytest.mark.parametrize("call", ["fsync", "rename", "save"])
def test_a_disk_that_fills_while_the_cache_is_written(tmp_path, monkeypatch, call):
    folder = write_folder(tmp_path / "data", python_version(ARRAYS))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if call == "save":
            patch.setattr(np, "save", full)
        elif call == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(Path, "rename", full)
        assert_fails(LocalCopy(folder), match="No space left")
    get(LocalCopy(folder))
    assert_cached()


SCRIPT = """
    import sys
    sys.path[:0] = {path!r}
    from cifar_files import TINY
    from normlab.data.cifar10.fetching import fetch
    from normlab.data.cifar10.sources import Archive
    fetched = fetch(sources=[Archive({url!r}, {sha256!r}, {size})], reference=TINY)
    print("waited" if fetched.source is None else "fetched")
"""


def start(url):
    path = [str(Path(__file__).parents[2]), str(Path(normlab.__file__).parents[1])]
    script = SCRIPT.format(path=path, url=url, sha256=SHA256, size=len(ARCHIVE))
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_eight_processes_at_once_and_the_one_at_work_is_killed(cache_root):
    requested, slow = threading.Event(), threading.Event()
    answers = []

    def answer(handler):
        answers.append(1)
        if len(answers) == 1:  # the first one gets half of it and is killed
            send(handler, ARCHIVE[:5000], length=len(ARCHIVE))
            handler.wfile.flush()
            requested.set()
            slow.wait(60)
        else:
            send(handler, ARCHIVE)

    with serving(answer) as url, ExitStack() as stack:
        stack.callback(slow.set)

        def launch():
            process = stack.enter_context(start(url))
            stack.callback(process.kill)
            return process

        first = launch()
        assert requested.wait(60), first.stderr.read()
        others = [launch() for _ in range(7)]
        for process in others:  # all of them wait before the first is killed
            assert "another process" in process.stderr.readline()
        assert list(cache_root.glob(".partial-*"))
        first.send_signal(signal.SIGKILL)
        outputs = [process.communicate(timeout=200) for process in others]
    assert [process.returncode for process in others] == [0] * 7, outputs
    assert sorted(out.strip() for out, _ in outputs) == ["fetched"] + ["waited"] * 6
    assert len(answers) == 2
    assert_cached()


def test_a_lock_that_is_never_freed_ends_in_one_line(cache_root, monkeypatch):
    import filelock

    monkeypatch.setattr(cache, "_LOCK_WAIT", 0.2)
    cache_root.mkdir()
    lock = filelock.FileLock(cache_root / "cifar10.lock")
    with lock, pytest.raises(DataError, match="another process has held"):
        get(LocalCopy(Path("x")))


def test_nothing_of_the_cache_is_json_or_pickle(cache_root, tmp_path):
    """What the arrays must be is known here; a file on disk has no say in it."""
    get(LocalCopy(write_folder(tmp_path / "data", python_version(ARRAYS))))
    names = sorted(path.name for path in (cache_root / "cifar10").iterdir())
    assert names == ["x_test.npy", "x_train.npy", "y_test.npy", "y_train.npy"]
    (cache_root / "cifar10" / "manifest.json").write_text(json.dumps({"sha256": "anything"}))
    assert_cached()
